"""Parameter groups by role, and the low-rank layers that their parameters form."""

from dataclasses import dataclass

from torch import Tensor, nn

from .._modules import check_module, unwrapped
from ..nn.layer import LowRankLayer, is_factor, low_rank_layers
from ..reference import ROLES


def param_groups(model: nn.Module, *, factors=None, cores=None, other=None) -> list[dict]:
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
        name: Prefix of its parameter names.
        positions: (group, index in group) of U, S, V and bias, None for a missing bias.
    """

    name: str
    positions: tuple[tuple[int, int] | None, ...]


def assign_roles(groups: list[dict]) -> None:
    """Write `roles` into named groups that have none: of prefix.U, prefix.S, prefix.V with fitting shapes.

    Raises:
        ValueError: A layer lacks some of its factors, a name occurs twice, a `roles` list does not fit its group, or
            factors have no names.
    """
    found: dict[str, dict[str, Tensor]] = {}
    seen = set()
    for group in groups:
        names, roles = group.get("param_names"), group.get("roles")
        if names is None:
            _refuse_bare_factors(group)
            continue
        if roles is not None and (len(roles) != len(group["params"]) or not set(roles) <= {"U", "S", "V", "other"}):
            raise ValueError(
                f'roles must name "U", "S", "V" or "other" for each of {len(group["params"])} parameters, got {roles}'
            )
        for i, (name, p) in enumerate(zip(names, group["params"], strict=True)):
            if name in seen:
                raise ValueError(f"two parameters are called {name!r}; give those of a second model a prefix")
            seen.add(name)
            prefix, _, leaf = name.rpartition(".")
            role = roles[i] if roles is not None else leaf if leaf in ("U", "S", "V") else "other"
            if role not in ("other", leaf):
                raise ValueError(
                    f"parameter {name!r} has the role {role!r}; the name of such a factor ends in {role!r}"
                )
            if role != "other":
                found.setdefault(prefix, {})[role] = p
    layers = set()
    for prefix, factors in found.items():
        refuse_sharded(prefix, factors)
        if len(factors) < 3:
            missing, present = (", ".join(sorted(k)) for k in ({"U", "S", "V"} - set(factors), factors))
            raise ValueError(
                f"layer {prefix!r} has {present} in the parameter groups but not {missing}; pass all three (frozen"
                ' ones too, shared ones cannot be), or give a group `roles` with "other" for what is no factor'
            )
        if _is_layer(**factors):
            layers.add(prefix)
    for group in groups:
        if "param_names" not in group:
            continue
        split = [name.rpartition(".") for name in group["param_names"]]
        if "roles" not in group:
            group["roles"] = [leaf if leaf in "USV" and prefix in layers else "other" for prefix, _, leaf in split]
        for (prefix, _, _), role in zip(split, group["roles"], strict=True):
            if role != "other" and prefix not in layers:
                shapes = ", ".join(f"{k} {list(X.shape)}" for k, X in sorted(found[prefix].items()))
                raise ValueError(f"layer {prefix!r} must have U [m, r], S [r, r], V [n, r], got {shapes}")


def link_layers(groups: list[dict]) -> list[LayerSlots]:
    """Return the low-rank layers formed by the groups' names and roles, in order of appearance."""
    position_of, prefixes = {}, {}
    for g, group in enumerate(groups):
        for i, name in enumerate(group.get("param_names", ())):
            role = group["roles"][i]
            position_of[name] = (g, i) if role != "other" or name.rpartition(".")[2] == "bias" else None
            if role != "other":
                prefixes[name.rpartition(".")[0]] = None
    layers = []
    for prefix in prefixes:
        layers.append(LayerSlots(prefix, tuple(position_of.get(_join(prefix, role)) for role in ROLES)))
    return layers


def _refuse_bare_factors(group: dict) -> None:
    if any(is_factor(p) for p in group["params"]) or set(group.get("roles", ())) - {"other"}:
        raise ValueError(
            "the parameters of low-rank layers need their names: pass the model, or model.named_parameters(), instead"
            " of model.parameters()"
        )


def refuse_computed(prefix: str, layer: LowRankLayer) -> None:
    """Raise ValueError if a factor of the layer is no parameter: what is written into it would be lost."""
    computed = [role for role in "USV" if role not in layer._parameters]
    if computed:
        raise ValueError(
            f"layer {prefix!r} must have U, S, V as its own parameters, got {', '.join(computed)} that is computed"
            " (pruned, parametrized or normalized by a hook): make it permanent first"
        )


def refuse_sharded(prefix: str, factors: dict[str, Tensor]) -> None:
    """Raise ValueError if a factor of the layer is a DTensor."""
    for role, X in factors.items():
        placements = getattr(X, "placements", None)  # recognizes a DTensor without importing it
        if placements is not None:
            raise ValueError(
                f"layer {prefix!r} must have whole tensors as factors, got {role} as a DTensor with placements"
                f" {tuple(placements)}, as fully_shard makes them; the step needs all rows of U and V: use"
                " DistributedDataParallel"
            )


def _is_layer(U: Tensor, S: Tensor, V: Tensor) -> bool:
    if any(X.dim() != 2 for X in (U, S, V)):
        return False
    r = S.shape[0]
    return S.shape == (r, r) and U.shape[1] == V.shape[1] == r and r <= min(U.shape[0], V.shape[0])


def _join(prefix: str, leaf: str) -> str:
    return f"{prefix}.{leaf}" if prefix else leaf
