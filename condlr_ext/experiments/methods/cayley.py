"""SGD on the Stiefel manifold by the Cayley transform."""

import math
from typing import ClassVar

from pydantic import Field, model_validator
from torch import nn
from torch.optim import Optimizer

from ...baselines import CayleySGD
from ..inspect_layers import dense_layers
from .base import LowRank


class Stiefel(LowRank):
    """SGD with orthonormal matrices: the factors of low-rank layers, or the dense weights themselves.

    Attributes:
        sgd: The optimizer's class.
        tau: kappa <= 1 + tau of the cores; inf is no bound.
        full: Keep the dense weights orthonormal, as in the published tables.
    """

    sgd: ClassVar[type[Optimizer]]

    tau: float = Field(math.inf, ge=0)
    full: bool = False

    @classmethod
    def _needs_size(cls, options: dict) -> bool:
        return not options.get("full")

    @model_validator(mode="after")
    def _full_is_no_size(self):
        if self.full and self.given.keys() & {"budget", "rank", "init"}:
            raise ValueError(f"run: {self.name} with full has no rank, budget or init")
        return self

    def marks(self) -> list[str]:
        return [*(["full"] if self.full else []), *self.shown(tau="τ={:g}"), *super().marks()]

    def make_optimizer(self, model: nn.Module, **rates: float) -> Optimizer:
        weights = tuple(dense_layers(model)) if self.full else ()
        return self.sgd(model, **rates, tau=self.tau, weights=weights)


class Cayley(Stiefel):
    name = "cayley"
    title = "Cayley SGD"
    sgd = CayleySGD
