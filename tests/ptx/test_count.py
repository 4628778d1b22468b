"""What the executor counts, by hand and against the formulas of `bench.kernels`."""

import pytest
import torch
from helpers.ptx.assemble import element, run
from helpers.ptx.count import Counts

from bench import executed, kernels


def counted(body, *tensors, **options):
    counts = Counts()
    launch = run(body, *tensors, counts=counts, **options)
    assert not launch.reports
    return counts


def test_arithmetic_of_threads():
    """By the threads that come to it, in a branch and behind it."""
    body = """mov.b32 %r1, 0f3F800000; setp.lt.s32 %p1, %r0, 40; @%p1 bra then;
    fma.rn.f32 %r1, %r1, %r1, %r1;
then:
    add.f32 %r1, %r1, %r1; mov.b64 %rd1, 0d3FF0000000000000; mul.f64 %rd1, %rd1, %rd1; add.s32 %r2, %r0, %r0;"""
    counts = counted(body, torch.zeros(1), threads=64)
    assert counts.flops == {"fp32": 24 * 2 + 64, "fp64": 64}
    # two warps come to 3 instructions, one to 1, two to 4 and to ret; the address of the tensor and %r0 before
    assert counts.instructions == 2 * (2 + 3 + 4 + 1) + 1 and counts.asked == counts.touched == 0


def test_sectors():
    """Of 32 bytes: neighbors share one, two warps ask twice, threads that are elsewhere ask for their own."""
    out = torch.zeros(64 * 16, dtype=torch.int32)
    store = "st.global.b32 [%rd8], %r0;"
    counts = counted(f"{element('%rd8', 0, 4)} {store}", out, threads=64)
    assert counts.asked == counts.touched == 256
    counts = counted(f"{element('%rd8', 0, 64)} {store}", out, threads=64)
    assert counts.asked == counts.touched == 64 * 32
    counts = counted("ld.global.b32 %r1, [%rd0]; ld.global.b32 %r1, [%rd0 + 4];", out, threads=64)
    assert counts.asked == 4 * 32 and counts.touched == 32
    copies = "setp.lt.s32 %p1, %r0, 8; @%p1 cp.async.cg.shared.global [%r1], [%rd8], 16, 16; cp.async.commit_group;"
    body = f"{element('%rd8', 0, 16)} shl.b32 %r1, %r0, 4; {copies} cp.async.wait_group 0;"
    assert counted(body, out, shared=512).asked == 128


def default(kernel, dtype, rank, kind=""):
    return next(
        v
        for v in kernels.aot.variants("sm_90")
        if v.default and (v.kernel, v.dtype, v.kind, v.constants.get("RANK")) == (kernel, dtype, kind, rank)
    )


@pytest.mark.parametrize("dtype", ["fp16", "tf32"])
def test_formulas_of_layers(dtype):
    """Flops of the products, bytes that have to move; bytes that warps ask for where each asks for its own."""
    sizes = 256, 256, 128
    chain, back, sums, combine = executed.layer(dtype, *sizes, rank=16)
    variants = (("chain", "forward"), ("chain", "backward"), ("sums", ""), ("combine", ""))
    for launch, (kernel, kind) in zip((chain, back, sums, combine), variants, strict=True):
        variant = default(kernel, dtype, 16, kind)
        n, m = sizes[:0:-1] if kind == "backward" else sizes[1:]
        grid, flops, moved, least = kernels.work(variant, sizes[0], n, m)
        counts = launch.counts
        assert launch.kernel == kernel and grid == launch.grid[0] * launch.grid[1]
        assert counts.flops[kernels.arithmetic(variant)] == grid * flops
        assert counts.touched == least
        if kind == "backward" or kernel == "sums":
            assert counts.asked == grid * moved
        assert counts.asked >= grid * moved


def test_nothing_is_counted_unless_asked():
    assert run("add.f32 %r1, %r1, %r1;", torch.zeros(1)).counts is None
