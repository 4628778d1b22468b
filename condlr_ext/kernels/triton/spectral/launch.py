"""svd, polar and clip_spectrum by Triton kernels: sizes, memory and launches.

Signatures and results are those of the ops in ops/linalg.py. The host reads no value, so it never waits for the device.
"""

import math

import torch
import triton
from torch import Tensor

from .. import devices
from ..qr.launch import qr
from ..runtime import cooperative
from ..runtime.launching import launch, on
from . import band, bound, jacobi, newton_schulz
from .product import product

TALL = 4  # with more rows per column, the rotations act on R of A = Q R
LARGEST_SINGLE = jacobi.PAIR  # columns that one program rotates


def svd(A: Tensor):
    """Return U [*, m, k], sigma [*, k] descending, V [*, n, k], k = min(m, n), and info."""
    return tuple(t.reshape(A.shape[:-2] + t.shape[1:]) for t in _svd(_batch(A)))


def polar(A: Tensor):
    """Return Q = U Vᵀ [*, m, n] and info.

    Matrix products serve 64 < k <= 512 in float32 for kappa up to 10. The device flags the others, which take the svd
    in float64.
    """
    batch = _batch(A)
    Q = torch.empty_like(batch, memory_format=torch.contiguous_format)
    dtype = active_mask = None
    if _by_products(batch):
        with on(A.device):
            dtype, active_mask = torch.float64, newton_schulz.polar_factor(_tall(batch), _tall(Q))
    U, _, V, info = _svd(batch, dtype, active_mask)
    if Q.numel():
        with on(A.device):
            product(U, V.mT, Q, mode=active_mask)
    return Q.reshape(A.shape), info.reshape(A.shape[:-2])


def clip_spectrum(A: Tensor, tau: float | Tensor, band_: int, sigma_max: float | Tensor):
    """Return A with its singular values in the band, as A + U diag(shift) Vᵀ, and info.

    tau and sigma_max are numbers, or tensors of one element on A's device, which the kernels read when they run.
    """
    batch = _batch(A)
    constraint = torch.empty(1, 3, dtype=torch.float64, device=A.device)
    for entry, value in zip(constraint[0], (tau, band_, sigma_max), strict=True):
        if isinstance(value, Tensor):
            entry.copy_(value.reshape(()))
        else:
            entry.fill_(value)
    row = torch.zeros(len(batch), dtype=torch.int32, device=A.device)
    out, info = clip_each(batch, constraint, row)
    return out.reshape(A.shape), info.reshape(A.shape[:-2])


def clip_each(A: Tensor, constraint: Tensor, row: Tensor):
    """Return clip_spectrum of a batch whose matrices have constraints of their own, and info.

    float32 serves well-conditioned matrices: kappa up to 3 for at most 64 singular values; beyond, by matrix products
    and not for the optimal band, kappa up to 10. kappa of the stored result is checked. The device flags the other
    matrices and those that fail the check for Jacobi's launches in float64, whose other programs return at once.

    Args:
        A: Batch [B, m, n].
        constraint: tau, band and sigma_max [*, 3] float64, with rows any number of elements apart.
        row: Row of constraint for each matrix [B] int32.
    """
    B, m, n = A.shape
    k = min(m, n)
    out = torch.empty_like(A, memory_format=torch.contiguous_format)
    info, active_mask, mode = torch.zeros(3, B, dtype=torch.int32, device=A.device)
    if out.numel() == 0:
        return out, info
    interval = torch.empty(B, 2, dtype=torch.float64, device=A.device)
    dtypes = dict.fromkeys((A.dtype, torch.float64))
    if _by_products(A):
        with on(A.device):
            active_mask = newton_schulz.clip_spectrum(_tall(A), constraint, row, _tall(out))
        dtypes = (torch.float64,)
    for dtype in dtypes:
        masked = dtype != A.dtype
        U, sigma, V, svd_info = _svd(A, dtype, active_mask if masked else None)
        weight = torch.empty_like(sigma)
        with on(A.device):
            launch(
                band.weights, (B,),
                sigma, svd_info, constraint, row, weight, mode, active_mask, info, interval, k, constraint.stride(0),
                torch.finfo(A.dtype).eps, MASKED=masked, **band.config(devices.architecture(A.device), k),
            )  # fmt: skip
            product(U, V.mT, out, C=A, weight=weight, mode=mode)
            if dtype != torch.float64:
                bound.check(_tall(out), interval, active_mask)
    return out, info


