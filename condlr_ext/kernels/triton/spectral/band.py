"""Where the band of clip_spectrum lies and which singular values have to move: kernels."""

import triton
import triton.language as tl

RMS, MEAN, OPTIMAL = (tl.constexpr(i) for i in range(3))  # as in reference.BANDS
OK, NOT_CONVERGED, NOT_FINITE, ALL_ZERO = (tl.constexpr(i) for i in range(4))
# what `shifts` asks of the product that follows: out is left alone, is A, is A + U diag(shift) Vᵀ
KEEP, COPY, CORRECT = (tl.constexpr(i) for i in range(3))


@triton.jit
def _optimal_lower_edge(sigma_ptr, x, real, n, c, R: tl.constexpr, BLOCK: tl.constexpr):
    """The root a of g(a) = Σ_{x<a} (a - x) - c Σ_{x>ca} (x - c a), which is linear between the knots x_i and x_i / c.

    x [R] real where `real`, descending, the largest one 1; sigma: the same in memory, times something.
    """
    i = tl.arange(0, BLOCK)
    largest = tl.load(sigma_ptr).to(tl.float64)
    start = tl.full([BLOCK], 0.0, tl.float64)
    end = tl.full([BLOCK], 1.0, tl.float64)
    for begin in range(0, n, BLOCK):
        inside = begin + i < n
        knot = tl.load(sigma_ptr + begin + i, mask=inside, other=0.0).to(tl.float64) / largest
        for _ in tl.static_range(2):
            below = tl.sum(tl.where(real[None, :], tl.maximum(knot[:, None] - x[None, :], 0.0), 0.0), 1)
            above = tl.sum(tl.where(real[None, :], tl.maximum(x[None, :] - c * knot[:, None], 0.0), 0.0), 1)
            before = below <= c * above
            start = tl.maximum(start, tl.where(before & inside, knot, 0.0))
            end = tl.minimum(end, tl.where(before | ~inside, 1.0, knot))
            knot = knot / c
    # the middle of the piece tells who is below and above without a comparison at a knot, where rounding decides
    middle = (tl.max(start, 0) + tl.min(end, 0)) / 2
    low, high = real & (x < middle), real & (x > c * middle)
    # both sides over c, which keeps c² out
    weight = tl.sum(low.to(tl.float64), 0) / c + c * tl.sum(high.to(tl.float64), 0)
    target = tl.sum(tl.where(low, x, 0.0), 0) / c + tl.sum(tl.where(high, x, 0.0), 0)
    return target / tl.where(weight > 0, weight, 1.0)


@triton.jit
def under(lo, hi, tau, sigma_max):
    """lo and hi under sigma_max; without an end if tau is infinite."""
    infinity = float("inf")
    lo = tl.where(tau == infinity, 0.0, lo)
    hi = tl.where(tau == infinity, infinity, hi)
    lo = tl.where(hi > sigma_max, lo * (sigma_max / tl.where(hi > sigma_max, hi, 1.0)), lo)
    return lo, tl.minimum(hi, sigma_max)


