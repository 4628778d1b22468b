"""The l-infinity and l2 balls that gradient attacks move in: random start, steepest direction, projection."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference


class Ball(NamedTuple):
    """The functions of a norm that attacks need; radii broadcast against samples [N, ...]."""

    sample: Callable[[Tensor, torch.Generator | None], Tensor]  # random points of the unit ball around 0, shaped like x
    direction: Callable[[Tensor], Tensor]  # steepest ascent for a gradient; 0 for 0
    project: Callable[[Tensor, Tensor], Tensor]  # (perturbation, radius) -> perturbation in the ball around 0
    norm: Callable[[Tensor], Tensor]  # of each sample, [N]

    def move(self, point: Tensor, center: Tensor, radius: Tensor) -> Tensor:
        """Project point onto the ball around center, then clip to [0, 1]."""
        return (center + self.project(point - center, radius)).clamp(0, 1)


def unsqueeze_like(values: Tensor, t: Tensor) -> Tensor:
    """View values [N] so that they broadcast against t [N, ...]."""
    return values.view(-1, *[1] * (t.ndim - 1))


def linf_norm(t: Tensor) -> Tensor:
    return _flatten(t).abs().amax(1)


def l2_norm(t: Tensor) -> Tensor:
    return reference.norm(_flatten(t), 1)


def unit_l2(t: Tensor) -> Tensor:
    """Divide each sample by its l2 norm; 0 stays 0."""
    largest = unsqueeze_like(linf_norm(t), t)
    scaled = t / torch.where(largest > 0, largest, 1)  # the squares of tiny entries would underflow
    return scaled / unsqueeze_like(l2_norm(scaled), t).clamp_min(1)


def _flatten(t: Tensor) -> Tensor:
    return t.reshape(len(t), math.prod(t.shape[1:]))  # not -1, which is ambiguous for an empty batch


def _linf_sample(x: Tensor, generator) -> Tensor:
    return torch.rand(x.shape, dtype=x.dtype, device=x.device, generator=generator) * 2 - 1


def _linf_project(delta: Tensor, radius: Tensor) -> Tensor:
    return delta.clamp(-radius, radius)


def _l2_sample(x: Tensor, generator) -> Tensor:
    """Draw a uniform direction at a uniform distance, as in torchattacks.

    Ascent from these points reaches a little higher loss than from points uniform in the ball, which in high
    dimensions are nearly all near its surface.
    """
    like = {"dtype": x.dtype, "device": x.device, "generator": generator}
    direction = unit_l2(torch.randn(x.shape, **like))
    return direction * torch.rand(len(x), *[1] * (x.ndim - 1), **like)


def _l2_project(delta: Tensor, radius: Tensor) -> Tensor:
    norms = unsqueeze_like(l2_norm(delta), delta)
    return torch.where(norms > radius, delta * (radius / torch.where(norms > 0, norms, 1)), delta)


BALLS = {
    "linf": Ball(_linf_sample, torch.sign, _linf_project, linf_norm),
    "l2": Ball(_l2_sample, unit_l2, _l2_project, l2_norm),
}