def _batch(A: Tensor) -> Tensor:
    """Return A [batch, m, n]."""
    return A.reshape(math.prod(A.shape[:-2]), *A.shape[-2:])


def _by_products(A: Tensor) -> bool:
    return A.dtype == torch.float32 and min(A.shape[-2:]) > LARGEST_SINGLE and len(A) > 0


def _tall(A: Tensor) -> Tensor:
    """Return A or its transpose, whichever has at least as many rows as columns."""
    return A if A.shape[-2] >= A.shape[-1] else A.mT


def _svd(A: Tensor, dtype: torch.dtype | None = None, active_mask: Tensor | None = None):
    """Return svd of a batch [B, m, n] in this dtype; with an active mask [B], only where that is not 0."""
    B, m, n = A.shape
    if m < n:
        V, sigma, U, info = _svd(A.mT, dtype, active_mask)
        return U, sigma, V, info
    new = {"dtype": dtype or A.dtype, "device": A.device}
    if m > TALL * n > 0 and B:
        Q, R, _ = qr(A.to(new["dtype"]))
        W, sigma, V, info = _svd(R, dtype, active_mask)
        with on(A.device):
            return product(Q, W, torch.empty(B, m, n, **new)), sigma, V, info
    U, sigma, V = torch.empty(B, m, n, **new), torch.empty(B, n, **new), torch.empty(B, n, n, **new)
    info = torch.zeros(B, dtype=torch.int32, device=A.device)
    if B == 0 or n == 0:
        return U, sigma, V, info
    with on(A.device):
        solve = _single if n <= LARGEST_SINGLE else _blocks
        return solve(A, U, sigma, V, info, info if active_mask is None else active_mask, active_mask is not None)


def _single(A: Tensor, U: Tensor, sigma: Tensor, V: Tensor, info: Tensor, active_mask: Tensor, masked: bool):
    """Launch one program per matrix."""
    B, m, n = A.shape
    R = triton.next_power_of_2(max(n, 16))
    launch(
        jacobi.svd, (B,),
        A, U, sigma, V, U.new_empty(B, R, R), info, active_mask, m, n, triton.next_power_of_2(n), *A.stride(),
        MASKED=masked, R=R, SWEEPS=jacobi.SWEEPS, **_config(U, R),
    )  # fmt: skip
    return U, sigma, V, info


def _blocks(A: Tensor, U: Tensor, sigma: Tensor, V: Tensor, info: Tensor, active_mask: Tensor, masked: bool):
    """Launch a group of programs per matrix, which rotate pairs of blocks of columns."""
    B, m, n = A.shape
    blocks = triton.next_power_of_2(triton.cdiv(2 * n, jacobi.PAIR))
    group_size, grid = cooperative.batch_groups(A.device, B, blocks // 2)
    size = jacobi.workspace_size(m, n, group_size)
    options = jacobi.config_of_blocks(devices.architecture(A.device), _name(U))
    launch(
        jacobi.svd_by_blocks, (B * group_size,),
        A, U, sigma, V, U.new_empty(B, size), info.new_empty(B, options["SWEEPS"]), info, active_mask,
        cooperative.counters(B, A.device), cooperative.failure_flag(A.device), m, n, blocks, size, group_size,
        *A.stride(), MASKED=masked, R=triton.next_power_of_2(n), **options, **grid,
    )  # fmt: skip
    return U, sigma, V, info


def _config(U: Tensor, R: int) -> dict:
    return jacobi.config(devices.architecture(U.device), _name(U), R)


def _name(U: Tensor) -> str:
    return "fp64" if U.dtype == torch.float64 else "fp32"
