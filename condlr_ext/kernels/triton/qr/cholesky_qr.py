"""Kernels of Cholesky-QR for many matrices of different shapes at once, and of Householder QR where it fails.

`pointer_table` holds the offset of each matrix from a base pointer, a row of `jobs` the sizes of a matrix and its
entries in that table, a row of `work` the job and the part of it that one program does. Sums, triangular factors and
substitutions are in float64, whatever the dtype of the matrices: one pass is then as accurate as Householder QR up to
a condition number of about 1e4, two up to 1e7. On data center GPUs float64 products are no slower than float32 ones
that do not round to TF32.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ....reference import HYPER
from ..runtime.launching import columns, variant
from ..runtime.status import ALL_ZERO, NOT_CONVERGED, NOT_FINITE, OK  # noqa: F401  the step reads them here

RESCUE = tl.constexpr(4)  # state of a matrix that Householder QR has to factor; other states are status codes

EPSILON = tl.constexpr(2.0**-52)


class ProductJob(NamedTuple):
    """Row of the jobs of `products`: Aᵀ (alpha B + beta H) with A [rows, p], B and H [rows, q]."""

    a: int  # entry of the pointer table
    a_row: int  # strides
    a_col: int
    b: int
    b_row: int
    b_col: int
    h: int  # strides as of B
    rows: int
    p: int
    q: int
    per_split: int  # rows that one program sums
    out: int  # offset of the splits
    hyper: int = -1  # row of hyper that holds alpha and beta; -1: they are 1 and 0


class FactorJob(NamedTuple):
    """Row of the jobs of a factorization of X [rows, n] into Y [rows, n] and L [n, n]."""

    x: int  # entry of the pointer table
    x_row: int  # stride
    y: int
    y_row: int
    rows: int
    n: int
    gram: int  # offset of the splits of the Gram matrix
    splits: int
    L: int  # offset of L, or of the beta of Householder's reflectors
    reflectors: int  # offset of the reflectors


class UpperJob(NamedTuple):
    """Row of the jobs of `upper_factor`: R [k, n] from the splits of QᵀA."""

    k: int
    n: int
    splits: int
    parts: int  # offset of the splits
    out: int  # offset of R


_PRODUCT_COLUMNS = tl.constexpr(len(ProductJob._fields))
_PRODUCT_A, _PRODUCT_A_ROW, _PRODUCT_A_COL = columns(ProductJob._fields, "a a_row a_col")
_PRODUCT_B, _PRODUCT_B_ROW, _PRODUCT_B_COL, _PRODUCT_H = columns(ProductJob._fields, "b b_row b_col h")
_PRODUCT_ROWS, _PRODUCT_P, _PRODUCT_Q, _PRODUCT_PER_SPLIT = columns(ProductJob._fields, "rows p q per_split")
_PRODUCT_OUT, _PRODUCT_HYPER = columns(ProductJob._fields, "out hyper")
_FACTOR_COLUMNS = tl.constexpr(len(FactorJob._fields))
_FACTOR_X, _FACTOR_X_ROW, _FACTOR_Y, _FACTOR_Y_ROW = columns(FactorJob._fields, "x x_row y y_row")
_FACTOR_ROWS, _FACTOR_N, _FACTOR_GRAM, _FACTOR_SPLITS = columns(FactorJob._fields, "rows n gram splits")
_FACTOR_L, _FACTOR_REFLECTORS = columns(FactorJob._fields, "L reflectors")
_UPPER_COLUMNS = tl.constexpr(len(UpperJob._fields))
_UPPER_K, _UPPER_N, _UPPER_SPLITS, _UPPER_PARTS, _UPPER_OUT = columns(UpperJob._fields, "k n splits parts out")
_HYPER_COLUMNS = tl.constexpr(len(HYPER))  # one row of them per role
_MOMENTUM, _DAMPENING, _NESTEROV, _MAXIMIZE, _FRESH = columns(HYPER, "momentum dampening nesterov maximize fresh")


@triton.jit
def momentum(hyper_ptr, row):
    """Return (sign, keep, gain, ahead, follow) of SGD with momentum, from a row of hyper.

    With g = sign G + decay X the new buffer is keep B + gain g, the direction ahead g + follow (new buffer).
    """
    h = hyper_ptr + row * _HYPER_COLUMNS
    mu = tl.load(h + _MOMENTUM)
    reads = (mu != 0) & (tl.load(h + _FRESH) == 0)
    keep = tl.where(reads, mu, 0.0)
    gain = tl.where(reads, 1 - tl.load(h + _DAMPENING), 1.0)
    sign = tl.where(tl.load(h + _MAXIMIZE) != 0, -1.0, 1.0).to(tl.float64)
    looks_ahead = (mu != 0) & (tl.load(h + _NESTEROV) != 0)
    ahead = tl.where(looks_ahead, 1.0, 0.0).to(tl.float64)
    follow = tl.where(looks_ahead, mu, 1.0)
    return sign, keep, gain, ahead, follow


@triton.jit
def load_wide(ptrs, mask):
    return tl.load(ptrs, mask=mask, other=0.0).to(tl.float64)


@triton.jit
def products(
    pointer_table_ptr, jobs_ptr, work_ptr, hyper_ptr, A_ptr, B_ptr, out_ptr,
    TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add up tile (i, j) of Aᵀ (alpha B + beta H) over one split. work: job, i, j, split; out: [splits, p, q]."""
    work = work_ptr + tl.program_id(0).to(tl.int64) * 4
    i, j, split = tl.load(work + 1), tl.load(work + 2), tl.load(work + 3).to(tl.int64)
    job = jobs_ptr + tl.load(work).to(tl.int64) * _PRODUCT_COLUMNS
    a_row, a_col = tl.load(job + _PRODUCT_A_ROW), tl.load(job + _PRODUCT_A_COL)
    b_row, b_col = tl.load(job + _PRODUCT_B_ROW), tl.load(job + _PRODUCT_B_COL)
    rows, per_split = tl.load(job + _PRODUCT_ROWS), tl.load(job + _PRODUCT_PER_SPLIT)
    p, q, hyper_row = tl.load(job + _PRODUCT_P), tl.load(job + _PRODUCT_Q), tl.load(job + _PRODUCT_HYPER)
    alpha, beta = tl.full([], 1, tl.float64), tl.full([], 0, tl.float64)
    if hyper_row >= 0:
        sign, keep, gain, ahead, follow = momentum(hyper_ptr, hyper_row)
        alpha, beta = (ahead + follow * gain) * sign, follow * keep
    h_width = tl.where(beta != 0, q, 0)  # without momentum there may be no H

    begin = split * per_split
    end = tl.minimum(begin + per_split, rows)
    k = tl.arange(0, BLOCK)
    left, right = i * TILE + tl.arange(0, TILE), j * TILE + tl.arange(0, TILE)
    a_offsets = (begin + k)[:, None] * a_row + left[None, :] * a_col
    b_offsets = (begin + k)[:, None] * b_row + right[None, :] * b_col
    a_ptrs = A_ptr + tl.load(pointer_table_ptr + tl.load(job + _PRODUCT_A)) + a_offsets
    b_ptrs = B_ptr + tl.load(pointer_table_ptr + tl.load(job + _PRODUCT_B)) + b_offsets
    h_ptrs = B_ptr + tl.load(pointer_table_ptr + tl.load(job + _PRODUCT_H)) + b_offsets
    total = tl.zeros([TILE, TILE], tl.float64)
    for start in range(begin, end, BLOCK):
        inside = k[:, None] < end - start
        a = load_wide(a_ptrs, inside & (left[None, :] < p))
        b = alpha * load_wide(b_ptrs, inside & (right[None, :] < q))
        b += beta * load_wide(h_ptrs, inside & (right[None, :] < h_width))
        total = tl.dot(tl.trans(a), b, total, input_precision="ieee", out_dtype=tl.float64)
        a_ptrs += a_row * BLOCK
        b_ptrs += b_row * BLOCK
        h_ptrs += b_row * BLOCK
    out = out_ptr + tl.load(job + _PRODUCT_OUT) + (split * p + left)[:, None] * q + right[None, :]
    tl.store(out, total, mask=(left[:, None] < p) & (right[None, :] < q))


