"""Trains every run from the same dense weights in the same batch order, attacks it and writes the results."""

import copy
import math
import platform
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import condlr_ext

from ..errors import NonFiniteError
from ..ops import current_backend
from ..optim import CondLRSGD
from ..robustness import ATTACKS, evaluate
from . import report
from .checkpoint import save_checkpoint
from .config import RunSpec, TrainConfig
from .data import Split, load
from .extras import require
from .files import make_folder
from .models import compress, mlp, weight_count
from .monitor import Monitor

LR_DROP = 0.3
ATTACK_BATCH = 1024  # samples attacked at a time, times the number of budgets
DROP_AT = (0.58, 0.83)  # of the epochs, the schedule of the CondLR paper


def train(config: TrainConfig, progress: bool = False) -> dict:
    """Train all runs of config, attack each on the test set, write the results to config.out.

    Files: results.json (every number), results.png, table.md, one <run>.safetensors per run; each is whole or
    not there. A run whose loss or weights stop being finite has status "diverged", no attacks, no checkpoint;
    one that ends with the same class for every training sample, as a spike of the loss can leave it, is
    "collapsed".

    Args:
        config: the settings.
        progress: whether to show a bar on stderr.

    Returns:
        dict: what results.json holds, with None (null) for non-finite numbers.

    Raises:
        ValueError: bad settings or data; ImportError: a missing extra package; OSError: an unwritable folder.
    """
    for module in ("safetensors", "matplotlib", "rich"):  # before an hour of training, not after
        require(module)
    split = load(config.data, config.seed)
    start = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        initial = mlp(split.x_train.shape[1], split.classes)
    prepared = [_prepare(spec, initial) for spec in config.runs]  # a rank that does not fit fails here
    make_folder(config.out)
    records = []
    interval = 0.1 if sys.stderr.isatty() else 10  # seconds: a log file gets few lines
    total = len(config.runs) * config.epochs
    bar = require("tqdm").tqdm(total=total, unit="epoch", disable=not progress, mininterval=interval)
    with bar:
        for done, (spec, (model, record)) in enumerate(zip(config.runs, prepared, strict=True), start=1):
            bar.set_description(f"{spec.label} ({done}/{len(config.runs)})")
            record |= fit(model, spec, config, split, bar.update)
            if record["status"] != "diverged":
                try:
                    record |= _attack_and_save(model, record, config, split)
                except NonFiniteError:  # finite on the training set, but so large that its gradients are not
                    record["status"] = "diverged"
            if record["status"] == "diverged":  # not to be mistaken for this run's
                (config.out / _checkpoint_name(record["run"])).unlink(missing_ok=True)
            records.append(record)
            bar.update(done * config.epochs - bar.n)  # what a diverged run left out
    results = _finite(
        {
            "config": {
                "data": config.data, "epochs": config.epochs, "batch_size": config.batch_size,
                "lr": config.lr, "momentum": config.momentum, "seed": config.seed, "eps": list(config.eps),
                "attack_steps": config.attack_steps, "runs": [str(run) for run in config.runs],
            },
            "data": {
                "train": len(split.y_train), "test": len(split.y_test), "features": split.x_train.shape[1],
                "classes": split.classes,
            },
            "versions": _versions(),
            "backend": current_backend(),
            "threads": torch.get_num_threads(),
            "seconds": time.perf_counter() - start,
            "runs": records,
        }
    )  # fmt: skip
    report.write(results, config.out)
    return results


def _prepare(spec: RunSpec, initial: nn.Module) -> tuple[nn.Module, dict]:
    """The network of one run at its start, and what is known of it so far."""
    model = copy.deepcopy(initial)
    with torch.random.fork_rng(devices=[]):
        ranks = compress(model, spec.method, **spec.sizing)
    stored, dense = (sum(weight_count(m.get_submodule(name)) for name in ranks) for m in (model, initial))
    return model, {
        "run": str(spec),
        "label": spec.label,
        "method": spec.method,
        "tau": spec.tau,
        "ranks": ranks,
        "parameters": sum(p.numel() for p in model.parameters()),
        "kept": stored / dense if ranks else 1.0,
    }


