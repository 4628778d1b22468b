"""Truncated SVD of a trained dense network, then training of the low-rank one without a bound."""

from collections.abc import Callable

from pydantic import Field
from torch import nn

from .base import Sized


class SVDPrune(Sized):
    """Plain SGD before and after the truncation.

    Attributes:
        finetune: Share of the epochs after the truncation.
    """

    name = "svd-prune"
    title = "SVD prune"

    finetune: float = Field(0.2, gt=0, lt=1)

    def phases(self, epochs: int) -> dict[int, Callable[[nn.Module], object]]:
        return {max(0, epochs - max(1, round(self.finetune * epochs))): self.compress}
