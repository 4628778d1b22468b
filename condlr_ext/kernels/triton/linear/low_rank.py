"""Kernels of the three-factor products of a low-rank layer, forward and backward.

A program of `chain` takes a block of rows through Y = ((X V) Sᵀ) Uᵀ + b without leaving the chip. With the factors
swapped this is dX = ((G U) S) Vᵀ, and without its first or its last factor the pointwise half of a convolution, forward
and backward. `sums` and `combine` compute the gradients of the factors: sums over rows are taken in splits and then
over the splits in a fixed order, so equal inputs give equal bits.

Only the products upcast tiles to the accumulator's type (float64 for float64, else float32). Numbers of rows are not
specialized on, so that a short batch compiles nothing.
"""

import triton
import triton.language as tl

from .. import devices

INTERPRETED = tl.constexpr(devices.INTERPRETED)


@triton.jit
def rounded(x):
    """Return float32 numbers that tensor cores cut off to the nearest tf32, ties away from zero; others as they are.

    Those of NVIDIA and of AMD drop the 13 bits that tf32 does not hold, by which all products would be too small. This
    takes two machine instructions, cvt.rna.tf32 three: it drops the bits as well.
    """
    if x.dtype == tl.float32:
        nearest = x.to(tl.int32, bitcast=True) + 0x1000
        if INTERPRETED:
            nearest &= -0x2000
        x = tl.where(x == x, nearest.to(tl.float32, bitcast=True), x)  # a carry would take the sign of NaN
    return x


