"""Kernels of Cholesky-QR for many matrices of different shapes at once, with Householder's for those it cannot do.

`pointer_table` holds how many elements from a base pointer each matrix starts, a row of `jobs` its sizes and which
entries of the table it uses, a row of `work` the job and the part of it that one program does. Whatever
the matrices are stored in, sums, triangular factors and substitutions are float64: one pass then gives what
Householder gives up to a condition number of about 1e4, and two up to 1e7, and on the GPUs made for computing float64
products are no slower than float32 ones that do not round to TF32.
"""

import triton
import triton.language as tl

from ....reference import HYPER
from ..runtime.launching import variant

# outcomes of a factorization, the codes of `info` first
OK, NOT_CONVERGED, NOT_FINITE, ALL_ZERO, RESCUE = map(tl.constexpr, range(5))

EPSILON = tl.constexpr(2.0**-52)

# columns of the jobs of `products`: Aᵀ (alpha B + beta H), A [rows, p], B and H [rows, q]
PRODUCT = ("a", "a_row", "a_col", "b", "b_row", "b_col", "h", "rows", "p", "q", "per_split", "out", "hyper")
# columns of the jobs of the factorization of X [rows, n] into Y [rows, n] and L [n, n]
FACTOR = ("x", "x_row", "y", "y_row", "rows", "n", "gram", "splits", "L", "reflectors")

_PRODUCT_COLUMNS = tl.constexpr(len(PRODUCT))
_FACTOR_COLUMNS = tl.constexpr(len(FACTOR))
_HYPER_COLUMNS = tl.constexpr(len(HYPER))  # one row of them per role


@triton.jit
def momentum(hyper_ptr, row):
    """SGD's new buffer is keep B + gain g, its direction ahead g + follow (new buffer); g = sign G + decay X."""
    h = hyper_ptr + row * _HYPER_COLUMNS
    mu = tl.load(h + 1)
    reads = (mu != 0) & (tl.load(h + 6) == 0)
    keep = tl.where(reads, mu, 0.0)
    gain = tl.where(reads, 1 - tl.load(h + 2), 1.0)
    sign = tl.where(tl.load(h + 5) != 0, -1.0, 1.0).to(tl.float64)
    looks_ahead = (mu != 0) & (tl.load(h + 4) != 0)
    ahead = tl.where(looks_ahead, 1.0, 0.0).to(tl.float64)
    follow = tl.where(looks_ahead, mu, 1.0)
    return sign, keep, gain, ahead, follow


@triton.jit
def load_wide(ptrs, mask):
    return tl.load(ptrs, mask=mask, other=0.0).to(tl.float64)


