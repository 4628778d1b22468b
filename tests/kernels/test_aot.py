"""The Triton kernels compiled ahead of time for every architecture: shared memory, spills, instructions.

One process for `pytest -m aot` (the default configurations) or `pytest -m "aot or aot_all"` (every one); not under
TRITON_INTERPRET=1, which leaves nothing to compile.
"""

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

pytest.importorskip("triton")

from helpers.ptx import parse, translate

from bench import aot
from condlr_ext.kernels.triton.devices import INTERPRETED
from condlr_ext.kernels.triton.linear import configs

VARIANTS = [] if INTERPRETED else [v for name in configs.ARCHITECTURES for v in aot.variants(name)]


def path(variant) -> tuple:
    """Return what configurations have in common that differ only in the rank: they have the same code."""
    others = {name: value for name, value in variant.constants.items() if name != "R"}
    return variant.architecture, variant.kernel, variant.kind, variant.dtype, str(others)


LARGEST = {path(v): v for v in sorted(VARIANTS, key=lambda v: v.constants.get("R", 0)) if v.default}


def in_make_test(variant) -> bool:
    """Defaults, of those of the layers one rank, forward and backward, of the others the largest rank of each path."""
    if variant.module == "linear.low_rank":
        return variant.default and variant.constants["RANK"] == 64 and "pointwise" not in variant.kind
    return LARGEST.get(path(variant)) is variant


@pytest.fixture(scope="module")
def compiled(request):
    """Return a function Variant -> Code; all cores compile the variants of the selected tests."""
    selected = [item.callspec.params["variant"] for item in request.session.items if item.module is request.module]
    # a process that imports torch anew and is never forked from one with threads
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=get_context("spawn")) as pool:
        futures = {str(variant): pool.submit(aot.compile_variant, variant) for variant in selected}
        yield lambda variant: futures[str(variant)].result()
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize(
    "variant",
    [pytest.param(v, marks=pytest.mark.aot if in_make_test(v) else pytest.mark.aot_all, id=str(v)) for v in VARIANTS],
)
def test_compiles_within_the_limits(variant, compiled):
    code = compiled(variant)
    assert code.seconds < aot.SECONDS
    # sm_80 serves the GPUs with 99 KiB too
    assert code.shared <= (101376 if variant.architecture == "sm_80" else aot.SHARED[variant.architecture])
    if variant.default:
        assert code.spilled == 0
    if variant.architecture in ("sm_80", "sm_90"):
        for function in parse.parse(code.assembly).values():
            for instruction in function.instructions:
                translate.row(instruction)  # raises where there is none: the executor would not run it
    if variant.kernel == "chain":  # in the interpreter, where nothing is concurrent, a missing barrier does not show
        reads_back = variant.constants["FIRST"] and variant.constants["CORE"] < variant.constants["RANK"]
        assert ("barrier" in code.ttir) == reads_back
    if "counter_ptr" in variant.types and variant.constants.get("LARGE", 1):
        # a barrier releases the stores of a member and acquires those of the others
        if variant.architecture == "gfx942":
            assert code.count(r"buffer_wbl2 sc1") >= 2 and code.count(r"buffer_inv sc1") >= 2
        else:
            assert code.count(r"atom\.global\.gpu\.acq_rel\.add\.u64") >= 2 and not code.count(r"atom\S*relaxed")
    if variant.kernel not in ("chain", "sums") or variant.dtype == "fp64":
        return
    if variant.architecture == "gfx942":
        # a tile of 64 rows and a rank of 16 has 8 bytes for each thread
        least = "[24]" if variant.kind == "pointwise" and variant.constants["RANK"] == 16 else "4"
        assert code.count("v_mfma") and code.count(f"(global|buffer)_load_dwordx{least}")
        return
    if variant.dtype != "fp32":
        matrix = {"sm_80": r"mma\.sync", "sm_90": r"wgmma\.mma_async", "sm_100": r"tcgen05\.mma"}[variant.architecture]
        assert code.count(matrix)
    wide = code.count(r"cp\.async\.c[ag]\S*\s[^;]*\], 0x10,") + code.count(r"ld\.global\.v4\.b32")
    narrow = code.count(r"cp\.async\.c[ag]\S*\s[^;]*\], 0x[48],")
    assert wide
    if variant.dtype != "tf32" and variant.default:  # whose operands must lie transposed in shared memory
        assert wide > narrow
