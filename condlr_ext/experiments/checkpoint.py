"""Checkpoints of runs: the model with what is needed to build it again and to attack it."""

import copy
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from .._extras import require
from .._modules import DENSE
from ..errors import CheckpointError, NonFiniteError
from ..io import checkpoint
from ..linalg import svd
from ..nn import LowRankLayer
from ..robustness import KNOWN_ATTACKS, evaluate, worst_case
from ._defaults import torch_defaults
from .config import TrainConfig
from .data import Split, balanced, load
from .inspect_layers import TWO_FACTOR, core, low_rank_layers, matrix_shape, orthonormality_error, weight_count
from .methods import Method
from .methods.base import Settings
from .networks import build, check_device, place

ATTACK_BATCH = 1024  # samples attacked at a time, times the number of budgets ...
WORST_BATCH = 256  # ... and in the cascade, where each has one budget
WORST = ["worst"]

pydantic = require("pydantic")
_Count = Annotated[int, pydantic.Field(ge=1, lt=2**31)]
_Seed = Annotated[int, pydantic.Field(ge=0, lt=2**32)]
_Finite = Annotated[float, pydantic.Field(allow_inf_nan=False)]


class _Attack(Settings):
    """The arguments of robustness.evaluate or, where attacks is ["worst"], worst_case; and how many samples."""

    where = "metadata"
    name = "attack"

    eps: list[Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]] = pydantic.Field(min_length=1)
    attacks: list[Literal[("worst", *KNOWN_ATTACKS)]] = pydantic.Field(min_length=1)
    steps: _Count
    restarts: _Count
    seed: _Seed
    batch_size: _Count
    samples: _Count | None = None


class _Metadata(Settings, extra="ignore"):
    """What a checkpoint of a run says of it."""

    where = "metadata"
    name = "a checkpoint of condlr train"

    run: str
    ranks: dict[str, _Count]
    tau: Annotated[float, pydantic.Field(ge=0)] | None
    seed: _Seed
    attack: _Attack
    network: str
    shape: list[_Count] = pydantic.Field(min_length=1)
    classes: _Count
    mean: list[_Finite] | None
    std: list[Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)]] | None
    data: str
    validation: Annotated[float, pydantic.Field(ge=0, lt=1)]
    test: bool
    fingerprint: str | None = None

    @pydantic.model_validator(mode="after")
    def _channels(self):
        lengths = [None if values is None else len(values) for values in (self.mean, self.std)]
        if lengths not in ([None, None], [self.shape[0]] * 2):
            raise ValueError(f"metadata: mean and std must have {self.shape[0]} values, one for each channel, or none")
        return self


def save_and_attack(
    path: Path, model: nn.Module, record: dict, config: TrainConfig, split: Split, progress=None
) -> dict:
    """Write the finished model of a run and evaluate it under attack.

    The results of single attacks are kept in a file beside it, with the suffix .attacks, until all are there.

    Args:
        path: The .safetensors file.
        model: On the device of the config.
        record: The run's "run", "ranks", "tau", "seed" and "settings".
        config: The settings.
        split: The data of the training.
        progress: As for robustness.evaluate.

    Returns:
        dict: "robustness" and "checkpoint", the file's name.

    Raises:
        NonFiniteError: The weights are too large to be attacked; no file is left.
    """
    x, y = (split.x_test, split.y_test) if config.test else (split.x_val, split.y_val)
    worst = list(config.attacks) == WORST
    attack = {
        "eps": list(config.eps),
        "attacks": list(config.attacks),
        "steps": config.attack_steps or (100 if worst else 30),
        "restarts": config.attack_restarts or (1 if worst else 2),
        "seed": record["seed"],
        "batch_size": WORST_BATCH if worst else ATTACK_BATCH,
        "samples": config.attack_samples,
    }
    metadata = {
        "run": record["run"], "ranks": record["ranks"], "tau": record["tau"], "seed": record["seed"],
        "attack": attack, "network": config.network, "shape": list(split.shape), "classes": split.classes,
        "mean": split.mean and list(split.mean), "std": split.std and list(split.std), "data": config.data,
        "validation": config.validation, "test": config.test, "fingerprint": record["settings"]["fingerprint"],
    }  # fmt: skip
    checkpoint.save(model, path, tau=metadata["tau"], extra=metadata)  # before the attacks, which may fail
    journal = path.with_suffix(".attacks")
    try:
        robustness = _attacked(model, x, y, config.device, attack, progress=progress, journal=journal)
    except NonFiniteError:
        path.unlink()
        raise
    journal.unlink(missing_ok=True)
    return {"robustness": robustness, "checkpoint": path.name}


