"""svd, polar and clip_spectrum by Triton kernels: sizes, memory and launches.

Same signatures and results as the ops in ops/linalg.py. Nothing here looks at a value, so nothing waits for the device.
"""

import math

import torch
import triton
from torch import Tensor

from .. import architecture
from ..qr import launch as qr
from ..runtime import cooperative
from ..runtime.launching import on
from . import band, bound, jacobi, newton_schulz
from .product import product

TALL = 4  # times as many rows as columns: what the rotations turn is R of A = Q R
LARGEST_SINGLE = jacobi.PAIR  # columns that one program turns


def svd(A: Tensor):
    """U [*, m, k], sigma [*, k] descending, V [*, n, k], k = min(m, n), and info."""
    return tuple(t.reshape(A.shape[:-2] + t.shape[1:]) for t in _svd(_batch(A)))


def polar(A: Tensor):
    """Q = U Vᵀ [*, m, n] and info.

    By matrix products for 64 < k <= 512 in float32, for matrices with kappa up to 10; of the others, flagged on the
    device, by svd in float64.
    """
    batch = _batch(A)
    Q = torch.empty_like(batch, memory_format=torch.contiguous_format)
    dtype = wanted = None
    if _by_products(batch):
        with on(A.device):
            dtype, wanted = torch.float64, newton_schulz.polar_factor(_tall(batch), _tall(Q))
    U, _, V, info = _svd(batch, dtype, wanted)
    if Q.numel():
        with on(A.device):
            product(U, V.mT, Q, mode=wanted)
    return Q.reshape(A.shape), info.reshape(A.shape[:-2])


def clip_spectrum(A: Tensor, tau: float | Tensor, band_: int, sigma_max: float | Tensor):
    """A with its singular values in the band, in the correction form A + U diag(shift) Vᵀ, and info.

    tau, sigma_max: numbers, or tensors of one element on A's device, read when the kernels run.
    """
    batch = _batch(A)
    constraint = torch.empty(1, 3, dtype=torch.float64, device=A.device)
    for place, value in zip(constraint[0], (tau, band_, sigma_max), strict=True):
        if isinstance(value, Tensor):
            place.copy_(value.reshape(()))
        else:
            place.fill_(value)
    row = torch.zeros(len(batch), dtype=torch.int32, device=A.device)
    out, info = clip_each(batch, constraint, row)
    return out.reshape(A.shape), info.reshape(A.shape[:-2])


def clip_each(A: Tensor, constraint: Tensor, row: Tensor):
    """clip_spectrum of a batch [B, m, n] whose matrices have constraints of their own.

    constraint [*, 3] float64: tau, band, sigma_max in rows any number of elements apart, of which matrix i takes
    row[i] (row [B] int32).

    float32 serves matrices that are not far from the band: up to 64 singular values kappa at most 3; beyond, by matrix
    products and not for the optimal band, kappa at most 10. kappa of what was stored is checked. The others, and where
    the check fails, are flagged on the device and go through Jacobi's launches in float64, where the programs of all
    others return at once.
    """
    B, m, n = A.shape
    k = min(m, n)
    out = torch.empty_like(A, memory_format=torch.contiguous_format)
    info, wanted, mode = torch.zeros(3, B, dtype=torch.int32, device=A.device)
    if out.numel() == 0:
        return out, info
    interval = torch.empty(B, 2, dtype=torch.float64, device=A.device)
    dtypes = dict.fromkeys((A.dtype, torch.float64))
    if _by_products(A):
        with on(A.device):
            wanted = newton_schulz.clip_spectrum(_tall(A), constraint, row, _tall(out))
        dtypes = (torch.float64,)
    for dtype in dtypes:
        some = dtype != A.dtype
        U, sigma, V, svd_info = _svd(A, dtype, wanted if some else None)
        shift = torch.empty_like(sigma)
        with on(A.device):
            band.shifts[(B,)](
                sigma, svd_info, constraint, row, shift, mode, wanted, info, interval, k, constraint.stride(0),
                torch.finfo(A.dtype).eps, SOME=some, **band.config(architecture(A.device), k),
            )  # fmt: skip
            product(U, V.mT, out, C=A, weight=shift, mode=mode)
            if dtype != torch.float64:
                bound.check(_tall(out), interval, wanted)
    return out, info


