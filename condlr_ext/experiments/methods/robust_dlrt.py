"""RobustDLRT: DLRT with a penalty on the spectrum of the cores."""

from pydantic import Field
from torch import nn
from torch.optim import Optimizer

from ... import baselines
from .dlrt import DLRT


class RobustDLRT(DLRT):
    """condlr_ext.baselines.RobustDLRT.

    Attributes:
        beta: Weight of the penalty.
        core_steps: Steps of the cores between two steps of the bases.
    """

    name = "robust-dlrt"
    title = "RobustDLRT"
    whole_each_step = False  # within a cycle the model has twice its rank, with meaningless singular values near 0

    beta: float = Field(ge=0, allow_inf_nan=False)
    core_steps: int = Field(10, ge=1)

    def marks(self) -> list[str]:
        return [*super().marks(), *self.shown(beta="β={:g}")]

    def make_optimizer(self, model: nn.Module, **rates: float) -> Optimizer:
        options = {"tolerance": self.tolerance, "beta": self.beta, "core_steps": self.core_steps}
        return baselines.RobustDLRT(model, **rates, **options)

    def settle(self, optimizer: Optimizer) -> None:
        optimizer.truncate()
