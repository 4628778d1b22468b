"""Matrices that are spread over the threads of a warp or of a warp group, and over shared memory.

Figures are those of the PTX ISA, section "Warp-Level Matrix Multiply-Accumulate Instructions" and the next. A lane has
row lane // 4 of every 8 rows of a fragment, and in its registers columns lane % 4 of every 4, in pairs where two
numbers share a register. Products are summed in float64 and rounded once; on a device their rounding is unspecified.
"""

import functools

import numpy as np

from .values import cut_to_tf32, from_bfloat16

# what a register of 32 bits holds of a matrix of this type
_UNPACK = {
    "f16": lambda x: x.view(np.float16).astype(np.float64),
    "bf16": lambda x: from_bfloat16(x.view(np.uint16)).astype(np.float64),
    "tf32": lambda x: cut_to_tf32(x).astype(np.float64),
    "f64": lambda x: x,
}


def gather(registers, kind):
    """Return the matrices [warps, 8 or 16, columns] whose 8 x 8 bytes fragments are in registers of lanes.

    With more than one register: the rows below come first, then the columns to the right.
    """
    parts = [_UNPACK[kind](np.ascontiguousarray(x)) for x in registers]
    parts = [x.reshape(-1, 8, 4 * x.size // len(registers[0])) for x in parts]
    if len(parts) == 1:
        return parts[0]
    return np.concatenate([np.concatenate(parts[k : k + 2], 1) for k in range(0, len(parts), 2)], 2)


def gather_right(registers, kind):
    """Return the right factors [warps, columns, 8]: their registers are as those of the transpose, 8 rows."""
    parts = [_UNPACK[kind](np.ascontiguousarray(x)) for x in registers]
    return np.concatenate([x.reshape(-1, 8, 4 * x.size // len(registers[0])) for x in parts], 2).transpose(0, 2, 1)


def scatter(matrices):
    """Return the registers of accumulators [warps, 8 or 16, n]: row lane // 4, columns 2 (lane % 4) and the next.

    Registers go through the two columns, then the rows 8 below, then the columns 8 to the right.
    """
    _, rows, columns = matrices.shape
    return [
        np.ascontiguousarray(matrices[:, row : row + 8, first + pair : first + 8 : 2]).reshape(-1)
        for first in range(0, columns, 8)
        for row in range(0, rows, 8)
        for pair in (0, 1)
    ]


def multiply(a, b, c, kind):
    """mma: return the registers of A B + C of each warp."""
    product = scatter(gather(a, kind) @ gather_right(b, kind))
    return [(x + y).astype(y.dtype) for x, y in zip(product, c, strict=True)]


def multiply_group(a, b, c, keep):
    """wgmma: return the registers of A B + C for A [groups, 64, k], B [groups, k, n]; keep: whether C is not zero."""
    product = scatter((a @ b).reshape(-1, 16, b.shape[2]))  # 16 rows for each warp of the group
    return [((x + y) if keep else x).astype(y.dtype) for x, y in zip(product, c, strict=True)]


def rows_to_registers(rows, transposed):
    """ldmatrix: return the registers for rows [warps, 8 per matrix, 8] of 16 bits: two neighbors of row lane // 4."""
    matrices = rows.reshape(len(rows), -1, 8, 8)
    if transposed:
        matrices = matrices.swapaxes(2, 3)
    return [np.ascontiguousarray(matrices[:, k]).view(np.uint32).reshape(-1) for k in range(matrices.shape[1])]


def registers_to_rows(registers, transposed):
    """stmatrix: return the rows [warps, 8 per matrix, 8] of 16 bits."""
    matrices = np.stack([x.view(np.uint16).reshape(-1, 8, 8) for x in registers], 1)
    if transposed:
        matrices = matrices.swapaxes(2, 3)
    return matrices.reshape(len(matrices), -1, 8)


_SWIZZLE = {0: (16, 0), 1: (128, 7), 2: (64, 3), 3: (32, 1)}  # mode: bytes of a row, mask of the rows that differ


@functools.cache
def _relative(rows, depth, size, transposed, mode, leading, stride):
    """Return the bytes from the base to each element [rows, depth] of an operand, before the swizzle."""
    width = _SWIZZLE[mode][0]
    row, column = np.arange(rows)[:, None], np.arange(depth)[None, :]
    if transposed:  # rows are contiguous: `width` bytes of them, 8 columns apart by the stride
        per = width // size
        return row // per * leading + row % per * size + column // 8 * stride + column % 8 * width
    at = row // 8 * stride + row % 8 * width
    if width == 16:  # no swizzle: 16 bytes of each row, then the next by the leading dimension
        return at + column * size // 16 * leading + column * size % 16
    return at + column * size


def descriptor_addresses(descriptor, rows, depth, size, transposed):
    """Return the shared addresses of the elements [rows, depth] of an operand of wgmma, `size` bytes each.

    The descriptor has 14 bits each of the base, of the leading dimension's and of the stride's distance, in units of
    16 bytes, and in its highest two bits the swizzle: which bits 4 to 6 of an address are flipped by its bits 7 to 9.
    `rows` are those of A or columns of B; `depth` is what is summed over; transposed: rows are contiguous.
    """
    base, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    mode = descriptor >> 62
    at = base + _relative(rows, depth, size, transposed, mode, leading, stride)
    return at ^ (at >> 7 & _SWIZZLE[mode][1]) << 4


def operand(values, kind):
    """Return the numbers of elements of an operand of wgmma in shared memory, given their bits."""
    return _UNPACK[kind](values)
