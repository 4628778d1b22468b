"""polar and clip_spectrum of tame float32 matrices with 64 < n <= 512 columns by matrix products: kernels and launches.

The polar factor Q of A is what X <- a X - b X XᵀX tends to, a and b chosen anew in every step so that the interval in
which the singular values of X lie shrinks fastest onto 1. In H = QᵀA, which is symmetric, the singular values of A are
eigenvalues, and the polar factor of H - e I is its sign: (Y + Y sign(Y)) / 2 is the part of Y with positive
eigenvalues. Of lo I - H it is what clipping adds, of H - hi I what it takes away, and eigenvalues in the band, at an
edge or next to it give nothing but rounding.

One launch does everything: a team of programs for each matrix shares the tiles of every product and meets behind it.
Sums over a matrix are made by all members alike, so that all take the same decisions. Every number of steps is fixed. A
matrix that they do not serve is flagged where that is seen, and left alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import INTERPRETED, architecture
from ..runtime import cooperative
from ..runtime.cooperative import barrier, copy, place, product, reset, timed_out
from ..runtime.launching import variant
from . import band

# kappa 10, and the norm of the fourth power exceeds sigma_1 by at most 512^(1/8) = 2.18
POLAR = 0.1 / 2.2
# an eigenvalue that near to an edge, in units of the norm, is clipped with an error of an eighth of that
SIGN = 4e-7
DOUBLINGS = tl.constexpr(13)
LARGEST = 2**29 - 1  # elements of a matrix: offsets within its workspace are 32-bit integers


@triton.jit
def _square(X_ptr, n, BLOCK: tl.constexpr):
    """‖X‖² and the trace of X [n, n] contiguous, in float64."""
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
    """a and b of a step for singular values in [least, 1], and the least one after it; float64.

    x (a - b x²) on [least, u] deviates least from 1 where its values at both ends and its maximum do so equally; then
    the largest value becomes 1. u exceeds 1 by a margin while the polynomial falls steeply to almost 0 at the right
    end: what rounding puts beyond would change its sign.
    """
    u = tl.where(least < 0.3, 1.01, 1.0)
    third = (least * least + least * u + u * u) / 3  # of the ratio of a to b
    highest = 2 * third * tl.sqrt(third)
    return 3 * third / highest, 1 / highest, least * (3 * third - least * least) / highest


@triton.jit
def _iterate(
    X_ptr, other_ptr, G_ptr, m, n, count, least, member, members, counter_ptr,
    dtype: tl.constexpr, TILE: tl.constexpr, WIDE_TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """The polar factor of X [count, m, n] with singular values in [least, 1]. Returns where it is, and as much room.

    Behind it G = (I - XᵀX) / 2 before the last step, which takes singular values from [1 - 2e-4, 1]. Sums are in dtype.
    XᵀX - I is soon small, and with it what rounding does to the product with it.
    """
    SIDE: tl.constexpr = WIDE_TILE if dtype == tl.float64 else TILE
    least = tl.cast(least, tl.float64)
    while least < 1 - 2e-4:
        a, b, least = step(least)
        product(
            X_ptr, X_ptr, X_ptr, G_ptr, n, n, m, count, 1.0, 0.0, -1.0, member, members, counter_ptr,
            True, dtype, SIDE, DEPTH,
        )  # fmt: skip
        product(
            X_ptr, G_ptr, X_ptr, other_ptr, m, n, n, count, -b, a - b, 0.0, member, members, counter_ptr,
            False, dtype, SIDE, DEPTH,
        )  # fmt: skip
        X_ptr, other_ptr = other_ptr, X_ptr
    product(
        X_ptr, X_ptr, X_ptr, G_ptr, n, n, m, count, -0.5, 0.0, 0.5, member, members, counter_ptr,
        True, tl.float64, WIDE_TILE, DEPTH,
    )  # fmt: skip
    product(
        X_ptr, G_ptr, X_ptr, other_ptr, m, n, n, count, 1.0, 1.0, 0.0, member, members, counter_ptr,
        False, dtype, SIDE, DEPTH,
    )  # fmt: skip
    return other_ptr, X_ptr


@triton.jit
def _polar(
    A_ptr, m, n, X_ptr, other_ptr, G_ptr, least, member, members, counter_ptr,
    TILE: tl.constexpr, WIDE_TILE: tl.constexpr, DEPTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Where the polar factor of A [m, n] is, m >= n, and room of its size, whether that succeeded, a bound of sigma_1.

    All contiguous; X and other: room of m n elements.
    """
    product(
        A_ptr, A_ptr, A_ptr, G_ptr, n, n, m, 1, 1.0, 0.0, 0.0, member, members, counter_ptr,
        True, tl.float64, WIDE_TILE, DEPTH,
    )  # fmt: skip
    product(
        G_ptr, G_ptr, G_ptr, X_ptr, n, n, n, 1, 1.0, 0.0, 0.0, member, members, counter_ptr,
        False, tl.float64, WIDE_TILE, DEPTH,
    )  # fmt: skip
    eighth_power, _ = _square(X_ptr, n, BLOCK)
    barrier(counter_ptr, members)  # X comes to be something else
    # or powers of A do not fit in float32, A is zero, or not finite
    good = (eighth_power > 1e-60) & (eighth_power < 1e60)
    norm = 1.001 * tl.sqrt(tl.sqrt(tl.sqrt(tl.where(good, eighth_power, 1.0))))
    if good:
        copy(A_ptr, n, 1, X_ptr, n, 1, m, n, norm, member, members, counter_ptr, BLOCK)
        X_ptr, other_ptr = _iterate(
            X_ptr, other_ptr, G_ptr, m, n, 1, least, member, members, counter_ptr, tl.float64, TILE, WIDE_TILE, DEPTH
        )
        square, _ = _square(G_ptr, n, BLOCK)
        good = square < 2.5e-7  # the last step squared it
    return X_ptr, other_ptr, good, norm


