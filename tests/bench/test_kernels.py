"""What compilation says of the kernels: residency and counts, and that the committed table is of these kernels."""

import csv

import pytest

pytest.importorskip("triton")

from bench import kernels
from condlr_ext.kernels.triton.devices import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="nothing is compiled")


@pytest.mark.parametrize(
    "registers,warps,shared,blocks,limit",
    [
        (255, 8, 0, 1, "registers"),  # 8192 a warp: two in each part
        (128, 4, 0, 4, "registers"),
        (129, 4, 0, 3, "registers"),  # units of 256: 4352 a warp, three in each part
        (32, 4, 98304, 2, "shared memory"),
        (32, 4, 0, 16, "registers"),
        (16, 4, 0, 16, "warps"),
        (16, 1, 0, 32, "warps"),
    ],
)
def test_residency(registers, warps, shared, blocks, limit):
    assert kernels.residency(registers, warps, shared) == (blocks, limit)


def default(kernel, dtype, rank):
    """Return the listed variant of a kernel of the layers."""
    return next(v for v in kernels.defaults() if (v.kernel, v.dtype, v.constants.get("RANK")) == (kernel, dtype, rank))


def test_counts_are_those_of_the_products():
    """All blocks together: three products forward; backward GᵀP, XᵀQ, QᵀP, then those with S."""
    B, n, m, r = kernels.ROWS, kernels.N, kernels.M, 64
    grid, flops, moved, least = kernels.work(default("chain", "fp16", r))
    assert grid * flops == 2 * B * r * (n + r + m)
    assert least == 2 * (B * (n + r + m) + r * (n + r + m)) < grid * moved
    grid, flops, _, least = kernels.work(default("sums", "fp16", r))
    assert grid * flops == pytest.approx(2 * B * r * (n + r + m)) and least > 2 * B * (n + m + 2 * r)
    grid, flops, _, _ = kernels.work(default("combine", "fp16", r))
    assert grid * flops == 2 * r * r * (n + r + m)


def test_a_kernel():
    found = kernels.evidence(default("combine", "fp16", 16))
    assert 16 <= found.registers <= 255 and found.spilled == 0 and found.blocks >= 1 and found.bound == "memory"
    assert 0 < found.tail <= 1 and found.floor > 0


def test_the_table_is_of_these_kernels():
    """Where it fails: `python -m bench.kernels`."""
    with kernels.RESULTS.open(encoding="utf-8") as file:
        listed = [(row["kernel"], row["dtype"], row["configuration"], row["warps"]) for row in csv.DictReader(file)]
    assert listed == [(*kernels.label(v), str(v.options["num_warps"])) for v in kernels.defaults()]
