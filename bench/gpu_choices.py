"""Parts tune and table of the GPU benchmark: what the package's choices of configurations and of paths rest on."""

import datetime
import json
import random
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import triton

from bench.cases.layers import Conv, LayerProblem, Linear
from bench.machine import arithmetic, commit
from bench.registry import OURS, Provider, TimedCall
from bench.runner import attempt, judge, replayed
from bench.timing import interleave, quantiles
from condlr_ext.kernels.triton import architecture
from condlr_ext.kernels.triton.linear import configs, tuning
from condlr_ext.kernels.triton.linear import launch as layers

MEASURED = Path(__file__).resolve().parents[1] / "condlr_ext" / "ops" / "measured.json"
KERNELS = ("chain", "sums", "combine")
PATHS = {"triton": "ours: triton", "products": "reference", "merged": "ours: merged", "dense": "dense"}
COLUMNS = ("direction", "layer", "precision", "rows", "n", "m", "r", *PATHS)
PRECISIONS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "tf32": "tf32"}


def tune(
    device, dtypes: list[str], write: Callable, until: float, quick: bool = False, shapes: list[Linear] | None = None
) -> list[str]:
    """The kernels of a linear layer with every configuration, as "tune" records. "sums" and "combine" run together,
    after Q = G U. Returns what was left out when time.monotonic() was `until`; quick: few rows.
    """
    if shapes is None:
        shapes = [Linear(B, 4096, 4096, r) for r in (64, 128, 256, 16) for B in (8192, 512)]
    items = [(shape, name, kernel) for shape in shapes for name in dtypes for kernel in KERNELS]
    left = items[: 3 if quick else None]
    while left and time.monotonic() < until:
        record = tuned(device, *left.pop(0))
        write(record)
        default, *others = record["configs"]
        start = f"{record['row']:<36} {record['dtype']:<4} {record['kernel']:<8}"
        if "reason" in default:
            print(f"{start} the default fails: {default['reason']}")
            continue
        best = min((c for c in record["configs"] if "seconds" in c), key=lambda c: c["seconds"][1])
        ratio = default["seconds"][1] / best["seconds"][1]
        what = f"{ratio:.2f} x as fast: {best['config']}" if ratio > 1 else f"the best of {1 + len(others)}"
        print(f"{start} {default['seconds'][1] * 1e6:>9.1f} us, {what}")
    return [" ".join(map(str, item)) for item in left]


def tuned(device, shape: Linear, name: str, kernel: str) -> dict:
    """{"configs": [{"config", "error", "seconds": quantiles or "reason"}]}, the default first."""
    with arithmetic(name):
        problem = LayerProblem(shape, name, device)
        (x, U, S, V, bias), G = (t.detach() for t in problem.factors.tensors.values()), problem.factors.G
        P, mask = x @ V, [False, True, True, True, True]
        names = ["Y"] if kernel == "chain" else ["dU", "dS", "dV", "db"]

        def compute() -> tuple:
            if kernel == "chain":
                return layers.low_rank_linear(x, U, S, V, bias)[:1]
            return layers.low_rank_linear_backward(G, x, P, U, S, V, mask)[1:]

        rank, rounding = triton.next_power_of_2(max(shape.r, 16)), layers.precision(G.dtype)
        found, replays = [], {}
        for i, config in enumerate(configs.of(kernel, architecture(G.device), G.dtype, rank, rounding)):
            call = TimedCall(partial(run_with, kernel, config, compute), partial(problem.factors.errors, names))
            provider = Provider({"call": call}, problem.limits, OURS)
            found.append({"config": str(config)} | judge(device, provider, call))
            if "reason" in found[i]:
                continue
            # replayed: launches would hide what differs
            captured = attempt(device, partial(device.graph, call), found[i], "reason")
            if captured:
                found[i] |= judge(device, provider, call, partial(replayed, *captured))
                if "reason" not in found[i]:
                    replays[i] = TimedCall(captured[0], call.errors)
        for i, seconds in timed(device, replays).items():
            found[i]["seconds"] = seconds
    return {"kind": "tune", "row": str(shape), "dtype": name, "kernel": kernel, "configs": found}


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


