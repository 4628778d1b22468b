"""Checkpoints: a model, its optimizer and other state of a run in one safetensors file, written atomically."""

import json
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .._extras import require
from .._files import whole_file
from .._modules import undone_on_error, unwrapped
from .._version import __version__
from ..errors import CheckpointError, NonFiniteError, RankError
from ..factorize import factorize
from ..nn import low_rank_layers
from ..ops import check_environment

__all__ = ["Checkpoint", "load", "read", "save"]

_FORMAT = "1"


@dataclass(frozen=True)
class Checkpoint:
    """The content of a file.

    Attributes:
        model: The model's state_dict.
        rank: {low-rank layer: rank}.
        tau: {low-rank layer: tau}, where it was known.
        optimizer: The optimizer's state_dict or None.
        optimizer_class: Name of its class.
        extra: As given to save.
        version: Version of condlr_ext that wrote the file.
        source: The file, for error texts.
    """

    model: dict[str, Any]
    rank: dict[str, int]
    tau: dict[str, float] = field(default_factory=dict)
    optimizer: dict | None = None
    optimizer_class: str | None = None
    extra: Any = None
    version: str = "unknown"
    source: str = "the checkpoint"


def save(
    model: nn.Module, path, optimizer: Optimizer | None = None, *, tau: float | dict | None = None, extra=None
) -> None:
    """Write a model, and optionally its optimizer's state, to a safetensors file.

    The tensors have the names of the model's state_dict, so that other tools can read them; rank, tau and version are
    in the string metadata. Tensors that share memory (tied weights) are stored once. The file is written atomically:
    an interruption leaves the old file of that name, or none.

    Args:
        model: Any module; names do not include wrappers of torch.compile, DataParallel or DistributedDataParallel.
        path: By convention NAME.safetensors.
        optimizer: Any torch optimizer.
        tau: Slack of the bound where no parameter group holds it (under a Projector, say): one for all layers, or
            {layer: tau}.
        extra: Other state of the run: tensors, numbers, strings and None in dicts, lists and tuples.

    Raises:
        ImportError: safetensors is not installed.
        TypeError: A value cannot be stored.
        ValueError: A tensor is on the meta device, or tau contradicts the optimizer's.
        OSError: The file cannot be written.

    Examples:
        >>> optimizer = condlr_ext.optim.CondLRSGD(model, lr=0.1, tau=0.1)
        >>> condlr_ext.save(model, "run.safetensors", optimizer, extra={"epoch": 3, "rng": torch.get_rng_state()})
        >>> condlr_ext.load(model, "run.safetensors", optimizer).extra["epoch"]
        3
    """
    safetensors = require("safetensors.torch", "condlr_ext.save", "safetensors")
    model = unwrapped(model)
    writer = _Writer()
    state = {"model": {}, "optimizer": None, "extra": writer.encode(extra, ".extra")}
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            writer.put(name, value, share=True)
        else:  # a module's get_extra_state
            state["model"][name] = writer.encode(value, f".state.{name}")
    if optimizer is not None:
        name = type(optimizer).__name__
        state["optimizer"] = {"class": name, "state": writer.encode(optimizer.state_dict(), ".optimizer")}
    text = {
        "rank": {name: layer.rank for name, layer in low_rank_layers(model).items()},
        "tau": writer.encode(_taus(model, optimizer, tau, "save"), ".tau"),
        "shared": writer.shared,
        "state": state,
    }
    metadata = {key: json.dumps(value, allow_nan=False) for key, value in text.items()}
    metadata |= {"format": "pt", "condlr_ext": __version__, "condlr_ext_format": _FORMAT}
    try:
        with whole_file(path) as temporary:
            safetensors.save_file(writer.tensors, temporary, metadata)
    except (OSError, require("safetensors", "condlr_ext.save", "safetensors").SafetensorError) as error:
        raise OSError(f"save: cannot write {path}: {error}") from None


