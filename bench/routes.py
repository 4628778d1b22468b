"""Factorized or merged: the choice of the cost model against the clock: python bench/routes.py [--json FILE]

Forward and backward of single layers by both routes and by the dense layer, each verified, then timed in turn, warm,
channels_last; medians. "predicted" is what ops.cost_model_cpu says, "regret" how much slower the choice is than the
faster route; the gains are dense time / time.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.cases.layers import CONVS, LINEARS, Conv, LayerProblem, Linear, plan_record, rank
from bench.machine import Cpu, header
from bench.records import Writer
from bench.registry import Operation, Row, Selection
from bench.runner import Options, run

PROVIDERS = {"factorized": "ours: cpu", "merged": "ours: merged", "dense": "dense"}
RANKS = (0.05, 0.2, 0.5, 1.0)


@dataclass(frozen=True)
class Layer:
    """Of a network's first layer no gradient of the input is asked."""

    network: str
    layer: Linear | Conv
    input_gradient: bool

    def __str__(self) -> str:
        return f"{self.network} {self.layer}"


def layers(networks: list[str], batches: list[int], ranks: list[float]) -> Iterator[Layer]:
    for network in networks:
        for i, layer in enumerate(CONVS.get(network, ())):
            c, m, _, k, _, _ = layer
            for batch in batches:
                for fraction in ranks:
                    yield Layer(network, Conv(batch, *layer, rank(fraction, m, c * k * k)), i > 0)
        for i, (n, m, rows) in enumerate(LINEARS.get(network, ())):
            for batch in batches:
                for fraction in ranks:
                    shape = Linear(batch * rows, n, m, rank(fraction, m, n))
                    yield Layer(network, shape, i > 0 or network != "MLP")


def problem(shape: Layer, dtype: str, device) -> LayerProblem:
    made = LayerProblem(shape.layer, dtype, device, shape.input_gradient)
    made.providers = {name: made.providers[name] for name in PROVIDERS.values()}
    return made


def plans(row: Row, device) -> list[dict]:
    return [plan_record(row, problem(row.shape, row.dtype, device))]


def operation(shapes: Iterator[Layer]) -> Operation:
    return Operation(
        "routes",
        "both routes of single layers, and the dense layer",
        problem,
        lambda size, device: list(dict.fromkeys(shapes)),  # two fractions may be the same rank
        modes=("both",),
        extra=plans,
    )


def compared(records: list[dict]) -> list[dict]:
    """What the clock says of each plan. A row of which a provider has no time is left out."""
    times = {}
    for r in records:
        if r["kind"] == "time" and r["seconds"]:
            times.setdefault(r["row"], {})[r["provider"]] = r["seconds"][1]
    rows = []
    for plan in (r for r in records if r["kind"] == "plan"):
        t = {route: times.get(plan["row"], {}).get(name) for route, name in PROVIDERS.items()}
        if all(t.values()):
            best, mine = min(t["factorized"], t["merged"]), t[plan["route"]]
            rows.append(plan | {"seconds": t, "regret": mine / best - 1, "measured gain": t["dense"] / mine})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=list(CONVS | LINEARS), choices=list(CONVS | LINEARS))
    parser.add_argument("--batches", nargs="+", type=int, default=[32])
    parser.add_argument("--ranks", nargs="+", type=float, default=RANKS, help="fractions of min(m, n)")
    parser.add_argument("--seconds", type=float, default=0.2, help="of each way, per layer and rank")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--json", type=Path, help="also write machine, times and plans to this file, one record a line")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device, records = Cpu(), []
    keep = [records.append] + ([Writer(options.json)] if options.json else [])

    def write(record: dict) -> None:
        for function in keep:
            function(record)

    write(header(device, sys.argv[1:]))
    shapes = layers(options.networks, options.batches, options.ranks)
    run(Selection().rows([operation(shapes)], device), device, Options(seconds=options.seconds), write)
    for record in records:
        if "reason" in record:
            print(f"left out: {record['row']}, {record.get('provider', 'plan')}: {record['reason']}")
    show(compared(records))


def show(rows: list[dict]) -> None:
    print(f"{'layer':<48} {'factorized':>11} {'merged':>11} {'dense':>11} {'predicted':>11} regret   gain")
    for row in rows:
        times = " ".join(f"{1e3 * row['seconds'][name]:>8.3f} ms" for name in PROVIDERS)
        gain = f"{row['measured gain']:.2f} ({row['gain']:.2f})"
        print(f"{row['row']:<48} {times} {row['route']:>11} {row['regret']:>6.0%} {gain}")
    if not rows:
        return
    wrong = [row["regret"] for row in rows if row["regret"] > 0]
    right = 1 - len(wrong) / len(rows)
    print(f"{right:.0%} of {len(rows)} choices are the faster route; regret: worst {max(wrong, default=0):.0%}, mean "
          f"{sum(wrong) / len(rows):.1%}; a gain is dense time / time, measured (predicted)")  # fmt: skip


if __name__ == "__main__":
    main()
