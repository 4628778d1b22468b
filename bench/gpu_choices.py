"""Parts tune and table of the GPU benchmark: what the package's choices of configurations and of paths rest on."""

import datetime
import json
import random
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import triton
from gpu_device import arithmetic
from gpu_layers import Conv, Linear, Problem, attempt, measure, timed
from timing import Case

from condlr_ext.kernels.triton import architecture, configs, layers, tuning

MEASURED = Path(__file__).resolve().parents[1] / "condlr_ext" / "ops" / "measured.json"
PATHS = ("triton", "products", "merged", "dense")
COLUMNS = ("direction", "layer", "precision", "rows", "n", "m", "r", *PATHS)
PRECISIONS = {"bf16": "bfloat16", "fp32": "float32", "tf32": "tf32"}


def tune(run, shapes: list[Linear] | None = None) -> None:
    """The kernels of a linear layer with every configuration. "sums" and "combine" run together, after Q = G U."""
    if shapes is None:
        shapes = [Linear(B, 4096, 4096, r) for r in (64, 128, 256, 16) for B in (8192, 512)]
    kernels = ("chain", "sums", "combine")
    items = [(shape, name, kernel) for shape in shapes for name in run.options.dtypes for kernel in kernels]
    for shape, name, kernel in run.within(items[: 3 if run.options.quick else None]):
        row = run.add(tuned(run, shape, name, kernel))
        default, *others = row["configs"]
        start = f"{row['row']:<36} {name:<4} {kernel:<8}"
        if "reason" in default:
            print(f"{start} the default fails: {default['reason']}")
            continue
        best = min((c for c in row["configs"] if "seconds" in c), key=lambda c: c["seconds"][1])
        ratio = default["seconds"][1] / best["seconds"][1]
        what = f"{ratio:.2f} x as fast: {best['config']}" if ratio > 1 else f"the best of {1 + len(others)}"
        print(f"{start} {default['seconds'][1] * 1e6:>9.1f} us, {what}")


def tuned(run, shape: Linear, name: str, kernel: str) -> dict:
    """{"configs": [{"config", "error", "seconds": quantiles or "reason"}]}, the default first."""
    with arithmetic(name):
        problem = Problem(shape, name, run.device)
        x, U, S, V, bias, G = problem.x, problem.U, problem.S, problem.V, problem.bias, problem.G
        P, mask = x @ V, [False, True, True, True, True]

        def call() -> dict:
            if kernel == "chain":
                return {"Y": layers.low_rank_linear(x, U, S, V, bias)[0]}
            gradients = layers.low_rank_linear_backward(G, x, P, U, S, V, mask)
            return dict(zip(("dU", "dS", "dV", "db"), gradients[1:], strict=True))

        rank, rounding = triton.next_power_of_2(max(shape.r, 16)), layers.precision(G.dtype)

        def exact() -> dict:
            return {key: problem.exact[key] for key in (("Y",) if kernel == "chain" else ("dU", "dS", "dV", "db"))}

        found, cases = [], {}
        for i, config in enumerate(configs.of(kernel, architecture(G.device), G.dtype, rank, rounding)):
            launch = partial(run_with, kernel, config, call)
            found.append({"config": str(config)} | problem.judge(launch, exact))
            if "reason" not in found[i]:
                # replayed: launches would hide what differs
                replay = attempt(run.device, partial(run.device.graph, launch), found[i], "reason")
                if replay:
                    cases[i] = Case(replay, float, 0)
        for i, seconds in timed(run.device, cases).items():
            found[i]["seconds"] = seconds
    return {"row": str(shape), "dtype": name, "kernel": kernel, "configs": found}


def run_with(kernel: str, config: triton.Config, call: Callable):
    """call() while the kernel has this configuration alone, the others their default, and nothing is remembered."""
    listed = configs.of
    configs.of = lambda name, *args: [config] if name == kernel else listed(name, *args)[:1]
    tuning._chosen.clear()
    try:
        return call()
    finally:
        configs.of = listed
        tuning._chosen.clear()


def table(run, shapes: list[Linear | Conv] | None = None, file: Path = MEASURED) -> None:
    """Each direction by each path over a grid of sizes, in microseconds (null: cannot serve, or is wrong), "conv" for
    3x3 convolutions. --write puts the rows into the file in place of this device's.
    """
    if shapes is None:
        sizes = [(n, m, r) for n in (256, 1024, 4096) for m in (256, 1024, 4096) for r in (8, 32, 128, 512)]
        sizes = [(n, m, r) for n, m, r in sizes if r <= min(n, m)]
        shapes = [Linear(rows, *size) for size in sizes for rows in (1, 16, 256, 4096, 32768)]
        sizes = [(c, m, r) for c in (64, 256) for m in (64, 256, 512) for r in (13, 32, 128) if r <= m]
        shapes += [Conv(images, c, m, 16, 3, 1, 1, r) for c, m, r in sizes for images in (1, 16, 128)]
    items = [(shape, name) for shape in shapes for name in run.options.dtypes]
    random.Random(0).shuffle(items)  # what is left out for lack of time is spread over all sizes
    rows, directions = [], ("forward", "backward")
    for shape, name in run.within(items[: 6 if run.options.quick else None]):
        found = run.add(measure(run, shape, name, PATHS, directions))["providers"]
        layer = "linear" if isinstance(shape, Linear) else "conv"
        for direction in directions:
            times = [round(found[p][direction][1] * 1e6, 2) if direction in found[p] else None for p in PATHS]
            rows.append([direction, layer, PRECISIONS[name], shape.rows, shape.n, shape.m, shape.r, *times])
    machine = run.record["machine"]
    entry = {key: machine[key] for key in ("device", "capability", "torch", "triton")}
    entry |= {"date": datetime.date.today().isoformat(), "commit": run.record["commit"], "columns": COLUMNS}
    entry["rows"] = sorted(rows, key=lambda row: row[:7])
    print(*COLUMNS, sep="\t")
    print(*("\t".join(map(str, row)) for row in entry["rows"]), sep="\n")
    if run.options.write:
        write(file, entry)


def write(file: Path, entry: dict) -> None:
    """One line per row, so that differences between two versions of the file can be read."""
    tables = json.loads(file.read_text())["tables"] if file.exists() else []
    tables = [t for t in tables if t["device"] != entry["device"]] + [entry]
    text = json.dumps({"format": 1, "tables": tables}, indent=1)
    file.write_text(re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text) + "\n")
    print(f"written: {file}")