def _attacked(model: nn.Module, x: Tensor, y: Tensor, device: str, attack: dict, **options) -> dict:
    """Return the accuracy under attack of the model on the samples that _Attack describes.

    Where those are not all samples, "of" is the number of all and "clean_of_all" the accuracy on them.
    """
    arguments = {name: value for name, value in attack.items() if name not in ("attacks", "samples")} | options
    chosen = balanced(y, attack.get("samples"))
    names = list(attack["attacks"])
    run = worst_case if names == WORST else partial(evaluate, attacks=names)
    result = run(model, x[chosen].to(device), y[chosen].to(device), **arguments)
    if len(chosen) < len(y):
        with torch.no_grad():
            right = [model(part.to(device)).argmax(1).cpu() for part in x.split(ATTACK_BATCH)]
        result |= {"of": len(y), "clean_of_all": (torch.cat(right) == y).double().mean().item()}
    return result


def load_checkpoint(path: Path) -> tuple[nn.Module, dict]:
    """Return the model, rebuilt, and its metadata.

    Raises:
        ValueError: No such file, a damaged one, or one that condlr train did not write.
    """
    stored = checkpoint.read(path)
    metadata = stored.extra if isinstance(stored.extra, dict) else {}
    needed = {name for name, field in _Metadata.model_fields.items() if field.is_required()}
    if missing := sorted(needed - metadata.keys()):
        raise CheckpointError(f"{path} was not written by condlr train, it lacks {', '.join(missing)}")
    try:
        _Metadata(**metadata)
        with torch.device("meta"):  # before anything is allocated that the file only claims
            skeleton = _built(metadata)
            checkpoint.compare(skeleton, stored)
        if metadata["ranks"].keys() != (layers := low_rank_layers(skeleton)).keys():
            raise ValueError(f"metadata: ranks must name {', '.join(layers) or 'nothing'}, got {metadata['ranks']}")
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        text = " ".join(str(error).split())
        raise CheckpointError(f"{path} does not describe a model of this package: {text[:500]}") from None
    with torch.random.fork_rng(devices=[]):
        model = _built(metadata)
    checkpoint.restore(model, stored)
    if not all(torch.isfinite(tensor).all() for tensor in model.state_dict().values()):
        raise NonFiniteError(f"{path} holds NaN or Inf")
    return model, metadata | {"condlr_ext": stored.version}


def _built(metadata: dict) -> nn.Module:
    """Return a network with the layers of the trained one and any values."""
    norm = {"mean": metadata["mean"], "std": metadata["std"]}
    model = build(metadata["network"], metadata["shape"], metadata["classes"], **norm)
    Method.parse(metadata["run"]).rebuild(model, metadata["ranks"])
    return model


