"""What compilation says of the default kernels on an H200: `python -m bench.kernels`, on any machine with Triton.

It writes bench/results/kernels-sm_90.csv, a row for each kernel, and docs/results/kernels.md. Nothing in them was
measured: registers and shared memory are those of the machine code, bytes and flops are counted from the algorithm.
"""

import csv
import math
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import triton

from condlr_ext._table import markdown

from . import aot

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "bench/results/kernels-sm_90.csv", ROOT / "docs/results/kernels.md"
ROWS, N, M = 8192, 4096, 4096  # of the layer for which the products are counted

# H200 SXM, from NVIDIA's data sheet (dense products) and the tuning guide for compute capability 9.0
MULTIPROCESSORS, MEMORY = 132, 4.8e12
LATENCY = 0.7e-6  # of memory, assumed
FLOPS = {"fp16": 989e12, "bf16": 989e12, "tf32": 494e12, "fp32": 67e12, "fp64": 67e12}
REGISTERS, SHARED, RESERVED, WARPS, BLOCKS = 65536, 233472, 1024, 64, 32
SIZES = {"fp16": 2, "bf16": 2, "tf32": 4, "fp32": 4, "fp64": 8}


@dataclass(frozen=True)
class Kernel:
    """A compiled default configuration; the last fields only for the kernels of a layer."""

    kernel: str
    dtype: str
    configuration: str
    warps: int
    registers: int  # of a thread
    spilled: int  # bytes of a thread
    shared: int  # bytes of a block
    blocks: int  # on a multiprocessor at a time
    limit: str  # what allows no more
    rank: int | None = None
    grid: int | None = None
    flops: float | None = None  # of a block
    bytes: float | None = None  # that a block reads and writes, through the L2 cache
    floor: float | None = None  # microseconds of the grid at the data sheet's rates
    bound: str = ""
    in_flight: int | None = None  # bytes that a multiprocessor has asked memory for in the main loop
    tail: float | None = None  # share of the multiprocessors' places that are taken, in the mean over the waves


