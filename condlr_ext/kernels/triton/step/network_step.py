"""Kernels of one constrained SGD step of a whole network; matrices are found as in cholesky_qr.py.

With d the direction of SGD, a step of a factor X = U (core S) or V (core Sᵀ) is

    O = Xᵀ d and C = core coreᵀ            `products`
    C = L Lᵀ                               `prepare`, which also makes the trial cores S - lr d
    Y = X - lr (d - X O) L⁻ᵀ L⁻¹           `trial`
    G = Yᵀ Y                               `products`
    G = L Lᵀ                               `decide`
    X = Y L⁻ᵀ, B = the new buffer          `finish`

and nothing but scratch is written before `finish`, which knows of every part of a layer whether it came out finite.
"""

import triton
import triton.language as tl

from ..qr.cholesky_qr import (
    ALL_ZERO,
    EPSILON,
    NOT_FINITE,
    OK,
    RESCUE,
    factor_options,
    factorize,
    householder_qr,
    largest_magnitude,
    load_wide,
    momentum,
    power_of_two,
    solve_options,
    substitute,
)
from ..runtime.launching import variant

# x, g, b, y: pointer_table of X, its gradient, its buffer and the trial point Y; the rest from `overlap` on in scratch
FACTOR = (
    "x", "g", "b", "y", "rows", "n", "role", "overlap_parts", "overlap_splits", "overlap", "core", "core_L", "gram",
    "splits", "L",
)  # fmt: skip
# pointer_table of S and of the bias with their gradients and buffers; trial: the new core, in scratch
LAYER = ("S", "S_g", "S_b", "rank", "trial", "bias", "bias_g", "bias_b", "length")
OVERLAP, CORE, PRECONDITION, BIAS = map(tl.constexpr, range(4))  # what a program of `prepare` does
WHOLE_FACTOR, ROWS_OF_FACTOR, REST_OF_LAYER = map(tl.constexpr, range(3))  # what a program of `finish` does

_FACTOR_COLUMNS = tl.constexpr(len(FACTOR))
_LAYER_COLUMNS = tl.constexpr(len(LAYER))
_S_ROLE, _BIAS_ROLE = tl.constexpr(1), tl.constexpr(3)


@triton.jit
def _hyper(hyper_ptr, role, column: tl.constexpr):
    return tl.load(hyper_ptr + role * 10 + column)


@triton.jit
def _new_entries(p, g, b_ptrs, mask, hyper_ptr, role):
    """p - lr d, where p decays, and the new buffer; all float64."""
    sign, keep, gain, ahead, follow = momentum(hyper_ptr, role)
    g = sign * g + _hyper(hyper_ptr, role, 3) * p
    SIZE: tl.constexpr = mask.shape[0]
    old = load_wide(b_ptrs, mask & (tl.arange(0, SIZE) < tl.where(keep != 0, SIZE, 0)))
    b = keep * old + gain * g
    return p - _hyper(hyper_ptr, role, 0) * (ahead * g + follow * b), b


@triton.jit
def _is_finite(x):
    return (x - x) == 0


@triton.jit
def _sum_overlap(factor, entries, wide_ptr, dtype: tl.constexpr):
    """O from its splits."""
    LARGEST: tl.constexpr = 1.7976931348623157e308 if dtype == tl.float64 else 3.4028234663852886e38
    n = tl.load(factor + 5)
    mask = entries < n * n
    parts = wide_ptr + tl.load(factor + 7) + entries
    total = load_wide(parts, mask)
    for split in range(1, tl.load(factor + 8).to(tl.int32)):
        total += load_wide(parts + split * n * n, mask)
    # what dtype cannot hold must not come out finite by way of float64
    total = tl.where(tl.abs(total) <= LARGEST, total, float("nan"))
    tl.store(wide_ptr + tl.load(factor + 9) + entries, total, mask=mask)


