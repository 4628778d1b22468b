"""Kernels of A = U diag(sigma) Vᵀ, m >= n, by one-sided block Jacobi rotations.

The columns of W = A V are rotated until they are orthogonal. A sweep forms the Gram matrix of the columns afresh, finds
on it one rotation for every pair of columns, and applies all of them to W and V by one matrix product each: W and V are
rounded a few times per sweep, not once per rotation, and the Gram matrix carries no old errors. Its entries are
accurate relative to the lengths of the two columns, which keeps small singular values accurate.

Round m = 1, 2, ... pairs the columns i and i xor m: every pair once, R / 2 disjoint pairs at a time. The longer column
of a pair goes to the lower index, so clustered spectra converge in a few sweeps. Up to 64 columns take one program
(`svd`). More columns are split into blocks of 32, and each program of a cooperative group rotates two blocks per round
(`svd_by_blocks`). W is stored in U.
"""

import triton
import triton.language as tl

from ..devices import INTERPRETED
from ..runtime.cooperative import barrier, copy, product, reset, split_program_id, timed_out
from ..runtime.status import NOT_CONVERGED, NOT_FINITE, OK

SWEEPS = 40  # graded spectra need 20, others fewer than ten
SWEEPS_OF_BLOCKS = 20
PAIR = 64  # columns of two blocks, which rotate together


@triton.jit
def _root(x):
    return tl.sqrt_rn(x) if x.dtype == tl.float32 else tl.sqrt(x)


@triton.jit
def _inverse(x):
    one = tl.full(x.shape, 1.0, x.dtype)
    return tl.div_rn(one, x) if x.dtype == tl.float32 else one / x


@triton.jit
def _epsilon(dtype: tl.constexpr):
    return tl.constexpr(2.0**-23 if dtype == tl.float32 else 2.0**-52)


@triton.jit
def _null(dtype: tl.constexpr):
    """Return the squared length below which a column counts as zero; entries are at most about 1."""
    return tl.constexpr(1e-36 if dtype == tl.float32 else 1e-290)


@triton.jit
def _power_of_two(largest):
    """Return a power of two in [largest / 4, largest], if a normal one exists, and its inverse; both are exact."""
    if largest.dtype == tl.float32:
        bits = largest.to(tl.int32, bitcast=True) & 0x7F800000
        bits = tl.minimum(tl.maximum(bits, 1 << 23), 253 << 23)
        return bits.to(tl.float32, bitcast=True), ((254 << 23) - bits).to(tl.float32, bitcast=True)
    else:
        exponent = tl.minimum(tl.maximum((largest.to(tl.int64, bitcast=True) >> 52) & 0x7FF, 1), 2045)
        return (exponent << 52).to(tl.float64, bitcast=True), ((2046 - exponent) << 52).to(tl.float64, bitcast=True)


@triton.jit
def _load(X_ptr, row, rows, ld, cols, inside):
    """Return rows of X, zero outside."""
    at = row[:, None].to(tl.int64) * ld + cols[None, :]
    return tl.load(X_ptr + at, mask=(row < rows)[:, None] & inside[None, :], other=0.0)


@triton.jit
def _store(X_ptr, row, rows, ld, cols, inside, x):
    at = row[:, None].to(tl.int64) * ld + cols[None, :]
    tl.store(X_ptr + at, x, mask=(row < rows)[:, None] & inside[None, :])


@triton.jit
def _gram(X_ptr, rows, ld, cols, inside, BLOCK: tl.constexpr):
    """Return XᵀX for these columns of X [rows, ld]."""
    dtype = X_ptr.dtype.element_ty
    G = tl.zeros([cols.shape[0], cols.shape[0]], dtype)
    if dtype == tl.float64:  # the operands of tl.dot would spill
        for row in range(rows):
            x = tl.load(X_ptr + tl.cast(row, tl.int64) * ld + cols, mask=inside, other=0.0)
            G += x[:, None] * x[None, :]
    else:
        for begin in range(0, rows, BLOCK):
            x = _load(X_ptr, begin + tl.arange(0, BLOCK), rows, ld, cols, inside)
            G = tl.dot(tl.trans(x), x, G, input_precision="ieee", out_dtype=dtype)
    return G


