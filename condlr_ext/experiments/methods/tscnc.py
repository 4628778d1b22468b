"""TSCNC: training with channel gates and penalties, then a search of weight masks, then training of what is left."""

from collections.abc import Callable

from pydantic import Field
from torch import Tensor, nn

from ... import pruning, regularizers
from ..inspect_layers import dense_layers
from ..networks import HEAD
from .base import EXCLUDED, Method


class TSCNC(Method):
    """Gates and penalties for half of the epochs, mask search for a quarter, training of the kept weights for the rest.

    Attributes:
        tsc: Weight of the penalty of the gates.
        cnc: Weight of the penalty of the classifier's condition number.
        keep: Share of the hidden weights that the masks keep.
    """

    name = "tscnc"
    title = "TSCNC"

    tsc: float = Field(1.0, ge=0, allow_inf_nan=False)
    cnc: float = Field(0.01, ge=0, allow_inf_nan=False)
    keep: float = Field(0.27, gt=0, le=1)

    def marks(self) -> list[str]:
        return self.shown(keep="keep {:g}")

    def check(self, model: nn.Module, epochs: int) -> None:
        self.phases(epochs)

    def phases(self, epochs: int) -> dict[int, Callable[[nn.Module], object]]:
        search, rest = epochs // 2, epochs - epochs // 4
        changes = {0: lambda model: pruning.add_gates(model, exclude=_ungated(model))}
        changes[search] = lambda model: pruning.add_masks(model, self.keep, exclude=EXCLUDED)
        changes[rest] = pruning.freeze_masks
        if len(changes) < 3 or rest == epochs:
            raise ValueError(f"train: tscnc needs at least 4 epochs, got {epochs}")
        return changes

    def penalty(self, model: nn.Module, samples: int) -> Tensor:
        tsc = regularizers.tsc(model, exclude=_ungated(model)) / samples
        head = next(m for name, m in model.named_modules() if name.split(".")[-1] == HEAD)
        return self.tsc * tsc + self.cnc * regularizers.cnc(head.weight)

    def finish(self, model: nn.Module) -> int:
        pruning.make_permanent(model)
        return sum(int((layer.weight == 0).sum()) for layer in dense_layers(model).values())

    def rebuild(self, model: nn.Module, ranks: dict[str, int], epoch: int | None = None, epochs: int = 0) -> None:
        if epoch is not None:
            for at, change in self.phases(epochs).items():
                if at < epoch:
                    change(model)


def _ungated(model: nn.Module) -> list[str]:
    """Return the first layer and the classifier, as in the released code of TSCNC."""
    return [next(iter(dense_layers(model))), EXCLUDED]
