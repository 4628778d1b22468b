"""Kernels of one constrained SGD step of a whole network; pointer table and work lists are as in cholesky_qr.py.

With d the direction of SGD, a step of a factor X = U (core S) or V (core Sᵀ) is

    O = Xᵀ d, XᵀX and C = core coreᵀ       `products`
    C = L Lᵀ                               `prepare`, which also makes the trial cores S - lr d and looks at XᵀX
    Y = X - lr (d - X O) L⁻ᵀ L⁻¹           `trial`; without a preconditioner L = I
    G = Yᵀ Y                               `products`
    G = L Lᵀ                               `decide`
    X = Y L⁻ᵀ, B = the new buffer          `finish`

Only workspace is written before `finish`, which skips a layer if any part of it is not finite or its X not orthonormal.
An X that is, and that the step does not move, stays bit for bit.
"""

import triton
import triton.language as tl

from ....reference import NOT_ORTHONORMAL, ORTHONORMAL_INPUT, ORTHONORMAL_STEP, ORTHONORMAL_STEP64
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
from . import tables as col

SUM_PRODUCTS, TRY_CORE, MAKE_PRECONDITIONER, CHECK_BIAS = map(tl.constexpr, range(4))  # a program of `prepare`
RESCUE_FACTOR, MOVE_ROWS, REST_OF_LAYER = map(tl.constexpr, range(3))  # what a program of `finish` does
# what a factor needs: nothing; a move, if only by rounding; that the caller makes it orthonormal; what no step can do
NOTHING, MOVE, ABSORPTION, IMPOSSIBLE = map(tl.constexpr, range(4))
KEPT, OUTSIDE = tl.constexpr(5), tl.constexpr(6)  # states of factors that need NOTHING or ABSORPTION, beside RESCUE
_INPUT = tl.constexpr(ORTHONORMAL_INPUT)
_ROUNDING, _WIDE_ROUNDING = tl.constexpr(ORTHONORMAL_STEP), tl.constexpr(ORTHONORMAL_STEP64)
_MARK = tl.constexpr(NOT_ORTHONORMAL)


@triton.jit
def _hyper(hyper_ptr, row, COLUMN: tl.constexpr):
    return tl.load(hyper_ptr + row * col.HYPER_COLUMNS + COLUMN)


@triton.jit
def _tensor(base_ptr, pointers_ptr, entry_ptr):
    """Return the start of the tensor whose entry of the pointer table is stored at entry_ptr."""
    return base_ptr + tl.load(pointers_ptr + tl.load(entry_ptr))


@triton.jit
def _new_entries(p, g, b_ptrs, mask, hyper_ptr, row):
    """Return p - lr d and the new buffer, both float64; with weight decay."""
    sign, keep, gain, ahead, follow = momentum(hyper_ptr, row)
    g = sign * g + _hyper(hyper_ptr, row, col.WEIGHT_DECAY) * p
    SIZE: tl.constexpr = mask.shape[0]
    old = load_wide(b_ptrs, mask & (tl.arange(0, SIZE) < tl.where(keep != 0, SIZE, 0)))
    b = keep * old + gain * g
    return p - _hyper(hyper_ptr, row, col.LR) * (ahead * g + follow * b), b


@triton.jit
def _is_finite(x):
    return (x - x) == 0


