"""DLRT: dynamical low-rank training, whose ranks adapt."""

from pydantic import Field
from torch import nn
from torch.optim import Optimizer

from ... import baselines
from .base import LowRank


class DLRT(LowRank):
    """condlr_ext.baselines.DLRT; budget or rank choose the ranks at the start.

    Attributes:
        tolerance: Of the truncation, relative to the norm of the core.
    """

    name = "dlrt"
    title = "DLRT"

    tolerance: float = Field(ge=0, lt=1)

    def marks(self) -> list[str]:
        return [*super().marks(), *self.shown(tolerance="ϑ={:g}")]

    def make_optimizer(self, model: nn.Module, **rates: float) -> Optimizer:
        return baselines.DLRT(model, **rates, tolerance=self.tolerance)