@triton.jit
def is_within(
    A_ptr, m, n, p, q, G_ptr, other_ptr, member, members, counter_ptr,
    WIDE_TILE: tl.constexpr, DEPTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Whether the eigenvalues of M = p AᵀA + q I are in [-1, 1], for A [m, n] contiguous; p = 0: always.

    The Chebyshev polynomial T of degree 2^13 in M, by T(2 i) = 2 T(i)² - I, is at most 1 in size inside, and outside it
    grows so fast that 1.1e-7 of the half width shows among 512 eigenvalues.
    """
    within = p == 0
    if p != 0:
        product(
            A_ptr, A_ptr, G_ptr, G_ptr, n, n, m, 1, p, 0.0, q, member, members, counter_ptr,
            True, tl.float64, WIDE_TILE, DEPTH,
        )  # fmt: skip
        for _ in range(DOUBLINGS):
            product(
                G_ptr, G_ptr, G_ptr, other_ptr, n, n, n, 1, 2.0, 0.0, -1.0, member, members, counter_ptr,
                False, tl.float64, WIDE_TILE, DEPTH,
            )  # fmt: skip
            G_ptr, other_ptr = other_ptr, G_ptr
        square, _ = _square(G_ptr, n, BLOCK)
        within = square <= tl.cast(n, tl.float64) * (1 + 1e-6)  # which no eigenvalues in [-1, 1] exceed
    return within


@triton.jit
def _outside(H_ptr, n, edge, c, sign, Y_ptr, X_ptr, member, members, BLOCK: tl.constexpr):
    """Y = X = sign (H - edge I) / c, made symmetric."""
    for begin in range(member * BLOCK, n * n, members * BLOCK):
        at = begin + tl.arange(0, BLOCK)
        inside = at < n * n
        row, col = at // n, at % n
        h = tl.load(H_ptr + at, mask=inside, other=0.0).to(tl.float64)
        h = (h + tl.load(H_ptr + col * n + row, mask=inside, other=0.0).to(tl.float64)) / 2
        y = (sign / c * (h - tl.where(row == col, edge, 0.0))).to(tl.float32)
        tl.store(Y_ptr + at, y, mask=inside)
        tl.store(X_ptr + at, y, mask=inside)


@triton.jit
def _correction(parts_ptr, n, below, above, D_ptr, member, members, counter_ptr, BLOCK: tl.constexpr):
    """D [n, n] = clip(H) - H, made symmetric, from the positive parts [2, n, n] of what `_outside` made."""
    low, high = (0.5 * below).to(tl.float32), (-0.5 * above).to(tl.float32)
    for begin in range(member * BLOCK, n * n, members * BLOCK):
        at = begin + tl.arange(0, BLOCK)
        inside = at < n * n
        mirrored = at % n * n + at // n
        d = low * tl.load(parts_ptr + at, mask=inside, other=0.0)
        d += low * tl.load(parts_ptr + mirrored, mask=inside, other=0.0)
        d += high * tl.load(parts_ptr + n * n + at, mask=inside, other=0.0)
        d += high * tl.load(parts_ptr + n * n + mirrored, mask=inside, other=0.0)
        tl.store(D_ptr + at, d, mask=inside)
    barrier(counter_ptr, members)


@triton.jit
def clip_by_team(
    A_ptr, a_row, a_col, m, n, tau, kind, sigma_max, room_ptr, wide_ptr, out_ptr, o_row, o_col, polar_least, sign_least,
    member, members, counter_ptr,
    TILE: tl.constexpr, WIDE_TILE: tl.constexpr, DEPTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = A [m, n], m >= n, with clipped singular values, whether that succeeded; else out is left alone.

    room: of `room_for` elements, wide: of 2 n². out may be A. The optimal band asks for all singular values and is not
    served.
    """
    square_size = n * n
    own_ptr = room_ptr  # A
    result_ptr = own_ptr + m * n
    X_ptr = result_ptr + m * n
    H_ptr = X_ptr + m * n
    Y_ptr = H_ptr + square_size
    Z_ptr = Y_ptr + 2 * square_size
    other_ptr = Z_ptr + 2 * square_size
    G_ptr = other_ptr + 2 * square_size
    good = kind != band.OPTIMAL
    if good:
        copy(A_ptr, a_row, a_col, own_ptr, n, 1, m, n, 1.0, member, members, counter_ptr, BLOCK)
        Q_ptr, result_ptr, good, norm = _polar(
            own_ptr, m, n, X_ptr, result_ptr, G_ptr, polar_least, member, members, counter_ptr,
            TILE, WIDE_TILE, DEPTH, BLOCK,
        )  # fmt: skip
        if good:
            product(
                Q_ptr, own_ptr, H_ptr, H_ptr, n, n, m, 1, 1.0, 0.0, 0.0, member, members, counter_ptr,
                True, tl.float64, WIDE_TILE, DEPTH,
            )  # fmt: skip
            number = tl.cast(n, tl.float64)
            square, trace = _square(H_ptr, n, BLOCK)
            lo = 2 * tl.where(kind == band.MEAN, trace / number, tl.sqrt(square / number)) / (2 + tau)
            lo, hi = band.under(lo, (1 + tau) * lo, tau, sigma_max)
            p, q = band.interval(lo, hi, tau, True)
            hi = tl.minimum(hi, norm)
            # from the spectrum, which is in [0, norm], and from all distances; the latter loses digits
            below = tl.sqrt(tl.maximum(square - 2 * lo * trace + number * lo * lo, 0.0))
            below = tl.maximum(tl.minimum(below, tl.maximum(lo, norm - lo)), 1e-5 * norm)
            above = tl.sqrt(tl.maximum(square - 2 * hi * trace + number * hi * hi, 0.0))
            above = tl.maximum(tl.minimum(above, tl.maximum(hi, norm - hi)), 1e-5 * norm)
            _outside(H_ptr, n, lo, below, -1.0, Y_ptr, Z_ptr, member, members, BLOCK)
            _outside(H_ptr, n, hi, above, 1.0, Y_ptr + square_size, Z_ptr + square_size, member, members, BLOCK)
            barrier(counter_ptr, members)
            Z_ptr, other_ptr = _iterate(
                Z_ptr, other_ptr, G_ptr, n, n, 2, sign_least, member, members, counter_ptr,
                tl.float32, TILE, WIDE_TILE, DEPTH,
            )  # fmt: skip
            product(
                Y_ptr, Z_ptr, Y_ptr, G_ptr, n, n, n, 2, 0.5, 0.5, 0.0, member, members, counter_ptr,
                False, tl.float32, TILE, DEPTH,
            )  # fmt: skip
            _correction(G_ptr, n, below, above, Y_ptr, member, members, counter_ptr, BLOCK)
            shift, _ = _square(Y_ptr, n, BLOCK)
            good = shift <= square * number
            # where it is nothing but rounding, A stays as it is
            some = tl.where(shift <= 2.25 * 2.0**-48 * square, 0.0, 1.0)
            product(
                Q_ptr, Y_ptr, own_ptr, result_ptr, m, n, n, 1, some, 1.0, 0.0, member, members, counter_ptr,
                False, tl.float32, TILE, DEPTH,
            )  # fmt: skip
            good &= is_within(
                result_ptr, m, n, p, q, wide_ptr, wide_ptr + square_size, member, members, counter_ptr,
                WIDE_TILE, DEPTH, BLOCK,
            )  # fmt: skip
            if good:
                copy(result_ptr, n, 1, out_ptr, o_row, o_col, m, n, 1.0, member, members, counter_ptr, BLOCK)
    return good


@triton.jit(do_not_specialize=["members"])
def polar(
    A_ptr, out_ptr, room_ptr, wanted_ptr, counter_ptr, m, n, members,
    a_batch, a_row, a_col, o_batch, o_row, o_col,
    LEAST: tl.constexpr, TILE: tl.constexpr, WIDE_TILE: tl.constexpr, DEPTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = the polar factor of A [m, n], m >= n; wanted = 2 where that failed, or 0. A team per matrix."""
    member, batch = place(members)
    own_ptr = room_ptr + batch * (3 * m * n + n * n)
    X_ptr = own_ptr + m * n
    other_ptr = X_ptr + m * n
    counter_ptr += 2 * batch
    copy(A_ptr + batch * a_batch, a_row, a_col, own_ptr, n, 1, m, n, 1.0, member, members, counter_ptr, BLOCK)
    X_ptr, other_ptr, good, _ = _polar(
        own_ptr, m, n, X_ptr, other_ptr, other_ptr + m * n, LEAST, member, members, counter_ptr,
        TILE, WIDE_TILE, DEPTH, BLOCK,
    )  # fmt: skip
    if good:
        out_ptr += batch * o_batch
        copy(X_ptr, n, 1, out_ptr, o_row, o_col, m, n, 1.0, member, members, counter_ptr, BLOCK)
    if member == 0:
        tl.store(wanted_ptr + batch, tl.where(good & ~timed_out(counter_ptr), 0, 2))
    reset(counter_ptr, members)


@triton.jit(do_not_specialize=["members"])
def clip(
    A_ptr, out_ptr, room_ptr, wide_ptr, constraint_ptr, row_ptr, wanted_ptr, counter_ptr, m, n, room, stride, members,
    a_batch, a_row, a_col, o_batch, o_row, o_col, POLAR: tl.constexpr, SIGN: tl.constexpr,
    TILE: tl.constexpr, WIDE_TILE: tl.constexpr, DEPTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`clip_by_team` of a batch, constraints as `band.shifts` takes them; wanted = 1 where that failed, or 0."""
    member, batch = place(members)
    counter_ptr += 2 * batch
    constraint_ptr += tl.load(row_ptr + batch).to(tl.int64) * stride
    tau, kind, sigma_max = tl.load(constraint_ptr), tl.load(constraint_ptr + 1), tl.load(constraint_ptr + 2)
    good = clip_by_team(
        A_ptr + batch * a_batch, a_row, a_col, m, n, tau, kind, sigma_max, room_ptr + batch * room,
        wide_ptr + batch * (2 * n * n), out_ptr + batch * o_batch, o_row, o_col, POLAR, SIGN, member, members,
        counter_ptr, TILE, WIDE_TILE, DEPTH, BLOCK,
    )  # fmt: skip
    if member == 0:
        tl.store(wanted_ptr + batch, tl.where(good & ~timed_out(counter_ptr), 0, 1))
    reset(counter_ptr, members)


def polar_factor(A: Tensor, out: Tensor) -> Tensor:
    """out = the polar factor of A [batch, m, n], m >= n. Returns wanted [batch] int32: 2 where that failed, or 0."""
    B, m, n = A.shape
    wanted = torch.empty(B, dtype=torch.int32, device=A.device)
    if m * n > LARGEST:
        return wanted.fill_(2)
    members, together = cooperative.of_batch(A.device, B, jobs(m, n))
    room = A.new_empty(B, 3 * m * n + n * n)
    polar[(B * members,)](
        A, out, room, wanted, cooperative.counters(B, A.device), m, n, members, *A.stride(), *out.stride(),
        LEAST=POLAR, **config(architecture(A.device)), **together,
    )  # fmt: skip
    return wanted


def clip_spectrum(A: Tensor, constraint: Tensor, row: Tensor, out: Tensor) -> Tensor:
    """out = A [batch, m, n], m >= n, with clipped singular values. Returns wanted [batch] int32: 1 where that failed.

    constraint, row: as in spectral.clip_each; the optimal band is not served.
    """
    B, m, n = A.shape
    wanted = torch.empty(B, dtype=torch.int32, device=A.device)
    if m * n > LARGEST:
        return wanted.fill_(1)
    members, together = cooperative.of_batch(A.device, B, jobs(m, n))
    size = room_for(m, n)
    room, wide = A.new_empty(B, size), torch.empty(B, 2, n, n, dtype=torch.float64, device=A.device)
    clip[(B * members,)](
        A, out, room, wide, constraint, row, wanted, cooperative.counters(B, A.device), m, n, size,
        constraint.stride(0), members, *A.stride(), *out.stride(), POLAR=POLAR, SIGN=SIGN,
        **config(architecture(A.device)), **together,
    )  # fmt: skip
    return wanted


def room_for(m: int, n: int) -> int:
    """How many elements `clip_by_team` takes."""
    return 3 * m * n + 9 * n * n


def jobs(m: int, n: int) -> int:
    """Tiles of the products in float64, which take the longest."""
    return triton.cdiv(m, 32) * triton.cdiv(n, 32)


def config(name: str) -> dict:
    """As those of `product.config`; the interpreter takes its time for every tile."""
    if INTERPRETED:
        return dict(TILE=128, WIDE_TILE=128, DEPTH=128, BLOCK=16384)
    options = dict(TILE=64, WIDE_TILE=32, DEPTH=16, BLOCK=2048, num_warps=8, num_stages=2)
    return options if name == "gfx942" else options | dict(maxnreg=255)


def variants(architecture: str):
    """What to compile ahead of time: (kernel, signature types, constexprs, options, whether it is a default)."""
    types = dict.fromkeys(("A_ptr", "out_ptr", "room_ptr"), "*fp32") | dict(counter_ptr="*i64", wanted_ptr="*i32")
    types |= dict(wide_ptr="*fp64", constraint_ptr="*fp64", row_ptr="*i32")
    types |= {name: "i32" for name in clip.arg_names if name.islower() and not name.endswith("_ptr")}
    yield variant(polar, types, dict(LEAST=POLAR) | config(architecture))
    yield variant(clip, types, dict(POLAR=POLAR, SIGN=SIGN) | config(architecture))