@triton.jit
def _sum_products(factor, entries, wide_ptr, need_ptr, dtype: tl.constexpr):
    """Sum the parts of O and of XᵀX, which tells what X needs."""
    ROUNDING: tl.constexpr = _WIDE_ROUNDING if dtype == tl.float64 else _ROUNDING
    LARGEST: tl.constexpr = 1.7976931348623157e308 if dtype == tl.float64 else 3.4028234663852886e38
    n = tl.load(factor + col.FACTOR_RANK)
    mask = entries < n * n
    splits = tl.load(factor + col.FACTOR_OVERLAP_SPLITS).to(tl.int32)
    parts = wide_ptr + tl.load(factor + col.FACTOR_OVERLAP_PARTS) + entries
    total = load_wide(parts, mask)
    for split in range(1, splits):
        total += load_wide(parts + split * n * n, mask)
    # an overflow in dtype must not come out finite because the sum is float64
    total = tl.where(tl.abs(total) <= LARGEST, total, float("nan"))
    tl.store(wide_ptr + tl.load(factor + col.FACTOR_OVERLAP) + entries, total, mask=mask)
    lower = mask & (entries // n >= entries % n)
    parts = wide_ptr + tl.load(factor + col.FACTOR_GRAM) + entries
    off = load_wide(parts, lower) - tl.where(lower & (entries // n == entries % n), 1.0, 0.0)
    for split in range(1, splits):
        off += load_wide(parts + split * n * n, lower)
    off = tl.abs(off)
    need = tl.where(off <= ROUNDING, NOTHING, tl.where(off > _INPUT, ABSORPTION, MOVE))
    need = tl.max(tl.where(_is_finite(total), need, IMPOSSIBLE), 0)
    tl.atomic_max(need_ptr, need, mask=need > NOTHING)


@triton.jit
def _try_core(layer, entries, row, pointers_ptr, hyper_ptr, base_ptr, trial_ptr, moved_ptr):
    """Make the new core before its clip; moved becomes 1 if it differs from the old one."""
    rank = tl.load(layer + col.LAYER_RANK)
    mask = entries < rank * rank
    S = load_wide(_tensor(base_ptr, pointers_ptr, layer + col.LAYER_S) + entries, mask)
    g = load_wide(_tensor(base_ptr, pointers_ptr, layer + col.LAYER_S_GRAD) + entries, mask)
    b_ptrs = _tensor(base_ptr, pointers_ptr, layer + col.LAYER_S_BUFFER) + entries
    new, _ = _new_entries(S, g, b_ptrs, mask, hyper_ptr, row)
    new = new.to(trial_ptr.dtype.element_ty)
    tl.store(trial_ptr + tl.load(layer + col.LAYER_TRIAL) + entries, new, mask=mask)
    moved = tl.max((new.to(tl.float64) != S).to(tl.int32), 0)
    tl.atomic_max(moved_ptr, moved, mask=moved > 0)


@triton.jit
def _check_bias(layer, row, pointers_ptr, hyper_ptr, base_ptr, state_ptr, BLOCK: tl.constexpr):
    """Set the state to NOT_FINITE unless the new bias and its buffer are finite."""
    dtype = base_ptr.dtype.element_ty
    length = tl.load(layer + col.LAYER_BIAS_LENGTH)
    p_ptr = _tensor(base_ptr, pointers_ptr, layer + col.LAYER_BIAS)
    g_ptr = _tensor(base_ptr, pointers_ptr, layer + col.LAYER_BIAS_GRAD)
    b_ptr = _tensor(base_ptr, pointers_ptr, layer + col.LAYER_BIAS_BUFFER)
    not_finite = tl.zeros([BLOCK], tl.int32)
    for begin in range(0, length, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        mask = at < length
        p, g = load_wide(p_ptr + at, mask), load_wide(g_ptr + at, mask)
        new, b = _new_entries(p, g, b_ptr + at, mask, hyper_ptr, row)
        not_finite += tl.where(_is_finite(new.to(dtype)) & _is_finite(b.to(dtype)) | (at >= length), 0, 1)
    tl.store(state_ptr, tl.where(tl.sum(not_finite, 0) > 0, NOT_FINITE, OK))


@triton.jit
def _make_preconditioner(factor, tau, wide_ptr, state_ptr, PANEL: tl.constexpr, BLOCK: tl.constexpr):
    """Factor C = core coreᵀ = L Lᵀ, damped where kappa has no bound."""
    n = tl.load(factor + col.FACTOR_RANK).to(tl.int32)
    C, L = wide_ptr + tl.load(factor + col.FACTOR_CORE), wide_ptr + tl.load(factor + col.FACTOR_CORE_L)
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
    pointers_ptr, factors_ptr, layers_ptr, work_ptr, hyper_ptr, base_ptr, wide_ptr, trial_ptr, state_ptr,
    bias_state_ptr, need_ptr, moved_ptr,
    PANEL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Make what `trial` and the clip need.

    work: kind of work, factor or layer, block of entries. state of a factor and bias_state of a layer become OK,
    NOT_FINITE or ALL_ZERO (the core is); unless all are OK the layer must not change. need of a factor is raised to
    what XᵀX tells, moved of a layer set where its core moves; both are 0 between steps.
    """
    work = work_ptr + tl.program_id(0).to(tl.int64) * 3
    what, index = tl.load(work), tl.load(work + 1).to(tl.int64)
    entries = tl.load(work + 2).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    factor, layer = factors_ptr + index * col.FACTOR_COLUMNS, layers_ptr + index * col.LAYER_COLUMNS
    if what == SUM_PRODUCTS:
        _sum_products(factor, entries, wide_ptr, need_ptr + index, base_ptr.dtype.element_ty)
    elif what == TRY_CORE:
        row = col.ROLE_COUNT * index + col.S_ROLE
        _try_core(layer, entries, row, pointers_ptr, hyper_ptr, base_ptr, trial_ptr, moved_ptr + index)
    elif what == CHECK_BIAS:
        row, state_ptr = col.ROLE_COUNT * index + col.BIAS_ROLE, bias_state_ptr + index
        _check_bias(layer, row, pointers_ptr, hyper_ptr, base_ptr, state_ptr, BLOCK)
    elif _hyper(hyper_ptr, tl.load(factor + col.FACTOR_HYPER), col.PRECONDITION) != 0:
        tau = _hyper(hyper_ptr, (index // 2) * col.ROLE_COUNT + col.S_ROLE, col.TAU)
        _make_preconditioner(factor, tau, wide_ptr, state_ptr + index, PANEL, BLOCK)
    else:
        tl.store(state_ptr + index, OK)


@triton.jit
def trial(
    pointers_ptr, factors_ptr, work_ptr, hyper_ptr, base_ptr, wide_ptr, Y_ptr, need_ptr,
    ROWS: tl.constexpr, PANEL: tl.constexpr,
):  # fmt: skip
    """Compute Y = X - lr (d - X O) L⁻ᵀ L⁻¹ for ROWS rows of one factor, L = I without a preconditioner.

    work: factor, block of rows. need of the factor is raised to MOVE where Y differs from X.
    """
    work = work_ptr + tl.program_id(0).to(tl.int64) * 2
    index = tl.load(work).to(tl.int64)
    factor = factors_ptr + index * col.FACTOR_COLUMNS
    need_ptr += index
    rows = tl.load(work + 1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    n_rows, n = tl.load(factor + col.FACTOR_ROWS), tl.load(factor + col.FACTOR_RANK).to(tl.int32)
    row = tl.load(factor + col.FACTOR_HYPER)
    sign, keep, gain, ahead, follow = momentum(hyper_ptr, row)
    from_grad, from_buffer = (ahead + follow * gain) * sign, follow * keep
    lr = _hyper(hyper_ptr, row, col.LR)
    X = _tensor(base_ptr, pointers_ptr, factor + col.FACTOR_X)
    grad = _tensor(base_ptr, pointers_ptr, factor + col.FACTOR_GRAD)
    buffer = _tensor(base_ptr, pointers_ptr, factor + col.FACTOR_BUFFER)
    Y = _tensor(Y_ptr, pointers_ptr, factor + col.FACTOR_TRIAL)
    overlap, L = wide_ptr + tl.load(factor + col.FACTOR_OVERLAP), wide_ptr + tl.load(factor + col.FACTOR_CORE_L)
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
    if _hyper(hyper_ptr, row, col.PRECONDITION) != 0:
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
    need = tl.full([ROWS, PANEL], NOTHING, tl.int32)
    for begin in range(0, n, PANEL):
        cols = begin + index
        at = rows[:, None] * n + cols[None, :]
        mask = inside & (cols[None, :] < n)
        x = load_wide(X + at, mask)
        y = (x - lr * load_wide(Y + at, mask)).to(dtype)
        need = tl.where(y.to(tl.float64) != x, MOVE, need)
        tl.debug_barrier()
        tl.store(Y + at, y, mask=mask)
    need = tl.max(tl.max(need, 1), 0)
    tl.atomic_max(need_ptr, need, mask=need > NOTHING)


@triton.jit
def decide(factors_ptr, work_ptr, wide_ptr, state_ptr, need_ptr, limit, PANEL: tl.constexpr):
    """Factor the Gram matrices of the trial points; need becomes 0.

    States become OK, RESCUE if too far from I, NOT_FINITE or, by what the factor needs, KEPT or OUTSIDE.
    """
    index = tl.load(work_ptr + tl.program_id(0).to(tl.int64)).to(tl.int64)
    factor = factors_ptr + index * col.FACTOR_COLUMNS
    n, splits = tl.load(factor + col.FACTOR_RANK).to(tl.int32), tl.load(factor + col.FACTOR_GRAM_SPLITS).to(tl.int32)
    gram, L = wide_ptr + tl.load(factor + col.FACTOR_GRAM), wide_ptr + tl.load(factor + col.FACTOR_L)
    # read here: barriers come before the stores
    before, need = tl.load(state_ptr + index), tl.load(need_ptr + index)
    ok, distance2 = factorize(gram, splits, n, 0.0, n * EPSILON, L, PANEL)
    near = tl.where(distance2 <= limit * limit, ok, 0)
    tl.store(need_ptr + index, NOTHING)
    state = tl.where(need == NOTHING, KEPT, tl.where(near != 0, OK, RESCUE))
    state = tl.where(distance2 < float("inf"), state, NOT_FINITE)
    state = tl.where(need == ABSORPTION, OUTSIDE, state)
    tl.store(state_ptr + index, tl.where(before == OK, state, before))


@triton.jit
def _skips(layer, state_ptr, bias_state_ptr, info_ptr):
    """Return 0, or what to count for a layer of which some part failed, so that none of it may change."""
    U, V = tl.load(state_ptr + 2 * layer), tl.load(state_ptr + 2 * layer + 1)
    factors = (U == NOT_FINITE) | (U == ALL_ZERO) | (V == NOT_FINITE) | (V == ALL_ZERO)
    others = (tl.load(bias_state_ptr + layer) != OK) | (tl.load(info_ptr + layer) != OK)
    outside = tl.where((U == OUTSIDE) | (V == OUTSIDE), _MARK, 0).to(tl.int64)
    return tl.where(factors | others, 1, outside)


@triton.jit
def _move_rows(
    factor,
    block,
    state,
    pointers_ptr,
    hyper_ptr,
    base_ptr,
    wide_ptr,
    Y_ptr,
    ROWS: tl.constexpr,
    PANEL: tl.constexpr,
):
    """Write ROWS rows of X = Y L⁻ᵀ, unless it is kept or `_rescue` makes it, and of the new buffer."""
    rows = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    n_rows, n = tl.load(factor + col.FACTOR_ROWS), tl.load(factor + col.FACTOR_RANK).to(tl.int32)
    row = tl.load(factor + col.FACTOR_HYPER)
    X = _tensor(base_ptr, pointers_ptr, factor + col.FACTOR_X)
    if state == OK:
        Y, L = _tensor(Y_ptr, pointers_ptr, factor + col.FACTOR_TRIAL), wide_ptr + tl.load(factor + col.FACTOR_L)
        substitute(Y, n, X, n, rows, n_rows, L, n, PANEL)
    if _hyper(hyper_ptr, row, col.MOMENTUM) != 0:
        sign, keep, gain, _, _ = momentum(hyper_ptr, row)
        grad = _tensor(base_ptr, pointers_ptr, factor + col.FACTOR_GRAD)
        buffer = _tensor(base_ptr, pointers_ptr, factor + col.FACTOR_BUFFER)
        old_width = tl.where(keep != 0, n, 0)
        for begin in range(0, n, PANEL):
            cols = begin + tl.arange(0, PANEL)
            at = rows[:, None] * n + cols[None, :]
            mask = (rows[:, None] < n_rows) & (cols[None, :] < n)
            old = load_wide(buffer + at, mask & (cols[None, :] < old_width))
            new = keep * old + gain * (sign * load_wide(grad + at, mask))
            tl.store(buffer + at, new.to(base_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _move_entries(p_ptr, g_ptr, b_ptr, length, hyper_ptr, row, clipped_ptr, CLIPPED: tl.constexpr, BLOCK: tl.constexpr):
    """Write a core or bias p and its buffer b. CLIPPED: take the new p from clipped_ptr."""
    dtype = p_ptr.dtype.element_ty
    buffer_length = tl.where(_hyper(hyper_ptr, row, col.MOMENTUM) != 0, length, 0)
    for begin in range(0, length, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        mask = at < length
        p, g = load_wide(p_ptr + at, mask), load_wide(g_ptr + at, mask)
        new, b = _new_entries(p, g, b_ptr + at, mask, hyper_ptr, row)
        if CLIPPED:
            new = load_wide(clipped_ptr + at, mask)
        tl.store(b_ptr + at, b.to(dtype), mask=at < buffer_length)
        tl.store(p_ptr + at, new.to(dtype), mask=mask)


@triton.jit
def _rescue(factor, pointers_ptr, base_ptr, wide_ptr, Y_ptr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Compute X = qf(Y) by Householder reflections, in one program."""
    X = _tensor(base_ptr, pointers_ptr, factor + col.FACTOR_X)
    Y = _tensor(Y_ptr, pointers_ptr, factor + col.FACTOR_TRIAL)
    n_rows, n = tl.load(factor + col.FACTOR_ROWS), tl.load(factor + col.FACTOR_RANK)
    beta = wide_ptr + tl.load(factor + col.FACTOR_L)
    scale = power_of_two(largest_magnitude(Y, n, n_rows, n, ROWS, COLS))
    householder_qr(Y, n, scale, Y, n, beta, X, n, n_rows, n, ROWS, COLS)


@triton.jit
def finish(
    pointers_ptr, factors_ptr, layers_ptr, work_ptr, hyper_ptr, base_ptr, wide_ptr, Y_ptr, trial_ptr,
    state_ptr, bias_state_ptr, moved_ptr, info_ptr, skipped_ptr,
    ROWS: tl.constexpr, PANEL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write parameters and buffers of the layers that did not fail; count the others in skipped.

    A factor whose step was too long for one Cholesky-QR is made by one program with Householder reflections.
    work: kind of work, factor or layer, block of rows. info of a layer: that of the clip of its core. moved becomes 0.
    """
    work = work_ptr + tl.program_id(0).to(tl.int64) * 3
    what, index = tl.load(work), tl.load(work + 1).to(tl.int64)
    if what == MOVE_ROWS:
        if _skips(index // 2, state_ptr, bias_state_ptr, info_ptr) == 0:
            factor, state = factors_ptr + index * col.FACTOR_COLUMNS, tl.load(state_ptr + index)
            block = tl.load(work + 2)
            _move_rows(factor, block, state, pointers_ptr, hyper_ptr, base_ptr, wide_ptr, Y_ptr, ROWS, PANEL)
    elif what == RESCUE_FACTOR:
        if tl.load(state_ptr + index) == RESCUE:
            if _skips(index // 2, state_ptr, bias_state_ptr, info_ptr) == 0:
                _rescue(factors_ptr + index * col.FACTOR_COLUMNS, pointers_ptr, base_ptr, wide_ptr, Y_ptr, ROWS, PANEL)
    else:
        tl.store(moved_ptr + index, 0)
        count = _skips(index, state_ptr, bias_state_ptr, info_ptr)
        if count == 0:
            layer = layers_ptr + index * col.LAYER_COLUMNS
            S = _tensor(base_ptr, pointers_ptr, layer + col.LAYER_S)
            g = _tensor(base_ptr, pointers_ptr, layer + col.LAYER_S_GRAD)
            b = _tensor(base_ptr, pointers_ptr, layer + col.LAYER_S_BUFFER)
            rank, core = tl.load(layer + col.LAYER_RANK), trial_ptr + tl.load(layer + col.LAYER_TRIAL)
            _move_entries(S, g, b, rank * rank, hyper_ptr, col.ROLE_COUNT * index + col.S_ROLE, core, True, BLOCK)
            bias = _tensor(base_ptr, pointers_ptr, layer + col.LAYER_BIAS)
            g = _tensor(base_ptr, pointers_ptr, layer + col.LAYER_BIAS_GRAD)
            b = _tensor(base_ptr, pointers_ptr, layer + col.LAYER_BIAS_BUFFER)
            length = tl.load(layer + col.LAYER_BIAS_LENGTH)
            _move_entries(bias, g, b, length, hyper_ptr, col.ROLE_COUNT * index + col.BIAS_ROLE, core, False, BLOCK)
        else:
            tl.atomic_add(skipped_ptr + index, count)


# ------------------------------------------------------------------------------------------ configurations

BLOCK = 512  # entries of a core or a bias at a time


def prepare_options() -> dict:
    return dict(BLOCK=BLOCK) | factor_options()


def finish_options(architecture: str) -> dict:
    # without the limit ptxas takes fewer registers for float64 than it needs, and spills
    registers = {} if architecture == "gfx942" else dict(maxnreg=255)
    return dict(BLOCK=BLOCK) | solve_options() | registers


def variants(architecture: str):
    """Yield what to compile ahead of time: (kernel, signature types, constexprs, options, is a default)."""
    types = dict.fromkeys(("pointers_ptr", "factors_ptr", "layers_ptr", "skipped_ptr"), "*i64")
    types |= dict.fromkeys(("work_ptr", "state_ptr", "bias_state_ptr", "need_ptr", "moved_ptr", "info_ptr"), "*i32")
    types |= dict.fromkeys(("hyper_ptr", "wide_ptr"), "*fp64") | {"limit": "fp32"}
    yield variant(decide, types, factor_options())
    for dtype in ("fp32", "fp64"):
        types |= dict.fromkeys(("base_ptr", "Y_ptr", "trial_ptr"), f"*{dtype}")
        yield variant(prepare, types, prepare_options())
        yield variant(trial, types, solve_options())
        yield variant(finish, types, finish_options(architecture))
