"""Trains every run from the same dense weights in the same batch order, attacks it and writes the results."""

import copy
import json
import math
import platform
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn

import condlr_ext

from ..errors import CheckpointError, NonFiniteError
from ..factorize import factorize
from ..io import checkpoint
from ..ops import current_backend
from ..robustness import ATTACKS, evaluate
from ..robustness.evaluation import check_classes, classes_needed
from . import methods, report
from .checkpoint import save_checkpoint
from .config import TrainConfig, check_device
from .data import Split, load
from .extras import require
from .files import make_folder, write_whole
from .inspect_layers import dense_layers, weight_count
from .networks import build
from .trainer import Fit

ATTACK_BATCH = 1024  # samples attacked at a time, times the number of budgets
STATE_EVERY = 30  # seconds between the files from which an interrupted run goes on


def train(config: TrainConfig, progress: bool = False) -> dict:
    """Train all runs of config for all its seeds, attack each on the test set, write the results to config.out.

    Files, each whole or not there: for every run and seed <run>-seed<s>.safetensors, .json (its numbers) and .jsonl (a
    line per epoch), with a validation part also -best.safetensors, the epoch with the highest validation accuracy; then
    results.csv, results.toml (settings), table.md and figures, see report.write. What was trained with the same
    settings on the same data is not trained again, and a training that was interrupted goes on, bit for bit, from its
    last half minute. What was trained otherwise is not overwritten unless config.overwrite says so.

    A run whose loss or weights stop being finite has status "diverged", no attacks, no checkpoint; one that ends with
    the same class for every training sample, as a spike of the loss can leave it, is "collapsed".

    Args:
        config: the settings.
        progress: whether to show a bar on stderr.

    Returns:
        dict: the settings ("config"), "data", "versions" and the records of all runs ("runs"), with None for non-finite
            numbers.

    Raises:
        ValueError: bad settings or data, or results of other ones in config.out; ImportError: a missing extra package;
            OSError: an unwritable folder.
    """
    needed = ["safetensors", "matplotlib", *(["tensorboard"] if config.tensorboard else [])]
    for module in needed:  # before an hour of training, not after
        require(module)
    check_device("train", config.device)
    split = _split(config, config.seeds[0])
    _check_runs(config, split, _initial(config, split, config.seeds[0]))
    make_folder(config.out)
    if not config.overwrite:
        _check_records(config)
    start = time.perf_counter()
    records = []
    interval = 0.1 if sys.stderr.isatty() else 10  # seconds: a log file gets few lines
    total = len(config.runs) * len(config.seeds) * config.epochs
    with require("tqdm").tqdm(total=total, unit="epoch", disable=not progress, mininterval=interval) as bar:
        for seed in config.seeds:
            if seed != config.seeds[0]:
                split = _split(config, seed)
            initial = _initial(config, split, seed)
            for spec in config.runs:
                bar.set_description(f"{spec.label}, seed {seed} ({len(records) + 1}/{total // config.epochs})")
                records.append(_trained(config.only(spec, seed), initial, split, bar.update))
                bar.update(len(records) * config.epochs - bar.n)  # what a diverged run left out
    results = {
        "config": config.plain(),
        "data": {
            "train": len(split.y_train), "test": len(split.y_test), "shape": list(split.shape),
            "validation": 0 if split.y_val is None else len(split.y_val), "classes": split.classes,
        },
        "versions": _versions(),
        "backend": current_backend(),
        "threads": torch.get_num_threads(),
        "seconds": time.perf_counter() - start,
        "runs": records,
    }  # fmt: skip
    report.write(results, config.out)
    return results


def _split(config: TrainConfig, seed: int) -> Split:
    return load(config.data, seed, folder=config.folder, validation=config.validation)


