"""Check of up to 64 singular values of a stored result against their bounds: the kernel and its launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime.launching import launch
from .product import product


@triton.jit
def definite(G_ptr, interval_ptr, active_mask_ptr, n, R: tl.constexpr):
    """Set active_mask = 1 where I + M or I - M is not positive definite, for M = p G + q I, G [n, n] float64.

    Both are eliminated; all pivots must be positive. R >= n. One program per matrix.
    """
    batch = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, R)
    inside = (i < n)[:, None] & (i < n)[None, :]
    diagonal = i[:, None] == i[None, :]
    p, q = tl.load(interval_ptr + 2 * batch), tl.load(interval_ptr + 2 * batch + 1)
    M = p * tl.load(G_ptr + (batch * n + i[:, None]) * n + i[None, :], mask=inside, other=0.0)
    M += tl.where(inside & diagonal, q, 0.0)
    above, below = diagonal + M, diagonal - M
    bad = tl.cast(n, tl.int32) * 0
    for j in range(n):
        column = tl.sum(tl.where(i[None, :] == j, above, 0.0), 1)
        pivot = tl.sum(tl.where(i == j, column, 0.0), 0)
        bad += tl.where(pivot > 0, 0, 1)  # also NaN
        above -= column[:, None] * (column / tl.where(pivot > 0, pivot, 1.0))[None, :]
        column = tl.sum(tl.where(i[None, :] == j, below, 0.0), 1)
        pivot = tl.sum(tl.where(i == j, column, 0.0), 0)
        bad += tl.where(pivot > 0, 0, 1)
        below -= column[:, None] * (column / tl.where(pivot > 0, pivot, 1.0))[None, :]
    if (p != 0) & (bad > 0):
        tl.store(active_mask_ptr + batch, 1)


def check(A: Tensor, interval: Tensor, active_mask: Tensor) -> None:
    """Set active_mask [batch] = 1 where singular values of A [batch, m, n], n <= 64, n <= m, are out of bounds.

    interval [batch, 2] float64 holds p and q: the eigenvalues of p AᵀA + q I should be in [-1, 1]; p = 0: no check.
    """
    B, _, n = A.shape
    G = product(A.mT, A, torch.empty(B, n, n, dtype=torch.float64, device=A.device), wide=True)
    launch(definite, (B,), G, interval, active_mask, n, R=triton.next_power_of_2(max(n, 16)), num_warps=8, num_stages=1)


def variants(architecture: str):
    """Yield what to compile ahead of time: (kernel, signature types, constexprs, options, is a default)."""
    types = dict(G_ptr="*fp64", interval_ptr="*fp64", active_mask_ptr="*i32", n="i32")
    for R in (16, 32, 64):
        yield definite, types, dict(R=R), dict(num_warps=8, num_stages=1), True
