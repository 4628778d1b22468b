"""Checkpoints: a model, its optimizer and other state of a run in one safetensors file, written atomically."""

import json
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .._files import check_path
from .._modules import check_module, refuse_wrapped, undone_on_error, unwrapped, unwrapped_optimizer
from .._types import Options, Path
from .._version import __version__
from ..errors import CheckpointError, NonFiniteError, RankError
from ..factorize import factorize
from ..nn import low_rank_layers
from .optimizer_state import check_state
from .tensor_files import is_finite, plain, read_tensors, write_tensors

__all__ = ["Checkpoint", "load", "read", "save"]

Slack: TypeAlias = float | dict[str, float] | None  # one for all layers, or by layer

_FORMAT = "1"
_METADATA = ("rank", "tau", "shared", "state", "condlr_ext", "condlr_ext_format")
_DEEPEST = 100  # containers in one another
_FACTOR_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Checkpoint:
    """The content of a file.

    Attributes:
        model: The model's state_dict.
        rank: {low-rank layer: rank}.
        tau: {low-rank layer: tau}, where it was known.
        optimizer: The optimizer's state_dict or None.
        optimizer_class: Name of its class.
        optimizer_names: For each parameter group the model's names of its parameters, None for one that the model
            lacks; None in files that lack them.
        extra: As given to save.
        version: Version of condlr_ext that wrote the file.
        source: The file, for error texts.
    """

    model: dict[str, Any] = field(repr=False)
    rank: dict[str, int]
    tau: dict[str, float] = field(default_factory=dict)
    optimizer: Options | None = field(default=None, repr=False)
    optimizer_class: str | None = None
    optimizer_names: list[list[str | None]] | None = None
    extra: Any = None
    version: str = "unknown"
    source: str = "the checkpoint"


def save(
    model: nn.Module, path: Path, optimizer: Optimizer | None = None, *, tau: Slack = None, extra: Any = None
) -> None:
    """Write a model, and optionally its optimizer's state, to a safetensors file.

    The tensors have the names of the model's state_dict, so that other tools can read them; rank, tau and version are
    in the string metadata. Tensors of the optimizer and of `extra` are in the same file under names that begin with a
    dot, which no parameter's does; strict readers elsewhere must leave those out. Without such tensors the file is one
    of the model alone. Tensors that share memory (tied weights) are stored once. The file is written atomically: an
    interruption leaves the old file of that name, or none; its mode is what the umask leaves. Its metadata have a
    checksum of all else, which load compares.

    Args:
        model: Any module; names do not include wrappers of torch.compile, DataParallel or DistributedDataParallel.
        path: By convention NAME.safetensors.
        optimizer: Any torch optimizer; accelerate's and Lightning's wrappers are left out, too.
        tau: Slack of the bound where no parameter group holds it (under a Projector, say): one for all layers, or
            {layer: tau}.
        extra: Other state of the run: tensors, numbers, strings and None in dicts, lists and tuples, which are nested
            at most 100 deep.

    Raises:
        TypeError: model is no module, path no path, or a value cannot be stored, such as a complex128 tensor or one
            that is sharded or quantized.
        ValueError: A tensor has no values, as on the meta device, tau contradicts the optimizer's, or there are more
            than 100 MB of names and values outside of tensors.
        OSError: The file cannot be written.

    Examples:
        >>> optimizer = condlr_ext.optim.CondLRSGD(model, lr=0.1, tau=0.1)
        >>> condlr_ext.save(model, "run.safetensors", optimizer, extra={"epoch": 3, "rng": torch.get_rng_state()})
        >>> condlr_ext.load(model, "run.safetensors", optimizer).extra["epoch"]
        3
    """
    check_module("save", model)
    check_path("save", "path", path)
    model = unwrapped(model)
    writer = _Writer()
    state = {"model": {}, "optimizer": None, "extra": writer.encode(extra, ".extra")}
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            writer.put(name, value, share=True)
        else:  # a module's get_extra_state
            state["model"][name] = writer.encode(value, f".state.{name}")
    optimizer = unwrapped_optimizer(optimizer)
    if optimizer is not None:
        name = type(optimizer).__name__
        state["optimizer"] = {
            "class": name,
            "names": _names(model, optimizer),
            "state": writer.encode(optimizer.state_dict(), ".optimizer"),
        }
    text = {
        "rank": {name: layer.rank for name, layer in low_rank_layers(model).items()},
        "tau": writer.encode(_taus(model, optimizer, tau, "save"), ".tau"),
        "shared": writer.shared,
        "state": state,
    }
    metadata = {key: json.dumps(value, allow_nan=False) for key, value in text.items()}
    metadata |= {"format": "pt", "condlr_ext": __version__, "condlr_ext_format": _FORMAT}
    try:
        write_tensors(path, writer.tensors, metadata)
    except OSError as error:
        raise OSError(f"save: cannot write {path}: {error}") from None