@triton.jit
def moves(
    sigma_ptr, x, real, n, tau, band, cap, out_epsilon, slack, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What to add to x to bring it into the band, whether all of it lies there within `slack` already, and the band.

    x [R] real where `real`: n singular values over the largest, descending; sigma: the same in memory, times something.
    cap: sigma_max over the largest. out_epsilon: that of the dtype in which the result will be stored.
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
    # Storing the result moves each of its singular values by at most `stored`. Where that would be felt in kappa (a
    # lower edge far below the upper one) the lower edge rises by as much.
    target = tl.where(real, tl.minimum(tl.maximum(x, lo), hi), 0.0)
    stored = out_epsilon / 2 * tl.sqrt(tl.sum(target * target, 0))
    raised = tl.where((lo > 0) & (stored > 2e-6 * lo), tl.minimum(lo + stored, hi), lo)
    return tl.minimum(tl.maximum(x, raised), hi) - x, inside, lo, hi


@triton.jit
def interval(lo, hi, tau, some):
    """p and q that take [lo², hi²], a little wider, to [-1, 1]; zeros where nothing is to be checked, by `some` or tau.

    kappa may exceed 1 + tau by 5e-6 of it; what is found out of the interval exceeds it by less.
    """
    some = some & (lo > 0) & (tau < float("inf"))
    lo = tl.where(some, lo * (1 - 1.5e-6), 1.0)
    hi = tl.where(some, hi * (1 + 1.5e-6), 2.0)
    p = tl.where(some, 2 / ((hi - lo) * (hi + lo)), 0.0)
    return p, -p * (hi * hi + lo * lo) / 2


@triton.jit
def shifts(
    sigma_ptr, svd_info_ptr, constraint_ptr, row_ptr, shift_ptr, mode_ptr, wanted_ptr, info_ptr, interval_ptr, n,
    stride, out_epsilon, SOME: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """shift [n] = what to add to singular values sigma [n], descending, to bring them into the band; per matrix.

    sigma in float32 serves tame matrices; for others `wanted` asks for another round, with sigma in float64 and SOME,
    which looks at them alone. constraint: tau, band and sigma_max of matrix i are in row[i], rows `stride` apart.
    interval [*, 2]: p and q of `interval`. out_epsilon: that of the dtype in which the result is stored. R at least n.
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
    tau, band, sigma_max = tl.load(constraint_ptr), tl.load(constraint_ptr + 1), tl.load(constraint_ptr + 2)
    svd_info = tl.load(svd_info_ptr + batch)
    usable = (svd_info == OK) & (largest > 0)
    largest = tl.where(usable, largest, 1.0)
    x = tl.where(usable & real, sigma / largest, 0.0)
    shift, inside, lo, hi = moves(sigma_ptr, x, real, n, tau, band, sigma_max / largest, out_epsilon, SLACK, R, BLOCK)

    wanted = True
    wild = False
    if SOME:
        wanted = tl.load(wanted_ptr + batch) != 0
    elif sigma_ptr.dtype.element_ty == tl.float32:
        # rounding errors of a large singular value are large to a small one
        wild = usable & (largest > 3 * smallest)
        tl.store(wanted_ptr + batch, wild.to(tl.int32))
    correct = usable & ~inside & ~wild
    tl.store(shift_ptr + batch * n + i, (shift * largest).to(shift_ptr.dtype.element_ty), mask=real)
    tl.store(mode_ptr + batch, tl.where(wanted, tl.where(correct, CORRECT, COPY), KEEP))
    info = tl.where(svd_info == OK, tl.where(usable, OK, ALL_ZERO), svd_info)
    if wanted:
        tl.store(info_ptr + batch, info)
    if not SOME:
        p, q = interval(lo * largest, hi * largest, tau, usable & ~wild)
        tl.store(interval_ptr + 2 * batch, p)
        tl.store(interval_ptr + 2 * batch + 1, q)


def config(architecture: str, n: int) -> dict:
    """Constexprs and options with which nothing is kept outside the registers."""
    tile = dict(R=max(16, triton.next_power_of_2(n)), BLOCK=16, num_warps=8, num_stages=1)
    # as many registers as there are: ptxas keeps fewer, for programs that would not find room
    return tile if architecture == "gfx942" else tile | dict(maxnreg=255)


def variants(architecture: str):
    """What to compile ahead of time: (kernel, signature types, constexprs, options, whether it is a default)."""
    types = dict.fromkeys(("svd_info_ptr", "row_ptr", "mode_ptr", "wanted_ptr", "info_ptr"), "*i32")
    types |= dict(constraint_ptr="*fp64", interval_ptr="*fp64", n="i32", stride="i32", out_epsilon="fp32")
    for dtype, some in (("fp32", False), ("fp64", True)):
        pointers = dict.fromkeys(("sigma_ptr", "shift_ptr"), f"*{dtype}")
        for R in (64, 512):
            options = config(architecture, R)
            tile = dict(SOME=some, R=options.pop("R"), BLOCK=options.pop("BLOCK"))
            yield shifts, types | pointers, tile, options, True