@triton.jit
def load_parts(gram_ptr, splits, n, left, right):
    """Return the tile [left, right] of an [n, n] matrix, summed over its splits."""
    offsets = left[:, None] * n + right[None, :]
    mask = (left[:, None] < n) & (right[None, :] < n)
    total = load_wide(gram_ptr + offsets, mask)
    for split in range(1, splits):
        total += load_wide(gram_ptr + split * n * n + offsets, mask)
    return total


@triton.jit
def _factor_panel(G, floor, n, PANEL: tl.constexpr):
    """Return L⁻¹ of the first n rows of G = L Lᵀ, and whether all pivots exceed the floor."""
    index = tl.arange(0, PANEL)
    rows, cols = index[:, None], index[None, :]
    inverse = tl.zeros([PANEL, PANEL], tl.float64)
    ok = 1
    for k in range(n):
        down = tl.sum(tl.where(cols == k, G, 0.0), 1)
        across = tl.sum(tl.where(rows == k, G, 0.0), 0)  # the same numbers in the layout of a row
        pivot = tl.sum(tl.where(index == k, across, 0.0), 0)
        least = tl.sum(tl.where(index == k, floor, 0.0), 0)
        sound = (pivot > least) & (pivot < float("inf"))
        ok = tl.where(sound, ok, 0)
        scale = 1 / tl.sqrt(tl.where(sound, pivot, 1.0))
        below = tl.where(index > k, down * scale, 0.0)[:, None]
        row = (tl.sum(tl.where(rows == k, inverse, 0.0), 0) + tl.where(index == k, 1.0, 0.0)) * scale
        inverse = tl.where(rows == k, row[None, :], inverse - below * row[None, :])
        G -= below * tl.where(index > k, across * scale, 0.0)[None, :]
    return inverse, ok


