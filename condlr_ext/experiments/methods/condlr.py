"""CondLR: W = U S Vᵀ with orthonormal factors and a bounded condition number after every step."""

from typing import Literal

from pydantic import Field
from torch import nn
from torch.optim import Optimizer

from ...optim import CondLRAdamW, CondLRSGD
from .base import LowRank


class CondLR(LowRank):
    """CondLRSGD or CondLRAdamW on low-rank layers.

    Attributes:
        tau: kappa <= 1 + tau; inf is no bound.
        sigma_max: Bound of the singular values.
        band: How the spectrum is clipped, see CondLRSGD.
        optimizer: "sgd" or "adamw", which has no momentum.
    """

    name = "condlr"
    title = "CondLR"
    bounds_kappa = True

    tau: float = Field(ge=0)
    sigma_max: float | None = Field(None, gt=0)
    band: Literal["rms", "mean", "optimal"] = "rms"
    optimizer: Literal["sgd", "adamw"] = "sgd"

    def marks(self) -> list[str]:
        adamw = ["AdamW"] if self.optimizer == "adamw" else []
        return [*adamw, *self.shown(tau="τ={:g}", sigma_max="σ≤{:g}", band="{}"), *super().marks()]

    def make_optimizer(self, model: nn.Module, lr: float, momentum: float, weight_decay: float) -> Optimizer:
        options = {"weight_decay": weight_decay, "tau": self.tau, "sigma_max": self.sigma_max, "band": self.band}
        if self.optimizer == "adamw":
            return CondLRAdamW(model, lr, **options)
        return CondLRSGD(model, lr, momentum=momentum, **options)

    def skipped(self, optimizer: Optimizer) -> int:
        return int(optimizer.skipped.sum())