def _attack_and_save(model: nn.Module, record: dict, config: TrainConfig, split: Split) -> dict:
    attacks = [name for name in ATTACKS if split.classes >= 3 or name != "pgd-dlr"]  # DLR needs three classes
    settings = {
        "eps": list(config.eps),
        "attacks": attacks,
        "steps": config.attack_steps,
        "seed": config.seed,
        "batch_size": ATTACK_BATCH,
    }
    robustness = evaluate(model, split.x_test, split.y_test, **settings)
    name = _checkpoint_name(record["run"])
    metadata = {
        "run": record["run"], "ranks": record["ranks"], "tau": record["tau"], "data": config.data,
        "seed": config.seed, "attack": settings,
    }  # fmt: skip
    save_checkpoint(config.out / name, model, metadata)
    return {"robustness": robustness, "checkpoint": name}


def _checkpoint_name(run: str) -> str:
    return f"{run.translate(str.maketrans(':,', '--', '='))}.safetensors"


def fit(model: nn.Module, spec: RunSpec, config: TrainConfig, split: Split, tick: Callable = lambda: None) -> dict:
    """Train the model in place; tick is called after each epoch.

    Returns:
        dict: step_loss and loss (per epoch, mean over samples), kappa and dense_kappa (see Monitor) and their
        maximum, orthonormality,
        seconds_per_epoch (steps only, the monitoring excluded), status ("trained", "diverged", "collapsed"),
        and for condlr the number of layer updates the optimiser skipped.
    """
    lr = config.lr if spec.lr is None else spec.lr
    if spec.method == "condlr":
        options = {"tau": spec.tau, "sigma_max": spec.sigma_max, "band": spec.band or "rms"}
        optimizer = CondLRSGD(model, lr, momentum=config.momentum, **options)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr, momentum=config.momentum)
    milestones = [round(share * config.epochs) for share in DROP_AT]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, LR_DROP)
    order = torch.Generator().manual_seed(config.seed)
    monitor = Monitor(model)
    monitor.record()
    step_loss, epoch_loss, seconds, value = [], [], [], 0.0
    for _ in range(config.epochs):
        spent = total = 0.0
        for index in torch.randperm(len(split.y_train), generator=order).split(config.batch_size):
            began = time.perf_counter()
            loss = F.cross_entropy(model(split.x_train[index]), split.y_train[index])
            optimizer.zero_grad()
            loss.backward()
            value = loss.item()
            if not math.isfinite(value):
                break
            optimizer.step()
            spent += time.perf_counter() - began
            step_loss.append(value)
            total += value * len(index)
            monitor.record()
        monitor.flush()
        if not math.isfinite(value):
            break
        schedule.step()
        seconds.append(spent)
        epoch_loss.append(total / len(split.y_train))
        tick()
    return {
        "status": _status(model, split.x_train, value),
        "loss": epoch_loss,
        "step_loss": step_loss,
        "kappa": monitor.kappa,
        "dense_kappa": monitor.dense_kappa,
        "max_kappa": monitor.max_kappa,
        "orthonormality": monitor.orthonormality,
        "skipped": int(optimizer.skipped.sum()) if spec.method == "condlr" else None,
        "seconds_per_epoch": sum(seconds) / len(seconds) if seconds else None,
    }


def _status(model: nn.Module, x: Tensor, last_loss: float) -> str:
    with torch.no_grad():
        logits = model(x)
    if not (math.isfinite(last_loss) and torch.isfinite(logits).all()):
        return "diverged"
    return "collapsed" if len(logits.argmax(1).unique()) == 1 else "trained"


def _versions() -> dict[str, str]:
    return {
        "condlr_ext": condlr_ext.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "scikit-learn": require("sklearn").__version__,
        "python": platform.python_version(),
    }


def _finite(value):
    """JSON has no NaN and no Inf: they become None."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
