"""Kernels that place the band of clip_spectrum and compute where each singular value has to go."""

import triton
import triton.language as tl

from .... import reference
from ..runtime.status import ALL_ZERO, OK
from .product import CORRECT, KEEP, REBUILD, REPLACE

MEAN, OPTIMAL = tl.constexpr(reference.BANDS.index("mean")), tl.constexpr(reference.BANDS.index("optimal"))
TAU, BAND, SIGMA_MAX = map(tl.constexpr, range(3))  # columns of a constraint
# The correction A + U diag(shift) Vᵀ is off by a few rounding errors of sigma_1: too much for a band whose upper edge
# is below this share of sigma_1.
CANCELS = tl.constexpr(0.75)
KAPPA_ROUNDING, CAP_ROUNDING = tl.constexpr(reference.KAPPA_ROUNDING), tl.constexpr(reference.CAP_ROUNDING)


@triton.jit
def _optimal_lower_edge(sigma_ptr, x, real, n, c, R: tl.constexpr, BLOCK: tl.constexpr):
    """Return the root a of g(a) = Σ_{x<a} (a - x) - c Σ_{x>ca} (x - c a), piecewise linear with knots x_i and x_i / c.

    x [R], valid where `real`, is descending from 1; sigma is a multiple of it in memory.
    """
    i = tl.arange(0, BLOCK)
    largest = tl.load(sigma_ptr).to(tl.float64)
    start = tl.full([BLOCK], 0.0, tl.float64)
    end = tl.full([BLOCK], 1.0, tl.float64)
    for begin in range(0, n, BLOCK):
        inside = begin + i < n
        knot = tl.load(sigma_ptr + begin + i, mask=inside, other=0.0).to(tl.float64) / largest
        a, upper = knot, c * knot
        for _ in tl.static_range(2):
            below = tl.sum(tl.where(real[None, :], tl.maximum(a[:, None] - x[None, :], 0.0), 0.0), 1)
            above = tl.sum(tl.where(real[None, :], tl.maximum(x[None, :] - upper[:, None], 0.0), 0.0), 1)
            before = below <= c * above
            start = tl.maximum(start, tl.where(before & inside, a, 0.0))
            end = tl.minimum(end, tl.where(before | ~inside, 1.0, a))
            # not c a, which misses x_i by a rounding error that c may make large
            a, upper = knot / c, knot
    # compare with the middle of the piece: at a knot rounding would decide
    middle = (tl.max(start, 0) + tl.min(end, 0)) / 2
    low, high = real & (x < middle), real & (x > c * middle)
    # both sides over c, to avoid c²
    weight = tl.sum(low.to(tl.float64), 0) / c + c * tl.sum(high.to(tl.float64), 0)
    target = tl.sum(tl.where(low, x, 0.0), 0) / c + tl.sum(tl.where(high, x, 0.0), 0)
    return target / tl.where(weight > 0, weight, 1.0)


@triton.jit
def under(lo, hi, tau, sigma_max):
    """Return the band [lo, hi], or [0, inf] if tau is infinite, scaled down to sigma_max where hi exceeds it."""
    infinity = float("inf")
    lo = tl.where(tau == infinity, 0.0, lo)
    hi = tl.where(tau == infinity, infinity, hi)
    lo = tl.where(hi > sigma_max, lo * (sigma_max / tl.where(hi > sigma_max, hi, 1.0)), lo)
    return lo, tl.minimum(hi, sigma_max)