@torch_defaults()
def evaluate_checkpoint(
    path: Path, *, data: str | None = None, folder: Path | None = None, device: str = "cpu", progress=None, **changes
) -> dict:
    """Return the accuracy of a checkpoint under attack; without options, exactly the numbers of its training run.

    Args:
        path: A .safetensors file of train.
        data: Instead of what it was trained on.
        folder: Folder with the files of a data set.
        device: Where it runs.
        progress: As for robustness.evaluate.
        changes: What is different from its training run: eps, attacks (["worst"] for the cascade), steps, restarts,
            samples (None for all).

    Returns:
        dict: run, data and what robustness.evaluate or worst_case returns.

    Raises:
        ValueError: An unusable file, device or data set, or data that does not fit the model.
    """
    check_device("evaluate", device)
    model, metadata = load_checkpoint(path)
    other, data = data, data or metadata["data"]
    try:
        split = load(data, metadata["seed"], folder=folder, validation=metadata["validation"])
    except ValueError as error:
        raise ValueError(f"{error} (the data of {path}; another is given with --data)") from None
    expected, got = ((list(shape), classes) for shape, classes in (
        (metadata["shape"], metadata["classes"]), (split.shape, split.classes),
    ))  # fmt: skip
    if got != expected:
        raise ValueError(
            f"checkpoint: {path} needs samples {expected[0]} and {expected[1]} classes,"
            f" {data} has {got[0]} and {got[1]}"
        )
    if other is None and metadata.get("fingerprint", split.fingerprint) != split.fingerprint:
        raise ValueError(
            f"checkpoint: {path} was trained on {data} with the checksum {metadata['fingerprint']}, which now has"
            f" {split.fingerprint}; to evaluate on that, name it as data"
        )
    x, y = (split.x_test, split.y_test) if metadata["test"] else (split.x_val, split.y_val)
    place(model, device)  # as in training: other roundings else
    result = _attacked(model, x, y, device, metadata["attack"] | changes, progress=progress)
    return {"run": metadata["run"], "data": data, **result}


@torch_defaults()
def inspect_checkpoint(path: Path, batch_size: int = 32) -> dict:
    """Return the metadata, and for each linear layer its shape, rank, weights, sigma, kappa and orthonormality.

    For low-rank layers also the route that they take in training on batches of batch_size, and the speed-up over a
    dense layer that the cost model predicts.
    """
    if batch_size < 1:
        raise ValueError(f"inspect: batch_size must be >= 1, got {batch_size}")
    model, metadata = load_checkpoint(path)
    skeleton = copy.deepcopy(model).to("meta")  # shapes are enough, and take no memory
    try:
        inputs = _inputs(skeleton, (batch_size, *metadata["shape"]))
    except (RuntimeError, TypeError, ValueError) as error:  # TypeError: more than 64 bits
        shape, text = [batch_size, *metadata["shape"]], str(error).splitlines()[0]
        raise ValueError(f"inspect: {path} does not run on a batch {shape}: {text}") from None
    layers = []
    for name, layer in inputs.items():
        module = model.get_submodule(name)
        sigma = svd(core(module)).sigma
        low_rank = isinstance(module, LowRankLayer)
        m, n = matrix_shape(module)
        plan = skeleton.get_submodule(name).plan(layer.requires_grad_(bool(layers))) if low_rank else None
        layers.append(
            {
                "name": name,
                "m": m,
                "n": n,
                "rank": len(sigma),
                "weights": weight_count(module),
                "kappa": float(sigma[0] / sigma[-1]) if sigma[-1] > 0 else None,
                "sigma_max": float(sigma[0]),
                "sigma_min": float(sigma[-1]),
                "orthonormality": float(orthonormality_error(module)) if low_rank else None,
                "route": plan.route if plan else None,
                "gain": plan.gain if plan else None,
            }
        )
    return {"metadata": metadata, "batch_size": batch_size, "layers": layers}


@torch.no_grad()
def _inputs(model: nn.Module, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Return an input of each linear layer of a model on the meta device, in the order in which they run."""
    inputs, hooks, inside = {}, [], set()
    for name, module in model.named_modules():
        if isinstance(module, TWO_FACTOR):
            inside |= set(module.children())
        if isinstance(module, (LowRankLayer, *TWO_FACTOR, *DENSE)) and module not in inside:

            def keep(_, args, name=name) -> None:
                inputs[name] = torch.empty_like(args[0])

            hooks.append(module.register_forward_pre_hook(keep))
    model.eval()(torch.zeros(shape, dtype=torch.float32, device="meta"))
    for hook in hooks:
        hook.remove()
    return inputs