def load(model: nn.Module, path, optimizer: Optimizer | None = None, *, tau: float | dict | None = None) -> Checkpoint:
    """Load a file written by save into a model, and optionally into its optimizer; training continues bit for bit.

    Layers that are dense in the model and low-rank in the file are factorized to the file's ranks, so the model can be
    the plain one. Then load the optimizer in a second call, made from the factorized model. An error leaves model and
    optimizer unchanged.

    Args:
        model: Changed in place.
        path: The file.
        optimizer: Without one, an optimizer's state in the file is ignored.
        tau: Expected slack of the bound where no optimizer holds it, compared with the file's.

    Returns:
        The checkpoint; its `extra` is what was given to save.

    Raises:
        CheckpointError: The file is missing, damaged or not written by save, its tensors do not fit the model, the
            optimizer has another class or other parameters, or tau differs.
        RankError: A layer has another rank.
        NonFiniteError: NaN or Inf in a factor.
    """
    checkpoint = read(path)
    restore(model, checkpoint, optimizer, tau=tau)
    return checkpoint


def read(path) -> Checkpoint:
    """Read a file written by save, to the CPU.

    Args:
        path: The file.

    Raises:
        CheckpointError: The file is missing, damaged or not written by save.
    """
    tensors, text = read_safetensors(path, "condlr_ext.load")
    keys = {"rank", "tau", "shared", "state", "condlr_ext", "condlr_ext_format"}
    if missing := sorted(keys - set(text)):
        raise CheckpointError(f"{path} was not written by condlr_ext.save: its metadata lacks {', '.join(missing)}")
    if text["condlr_ext_format"] != _FORMAT:
        raise CheckpointError(
            f"{path} has format {text['condlr_ext_format']} of condlr_ext {text['condlr_ext']}, this version reads"
            f" {_FORMAT}"
        )
    try:
        rank, tau, shared, state = (json.loads(text[key]) for key in ("rank", "tau", "shared", "state"))
        model = {name: t for name, t in tensors.items() if not name.startswith(".")}
        model |= {alias: tensors[name] for alias, name in shared.items()}
        model |= {name: _decode(value, tensors) for name, value in state["model"].items()}
        optimizer = state["optimizer"]
        checkpoint = Checkpoint(
            model=model,
            rank={name: int(r) for name, r in rank.items()},
            tau={name: float(t) for name, t in _decode(tau, tensors).items()},
            optimizer=optimizer and _decode(optimizer["state"], tensors),
            optimizer_class=optimizer and optimizer["class"],
            extra=_decode(state["extra"], tensors),
            version=text["condlr_ext"],
            source=str(path),
        )
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} has damaged metadata: {type(error).__name__}: {error}") from None
    return checkpoint


def restore(
    model: nn.Module,
    checkpoint: Checkpoint,
    optimizer: Optimizer | None = None,
    *,
    tau: float | dict | None = None,
    new_biases: bool = False,
) -> None:
    """Load a checkpoint into a model, with the arguments and errors of load.

    Args:
        model: Changed in place.
        checkpoint: What to load.
        optimizer: As in load.
        tau: As in load.
        new_biases: Whether a layer that is factorized here takes a bias of the checkpoint that the dense one lacks.
    """
    model = unwrapped(model)
    source = checkpoint.source
    if any(t.is_meta for t in model.state_dict().values() if isinstance(t, Tensor)):
        raise CheckpointError(f"{source}: the model is on the meta device; call model.to_empty(device=...) first")
    _check_finite(checkpoint)
    dense = _compare_ranks(model, checkpoint)
    _compare_taus(checkpoint, _taus(model, optimizer, tau, "load"))
    if optimizer is not None:
        if dense:
            raise CheckpointError(
                f"{source}: layer {dense[0]!r} is still dense, and will not be the optimizer's once factorized; call"
                " load(model, path), make the optimizer, then load(model, path, optimizer)"
            )
        _check_optimizer(optimizer, checkpoint)
    with undone_on_error(model):
        if dense:
            _factorize(model, checkpoint, dense, new_biases)
        _check_tensors(model, checkpoint)
        if optimizer is not None:
            optimizer.load_state_dict(checkpoint.optimizer)
        model.load_state_dict(checkpoint.model)


# --------------------------------------------------------------------------------------------------- files


