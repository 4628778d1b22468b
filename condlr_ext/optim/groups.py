"""Parameter groups by role, and the low-rank layers that their parameters belong to."""

import itertools
from dataclasses import dataclass

from torch import Tensor, nn

from .._modules import check_module, unwrapped
from .._shards import local
from .._types import Options
from ..nn.layer import LowRankLayer, live_layers, low_rank_layers
from ..reference import ROLES

Position = tuple[int, int]  # group, index in group


def param_groups(
    model: nn.Module, *, factors: Options | None = None, cores: Options | None = None, other: Options | None = None
) -> list[Options]:
    """Return parameter groups of a model by role, each with its own options.

    Options that are left out are the optimizer's.

    Args:
        model: The model.
        factors: Options for all U and V, e.g. {"lr": 0.1}.
        cores: Options for all S; tau, band and sigma_max belong here.
        other: Options for biases and everything that is not factorized.

    Returns:
        Up to three group dicts with (name, parameter) pairs and a `roles` list of "U", "S", "V" or "other".

    Raises:
        ValueError: tau, band or sigma_max outside of cores, where nothing reads them.
    """
    check_module("param_groups", model)
    for key, options in (("factors", factors), ("other", other)):
        misplaced = sorted({"tau", "band", "sigma_max"} & set(options or {}))
        if misplaced:
            raise ValueError(f"param_groups: {', '.join(misplaced)} belong in cores, got them in {key}")
    chosen = {"factors": factors, "cores": cores, "other": other}
    groups = {key: {"params": [], "roles": [], **(options or {})} for key, options in chosen.items()}
    whole = module_group(model)
    for (name, p), role in zip(whole["params"], whole["roles"], strict=True):
        group = groups["other" if role == "other" else "cores" if role == "S" else "factors"]
        group["params"].append((name, p))
        group["roles"].append(role)
    return [g for g in groups.values() if g["params"]]


def module_group(model: nn.Module) -> dict:
    """Return one group of all parameters of a model, with their roles in its low-rank layers.

    The names are those of the model inside DistributedDataParallel and torch.compile, so that the optimizer's state can
    be loaded with any wrapper.

    Raises:
        ValueError: The factors of a layer are not its parameters.
    """
    model, role_of = unwrapped(model), {}
    for prefix, layer in low_rank_layers(model).items():
        role_of |= {_join(prefix, role): role for role in "USV"}
        if not any(role in layer._parameters for role in "USV"):
            raise ValueError(
                f"layer {prefix!r} must have U, S, V as its own parameters, got none; FullyShardedDataParallel"
                " flattens them into one, which cannot be stepped on the constraint set: use DistributedDataParallel"
            )
        refuse_computed(prefix, layer)
    params = list(model.named_parameters())
    return {"params": params, "roles": [role_of.get(name, "other") for name, _ in params]}


@dataclass(frozen=True)
class LayerSlots:
    """A low-rank layer in an optimizer.

    Attributes:
        name: Prefix of its parameter names; where they have none, its class and place.
        positions: (group, index in group) of U, S, V and bias, None for a missing bias.
        from_module: Whether it was found as the parameters of a module, not by `roles`.
    """

    name: str
    positions: tuple[Position | None, ...]
    from_module: bool


def link_layers(groups: list[dict], first: int = 0) -> list[LayerSlots]:
    """Return the low-rank layers that the parameters of groups[first:] form, in order of appearance.

    A parameter is a factor if an existing layer has it as one, whatever its name, or if its group's `roles` say so.
    `roles` are written into groups that have none.

    Raises:
        ValueError: A layer lacks some of its factors, or shares them, or they do not fit; a name occurs twice; or a
            `roles` list does not fit its group.
    """
    params: dict[Position, Tensor] = {}
    names: dict[Position, str] = {}
    given: dict[Position, str] = {}  # roles
    seen = {name for group in groups[:first] for name in group.get("param_names", ())}
    for g, group in enumerate(groups[first:], first):
        _check_roles(group)
        params |= {(g, i): p for i, p in enumerate(group["params"])}
        given |= {(g, i): role for i, role in enumerate(group.get("roles", ()))}
        for i, name in enumerate(group.get("param_names", ())):
            if name in seen:
                raise ValueError(f"two parameters are called {name!r}; give those of a second model a prefix")
            seen.add(name)
            names[g, i] = name
    no_factors = {at for at, role in given.items() if role == "other"}
    found = _existing_layers({id(p): at for at, p in params.items()}, names, no_factors)
    by_identity = {at for _, slots in found for at in slots.values()}
    found += _layers_by_role({at: role for at, role in given.items() if at not in by_identity | no_factors}, names)
    role_of = dict.fromkeys(params, "other")
    layers, biases = [], set()
    for name, slots in found:
        _check_factors(name, {role: params[slots[role]] for role in "USV" if role in slots})
        for role in "USV":
            if role_of[slots[role]] != "other":
                raise ValueError(f"{role} of layer {name!r} is a factor of something else too; shared ones cannot be")
            role_of[slots[role]] = role
        bias = slots.get("bias")  # of the first layer, if several share it
        positions = (*(slots[role] for role in "USV"), None if bias in biases else bias)
        layers.append(LayerSlots(name, positions, slots["S"] in by_identity))
        biases.add(bias)
    for g, group in enumerate(groups[first:], first):
        group.setdefault("roles", [role_of[g, i] for i in range(len(group["params"]))])
    return layers


