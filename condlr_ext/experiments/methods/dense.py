"""The dense network, trained with plain SGD."""

import math
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.optim import Optimizer

from ... import linalg
from ..inspect_layers import TWO_FACTOR, dense_layers, low_rank_layers
from .base import LowRank


class PlainSGD(LowRank):
    """Plain SGD, with a cap on the singular values of the hidden weights as a control.

    Attributes:
        sigma_max: No hidden weight has a singular value above it after any step.
        cap: How sigma_max is kept: "clip" the spectrum, or "rescale" the whole weight.
    """

    sigma_max: float | None = Field(None, gt=0)
    cap: Literal["clip", "rescale"] = "clip"

    @model_validator(mode="after")
    def _cap_of_something(self):
        if "cap" in self.given and self.sigma_max is None:
            raise ValueError(f"run: {self.name} takes cap with sigma_max only, got cap={self.cap}")
        return self

    def marks(self) -> list[str]:
        return [*self.shown(sigma_max="σ≤{:g}", cap="{}"), *super().marks()]

    def make_optimizer(self, model: nn.Module, **rates: float) -> Optimizer:
        optimizer = super().make_optimizer(model, **rates)
        if self.sigma_max is not None:
            keep_below(optimizer, model, self.sigma_max, self.cap)
        return optimizer


class Dense(PlainSGD):
    """The dense network; budget and rank are for init="pca", a control that starts on fewer directions."""

    name = "dense"
    title = "dense"

    @classmethod
    def _needs_size(cls, options: dict) -> bool:
        return options.get("init") is not None

    @model_validator(mode="after")
    def _size_of_something(self):
        if self.init is None and self.given.keys() & {"budget", "rank"}:
            raise ValueError('run: dense takes budget and rank with init="pca" only')
        return self

    @property
    def low_rank(self) -> bool:
        return False

    def prepare(self, model: nn.Module, x: Tensor) -> None:
        self.align(model, x)

    def rebuild(self, model: nn.Module, ranks: dict[str, int], epoch: int | None = None, epochs: int = 0) -> None:
        pass


def keep_below(optimizer: Optimizer, model: nn.Module, sigma_max: float, how: str) -> None:
    """Bound the singular values of every hidden weight by sigma_max, now and after every step.

    The weight A B of a two-factor layer is bounded by bounding each of A and B by √sigma_max.

    Args:
        optimizer: Gets a hook.
        model: Its weights are changed in place.
        sigma_max: The bound.
        how: "clip" takes the nearest matrix within the bound, "rescale" shrinks the whole weight.
    """

    @torch.no_grad()
    def after(*_) -> None:
        for layer in {**dense_layers(model), **low_rank_layers(model)}.values():
            parts = list(layer) if isinstance(layer, TWO_FACTOR) else [layer]
            most = sigma_max ** (1 / len(parts))
            for part in parts:
                W = part.weight.flatten(1)
                if how == "clip":
                    bounded = linalg.clip_spectrum(W, math.inf, sigma_max=most)
                else:
                    bounded = W * (most / linalg.svd(W).sigma[0]).clamp_max(1)
                part.weight.copy_(bounded.reshape(part.weight.shape))

    after()
    optimizer.register_step_post_hook(after)