def _initial(config: TrainConfig, split: Split, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(config.network, split.shape, split.classes, mean=split.mean, std=split.std)


def _check_runs(config: TrainConfig, split: Split, initial: nn.Module) -> None:
    """What does not fit, a rank or a backend that cannot serve, fails here, before any training."""
    for name in config.attacks or ():
        check_classes("train", name, split.classes)
    sized = [spec for spec in config.runs if spec.sizing is not None]
    for spec in sized:
        sizing = methods.by_name(initial, spec.sizing)
        factorize(copy.deepcopy(initial).to("meta"), exclude=methods.EXCLUDED, **sizing)
    for spec in config.runs:
        methods.phases(spec, config.epochs)
    low_rank = [spec for spec in sized if spec.method != "dense"]
    if low_rank:
        with torch.random.fork_rng(devices=[]):
            methods.compress(copy.deepcopy(initial), low_rank[0].method, low_rank[0].sizing)


def _trained(config: TrainConfig, initial: nn.Module, split: Split, tick) -> dict:
    """The record of one run and seed: read if it is there, else trained and written."""
    (spec,), (seed,) = config.runs, config.seeds
    base = _base(config)
    path, state_path = base.with_name(f"{base.name}.json"), base.with_name(f"{base.name}.state")
    settings = _settings(config, split)
    if (record := _stored(path)) is not None and not _differences(record["settings"], settings):
        return record
    model = copy.deepcopy(initial)
    fit = _begun(state_path, settings, model, config, split)
    if fit is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if spec.init is not None:
                methods.align(model, spec.sizing, split.x_train)
            methods.compress(model, spec.method, None if methods.starts_dense(spec) else spec.sizing)
        _place(model, config)
        fit = Fit(model, spec, config, split)
    tick(fit.epoch)
    record = {"run": str(spec), "label": spec.label, "method": spec.method, "tau": spec.tau, "seed": seed}
    record["made_with"] = _versions() | {"backend": current_backend(), "threads": torch.get_num_threads()}
    record |= _fitted(fit, state_path, base.with_name(f"{base.name}.jsonl"), settings, tick)
    methods.finish(model, spec)
    record |= _sizes(model, initial, record["ranks"], pruned=spec.method == "tscnc") | {"settings": settings}
    for suffix in ("", "-best"):  # not to be mistaken for this run's
        base.with_name(f"{base.name}{suffix}.safetensors").unlink(missing_ok=True)
    if record["status"] != "diverged":
        try:
            record |= _attack_and_save(model, record, config, split, base)
            if fit.best is not None:
                model = copy.deepcopy(initial)
                methods.rebuild(model, spec, config.epochs, fit.best["epoch"], fit.best["ranks"])
                _place(model, config).load_state_dict(fit.best_weights)
                methods.finish(model, spec)
                best = base.with_name(f"{base.name}-best")
                record["best"] = fit.best | _attack_and_save(model, record | fit.best, config, split, best)
        except NonFiniteError:  # finite on the training set, but so large that its gradients are not
            record["status"] = "diverged"
    record = _finite(record)
    write_whole(path, json.dumps(record, allow_nan=False).encode())
    state_path.unlink(missing_ok=True)
    return record


def _place(model: nn.Module, config: TrainConfig) -> nn.Module:
    """On its device, with images in the format in which convolutions and pooling are fast, on CPUs too."""
    return model.to(config.device, memory_format=torch.channels_last)


def _sizes(model: nn.Module, initial: nn.Module, ranks: dict[str, int], pruned: bool) -> dict:
    """Parameters that are not pruned away, of the network and of the dense one, and the share of the hidden weights."""
    zeros = sum(int((layer.weight == 0).sum()) for layer in dense_layers(model).values()) if pruned else 0
    hidden = sum(weight_count(layer) for layer in dense_layers(initial).values())
    stored, dense = (sum(weight_count(m.get_submodule(name)) for name in ranks) for m in (model, initial))
    return {
        "parameters": sum(p.numel() for p in model.parameters()) - zeros,
        "dense_parameters": sum(p.numel() for p in initial.parameters()),
        "kept": stored / dense if ranks else 1 - zeros / hidden,
    }


def _base(config: TrainConfig) -> Path:
    (spec,), (seed,) = config.runs, config.seeds
    return config.out / f"{spec.file}-seed{seed}"


def _settings(config: TrainConfig, split: Split) -> dict:
    """What decides the numbers of a run."""
    plain = {k: v for k, v in config.plain().items() if k not in ("out", "folder", "tensorboard", "overwrite")}
    return plain | {"fingerprint": split.fingerprint}


def _stored(path: Path) -> dict | None:
    """The record of an earlier training."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("settings"), dict) else None


def _differences(stored: dict, settings: dict) -> list[str]:
    """The settings of which an earlier training had others. Of version 0.1.0 there are some without fingerprint."""
    stored = {"fingerprint": settings["fingerprint"]} | stored
    return [name for name in settings.keys() | stored.keys() if stored.get(name) != settings.get(name)]


def _check_records(config: TrainConfig) -> None:
    """What is there of other settings is not to be lost."""
    for seed in config.seeds:
        split = None
        for spec in config.runs:
            base = _base(config.only(spec, seed))
            path = base.with_name(f"{base.name}.json")
            if (record := _stored(path)) is None:
                continue
            split = split or _split(config, seed)
            stored, settings = record["settings"], _settings(config.only(spec, seed), split)
            if other := sorted(_differences(stored, settings)):
                said = ", ".join(f"{name} {stored.get(name)!r}, now {settings.get(name)!r}" for name in other)
                said = said.replace("fingerprint", "data with the checksum")
                raise ValueError(
                    f"train: {path} is of other settings ({said}); choose another folder (out) or replace (overwrite)"
                )


def _begun(path: Path, settings: dict, model: nn.Module, config: TrainConfig, split: Split) -> Fit | None:
    """An interrupted training with these settings, its weights put into the model."""
    (spec,) = config.runs
    try:
        stored = checkpoint.read(path)
    except CheckpointError:
        return None
    extra = stored.extra
    if not isinstance(extra, dict) or extra.get("settings") != settings:  # of other data too
        return None
    methods.rebuild(model, spec, config.epochs, extra["fit"]["epoch"], extra["ranks"])
    _place(model, config)
    checkpoint.restore(model, stored)
    fit = Fit(model, spec, config, split, extra["fit"])
    checkpoint.restore(model, stored, fit.optimizer)  # after what an optimizer does to a model at its start
    return fit


def _fitted(fit: Fit, state_path: Path, log: Path, settings: dict, tick) -> dict:
    """Trains to the end; the state is written now and then, a line of the log after every epoch."""
    saved = time.monotonic()
    lines = log.read_text(encoding="utf-8").splitlines(True)[: fit.epoch] if fit.epoch and log.is_file() else []
    log.write_text("".join(lines), encoding="utf-8")
    with log.open("a", encoding="utf-8") as file, _board(fit.config, log.stem) as board:
        while fit.epoch < fit.config.epochs:
            fit.run_epoch()
            if fit.status == "diverged":
                break
            line = {"epoch": fit.epoch, "lr": float(fit.optimizer.param_groups[0]["lr"])}
            line |= {name: values[-1] for name, values in fit.history.items() if values and name != "step_loss"}
            line["max_kappa"] = fit.monitor.last_kappa
            file.write(json.dumps(_finite(line)) + "\n")
            file.flush()
            board(line)
            if time.monotonic() - saved > STATE_EVERY and fit.epoch < fit.config.epochs:
                extra = {"settings": settings, "ranks": fit.ranks, "fit": fit.state()}
                checkpoint.save(fit.model, state_path, fit.optimizer, extra=extra)
                saved = time.monotonic()
            tick()
    return fit.record()


def _attack_and_save(model: nn.Module, record: dict, config: TrainConfig, split: Split, base: Path) -> dict:
    x, y = (split.x_test, split.y_test) if config.test else (split.x_val, split.y_val)
    settings = {
        "eps": list(config.eps),
        "attacks": list(config.attacks or default_attacks(split.classes)),
        "steps": config.attack_steps,
        "restarts": config.attack_restarts,
        "seed": record["seed"],
        "batch_size": ATTACK_BATCH,
    }
    path = base.with_name(f"{base.name}.safetensors")
    metadata = {
        "run": record["run"], "ranks": record["ranks"], "tau": record["tau"], "seed": record["seed"],
        "attack": settings, "network": config.network, "shape": list(split.shape), "classes": split.classes,
        "mean": split.mean and list(split.mean), "std": split.std and list(split.std), "data": config.data,
        "validation": config.validation, "test": config.test, "fingerprint": split.fingerprint,
    }  # fmt: skip
    save_checkpoint(path, model, metadata)  # whatever becomes of the attacks
    try:
        robustness = evaluate(model, x.to(config.device), y.to(config.device), **settings)
    except NonFiniteError:
        path.unlink()
        raise
    return {"robustness": robustness, "checkpoint": path.name}


def default_attacks(classes: int) -> list[str]:
    return [name for name in ATTACKS if classes >= classes_needed(name)]


@contextmanager
def _board(config: TrainConfig, name: str):
    """What takes a line of the log: TensorBoard, if it is asked for."""
    if not config.tensorboard:
        yield lambda line: None
        return
    with require("torch.utils.tensorboard").SummaryWriter(config.out / "tensorboard" / name) as writer:

        def add(line: dict) -> None:
            for key, value in line.items():
                if key != "epoch" and value is not None:
                    writer.add_scalar(key, value, line["epoch"])

        yield add


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
