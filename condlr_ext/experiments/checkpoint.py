"""Checkpoints of runs: with the model what is needed to build it again and to attack it."""

from inspect import signature
from pathlib import Path

import torch
from torch import Tensor, nn

from .._modules import DENSE
from ..errors import CheckpointError, NonFiniteError
from ..io import checkpoint
from ..linalg import svd
from ..nn import LowRankLayer
from ..robustness import evaluate
from . import methods
from .config import RunSpec, check_device
from .data import load
from .inspect_layers import TWO_FACTOR, core, matrix_shape, orthonormality_error, weight_count
from .networks import build

KEYS = (
    "run", "ranks", "tau", "seed", "attack", "network", "shape", "classes", "mean", "std", "data", "validation", "test",
)  # fmt: skip


def save_checkpoint(path: Path, model: nn.Module, metadata: dict) -> None:
    """Write the model with KEYS and the data's "fingerprint"; "attack" holds the arguments of robustness.evaluate."""
    checkpoint.save(model, path, tau=metadata["tau"], extra=metadata)


def load_checkpoint(path: Path) -> tuple[nn.Module, dict]:
    """The model, rebuilt, and its metadata.

    Raises:
        ValueError: no such file, damaged, or not written by save_checkpoint.
    """
    stored = checkpoint.read(path)
    metadata = stored.extra if isinstance(stored.extra, dict) else {}
    if missing := sorted(set(KEYS) - set(metadata)):
        raise CheckpointError(f"{path} was not written by condlr train, it lacks {', '.join(missing)}")
    try:
        spec, norm = RunSpec.parse(metadata["run"]), {"mean": metadata["mean"], "std": metadata["std"]}
        if spec.sizing is not None and not metadata["ranks"] and not methods.starts_dense(spec):
            raise ValueError(f"{spec.method} has low-rank layers, it names none")
        with torch.random.fork_rng(devices=[]):
            model = build(metadata["network"], metadata["shape"], metadata["classes"], **norm)
        with torch.random.fork_rng(devices=[]):
            methods.compress(model, spec.method, {"rank": metadata["ranks"]} if metadata["ranks"] else None, "random")
        checkpoint.restore(model, stored)
        signature(evaluate).bind(model, None, None, **metadata["attack"])
    except NonFiniteError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} does not describe a model of this package: {error}") from None
    if not all(torch.isfinite(tensor).all() for tensor in stored.model.values()):
        raise NonFiniteError(f"{path} holds NaN or Inf")
    return model, metadata | {"condlr_ext": stored.version}


def evaluate_checkpoint(
    path: Path, *, data: str | None = None, folder: Path | None = None, device: str = "cpu", **changes
) -> dict:
    """Accuracy of a checkpoint under attack; with no option given, exactly the numbers of its training run.

    Args:
        path: a .safetensors file of train.
        data, folder: instead of what it was trained on; where the files of a data set lie.
        device: where it runs.
        changes: arguments of robustness.evaluate that take another value than in its training run.

    Returns:
        dict: run, data and what robustness.evaluate returns.
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
    model.to(device, memory_format=torch.channels_last)  # as in training: other roundings else
    result = evaluate(model, x.to(device), y.to(device), **metadata["attack"] | changes)
    return {"run": metadata["run"], "data": data, **result}


def inspect_checkpoint(path: Path, batch_size: int = 32) -> dict:
    """The metadata, and for each linear layer its shape, rank, weights, sigma, kappa and orthonormality.

    For low-rank layers also the route that they take in training on batches of that size, and the speed that the cost
    model predicts over a dense layer.
    """
    if batch_size < 1:
        raise ValueError(f"inspect: batch_size must be >= 1, got {batch_size}")
    model, metadata = load_checkpoint(path)
    inputs = _inputs(model, (batch_size, *metadata["shape"]))
    layers = []
    for name, layer in inputs.items():
        module = model.get_submodule(name)
        sigma = svd(core(module)).sigma
        low_rank = isinstance(module, LowRankLayer)
        m, n = matrix_shape(module)
        plan = module.plan(layer.requires_grad_(bool(layers))) if low_rank else None
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
    """An input as each linear layer gets it, in the order of their work."""
    inputs, hooks, inside = {}, [], set()
    for name, module in model.named_modules():
        if isinstance(module, TWO_FACTOR):
            inside |= set(module.children())
        if isinstance(module, (LowRankLayer, *TWO_FACTOR, *DENSE)) and module not in inside:

            def keep(_, args, name=name) -> None:
                inputs[name] = torch.empty_like(args[0])

            hooks.append(module.register_forward_pre_hook(keep))
    model.eval()(torch.zeros(shape))
    for hook in hooks:
        hook.remove()
    return inputs