@triton.jit
def factorize(gram_ptr, splits, n, shift, least, L_ptr, PANEL: tl.constexpr):
    """Factor G + shift I = L Lᵀ into L [n, n], which holds the inverses of its diagonal blocks in their place.

    Return whether every pivot exceeds `least` times its diagonal entry (false with NaN), and ‖G - I‖_F². least must be
    at least eps64 n, which rounding leaves of a zero pivot.
    """
    index = tl.arange(0, PANEL)
    eye = (index[:, None] == index[None, :]).to(tl.float64)
    ok = 1
    distance2 = tl.zeros([], tl.float64)
    for begin in range(0, n, PANEL):
        right = begin + index
        for first in range(begin, n, PANEL):
            left = first + index
            panel = load_parts(gram_ptr, splits, n, left, right)
            diagonal = first == begin
            beyond = (left[:, None] >= n) & (left[:, None] == right[None, :])  # a unit matrix beyond n
            panel = tl.where(beyond, 1.0, panel)
            off = panel - tl.where(diagonal, eye, 0.0)
            distance2 += tl.sum(off * off) * tl.where(diagonal, 1.0, 2.0)
            panel += tl.where(diagonal & (left[:, None] < n), shift * eye, 0.0)
            floor = tl.sum(panel * eye, 0) * least
            for done in range(0, begin, PANEL):
                to_left = load_wide(L_ptr + left[:, None] * n + done + index[None, :], left[:, None] < n)
                to_top = load_wide(L_ptr + right[None, :] * n + done + index[:, None], right[None, :] < n)
                panel = tl.dot(-to_left, to_top, panel, input_precision="ieee", out_dtype=tl.float64)
            if diagonal:
                panel, sound = _factor_panel(panel, floor, tl.minimum(n - begin, PANEL), PANEL)
                ok = tl.minimum(ok, sound)
            else:
                inverse_t = load_wide(L_ptr + right[None, :] * n + begin + index[:, None], right[None, :] < n)
                panel = tl.dot(panel, inverse_t, input_precision="ieee", out_dtype=tl.float64)
            tl.store(L_ptr + left[:, None] * n + right[None, :], panel, mask=(left[:, None] < n) & (right[None, :] < n))
            if diagonal:
                tl.debug_barrier()  # the panels below read its inverse
        tl.debug_barrier()
    return ok, distance2