def load(model: nn.Module, path: Path, optimizer: Optimizer | None = None, *, tau: Slack = None) -> Checkpoint:
    """Load a file written by save into a model, and optionally into its optimizer; training continues bit for bit.

    A safetensors file without metadata of save, as save_pretrained and other tools write, is taken for a state_dict,
    whose ranks are those of its U, S and V.

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
        TypeError: model is no module or path no path.
        CheckpointError: The file is missing or damaged, its tensors do not fit the model, the optimizer has another
            class, other parameters or other kinds of options, or tau differs.
        RankError: A layer has another rank.
        NonFiniteError: NaN or Inf in a factor.
    """
    check_module("load", model)
    check_path("load", "path", path)
    checkpoint = read(path)
    restore(model, checkpoint, optimizer, tau=tau)
    return checkpoint


def read(path: Path) -> Checkpoint:
    """Read a file written by save, or one of just a state_dict, to the CPU.

    Args:
        path: The file.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    tensors, text = read_tensors(path)
    if not text.keys() & set(_METADATA):
        return Checkpoint(tensors, _ranks(tensors), source=str(path))
    if missing := sorted(set(_METADATA) - text.keys()):
        raise CheckpointError(f"{path} was not written by condlr_ext.save: its metadata lacks {', '.join(missing)}")
    if text["condlr_ext_format"] != _FORMAT:
        raise CheckpointError(
            f"{path} has format {text['condlr_ext_format']} of condlr_ext {text['condlr_ext']}, this version reads"
            f" {_FORMAT}"
        )
    try:
        return _checkpoint(tensors, text, str(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has damaged metadata: {error}") from None


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
    wrapped, model, optimizer = model, unwrapped(model), unwrapped_optimizer(optimizer)
    source = checkpoint.source
    if any(t.is_meta for t in model.state_dict().values() if isinstance(t, Tensor)):
        raise CheckpointError(f"{source}: the model is on the meta device; call model.to_empty(device=...) first")
    _check_finite(checkpoint)
    dense = _compare_ranks(model, checkpoint)
    if dense:
        _refuse_adapters(model, checkpoint, dense)
        refuse_wrapped("load", wrapped)
    _compare_taus(checkpoint, _taus(model, optimizer, tau, "load"))
    if optimizer is not None:
        if dense:
            raise CheckpointError(
                f"{source}: layer {dense[0]!r} is still dense, and will not be the optimizer's once factorized; call"
                " load(model, path), make the optimizer, then load(model, path, optimizer)"
            )
        _check_optimizer(model, optimizer, checkpoint)
    with undone_on_error(model):
        if dense:
            _factorize(model, checkpoint, dense, new_biases)
        state = _with_tied(model, checkpoint.model)
        _check_tensors(model, state, source)
        if optimizer is not None:
            try:
                optimizer.load_state_dict(_with_options(optimizer, checkpoint.optimizer))
            except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
                raise CheckpointError(f"{source}: {error}") from None
        model.load_state_dict(state)


def compare(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Raise unless a checkpoint has the ranks and the tensors of a model, which may be on the meta device.

    Raises:
        RankError: A layer has another rank.
        CheckpointError: Tensors are missing or unknown, or have other shapes or kinds of numbers.
    """
    if dense := _compare_ranks(model, checkpoint):
        raise RankError(f"{checkpoint.source}: layer {dense[0]!r} is dense in the model and low-rank in the file")
    _check_tensors(model, checkpoint.model, checkpoint.source)


# --------------------------------------------------------------------------------------------------- values


