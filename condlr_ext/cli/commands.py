"""Subcommands of `condlr`; the experiments and their packages load only when needed."""

import json
import sys
from argparse import Namespace
from pathlib import Path

from .. import _table


def train(arguments: Namespace) -> None:
    from ..experiments import report, study
    from ..experiments.config import TrainConfig

    given = {name: value for name in TrainConfig.model_fields if (value := getattr(arguments, name)) is not None}
    config = TrainConfig.read(Path(arguments.config), **given) if arguments.config else TrainConfig(**given)
    results = study.train(config, progress=True)
    print(_table.text(*report.summary(results)))
    print(f"{results['seconds']:.0f} s; results.csv, table.md, figures and checkpoints are in {config.out}")


def evaluate(arguments: Namespace) -> None:
    from ..experiments.checkpoint import evaluate_checkpoint
    from ..experiments.progress import Progress
    from ..robustness import KNOWN_ATTACKS

    changes = {
        "eps": arguments.eps, "attacks": arguments.attacks, "steps": arguments.attack_steps,
        "restarts": arguments.attack_restarts, "samples": arguments.attack_samples,
    }  # fmt: skip
    changes = {name: value for name, value in changes.items() if value is not None}
    where = {"data": arguments.data, "folder": arguments.folder, "device": arguments.device}
    with Progress(None, shown=bool(sys.stderr and sys.stderr.isatty())) as bar:
        result = evaluate_checkpoint(Path(arguments.checkpoint), **where, **changes, progress=bar.attack)
    if arguments.json:
        print(json.dumps(result))
        return
    attacks = [name for name in (*KNOWN_ATTACKS, "worst") if name in result]
    rows = [["0 (clean)"] + [f"{100 * result['clean']:.2f}"] * len(attacks)]
    for i, e in enumerate(result["eps"]):
        rows.append([f"{e:g}"] + [f"{100 * result[name][i]:.2f}" for name in attacks])
    some = f"{result['n']} of {result['of']}" if "of" in result else result["n"]
    print(f"{result['run']} on {some} test samples of {result['data']}, accuracy in %")
    print(_table.text(["eps", *attacks], rows))
    saturated, zero, tiny = (f"{100 * result[name]:.2f} %" for name in ("saturated", "zero_gradient", "tiny_gradient"))
    print(f"softmax = 1: {saturated}; input gradient 0: {zero}, below 1e-10: {tiny}")
    print("\n".join(["looks masked:", *result["flags"]]) if result["flags"] else "no sign of masked gradients")


def inspect(arguments: Namespace) -> None:
    from ..experiments import report
    from ..experiments.checkpoint import inspect_checkpoint

    result = inspect_checkpoint(Path(arguments.checkpoint), arguments.batch_size)
    if arguments.json:
        print(json.dumps(result))
        return
    rows = [
        [
            layer["name"], f"{layer['m']} x {layer['n']}", str(layer["rank"]), str(layer["weights"]),
            report.number(layer["kappa"], ".7g"), f"{layer['sigma_max']:.4g}", f"{layer['sigma_min']:.4g}",
            report.number(layer["orthonormality"], ".1e"), layer["route"] or "-", report.number(layer["gain"], ".2f"),
        ]
        for layer in result["layers"]
    ]  # fmt: skip
    metadata = result["metadata"]
    print(f"{metadata['run']}, {metadata['data']}, seed {metadata['seed']}, condlr_ext {metadata['condlr_ext']}")
    titles = ["layer", "weight", "rank", "weights", "κ", "σ max", "σ min", "‖UᵀU−I‖", "route", "gain"]
    print(_table.text(titles, rows))
    print(
        f"route and gain: what a layer runs in training on batches of {result['batch_size']}, and the cost model's"
        " estimate of the dense layer's time over its own"
    )


def info(arguments: Namespace) -> None:
    from .. import info as information

    print(json.dumps(information.collect()) if arguments.json else information.report())