@triton.jit
def _add_product(acc, a, b, PRECISION: tl.constexpr):
    """Return acc + a b."""
    if PRECISION == "tf32":
        a, b = rounded(a), rounded(b)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def _accumulate(
    acc, A_ptr, a_row, rows, n_rows, B_ptr, b_row, b_col, cols, n_cols, inner,
    BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return acc + A[rows] B[:, cols], summed over `inner` columns of A, BLOCK at a time."""
    k = tl.arange(0, BLOCK)
    a_ptrs = A_ptr + rows[:, None] * a_row + k[None, :]
    b_ptrs = B_ptr + k[:, None].to(tl.int64) * b_row + cols[None, :] * b_col
    for start in range(0, inner, BLOCK):
        inside = k < inner - start
        a = tl.load(a_ptrs, mask=(rows[:, None] < n_rows) & inside[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=inside[:, None] & (cols[None, :] < n_cols), other=0.0)
        acc = _add_product(acc, a, b, PRECISION)
        a_ptrs += BLOCK
        b_ptrs += tl.cast(b_row, tl.int64) * BLOCK
    return acc


@triton.jit(do_not_specialize=["n_rows"])
def chain(
    X_ptr, V_ptr, S_ptr, U_ptr, bias_ptr, P_ptr, Y_ptr,
    n_rows, n, r, m, x_row, v_row, s_row, s_col, u_row, p_row, y_row,
    FIRST: tl.constexpr, LAST: tl.constexpr, BIAS: tl.constexpr, RANK: tl.constexpr, CORE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Compute P = X V, Y = P Sᵀ Uᵀ + b for BLOCK_B rows. Not FIRST: P is given. Not LAST: Y = P Sᵀ.

    RANK >= r is the width of a tile of P. CORE is the number of columns of P that meet the core at a time: with
    CORE = RANK they never leave the chip, fewer are read back from P in memory.
    """
    ACC: tl.constexpr = tl.float64 if Y_ptr.dtype.element_ty == tl.float64 else tl.float32
    dtype = Y_ptr.dtype.element_ty
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    cols = tl.arange(0, RANK).to(tl.int64)
    in_rows, in_rank = rows[:, None] < n_rows, cols[None, :] < r
    T = tl.zeros([BLOCK_B, RANK], ACC)
    if FIRST:
        P = _accumulate(T, X_ptr, x_row, rows, n_rows, V_ptr, v_row, 1, cols, r, n, BLOCK_N, PRECISION).to(dtype)
        tl.store(P_ptr + rows[:, None] * p_row + cols[None, :], P, mask=in_rows & in_rank)
    if FIRST and CORE == RANK:
        s_ptrs = S_ptr + cols[:, None] * s_col + cols[None, :] * s_row
        S_T = tl.load(s_ptrs, mask=(cols[:, None] < r) & in_rank, other=0.0)
        T = _add_product(T, P, S_T, PRECISION)
    else:
        if FIRST:
            tl.debug_barrier()  # P is read back by other threads
        T = _accumulate(T, P_ptr, p_row, rows, n_rows, S_ptr, s_col, s_row, cols, r, r, CORE, PRECISION)
    T = T.to(dtype)
    if LAST:
        out = tl.arange(0, BLOCK_M)
        u_ptrs = U_ptr + cols[:, None] + out[None, :].to(tl.int64) * u_row
        y_ptrs = Y_ptr + rows[:, None] * y_row + out[None, :]
        for start in range(0, m, BLOCK_M):
            inside = out[None, :] < m - start
            U_T = tl.load(u_ptrs, mask=(cols[:, None] < r) & inside, other=0.0)
            Y = _add_product(tl.zeros([BLOCK_B, BLOCK_M], ACC), T, U_T, PRECISION)
            if BIAS:
                Y += tl.load(bias_ptr + start + out, mask=out < m - start, other=0.0).to(ACC)[None, :]
            tl.store(y_ptrs, Y.to(dtype), mask=in_rows & inside)
            u_ptrs += tl.cast(u_row, tl.int64) * BLOCK_M
            y_ptrs += BLOCK_M
    else:
        tl.store(Y_ptr + rows[:, None] * y_row + cols[None, :], T, mask=in_rows & in_rank)


@triton.jit(do_not_specialize=["n_rows", "u_tiles", "v_tiles", "rows_per_split"])
def sums(
    G_ptr, X_ptr, P_ptr, Q_ptr, sums_ptr, db_ptr,
    n_rows, m, n, r, u_tiles, v_tiles, rows_per_split, g_row, x_row, p_row, q_row,
    BIAS: tl.constexpr, RANK: tl.constexpr, PRECISION: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Compute one tile of Gᵀ P (with Σ G), of Xᵀ Q or of Qᵀ P, over the rows of one split.

    Grid: tiles of the three products in this order, by splits. sums [splits, tiles * BLOCK_I, r], db [splits, m].
    """
    ACC: tl.constexpr = sums_ptr.dtype.element_ty
    tile, split = tl.program_id(0), tl.program_id(1).to(tl.int64)
    A_ptr, a_row, width, B_ptr, b_row, first = G_ptr, tl.cast(g_row, tl.int64), m, P_ptr, tl.cast(p_row, tl.int64), tile
    if tile >= u_tiles + v_tiles:
        A_ptr, a_row, width, first = Q_ptr, tl.cast(q_row, tl.int64), r, tile - u_tiles - v_tiles
    elif tile >= u_tiles:
        A_ptr, a_row, width, first = X_ptr, tl.cast(x_row, tl.int64), n, tile - u_tiles
        B_ptr, b_row = Q_ptr, tl.cast(q_row, tl.int64)

    b = tl.arange(0, BLOCK_B)
    i = first * BLOCK_I + tl.arange(0, BLOCK_I)
    cols = tl.arange(0, RANK)
    begin = split * rows_per_split
    count = tl.minimum(n_rows - begin, rows_per_split)
    a_ptrs = A_ptr + (begin + b)[:, None] * a_row + i[None, :]
    b_ptrs = B_ptr + (begin + b)[:, None] * b_row + cols[None, :]
    acc = tl.zeros([BLOCK_I, RANK], ACC)
    # Tiles of A that are summed beside their product get a buffer too few in Triton's pipeline for Hopper, which copies
    # the next tile over one that the tensor core still reads. In 16 bits the sum is an exact product too, with ones.
    HALF: tl.constexpr = G_ptr.dtype.element_ty.primitive_bitwidth == 16
    ones = tl.full([BLOCK_B, 16], 1.0, G_ptr.dtype.element_ty)
    total = tl.zeros([BLOCK_I, 16] if HALF else [BLOCK_I], ACC)
    for start in range(0, count, BLOCK_B):
        inside = b[:, None] < count - start
        a = tl.load(a_ptrs, mask=inside & (i[None, :] < width), other=0.0)
        p = tl.load(b_ptrs, mask=inside & (cols[None, :] < r), other=0.0)
        acc = _add_product(acc, tl.trans(a), p, PRECISION)
        if BIAS:
            if HALF:
                total = tl.dot(tl.trans(a), ones, total, out_dtype=ACC)
            else:
                total += tl.sum(a.to(ACC), 0)
        a_ptrs += a_row * BLOCK_B
        b_ptrs += b_row * BLOCK_B
    i_all = (split * tl.num_programs(0) + tile) * BLOCK_I + tl.arange(0, BLOCK_I)
    tl.store(sums_ptr + i_all[:, None] * r + cols[None, :], acc, mask=cols[None, :] < r)
    if BIAS:
        if HALF:
            total = tl.sum(total, 1) / 16  # of equal numbers
        if tile < u_tiles:
            tl.store(db_ptr + split * m + i, total, mask=i < m)


@triton.jit(do_not_specialize=["splits", "u_tiles", "v_tiles"])
def combine(
    sums_ptr, db_sums_ptr, S_ptr, dU_ptr, dV_ptr, dS_ptr, db_ptr,
    m, n, r, splits, u_tiles, v_tiles, s_row, s_col,
    BIAS: tl.constexpr, RANK: tl.constexpr, CORE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Add the splits of `sums` in order: dU = (Gᵀ P) Sᵀ, dV = (Xᵀ Q) S, dS = Qᵀ P, db; grid: the tiles of `sums`."""
    ACC: tl.constexpr = sums_ptr.dtype.element_ty
    tile = tl.program_id(0)
    out_ptr, width, first = dU_ptr, m, tile
    core_row, core_col = s_col, s_row
    if tile >= u_tiles + v_tiles:
        out_ptr, width, first = dS_ptr, r, tile - u_tiles - v_tiles
    elif tile >= u_tiles:
        out_ptr, width, first = dV_ptr, n, tile - u_tiles
        core_row, core_col = s_row, s_col
    lane, k = tl.arange(0, BLOCK_I), tl.arange(0, CORE)
    cols = tl.arange(0, RANK)
    i = first * BLOCK_I + lane
    all_rows = tl.num_programs(0).to(tl.int64) * BLOCK_I
    row = tile.to(tl.int64) * BLOCK_I + lane
    if BIAS and tile < u_tiles:
        total = tl.zeros([BLOCK_I], ACC)
        for split in range(splits):
            total += tl.load(db_sums_ptr + split * m + i, mask=i < m, other=0.0)
        tl.store(db_ptr + i, total.to(db_ptr.dtype.element_ty), mask=i < m)

    out_ptrs = out_ptr + i[:, None].to(tl.int64) * r
    acc = tl.zeros([BLOCK_I, RANK], ACC)
    for start in range(0, r, CORE):
        inside = k[None, :] < r - start
        part = tl.zeros([BLOCK_I, CORE], ACC)
        for split in range(splits):
            ptrs = sums_ptr + (split * all_rows + row)[:, None] * r + start + k[None, :]
            part += tl.load(ptrs, mask=inside, other=0.0)
        if tile >= u_tiles + v_tiles:
            tl.store(out_ptrs + start + k[None, :], part.to(out_ptr.dtype.element_ty), mask=(i[:, None] < r) & inside)
        else:
            s_ptrs = S_ptr + (start + k)[:, None] * core_row + cols[None, :] * core_col
            S = tl.load(s_ptrs, mask=(k[:, None] < r - start) & (cols[None, :] < r), other=0.0).to(ACC)
            acc = _add_product(acc, part, S, PRECISION)
    if tile < u_tiles + v_tiles:
        tl.store(
            out_ptrs + cols[None, :], acc.to(out_ptr.dtype.element_ty), mask=(i[:, None] < width) & (cols[None, :] < r)
        )
