"""polar and clip_spectrum of well-conditioned float32 matrices with 64 < n <= 512 columns by matrix products.

The polar factor Q of A is the limit of X <- a X - b X XᵀX, with a and b chosen in every step so that the interval of
the singular values of X shrinks fastest onto 1. The singular values of A are the eigenvalues of the symmetric H = QᵀA,
and the polar factor of a symmetric Y is its matrix sign: (Y + Y sign(Y)) / 2 is the part of Y with positive
eigenvalues. That part of lo I - H is what clipping adds, that of H - hi I what it subtracts; eigenvalues in the band or
at an edge contribute only rounding.

One launch does everything: a cooperative group of programs for each matrix shares the tiles of every product, with a
barrier after each. Every member computes all sums over a matrix itself, so that all take the same decisions. The number
of steps is fixed. A matrix that this does not serve is flagged and left unchanged.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import devices
from ..devices import INTERPRETED
from ..runtime import cooperative
from ..runtime.cooperative import barrier, copy, product, reset, split_program_id, timed_out
from ..runtime.launching import launch, variant
from . import band
from .product import CORRECT, KEEP

# least singular value over the norm: kappa 10, and the bound of the norm exceeds sigma_1 by up to 512^(1/8) = 2.18
POLAR = 0.1 / 2.2
# an eigenvalue this close to an edge, in units of the norm, is clipped with an error of an eighth of the distance
SIGN = 4e-7
DOUBLINGS = tl.constexpr(13)
LARGEST = 2**29 - 1  # elements of a matrix: offsets within its workspace are 32-bit integers


@triton.jit
def _square(X_ptr, n, BLOCK: tl.constexpr):
    """Return ‖X‖_F² and the trace of X [n, n] contiguous, in float64."""
    square = tl.zeros([BLOCK], tl.float64)
    trace = tl.zeros([BLOCK], tl.float64)
    for begin in range(0, n * n, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        x = tl.load(X_ptr + at, mask=at < n * n, other=0.0).to(tl.float64)
        square += x * x
        trace += tl.where(at // n == at % n, x, 0.0)
    return tl.sum(square, 0), tl.sum(trace, 0)


@triton.jit
def step(least):
    """Return a and b of a step for singular values in [least, 1], and the least one after it; float64.

    x (a - b x²) on [least, u] deviates least from 1 where both ends and the maximum deviate equally; it is then scaled
    so that the maximum is 1. While the polynomial falls steeply to almost 0 at the right end, u exceeds 1: a singular
    value that rounding puts beyond the end would change its sign.
    """
    u = tl.where(least < 0.3, 1.01, 1.0)
    third = (least * least + least * u + u * u) / 3  # of a / b
    highest = 2 * third * tl.sqrt(third)
    return 3 * third / highest, 1 / highest, least * (3 * third - least * least) / highest


@triton.jit
def _iterate(
    X_ptr, other_ptr, G_ptr, m, n, count, least, member, group_size, counter_ptr,
    dtype: tl.constexpr, TILE: tl.constexpr, WIDE_TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Compute the polar factor of X [count, m, n] with singular values in [least, 1]; sums are in dtype.

    Return a pointer to it and one to the other buffer of its size. G holds (I - XᵀX) / 2 of before the last step, which
    starts from singular values in [1 - 2e-4, 1]. XᵀX - I soon is small, and so is the rounding of products with it.
    """
    SIDE: tl.constexpr = WIDE_TILE if dtype == tl.float64 else TILE
    least = tl.cast(least, tl.float64)
    while least < 1 - 2e-4:
        a, b, least = step(least)
        product(
            X_ptr, X_ptr, X_ptr, G_ptr, n, n, m, count, 1.0, 0.0, -1.0, member, group_size, counter_ptr,
            True, dtype, SIDE, DEPTH,
        )  # fmt: skip
        product(
            X_ptr, G_ptr, X_ptr, other_ptr, m, n, n, count, -b, a - b, 0.0, member, group_size, counter_ptr,
            False, dtype, SIDE, DEPTH,
        )  # fmt: skip
        X_ptr, other_ptr = other_ptr, X_ptr
    product(
        X_ptr, X_ptr, X_ptr, G_ptr, n, n, m, count, -0.5, 0.0, 0.5, member, group_size, counter_ptr,
        True, tl.float64, WIDE_TILE, DEPTH,
    )  # fmt: skip
    product(
        X_ptr, G_ptr, X_ptr, other_ptr, m, n, n, count, 1.0, 1.0, 0.0, member, group_size, counter_ptr,
        False, dtype, SIDE, DEPTH,
    )  # fmt: skip
    return other_ptr, X_ptr


