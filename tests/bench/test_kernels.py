"""What compilation says of the kernels: residency and counts, and that the committed table is of these kernels."""

import csv

import pytest

pytest.importorskip("triton")

from bench import executed, kernels
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
    """All blocks together: three products forward; backward GᵀP, XᵀQ, QᵀP and G by ones, then those with S."""
    B, n, m, r = kernels.ROWS, kernels.N, kernels.M, 64
    grid, flops, moved, least = kernels.work(default("chain", "fp16", r))
    assert grid * flops == 2 * B * r * (n + r + m)
    assert least == 2 * (B * (n + r + m) + r * (n + r + m) + m) < grid * moved
    grid, flops, _, least = kernels.work(default("sums", "fp16", r))
    assert grid * flops == 2 * B * (r + 16) * (n + r + m) and least > 2 * B * (n + m + 2 * r)
    grid, flops, _, _ = kernels.work(default("combine", "fp16", r))
    assert grid * flops == 2 * r * r * (n + m)


def test_a_kernel():
    found = kernels.evidence(default("combine", "fp16", 16))
    assert 16 <= found.registers <= 255 and found.spilled == 0 and found.blocks >= 1 and found.bound == "memory"
    assert 0 < found.tail <= 1 and found.floor > 0
    assert found.executed == 1 and found.asked >= 1


def test_the_floor_of_a_launch():
    """On two of 132 multiprocessors: by what takes longest, in microseconds."""
    h200 = kernels.h200
    assert h200.INSTRUCTIONS == pytest.approx(132 * 4 * 1.98e9, rel=0.01)  # four a cycle, at the data sheet's clock
    counts = dict(flops={"fp32": 64 * 10**6, "fp64": 10**6}, instructions=4 * 10**6, touched=48 * 10**5)
    least, bound = executed.floor(2, **counts)
    assert bound == "instructions" and least == pytest.approx(66 * 4e12 / h200.INSTRUCTIONS)
    assert executed.floor(200, **counts | dict(instructions=0, flops={})) == (pytest.approx(1), "memory")
    least, bound = executed.floor(66, **counts | dict(instructions=0, touched=0))
    assert bound == "fp32 arithmetic" and least == pytest.approx(2 * 64 / 67)


def test_the_table_is_of_these_kernels():
    """Where it fails: `PYTHONPATH=tests python -m bench.kernels`."""
    with kernels.RESULTS.open(encoding="utf-8") as file:
        listed = [(row["kernel"], row["dtype"], row["configuration"], row["warps"]) for row in csv.DictReader(file)]
    assert listed == [(*kernels.label(v), str(v.options["num_warps"])) for v in kernels.defaults()]
    with kernels.LAUNCHES.open(encoding="utf-8") as file:
        assert list(dict.fromkeys(row["problem"] for row in csv.DictReader(file))) == list(executed.PROBLEMS)
