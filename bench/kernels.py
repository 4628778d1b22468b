"""What machine code says of the default kernels on an H200: `PYTHONPATH=tests python -m bench.kernels`, on a CPU.

It writes docs/results/kernels.md, and in bench/results kernels-sm_90.csv, a row for each kernel, and
launches-sm_90.csv, a row for each launch that was executed. Nothing in them was measured: registers and shared memory
are those of the machine code; bytes and flops are counted, by formulas that tests compare with execution, and while
executing.
"""

import csv
import math
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import triton

from condlr_ext._table import markdown

from . import aot, executed, h200

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "bench/results/kernels-sm_90.csv", ROOT / "docs/results/kernels.md"
LAUNCHES = ROOT / "bench/results/launches-sm_90.csv"
ROWS, N, M = 8192, 4096, 4096  # of the layer for which the products are counted
SMALL = 64, 128, 128  # of the one that is executed
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
    bytes: float | None = None  # that a block needs and writes, through the L2 cache
    executed: float | None = None  # flops of products, over `flops`, of a layer SMALL
    asked: float | None = None  # bytes that warps ask for, over `bytes`, of the same
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
        "registers": 4 * (h200.REGISTERS // 4 // of_warp) // warps,
        "shared memory": h200.SHARED // (shared + h200.RESERVED),
        "warps": min(h200.WARPS // warps, h200.BLOCKS),
    }
    limit = min(by, key=by.__getitem__)
    return by[limit], limit


def work(variant: aot.Variant, rows: int = ROWS, n: int = N, m: int = M) -> tuple[int, float, float, float] | None:
    """Return the grid, flops and bytes of a block in the mean, and the bytes that the launch has to touch.

    Of a layer n -> m on so many rows, of the rank of the configuration, whose blocks divide all of these; None for
    kernels that are not of a layer. Bytes of a block are what it needs, each once: several of its warps may ask for the
    same. Flops are those of the products.
    """
    c, r, size = variant.constants, variant.constants.get("RANK"), SIZES.get(variant.dtype)
    wide, bias = 8 if variant.dtype == "fp64" else 4, c.get("BIAS", False)
    if variant.kernel == "chain":
        block = c["BLOCK_B"]
        flops = 2 * block * r * (n * c["FIRST"] + r + m * c["LAST"])
        factors = (r * (n * c["FIRST"] + r + m * c["LAST"]) + m * bias) * size
        tiles = block * (n * c["FIRST"] + r + (m if c["LAST"] else r)) * size
        again = block * r * size if c["CORE"] < r and c["FIRST"] else 0  # P is read back
        grid = rows // block
        return grid, flops, factors + tiles + again, grid * tiles + factors
    if variant.kernel not in ("sums", "combine"):
        return None
    sums = next(v for v in aot.variants(variant.architecture) if _same_layer(v, variant))
    block, step = sums.constants["BLOCK_I"], sums.constants["BLOCK_B"]
    u_and_v, s_tiles = -(-m // block) + -(-n // block), -(-r // block)
    tiles = u_and_v + s_tiles
    splits = max(1, min(2 * h200.MULTIPROCESSORS // tiles, rows // (4 * step)))
    splits = -(-rows // (-(-rows // step // splits) * step))
    partial = splits * (tiles * block * r + m * bias) * wide
    if variant.kernel == "sums":
        ones = 16 * bias * (size == 2)  # columns of ones that sum a gradient beside its product
        moved = rows * (m + n + r + tiles * r) * size + partial
        flops = 2 * rows * tiles * block * (r + ones)
        grid, least = tiles * splits, rows * (m + n + 2 * r) * size + partial
    else:
        grid = tiles * block // c["BLOCK_I"]
        results = ((m + n + r) * r + m * bias) * size
        moved = partial + results + u_and_v * block // c["BLOCK_I"] * r * r * size
        flops = 2 * u_and_v * block * r * r
        least = partial + results + r * r * size
    return grid, flops / grid, moved / grid, least


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


def arithmetic(variant: aot.Variant) -> str:
    """Return the kind of the products of a kernel of a layer, as in `h200.FLOPS`."""
    if variant.kernel == "combine" and variant.dtype in ("fp16", "bf16"):
        return "tf32"
    return "fp64 tensor" if variant.dtype == "fp64" else variant.dtype


def repetition(variant: aot.Variant) -> tuple[float, float] | None:
    """Execute a kernel of a layer and return its flops and the bytes that it asks for, over those of `work`.

    Above 1, several warps compute the same product or ask for the same bytes. bfloat16 is executed as float16.
    """
    counted = work(variant, *SMALL)
    if counted is None:
        return None
    grid, flops, moved, _ = counted
    dtype = variant.dtype.replace("bf16", "fp16")
    found = next(x for x in executed.layer(dtype, *SMALL, variant.constants["RANK"]) if x.kernel == variant.kernel)
    assert math.prod(found.grid) == grid
    products = found.counts.flops[arithmetic(variant).replace("bf16", "fp16")]
    return products / (grid * flops), found.counts.asked / (grid * moved)


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
    kind = arithmetic(variant)
    times = {"memory": least / h200.MEMORY, f"{kind} arithmetic": grid * flops / h200.FLOPS[kind]}
    bound = max(times, key=times.__getitem__)
    places = h200.MULTIPROCESSORS * blocks
    in_flight = min(blocks, math.ceil(grid / h200.MULTIPROCESSORS)) * _loaded_ahead(variant)
    more = dict(rank=variant.constants["RANK"], grid=grid, flops=flops, bytes=moved, floor=1e6 * times[bound])
    more |= dict(zip(("executed", "asked"), repetition(variant), strict=True))
    return Kernel(
        **asdict(found) | more | dict(bound=bound, in_flight=in_flight, tail=grid / (math.ceil(grid / places) * places))
    )


def page(kernels: list[Kernel], launches: list[executed.Executed]) -> str:
    layers, others = [k for k in kernels if k.rank], [k for k in kernels if not k.rank]
    titles = "kernel dtype rank configuration warps registers KiB blocks limit grid".split()
    titles += ["Mflop / block", "executed", "KiB / block", "asked", "flop / byte", "floor, us", "bound by"]
    titles += ["KiB in flight", "places taken"]
    cells = [
        [k.kernel, k.dtype, str(k.rank), k.configuration, str(k.warps), str(k.registers), f"{k.shared / 1024:.0f}",
         str(k.blocks), k.limit, str(k.grid), f"{k.flops / 1e6:.2f}", f"{k.executed:.1f}", f"{k.bytes / 1024:.0f}",
         f"{k.asked:.1f}", f"{k.flops / k.bytes:.0f}", f"{k.floor:.0f}", k.bound,
         f"{k.in_flight / 1024:.0f}" if k.in_flight else "-", f"{100 * k.tail:.0f} %"]
        for k in layers
        if k.dtype != "bf16"
    ]  # fmt: skip
    rest = [
        [k.kernel, k.dtype, k.configuration, str(k.warps), str(k.registers), str(k.spilled), f"{k.shared / 1024:.0f}",
         str(k.blocks), k.limit]
        for k in others
    ]  # fmt: skip
    columns = "kernel dtype configuration warps registers spilled KiB blocks limit".split()
    done = [
        [x.problem, x.kernel, str(x.blocks), f"{x.fp32 / 1e6:.2f}", f"{x.fp64 / 1e6:.2f}", f"{x.fp64_tensor / 1e6:.2f}",
         f"{x.instructions / 1e3:.0f}", f"{x.asked / 1024:.0f}", f"{x.touched / 1024:.0f}", f"{x.floor:.1f}", x.bound]
        for x in launches
    ]  # fmt: skip
    heads = ["problem", "kernel", "blocks", "Mflop fp32", "fp64", "fp64 tensor", "thousand instructions"]
    heads += ["KiB asked", "KiB touched", "floor, us", "bound by"]
    small = "{} rows of {} -> {}".format(*SMALL)
    issued = h200.INSTRUCTIONS / 1e12
    in_flight = h200.MEMORY * h200.LATENCY / h200.MULTIPROCESSORS / 1024
    return f"""# Kernels on an H200, from their machine code

Made by `PYTHONPATH=tests python -m bench.kernels` with Triton {triton.__version__}, for `sm_90`; also as
`{RESULTS.name}` and `{LAUNCHES.name}` in `bench/results`. **Nothing here was measured**: no GPU has run these kernels.
Registers (of a thread), spilled bytes (of a thread) and shared memory (KiB of a block) are those of the machine code.
Blocks are how many of them a multiprocessor holds at a time, and the limit what allows no more.

## Layers

A layer {N} -> {M} on {ROWS} rows, at the full rank of each configuration; bfloat16 is as float16. Flops of products and
bytes are counted by formulas: those of a block go through the L2 cache; the floor is the time of the grid's flops, or
of the bytes that have to come from memory or go there once, at the rates of the data sheet (4.8 TB/s; 989, 494, 67 and
67 Tflop/s in half precision, tf32, fp32 and fp64). Executed and asked: flops of products and bytes that warps ask for,
counted while the kernels execute {small}, over those of the formulas; above 1, several warps compute the same, or ask
for the same, which the L1 cache may serve. KiB in flight: what the pipelines of a multiprocessor's blocks have asked
for; to keep memory busy over a latency of 0.7 us it takes {in_flight:.0f}. Places taken: of all blocks that the
multiprocessors could hold, in the mean over the waves of the grid.

{markdown(titles, cells)}
## Linear algebra and the step

{markdown(columns, rest)}
## Linear algebra and the step, executed

Each line is a launch, in float32, counted while it executes; launches that find nothing to do are left out.
Instructions are those of warps, in PTX. Touched is what has to come from memory, or go there, once. The floor is the
longest of the times of arithmetic (67, 34 and 67 Tflop/s) and of instructions ({issued:.2f} T/s), both on as many of
the {h200.MULTIPROCESSORS} multiprocessors as there are blocks, and of memory. What waits for the instruction before
it, or for another block, takes longer.

{markdown(heads, done)}"""


def defaults() -> list[aot.Variant]:
    """Return what is listed: of the layers' `chain` the forward of a linear layer."""
    return [v for v in aot.variants("sm_90") if v.default and v.kind in ("", "forward")]


def _write(path: Path, rows: Sequence) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, asdict(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(asdict, rows))


def main() -> None:
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=get_context("spawn")) as pool:
        problems = [pool.submit(executed.problem, name) for name in executed.PROBLEMS]
        kernels = list(pool.map(evidence, defaults()))
        launches = [launch for made in problems for launch in made.result()]
    _write(RESULTS, kernels)
    _write(LAUNCHES, launches)
    PAGE.write_text(page(kernels, launches), encoding="utf-8")
    print(f"{RESULTS}\n{LAUNCHES}\n{PAGE}")


if __name__ == "__main__":
    main()