@triton.jit
def clip_weights(
    sigma_ptr, x, real, n, tau, band, cap, out_epsilon, slack, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return weights w, whether to rebuild, whether all of x is in the band to within `slack`, and its edges lo and hi.

    The clipped matrix is A + U diag(w) Vᵀ, or U diag(w) Vᵀ to rebuild it. x [R], valid where `real`, holds n singular
    values over the largest one, descending; sigma is a multiple of it in memory. cap is sigma_max over the largest one,
    out_epsilon the epsilon of the dtype of the result.
    """
    count = tl.cast(n, tl.float64)
    c = 1 + tau
    smallest = tl.min(tl.where(real, x, 1.0), 0)
    if band == OPTIMAL:
        lo = _optimal_lower_edge(sigma_ptr, x, real, n, c, R, BLOCK)
        lo = tl.where(c * smallest >= 1, smallest, lo)
    else:
        lo = 2 * tl.where(band == MEAN, tl.sum(x, 0) / count, tl.sqrt(tl.sum(x * x, 0) / count)) / (2 + tau)
    lo, hi = under(lo, c * lo, tau, cap)
    inside = (hi + slack >= 1) & (smallest >= lo - slack)
    # Storing the result moves each singular value by at most `stored`. Where kappa would feel that (a lower edge far
    # below the upper one), the lower edge rises by as much.
    target = tl.where(real, tl.minimum(tl.maximum(x, lo), hi), 0.0)
    stored = out_epsilon / 2 * tl.sqrt(tl.sum(target * target, 0))
    raised = tl.where((lo > 0) & (stored > 2e-6 * lo), tl.minimum(lo + stored, hi), lo)
    clipped = tl.minimum(tl.maximum(x, raised), hi)
    rebuild = hi < CANCELS
    return tl.where(rebuild, clipped, clipped - x), rebuild, inside, lo, hi


@triton.jit
def meets_bound(smallest, tau, cap):
    """Return whether singular values from 1 down to `smallest` keep kappa <= 1 + tau and the cap, to rounding."""
    return (1 <= (1 + tau) * (1 + KAPPA_ROUNDING) * smallest) & (1 <= cap * (1 + CAP_ROUNDING))


@triton.jit
def interval(lo, hi, check):
    """Return p and q with which p x + q maps [lo², hi²], a little widened, to [-1, 1]; p = 0 where nothing is checked.

    KAPPA_ROUNDING and CAP_ROUNDING are more than the interval is widened. Nothing is checked where `check` is false or
    the band has no upper edge.
    """
    check = check & (hi < float("inf"))
    lo = tl.where(check, lo * (1 - 1.5e-6), 1.0)
    hi = tl.where(check, hi * (1 + 1.5e-6), 2.0)
    p = tl.where(check, 2 / ((hi - lo) * (hi + lo)), 0.0)
    return p, -p * (hi * hi + lo * lo) / 2


@triton.jit
def weights(
    sigma_ptr, svd_info_ptr, constraint_ptr, row_ptr, weight_ptr, mode_ptr, active_mask_ptr, info_ptr, interval_ptr, n,
    stride, out_epsilon, MASKED: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Set weight [n] = those of `clip_weights` for the singular values sigma [n], descending; one program per matrix.

    sigma in float32 serves well-conditioned matrices that need not be rebuilt. The others go into the active mask for a
    second round, with sigma in float64 and MASKED, which computes only those. The constraint of matrix i is row[i] of a
    table with rows `stride` apart. mode is that of `multiply`, interval [*, 2] holds p and q of `interval`, out_epsilon
    is the epsilon of the dtype of the result. R >= n.
    """
    batch = tl.program_id(0).to(tl.int64)
    sigma_ptr += batch * n
    # sigma is known to a few rounding errors of the largest one
    SLACK: tl.constexpr = 4 * 2.0**-23 if sigma_ptr.dtype.element_ty == tl.float32 else 8 * 2.0**-52
    i = tl.arange(0, R)
    real = i < n
    sigma = tl.load(sigma_ptr + i, mask=real, other=0.0).to(tl.float64)
    largest = tl.load(sigma_ptr).to(tl.float64)
    smallest = tl.load(sigma_ptr + n - 1).to(tl.float64)
    constraint_ptr += tl.load(row_ptr + batch).to(tl.int64) * stride
    tau, band = tl.load(constraint_ptr + TAU), tl.load(constraint_ptr + BAND)
    sigma_max = tl.load(constraint_ptr + SIGMA_MAX)
    svd_info = tl.load(svd_info_ptr + batch)
    usable = (svd_info == OK) & (largest > 0)
    largest = tl.where(usable, largest, 1.0)
    x = tl.where(usable & real, sigma / largest, 0.0)
    cap = sigma_max / largest
    weight, rebuild, inside, lo, hi = clip_weights(sigma_ptr, x, real, n, tau, band, cap, out_epsilon, SLACK, R, BLOCK)

    active = True
    ill_conditioned = False
    if MASKED:
        active = tl.load(active_mask_ptr + batch) != 0
    elif sigma_ptr.dtype.element_ty == tl.float32:
        # rounding errors of a large singular value are large to a small one, and to a low band
        ill_conditioned = usable & ((largest > 3 * smallest) | (rebuild & ~inside))
        tl.store(active_mask_ptr + batch, ill_conditioned.to(tl.int32))
    correct = usable & ~inside & ~ill_conditioned
    tl.store(weight_ptr + batch * n + i, (weight * largest).to(weight_ptr.dtype.element_ty), mask=real)
    tl.store(mode_ptr + batch, tl.where(active, tl.where(correct, tl.where(rebuild, REBUILD, CORRECT), REPLACE), KEEP))
    info = tl.where(svd_info == OK, tl.where(usable, OK, ALL_ZERO), svd_info)
    if active:
        tl.store(info_ptr + batch, info)
    if not MASKED:
        p, q = interval(lo * largest, hi * largest, usable & ~ill_conditioned)
        tl.store(interval_ptr + 2 * batch, p)
        tl.store(interval_ptr + 2 * batch + 1, q)


def config(architecture: str, n: int) -> dict:
    """Return constexprs and options with which no register spills."""
    tile = dict(R=max(16, triton.next_power_of_2(n)), BLOCK=16, num_warps=8, num_stages=1)
    # all registers: by itself ptxas allows fewer, for more programs than shared memory holds
    return tile if architecture == "gfx942" else tile | dict(maxnreg=255)


def variants(architecture: str):
    """Yield what to compile ahead of time: (kernel, signature types, constexprs, options, is a default)."""
    types = dict.fromkeys(("svd_info_ptr", "row_ptr", "mode_ptr", "active_mask_ptr", "info_ptr"), "*i32")
    types |= dict(constraint_ptr="*fp64", interval_ptr="*fp64", n="i32", stride="i32", out_epsilon="fp32")
    for dtype, masked in (("fp32", False), ("fp64", True)):
        pointers = dict.fromkeys(("sigma_ptr", "weight_ptr"), f"*{dtype}")
        for R in (64, 512):
            options = config(architecture, R)
            tile = dict(MASKED=masked, R=options.pop("R"), BLOCK=options.pop("BLOCK"))
            yield weights, types | pointers, tile, options, True