def residency(registers: int, warps: int, shared: int) -> tuple[int, str]:
    """Return how many blocks a multiprocessor holds at a time, and what limits them.

    Each of its four parts has 16384 registers, handed out to warps in units of 256; a block takes 1 KiB of shared
    memory beside its own.
    """
    of_warp = math.ceil(32 * registers / 256) * 256
    by = {
        "registers": 4 * (REGISTERS // 4 // of_warp) // warps,
        "shared memory": SHARED // (shared + RESERVED),
        "warps": min(WARPS // warps, BLOCKS),
    }
    limit = min(by, key=by.__getitem__)
    return by[limit], limit


def work(variant: aot.Variant) -> tuple[int, float, float, float] | None:
    """Return the grid, flops and bytes of a block, and the least bytes to and from memory, for ROWS x N -> M.

    The rank is that of the configuration; None for kernels that are not of a layer.
    """
    c, r, size = variant.constants, variant.constants.get("RANK"), SIZES.get(variant.dtype)
    wide = 8 if variant.dtype == "fp64" else 4
    if variant.kernel == "chain":
        rows = c["BLOCK_B"]
        flops = 2 * rows * r * (N * c["FIRST"] + r + M * c["LAST"])
        factors = r * (N * c["FIRST"] + r + M * c["LAST"]) * size
        tiles = rows * (N * c["FIRST"] + r + (M if c["LAST"] else r)) * size
        again = rows * r * size if c["CORE"] < r and c["FIRST"] else 0  # P is read back
        grid = ROWS // rows
        return grid, flops, factors + tiles + again, grid * tiles + factors
    if variant.kernel in ("sums", "combine"):
        sums = next(v for v in aot.variants(variant.architecture) if _same_layer(v, variant))
        block, step = sums.constants["BLOCK_I"], sums.constants["BLOCK_B"]
        tiles = sum(-(-w // block) for w in (M, N, r))
        splits = max(1, min(2 * MULTIPROCESSORS // tiles, ROWS // (4 * step)))
        partial = tiles * block * r * wide
        if variant.kernel == "sums":
            rows = ROWS / splits
            least = (ROWS * (M + N + 2 * r)) * size + splits * partial
            return tiles * splits, 2 * rows * block * r, rows * (block + r) * size + block * r * wide, least
        rows = c["BLOCK_I"]
        grid = tiles * block // rows
        of_block = rows * r * (splits * wide + size) + r * r * size
        return grid, 2 * rows * r * r, of_block, splits * partial + (M + N + r) * r * size
    return None


def _same_layer(v: aot.Variant, other: aot.Variant) -> bool:
    same = v.dtype == other.dtype and v.constants.get("RANK") == other.constants["RANK"]
    return v.kernel == "sums" and v.default and same


def _loaded_ahead(variant: aot.Variant) -> int:
    """Return the bytes of streamed operands that a block has asked for: all but one of the stages of its pipeline."""
    c = variant.constants
    ahead = max(1, variant.options["num_stages"] - 1) * SIZES[variant.dtype]
    if variant.kernel == "chain":
        return ahead * c["BLOCK_B"] * c["BLOCK_N"]
    return ahead * c["BLOCK_B"] * (c["BLOCK_I"] + c["RANK"]) if variant.kernel == "sums" else 0


def label(variant: aot.Variant) -> tuple[str, str, str]:
    """Return the kernel, the dtype and the configuration as text."""
    hidden = ("FIRST", "LAST", "BIAS", "RANK", "PRECISION", "s_col", "s_row")
    values = {k: v for k, v in variant.constants.items() if k not in hidden}
    values["stages"] = variant.options.get("num_stages")
    text = " ".join(f"{k}={v}" for k, v in values.items() if v is not None)
    return " ".join(filter(None, [variant.kernel, variant.kind])), variant.dtype, text


def evidence(variant: aot.Variant) -> Kernel:
    """Compile a variant and say what bounds it."""
    code = aot.compile_variant(variant)
    warps = variant.options["num_warps"]
    blocks, limit = residency(code.registers, warps, code.shared)
    found = Kernel(*label(variant), warps, code.registers, code.spilled, code.shared, blocks, limit)
    counted = work(variant)
    if counted is None:
        return found
    grid, flops, moved, least = counted
    arithmetic = "tf32" if variant.kernel == "combine" and variant.dtype in ("fp16", "bf16") else variant.dtype
    times = {"memory": least / MEMORY, f"{arithmetic} arithmetic": grid * flops / FLOPS[arithmetic]}
    bound = max(times, key=times.__getitem__)
    places = MULTIPROCESSORS * blocks
    in_flight = min(blocks, math.ceil(grid / MULTIPROCESSORS)) * _loaded_ahead(variant)
    more = dict(rank=variant.constants["RANK"], grid=grid, flops=flops, bytes=moved, floor=1e6 * times[bound])
    return Kernel(
        **asdict(found) | more | dict(bound=bound, in_flight=in_flight, tail=grid / (math.ceil(grid / places) * places))
    )


def page(kernels: list[Kernel]) -> str:
    layers, others = [k for k in kernels if k.rank], [k for k in kernels if not k.rank]
    titles = "kernel dtype rank configuration warps registers KiB blocks limit grid".split()
    titles += ["Mflop / block", "KiB / block", "flop / byte", "floor, us", "bound by", "KiB in flight", "places taken"]
    cells = [
        [k.kernel, k.dtype, str(k.rank), k.configuration, str(k.warps), str(k.registers), f"{k.shared / 1024:.0f}",
         str(k.blocks), k.limit, str(k.grid), f"{k.flops / 1e6:.2f}", f"{k.bytes / 1024:.0f}",
         f"{k.flops / k.bytes:.0f}", f"{k.floor:.0f}", k.bound, f"{k.in_flight / 1024:.0f}" if k.in_flight else "-",
         f"{100 * k.tail:.0f} %"]
        for k in layers
        if k.dtype != "bf16"
    ]  # fmt: skip
    rest = [
        [k.kernel, k.dtype, k.configuration, str(k.warps), str(k.registers), str(k.spilled), f"{k.shared / 1024:.0f}",
         str(k.blocks), k.limit]
        for k in others
    ]  # fmt: skip
    columns = "kernel dtype configuration warps registers spilled KiB blocks limit".split()
    return f"""# Kernels on an H200, from their machine code

Made by `python -m bench.kernels` with Triton {triton.__version__}, for `sm_90`; also as
`bench/results/{RESULTS.name}`. **Nothing here was measured**: no GPU has run these kernels. Registers (of a thread),
spilled bytes (of a thread) and shared memory (KiB of a block) are those of the machine code. Blocks are how many of
them a multiprocessor holds at a time, and the limit what allows no more.

## Layers

A layer {N} -> {M} on {ROWS} rows, at the full rank of each configuration; bfloat16 is as float16. Flops and bytes are
counted from the algorithm: those of a block go through the L2 cache; the floor is the time of the grid's flops, or of
the bytes that have to come from memory or go there once, at the rates of the data sheet (4.8 TB/s; 989, 494, 67 and
67 Tflop/s in half precision, tf32, fp32 and fp64). KiB in flight: what the pipelines of a multiprocessor's blocks have
asked for; to keep memory busy over a latency of 0.7 us it takes {MEMORY * LATENCY / MULTIPROCESSORS / 1024:.0f}. Places
taken: of all blocks that the multiprocessors could hold, in the mean over the waves of the grid.

{markdown(titles, cells)}
## Linear algebra and the step

{markdown(columns, rest)}"""


def defaults() -> list[aot.Variant]:
    """Return what is listed: of the layers' `chain` the forward of a linear layer."""
    return [v for v in aot.variants("sm_90") if v.default and v.kind in ("", "forward")]


def main() -> None:
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=get_context("spawn")) as pool:
        kernels = list(pool.map(evidence, defaults()))
    with RESULTS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, asdict(kernels[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(asdict, kernels))
    PAGE.write_text(page(kernels), encoding="utf-8")
    print(f"{RESULTS}\n{PAGE}")


if __name__ == "__main__":
    main()