def timed(device, calls: dict, seconds: float = 0.15, rounds: int = 15) -> dict:
    """Quantiles of the seconds of each call that does not fail, taken in turn, with cold caches."""
    samples = interleave(device, list(calls.values()), [1.0] * len(calls), seconds, rounds, cold=True, failed={})
    return {key: quantiles(s) for key, s in zip(calls, samples, strict=True) if s}


def table(
    device,
    dtypes: list[str],
    write: Callable,
    until: float,
    quick: bool = False,
    file: Path | None = None,
    shapes: list[Linear | Conv] | None = None,
) -> list[str]:
    """Each direction by each path over a grid of sizes as "choice" records, in microseconds (null: cannot serve, or is
    wrong), "conv" for 3x3 convolutions. They are put into the file (MEASURED is the one that ships) in place of this
    device's. Returns and takes what tune does.
    """
    if shapes is None:
        sizes = [(n, m, r) for n in (256, 1024, 4096) for m in (256, 1024, 4096) for r in (8, 32, 128, 512)]
        sizes = [(n, m, r) for n, m, r in sizes if r <= min(n, m)]
        shapes = [Linear(rows, *size) for size in sizes for rows in (1, 16, 256, 4096, 32768)]
        sizes = [(c, m, r) for c in (64, 256) for m in (64, 256, 512) for r in (13, 32, 128) if r <= m]
        shapes += [Conv(images, c, m, 16, 3, 1, 1, r) for c, m, r in sizes for images in (1, 16, 128)]
    items = [(shape, name) for shape in shapes for name in dtypes if name in PRECISIONS]
    random.Random(0).shuffle(items)  # what is left out for lack of time is spread over all sizes
    rows, left = [], items[: 6 if quick else None]
    while left and time.monotonic() < until:
        for record in choices(device, *left.pop(0)):
            write(record)
            rows.append([record[column] for column in COLUMNS])
    rows.sort(key=lambda row: row[:7])
    print(*COLUMNS, sep="\t")
    print(*("\t".join(map(str, row)) for row in rows), sep="\n")
    if file is not None:
        enter(file, device, rows)
    return [" ".join(map(str, item)) for item in left]


def choices(device, shape: Linear | Conv, name: str) -> list[dict]:
    """A record of each direction; "reasons": by path, why it has no time."""
    torch._dynamo.reset()
    layer = "linear" if isinstance(shape, Linear) else "conv"
    size = {"layer": layer, "precision": PRECISIONS[name], "rows": shape.rows, "n": shape.n, "m": shape.m, "r": shape.r}
    with arithmetic(name):
        problem, found = LayerProblem(shape, name, device), []
        providers = {path: problem.providers[provider]() for path, provider in PATHS.items()}
        for direction in ("forward", "backward"):
            judged = {path: judge(device, p, p.calls[direction]) for path, p in providers.items()}
            reasons = {path: judgement["reason"] for path, judgement in judged.items() if "reason" in judgement}
            times = timed(device, {path: p.calls[direction] for path, p in providers.items() if path not in reasons})
            columns = {path: round(times[path][1] * 1e6, 2) if path in times else None for path in PATHS}
            found.append({"kind": "choice", "direction": direction} | size | columns | {"reasons": reasons})
    return found


def enter(file: Path, device, rows: list[list]) -> None:
    """One line per row, so that differences between two versions of the file can be read."""
    machine = device.describe()
    entry = {"device": machine["device"], "capability": machine["capability"]}
    entry |= {"torch": torch.__version__, "triton": triton.__version__}
    entry |= {"date": datetime.date.today().isoformat(), "commit": commit(), "columns": COLUMNS, "rows": rows}
    tables = json.loads(file.read_text())["tables"] if file.exists() else []
    tables = [t for t in tables if t["device"] != entry["device"]] + [entry]
    text = json.dumps({"format": 1, "tables": tables}, indent=1)
    file.write_text(re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text) + "\n")
    print(f"written: {file}")