def read_safetensors(path, user: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a safetensors file, on the CPU, and its metadata.

    Raises:
        CheckpointError: The file is missing or damaged.
        ImportError: safetensors is not installed; the text names `user`.
    """
    check_environment()
    safetensors = require("safetensors", user, "safetensors")
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            # cloned, as the file may be overwritten while the tensors live
            return {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata() or {}
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None


# --------------------------------------------------------------------------------------------------- values


class _Writer:
    """Collector of tensors by name that encodes all other values exactly as JSON."""

    def __init__(self):
        self.tensors: dict[str, Tensor] = {}
        self.shared: dict[str, str] = {}
        self._seen: dict[tuple, str] = {}

    def put(self, name: str, t: Tensor, share: bool = False) -> None:
        """Store a tensor; with `share`, one that is stored already only gets an entry in `shared`."""
        if t.is_meta:
            raise ValueError(f"save: {name} is on the meta device and has no values")
        t = t.detach()
        if share and t.numel():
            place = (t.device, t.data_ptr(), t.shape, t.stride(), t.dtype)
            first = self._seen.setdefault(place, name)
            if first != name:
                self.shared[name] = first
                return
        # a contiguous copy, for safetensors takes no views
        self.tensors[name] = t.to("cpu", copy=True, memory_format=torch.contiguous_format)

    def encode(self, value, place: str):
        """Return a value of JSON that _decode turns back; tensors are stored under `place`, a path in the file."""
        if isinstance(value, Tensor):
            while place in self.tensors:  # {"a.b": 1} and {"a": {"b": 1}} have the same place
                place += "'"
            self.put(place, value)
            return {"$tensor": place}
        if value is None or isinstance(value, (bool, str)):
            return value
        if isinstance(value, int):
            return int(value)
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else {"$float": str(float(value))}
        if type(value) is list:
            return [self.encode(v, f"{place}.{i}") for i, v in enumerate(value)]
        if type(value) is tuple:
            return {"$tuple": self.encode(list(value), place)}
        if isinstance(value, dict):
            kind = "$counter" if isinstance(value, Counter) else "$dict"
            if kind == "$dict" and all(type(k) is str and not k.startswith("$") for k in value):
                return {k: self.encode(v, f"{place}.{k}") for k, v in value.items()}
            pairs = [
                [self.encode(k, f"{place}.key{i}"), self.encode(v, f"{place}.{k}")]
                for i, (k, v) in enumerate(value.items())
            ]
            return {kind: pairs}
        raise TypeError(
            f"save: {place.removeprefix('.')} must be a tensor, number, string, None or a dict, list or tuple of these,"
            f" got {type(value).__name__}"
        )


def _decode(value, tensors: dict[str, Tensor]):
    """Invert _Writer.encode."""
    if isinstance(value, list):
        return [_decode(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((kind, content),) = value.items()
        if kind == "$tensor":
            return tensors[content]
        if kind == "$float":
            return float(content)
        if kind == "$tuple":
            return tuple(_decode(content, tensors))
        if kind in ("$dict", "$counter"):
            pairs = {_decode(k, tensors): _decode(v, tensors) for k, v in content}
            return Counter(pairs) if kind == "$counter" else pairs
    return {k: _decode(v, tensors) for k, v in value.items()}


# --------------------------------------------------------------------------------------------------- models


def _taus(model: nn.Module, optimizer: Optimizer | None, given, where: str) -> dict[str, float]:
    """Return tau of the layers: that of their cores' parameter groups, else as given."""
    groups = [] if optimizer is None else optimizer.param_groups
    group_of = {id(p): group for group in groups for p in group["params"]}
    layers = low_rank_layers(model)
    taus = {
        name: float(group["tau"])
        for name, layer in layers.items()
        if (group := group_of.get(id(layer.S))) is not None and group.get("tau") is not None
    }
    if given is None:
        return taus
    if not isinstance(given, dict):
        given = {name: given for name in layers}
    for name, tau in given.items():
        if name not in layers:
            raise ValueError(f"{where}: tau names {name!r}, which is no low-rank layer of the model")
        if taus.setdefault(name, float(tau)) != float(tau):
            raise ValueError(f"{where}: layer {name!r} has tau {taus[name]:g} in the optimizer, tau={tau:g} was given")
    return taus


def _check_finite(checkpoint: Checkpoint) -> None:
    for name in checkpoint.rank:
        for role in "USV":
            factor = checkpoint.model.get(f"{name}.{role}" if name else role)
            if isinstance(factor, Tensor) and not torch.isfinite(factor).all():
                raise NonFiniteError(f"{checkpoint.source}: {role} of layer {name!r} must be finite, got NaN or Inf")


def _compare_ranks(model: nn.Module, checkpoint: Checkpoint) -> list[str]:
    """Return the low-rank layers of the checkpoint that are dense in the model; raise RankError for another rank."""
    layers = low_rank_layers(model)
    for name, layer in layers.items():
        if name not in checkpoint.rank:
            raise RankError(
                f"{checkpoint.source}: layer {name!r} has rank {layer.rank} in the model and is dense in the file"
            )
        if checkpoint.rank[name] != layer.rank:
            raise RankError(
                f"{checkpoint.source}: layer {name!r} has rank {layer.rank} in the model and rank"
                f" {checkpoint.rank[name]} in the file"
            )
    return [name for name in checkpoint.rank if name not in layers]


def _compare_taus(checkpoint: Checkpoint, taus: dict[str, float]) -> None:
    for name, tau in taus.items():
        if name in checkpoint.tau and checkpoint.tau[name] != tau:
            raise CheckpointError(
                f"{checkpoint.source}: layer {name!r} has tau {tau:g} in the optimizer and tau"
                f" {checkpoint.tau[name]:g} in the file; to train on under another bound, load the model alone"
            )


def _check_optimizer(optimizer: Optimizer, checkpoint: Checkpoint) -> None:
    source, saved = checkpoint.source, checkpoint.optimizer
    if saved is None:
        raise CheckpointError(f"{source} holds no optimizer state")
    if checkpoint.optimizer_class != type(optimizer).__name__:
        raise CheckpointError(
            f"{source} holds the state of a {checkpoint.optimizer_class}, the optimizer is a {type(optimizer).__name__}"
        )
    mine = optimizer.param_groups
    sizes, saved_sizes = ([len(group["params"]) for group in groups] for groups in (mine, saved["param_groups"]))
    if sizes != saved_sizes:
        raise CheckpointError(f"{source} holds parameter groups of {saved_sizes} parameters, the optimizer has {sizes}")
    for group, saved_group in zip(mine, saved["param_groups"], strict=True):
        names = zip(group.get("param_names", ()), saved_group.get("param_names", ()), strict=False)
        for name, saved_name in names:
            if name != saved_name:
                raise CheckpointError(
                    f"{source} holds the state of parameter {saved_name!r} where the optimizer has {name!r}"
                )


def _factorize(model: nn.Module, checkpoint: Checkpoint, dense: list[str], new_biases: bool) -> None:
    """Make the layers low-rank with arbitrary values; torch's random state stays as it is."""
    gpus = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    ranks = {name: checkpoint.rank[name] for name in dense}
    try:
        with torch.random.fork_rng(devices=gpus):
            factorize(model, rank=ranks, init="random")
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.source}: {error}") from None
    for name in dense:
        layer, bias = model.get_submodule(name), checkpoint.model.get(f"{name}.bias")
        if new_biases and bias is not None and layer.bias is None:
            layer.bias = nn.Parameter(torch.zeros_like(layer.U[:, 0]), requires_grad=layer.S.requires_grad)


def _check_tensors(model: nn.Module, checkpoint: Checkpoint) -> None:
    mine = model.state_dict()
    missing, unknown = sorted(mine.keys() - checkpoint.model.keys()), sorted(checkpoint.model.keys() - mine.keys())
    problems = [f"it lacks {', '.join(missing)}"] if missing else []
    problems += [f"the model has no {', '.join(unknown)}"] if unknown else []
    for name in mine.keys() & checkpoint.model.keys():
        shapes = [list(t.shape) if isinstance(t, Tensor) else "no tensor" for t in (checkpoint.model[name], mine[name])]
        if shapes[0] != shapes[1]:
            problems.append(f"{name} is {shapes[0]} in it and {shapes[1]} in the model")
    if problems:
        raise CheckpointError(f"{checkpoint.source} does not fit the model: {'; '.join(problems)}")