class _Writer:
    """Collector of tensors by name that encodes all other values exactly as JSON."""

    def __init__(self):
        self.tensors: dict[str, Tensor] = {}
        self.shared: dict[str, str] = {}
        self._seen: dict[tuple, str] = {}

    def put(self, name: str, t: Tensor, share: bool = False) -> None:
        """Store a tensor; with `share`, one that is stored already only gets an entry in `shared`."""
        values = plain(name.removeprefix("."), t)
        if share and t.numel():
            place = (t.device, t.data_ptr(), t.shape, t.stride(), t.dtype, t.is_conj(), t.is_neg())
            first = self._seen.setdefault(place, name)
            if first != name:
                self.shared[name] = first
                return
        self.tensors[name] = values.to("cpu", copy=True, memory_format=torch.contiguous_format)

    def encode(self, value, place: str, depth: int = 0):
        """Return a value of JSON that _Reader turns back; tensors are stored under `place`, a path in the file."""
        if depth > _DEEPEST:
            raise TypeError(f"save: {place[1:60]}... must be nested at most {_DEEPEST} deep")
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
            return [self.encode(v, f"{place}.{i}", depth + 1) for i, v in enumerate(value)]
        if type(value) is tuple:
            return {"$tuple": self.encode(list(value), place, depth)}
        if isinstance(value, dict):
            kind = "$counter" if isinstance(value, Counter) else "$dict"
            if kind == "$dict" and all(type(k) is str and not k.startswith("$") for k in value):
                return {k: self.encode(v, f"{place}.{k}", depth + 1) for k, v in value.items()}
            pairs = [
                [self.encode(k, f"{place}.key{i}", depth + 1), self.encode(v, f"{place}.{k}", depth + 1)]
                for i, (k, v) in enumerate(value.items())
            ]
            return {kind: pairs}
        raise TypeError(
            f"save: {place.removeprefix('.')} must be a tensor, number, string, None or a dict, list or tuple of these,"
            f" got {type(value).__name__}"
        )


class _Reader:
    """The inverse of _Writer.encode.

    Attributes:
        tensors: Those that no value has taken yet; each belongs to one.
    """

    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors = tensors

    def decode(self, value, depth: int = 0):
        """Return the value that was encoded.

        Raises:
            ValueError: There is none.
        """
        if depth > _DEEPEST:
            raise ValueError(f"values must be nested at most {_DEEPEST} deep")
        if isinstance(value, list):
            return [self.decode(v, depth + 1) for v in value]
        if not isinstance(value, dict):
            return value
        if not any(key.startswith("$") for key in value):
            return {key: self.decode(v, depth + 1) for key, v in value.items()}
        kind, content = next(iter(value.items()))
        if len(value) == 1:
            if kind == "$tensor" and isinstance(content, str):
                if content not in self.tensors:
                    raise ValueError(f"the tensor {content!r} is not there, or has two places")
                return self.tensors.pop(content)
            if kind == "$float" and content in ("inf", "-inf", "nan"):
                return float(content)
            if kind == "$tuple" and isinstance(content, list):
                return tuple(self.decode(content, depth))
            if kind in ("$dict", "$counter") and isinstance(content, list):
                return self._dict(content, depth, Counter if kind == "$counter" else dict)
        raise ValueError(f"{str(value)[:60]} stands for no value")

    def _dict(self, pairs: list, depth: int, cls: type) -> dict:
        if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
            raise ValueError("a dict must have pairs of key and value")
        pairs = [(self.decode(k, depth + 1), self.decode(v, depth + 1)) for k, v in pairs]
        try:
            found = dict(pairs)
        except TypeError as error:
            raise ValueError(f"a dict has a key that none can have: {error}") from None
        if len(found) < len(pairs):
            raise ValueError("a dict has a key twice")
        return cls(found)


# ----------------------------------------------------------------------------------------------- the schema


