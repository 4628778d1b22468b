"""Factorised or merged: the choice of the cost model against the clock: python bench/routes.py [--json FILE]

Forward and backward of single layers by both routes and by the dense layer, timed in turn in one process (medians),
channels_last. "predicted" is what ops.routes says, "measured" the faster route, "regret" how much slower the choice is
than that; the gains are dense time / time.
"""

import argparse
import datetime
import json
import math
import statistics
import subprocess
import time

import torch
import torch.nn.functional as F

from condlr_ext import functional, ops
from condlr_ext.info import collect

# C_in, C_out, pixels a side, kernel, stride, padding; of a network's first layer no gradient of the input is asked
CONVS = {
    "VGG16": [
        (3, 64, 32, 3, 1, 1), (64, 64, 32, 3, 1, 1), (64, 128, 16, 3, 1, 1), (128, 128, 16, 3, 1, 1),
        (128, 256, 8, 3, 1, 1), (256, 256, 8, 3, 1, 1), (256, 512, 4, 3, 1, 1), (512, 512, 4, 3, 1, 1),
        (512, 512, 2, 3, 1, 1),
    ],
    "WRN16-4": [
        (3, 16, 32, 3, 1, 1), (16, 64, 32, 3, 1, 1), (16, 64, 32, 1, 1, 0), (64, 64, 32, 3, 1, 1),
        (64, 128, 32, 3, 2, 1), (64, 128, 32, 1, 2, 0), (128, 128, 16, 3, 1, 1), (128, 256, 16, 3, 2, 1),
        (128, 256, 16, 1, 2, 0), (256, 256, 8, 3, 1, 1),
    ],
    "LeNet5": [(1, 20, 28, 5, 1, 0), (20, 50, 12, 5, 1, 0)],
}  # fmt: skip
LINEARS = {  # n, m, rows for one sample
    "VGG16": [(512, 512, 1)],
    "LeNet5": [(800, 500, 1)],
    "MLP": [(64, 256, 1), (256, 256, 1), (784, 1024, 1)],
    "transformer": [(384, 384, 64), (384, 1536, 64), (1536, 384, 64)],
}
RANKS = (0.05, 0.2, 0.5, 1.0)


def cases(networks, batches):
    """name, tensors (input, U, S, V, bias), arguments of the convolution or None."""
    for network in networks:
        for first, (c, m, side, k, stride, padding) in enumerate(CONVS.get(network, ())):
            for batch in batches:
                x = torch.randn(batch, c, side, side).to(memory_format=torch.channels_last)
                geometry = {"stride": stride, "padding": padding}
                yield f"{network} {c}->{m} {k}x{k}/{stride} @{side} B{batch}", x, m, c * k * k, first > 0, k, geometry
        for first, (n, m, rows) in enumerate(LINEARS.get(network, ())):
            for batch in batches:
                x = torch.randn(batch * rows, n)
                yield f"{network} {n}->{m} rows {batch * rows}", x, m, n, first > 0 or network != "MLP", None, {}


def runs(x, m, n, rank, input_grad, k, geometry):
    """{route: function that runs forward and backward once}, and the plan."""
    r = max(1, math.ceil(rank * min(m, n) - 1e-9))
    U, V = (torch.linalg.qr(torch.randn(size, r))[0].contiguous().requires_grad_() for size in (m, n))
    S, bias = torch.eye(r).requires_grad_(), torch.zeros(m, requires_grad=True)
    W = (U @ S @ V.mT).detach()
    if k:
        W = W.reshape(m, -1, k, k).to(memory_format=torch.channels_last)
    leaves = [x.requires_grad_(input_grad), U, S, V, bias, W.requires_grad_()]

    def forward(route):
        if k is None:
            if route == "dense":
                return F.linear(x, W, bias)
            return functional.low_rank_linear(x, U, S, V, bias, route=route)
        if route == "dense":
            return F.conv2d(x, W, bias, **geometry)
        return functional.low_rank_conv2d(x, U, S, V, bias, kernel_size=k, route=route, **geometry)

    G = torch.randn_like(forward("dense"))

    def run(route):
        for leaf in leaves:
            leaf.grad = None
        forward(route).backward(G)

    if k is None:
        plan = ops.routes.linear(x, U, S, V, bias)
    else:
        d = [[geometry["stride"]] * 2, [geometry["padding"]] * 2, [1, 1]]
        plan = ops.routes.conv(x, U, S, V, bias, [k, k], *d, 1)
    return r, plan, {route: lambda route=route: run(route) for route in ("factorised", "merged", "dense")}


def medians(calls, seconds: float) -> dict[str, float]:
    """Seconds of each call; they take turns until the time is over, at least three rounds."""
    for call in calls.values():
        call()
    times = {name: [] for name in calls}
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(times["dense"]) < 3:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def measure(networks, batches, ranks, seconds) -> list[dict]:
    rows = []
    for name, x, m, n, input_grad, k, geometry in cases(networks, batches):
        for rank in ranks:
            r, plan, calls = runs(x, m, n, rank, input_grad, k, geometry)
            t = medians(calls, seconds)
            best = min(t["factorised"], t["merged"])
            rows.append(
                {
                    "layer": name,
                    "rank": r,
                    "seconds": t,
                    "predicted": plan.route,
                    "measured": "factorised" if t["factorised"] == best else "merged",
                    "regret": t[plan.route] / best - 1,
                    "predicted_gain": plan.gain,
                    "gain": t["dense"] / t[plan.route],
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=list(CONVS | LINEARS), choices=list(CONVS | LINEARS))
    parser.add_argument("--batches", nargs="+", type=int, default=[32])
    parser.add_argument("--ranks", nargs="+", type=float, default=RANKS, help="fractions of min(m, n)")
    parser.add_argument("--seconds", type=float, default=0.2, help="of measurement per layer and rank")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--json", help="also write the rows with machine, versions, commit and date to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows = measure(options.networks, options.batches, options.ranks, options.seconds)
    print(f"{'layer':<36} {'rank':>4} {'factorised':>11} {'merged':>11} {'dense':>11} {'predicted':>11} regret   gain")
    for row in rows:
        times = " ".join(f"{1e3 * row['seconds'][name]:>8.3f} ms" for name in ("factorised", "merged", "dense"))
        gain = f"{row['gain']:.2f} ({row['predicted_gain']:.2f})"
        print(f"{row['layer']:<36} {row['rank']:>4} {times} {row['predicted']:>11} {row['regret']:>6.0%} {gain}")
    wrong = [row["regret"] for row in rows if row["regret"] > 0]
    right = 1 - len(wrong) / len(rows)
    print(f"{right:.0%} of {len(rows)} choices are the faster route; regret: worst {max(wrong, default=0):.0%}, mean "
          f"{sum(wrong) / len(rows):.1%}; a gain is dense time / time, measured (predicted)")  # fmt: skip
    if options.json:
        describe = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip()
        data = collect()
        machine = {key: data[key] for key in ("versions", "build", "isa", "cpu_features", "threads")}
        record = {"date": datetime.date.today().isoformat(), "commit": commit, "machine": machine, "rows": rows}
        with open(options.json, "w") as file:
            json.dump(record, file, indent=1)


if __name__ == "__main__":
    main()