def _batch(A: Tensor) -> Tensor:
    """One batch dimension in front of the matrices."""
    return A.reshape(math.prod(A.shape[:-2]), *A.shape[-2:])


def _by_products(A: Tensor) -> bool:
    return A.dtype == torch.float32 and min(A.shape[-2:]) > LARGEST_SINGLE and len(A) > 0


def _tall(A: Tensor) -> Tensor:
    """A or its transpose, which has the same singular values."""
    return A if A.shape[-2] >= A.shape[-1] else A.mT


def _svd(A: Tensor, dtype: torch.dtype | None = None, wanted: Tensor | None = None):
    """svd of a batch [B, m, n] in this dtype; only of the matrices where wanted [B] is not 0, where it is given."""
    B, m, n = A.shape
    if m < n:
        V, sigma, U, info = _svd(A.mT, dtype, wanted)
        return U, sigma, V, info
    new = {"dtype": dtype or A.dtype, "device": A.device}
    if m > TALL * n > 0 and B:
        Q, R, _ = qr.qr(A.to(new["dtype"]))
        W, sigma, V, info = _svd(R, dtype, wanted)
        with on(A.device):
            return product(Q, W, torch.empty(B, m, n, **new)), sigma, V, info
    U, sigma, V = torch.empty(B, m, n, **new), torch.empty(B, n, **new), torch.empty(B, n, n, **new)
    info = torch.zeros(B, dtype=torch.int32, device=A.device)
    if B == 0 or n == 0:
        return U, sigma, V, info
    with on(A.device):
        solve = _single if n <= LARGEST_SINGLE else _blocks
        return solve(A, U, sigma, V, info, info if wanted is None else wanted, wanted is not None)


def _single(A: Tensor, U: Tensor, sigma: Tensor, V: Tensor, info: Tensor, wanted: Tensor, some: bool):
    """One program per matrix."""
    B, m, n = A.shape
    R = triton.next_power_of_2(max(n, 16))
    jacobi.svd[(B,)](
        A, U, sigma, V, U.new_empty(B, R, R), info, wanted, m, n, triton.next_power_of_2(n), *A.stride(),
        SOME=some, R=R, SWEEPS=jacobi.SWEEPS, **_config(U, R),
    )  # fmt: skip
    return U, sigma, V, info


def _blocks(A: Tensor, U: Tensor, sigma: Tensor, V: Tensor, info: Tensor, wanted: Tensor, some: bool):
    """A team of programs per matrix, which turn pairs of blocks of columns."""
    B, m, n = A.shape
    blocks = triton.next_power_of_2(triton.cdiv(2 * n, jacobi.PAIR))
    members, together = cooperative.of_batch(A.device, B, blocks // 2)
    room = jacobi.room_for(m, n, members)
    options = jacobi.config_of_blocks(architecture(A.device), _name(U))
    jacobi.svd_by_blocks[(B * members,)](
        A, U, sigma, V, U.new_empty(B, room), info.new_empty(B, options["SWEEPS"]), info, wanted,
        cooperative.counters(B, A.device), m, n, blocks, room, members, *A.stride(),
        SOME=some, R=triton.next_power_of_2(n), **options, **together,
    )  # fmt: skip
    return U, sigma, V, info


def _config(U: Tensor, R: int) -> dict:
    return jacobi.config(architecture(U.device), _name(U), R)


def _name(U: Tensor) -> str:
    return "fp64" if U.dtype == torch.float64 else "fp32"
