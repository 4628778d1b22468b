"""Checkpoints of other packages' low-rank layers, read into a model with the same function.

A source is a dict of tensors (a state_dict), or the path of a safetensors file or of a torch file of such a dict. Files
with pickled modules are refused, as loading one runs whatever is in it: write model.state_dict() with the code that
made it. Ranks are those of the tensors, without directions that hold exact zeros only. Factors that are not
orthonormal are replaced by their Q with R absorbed in the core; the function stays to rounding.

The model is the ordinary one, dense, with the layer names of the checkpoint; it is factorized in place. Every key of
the checkpoint must be used and every tensor of the model be in it, or nothing changes and an error names them. A core
comes as it is: an optimizer with tau < inf clips it when it is made.

    package       keys of a layer                weight                           source read for the layout
    CondLR        U [m, r], S_hat, V [n, r]      U S_hat Vᵀ                       COMPiLELab/CondLR
    RobustDLRT    U [n, R], S, V [m, R], r       (U S Vᵀ)ᵀ of the first r         ScSteffen/RobustDLRT
      conv2d      S [a, b, c, d], Us.0 ... 3, r  Tucker core and factors          ScSteffen/RobustDLRT
    GeoLoRA       lora_U [n, R], lora_S, lora_V  W + alpha / r (U S Vᵀ)ᵀ          ScSteffen/Publication-GeoLoRA..., GLUE
    OIALR         u, s, vh                       u s vh, transposed if m < n      Helmholtz-AI-Energy/OIALR
    PoLAR         lora_A [r, n], lora_S, lora_B  W + alpha / r B S A              kcc-lion/polar
"""

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from .._factors import orthonormal_factors
from .._modules import undone_on_error
from ..adapters import set_adapters
from ..errors import CheckpointError
from ..nn import LowRankAdapter
from .checkpoint import Checkpoint, read_safetensors, restore
from .lora import read_peft, scaling, split_keys

__all__ = ["condlr", "geolora", "oialr", "polar", "robust_dlrt"]


def condlr(source, model: nn.Module) -> dict[str, int]:
    """A network of the CondLR release: W = U S_hat Vᵀ, of convolutions flattened to [C_out, C_in * kernel].

    The release flattens a model into the list of its leaves; keys lr_model.0.U, lr_model.1.U ... are taken to mean the
    leaves of `model` in the order of its children. Its convolutions always have a bias, which the imported layers get.
    Its wide ResNets run as plain chains, as their residual sums are discarded: for the same function the model must be
    such a chain too.

    Args:
        source: tensors or path, see the module. model: changed in place.

    Returns:
        {layer: rank}.

    Raises:
        CheckpointError: damaged, unknown or missing keys, shapes that do not fit; the model is unchanged then.
        RankError: a layer of the model is low-rank already, with another rank.
    """
    state, where = _read(source)
    if any(key.startswith("lr_model.") for key in state):
        leaves = _leaves(model)
        state = {_rename_leaf(key, leaves, where): value for key, value in state.items()}

    def factors(name, take):
        U, S, V = (take(f"{name}.{part}") for part in ("U", "S_hat", "V"))
        return _product(where, name, U, S, V.mT)

    return _import(state, where, model, _prefixes(state, ".S_hat"), factors)


def robust_dlrt(source, model: nn.Module) -> dict[str, int]:
    """A network of the RobustDLRT release: linear layers x U S Vᵀ, Tucker convolutions, capacity cut to the rank `r`.

    Its convolutions add their bias twice, once inside and once outside of the Tucker convolution; the imported bias is
    the doubled one.

    Args, Returns, Raises: as condlr. The `r` of each layer, a number or four, is in the release's state_dict; columns
        beyond it are no part of the function, so that a checkpoint without it is refused.
    """
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
        return _product(where, name, Us[0], torch.eye(len(S), dtype=S.dtype), right)

    return _import(state, where, model, _prefixes(state, ".S"), factors)


def oialr(source, model: nn.Module) -> dict[str, int]:
    """A network of OIALR: W = u s vh, or its transpose where the weight has more columns than rows.

    Input projections of nn.MultiheadAttention (in_proj_u, in_proj_s, in_proj_vh) are loaded as dense weights.

    Args, Returns, Raises: as condlr.
    """
    state, where = _read(source)
    for prefix in [key.removesuffix("in_proj_s") for key in state if key.endswith("in_proj_s")]:
        parts = [f"{prefix}in_proj_{part}" for part in ("u", "s", "vh")]
        u, s, vh = (_taken(state, key, where) for key in parts)
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