@triton.jit
def _multiply(X_ptr, rows, ld, cols, inside, first, second, J_ptr, BLOCK: tl.constexpr):
    """Set X <- X Jᵀ on columns first + k, k < R / 2, and second + k from there on; J [R, R] contiguous."""
    dtype = X_ptr.dtype.element_ty
    R: tl.constexpr = cols.shape[0]
    CHUNK: tl.constexpr = 16
    i, k = tl.arange(0, R), tl.arange(0, CHUNK)
    for begin in range(0, rows, BLOCK):
        row = begin + tl.arange(0, BLOCK)
        y = tl.zeros([BLOCK, R], dtype)
        for chunk in range(0, R, CHUNK):
            column = chunk + k + tl.where(chunk < R // 2, first, second)
            x = _load(X_ptr, row, rows, ld, column, column < ld)
            j = tl.load(J_ptr + i[None, :] * R + chunk + k[:, None])
            y = tl.dot(x, j, y, input_precision="ieee", out_dtype=dtype)
        tl.debug_barrier()  # all threads have read these rows
        _store(X_ptr, row, rows, ld, cols, inside, y)
        tl.debug_barrier()


@triton.jit
def _largest_cosine(G):
    """Return the largest cosine between columns with this Gram matrix; null columns count as orthogonal."""
    R: tl.constexpr = G.shape[0]
    i = tl.arange(0, R)
    square = tl.sum(tl.where(i[:, None] == i[None, :], G, 0.0), 1)
    some = square >= _null(G.dtype)
    inverse = tl.where(some, 1 / tl.sqrt(tl.where(some, square, 1.0)), 0.0)
    cosine = tl.abs(G) * inverse[:, None] * inverse[None, :]
    return tl.max(tl.max(tl.where(i[:, None] == i[None, :], 0.0, cosine), 1), 0)


@triton.jit
def _rotate(X, partner, swap, s, h, AXIS: tl.constexpr):
    """Rotate each row (AXIS 0) or column x with its partner y: c x - s y, c = 1 - s h; swap them first if `swap`.

    In this form the lengths do not drift over many small rotations.
    """
    partner, swap = tl.expand_dims(partner, 1 - AXIS), tl.expand_dims(swap, 1 - AXIS)
    s, h = tl.expand_dims(s, 1 - AXIS), tl.expand_dims(h, 1 - AXIS)
    Y = tl.gather(X, tl.broadcast_to(partner, X.shape), AXIS)
    x, y = tl.where(swap, Y, X), tl.where(swap, X, Y)
    return x - s * (y + h * x)


@triton.jit
def _rotations(G, count, rounds, passes, tolerance):
    """Return an orthogonal J that brings J G Jᵀ closer to diagonal, by passes over all rounds 0 < m < rounds.

    Columns from `count` on are padding. One column of a pair decides for both, so that rounding of G cannot rotate them
    by different angles.
    """
    R: tl.constexpr = G.shape[0]
    i = tl.arange(0, R)
    diagonal = i[:, None] == i[None, :]
    J = diagonal.to(G.dtype)
    for k in range(passes * (rounds - 1)):
        partner = i ^ (k % (rounds - 1) + 1)
        lower = i < partner
        square = tl.sum(tl.where(diagonal, G, 0.0), 1)
        other = tl.gather(square, partner, 0)
        product = tl.sum(tl.where(i[None, :] == partner[:, None], G, 0.0), 1)
        product = tl.gather(product, tl.minimum(i, partner), 0)
        gap = tl.where(lower, other - square, square - other)
        twice = 2 * product
        some = (square >= _null(G.dtype)) & (other >= _null(G.dtype))
        length = tl.sqrt(tl.where(some, square, 1.0)) * tl.sqrt(tl.where(some, other, 1.0))
        turn = some & (tl.abs(product) > tolerance * length)
        # tan 2a = twice / gap, a at most 45 degrees; h = tan a / 2. As shares of their sum: between short columns the
        # squares of twice and gap would underflow.
        share = tl.where(turn, tl.abs(twice) / tl.where(turn, tl.abs(gap) + tl.abs(twice), 1.0), 0.0)
        rest = 1 - share
        tangent = share / (rest + tl.sqrt(rest * rest + share * share))
        tangent = tl.where((gap < 0) ^ (twice < 0), -tangent, tangent)
        h = tangent / (1 + tl.sqrt(1 + tangent * tangent))
        swap = (gap > 0) & (tl.maximum(i, partner) < count)
        h = tl.where(lower ^ swap, h, -h)
        s = 2 * h / (1 + h * h)
        G = _rotate(_rotate(G, partner, swap, s, h, 0), partner, swap, s, h, 1)
        J = _rotate(J, partner, swap, s, h, 0)
    return J


@triton.jit
def _tolerance(rows, dtype: tl.constexpr):
    """Return the cosine below which columns of this length count as orthogonal, a few rounding errors."""
    return tl.maximum(tl.sqrt(tl.cast(rows, tl.float32)) / 2, 2.0).to(dtype) * _epsilon(dtype)


@triton.jit
def rotate_columns(W_ptr, m, V_ptr, n, first, second, J_ptr, rounds, passes, R: tl.constexpr, BLOCK: tl.constexpr):
    """Rotate columns first + k, k < R / 2, and second + k from there on. Return whether any were not orthogonal."""
    k = tl.arange(0, R)
    cols = k + tl.where(k < R // 2, first, second)
    inside = cols < n
    G = _gram(W_ptr, m, n, cols, inside, BLOCK)
    tolerance = _tolerance(m, W_ptr.dtype.element_ty)
    rotated = _largest_cosine(G) > tolerance
    if rotated:
        J = _rotations(G, tl.sum(inside.to(tl.int32), 0), rounds, passes, tolerance / 4)
        _store(J_ptr, k, R, R, k, k < R, J)
        tl.debug_barrier()
        _multiply(W_ptr, m, n, cols, inside, first, second, J_ptr, BLOCK)
        _multiply(V_ptr, n, n, cols, inside, first, second, J_ptr, BLOCK)
    return rotated


@triton.jit
def start(A_ptr, a_row, a_col, W_ptr, m, V_ptr, n, R: tl.constexpr, BLOCK: tl.constexpr):
    """Set W = A / scale and V = I. Return the scale; if A is not finite, W = 0 and the scale is NaN."""
    dtype = W_ptr.dtype.element_ty
    cols = tl.arange(0, R)
    inside = cols < n
    a_row, a_col = tl.cast(a_row, tl.int64), tl.cast(a_col, tl.int64)
    largest = tl.zeros([BLOCK], dtype)
    strange = tl.zeros([BLOCK], tl.int32)
    for begin in range(0, m, BLOCK):
        row = begin + tl.arange(0, BLOCK)
        a = _load(A_ptr, row, m, a_row, cols * a_col, inside).to(dtype)
        strange += tl.sum((a - a != 0).to(tl.int32), 1)
        largest = tl.maximum(largest, tl.max(tl.abs(a), 1))
    finite = tl.sum(strange, 0) == 0
    up, down = _power_of_two(tl.max(tl.where(finite, largest, 0.0), 0))
    for begin in range(0, m, BLOCK):
        row = begin + tl.arange(0, BLOCK)
        a = tl.where(finite, _load(A_ptr, row, m, a_row, cols * a_col, inside).to(dtype), 0.0)
        _store(W_ptr, row, m, n, cols, inside, a * down)
    for begin in range(0, n, BLOCK):
        row = begin + tl.arange(0, BLOCK)
        _store(V_ptr, row, n, n, cols, inside, (row[:, None] == cols[None, :]).to(dtype))
    tl.debug_barrier()
    return tl.where(finite, up, float("nan"))


@triton.jit
def _complete(U_ptr, m, n, known, R: tl.constexpr, BLOCK: tl.constexpr):
    """Fill columns known..n of U with an orthonormal completion.

    Each is the unit vector farthest from the span of the columns before, orthogonalized against them twice.
    """
    dtype = U_ptr.dtype.element_ty
    cols, i = tl.arange(0, R), tl.arange(0, BLOCK)
    for j in range(known, n):
        before = cols < j
        least = tl.full([BLOCK], 2.0, dtype)
        place = tl.zeros([BLOCK], tl.int32)
        for begin in range(0, m, BLOCK):
            x = _load(U_ptr, begin + i, m, n, cols, before)
            square = tl.where(begin + i < m, tl.sum(x * x, 1), 2.0)
            place = tl.where(square < least, begin + i, place)
            least = tl.minimum(least, square)
        at = tl.min(tl.where(least == tl.min(least, 0), place, m), 0)
        coefficients = tl.load(U_ptr + at.to(tl.int64) * n + cols, mask=before, other=0.0)
        for begin in range(0, m, BLOCK):
            x = _load(U_ptr, begin + i, m, n, cols, before)
            u = (begin + i == at).to(dtype) - tl.sum(x * coefficients[None, :], 1)
            tl.store(U_ptr + (begin + i).to(tl.int64) * n + j, u, mask=begin + i < m)
        tl.debug_barrier()
        coefficients = tl.zeros([R], dtype)
        for begin in range(0, m, BLOCK):
            x = _load(U_ptr, begin + i, m, n, cols, before)
            u = tl.load(U_ptr + (begin + i).to(tl.int64) * n + j, mask=begin + i < m, other=0.0)
            coefficients += tl.sum(x * u[:, None], 0)
        square = tl.zeros([BLOCK], dtype)
        for begin in range(0, m, BLOCK):
            x = _load(U_ptr, begin + i, m, n, cols, before)
            u = tl.load(U_ptr + (begin + i).to(tl.int64) * n + j, mask=begin + i < m, other=0.0)
            u -= tl.sum(x * coefficients[None, :], 1)
            tl.debug_barrier()
            tl.store(U_ptr + (begin + i).to(tl.int64) * n + j, u, mask=begin + i < m)
            square += u * u
        tl.debug_barrier()
        inverse = _inverse(_root(tl.sum(square, 0)))
        for begin in range(0, m, BLOCK):
            u = tl.load(U_ptr + (begin + i).to(tl.int64) * n + j, mask=begin + i < m, other=0.0)
            tl.debug_barrier()
            tl.store(U_ptr + (begin + i).to(tl.int64) * n + j, u * inverse, mask=begin + i < m)
        tl.debug_barrier()


@triton.jit
def _permute(X_ptr, rows, n, factor, rank, shift, R: tl.constexpr, BLOCK: tl.constexpr):
    """Move column k of X, times factor[k], plus shift, to column rank[k]."""
    cols = tl.arange(0, R)
    for begin in range(0, rows, BLOCK):
        row = begin + tl.arange(0, BLOCK)
        x = _load(X_ptr, row, rows, n, cols, cols < n)
        tl.debug_barrier()
        _store(X_ptr, row, rows, n, rank, cols < n, x * factor[None, :] + shift)
    tl.debug_barrier()


@triton.jit
def finish(W_ptr, m, V_ptr, n, sigma_ptr, scale, R: tl.constexpr, BLOCK: tl.constexpr):
    """Compute sigma, descending, from the lengths of the columns of W; sort W and V; scale W to U."""
    dtype = W_ptr.dtype.element_ty
    cols, i = tl.arange(0, R), tl.arange(0, BLOCK)
    square = tl.zeros([R], dtype)
    for begin in range(0, m, BLOCK):
        w = _load(W_ptr, begin + i, m, n, cols, cols < n)
        square += tl.sum(w * w, 0)
    some = square >= _null(dtype)
    sigma = tl.where(some, _root(square), 0.0)
    inverse = tl.where(some, _inverse(tl.where(some, sigma, 1.0)), 0.0)
    tl.store(sigma_ptr + cols, sigma, mask=cols < n)
    tl.debug_barrier()
    rank = tl.zeros([R], tl.int32)
    for begin in range(0, n, BLOCK):
        others = tl.load(sigma_ptr + begin + i, mask=begin + i < n, other=-1.0)[None, :]
        earlier = (others == sigma[:, None]) & ((begin + i)[None, :] < cols[:, None])
        rank += tl.sum(((others > sigma[:, None]) | earlier).to(tl.int32), 1)
    tl.debug_barrier()
    shift = scale - scale  # NaN for an A that was not finite
    tl.store(sigma_ptr + rank, sigma * scale, mask=cols < n)
    _permute(W_ptr, m, n, inverse, rank, 0.0, R, BLOCK)
    known = tl.sum(some.to(tl.int32), 0)
    if known < n:
        _complete(W_ptr, m, n, known, R, BLOCK)
    if shift != 0:
        _permute(W_ptr, m, n, inverse, cols, shift, R, BLOCK)
    _permute(V_ptr, n, n, tl.full([R], 1.0, dtype), rank, shift, R, BLOCK)


@triton.jit
def polish(X_ptr, rows, n, J_ptr, R: tl.constexpr, BLOCK: tl.constexpr):
    """Set X <- X (3 I - XᵀX) / 2: makes nearly orthonormal columns orthonormal to rounding."""
    k = tl.arange(0, R)
    G = _gram(X_ptr, rows, n, k, k < n, BLOCK)
    J = tl.where(k[:, None] == k[None, :], 1.5, 0.0) - 0.5 * G
    _store(J_ptr, k, R, R, k, k < R, J)
    tl.debug_barrier()
    _multiply(X_ptr, rows, n, k, k < n, 0, 0, J_ptr, BLOCK)


@triton.jit
def _is_active(active_mask_ptr, batch, MASKED: tl.constexpr):
    return tl.load(active_mask_ptr + batch) != 0 if MASKED else True


@triton.jit
def _verdict(scale, rotated):
    return tl.where(scale != scale, NOT_FINITE, tl.where(rotated, NOT_CONVERGED, OK))


@triton.jit
def svd(
    A_ptr, U_ptr, sigma_ptr, V_ptr, J_ptr, info_ptr, active_mask_ptr, m, n, rounds, a_batch, a_row, a_col,
    MASKED: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, SWEEPS: tl.constexpr,
):  # fmt: skip
    """Compute U [m, n], sigma [n], V [n, n] of a batch of matrices A with m >= n, n <= R; one program per matrix.

    rounds is n rounded up to a power of two, J [batch, R, R] workspace, R >= 16. MASKED: only those in the active mask.
    """
    batch = tl.program_id(0).to(tl.int64)
    if _is_active(active_mask_ptr, batch, MASKED):
        U_ptr += batch * m * n
        V_ptr += batch * n * n
        J_ptr += batch * R * R
        scale = start(A_ptr + batch * a_batch, a_row, a_col, U_ptr, m, V_ptr, n, R, BLOCK)
        rotated = tl.cast(n, tl.int32) > 1
        sweeps = 0
        while rotated & (sweeps < SWEEPS):
            rotated = rotate_columns(U_ptr, m, V_ptr, n, 0, 0, J_ptr, rounds, 1, R, BLOCK)
            sweeps += 1
        finish(U_ptr, m, V_ptr, n, sigma_ptr + batch * n, scale, R, BLOCK)
        polish(U_ptr, m, n, J_ptr, R, BLOCK)
        polish(V_ptr, n, n, J_ptr, R, BLOCK)
        tl.store(info_ptr + batch, _verdict(scale, rotated))


@triton.jit
def _rotate_blocks(
    W_ptr, m, V_ptr, n, J_ptr, rotated_ptr, blocks, member, group_size, counter_ptr,
    PAIR: tl.constexpr, BLOCK: tl.constexpr, SWEEPS: tl.constexpr,
):  # fmt: skip
    """Rotate pairs of blocks of PAIR / 2 columns until all are orthogonal. Return whether the last sweep rotated any.

    Each pair makes two passes of rotations per Gram matrix, which halves the number of matrix products. rotated
    [SWEEPS] must be zero; J [PAIR, PAIR] is workspace of this member.
    """
    sweep = 0
    rotated = True
    while rotated & (sweep < SWEEPS):
        for across in range(1, blocks):
            # the blocks without the highest bit of `across`, in order
            low = across | (across >> 1)
            low |= low >> 2
            low |= low >> 4
            low = low >> 1
            for pair in range(member, blocks // 2, group_size):
                block = (pair & low) | ((pair & ~low) << 1)
                first, second = block * (PAIR // 2), (block ^ across) * (PAIR // 2)
                if rotate_columns(W_ptr, m, V_ptr, n, first, second - PAIR // 2, J_ptr, PAIR, 2, PAIR, BLOCK):
                    tl.atomic_or(rotated_ptr + sweep, 1)
            barrier(counter_ptr, group_size)
        rotated = tl.load(rotated_ptr + sweep) != 0
        sweep += 1
    return rotated


@triton.jit
def _polish_by_group(
    X_ptr, m, n, T_ptr, other_ptr, member, group_size, counter_ptr, TILE: tl.constexpr, BLOCK: tl.constexpr
):
    dtype = X_ptr.dtype.element_ty
    product(
        X_ptr, X_ptr, X_ptr, T_ptr, n, n, m, 1, -0.5, 0.0, 1.5, member, group_size, counter_ptr,
        True, dtype, TILE, 16,
    )  # fmt: skip
    product(
        X_ptr, T_ptr, X_ptr, other_ptr, m, n, n, 1, 1.0, 0.0, 0.0, member, group_size, counter_ptr,
        False, dtype, TILE, 16,
    )  # fmt: skip
    copy(other_ptr, n, 1, X_ptr, n, 1, m, n, 1.0, member, group_size, counter_ptr, TILE * BLOCK)


@triton.jit
def svd_by_group(
    A_ptr, a_row, a_col, U_ptr, m, sigma_ptr, V_ptr, n, workspace_ptr, rotated_ptr, info_ptr, blocks, member,
    group_size, counter_ptr,
    PAIR: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, SWEEPS: tl.constexpr,
):  # fmt: skip
    """Compute U [m, n], sigma [n], V [n, n] of A with m >= n, 64 < n <= R, and info.

    blocks is 2 n / PAIR rounded up to a power of two, workspace has workspace_size(m, n) elements, rotated SWEEPS.
    """
    scale = tl.full([], 1.0, U_ptr.dtype.element_ty)
    if member == 0:
        scale = start(A_ptr, a_row, a_col, U_ptr, m, V_ptr, n, R, BLOCK)
        for sweep in range(SWEEPS):
            tl.store(rotated_ptr + sweep, 0)
    barrier(counter_ptr, group_size)
    T_ptr, other_ptr = workspace_ptr, workspace_ptr + n * n
    J_ptr = other_ptr + m * n + member * (PAIR * PAIR)
    rotated = _rotate_blocks(
        U_ptr, m, V_ptr, n, J_ptr, rotated_ptr, blocks, member, group_size, counter_ptr, PAIR, BLOCK, SWEEPS
    )
    if member == 0:
        finish(U_ptr, m, V_ptr, n, sigma_ptr, scale, R, BLOCK)
        tl.store(info_ptr, _verdict(scale, rotated | timed_out(counter_ptr)))
    barrier(counter_ptr, group_size)
    _polish_by_group(U_ptr, m, n, T_ptr, other_ptr, member, group_size, counter_ptr, TILE, BLOCK)
    _polish_by_group(V_ptr, n, n, T_ptr, other_ptr, member, group_size, counter_ptr, TILE, BLOCK)


@triton.jit(do_not_specialize=["group_size"])
def svd_by_blocks(
    A_ptr, U_ptr, sigma_ptr, V_ptr, workspace_ptr, rotated_ptr, info_ptr, active_mask_ptr, counter_ptr, failed_ptr,
    m, n, blocks, workspace_size, group_size, a_batch, a_row, a_col,
    MASKED: tl.constexpr, PAIR: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
    SWEEPS: tl.constexpr,
):  # fmt: skip
    """Run `svd_by_group` on a batch of matrices, one group each. MASKED: only those in the active mask."""
    member, batch = split_program_id(group_size)
    if _is_active(active_mask_ptr, batch, MASKED):
        svd_by_group(
            A_ptr + batch * a_batch, a_row, a_col, U_ptr + batch * m * n, m, sigma_ptr + batch * n,
            V_ptr + batch * n * n, n, workspace_ptr + batch * workspace_size, rotated_ptr + batch * SWEEPS,
            info_ptr + batch, blocks, member, group_size, counter_ptr + 2 * batch, PAIR, R, BLOCK, TILE, SWEEPS,
        )  # fmt: skip
        reset(counter_ptr + 2 * batch, group_size, failed_ptr)


def workspace_size(m: int, n: int, group_size: int) -> int:
    """Return how many elements of workspace `svd_by_group` needs."""
    return n * n + m * n + group_size * PAIR * PAIR


def config(architecture: str, dtype: str, R: int) -> dict:
    """Return constexprs and options with which no register spills, for R columns."""
    warps = {"fp32": {16: 2, 32: 4, 64: 8}, "fp64": {16: 4, 32: 4, 64: 8}}[dtype][R]
    if architecture == "gfx942":
        return dict(BLOCK=16, num_warps=min(warps, 4), num_stages=1)
    # all registers: by itself ptxas allows fewer, for more programs than shared memory holds
    return dict(BLOCK=16, num_warps=warps, num_stages=1, maxnreg=255)


def config_of_blocks(architecture: str, dtype: str) -> dict:
    tile = dict(TILE=128 if INTERPRETED else 32, PAIR=PAIR, SWEEPS=SWEEPS_OF_BLOCKS)
    return config(architecture, dtype, PAIR) | tile


def variants(architecture: str):
    """Yield what to compile ahead of time: (kernel, signature types, constexprs, options, is a default)."""
    for dtype in ("fp32", "fp64"):
        types = {name: f"*{dtype}" for name in ("A_ptr", "U_ptr", "sigma_ptr", "V_ptr", "J_ptr", "workspace_ptr")}
        types |= dict.fromkeys(("info_ptr", "active_mask_ptr", "rotated_ptr"), "*i32")
        sizes = ("m", "n", "rounds", "blocks", "workspace_size", "group_size", "a_batch", "a_row", "a_col")
        types |= dict.fromkeys(sizes, "i32")
        # masked in float64 only, for the ill-conditioned matrices of clip_spectrum
        for masked in (False, True) if dtype == "fp64" else (False,):
            for R in (16, 32, 64):
                options = config(architecture, dtype, R)
                tile = dict(R=R, BLOCK=options.pop("BLOCK"))
                # in float64, 64 columns spill a little with any number of warps
                default = R < 64 or dtype == "fp32"
                yield svd, types, tile | dict(SWEEPS=SWEEPS, MASKED=masked), options, default
            for R in (128, 512):
                types |= dict(counter_ptr="*i64", failed_ptr="*i32")
                options = dict(MASKED=masked, R=R) | config_of_blocks(architecture, dtype)
                tile = {key: options.pop(key) for key in ("MASKED", "PAIR", "R", "BLOCK", "TILE", "SWEEPS")}
                yield svd_by_blocks, types, tile, options, dtype == "fp32"
