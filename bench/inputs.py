"""Random cores as they are during training."""

import torch
from torch import Tensor

from condlr_ext import reference

TAU = 0.1
MOVE = 3e-3  # norm of a step over that of the core or factor it moves, as in training


def banded_core(r: int, scale: float) -> Tensor:
    """Return a random core inside the band around `scale`, with a third of its singular values on the edges."""
    sigma = scale * (1 + TAU / 2 * (3 * torch.rand(r, dtype=torch.float64) - 1.5))
    for _ in range(100):  # the band moves with the clipped values
        sigma = sigma.clamp(*reference.clip_edges(sigma, TAU))
    P, Q = (torch.linalg.qr(torch.randn(r, r, dtype=torch.float64))[0] for _ in range(2))
    return ((P * sigma) @ Q.mT).float()


def core_after_step(r: int) -> Tensor:
    """Return a clipped core moved by one step."""
    S, step = banded_core(r, 1.0), torch.randn(r, r)
    return S + MOVE * S.norm() / step.norm() * step