@triton.jit
def products(
    places_ptr, jobs_ptr, work_ptr, hyper_ptr, A_ptr, B_ptr, out_ptr,
    TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Tile (i, j) of Aᵀ (alpha B + beta H), over the rows of one split; alpha, beta as hyper says, else 1 and 0.

    work: job, i, j, split. out: splits of [p, q] each.
    """
    work = work_ptr + tl.program_id(0).to(tl.int64) * 4
    i, j, split = tl.load(work + 1), tl.load(work + 2), tl.load(work + 3).to(tl.int64)
    job = jobs_ptr + tl.load(work).to(tl.int64) * _PRODUCT_COLUMNS
    a_row, a_col = tl.load(job + 1), tl.load(job + 2)
    b_row, b_col = tl.load(job + 4), tl.load(job + 5)
    rows, p, q, per_split = tl.load(job + 7), tl.load(job + 8), tl.load(job + 9), tl.load(job + 10)
    hyper_row = tl.load(job + 12)
    alpha, beta = tl.full([], 1, tl.float64), tl.full([], 0, tl.float64)
    if hyper_row >= 0:
        sign, keep, gain, ahead, follow = momentum(hyper_ptr, hyper_row)
        alpha, beta = (ahead + follow * gain) * sign, follow * keep
    h_width = tl.where(beta != 0, q, 0)  # without momentum there may be no H

    begin = split * per_split
    end = tl.minimum(begin + per_split, rows)
    k = tl.arange(0, BLOCK)
    left, right = i * TILE + tl.arange(0, TILE), j * TILE + tl.arange(0, TILE)
    a_ptrs = A_ptr + tl.load(places_ptr + tl.load(job)) + (begin + k)[:, None] * a_row + left[None, :] * a_col
    b_offsets = (begin + k)[:, None] * b_row + right[None, :] * b_col
    b_ptrs = B_ptr + tl.load(places_ptr + tl.load(job + 3)) + b_offsets
    h_ptrs = B_ptr + tl.load(places_ptr + tl.load(job + 6)) + b_offsets
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
    out = out_ptr + tl.load(job + 11) + (split * p + left)[:, None] * q + right[None, :]
    tl.store(out, total, mask=(left[:, None] < p) & (right[None, :] < q))


@triton.jit
def load_parts(gram_ptr, splits, n, left, right):
    """[left, right] of the sum of the splits of an [n, n] matrix."""
    offsets = left[:, None] * n + right[None, :]
    mask = (left[:, None] < n) & (right[None, :] < n)
    total = load_wide(gram_ptr + offsets, mask)
    for split in range(1, splits):
        total += load_wide(gram_ptr + split * n * n + offsets, mask)
    return total


@triton.jit
def _factor_panel(G, floor, n, PANEL: tl.constexpr):
    """L⁻¹ for G = L Lᵀ, the first n rows of it, and whether all pivots are above the floor."""
    index = tl.arange(0, PANEL)
    rows, cols = index[:, None], index[None, :]
    inverse = tl.zeros([PANEL, PANEL], tl.float64)
    ok = 1
    for k in range(n):
        down = tl.sum(tl.where(cols == k, G, 0.0), 1)
        across = tl.sum(tl.where(rows == k, G, 0.0), 0)  # the same numbers, laid out along the columns
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
    """L of G + shift I = L Lᵀ in L [n, n], the inverses of its diagonal blocks in their place.

    least: what part of its diagonal entry every pivot must exceed, above eps64 n, which is what rounding leaves.
    Returns whether they all do (not so with NaN) and ‖G - I‖_F².
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
    """Y = X L⁻ᵀ for some rows, L [n, n] as from `factorize`; Y may be X."""
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
        tl.debug_barrier()  # all threads have read what is now replaced
        tl.store(Y_ptr + rows[:, None] * y_row + cols[None, :], y.to(Y_ptr.dtype.element_ty), mask=mask)
        tl.debug_barrier()


@triton.jit
def cholesky(jobs_ptr, gram_ptr, L_ptr, state_ptr, limit, FIRST: tl.constexpr, PANEL: tl.constexpr):
    """L for the Gram matrix of one job; state: OK, or RESCUE where Cholesky-QR is no use.

    The second Gram matrix is that of what the first pass has made: if it is off I by more than the limit, that was
    of no use either.
    """
    index = tl.program_id(0).to(tl.int64)
    job = jobs_ptr + index * _FACTOR_COLUMNS
    n, splits = tl.load(job + 5).to(tl.int32), tl.load(job + 7).to(tl.int32)
    ok, distance2 = factorize(gram_ptr + tl.load(job + 6), splits, n, 0.0, n * EPSILON, L_ptr + tl.load(job + 8), PANEL)
    if not FIRST:
        ok = tl.where((tl.load(state_ptr + index) == OK) & (distance2 <= limit * limit), ok, 0)
    tl.store(state_ptr + index, tl.where(ok != 0, OK, RESCUE))


@triton.jit
def solve(
    places_ptr, jobs_ptr, work_ptr, X_ptr, Y_ptr, L_ptr, state_ptr,
    IN_PLACE: tl.constexpr, ROWS: tl.constexpr, PANEL: tl.constexpr,
):  # fmt: skip
    """Y = X L⁻ᵀ, or Y = Y L⁻ᵀ, for ROWS rows of one job. work: job, block of rows."""
    work = work_ptr + tl.program_id(0).to(tl.int64) * 2
    index = tl.load(work).to(tl.int64)
    job = jobs_ptr + index * _FACTOR_COLUMNS
    if tl.load(state_ptr + index) == OK:
        rows = tl.load(work + 1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        n_rows, n = tl.load(job + 4), tl.load(job + 5).to(tl.int32)
        y_row = tl.load(job + 3)
        Y = Y_ptr + tl.load(places_ptr + tl.load(job + 2))
        L = L_ptr + tl.load(job + 8)
        if IN_PLACE:
            substitute(Y, y_row, Y, y_row, rows, n_rows, L, n, PANEL)
        else:
            X = X_ptr + tl.load(places_ptr + tl.load(job))
            substitute(X, tl.load(job + 1), Y, y_row, rows, n_rows, L, n, PANEL)


@triton.jit
def _reflect(beta, v_ptr, v_row, Y_ptr, y_row, first, n_rows, begin, end, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Columns begin to end of Y become (I - beta v vᵀ) Y, v = (1, tail) with its 1 in row `first`."""
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
    """max |X|, Inf if an entry is not finite."""
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
def householder_qr(
    X_ptr, x_row, scale, W_ptr, w_row, beta_ptr, Q_ptr, q_row, n_rows, n, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """Q [n_rows, n] of scale X with diag(R) >= 0, orthonormal whatever the rank, by one program.

    W, which may be X, takes the reflectors below the diagonal; beta [n] float64.
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
        tail2 = tl.zeros([], tl.float64)
        for top in range(j + 1, n_rows, ROWS):
            x = load_wide(W_ptr + (top + row) * w_row + j, top + row < n_rows)
            tail2 += tl.sum(x * x, 0)
        head = tl.load(W_ptr + j * w_row + j).to(tl.float64)
        norm = tl.sqrt(head * head + tail2)
        alpha = tl.where(tail2 == 0, head, tl.where(head > 0, -norm, norm))
        lead = tl.where(tail2 == 0, 1.0, head - alpha)
        beta = tl.where(tail2 == 0, 0.0, -lead / tl.where(tail2 == 0, 1.0, alpha))
        tl.debug_barrier()
        for top in range(j + 1, n_rows, ROWS):
            x_ptrs, mask = W_ptr + (top + row) * w_row + j, top + row < n_rows
            tl.store(x_ptrs, (load_wide(x_ptrs, mask) / lead).to(dtype), mask=mask)
        tl.store(W_ptr + j * w_row + j, alpha.to(dtype))
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
    """About 1 / largest, so that a product with it is exact."""
    exponent = (largest.to(tl.int64, bitcast=True) >> 52) & 0x7FF
    return ((2045 - tl.minimum(exponent, 2044)) << 52).to(tl.float64, bitcast=True)


@triton.jit
def rescue(
    places_ptr, jobs_ptr, X_ptr, Y_ptr, reflectors_ptr, beta_ptr, state_ptr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Householder's Q for the jobs that Cholesky-QR cannot do: OK then, or NOT_FINITE and NaN."""
    index = tl.program_id(0).to(tl.int64)
    job = jobs_ptr + index * _FACTOR_COLUMNS
    if tl.load(state_ptr + index) == RESCUE:
        X, x_row = X_ptr + tl.load(places_ptr + tl.load(job)), tl.load(job + 1)
        Y, y_row = Y_ptr + tl.load(places_ptr + tl.load(job + 2)), tl.load(job + 3)
        n_rows, n = tl.load(job + 4), tl.load(job + 5)
        W = reflectors_ptr + tl.load(job + 9)
        largest = largest_magnitude(X, x_row, n_rows, n, ROWS, COLS)
        if largest < float("inf"):
            scale = power_of_two(largest)
            householder_qr(X, x_row, scale, W, n, beta_ptr + tl.load(job + 8), Y, y_row, n_rows, n, ROWS, COLS)
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
    """R = the upper half of QᵀA from its parts, its diagonal not below 0; NaN where A is not finite.

    work: job, i, j. parts: as written by `products`. jobs: k, n, splits, offset of parts, offset of R.
    """
    work = work_ptr + tl.program_id(0).to(tl.int64) * 3
    index = tl.load(work).to(tl.int64)
    job = jobs_ptr + index * 5
    k, n, splits = tl.load(job), tl.load(job + 1), tl.load(job + 2).to(tl.int32)
    rows = (tl.load(work + 1) * TILE + tl.arange(0, TILE))[:, None]
    cols = (tl.load(work + 2) * TILE + tl.arange(0, TILE))[None, :]
    inside = (rows < k) & (cols < n)
    upper = inside & (rows <= cols)
    offsets = rows * n + cols
    parts = parts_ptr + tl.load(job + 3)
    total = load_wide(parts + offsets, upper)
    for split in range(1, splits):
        total += load_wide(parts + split * k * n + offsets, upper)
    total = tl.where((rows == cols) & (total < 0), 0.0, total)
    total = tl.where(tl.load(state_ptr + index) == NOT_FINITE, float("nan"), total)
    tl.store(R_ptr + tl.load(job + 4) + offsets, total.to(R_ptr.dtype.element_ty), mask=inside)


# ------------------------------------------------------------------------------------------ configurations


PANEL = 32  # columns of the triangular kernels at a time; half as many spill a register on some architectures


def width(n: int) -> int:
    """Of a tile of `products`, for n columns at most."""
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
    """What to compile ahead of time: (kernel, signature types, constexprs, options, whether it is a default)."""
    tables = {name: "*i64" for name in ("places_ptr", "jobs_ptr")} | {"work_ptr": "*i32", "state_ptr": "*i32"}
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