def geolora(source, model: nn.Module, *, rank: int | dict[str, int], alpha: float) -> dict[str, int]:
    """A network with GeoLoRA adapters: x W0ᵀ + alpha / r (x U S Vᵀ), capacity cut to the rank r.

    The frozen weights come from the checkpoint as well (original_linear); the layers get LowRankAdapters.

    Args:
        source, model: as condlr.
        rank: r of all adapters or {layer: r}, alpha: both are attributes of the release's layers (r, alpha) that its
            state_dict does not hold.

    Returns, Raises: as condlr; ValueError: ranks for other layers.
    """
    state, where = _read(source)
    names = _prefixes(state, ".lora_S")
    ranks = rank if isinstance(rank, dict) else dict.fromkeys(names, rank)
    if set(ranks) != set(names):
        raise ValueError(f"{where}: rank must be given for {', '.join(names)}, got {', '.join(ranks)}")
    changes, tensors = {}, {}
    for name in names:
        _taken(state, f"{name}.Sinv", where)
        U, S, V = (_taken(state, f"{name}.lora_{part}", where) for part in ("U", "S", "V"))
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


def polar(source, model: nn.Module, *, alpha: float | None = None) -> dict[str, LowRankAdapter]:
    """PoLAR's adapters, delta W = alpha / r B S A, as LowRankAdapters on a base model.

    Args:
        source: the folder that PEFT's fork wrote (adapter_model.safetensors, adapter_config.json), or tensors or the
            path of them, which need `alpha`, lora_alpha there, and hold an S that is free ("identity").
        model: the base model, changed in place; its own parameters stay and are frozen.

    Returns:
        The adapters by name.

    Raises: as load_lora.
    """
    config = None
    if not isinstance(source, dict) and Path(source).is_dir():
        where = str(source)
        state, config = read_peft(Path(source), "LORA", "condlr_ext.importers.polar")
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
        "removal": lambda S: torch.eye(len(S), dtype=S.dtype),
    }
    if form not in forms:
        raise CheckpointError(f"{where}: parameterize_S must be one of {', '.join(forms)}, got {form!r}")
    changes = {}
    for name, parts in layers.items():
        r = len(parts["lora_A"])
        factors = _product(where, name, parts["lora_B"], forms[form](parts["lora_S"]), parts["lora_A"])
        changes[name] = (*factors, scaling(config, name, r, where) if config else float(alpha) / r)
    return set_adapters(model, changes, where)


# --------------------------------------------------------------------------------------------------- reading


def _read(source) -> tuple[dict, str]:
    """The entries of a state_dict, without a prefix "module." of all keys, and what to call it in errors."""
    where = "the checkpoint"
    if not isinstance(source, dict):
        where = str(source)
        if where.endswith(".safetensors"):
            source, _ = read_safetensors(source, "condlr_ext.importers")
        else:
            try:
                source = torch.load(source, map_location="cpu", weights_only=True)
            except OSError as error:
                raise CheckpointError(f"cannot read {where}: {error}") from None
            except Exception:  # of a file that is none of its own torch's reader raises anything
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


def _taken(state: dict, key: str, where: str):
    if key not in state:
        raise CheckpointError(f"{where} lacks {key}")
    return state.pop(key)


def _active(r, capacity, where: str, name: str) -> list[int]:
    """The active ranks of a layer, one for each number in `capacity` and at most that."""
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
    """orthonormal_factors of L C R, checked."""
    if any(t.dim() != 2 for t in (L, C, R)) or L.shape[1] != C.shape[0] or C.shape[1] != R.shape[0]:
        got = ", ".join(str(list(t.shape)) for t in (L, C, R))
        raise CheckpointError(f"{where}: the factors of layer {name!r} do not fit: {got}")
    if not all(torch.isfinite(t).all() for t in (L, C, R)):
        raise CheckpointError(f"{where}: the factors of layer {name!r} must be finite, got NaN or Inf")
    return orthonormal_factors(L, C, R.mT)


def _import(state: dict, where: str, model: nn.Module, names: list[str], factors) -> dict[str, int]:
    """Replaces the entries of each layer in `state` by U, S, V, and puts all into the model."""
    if not names:
        raise CheckpointError(f"{where} holds no low-rank layer of this layout, its keys are {', '.join(state)}")
    ranks, take = {}, functools.partial(_taken, state, where=where)
    for name in names:
        U, S, V = factors(name, take)
        state |= {f"{name}.U": U, f"{name}.S": S, f"{name}.V": V}
        ranks[name] = len(S)
    restore(model, Checkpoint(state, ranks, source=where), new_biases=True)
    return ranks


def _leaves(model: nn.Module, prefix: str = "") -> list[str]:
    """The names of the modules without children, in the order of the children."""
    names = []
    for key, child in model.named_children():
        names += _leaves(child, f"{prefix}{key}.") if any(True for _ in child.children()) else [prefix + key]
    return names


def _rename_leaf(key: str, leaves: list[str], where: str) -> str:
    index, _, rest = key.removeprefix("lr_model.").partition(".")
    if not key.startswith("lr_model.") or not index.isdecimal() or int(index) >= len(leaves):
        raise CheckpointError(f"{where}: {key} names no leaf of the model, it has {len(leaves)}")
    return f"{leaves[int(index)]}.{rest}"
