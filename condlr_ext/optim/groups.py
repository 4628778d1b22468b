"""Parameter groups by role, and which parameters of them form a low-rank layer."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..nn import LowRankLayer

ROLES = ("U", "S", "V", "bias")  # the order in which the step op takes a layer's parameters


def param_groups(model: nn.Module, *, factors=None, cores=None, other=None) -> list[dict]:
    """Parameter groups of a model by role, each with its own options.

    Args:
        factors: options of the group of all U and V, e.g. {"lr": 0.1}. cores: of all S (also tau, band,
            sigma_max). other: of biases and everything not factorised. Options left out are the optimiser's.

    Returns:
        Up to three group dicts with (name, parameter) pairs and a `roles` list of "U", "S", "V" or "other".
    """
    role_of = {}
    for prefix, module in model.named_modules():
        if isinstance(module, LowRankLayer):
            role_of |= {_join(prefix, role): role for role in "USV"}
    chosen = {"factors": factors, "cores": cores, "other": other}
    groups = {key: {"params": [], "roles": [], **(options or {})} for key, options in chosen.items()}
    for name, p in model.named_parameters():
        role = role_of.get(name, "other")
        group = groups["other" if role == "other" else "cores" if role == "S" else "factors"]
        group["params"].append((name, p))
        group["roles"].append(role)
    return [g for g in groups.values() if g["params"]]


@dataclass(frozen=True)
class Layer:
    """A low-rank layer in an optimiser: where its U, S, V, bias (or None) are, as (group, index in group)."""

    name: str
    places: tuple[tuple[int, int] | None, ...]


def assign_roles(groups: list[dict]) -> None:
    """Writes `roles` into named groups that have none, from names: prefix.U, prefix.S, prefix.V of fitting shapes.

    Raises:
        ValueError: a layer with some of its factors missing, or a `roles` list that does not fit its group.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for group in groups:
        roles = group.get("roles")
        if roles is not None and (len(roles) != len(group["params"]) or not set(roles) <= {"U", "S", "V", "other"}):
            raise ValueError(
                f'roles must name "U", "S", "V" or "other" for each of {len(group["params"])} parameters, got {roles}'
            )
        for i, (name, p) in enumerate(zip(group.get("param_names", ()), group["params"], strict=False)):
            prefix, _, leaf = name.rpartition(".")
            if leaf in ("U", "S", "V") and (roles is None or roles[i] != "other"):
                found.setdefault(prefix, {})[leaf] = p
    layers = set()
    for prefix, factors in found.items():
        if len(factors) < 3:
            missing, present = (", ".join(sorted(k)) for k in ({"U", "S", "V"} - set(factors), factors))
            raise ValueError(
                f"layer {prefix!r} has {present} in the parameter groups but not {missing}; pass all three (frozen"
                ' ones too), or give a group `roles` with "other" for parameters that are not factors'
            )
        if _is_layer(factors["U"], factors["S"], factors["V"]):
            layers.add(prefix)
    for group in groups:
        if "param_names" in group and "roles" not in group:
            split = [name.rpartition(".") for name in group["param_names"]]
            group["roles"] = [leaf if leaf in "USV" and prefix in layers else "other" for prefix, _, leaf in split]


def link_layers(groups: list[dict]) -> list[Layer]:
    """The low-rank layers formed by the groups' names and roles, in order of appearance."""
    place_of, prefixes = {}, {}
    for g, group in enumerate(groups):
        for i, name in enumerate(group.get("param_names", ())):
            role = group["roles"][i]
            place_of[name] = (g, i) if role != "other" or name.rpartition(".")[2] == "bias" else None
            if role != "other":
                prefixes[name.rpartition(".")[0]] = None
    layers = []
    for prefix in prefixes:
        places = tuple(place_of.get(_join(prefix, role)) for role in ROLES)
        layers.append(Layer(prefix, places))
    return layers


def reject_bare_layers(params: list[Tensor]) -> None:
    """Raises for unnamed parameters that hold the U, S, V of a low-rank layer in a row."""
    for U, S, V in zip(params, params[1:], params[2:], strict=False):
        if _is_layer(U, S, V) and all(_is_orthonormal(X) for X in (U, V)):
            raise ValueError(
                "the parameters of low-rank layers need their names: pass the model, or model.named_parameters(),"
                " instead of model.parameters()"
            )


def _is_layer(U: Tensor, S: Tensor, V: Tensor) -> bool:
    if any(X.dim() != 2 for X in (U, S, V)):
        return False
    r = S.shape[0]
    return S.shape == (r, r) and U.shape[1] == V.shape[1] == r and r <= min(U.shape[0], V.shape[0])


@torch.no_grad()
def _is_orthonormal(X: Tensor) -> bool:
    X = X.double()
    return (
        bool(((X.mT @ X).cpu() - torch.eye(X.shape[1], dtype=X.dtype)).abs().max() < 1e-2) if not X.is_meta else False
    )


def _join(prefix: str, leaf: str) -> str:
    return f"{prefix}.{leaf}" if prefix else leaf
