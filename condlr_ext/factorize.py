"""Turns the dense layers of any module into low-rank ones, in place, and back."""

import math
import numbers
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import nn

from .errors import NonFiniteError
from .nn import LowRankConv1d, LowRankConv2d, LowRankConv3d, LowRankLayer, LowRankLinear
from .nn.layer import resolve_rank

__all__ = ["FactorizeReport", "condition_numbers", "factorize", "to_dense"]

_LOW_RANK = {
    nn.Linear: LowRankLinear,
    nn.Conv1d: LowRankConv1d,
    nn.Conv2d: LowRankConv2d,
    nn.Conv3d: LowRankConv3d,
}


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class LayerReport:
    """One factorised layer: its weight as an m x n matrix, the rank it got, parameters before and after."""

    name: str
    m: int
    n: int
    rank: int

    @property
    def dense_parameters(self) -> int:
        return self.m * self.n

    @property
    def parameters(self) -> int:
        return stored_parameters(self.rank, self.m, self.n)


@dataclass(frozen=True)
class FactorizeReport:
    """What factorize did: `layers`, and `skipped` layers with the reason; `kept` is the share of weights kept."""

    layers: list[LayerReport]
    skipped: dict[str, str] = field(default_factory=dict)
    budget: float | None = None

    @property
    def kept(self) -> float:
        return sum(x.parameters for x in self.layers) / max(1, sum(x.dense_parameters for x in self.layers))

    def __str__(self) -> str:
        lines = [f"{'layer':<24} {'weight':>13} {'rank':>5} {'parameters':>22} {'kept':>7}"]
        for x in self.layers:
            weight = f"{x.m} x {x.n}"
            counts = f"{x.dense_parameters} -> {x.parameters}"
            lines.append(
                f"{x.name:<24} {weight:>13} {x.rank:>5} {counts:>22} {x.parameters / x.dense_parameters:>7.1%}"
            )
        lines.append(f"kept {self.kept:.1%} of the factorised layers' weights")
        if self.budget is not None and self.kept > self.budget:
            lines.append(f"over the budget of {self.budget:.1%}: no layer can have less than rank 1")
        lines += [f"{name}: left dense, {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


def factorize(
    model: nn.Module,
    *,
    budget: float | None = None,
    rank: int | float | dict | None = None,
    include=None,
    exclude=None,
    init: str = "svd",
) -> FactorizeReport:
    """Replaces nn.Linear and nn.Conv1d/2d/3d inside `model` by low-rank layers; forward code is untouched.

    Args:
        model: changed in place.
        budget: share of the factorised layers' weights to keep, in (0, inf), counted as stored r (m + n) + r²
            (biases excluded) and spent evenly over the layers, which maximises the product of the ranks. The
            default, 0.3, if rank is not given either.
        rank: the same int for all, a fraction in (0, 1] of min(m, n), or {name: int or fraction} for just those.
        include, exclude: a name (whole, or an fnmatch pattern), a type, a predicate (name, module) -> bool, or a
            list of these. exclude wins.
        init: "svd", the truncated SVD of the present weight, or "random", fresh orthonormal factors.

    Returns:
        FactorizeReport; printing it shows a table.

    Raises:
        ValueError: both budget and rank, nothing to factorise, an unknown name, budget <= 0, unknown init.
        RankError: a rank that does not fit. In every case the model is unchanged.
    """
    if budget is not None and rank is not None:
        raise ValueError(f"factorize: give budget or rank, not both, got budget={budget!r}, rank={rank!r}")
    if init not in ("svd", "random"):
        raise ValueError(f'factorize: init must be "svd" or "random", got {init!r}')
    if type(model) in _LOW_RANK:
        twin = _LOW_RANK[type(model)].__name__
        raise ValueError(
            f"factorize: model must contain the layers, got a bare {type(model).__name__}; use {twin}.from_dense"
        )
    targets, skipped = _targets(model, include, exclude)
    if isinstance(rank, dict):
        unknown = sorted(set(rank) - set(targets))
        if unknown:
            raise ValueError(f"factorize: rank names layers that are not there or not eligible: {', '.join(unknown)}")
        targets = {name: targets[name] for name in targets if name in rank}
    if not targets:
        raise ValueError(
            f"factorize: no layer to factorise with include={include!r}, exclude={exclude!r}, rank={rank!r}"
            + "".join(f"; {name}: {reason}" for name, reason in skipped.items())
        )
    shapes = {name: _matrix_shape(module) for name, module in targets.items()}
    if rank is None:
        budget = 0.3 if budget is None else budget
        ranks = allocate_ranks(shapes, budget)
    else:
        ranks = {
            name: resolve_rank(rank[name] if isinstance(rank, dict) else rank, *shape, f"factorize: layer {name}")
            for name, shape in shapes.items()
        }
    built = {}
    for name, module in targets.items():
        try:
            built[name] = _build(module, ranks[name], init)
        except NonFiniteError as error:
            raise NonFiniteError(f"factorize: layer {name}: {error}") from None
    replacement = {targets[name]: layer for name, layer in built.items()}
    _replace(model, replacement)
    layers = [LayerReport(name, *shapes[name], ranks[name]) for name in targets]
    return FactorizeReport(layers, skipped, budget)


def to_dense(model: nn.Module) -> nn.Module:
    """Replaces every low-rank layer inside `model`, in place, by its dense twin; returns the model.

    A model that is itself a low-rank layer is returned as its dense twin.
    """
    if isinstance(model, LowRankLayer):
        return model.to_dense()
    _replace(model, {m: m.to_dense() for m in model.modules() if isinstance(m, LowRankLayer)})
    return model


def condition_numbers(model: nn.Module) -> dict[str, float]:
    """kappa(S) of every low-rank layer by name; Inf for a singular core.

    Raises:
        NonFiniteError: NaN or Inf in a core, with the layer's name.
    """
    numbers = {}
    for name, module in model.named_modules():
        if isinstance(module, LowRankLayer):
            try:
                numbers[name] = module.condition_number()
            except ValueError as error:
                raise type(error)(f"condition_numbers: layer {name}: {error}") from None
    return numbers


def stored_parameters(rank: int, m: int, n: int) -> int:
    return rank * (m + n) + rank * rank


def allocate_ranks(shapes: dict[str, tuple[int, int]], budget: float) -> dict[str, int]:
    """Ranks that spend budget * Σ m n parameters, the same number on every layer.

    Layers whose full rank costs no more than the share take it and leave the surplus to the others; what is left
    over after rounding down buys single ranks, the cheapest first. Every layer has rank at least 1.

    Raises:
        ValueError: budget <= 0.
    """
    if isinstance(budget, bool) or not isinstance(budget, numbers.Real) or not 0 < budget < math.inf:
        raise ValueError(f"factorize: budget must be a number > 0, got {budget!r}")
    left = budget * sum(m * n for m, n in shapes.values())
    full = {name: min(shape) for name, shape in shapes.items()}
    ranks: dict[str, int] = {}
    while open_layers := [name for name in shapes if name not in ranks]:
        share = left / len(open_layers)
        whole = [name for name in open_layers if stored_parameters(full[name], *shapes[name]) <= share]
        if not whole:
            break
        for name in whole:
            ranks[name] = full[name]
            left -= stored_parameters(full[name], *shapes[name])
    for name in open_layers:
        total = sum(shapes[name])
        ranks[name] = max(1, int(((total * total + 4 * share) ** 0.5 - total) / 2 + 1e-9))
        left -= stored_parameters(ranks[name], *shapes[name])
    while True:
        prices = {
            stored_parameters(ranks[name] + 1, *shape) - stored_parameters(ranks[name], *shape): name
            for name, shape in reversed(shapes.items())
            if ranks[name] < full[name]
        }
        if not prices or min(prices) > left:
            return ranks
        ranks[prices[min(prices)]] += 1
        left -= min(prices)


def _targets(model: nn.Module, include, exclude) -> tuple[dict[str, nn.Module], dict[str, str]]:
    wanted = _matcher("include", include, model) if include is not None else None
    unwanted = _matcher("exclude", exclude, model) if exclude is not None else None
    targets, skipped = {}, {}
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for p in module.parameters(recurse=False):
            owners.setdefault(id(p), []).append(name)
    for name, module in model.named_modules():
        eligible = type(module) in _LOW_RANK
        if not eligible and not isinstance(module, tuple(_LOW_RANK)):
            continue
        if (wanted and not wanted(name, module)) or (unwanted and unwanted(name, module)):
            continue
        if not eligible:
            skipped[name] = f"a {type(module).__name__} may do more than its base class"
        elif "weight" not in dict(module.named_parameters(recurse=False)):
            skipped[name] = "its weight is not a plain parameter"
        elif any(getattr(module, hooks) for hooks in _HOOKS):
            skipped[name] = "it has hooks, which would be lost"
        elif len(owners[id(module.weight)]) > 1:
            others = [n for n in owners[id(module.weight)] if n != name]
            skipped[name] = f"its weight is tied to that of {', '.join(others)}"
        else:
            targets[name] = module
    return targets, skipped


def _matcher(what: str, patterns, model: nn.Module) -> Callable[[str, nn.Module], bool]:
    if isinstance(patterns, (str, type)) or callable(patterns):
        patterns = [patterns]
    if not isinstance(patterns, Iterable):
        raise TypeError(f"factorize: {what} must be a name, a type, a predicate or a list of these, got {patterns!r}")
    patterns = list(patterns)
    names = [name for name, _ in model.named_modules()]
    for p in patterns:
        if isinstance(p, str):
            if not any(fnmatchcase(name, p) for name in names):
                raise ValueError(f"factorize: {what} {p!r} matches no module of the model")
        elif not callable(p):
            raise TypeError(f"factorize: {what} entries must be names, types or predicates, got {p!r}")

    def matches(name: str, module: nn.Module) -> bool:
        for p in patterns:
            if isinstance(p, str):
                hit = fnmatchcase(name, p)
            elif isinstance(p, type):
                hit = isinstance(module, p)
            else:
                hit = p(name, module)
            if hit:
                return True
        return False

    return matches


def _matrix_shape(module: nn.Module) -> tuple[int, int]:
    return module.weight.shape[0], module.weight[0].numel()


def _build(module: nn.Module, rank: int, init: str) -> LowRankLayer:
    cls = _LOW_RANK[type(module)]
    if init == "svd":
        return cls.from_dense(module, rank=rank)
    weight = module.weight
    return cls(*cls._dense_arguments(module), device=weight.device, dtype=weight.dtype, rank=rank).like(module)


def _replace(model: nn.Module, replacement: dict[nn.Module, nn.Module]) -> None:
    for parent in list(model.modules()):
        for key, child in parent._modules.items():  # named_children would pass over a module used twice
            if child in replacement:
                parent._modules[key] = replacement[child]
