"""CondLR as in the code released with the paper."""

from pydantic import Field
from torch import nn
from torch.optim import Optimizer

from ...baselines import ReleasedCondLR
from .base import LowRank


class Released(LowRank):
    """condlr_ext.baselines.ReleasedCondLR.

    Attributes:
        tau: kappa <= 1 + tau.
    """

    name = "released"
    title = "released CondLR"

    tau: float = Field(ge=0)

    def marks(self) -> list[str]:
        return [*self.shown(tau="τ={:g}"), *super().marks()]

    def make_optimizer(self, model: nn.Module, **rates: float) -> Optimizer:
        return ReleasedCondLR(model, **rates, tau=self.tau)