@triton.jit
def _try_core(layer, entries, role, places_ptr, hyper_ptr, base_ptr, trial_ptr):
    """The new core before its clip."""
    rank = tl.load(layer + 3)
    mask = entries < rank * rank
    S = load_wide(base_ptr + tl.load(places_ptr + tl.load(layer)) + entries, mask)
    g = load_wide(base_ptr + tl.load(places_ptr + tl.load(layer + 1)) + entries, mask)
    b_ptrs = base_ptr + tl.load(places_ptr + tl.load(layer + 2)) + entries
    new, _ = _new_entries(S, g, b_ptrs, mask, hyper_ptr, role)
    tl.store(trial_ptr + tl.load(layer + 4) + entries, new.to(trial_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _check_bias(layer, role, places_ptr, hyper_ptr, base_ptr, state_ptr, BLOCK: tl.constexpr):
    """Whether the new bias and its buffer are finite."""
    dtype = base_ptr.dtype.element_ty
    length = tl.load(layer + 8)
    strange = tl.zeros([BLOCK], tl.int32)
    for begin in range(0, length, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        mask = at < length
        p = load_wide(base_ptr + tl.load(places_ptr + tl.load(layer + 5)) + at, mask)
        g = load_wide(base_ptr + tl.load(places_ptr + tl.load(layer + 6)) + at, mask)
        b_ptrs = base_ptr + tl.load(places_ptr + tl.load(layer + 7)) + at
        new, b = _new_entries(p, g, b_ptrs, mask, hyper_ptr, role)
        strange += tl.where(_is_finite(new.to(dtype)) & _is_finite(b.to(dtype)) | (at >= length), 0, 1)
    tl.store(state_ptr, tl.where(tl.sum(strange, 0) > 0, NOT_FINITE, OK))


@triton.jit
def _factor_core(factor, tau, wide_ptr, state_ptr, PANEL: tl.constexpr, BLOCK: tl.constexpr):
    """L for C = core coreᵀ, damped where there is no bound on kappa."""
    n = tl.load(factor + 5).to(tl.int32)
    C, L = wide_ptr + tl.load(factor + 10), wide_ptr + tl.load(factor + 11)
    traces, squares = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    for begin in range(0, n * n, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        c = load_wide(C + at, at < n * n)
        traces += tl.where(at // n == at % n, c, 0.0)
        squares += c * c
    trace, square = tl.sum(traces, 0), tl.sum(squares, 0)
    rounding = n * EPSILON
    # between sigma_1² and 2 / (1 + √n) of it, the closer the more one sigma dominates or all are alike
    largest = square / tl.where(trace > 0, trace, 1.0)
    shift = 1e-12 * largest
    least = rounding.to(tl.float64)
    edge = tl.full([], 1, tl.float64)
    if tau < float("inf"):
        shift *= 0
        least = tl.minimum(tl.maximum(0.01 / ((1 + tau) * (1 + tau)), least), 1e-10)
        edge = 2 / (2 + tau)
    ok = 0
    tries = 0
    while (ok == 0) & (tries < 2):
        ok, _ = factorize(C, 1, n, shift, least, L, PANEL)
        shift = edge * edge * trace / n  # a singular core: as if lifted by the lower edge of the rms band
        tries += 1
    tl.store(state_ptr, tl.where(trace == 0, ALL_ZERO, tl.where(ok != 0, OK, NOT_FINITE)))


@triton.jit
def prepare(
    places_ptr, factors_ptr, layers_ptr, work_ptr, hyper_ptr, base_ptr, wide_ptr, trial_ptr, state_ptr, bias_state_ptr,
    PANEL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What `trial` and the clip need. work: what to do, for which factor or layer, for which block of entries.

    state of a factor, bias_state of a layer: OK, or NOT_FINITE or ALL_ZERO (of a core): the layer must stay.
    """
    work = work_ptr + tl.program_id(0).to(tl.int64) * 3
    what, index = tl.load(work), tl.load(work + 1).to(tl.int64)
    entries = tl.load(work + 2).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    factor, layer = factors_ptr + index * _FACTOR_COLUMNS, layers_ptr + index * _LAYER_COLUMNS
    if what == OVERLAP:
        _sum_overlap(factor, entries, wide_ptr, base_ptr.dtype.element_ty)
    elif what == CORE:
        _try_core(layer, entries, 4 * index + _S_ROLE, places_ptr, hyper_ptr, base_ptr, trial_ptr)
    elif what == BIAS:
        _check_bias(layer, 4 * index + _BIAS_ROLE, places_ptr, hyper_ptr, base_ptr, bias_state_ptr + index, BLOCK)
    else:
        tau = _hyper(hyper_ptr, (index // 2) * 4 + _S_ROLE, 7)
        _factor_core(factor, tau, wide_ptr, state_ptr + index, PANEL, BLOCK)


@triton.jit
def trial(
    places_ptr, factors_ptr, work_ptr, hyper_ptr, base_ptr, wide_ptr, Y_ptr,
    ROWS: tl.constexpr, PANEL: tl.constexpr,
):  # fmt: skip
    """Y = X - lr (d - X O) L⁻ᵀ L⁻¹ for ROWS rows of one factor. work: factor, block of rows."""
    work = work_ptr + tl.program_id(0).to(tl.int64) * 2
    index = tl.load(work).to(tl.int64)
    factor = factors_ptr + index * _FACTOR_COLUMNS
    rows = tl.load(work + 1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    n_rows, n = tl.load(factor + 4), tl.load(factor + 5).to(tl.int32)
    role = tl.load(factor + 6)
    sign, keep, gain, ahead, follow = momentum(hyper_ptr, role)
    from_grad, from_buffer = (ahead + follow * gain) * sign, follow * keep
    lr = _hyper(hyper_ptr, role, 0)
    X = base_ptr + tl.load(places_ptr + tl.load(factor))
    grad = base_ptr + tl.load(places_ptr + tl.load(factor + 1))
    buffer = base_ptr + tl.load(places_ptr + tl.load(factor + 2))
    Y = Y_ptr + tl.load(places_ptr + tl.load(factor + 3))
    overlap, L = wide_ptr + tl.load(factor + 9), wide_ptr + tl.load(factor + 11)
    dtype = base_ptr.dtype.element_ty
    index = tl.arange(0, PANEL)
    inside = rows[:, None] < n_rows
    buffer_width = tl.where(from_buffer != 0, n, 0)
    for begin in range(0, n, PANEL):
        cols = begin + index
        at = rows[:, None] * n + cols[None, :]
        mask = inside & (cols[None, :] < n)
        t = from_grad * load_wide(grad + at, mask)
        t += from_buffer * load_wide(buffer + at, inside & (cols[None, :] < buffer_width))
        for done in range(0, n, PANEL):
            k = done + index
            x = load_wide(X + rows[:, None] * n + k[None, :], inside & (k[None, :] < n))
            o = load_wide(overlap + k[:, None] * n + cols[None, :], (k[:, None] < n) & (cols[None, :] < n))
            t = tl.dot(-x, o, t, input_precision="ieee", out_dtype=tl.float64)
        tl.store(Y + at, t.to(dtype), mask=mask)
    tl.debug_barrier()
    substitute(Y, n, Y, n, rows, n_rows, L, n, PANEL)
    last = ((n - 1) // PANEL) * PANEL
    for back in range(0, n, PANEL):
        begin = last - back
        cols = begin + index
        mask = inside & (cols[None, :] < n)
        z = load_wide(Y + rows[:, None] * n + cols[None, :], mask)
        for done in range(begin + PANEL, n, PANEL):
            k = done + index
            after = load_wide(Y + rows[:, None] * n + k[None, :], inside & (k[None, :] < n))
            below = load_wide(L + k[:, None] * n + cols[None, :], k[:, None] < n)
            z = tl.dot(-after, below, z, input_precision="ieee", out_dtype=tl.float64)
        inverse = load_wide(L + cols[:, None] * n + cols[None, :], (cols[:, None] < n) & (cols[None, :] < n))
        z = tl.dot(z, inverse, input_precision="ieee", out_dtype=tl.float64)
        tl.debug_barrier()
        tl.store(Y + rows[:, None] * n + cols[None, :], z.to(dtype), mask=mask)
        tl.debug_barrier()
    for begin in range(0, n, PANEL):
        cols = begin + index
        at = rows[:, None] * n + cols[None, :]
        mask = inside & (cols[None, :] < n)
        y = load_wide(X + at, mask) - lr * load_wide(Y + at, mask)
        tl.debug_barrier()
        tl.store(Y + at, y.to(dtype), mask=mask)


@triton.jit
def decide(factors_ptr, work_ptr, wide_ptr, state_ptr, limit, PANEL: tl.constexpr):
    """L for the Gram matrix of each trial point; state OK, RESCUE where it is too far from I, or NOT_FINITE."""
    index = tl.load(work_ptr + tl.program_id(0).to(tl.int64)).to(tl.int64)
    factor = factors_ptr + index * _FACTOR_COLUMNS
    n, splits = tl.load(factor + 5).to(tl.int32), tl.load(factor + 13).to(tl.int32)
    gram, L = wide_ptr + tl.load(factor + 12), wide_ptr + tl.load(factor + 14)
    ok, distance2 = factorize(gram, splits, n, 0.0, n * EPSILON, L, PANEL)
    near = tl.where(distance2 <= limit * limit, ok, 0)
    state = tl.where(near != 0, OK, RESCUE)
    state = tl.where(distance2 < float("inf"), state, NOT_FINITE)
    before = tl.load(state_ptr + index)
    tl.store(state_ptr + index, tl.where(before == OK, state, before))


@triton.jit
def _stays(layer, state_ptr, bias_state_ptr, info_ptr):
    """Whether a part of the layer must stay as it is, so that all of it must."""
    U, V = tl.load(state_ptr + 2 * layer), tl.load(state_ptr + 2 * layer + 1)
    factors = (U == NOT_FINITE) | (U == ALL_ZERO) | (V == NOT_FINITE) | (V == ALL_ZERO)
    others = (tl.load(bias_state_ptr + layer) != OK) | (tl.load(info_ptr + layer) != OK)
    return tl.where(factors | others, 1, 0)


@triton.jit
def _move_rows(
    factor, block, state, places_ptr, hyper_ptr, base_ptr, wide_ptr, Y_ptr, ROWS: tl.constexpr, PANEL: tl.constexpr
):
    """X = Y L⁻ᵀ, unless `_rescue` makes it, and the new buffer, for ROWS rows."""
    rows = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    n_rows, n = tl.load(factor + 4), tl.load(factor + 5).to(tl.int32)
    role = tl.load(factor + 6)
    X = base_ptr + tl.load(places_ptr + tl.load(factor))
    if state == OK:
        Y, L = Y_ptr + tl.load(places_ptr + tl.load(factor + 3)), wide_ptr + tl.load(factor + 14)
        substitute(Y, n, X, n, rows, n_rows, L, n, PANEL)
    if _hyper(hyper_ptr, role, 1) != 0:
        sign, keep, gain, _, _ = momentum(hyper_ptr, role)
        grad = base_ptr + tl.load(places_ptr + tl.load(factor + 1))
        buffer = base_ptr + tl.load(places_ptr + tl.load(factor + 2))
        old_width = tl.where(keep != 0, n, 0)
        for begin in range(0, n, PANEL):
            cols = begin + tl.arange(0, PANEL)
            at = rows[:, None] * n + cols[None, :]
            mask = (rows[:, None] < n_rows) & (cols[None, :] < n)
            old = load_wide(buffer + at, mask & (cols[None, :] < old_width))
            new = keep * old + gain * (sign * load_wide(grad + at, mask))
            tl.store(buffer + at, new.to(base_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _move_entries(
    place, length, role, places_ptr, hyper_ptr, base_ptr, clipped_ptr, CLIPPED: tl.constexpr, BLOCK: tl.constexpr
):
    """Core or bias and their buffers; place: where the table says where they lie. CLIPPED: the value is there."""
    dtype = base_ptr.dtype.element_ty
    buffer_length = tl.where(_hyper(hyper_ptr, role, 1) != 0, length, 0)
    for begin in range(0, length, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        mask = at < length
        p_ptrs = base_ptr + tl.load(places_ptr + tl.load(place)) + at
        g = load_wide(base_ptr + tl.load(places_ptr + tl.load(place + 1)) + at, mask)
        b_ptrs = base_ptr + tl.load(places_ptr + tl.load(place + 2)) + at
        new, b = _new_entries(load_wide(p_ptrs, mask), g, b_ptrs, mask, hyper_ptr, role)
        if CLIPPED:
            new = load_wide(clipped_ptr + at, mask)
        tl.store(b_ptrs, b.to(dtype), mask=at < buffer_length)
        tl.store(p_ptrs, new.to(dtype), mask=mask)


@triton.jit
def _rescue(factor, places_ptr, base_ptr, wide_ptr, Y_ptr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """X = qf(Y) by Householder's reflections, by one program."""
    X, Y = base_ptr + tl.load(places_ptr + tl.load(factor)), Y_ptr + tl.load(places_ptr + tl.load(factor + 3))
    n_rows, n, beta = tl.load(factor + 4), tl.load(factor + 5), wide_ptr + tl.load(factor + 14)
    scale = power_of_two(largest_magnitude(Y, n, n_rows, n, ROWS, COLS))
    householder_qr(Y, n, scale, Y, n, beta, X, n, n_rows, n, ROWS, COLS)


@triton.jit
def finish(
    places_ptr, factors_ptr, layers_ptr, work_ptr, hyper_ptr, base_ptr, wide_ptr, Y_ptr, trial_ptr,
    state_ptr, bias_state_ptr, info_ptr, skipped_ptr,
    ROWS: tl.constexpr, PANEL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Parameters and buffers of the layers that can move; counts the others.

    A factor whose step was too long for one Cholesky-QR is made by one program, by Householder's reflections.
    work: what to do, for which factor or layer, for which block of rows. info of a layer: of the clip of its core.
    """
    work = work_ptr + tl.program_id(0).to(tl.int64) * 3
    what, index = tl.load(work), tl.load(work + 1).to(tl.int64)
    if what == ROWS_OF_FACTOR:
        if _stays(index // 2, state_ptr, bias_state_ptr, info_ptr) == 0:
            factor, state = factors_ptr + index * _FACTOR_COLUMNS, tl.load(state_ptr + index)
            block = tl.load(work + 2)
            _move_rows(factor, block, state, places_ptr, hyper_ptr, base_ptr, wide_ptr, Y_ptr, ROWS, PANEL)
    elif what == WHOLE_FACTOR:
        if tl.load(state_ptr + index) == RESCUE:
            if _stays(index // 2, state_ptr, bias_state_ptr, info_ptr) == 0:
                _rescue(factors_ptr + index * _FACTOR_COLUMNS, places_ptr, base_ptr, wide_ptr, Y_ptr, ROWS, PANEL)
    else:
        if _stays(index, state_ptr, bias_state_ptr, info_ptr) == 0:
            layer = layers_ptr + index * _LAYER_COLUMNS
            rank, length, core = tl.load(layer + 3), tl.load(layer + 8), trial_ptr + tl.load(layer + 4)
            role = 4 * index + _S_ROLE
            _move_entries(layer, rank * rank, role, places_ptr, hyper_ptr, base_ptr, core, True, BLOCK)
            role = 4 * index + _BIAS_ROLE
            _move_entries(layer + 5, length, role, places_ptr, hyper_ptr, base_ptr, core, False, BLOCK)
        else:
            tl.store(skipped_ptr + index, tl.load(skipped_ptr + index) + 1)


# ------------------------------------------------------------------------------------------ configurations

BLOCK = 512  # entries of a core or a bias at a time


def prepare_options() -> dict:
    return dict(BLOCK=BLOCK) | factor_options()


def finish_options() -> dict:
    return dict(BLOCK=BLOCK) | solve_options()


def variants(architecture: str):
    """What to compile ahead of time: (kernel, signature types, constexprs, options, whether it is a default)."""
    types = dict.fromkeys(("places_ptr", "factors_ptr", "layers_ptr", "skipped_ptr"), "*i64")
    types |= dict.fromkeys(("work_ptr", "state_ptr", "bias_state_ptr", "info_ptr"), "*i32")
    types |= dict.fromkeys(("hyper_ptr", "wide_ptr"), "*fp64") | {"limit": "fp32"}
    yield variant(decide, types, factor_options())
    for dtype in ("fp32", "fp64"):
        types |= dict.fromkeys(("base_ptr", "Y_ptr", "trial_ptr"), f"*{dtype}")
        yield variant(prepare, types, prepare_options())
        yield variant(trial, types, solve_options())
        yield variant(finish, types, finish_options())
