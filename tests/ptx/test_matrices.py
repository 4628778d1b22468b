"""Matrices in registers and in shared memory against the tables of the PTX ISA, with small integers: sums are exact.

The functions of a lane and a register below are written after its figures, "Matrix Fragments for mma.m16n8k16 with
floating point type" and so on.
"""

import numpy as np
import pytest
from helpers.ptx import matrices

WARPS = 2


def numbers(*shape):
    return np.random.default_rng(sum(shape)).integers(-8, 9, shape).astype(np.float64)


# (row, column) of element i of a lane, in fragments of A, B and of the accumulators


def half_A(lane, i):
    return lane // 4 + 8 * (i // 2 % 2), 2 * (lane % 4) + i % 2 + 8 * (i // 4)


def half_B(lane, i):
    return 2 * (lane % 4) + i % 2 + 8 * (i // 2), lane // 4


def tf32_A(lane, i):
    return lane // 4 + 8 * (i % 2), lane % 4 + 4 * (i // 2)


def tf32_B(lane, i):
    return lane % 4 + 4 * i, lane // 4


def double_A(lane, i):
    return lane // 4 + 8 * (i % 2), lane % 4 + 4 * (i // 2)


def double_B(lane, i):
    return lane % 4 + 4 * i, lane // 4


def small_A(lane, i):
    return lane // 4, lane % 4


def small_B(lane, i):
    return lane % 4, lane // 4


def accumulators(lane, i):
    return lane // 4 + 8 * (i // 2), 2 * (lane % 4) + i % 2


def encode(x, kind):
    """Return numbers as the bits in registers, 16 or 32 bits each."""
    if kind == "f16":
        return x.astype(np.float16).view(np.uint16)
    if kind == "bf16":
        return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return x.astype(np.float32).view(np.uint32) if kind == "tf32" else x


def fragments(matrix, place, count, kind):
    """Return the registers of all lanes; two numbers of 16 bits share one, the first lower."""
    elements = [np.array([m[place(lane, i)] for m in matrix for lane in range(32)]) for i in range(count)]
    elements = [encode(x, kind) for x in elements]
    if kind in ("tf32", "f64", "f32"):
        return elements
    wide = [x.astype(np.uint32) for x in elements]
    return [wide[k] | wide[k + 1] << np.uint32(16) for k in range(0, count, 2)]


SHAPES = {  # m, n, k, A, B, elements of a lane of each
    "f16": (16, 8, 16, half_A, half_B, 8, 4),
    "bf16": (16, 8, 16, half_A, half_B, 8, 4),
    "tf32": (16, 8, 8, tf32_A, tf32_B, 4, 2),
    "f64": (16, 8, 16, double_A, double_B, 8, 4),
    "f64 small": (8, 8, 4, small_A, small_B, 1, 1),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_mma(shape):
    m, n, k, place_A, place_B, count_A, count_B = SHAPES[shape]
    kind = shape.split()[0]
    A, B, C = numbers(WARPS, m, k), numbers(WARPS, k, n), numbers(WARPS, m, n)
    a, b = fragments(A, place_A, count_A, kind), fragments(B, place_B, count_B, kind)
    dtype = np.float64 if kind == "f64" else np.float32
    c = [x.astype(dtype) for x in fragments(C, accumulators, m * n // 32, "f64")]
    expected = fragments(A @ B + C, accumulators, m * n // 32, "f64")
    got = matrices.multiply(a, b, c, kind)
    assert len(got) == len(expected) and all(x.dtype == dtype for x in got)
    np.testing.assert_array_equal(got, expected)


def test_tf32_ignores_the_lowest_bits():
    A, B = np.full((1, 16, 8), 1 + 2**-11), np.ones((1, 8, 8))
    a, b = fragments(A, tf32_A, 4, "tf32"), fragments(B, tf32_B, 2, "tf32")
    got = matrices.multiply(a, b, [np.zeros(32, np.float32)] * 4, "tf32")
    assert (np.array(got) == 8).all()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_rows_and_registers(count, transposed):
    """ldmatrix: a lane has elements (lane // 4, 2 (lane % 4)) and the next of each matrix, or of its transpose."""
    rows = np.arange(WARPS * count * 64, dtype=np.uint16).reshape(WARPS, 8 * count, 8)
    registers = matrices.rows_to_registers(rows, transposed)
    for k, register in enumerate(registers):
        for thread, pair in enumerate(register.tolist()):
            matrix, lane = rows[thread // 32, 8 * k : 8 * k + 8], thread % 32
            matrix = matrix.T if transposed else matrix
            assert (pair & 0xFFFF, pair >> 16) == (
                matrix[lane // 4, 2 * (lane % 4)],
                matrix[lane // 4, 2 * (lane % 4) + 1],
            )
    np.testing.assert_array_equal(matrices.registers_to_rows(registers, transposed), rows)  # stmatrix


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("columns", [8, 64])
def test_accumulators_of_a_warp_group(columns, keep):
    """Warp w has rows 16 w and the following; d[4 j + i] is as accumulator i of 8 columns from 8 j on."""
    A, B, C = numbers(1, 64, 16), numbers(1, 16, columns), numbers(1, 64, columns)

    def spread(matrix):
        return [
            np.array([matrix[0, 16 * (t // 32) + row, 8 * (i // 4) + column] for t in range(128) for row, column in [accumulators(t % 32, i % 4)]])
            for i in range(columns // 2)
        ]  # fmt: skip

    c = [x.astype(np.float32) for x in spread(C)]
    np.testing.assert_array_equal(matrices.multiply_group(A, B, c, keep), spread(A @ B + C * keep))


def stored(matrix, size, width, transposed):
    """Store an operand [rows, depth] as the canonical layouts of the PTX ISA have it. Return memory and a descriptor.

    An atom is eight rows of `width` bytes, and a chunk of 16 bytes is at its place xor the row's number within the atom;
    the pattern of rows repeats earlier for narrower swizzles. Transposed, rows and columns change places.
    """
    mode = {16: 0, 128: 1, 64: 2, 32: 3}[width]
    lines = matrix.T if transposed else matrix  # those are contiguous
    count, length = lines.shape
    per = width // size
    atoms = [(i, j) for j in range(length // per) for i in range(count // 8)]
    memory = np.zeros(1024 + len(atoms) * 8 * per, lines.dtype)
    start = 1024 // size if mode else 0
    for number, (i, j) in enumerate(atoms):
        for row in range(8):
            for column in range(per):
                chunk, within = divmod(column * size, 16)
                swizzled = chunk ^ row % 8 // {128: 1, 64: 2, 32: 4, 16: 8}[width]
                at = number * 8 * width + row * width + swizzled * 16 + within
                memory[start + at // size] = lines[8 * i + row, j * per + column]
    atom, base = 8 * width, start * size
    stride, leading = atom, atom * (count // 8)  # to the next eight lines, and to the next columns of them
    return memory, base >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | mode << 62


@pytest.mark.parametrize("kind,size,depth", [("f16", 2, 16), ("bf16", 2, 16), ("tf32", 4, 8)])
@pytest.mark.parametrize("width", [16, 32, 64, 128])
def test_operands_in_shared_memory(width, kind, size, depth):
    """The descriptor starts at the columns of this multiplication within the atom."""
    columns = max(depth, width // size)
    matrix = encode(numbers(64, columns), kind)
    memory, descriptor = stored(matrix, size, width, False)
    for first in range(0, columns, depth):
        shift = first * size >> 4 if width > 16 else 0
        if width == 16 and first:
            continue
        at = matrices.descriptor_addresses(descriptor + shift, 64, depth, size, False)
        np.testing.assert_array_equal(memory[at // size], matrix[:, first : first + depth])


@pytest.mark.parametrize("width", [32, 64, 128])
def test_transposed_operands_in_shared_memory(width):
    matrix = encode(numbers(64, 16), "f16")
    memory, descriptor = stored(matrix, 2, width, True)
    at = matrices.descriptor_addresses(descriptor, 64, 16, 2, True)
    np.testing.assert_array_equal(memory[at // 2], matrix)


def test_operands_become_numbers():
    x = numbers(8, 8)
    for kind in ("f16", "bf16", "tf32"):
        np.testing.assert_array_equal(matrices.operand(encode(x, kind), kind), x)