def _checkpoint(tensors: dict[str, Tensor], text: dict[str, str], source: str) -> Checkpoint:
    """Return the content of a file with metadata of save.

    Raises:
        ValueError: It is not what save writes.
    """
    rank, tau, shared, state = (_parsed(key, text[key]) for key in ("rank", "tau", "shared", "state"))
    model = {name: t for name, t in tensors.items() if not name.startswith(".")}
    reader = _Reader({name: t for name, t in tensors.items() if name.startswith(".")})
    if not all(type(r) is int and r >= 1 for r in rank.values()):
        raise ValueError("rank must have integers >= 1")
    taus = {name: reader.decode(t) for name, t in tau.items()}
    numbers = all(type(t) in (int, float) and (0 <= t < 2**1023 or t == math.inf) for t in taus.values())
    if not taus.keys() <= rank.keys() or not numbers:
        raise ValueError("tau must have numbers >= 0 for layers in rank")
    for alias, name in shared.items():
        if alias in tensors or not isinstance(name, str) or name not in model:
            raise ValueError(f"shared must name stored tensors by further names, got {name!r} for {alias!r}")
    if state.keys() != {"model", "optimizer", "extra"} or not isinstance(state["model"], dict):
        raise ValueError("state must have model, optimizer and extra")
    model |= {alias: model[name] for alias, name in shared.items()}
    if twice := sorted(model.keys() & state["model"].keys()):
        raise ValueError(f"the model's state has {twice[0]} twice")
    model |= {name: reader.decode(value) for name, value in state["model"].items()}
    checkpoint = Checkpoint(
        model=model,
        rank=rank,
        tau={name: float(t) for name, t in taus.items()},
        **_optimizer(reader, state["optimizer"]),
        extra=reader.decode(state["extra"]),
        version=text["condlr_ext"],
        source=source,
    )
    if reader.tensors:
        raise ValueError(f"no value is the tensor {min(reader.tensors)!r}")
    return checkpoint


def _optimizer(reader: _Reader, stored) -> dict[str, Any]:
    """Return the optimizer's part of a Checkpoint; what its state holds is checked when it is loaded."""
    if stored is None:
        return {}
    if not isinstance(stored, dict) or not {"class", "state"} <= stored.keys() <= {"class", "state", "names"}:
        raise ValueError("optimizer must be null, or have class, names and state")
    names = stored.get("names")
    if not isinstance(stored["class"], str) or not isinstance(stored["state"], dict):
        raise ValueError("optimizer must have a text class and a dict state")
    if names is not None and not (
        isinstance(names, list)
        and all(isinstance(group, list) for group in names)
        and all(name is None or isinstance(name, str) for group in names for name in group)
    ):
        raise ValueError("names of the optimizer must be a list of texts for each of its groups")
    state = reader.decode(stored["state"])
    return {"optimizer": state, "optimizer_class": stored["class"], "optimizer_names": names}


def _parsed(key: str, text: str) -> dict:
    """Return the dict in a metadata text.

    Raises:
        ValueError: It is not JSON, has numbers that save does not write, or holds something else.
    """

    def refuse(number: str):
        raise ValueError(f"{number[:20]} is no finite number")

    def finite(number: str) -> float:
        return value if math.isfinite(value := float(number)) else refuse(number)

    value = json.loads(text, parse_constant=refuse, parse_float=finite)
    if not isinstance(value, dict):
        raise ValueError(f"{key} must be a dict, got {type(value).__name__}")
    return value


def _ranks(tensors: dict[str, Tensor]) -> dict[str, int]:
    """Return {layer: rank} for the layers whose U [m, r], S [r, r] and V [n, r] are among the tensors."""
    ranks = {}
    for key, S in tensors.items():
        prefix, dot, leaf = key.rpartition(".")
        U, V = (tensors.get(f"{prefix}{dot}{role}") for role in "UV")
        if leaf == "S" and U is not None and V is not None and S.dim() == U.dim() == V.dim() == 2:
            if S.shape == (U.shape[1], V.shape[1]) and S.shape[0] == S.shape[1]:
                ranks[prefix] = S.shape[0]
    return ranks


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
            if not isinstance(factor, Tensor):
                continue
            if factor.dtype not in _FACTOR_DTYPES:
                raise CheckpointError(
                    f"{checkpoint.source}: {role} of layer {name!r} must be of 16, 32 or 64 bits floating-point, got"
                    f" {factor.dtype}"
                )
            if not torch.isfinite(factor).all():
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


