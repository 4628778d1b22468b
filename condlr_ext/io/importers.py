"""Import of other packages' low-rank checkpoints into a model with the same function.

A source is a dict of tensors (a state_dict), or the path of a safetensors file or of a torch file of such a dict. Files
with pickled modules are refused, because loading them runs code: write model.state_dict() with the code that made them.
Factors that are not orthonormal are replaced by their Q, with R absorbed in the core; the function stays the same to
rounding. The rank is that of the tensors, without directions of exact zeros.

The model is the ordinary dense one, with the layer names of the checkpoint; it is factorized in place. Every key of the
checkpoint must be used and every tensor of the model set, or an error names them and nothing changes. Cores are not
clipped here: an optimizer with tau < inf does that at construction.

    package       keys of a layer                weight                           source of the layout
    CondLR        U [m, r], S_hat, V [n, r]      U S_hat Vᵀ                       COMPiLELab/CondLR
    RobustDLRT    U [n, R], S, V [m, R], r       (U S Vᵀ)ᵀ of the first r         ScSteffen/RobustDLRT
      conv2d      S [a, b, c, d], Us.0 ... 3, r  Tucker core and factors          ScSteffen/RobustDLRT
    GeoLoRA       lora_U [n, R], lora_S, lora_V  W + alpha / r (U S Vᵀ)ᵀ          ScSteffen/Publication-GeoLoRA..., GLUE
    OIALR         u, s, vh                       u s vh, transposed if m < n      Helmholtz-AI-Energy/OIALR
    PoLAR         lora_A [r, n], lora_S, lora_B  W + alpha / r B S A              kcc-lion/polar
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .. import _types
from .._factors import orthonormal_factors
from .._files import check_path
from .._modules import check_module, undone_on_error
from ..adapters import set_adapters
from ..errors import CheckpointError
from ..nn import LowRankAdapter
from .checkpoint import Checkpoint, restore
from .lora import read_peft, scaling, split_keys
from .tensor_files import read_tensors

__all__ = ["condlr", "geolora", "oialr", "polar", "robust_dlrt"]

Source: TypeAlias = _types.Path | dict[str, Any]  # a file, or its tensors


def condlr(source: Source, model: nn.Module) -> dict[str, int]:
    """Import a network of the CondLR release: W = U S_hat Vᵀ, for convolutions flattened to [C_out, C_in * kernel].

    The release flattens a model into the list of its leaves: keys lr_model.0.U, lr_model.1.U ... stand for the leaves
    of `model` in the order of its children. Its convolutions always have a bias, which the imported layers get. Its
    wide ResNets run as plain chains without the residual sums: for the same function the model must be such a chain.

    Args:
        source: Tensors or path, see the module.
        model: Changed in place.

    Returns:
        {layer: rank}.

    Raises:
        CheckpointError: Keys are damaged, unknown or missing, or shapes do not fit; the model is unchanged then.
        RankError: A layer of the model is low-rank already, with another rank.
    """
    _check("condlr", source, model)
    state, where = _read(source)
    if any(key.startswith("lr_model.") for key in state):
        leaves = _leaves(model)
        state = {_rename_leaf(key, leaves, where): value for key, value in state.items()}

    def factors(name, take):
        U, S, V = (take(f"{name}.{part}") for part in ("U", "S_hat", "V"))
        return _product(where, name, U, S, V.mT)

    return _import(state, where, model, _prefixes(state, ".S_hat"), factors)


def robust_dlrt(source: Source, model: nn.Module) -> dict[str, int]:
    """Import a network of the RobustDLRT release: linear layers x U S Vᵀ and Tucker convolutions.

    The `r` of each layer, one number or four, must be in the state_dict: columns beyond it are not part of the
    function. The release's convolutions add their bias twice, inside and outside the Tucker convolution; the imported
    bias is the doubled one.

    Args:
        source: Tensors or path, see the module.
        model: Changed in place.

    Returns:
        {layer: rank}.

    Raises:
        CheckpointError: Keys are damaged, unknown or missing, or shapes do not fit; the model is unchanged then.
        RankError: A layer of the model is low-rank already, with another rank.
    """
    _check("robust_dlrt", source, model)
    state, where = _read(source)

    def factors(name, take):
        S = take(f"{name}.S")
        if S.dim() == 2:
            (r,) = _active(take(f"{name}.r"), S.shape[:1], where, name)
            U, V = take(f"{name}.U")[:, :r], take(f"{name}.V")[:, :r]
            return _product(where, name, V, S[:r, :r].mT, U.mT)
        ranks = _active(take(f"{name}.r"), S.shape, where, name)
        Us = [take(f"{name}.Us.{i}")[:, :r] for i, r in enumerate(ranks)]
        S = S[tuple(slice(r) for r in ranks)]
        if tuple(U.shape[1] for U in Us) != S.shape:
            raise CheckpointError(f"{where}: the factors of layer {name!r} do not fit its core {list(S.shape)}")
        if f"{name}.bias" in state:
            state[f"{name}.bias"] = 2 * state[f"{name}.bias"]
        right = torch.einsum("abcd,ib,hc,wd->aihw", S, *Us[1:]).flatten(1)
        return _product(where, name, Us[0], torch.eye(len(S), dtype=S.dtype, device=S.device), right)

    return _import(state, where, model, _prefixes(state, ".S"), factors)


def oialr(source: Source, model: nn.Module) -> dict[str, int]:
    """Import a network of OIALR: W = u s vh, or its transpose where the weight has more columns than rows.

    Input projections of nn.MultiheadAttention (in_proj_u, in_proj_s, in_proj_vh) are loaded as dense weights.

    Args:
        source: Tensors or path, see the module.
        model: Changed in place.

    Returns:
        {layer: rank}.

    Raises:
        CheckpointError: Keys are damaged, unknown or missing, or shapes do not fit; the model is unchanged then.
        RankError: A layer of the model is low-rank already, with another rank.
    """
    _check("oialr", source, model)
    state, where = _read(source)
    for prefix in [key.removesuffix("in_proj_s") for key in state if key.endswith("in_proj_s")]:
        parts = [f"{prefix}in_proj_{part}" for part in ("u", "s", "vh")]
        u, s, vh = (_pop(state, key, where) for key in parts)
        with _fitting(where, prefix.rstrip(".")):
            state[f"{prefix}in_proj_weight"] = u @ s @ vh

    def factors(name, take):
        u, s, vh = (take(f"{name}.{part}") for part in ("u", "s", "vh"))
        weight = getattr(dict(model.named_modules()).get(name), "weight", None)
        if weight is None:
            raise CheckpointError(f"{where}: the model has no layer {name!r} with a weight")
        if weight.shape[0] >= weight[0].numel():
            return _product(where, name, u, s, vh)
        return _product(where, name, vh.mT, s.mT, u.mT)

    return _import(state, where, model, _prefixes(state, ".s"), factors)


def geolora(source: Source, model: nn.Module, *, rank: int | dict[str, int], alpha: float) -> dict[str, int]:
    """Import a network with GeoLoRA adapters: x W0ᵀ + alpha / r (x U S Vᵀ).

    The layers get LowRankAdapters; the frozen weights come from the checkpoint too (original_linear).

    Args:
        source: Tensors or path, see the module.
        model: Changed in place.
        rank: r of all adapters, or {layer: r}: an attribute of the release's layers that its state_dict lacks. Columns
            beyond it are dropped.
        alpha: Their attribute alpha, likewise.

    Returns:
        {layer: rank}.

    Raises:
        CheckpointError: Keys are damaged, unknown or missing, or shapes do not fit; the model is unchanged then.
        ValueError: `rank` names other layers.
    """
    _check("geolora", source, model)
    state, where = _read(source)
    names = _prefixes(state, ".lora_S")
    ranks = rank if isinstance(rank, dict) else dict.fromkeys(names, rank)
    if set(ranks) != set(names):
        raise ValueError(f"{where}: rank must be given for {', '.join(names)}, got {', '.join(ranks)}")
    changes, tensors = {}, {}
    for name in names:
        _pop(state, f"{name}.Sinv", where)
        U, S, V = (_pop(state, f"{name}.lora_{part}", where) for part in ("U", "S", "V"))
        with _fitting(where, name):
            (r,) = _active(ranks[name], S.shape[:1], where, name)
            factors = _product(where, name, V[:, :r], S[:r, :r].mT, U[:, :r].mT)
        changes[name] = (*factors, float(alpha) / r)
    for key, value in state.items():
        tensors[key.replace(".original_linear.", ".layer.")] = value
    with undone_on_error(model):
        adapters = set_adapters(model, changes, where)
        for name, (U, S, V, _) in changes.items():
            delta = adapters[name].delta
            tensors |= {f"{name}.delta.{role}": value for role, value in zip("USV", (U, S, V), strict=True)}
            if not S.any():
                tensors |= {f"{name}.delta.{role}": getattr(delta, role).detach() for role in "USV"}
        restore(
            model, Checkpoint(tensors, {f"{name}.delta": len(S) for name, (_, S, *_) in changes.items()}, source=where)
        )
    return {name: adapter.rank for name, adapter in adapters.items()}


def polar(source: Source, model: nn.Module, *, alpha: float | None = None) -> dict[str, LowRankAdapter]:
    """Import PoLAR's adapters, delta W = alpha / r B S A, as LowRankAdapters of a base model.

    Args:
        source: Folder written by PoLAR's fork of PEFT (adapter_model.safetensors, adapter_config.json), or tensors or
            their path; these need `alpha` and an S that is free ("identity").
        model: The base model, changed in place; its own parameters stay and are frozen.
        alpha: lora_alpha, where no adapter_config.json has it.

    Returns:
        The adapters by name.

    Raises:
        CheckpointError: Files are missing or damaged, keys are unknown or missing, or shapes do not fit.
        ValueError: The model lacks a layer or has it in another shape, or alpha is missing.
    """
    _check("polar", source, model)
    config = None
    if not isinstance(source, dict) and Path(source).is_dir():
        where = str(source)
        state, config = read_peft(Path(source), ("adapter_name", "parameterize_S"))
    else:
        state, where = _read(source)
        if alpha is None:
            raise ValueError(f"{where}: polar needs alpha where no adapter_config.json says it")
    endings = (".weight", ".parametrizations.weight.original")
    layers = split_keys(state, {"lora_A": endings[:1], "lora_S": endings, "lora_B": endings[:1]}, where)
    form = (config or {}).get("parameterize_S", "identity")
    forms: dict[str, Callable[[Tensor], Tensor]] = {
        "identity": lambda S: S,
        "diagonal": lambda S: S.diagonal().diag(),
        "removal": lambda S: torch.eye(len(S), dtype=S.dtype, device=S.device),
    }
    if form not in forms:
        raise CheckpointError(f"{where}: parameterize_S must be one of {', '.join(forms)}, got {form!r}")
    changes = {}
    for name, parts in layers.items():
        r = len(parts["lora_A"])
        with _fitting(where, name):
            factors = _product(where, name, parts["lora_B"], forms[form](parts["lora_S"]), parts["lora_A"])
        changes[name] = (*factors, scaling(config, name, r, where) if config else float(alpha) / r)
    return set_adapters(model, changes, where)


# --------------------------------------------------------------------------------------------------- reading


def _check(function: str, source, model) -> None:
    """Raise TypeError unless source is a dict or a path and model a Module."""
    check_module(f"importers.{function}", model)
    if not isinstance(source, dict):
        check_path(f"importers.{function}", "source, where it is no dict of tensors,", source)


def _read(source) -> tuple[dict, str]:
    """Return the entries of a state_dict without the prefix "module.", and its name for error texts."""
    where = "the checkpoint"
    if not isinstance(source, dict):
        where = str(source)
        if where.endswith(".safetensors"):
            source, _ = read_tensors(source)
        else:
            try:
                source = torch.load(source, map_location="cpu", weights_only=True)
            except OSError as error:
                raise CheckpointError(f"cannot read {where}: {error}") from None
            except Exception:  # for a foreign file torch.load may raise anything
                raise CheckpointError(
                    f"{where} is damaged or holds pickled objects, which are not loaded; write the state_dict of its"
                    " model with the code that made it"
                ) from None
    if not isinstance(source, dict) or not any(isinstance(value, Tensor) for value in source.values()):
        got = f"a dict of {', '.join(map(str, source))}" if isinstance(source, dict) else type(source).__name__
        raise CheckpointError(f"{where} must hold a dict of tensors, got {got}")
    state = {str(key): value.detach().cpu() if isinstance(value, Tensor) else value for key, value in source.items()}
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return state, where


def _prefixes(state: dict, ending: str) -> list[str]:
    return [key.removesuffix(ending) for key in state if key.endswith(ending)]


def _pop(state: dict, key: str, where: str):
    if key not in state:
        raise CheckpointError(f"{where} lacks {key}")
    return state.pop(key)


@contextmanager
def _fitting(where: str, name: str) -> Iterator[None]:
    """Turn what torch says about tensors of other shapes, or values that are none, into a CheckpointError."""
    try:
        yield
    except (RuntimeError, LookupError, AttributeError, TypeError) as error:
        text = " ".join(str(error).split())
        raise CheckpointError(f"{where}: the factors of layer {name!r} do not fit: {text}") from None


def _active(r, capacity, where: str, name: str) -> list[int]:
    """Return the active ranks of a layer, one for each number in `capacity` and at most that."""
    values = r.flatten().tolist() if isinstance(r, Tensor) else list(r) if isinstance(r, (list, tuple)) else [r]
    fits = len(values) == len(capacity) and all(
        isinstance(v, int) and 1 <= v <= most for v, most in zip(values, capacity, strict=True)
    )
    if not fits:
        raise CheckpointError(
            f"{where}: the rank r of layer {name!r} must be in 1..{', 1..'.join(map(str, capacity))}, got {r!r}"
        )
    return values


def _product(where: str, name: str, L: Tensor, C: Tensor, R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Check the factors of a product L C R and return it as U, S, V."""
    if any(t.dim() != 2 for t in (L, C, R)) or L.shape[1] != C.shape[0] or C.shape[1] != R.shape[0]:
        got = ", ".join(str(list(t.shape)) for t in (L, C, R))
        raise CheckpointError(f"{where}: the factors of layer {name!r} do not fit: {got}")
    if not all(torch.isfinite(t).all() for t in (L, C, R)):
        raise CheckpointError(f"{where}: the factors of layer {name!r} must be finite, got NaN or Inf")
    return orthonormal_factors(L, C, R.mT)