@triton.jit
def substitute(X_ptr, x_row, Y_ptr, y_row, rows, n_rows, L_ptr, n, PANEL: tl.constexpr):
    """Compute Y = X L⁻ᵀ for some rows, L [n, n] as `factorize` stores it; Y may be X."""
    index = tl.arange(0, PANEL)
    inside = rows[:, None] < n_rows
    for begin in range(0, n, PANEL):
        cols = begin + index
        mask = inside & (cols[None, :] < n)
        y = load_wide(X_ptr + rows[:, None] * x_row + cols[None, :], mask)
        for done in range(0, begin, PANEL):
            before = load_wide(Y_ptr + rows[:, None] * y_row + done + index[None, :], inside)
            L_t = load_wide(L_ptr + cols[None, :] * n + done + index[:, None], cols[None, :] < n)
            y = tl.dot(-before, L_t, y, input_precision="ieee", out_dtype=tl.float64)
        both = (cols[:, None] < n) & (cols[None, :] < n)
        inverse_t = load_wide(L_ptr + cols[None, :] * n + cols[:, None], both)
        y = tl.dot(y, inverse_t, input_precision="ieee", out_dtype=tl.float64)
        tl.debug_barrier()  # all threads have read these rows
        tl.store(Y_ptr + rows[:, None] * y_row + cols[None, :], y.to(Y_ptr.dtype.element_ty), mask=mask)
        tl.debug_barrier()


@triton.jit
def cholesky(jobs_ptr, gram_ptr, L_ptr, state_ptr, limit, FIRST: tl.constexpr, PANEL: tl.constexpr):
    """Compute L for the Gram matrix of one job, and its state: OK, or RESCUE where Cholesky-QR fails.

    The second Gram matrix is that of the result of the first pass: if it differs from I by more than the limit, the
    first pass has failed.
    """
    index = tl.program_id(0).to(tl.int64)
    job = jobs_ptr + index * _FACTOR_COLUMNS
    n, splits = tl.load(job + _FACTOR_N).to(tl.int32), tl.load(job + _FACTOR_SPLITS).to(tl.int32)
    gram, L = gram_ptr + tl.load(job + _FACTOR_GRAM), L_ptr + tl.load(job + _FACTOR_L)
    before = OK if FIRST else tl.load(state_ptr + index)  # read here: barriers come before the store
    ok, distance2 = factorize(gram, splits, n, 0.0, n * EPSILON, L, PANEL)
    if not FIRST:
        ok = tl.where((before == OK) & (distance2 <= limit * limit), ok, 0)
    tl.store(state_ptr + index, tl.where(ok != 0, OK, RESCUE))