@triton.jit
def _polar(
    A_ptr, m, n, X_ptr, other_ptr, G_ptr, least, member, group_size, counter_ptr,
    TILE: tl.constexpr, WIDE_TILE: tl.constexpr, DEPTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute the polar factor of A [m, n], m >= n, in X or other, both of m n elements; all contiguous.

    Return a pointer to it, one to the other buffer, whether it succeeded, and an upper bound of sigma_1.
    """
    product(
        A_ptr, A_ptr, A_ptr, G_ptr, n, n, m, 1, 1.0, 0.0, 0.0, member, group_size, counter_ptr,
        True, tl.float64, WIDE_TILE, DEPTH,
    )  # fmt: skip
    product(
        G_ptr, G_ptr, G_ptr, X_ptr, n, n, n, 1, 1.0, 0.0, 0.0, member, group_size, counter_ptr,
        False, tl.float64, WIDE_TILE, DEPTH,
    )  # fmt: skip
    eighth_power, _ = _square(X_ptr, n, BLOCK)
    barrier(counter_ptr, group_size)  # X is overwritten
    # otherwise powers of A do not fit in float32, or A is zero or not finite
    good = (eighth_power > 1e-60) & (eighth_power < 1e60)
    norm = 1.001 * tl.sqrt(tl.sqrt(tl.sqrt(tl.where(good, eighth_power, 1.0))))
    if good:
        copy(A_ptr, n, 1, X_ptr, n, 1, m, n, norm, member, group_size, counter_ptr, BLOCK)
        X_ptr, other_ptr = _iterate(
            X_ptr, other_ptr, G_ptr, m, n, 1, least, member, group_size, counter_ptr, tl.float64, TILE, WIDE_TILE, DEPTH
        )
        square, _ = _square(G_ptr, n, BLOCK)
        good = square < 2.5e-7  # the last step squares the error
    return X_ptr, other_ptr, good, norm


@triton.jit
def is_within(
    A_ptr, m, n, p, q, G_ptr, other_ptr, member, group_size, counter_ptr,
    WIDE_TILE: tl.constexpr, DEPTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return whether the eigenvalues of M = p AᵀA + q I are in [-1, 1], for A [m, n] contiguous; p = 0: true.

    The Chebyshev polynomial of degree 2^13 in M, by T(2 i) = 2 T(i)² - I, is at most 1 in magnitude inside. Outside it
    grows so fast that an excess of 1.1e-7 of the half width shows among 512 eigenvalues.
    """
    within = p == 0
    if p != 0:
        product(
            A_ptr, A_ptr, G_ptr, G_ptr, n, n, m, 1, p, 0.0, q, member, group_size, counter_ptr,
            True, tl.float64, WIDE_TILE, DEPTH,
        )  # fmt: skip
        for _ in range(DOUBLINGS):
            product(
                G_ptr, G_ptr, G_ptr, other_ptr, n, n, n, 1, 2.0, 0.0, -1.0, member, group_size, counter_ptr,
                False, tl.float64, WIDE_TILE, DEPTH,
            )  # fmt: skip
            G_ptr, other_ptr = other_ptr, G_ptr
        square, _ = _square(G_ptr, n, BLOCK)
        within = square <= tl.cast(n, tl.float64) * (1 + 1e-6)  # the bound for eigenvalues in [-1, 1]
    return within


@triton.jit
def _outside(H_ptr, n, edge, c, sign, Y_ptr, X_ptr, member, group_size, BLOCK: tl.constexpr):
    """Set Y = X = sign (H - edge I) / c, made symmetric."""
    for begin in range(member * BLOCK, n * n, group_size * BLOCK):
        at = begin + tl.arange(0, BLOCK)
        inside = at < n * n
        row, col = at // n, at % n
        h = tl.load(H_ptr + at, mask=inside, other=0.0).to(tl.float64)
        h = (h + tl.load(H_ptr + col * n + row, mask=inside, other=0.0).to(tl.float64)) / 2
        y = (sign / c * (h - tl.where(row == col, edge, 0.0))).to(tl.float32)
        tl.store(Y_ptr + at, y, mask=inside)
        tl.store(X_ptr + at, y, mask=inside)


@triton.jit
def _correction(parts_ptr, n, below, above, D_ptr, member, group_size, counter_ptr, BLOCK: tl.constexpr):
    """Set D [n, n] = clip(H) - H, made symmetric, from the positive parts [2, n, n] of the results of `_outside`."""
    low, high = (0.5 * below).to(tl.float32), (-0.5 * above).to(tl.float32)
    for begin in range(member * BLOCK, n * n, group_size * BLOCK):
        at = begin + tl.arange(0, BLOCK)
        inside = at < n * n
        mirrored = at % n * n + at // n
        d = low * tl.load(parts_ptr + at, mask=inside, other=0.0)
        d += low * tl.load(parts_ptr + mirrored, mask=inside, other=0.0)
        d += high * tl.load(parts_ptr + n * n + at, mask=inside, other=0.0)
        d += high * tl.load(parts_ptr + n * n + mirrored, mask=inside, other=0.0)
        tl.store(D_ptr + at, d, mask=inside)
    barrier(counter_ptr, group_size)


@triton.jit
def clip_by_group(
    A_ptr, a_row, a_col, m, n, tau, kind, sigma_max, workspace_ptr, wide_ptr, out_ptr, o_row, o_col, polar_least,
    sign_least, member, group_size, counter_ptr,
    TILE: tl.constexpr, WIDE_TILE: tl.constexpr, DEPTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Set out = A [m, n], m >= n, with clipped singular values, or leave it unchanged. Return whether that succeeded.

    workspace has workspace_size(m, n) elements, wide 2 n² in float64. out may be A. The optimal band needs all singular
    values and is not served.
    """
    square_size = n * n
    own_ptr = workspace_ptr  # A
    result_ptr = own_ptr + m * n
    X_ptr = result_ptr + m * n
    H_ptr = X_ptr + m * n
    Y_ptr = H_ptr + square_size
    Z_ptr = Y_ptr + 2 * square_size
    other_ptr = Z_ptr + 2 * square_size
    G_ptr = other_ptr + 2 * square_size
    good = kind != band.OPTIMAL
    if good:
        copy(A_ptr, a_row, a_col, own_ptr, n, 1, m, n, 1.0, member, group_size, counter_ptr, BLOCK)
        Q_ptr, result_ptr, good, norm = _polar(
            own_ptr, m, n, X_ptr, result_ptr, G_ptr, polar_least, member, group_size, counter_ptr,
            TILE, WIDE_TILE, DEPTH, BLOCK,
        )  # fmt: skip
        if good:
            product(
                Q_ptr, own_ptr, H_ptr, H_ptr, n, n, m, 1, 1.0, 0.0, 0.0, member, group_size, counter_ptr,
                True, tl.float64, WIDE_TILE, DEPTH,
            )  # fmt: skip
            number = tl.cast(n, tl.float64)
            square, trace = _square(H_ptr, n, BLOCK)
            lo = 2 * tl.where(kind == band.MEAN, trace / number, tl.sqrt(square / number)) / (2 + tau)
            lo, hi = band.under(lo, (1 + tau) * lo, tau, sigma_max)
            p, q = band.interval(lo, hi, True)
            hi = tl.minimum(hi, norm)
            # bounds of lo I - H and H - hi I: by their Frobenius norms, which lose digits, and by 0 <= H <= norm
            below = tl.sqrt(tl.maximum(square - 2 * lo * trace + number * lo * lo, 0.0))
            below = tl.maximum(tl.minimum(below, tl.maximum(lo, norm - lo)), 1e-5 * norm)
            above = tl.sqrt(tl.maximum(square - 2 * hi * trace + number * hi * hi, 0.0))
            above = tl.maximum(tl.minimum(above, tl.maximum(hi, norm - hi)), 1e-5 * norm)
            _outside(H_ptr, n, lo, below, -1.0, Y_ptr, Z_ptr, member, group_size, BLOCK)
            _outside(H_ptr, n, hi, above, 1.0, Y_ptr + square_size, Z_ptr + square_size, member, group_size, BLOCK)
            barrier(counter_ptr, group_size)
            Z_ptr, other_ptr = _iterate(
                Z_ptr, other_ptr, G_ptr, n, n, 2, sign_least, member, group_size, counter_ptr,
                tl.float32, TILE, WIDE_TILE, DEPTH,
            )  # fmt: skip
            product(
                Y_ptr, Z_ptr, Y_ptr, G_ptr, n, n, n, 2, 0.5, 0.5, 0.0, member, group_size, counter_ptr,
                False, tl.float32, TILE, DEPTH,
            )  # fmt: skip
            _correction(G_ptr, n, below, above, Y_ptr, member, group_size, counter_ptr, BLOCK)
            shift, _ = _square(Y_ptr, n, BLOCK)
            good = shift <= square * number
            # a correction within rounding leaves A as it is
            factor = tl.where(shift <= 2.25 * 2.0**-48 * square, 0.0, 1.0)
            product(
                Q_ptr, Y_ptr, own_ptr, result_ptr, m, n, n, 1, factor, 1.0, 0.0, member, group_size, counter_ptr,
                False, tl.float32, TILE, DEPTH,
            )  # fmt: skip
            good &= is_within(
                result_ptr, m, n, p, q, wide_ptr, wide_ptr + square_size, member, group_size, counter_ptr,
                WIDE_TILE, DEPTH, BLOCK,
            )  # fmt: skip
            if good:
                copy(result_ptr, n, 1, out_ptr, o_row, o_col, m, n, 1.0, member, group_size, counter_ptr, BLOCK)
    return good


@triton.jit(do_not_specialize=["group_size"])
def polar(
    A_ptr, out_ptr, workspace_ptr, active_mask_ptr, counter_ptr, failed_ptr, m, n, group_size,
    a_batch, a_row, a_col, o_batch, o_row, o_col,
    LEAST: tl.constexpr, TILE: tl.constexpr, WIDE_TILE: tl.constexpr, DEPTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Set out = the polar factor of A [m, n], m >= n; the active mask is CORRECT if that failed, else KEEP."""
    member, batch = split_program_id(group_size)
    own_ptr = workspace_ptr + batch * (3 * m * n + n * n)
    X_ptr = own_ptr + m * n
    other_ptr = X_ptr + m * n
    counter_ptr += 2 * batch
    copy(A_ptr + batch * a_batch, a_row, a_col, own_ptr, n, 1, m, n, 1.0, member, group_size, counter_ptr, BLOCK)
    X_ptr, other_ptr, good, _ = _polar(
        own_ptr, m, n, X_ptr, other_ptr, other_ptr + m * n, LEAST, member, group_size, counter_ptr,
        TILE, WIDE_TILE, DEPTH, BLOCK,
    )  # fmt: skip
    if good:
        out_ptr += batch * o_batch
        copy(X_ptr, n, 1, out_ptr, o_row, o_col, m, n, 1.0, member, group_size, counter_ptr, BLOCK)
    if member == 0:
        tl.store(active_mask_ptr + batch, tl.where(good & ~timed_out(counter_ptr), KEEP, CORRECT))
    reset(counter_ptr, group_size, failed_ptr)


@triton.jit(do_not_specialize=["group_size"])
def clip(
    A_ptr, out_ptr, workspace_ptr, wide_ptr, constraint_ptr, row_ptr, active_mask_ptr, counter_ptr, failed_ptr, m, n,
    size, stride, group_size, a_batch, a_row, a_col, o_batch, o_row, o_col, POLAR: tl.constexpr, SIGN: tl.constexpr,
    TILE: tl.constexpr, WIDE_TILE: tl.constexpr, DEPTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Run `clip_by_group` on a batch with constraints as in `band.shifts`; active_mask = 1 where that failed, or 0."""
    member, batch = split_program_id(group_size)
    counter_ptr += 2 * batch
    constraint_ptr += tl.load(row_ptr + batch).to(tl.int64) * stride
    tau, kind = tl.load(constraint_ptr + band.TAU), tl.load(constraint_ptr + band.BAND)
    sigma_max = tl.load(constraint_ptr + band.SIGMA_MAX)
    good = clip_by_group(
        A_ptr + batch * a_batch, a_row, a_col, m, n, tau, kind, sigma_max, workspace_ptr + batch * size,
        wide_ptr + batch * (2 * n * n), out_ptr + batch * o_batch, o_row, o_col, POLAR, SIGN, member, group_size,
        counter_ptr, TILE, WIDE_TILE, DEPTH, BLOCK,
    )  # fmt: skip
    if member == 0:
        tl.store(active_mask_ptr + batch, tl.where(good & ~timed_out(counter_ptr), 0, 1))
    reset(counter_ptr, group_size, failed_ptr)


def polar_factor(A: Tensor, out: Tensor) -> Tensor:
    """Set out = the polar factor of A [batch, m, n], m >= n. Return the active mask [batch], a mode of `multiply`."""
    B, m, n = A.shape
    active_mask = torch.empty(B, dtype=torch.int32, device=A.device)
    if m * n > LARGEST:
        return active_mask.fill_(CORRECT.value)
    group_size, grid = cooperative.batch_groups(A.device, B, jobs(m, n))
    workspace = A.new_empty(B, 3 * m * n + n * n)
    launch(
        polar, (B * group_size,),
        A, out, workspace, active_mask, cooperative.counters(B, A.device), cooperative.failure_flag(A.device), m, n,
        group_size, *A.stride(), *out.stride(),
        LEAST=POLAR, **config(devices.architecture(A.device)), **grid,
    )  # fmt: skip
    return active_mask


def clip_spectrum(A: Tensor, constraint: Tensor, row: Tensor, out: Tensor) -> Tensor:
    """Set out = A [batch, m, n], m >= n, with clipped singular values. Return the active mask [batch]: 1 on failure.

    constraint and row are those of `launch.clip_each`; the optimal band is not served.
    """
    B, m, n = A.shape
    active_mask = torch.empty(B, dtype=torch.int32, device=A.device)
    if m * n > LARGEST:
        return active_mask.fill_(1)
    group_size, grid = cooperative.batch_groups(A.device, B, jobs(m, n))
    size = workspace_size(m, n)
    workspace, wide = A.new_empty(B, size), torch.empty(B, 2, n, n, dtype=torch.float64, device=A.device)
    launch(
        clip, (B * group_size,),
        A, out, workspace, wide, constraint, row, active_mask, cooperative.counters(B, A.device),
        cooperative.failure_flag(A.device), m, n, size, constraint.stride(0), group_size, *A.stride(), *out.stride(),
        POLAR=POLAR, SIGN=SIGN, **config(devices.architecture(A.device)), **grid,
    )  # fmt: skip
    return active_mask


def workspace_size(m: int, n: int) -> int:
    """Return how many elements of workspace `clip_by_group` needs."""
    return 3 * m * n + 9 * n * n


def jobs(m: int, n: int) -> int:
    """Return the number of tiles of the float64 products, which take longest."""
    return triton.cdiv(m, 32) * triton.cdiv(n, 32)


def config(name: str) -> dict:
    """Return tiles and options, chosen as in `product.config`."""
    if INTERPRETED:
        return dict(TILE=128, WIDE_TILE=128, DEPTH=128, BLOCK=16384)
    options = dict(TILE=64, WIDE_TILE=32, DEPTH=16, BLOCK=2048, num_warps=8, num_stages=2)
    return options if name == "gfx942" else options | dict(maxnreg=255)


def variants(architecture: str):
    """Yield what to compile ahead of time: (kernel, signature types, constexprs, options, is a default)."""
    types = dict.fromkeys(("A_ptr", "out_ptr", "workspace_ptr"), "*fp32")
    types |= dict(wide_ptr="*fp64", constraint_ptr="*fp64", counter_ptr="*i64", active_mask_ptr="*i32", row_ptr="*i32")
    types["failed_ptr"] = "*i32"
    types |= {name: "i32" for name in clip.arg_names if name.islower() and not name.endswith("_ptr")}
    yield variant(polar, types, dict(LEAST=POLAR) | config(architecture))
    yield variant(clip, types, dict(POLAR=POLAR, SIGN=SIGN) | config(architecture))
