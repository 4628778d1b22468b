"""Studies: train every run from the same dense weights in the same batch order, attack it and write the results."""

import json
import math
import platform
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn

import condlr_ext

from .._extras import require
from .._files import write_whole
from ..errors import CheckpointError, NonFiniteError
from ..io import checkpoint
from ..ops import current_backend
from ..robustness.evaluation import check_classes
from . import report
from ._defaults import torch_defaults
from .checkpoint import save_and_attack
from .config import TrainConfig
from .data import Split, load
from .methods import Method, check_runs
from .networks import build, check_device
from .progress import Progress
from .trainer import Trainer

STATE_EVERY = 30  # seconds between the files from which an interrupted run goes on


@torch_defaults()
def train(config: TrainConfig, progress: bool = False) -> dict:
    """Train all runs of config for all its seeds, attack each on the test set, write the results to config.out.

    Files, each whole or absent: for every run and seed <run>-seed<s>.safetensors, .json (its numbers) and .jsonl (a
    line per epoch), with a validation part also -best.safetensors, the epoch with the highest validation accuracy; then
    results.csv, results.toml (settings), table.md and figures, see report.write. Runs already trained with the same
    settings on the same data are not trained again, and an interrupted training goes on, bit for bit, from its last
    half minute. Results of other settings are overwritten only with config.overwrite.

    A run whose loss or weights stop being finite has status "diverged", no attacks, no checkpoint; one that ends with
    the same class for every training sample, as a spike of the loss can leave it, is "collapsed".

    Args:
        config: The settings.
        progress: Whether to show a bar on stderr.

    Returns:
        dict: The settings ("config"), "data", "versions" and the records of all runs ("runs"), with None for non-finite
            numbers.

    Raises:
        ValueError: Bad settings or data, results of other settings in config.out, or a folder that cannot be written.
        ImportError: A missing extra package.
    """
    require("matplotlib")  # before an hour of training, not after
    if config.tensorboard:
        require("tensorboard", extra="tensorboard")
    start = time.perf_counter()
    check_device("train", config.device)
    split = _split(config, config.seeds[0])
    for name in config.attacks:
        if name != "worst":
            check_classes("train", name, split.classes)
    check_runs(config.runs, _initial(config, split, config.seeds[0]), config.epochs)
    _make_folder(config.out)
    runs = [[_Run(config, method, seed) for method in config.runs] for seed in config.seeds]
    if not config.overwrite:
        _refuse_to_lose(runs)
    if config.jobs > 1 and len(config.seeds) > 1:
        joblib, state = require("joblib"), (current_backend(), torch.get_num_threads(), progress)
        joblib.Parallel(min(config.jobs, len(config.seeds)))(
            joblib.delayed(_in_process)(config.plain(), seed, *state, i % config.jobs)
            for i, seed in enumerate(config.seeds)
        )
    # what other processes have done is only read here
    with Progress(len(config.runs) * len(config.seeds) * config.epochs, progress) as bar:
        records = [record for seed in config.seeds for record in _of_seed(config, seed, bar)]
    results = {
        "config": config.plain(),
        "data": split.sizes,
        "versions": _versions(),
        "backend": current_backend(),
        "threads": torch.get_num_threads(),
        "seconds": time.perf_counter() - start,
        "runs": records,
    }
    report.write(results, config.out)
    return results


@torch_defaults()
def _in_process(settings: dict, seed: int, backend: str, threads: int, progress: bool, position: int) -> None:
    """Train and attack all runs of a seed, in a process of its own."""
    config = TrainConfig(**settings)
    torch.set_num_threads(threads)
    with condlr_ext.backend(backend), Progress(len(config.runs) * config.epochs, progress, position) as bar:
        _of_seed(config, seed, bar)


def _of_seed(config: TrainConfig, seed: int, bar: Progress) -> list[dict]:
    """Return the records of all runs of a seed."""
    split = _split(config, seed)
    initial, begin, records = _initial(config, split, seed), bar.epochs, []
    for run in (_Run(config, method, seed) for method in config.runs):
        bar.describe(f"{run.identity['label']}, seed {seed} ({len(records) + 1}/{len(config.runs)})")
        records.append(_trained(run, initial, split, bar))
        bar.advance_to(begin + len(records) * config.epochs)  # also where a diverged run left some out
    return records