def _import(state: dict, where: str, model: nn.Module, names: list[str], factors) -> dict[str, int]:
    """Replace the entries of each layer in `state` by U, S, V and load all into the model; return the ranks."""
    if not names:
        raise CheckpointError(f"{where} holds no low-rank layer of this layout, its keys are {', '.join(state)}")
    ranks, take = {}, functools.partial(_pop, state, where=where)
    for name in names:
        with _fitting(where, name):
            U, S, V = factors(name, take)
        state |= {f"{name}.U": U, f"{name}.S": S, f"{name}.V": V}
        ranks[name] = len(S)
    restore(model, Checkpoint(state, ranks, source=where), new_biases=True)
    return ranks


def _leaves(model: nn.Module, prefix: str = "") -> list[str]:
    """Return the names of the modules without children, in the order of the children."""
    names = []
    for key, child in model.named_children():
        names += _leaves(child, f"{prefix}{key}.") if any(True for _ in child.children()) else [prefix + key]
    return names


def _rename_leaf(key: str, leaves: list[str], where: str) -> str:
    index, _, rest = key.removeprefix("lr_model.").partition(".")
    if not key.startswith("lr_model.") or not index.isdecimal() or int(index) >= len(leaves):
        raise CheckpointError(f"{where}: {key} names no leaf of the model, it has {len(leaves)}")
    return f"{leaves[int(index)]}.{rest}"