def _check_roles(group: dict) -> None:
    """Raise ValueError if a group's `roles` do not fit its parameters."""
    roles, count = group.get("roles"), len(group["params"])
    if roles is None:
        return
    if len(roles) != count or not set(roles) <= {"U", "S", "V", "other"}:
        raise ValueError(f'roles must name "U", "S", "V" or "other" for each of {count} parameters, got {roles}')
    names = group.get("param_names")
    if names is None and set(roles) != {"other"}:
        raise ValueError("roles of parameters need their names: pass pairs of names and parameters")
    for name, role in zip(names or (), roles, strict=False):
        if role not in ("other", name.rpartition(".")[2]):
            raise ValueError(f"parameter {name!r} has the role {role!r}; the name of such a factor ends in {role!r}")


def _existing_layers(position_of: dict[int, Position], names: dict[Position, str], no_factors: set[Position]) -> list:
    """Return (name, position of each role) of the existing layers with a factor among parameters, given by id."""
    found = {}
    for layer in live_layers():
        parameters = vars(layer).get("_parameters", {})  # missing while a layer is being unpickled
        slots = {role: position_of.get(id(parameters.get(role))) for role in ROLES}
        slots = {k: at for k, at in slots.items() if at is not None and (k == "bias" or at not in no_factors)}
        if slots.keys() - {"bias"}:
            found[tuple(slots.get(role) for role in "USV")] = layer, slots  # once for copies that share all parameters
    whole = {at for key in found if None not in key for at in key}
    layers = []
    for key, (layer, slots) in found.items():
        if None in key and set(key) - {None} <= whole:
            continue  # what is left of a layer that another replaced
        role = next(role for role in "UVS" if role in slots)
        g, i = slots[role]
        name = names.get((g, i), f"{type(layer).__name__} at parameter {i} of group {g}")
        name = name.removesuffix(role).removesuffix(".") if name.rpartition(".")[2] == role else name
        refuse_computed(name, layer)
        layers.append((name, slots))
    return sorted(layers, key=lambda item: min(item[1].values()))


def _layers_by_role(roles: dict[Position, str], names: dict[Position, str]) -> list:
    """Return (name, position of each role) of the layers whose factors are known by their roles and names."""
    at_name = {name: at for at, name in names.items()}
    found = {}
    for at, role in roles.items():
        prefix = names[at].rpartition(".")[0]
        bias = at_name.get(_join(prefix, "bias"))
        found.setdefault(prefix, {} if bias is None else {"bias": bias})[role] = at
    return list(found.items())


def _check_factors(name: str, factors: dict[str, Tensor]) -> None:
    """Raise ValueError unless these are the whole U, S, V of a layer."""
    missing = [role for role in "SUV" if role not in factors]
    if missing:
        raise ValueError(
            f"layer {name!r} has {', '.join(sorted(factors))} in the parameter groups but not {', '.join(missing)};"
            ' pass all three (frozen ones too, shared ones cannot be), or give a group `roles` with "other" for what is'
            " no factor"
        )
    U, S, V = (factors[role] for role in "USV")
    r = S.shape[-1] if S.dim() else 0
    fits = all(X.dim() == 2 for X in (U, S, V)) and S.shape[0] == r == U.shape[1] == V.shape[1]
    if not fits or r > min(U.shape[0], V.shape[0]):
        shapes = ", ".join(f"{k} {list(X.shape)}" for k, X in sorted(factors.items()))
        raise ValueError(f"layer {name!r} must have U [m, r], S [r, r], V [n, r], got {shapes}")


def refuse_computed(prefix: str, layer: LowRankLayer) -> None:
    """Raise ValueError if a factor of the layer is no parameter: what is written into it would be lost."""
    computed = [role for role in "USV" if role not in layer._parameters]
    if computed:
        raise ValueError(
            f"layer {prefix!r} must have U, S, V as its own parameters, got {', '.join(computed)} that is computed"
            " (pruned, parametrized or normalized by a hook): make it permanent first"
        )


def refuse_overlaps(owner: str, layers: dict[str, list[Tensor | None]]) -> None:
    """Raise ValueError if two parameters of layers, or two places of one, share memory: a step would write it twice."""
    spans = []
    for name, params in layers.items():
        for role, p in zip(ROLES, params, strict=True):
            p = None if p is None else local(p)
            if p is None or p.is_meta or not p.numel() or not p.is_contiguous():
                continue  # views with strides may lie between each other
            start = p.data_ptr()
            spans.append((str(p.device), start, start + p.numel() * p.element_size(), f"{role} of layer {name!r}"))
    spans.sort()
    for (device, _, end, one), (other_device, start, _, other) in itertools.pairwise(spans):
        if device == other_device and start < end:
            raise ValueError(f"{owner}: {one} and {other} must not share memory; give each its own tensor")


def _join(prefix: str, leaf: str) -> str:
    return f"{prefix}.{leaf}" if prefix else leaf