@triton.jit
def solve(
    pointer_table_ptr, jobs_ptr, work_ptr, X_ptr, Y_ptr, L_ptr, state_ptr,
    IN_PLACE: tl.constexpr, ROWS: tl.constexpr, PANEL: tl.constexpr,
):  # fmt: skip
    """Compute Y = X L⁻ᵀ, or Y = Y L⁻ᵀ, for ROWS rows of one job. work: job, block of rows."""
    work = work_ptr + tl.program_id(0).to(tl.int64) * 2
    index = tl.load(work).to(tl.int64)
    job = jobs_ptr + index * _FACTOR_COLUMNS
    if tl.load(state_ptr + index) == OK:
        rows = tl.load(work + 1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        n_rows, n = tl.load(job + _FACTOR_ROWS), tl.load(job + _FACTOR_N).to(tl.int32)
        y_row = tl.load(job + _FACTOR_Y_ROW)
        Y = Y_ptr + tl.load(pointer_table_ptr + tl.load(job + _FACTOR_Y))
        L = L_ptr + tl.load(job + _FACTOR_L)
        if IN_PLACE:
            substitute(Y, y_row, Y, y_row, rows, n_rows, L, n, PANEL)
        else:
            X = X_ptr + tl.load(pointer_table_ptr + tl.load(job + _FACTOR_X))
            substitute(X, tl.load(job + _FACTOR_X_ROW), Y, y_row, rows, n_rows, L, n, PANEL)


@triton.jit
def _reflect(beta, v_ptr, v_row, Y_ptr, y_row, first, n_rows, begin, end, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Set Y <- (I - beta v vᵀ) Y for columns begin to end, v = (1, tail) with its 1 in row `first`."""
    row, col = tl.arange(0, ROWS), tl.arange(0, COLS)
    for start in range(begin, end, COLS):
        cols = start + col
        dots = tl.zeros([COLS], tl.float64)
        for top in range(first, n_rows, ROWS):
            rows = top + row
            v = tl.where(rows == first, 1.0, load_wide(v_ptr + rows * v_row, (rows > first) & (rows < n_rows)))
            mask = (rows[:, None] < n_rows) & (cols[None, :] < end)
            y = load_wide(Y_ptr + rows[:, None] * y_row + cols[None, :], mask)
            dots += tl.sum(v[:, None] * y, 0)
        tl.debug_barrier()
        for top in range(first, n_rows, ROWS):
            rows = top + row
            v = tl.where(rows == first, 1.0, load_wide(v_ptr + rows * v_row, (rows > first) & (rows < n_rows)))
            mask = (rows[:, None] < n_rows) & (cols[None, :] < end)
            y_ptrs = Y_ptr + rows[:, None] * y_row + cols[None, :]
            y = load_wide(y_ptrs, mask) - beta * v[:, None] * dots[None, :]
            tl.store(y_ptrs, y.to(Y_ptr.dtype.element_ty), mask=mask)
    tl.debug_barrier()


@triton.jit
def largest_magnitude(X_ptr, x_row, n_rows, n, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return max |X|, Inf if an entry is not finite."""
    row, col = tl.arange(0, ROWS), tl.arange(0, COLS)
    largest = tl.zeros([], tl.float64)
    for top in range(0, n_rows, ROWS):
        for start in range(0, n, COLS):
            rows, cols = top + row[:, None], start + col[None, :]
            x = tl.abs(load_wide(X_ptr + rows * x_row + cols, (rows < n_rows) & (cols < n)))
            x = tl.where(x < float("inf"), x, float("inf"))  # NaN too
            largest = tl.maximum(largest, tl.max(tl.max(x, 1), 0))
    return largest


@triton.jit
def _tail_square(W_ptr, w_row, lift, j, n_rows, ROWS: tl.constexpr):
    """Return the square of column j of lift W below the diagonal."""
    square = tl.zeros([], tl.float64)
    for top in range(j + 1, n_rows, ROWS):
        rows = top + tl.arange(0, ROWS)
        x = lift * load_wide(W_ptr + rows * w_row + j, rows < n_rows)
        square += tl.sum(x * x, 0)
    return square


@triton.jit
def householder_qr(
    X_ptr, x_row, scale, W_ptr, w_row, beta_ptr, Q_ptr, q_row, n_rows, n, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """Compute Q [n_rows, n] of scale X with diag(R) >= 0, orthonormal at every rank, by one program.

    The reflectors go below the diagonal of W, which may be X, and to beta [n] float64.
    """
    row, col = tl.arange(0, ROWS), tl.arange(0, COLS)
    dtype = W_ptr.dtype.element_ty
    for top in range(0, n_rows, ROWS):
        for start in range(0, n, COLS):
            rows, cols = top + row[:, None], start + col[None, :]
            mask = (rows < n_rows) & (cols < n)
            x = scale * load_wide(X_ptr + rows * x_row + cols, mask)
            tl.store(W_ptr + rows * w_row + cols, x.to(dtype), mask=mask)
    tl.debug_barrier()
    for j in range(n):
        tail2 = _tail_square(W_ptr, w_row, 1.0, j, n_rows, ROWS)
        head = tl.load(W_ptr + j * w_row + j).to(tl.float64)
        # what rounding leaves of a dependent column may be so short that its square has few digits or none
        lift = tl.where(head * head + tail2 < 2.0**-900, 2.0**600, 1.0)
        if lift > 1:
            tail2 = _tail_square(W_ptr, w_row, lift, j, n_rows, ROWS)
            head = lift * head
        norm = tl.sqrt(head * head + tail2)
        alpha = tl.where(tail2 == 0, head, tl.where(head > 0, -norm, norm))
        lead = tl.where(tail2 == 0, 1.0, head - alpha)
        beta = tl.where(tail2 == 0, 0.0, -lead / tl.where(tail2 == 0, 1.0, alpha))
        tl.debug_barrier()
        for top in range(j + 1, n_rows, ROWS):
            x_ptrs, mask = W_ptr + (top + row) * w_row + j, top + row < n_rows
            x = lift * load_wide(x_ptrs, mask)
            tl.debug_barrier()  # threads that hold the same row have read it
            tl.store(x_ptrs, (x / lead).to(dtype), mask=mask)
        tl.store(W_ptr + j * w_row + j, (alpha / lift).to(dtype))
        tl.store(beta_ptr + j, beta)
        tl.debug_barrier()
        _reflect(beta, W_ptr + j, w_row, W_ptr, w_row, j, n_rows, j + 1, n, ROWS, COLS)
    for top in range(0, n_rows, ROWS):
        for start in range(0, n, COLS):
            rows, cols = top + row[:, None], start + col[None, :]
            alpha = tl.load(W_ptr + cols * w_row + cols, mask=cols < n, other=0.0)
            q = tl.where(rows == cols, tl.where(alpha < 0, -1.0, 1.0), 0.0)
            tl.store(Q_ptr + rows * q_row + cols, q.to(Q_ptr.dtype.element_ty), mask=(rows < n_rows) & (cols < n))
    tl.debug_barrier()
    for back in range(n):
        j = n - 1 - back
        _reflect(tl.load(beta_ptr + j), W_ptr + j, w_row, Q_ptr, q_row, j, n_rows, j, n, ROWS, COLS)


@triton.jit
def power_of_two(largest):
    """Return a power of two near 1 / largest, so that products with it are exact."""
    exponent = (largest.to(tl.int64, bitcast=True) >> 52) & 0x7FF
    return ((2045 - tl.minimum(exponent, 2044)) << 52).to(tl.float64, bitcast=True)


@triton.jit
def rescue(
    pointer_table_ptr, jobs_ptr, X_ptr, Y_ptr, reflectors_ptr, beta_ptr, state_ptr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Compute Q by Householder QR for the jobs in state RESCUE; set them to OK, or to NOT_FINITE with Q = NaN."""
    index = tl.program_id(0).to(tl.int64)
    job = jobs_ptr + index * _FACTOR_COLUMNS
    if tl.load(state_ptr + index) == RESCUE:
        X = X_ptr + tl.load(pointer_table_ptr + tl.load(job + _FACTOR_X))
        Y = Y_ptr + tl.load(pointer_table_ptr + tl.load(job + _FACTOR_Y))
        x_row, y_row = tl.load(job + _FACTOR_X_ROW), tl.load(job + _FACTOR_Y_ROW)
        n_rows, n = tl.load(job + _FACTOR_ROWS), tl.load(job + _FACTOR_N)
        W, beta = reflectors_ptr + tl.load(job + _FACTOR_REFLECTORS), beta_ptr + tl.load(job + _FACTOR_L)
        largest = largest_magnitude(X, x_row, n_rows, n, ROWS, COLS)
        if largest < float("inf"):
            scale = power_of_two(largest)
            householder_qr(X, x_row, scale, W, n, beta, Y, y_row, n_rows, n, ROWS, COLS)
        else:
            row, col = tl.arange(0, ROWS), tl.arange(0, COLS)
            nan = tl.full([ROWS, COLS], float("nan"), Y_ptr.dtype.element_ty)
            for top in range(0, n_rows, ROWS):
                for start in range(0, n, COLS):
                    rows, cols = top + row[:, None], start + col[None, :]
                    tl.store(Y + rows * y_row + cols, nan, mask=(rows < n_rows) & (cols < n))
        tl.store(state_ptr + index, tl.where(largest < float("inf"), OK, NOT_FINITE))


@triton.jit
def upper_factor(jobs_ptr, work_ptr, parts_ptr, state_ptr, R_ptr, TILE: tl.constexpr):
    """Set R = the upper half of QᵀA, summed over its splits, with a diagonal >= 0; NaN where A is not finite.

    work: job, i, j. parts: the output of `products`.
    """
    work = work_ptr + tl.program_id(0).to(tl.int64) * 3
    index = tl.load(work).to(tl.int64)
    job = jobs_ptr + index * _UPPER_COLUMNS
    k, n = tl.load(job + _UPPER_K), tl.load(job + _UPPER_N)
    splits = tl.load(job + _UPPER_SPLITS).to(tl.int32)
    rows = (tl.load(work + 1) * TILE + tl.arange(0, TILE))[:, None]
    cols = (tl.load(work + 2) * TILE + tl.arange(0, TILE))[None, :]
    inside = (rows < k) & (cols < n)
    upper = inside & (rows <= cols)
    offsets = rows * n + cols
    parts = parts_ptr + tl.load(job + _UPPER_PARTS)
    total = load_wide(parts + offsets, upper)
    for split in range(1, splits):
        total += load_wide(parts + split * k * n + offsets, upper)
    total = tl.where((rows == cols) & (total < 0), 0.0, total)
    total = tl.where(tl.load(state_ptr + index) == NOT_FINITE, float("nan"), total)
    tl.store(R_ptr + tl.load(job + _UPPER_OUT) + offsets, total.to(R_ptr.dtype.element_ty), mask=inside)


# ------------------------------------------------------------------------------------------ configurations


PANEL = 32  # columns that the triangular kernels take at a time; 16 spill a register on some architectures


def width(n: int) -> int:
    """Return the width of a tile of `products` for up to n columns."""
    return 32 if n <= 96 else 64


def product_options(tile: int) -> dict:
    return dict(TILE=tile, BLOCK=16, num_warps={32: 4, 64: 8}[tile], num_stages=2)


def factor_options() -> dict:
    return dict(PANEL=PANEL, num_warps=4, num_stages=1)


def solve_options() -> dict:
    return dict(PANEL=PANEL, ROWS=32, num_warps=4, num_stages=1)


def upper_options() -> dict:
    return dict(TILE=32, num_warps=4, num_stages=1)


def rescue_options() -> dict:
    return dict(ROWS=64, COLS=32, num_warps=8, num_stages=1)


def variants(architecture: str):
    """Yield what to compile ahead of time: (kernel, signature types, constexprs, options, is a default)."""
    tables = {name: "*i64" for name in ("pointer_table_ptr", "jobs_ptr")} | {"work_ptr": "*i32", "state_ptr": "*i32"}
    wide = dict.fromkeys(("gram_ptr", "L_ptr", "beta_ptr", "hyper_ptr", "parts_ptr"), "*fp64") | {"limit": "fp32"}
    for dtype in ("fp32", "fp64"):
        stored = dict.fromkeys(("A_ptr", "B_ptr", "X_ptr", "Y_ptr", "R_ptr", "reflectors_ptr"), f"*{dtype}")
        types = tables | wide | stored | {"out_ptr": "*fp64"}
        for tile in (32, 64):
            yield variant(products, types, product_options(tile))
        for first in (True, False):
            yield variant(cholesky, types, dict(FIRST=first) | factor_options())
            yield variant(solve, types, dict(IN_PLACE=not first) | solve_options())
        yield variant(rescue, types, rescue_options())
        yield variant(upper_factor, types, upper_options())