def _refuse_adapters(model: nn.Module, checkpoint: Checkpoint, dense: list[str]) -> None:
    """Raise CheckpointError if a low-rank layer of the file is the change of an adapter that the model lacks."""
    names = [name.rpartition("delta")[0].rstrip(".") for name in dense if name.rpartition(".")[2] == "delta"]
    names = [name for name in names if checkpoint.model.keys() & {f"{name}.layer.weight", f"{name}.layer.U"}]
    if names:
        raise CheckpointError(
            f"{checkpoint.source}: it holds LowRankAdapters of {', '.join(names)}, which the model lacks; call"
            " add_adapters first, with their ranks"
        )


def _compare_taus(checkpoint: Checkpoint, taus: dict[str, float]) -> None:
    for name, tau in taus.items():
        if name in checkpoint.tau and checkpoint.tau[name] != tau:
            raise CheckpointError(
                f"{checkpoint.source}: layer {name!r} has tau {tau:g} in the optimizer and tau"
                f" {checkpoint.tau[name]:g} in the file; to train on under another bound, load the model alone"
            )


def _check_optimizer(model: nn.Module, optimizer: Optimizer, checkpoint: Checkpoint) -> None:
    source, saved = checkpoint.source, checkpoint.optimizer
    if saved is None:
        raise CheckpointError(f"{source} holds no optimizer state")
    if checkpoint.optimizer_class != type(optimizer).__name__:
        raise CheckpointError(
            f"{source} holds the state of {checkpoint.optimizer_class}, the optimizer is {type(optimizer).__name__}"
        )
    try:
        check_state(optimizer, saved)
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from None
    names = _names(model, optimizer)  # the optimizer itself goes by the position of a parameter
    for here, there in zip(names, checkpoint.optimizer_names or names, strict=False):
        for name, saved_name in zip(here, there, strict=False):
            if name != saved_name:
                raise CheckpointError(
                    f"{source} holds the state of parameter {saved_name!r} where the optimizer has {name!r}"
                )


def _with_options(optimizer: Optimizer, saved: dict) -> dict:
    """Return an optimizer's state with its present values for the options that its groups lack."""
    groups = [
        saved_group | {key: group[key] for key in optimizer.defaults if key in group and key not in saved_group}
        for group, saved_group in zip(optimizer.param_groups, saved["param_groups"], strict=True)
    ]
    return saved | {"param_groups": groups}


def _names(model: nn.Module, optimizer: Optimizer) -> list[list[str | None]]:
    """Return the model's names of the parameters in each group."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [[names.get(id(p)) for p in group["params"]] for group in optimizer.param_groups]


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


def _with_tied(model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """Return the state with the further names of tied parameters, which other tools leave out."""
    stored = {id(p): state[name] for name, p in model.named_parameters(remove_duplicate=False) if name in state}
    return state | {
        name: stored[id(p)]
        for name, p in model.named_parameters(remove_duplicate=False)
        if name not in state and id(p) in stored
    }


def _check_tensors(model: nn.Module, state: dict[str, Any], source: str) -> None:
    mine = model.state_dict()
    missing, unknown = sorted(mine.keys() - state.keys()), sorted(state.keys() - mine.keys())
    problems = [f"it lacks {', '.join(missing)}"] if missing else []
    problems += [f"the model has no {', '.join(unknown)}"] if unknown else []
    for name in mine.keys() & state.keys():
        there, here = state[name], mine[name]
        shapes = [list(t.shape) if isinstance(t, Tensor) else "no tensor" for t in (there, here)]
        if shapes[0] != shapes[1]:
            problems.append(f"{name} is {shapes[0]} in it and {shapes[1]} in the model")
        elif isinstance(here, Tensor) and _number_kind(there) != _number_kind(here):
            problems.append(f"{name} is {there.dtype} in it and {here.dtype} in the model")
        elif isinstance(here, Tensor) and there.dtype != here.dtype and is_finite(there):
            if not is_finite(there.to(here.dtype)):
                problems.append(f"{name} is beyond the range of {here.dtype}, that of the model")
    if problems:
        raise CheckpointError(f"{source} does not fit the model: {'; '.join(problems)}")


def _number_kind(t: Tensor):
    """Return what loading a tensor must not change; floating-point numbers may be rounded."""
    return "real" if t.is_floating_point() else "complex" if t.is_complex() else t.dtype