class _Run:
    """One run and seed of a study, its files and settings.

    Attributes:
        config: Of this run and seed alone.
        identity: Entries of its record that name it.
        settings: Settings that determine its numbers, beside the data.
    """

    def __init__(self, config: TrainConfig, method: Method, seed: int):
        self.config = config.only(method, seed)
        self.identity = method.identity() | {"seed": seed}
        left_out = ("out", "folder", "tensorboard", "overwrite", "jobs")
        self.settings = {name: value for name, value in self.config.plain().items() if name not in left_out}

    def file(self, ending: str) -> Path:
        text = self.identity["run"].translate(str.maketrans(":,/", "---", "="))
        return self.config.out / f"{text}-seed{self.identity['seed']}{ending}"

    def stored(self) -> dict | None:
        """Return the record of an earlier training."""
        try:
            record = json.loads(self.file(".json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        return record if isinstance(record, dict) and isinstance(record.get("settings"), dict) else None

    def interrupted(self, settings: dict) -> checkpoint.Checkpoint | None:
        """Return the state of an interrupted training with these settings on the same data."""
        try:
            state = checkpoint.read(self.file(".state"))
        except CheckpointError:
            return None
        return state if isinstance(state.extra, dict) and state.extra.get("settings") == settings else None


# ------------------------------------------------------------------------------------------------- before training


def _split(config: TrainConfig, seed: int) -> Split:
    return load(config.data, seed, folder=config.folder, validation=config.validation)


def _initial(config: TrainConfig, split: Split, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return build(config.network, split.shape, split.classes, mean=split.mean, std=split.std)


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):  # a name of its own: other runs may share the folder
            pass
    except OSError as error:
        raise ValueError(f"the folder for the results must be one that can be written, got {path}: {error}") from None


def _refuse_to_lose(runs: list[list[_Run]]) -> None:
    """Raise ValueError if there are results of other settings."""
    for of_seed in runs:
        split = None
        for run in of_seed:
            if (record := run.stored()) is None:
                continue
            split = split or _split(run.config, run.identity["seed"])
            stored, settings = record["settings"], run.settings | {"fingerprint": split.fingerprint}
            if other := sorted(_differences(stored, settings)):
                changes = ", ".join(f"{name} {stored.get(name)!r}, now {settings.get(name)!r}" for name in other)
                changes = changes.replace("fingerprint", "data with the checksum")
                raise ValueError(
                    f"train: {run.file('.json')} has other settings ({changes}); choose another folder (out) or"
                    " replace (overwrite)"
                )


def _differences(stored: dict, settings: dict) -> list[str]:
    """Return the settings that differ from the stored run's. Some runs of version 0.1.0 have no fingerprint."""
    stored = {"fingerprint": settings["fingerprint"]} | stored
    return [name for name in settings.keys() | stored.keys() if stored.get(name) != settings.get(name)]


# -------------------------------------------------------------------------------------------------------- one run


def _trained(run: _Run, initial: nn.Module, split: Split, bar: Progress) -> dict:
    """Return the record of a run: read it if it exists, else train and write it."""
    settings = run.settings | {"fingerprint": split.fingerprint}
    if (record := run.stored()) is not None and not _differences(record["settings"], settings):
        return record
    trainer = Trainer(run.config, split, initial, run.interrupted(settings))
    bar.advance(trainer.epoch)
    made_with = _versions() | {"backend": current_backend(), "threads": torch.get_num_threads()}
    _train(trainer, run.file(".state"), settings, bar.advance)
    record = run.identity | {"made_with": made_with, "settings": settings} | trainer.finish()
    last, best = run.file(".safetensors"), run.file("-best.safetensors")
    for file in (last, best):  # not to be mistaken for this run's
        file.unlink(missing_ok=True)
    if record["status"] != "diverged":
        try:
            record |= save_and_attack(last, trainer.model, record, run.config, split, bar.attack)
            if record["best"] is not None:
                model, of_best = trainer.best_model(), record | record["best"]
                attacked = save_and_attack(best, model, of_best, run.config, split, bar.attack)
                record["best"] = record["best"] | attacked
        except NonFiniteError:  # finite on the training set, but so large that its gradients are not
            record["status"] = "diverged"
    record = _finite(record)
    write_whole(run.file(".json"), json.dumps(record, allow_nan=False).encode())
    run.file(".state").unlink(missing_ok=True)
    return record


def _train(trainer: Trainer, state: Path, settings: dict, tick) -> None:
    """Train to the end; write the state now and then, a line of the log after every epoch."""
    saved = time.monotonic()
    log = state.with_suffix(".jsonl")
    lines = log.read_text(encoding="utf-8").splitlines(True)[: trainer.epoch] if trainer.epoch and log.is_file() else []
    log.write_text("".join(lines), encoding="utf-8")
    with log.open("a", encoding="utf-8") as file, _board(trainer.config, log.stem) as board:
        for line in trainer.run():
            file.write(json.dumps(_finite(line)) + "\n")
            file.flush()
            board(line)
            if time.monotonic() - saved > STATE_EVERY and trainer.epoch < trainer.config.epochs:
                trainer.save(state, settings)
                saved = time.monotonic()
            tick()


@contextmanager
def _board(config: TrainConfig, name: str):
    """Yield a function that logs a line for TensorBoard, if the config wants that."""
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
    """Replace NaN and Inf by None, for JSON."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
