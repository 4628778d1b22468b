"""Two unconstrained factors, W = A B, trained with plain SGD."""

from torch import nn

from ...baselines import vanilla_low_rank
from .dense import PlainSGD


class Vanilla(PlainSGD):
    name = "vanilla"
    title = "vanilla UVᵀ"

    def compress(self, model: nn.Module) -> None:
        vanilla_low_rank(model, self.chosen_ranks(model))

    def replace(self, model: nn.Module, ranks: dict[str, int]) -> None:
        vanilla_low_rank(model, ranks)
