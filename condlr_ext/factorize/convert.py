"""factorize, to_dense and fold: replace the layers of a model in place."""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .. import reference
from .._modules import check_module, matcher, not_plain, parameter_count, refuse_wrapped, replace_modules
from .._types import Inputs, Layers
from ..errors import NonFiniteError
from ..nn import LowRankAdapter, LowRankLayer, LowRankMultiheadAttention, low_rank_layers
from ..nn.attention import factorize_projection, to_dense_projections
from ..nn.formed_parameters import factorize_parameters, is_formed, to_dense_parameters
from ..nn.rank import RankOrRanks, resolve_rank
from .budget import allocate_ranks, parameter_cost
from .costs import Clock, LayerCall, dense_flops, flops_cost, low_rank_flops, predict, record_calls
from .example import run_in_eval
from .principal import leading_directions, second_moments
from .report import FactorizeReport, LayerReport, reasons
from .selection import COMPILED, LEFT_OUT, Target, forwards_as_its_base, is_compiled, low_rank_class, select

_MEASURES = ("parameters", "flops", "time")
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def factorize(
    model: nn.Module,
    *,
    budget: float | None = None,
    rank: RankOrRanks | None = None,
    measure: str = "parameters",
    example_input: Inputs | None = None,
    include: Layers | None = None,
    exclude: Layers | None = None,
    init: str = "svd",
    dry_run: bool = False,
) -> FactorizeReport:
    """Replace dense layers inside a model by low-rank ones, in place; forward code is untouched.

    Serves nn.Linear, nn.Conv1d/2d/3d, nn.ConvTranspose1d/2d/3d, nn.Bilinear, the projections of nn.MultiheadAttention
    (`in_proj`, or `q_proj`, `k_proj` and `v_proj`; and `out_proj`), HF's Conv1D, and the weights of nn.LSTM, GRU, RNN
    and their cells (formed in each forward; the low-rank layer of `weight_hh_l0` is called `weight_hh_l0_factors`).
    Where include or rank names them, also nn.Embedding, and parameters [E, m, n] of modules that are not torch's, such
    as stacked experts, with a low-rank layer per matrix. Layers that share a weight share its factors, biases stay the
    same parameters, hooks move along. The report names every other matrix parameter of the model and why it stays:
    subclasses, parametrized layers, weights that are also used elsewhere (by an embedding that is left out, say),
    modules that are not supported (nn.EmbeddingBag, say), PEFT's layers, sharded and quantized tensors. An error leaves
    the model unchanged.

    Args:
        model: Changed in place.
        budget: Share of the factorized layers' cost to keep, > 0, spent evenly over the layers: of their parameters,
            r (m + n) + r² each without biases, equal spend maximizes the product of the ranks. Default: 0.3, if rank
            is not given either.
        rank: An int for all layers, a fraction in (0, 1] of min(m, n), an Energy, or {name: one of these} for just
            the named layers.
        measure: Cost that the budget limits: "parameters", "flops" of one forward on example_input, or "time" on it,
            measured layer by layer on this machine with torch's current number of threads (forward and backward if
            the model is in training mode, else forward). With "flops" and "time", layers that no rank makes cheaper
            stay dense.
        example_input: A tensor, a tuple of positional arguments or a dict of keyword arguments of the model. Needed
            for measure "flops" and "time" and for init "pca"; with it the report shows FLOPs, route and predicted
            gain.
        include: The layers to factorize: a name (whole, or an fnmatch pattern), a type, a predicate
            (name, module) -> bool, or a list of these. Default: all. Name and type of an nn.MultiheadAttention stand
            for all its projections, those of an RNN and the name of a parameter for the matrices in it; a predicate is
            called with a linear layer for each.
        exclude: The layers to leave dense, given likewise; wins over include.
        init: "svd": truncated SVD of the current weight. "random": random orthonormal factors and S = s I with the
            Frobenius norm of the current weight, so that activations keep the dense model's variance (for a zero
            weight or on the meta device, torch's default scale). "pca": the current weight restricted to the leading
            principal directions (about 0) of the layer's inputs on example_input, a few hundred samples of the data:
            a bound on kappa says nothing about inputs outside the row space (see robustness.misalignment), and these
            directions hold the largest share of the inputs' squares. The model runs in eval mode for it, where a
            batch norm without statistics of the data normalizes nothing. Layers that are not called and attentions'
            output projections start as with "svd".
        dry_run: Only report; leave the model as it is.

    Returns:
        A report; printing it shows a table.

    Raises:
        ValueError: Both budget and rank, nothing to factorize, a layer that is low-rank already, an unknown name,
            budget <= 0, unknown init or measure, example_input missing, the model fails on it, or the model is wrapped
            (DistributedDataParallel): factorize first.
        RankError: A rank does not fit.
        NonFiniteError: NaN or Inf in a weight.

    Examples:
        >>> report = condlr_ext.factorize(model, budget=0.3, exclude="head")
        >>> print(report)  # doctest: +SKIP
    """
    _check_options(model, budget, rank, measure, example_input, init)
    total = parameter_count(model)
    targets, skipped = select(model, include, exclude, names=rank if isinstance(rank, dict) else None)
    calls = record_calls(model, targets, example_input) if example_input is not None else {}
    costs = {}
    if rank is None:
        budget = 0.3 if budget is None else budget
        costs = _cost_model(model, targets, calls, measure, skipped)
        targets = [t for t in targets if t.name in costs]
    if not targets:
        raise ValueError(
            f"factorize: no layer to factorize with include={include!r}, exclude={exclude!r}, rank={rank!r}"
            + "".join(f"; {line}" for line in reasons({k: v for k, v in skipped.items() if v != LEFT_OUT}))
        )
    ranks = allocate_ranks(costs, budget) if rank is None else _given_ranks(targets, rank)
    moments = second_moments(model, targets, example_input) if init == "pca" else {}
    built = {
        t.name: layer
        for target in targets
        for t, layer in _build(target, ranks[target.name], init, moments.get(target.name))
    }
    layers = []
    for target in targets:
        for t in (target, *target.twins):
            seconds = {}
            if measure == "time" and t is target:
                cost = costs[t.name]
                seconds = {"dense_seconds": cost.dense, "seconds": cost.at(ranks[t.name])}
            tied_to = None if t is target else target.name
            layers.append(_layer_report(model, t, built[t.name], tied_to, calls.get(t.name), seconds))
    if not dry_run:
        _install(model, [t for target in targets for t in (target, *target.twins)], built)
    return FactorizeReport(layers, skipped, budget, measure, dry_run, total)


def to_dense(model: nn.Module) -> nn.Module:
    """Replace every low-rank layer by a module of its original class, in place: the same function to rounding.

    Tied factors become one tied weight, biases stay the same parameters, hooks move along. A LowRankAdapter stays, see
    merge_adapters. An error leaves the model unchanged.

    Args:
        model: Changed in place.

    Returns:
        The model, or the dense twin of a model that is itself a low-rank layer.

    Raises:
        ValueError: A layer does more than U S Vᵀ x + b (its own forward, factors that hooks compute) or is compiled on
            its own.
        TypeError: model is not a Module.
    """
    layers = _layers("to_dense", model)
    return _plain(model, {layer: layer.to_dense() for layer in layers})


def fold(model: nn.Module, *, example_input: Inputs | None = None, dense: Layers = ()) -> nn.Module:
    """Replace every low-rank layer by plain torch modules for inference, in place: the same function to rounding.

    A layer becomes an nn.Sequential of two layers with weights Vᵀ and U S, or its dense module where that has no more
    weights. The pair keeps the attributes of the layer's geometry (`in_features`, `stride` and the like), but it has
    no `weight` and no `bias`: layers of which the model reads these must become dense. The projections of
    nn.MultiheadAttention and the layers of nn.TransformerEncoderLayer do, others are found by `example_input` or named
    in `dense`. A LowRankAdapter stays, see merge_adapters. Ties, biases and hooks are kept as by to_dense. If the
    modules are trained further, kappa is no longer bounded.

    Args:
        model: Changed in place.
        example_input: A tensor, a tuple of positional arguments or a dict of keyword arguments of the model, which
            runs on it once in eval mode: layers of which it reads what the pair lacks (as T5, ViT and Swin do) become
            dense.
        dense: More layers to make dense: a name, a pattern, a type, a predicate or a list of these, as factorize's
            include.

    Returns:
        The model, or the replacement of a model that is itself a low-rank layer.

    Raises:
        ValueError: As to_dense, a pattern of `dense` matches no module, or the model fails on example_input.
        TypeError: model is not a Module.
    """
    layers = _layers("fold", model)
    is_read = matcher("fold", "dense", dense, [name for name, _ in model.named_modules()])
    read = {layer for layer, name in layers.items() if is_read(name, layer)}
    for module in model.modules():
        if isinstance(module, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
            read.update(module.children())
        elif is_formed(module):
            read.update(part for child in module.children() for part in (child, *child.children()))

    def twins() -> dict[LowRankLayer, nn.Module]:
        tied = {_factors(layer) for layer in layers if layer in read}  # tied layers need weights of one shape
        return {layer: layer.to_dense() if _factors(layer) in tied else layer.folded() for layer in layers}

    if example_input is not None:
        read |= _read_on_example(model, twins(), example_input)
    return _plain(model, twins())


class _Probe(nn.Sequential):
    """A folded layer that answers for what a pair lacks as the low-rank layer does, and notes that it was asked."""

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            value = getattr(self.__dict__["low_rank"], name)
            self.__dict__["read"] = True
            return value


def _read_on_example(model: nn.Module, twins: dict[LowRankLayer, nn.Module], example_input) -> set[LowRankLayer]:
    """Return the layers that the model reads attributes of, on the example, which their folded twins lack."""
    probes = {}
    for layer, twin in twins.items():
        if type(twin) is nn.Sequential:
            twin.__class__ = _Probe
            twin.__dict__ |= {"low_rank": layer, "read": False}
            _move_hooks(layer, twin)
            probes[layer] = twin
    if model in probes:
        return set()  # it is called by the user, not by a model
    replace_modules(model, probes)
    try:
        with torch.no_grad():
            run_in_eval("fold", model, example_input)
    finally:
        replace_modules(model, {probe: layer for layer, probe in probes.items()})
    return {layer for layer, probe in probes.items() if probe.read}


def _layers(function: str, model: nn.Module) -> dict[LowRankLayer, str]:
    """Return the low-rank layers, but those of adapters, with their names. Raise ValueError for one that cannot be
    replaced because it does not compute U S Vᵀ x + b.
    """
    check_module(function, model)
    changes = {module.delta for module in model.modules() if isinstance(module, LowRankAdapter)}
    layers = {m: name for name, m in low_rank_layers(model).items() if m not in changes}
    for layer, name in layers.items():
        reason = COMPILED if is_compiled(name) else None
        if not forwards_as_its_base(layer):
            reason = f"the forward of this {type(layer).__name__} may do more than U S Vᵀ x + b"
        for factor in "USV":
            if not_plain(getattr(layer, factor)):
                reason = f"its {factor} {not_plain(getattr(layer, factor))}"
            if factor not in layer._parameters and not parametrize.is_parametrized(layer, factor):
                reason = f"its {factor} is no parameter but computed (pruned, or by a hook); make it permanent first"
        if reason:
            raise ValueError(f"{function}: layer {name or type(layer).__name__}: {reason}")
    return layers


def _factors(layer: LowRankLayer) -> tuple[int, ...]:
    """Return the ids of the layer's factors; a parametrized layer computes its factors and shares none."""
    factors = [layer._parameters.get(name) for name in "USV"]
    return (id(layer),) if any(p is None for p in factors) else tuple(map(id, factors))


def _plain(model: nn.Module, twins: dict[LowRankLayer, nn.Module]) -> nn.Module:
    """Replace low-rank layers by their plain twins, tied where the factors are; return the model or its twin."""
    weights = {}
    for layer, twin in twins.items():
        pair = isinstance(twin, nn.Sequential)
        parts = twin if pair else [twin]
        for i, part in enumerate(parts):
            kind = layer._pair_order[i] if pair else type(layer).as_matrix
            part.weight = weights.setdefault((_factors(layer), kind, part.weight.shape), part.weight)
        if layer.bias is not None:
            parts[-1].bias = layer.bias
        _move_hooks(layer, twin)
    for module in list(model.modules()):
        if isinstance(module, LowRankMultiheadAttention):
            to_dense_projections(module, twins)
        elif is_formed(module):
            to_dense_parameters(module, twins)
    replace_modules(model, twins)
    return twins.get(model, model)


def _check_options(model, budget, rank, measure, example_input, init) -> None:
    check_module("factorize", model)
    if budget is not None and rank is not None:
        raise ValueError(f"factorize: give budget or rank, not both, got budget={budget!r}, rank={rank!r}")
    if init not in ("svd", "random", "pca"):
        raise ValueError(f'factorize: init must be "svd", "random" or "pca", got {init!r}')
    if init == "pca" and example_input is None:
        raise ValueError('factorize: init="pca" needs example_input, a batch of the data, got None')
    if measure not in _MEASURES:
        raise ValueError(f"factorize: measure must be one of {', '.join(_MEASURES)}, got {measure!r}")
    if measure != "parameters" and rank is not None:
        raise ValueError(f"factorize: measure={measure!r} is for a budget, got rank={rank!r}")
    if measure != "parameters" and example_input is None:
        raise ValueError(f"factorize: measure={measure!r} needs example_input, got None")
    refuse_wrapped("factorize", model)
    cls = low_rank_class(model)
    if cls is not None:
        kind = type(model).__name__
        raise ValueError(f"factorize: model must contain the layers, got a bare {kind}; use {cls.__name__}.from_dense")


def _cost_model(model, targets, calls, measure, skipped) -> dict:
    """Return the cost of each target; add those not called on example_input, or cheaper dense, to `skipped`."""
    if measure == "parameters":
        return {t.name: parameter_cost(*t.shape) for t in targets}
    clock, costs = Clock(model.training), {}
    for t in targets:
        if t.owner is not None:
            skipped[t.name] = f"its {measure} inside of a {type(t.owner).__name__} is not known"
            continue
        uses = sum(len(calls[x.name]) for x in (t, *t.twins))
        if measure == "time" and t.weight.is_meta:
            raise ValueError(f'factorize: layer {t.name}: measure="time" needs real weights, got the meta device')
        if not uses:
            skipped[t.name] = "it is not called on example_input"
            continue
        if measure == "time" and not t.cls._takes_features:
            skipped[t.name] = f"the time of a {type(t.module).__name__} is not measured"
            continue
        cost = clock.cost(t, calls) if measure == "time" else flops_cost(t, calls)
        if cost.at(1) < cost.dense:
            costs[t.name] = cost
        else:
            unit, scale = ("ms", 1e3) if measure == "time" else ("Mflop", 1e-6)
            skipped[t.name] = (
                f"no rank makes it cheaper: {scale * cost.at(1):.3g} {unit} at rank 1, {scale * cost.dense:.3g} dense"
            )
    return costs


def _given_ranks(targets: list[Target], rank) -> dict[str, int]:
    ranks = {}
    for target in targets:
        names = [t.name for t in (target, *target.twins)]
        W = target.cls.as_matrix(target.weight)
        given = [rank[name] for name in names] if isinstance(rank, dict) else [rank]
        found = [resolve_rank(r, *W.shape, f"factorize: layer {target.name}", W) for r in given]
        if len(set(found)) > 1:
            raise ValueError(f"factorize: {', '.join(names)} have one weight and need one rank, got {found}")
        ranks[target.name] = found[0]
    return ranks


def _build(target: Target, rank: int, init: str, moment: Tensor | None) -> list[tuple[Target, LowRankLayer]]:
    """Return the low-rank layers of the target and its twins; `moment` is that of their inputs, for init="pca"."""
    module, cls, weight = target.module, target.cls, target.weight
    if init == "random" and not weight.is_meta:
        layer = cls(*cls._dense_arguments(module), device=weight.device, dtype=weight.dtype, rank=rank).copy_flags_from(
            module
        )
        norm = reference.norm(weight.detach().to(torch.promote_types(weight.dtype, torch.float32)))
        if not torch.isfinite(norm):
            raise NonFiniteError(f"factorize: layer {target.name}: the weight must be finite, got NaN or Inf")
        if norm > 0:
            with torch.no_grad():
                layer.S.copy_(norm / rank**0.5 * torch.eye(rank, dtype=norm.dtype, device=norm.device))
    else:
        try:
            row_space = None
            if moment is not None:
                row_space = leading_directions(moment, cls.as_matrix(weight.detach()), rank)
            layer = cls.from_dense(module, rank=rank, row_space=row_space)
        except NonFiniteError as error:
            raise NonFiniteError(f"factorize: layer {target.name}: {error}") from None
    if layer.bias is not None:
        layer.bias = module.bias
    layers = [(target, layer)]
    for t in target.twins:
        twin = t.cls.empty_from_dense(t.module, rank).copy_flags_from(t.module)
        for name in "USV":
            setattr(twin, name, getattr(layer, name))
        if twin.bias is not None:
            twin.bias = t.module.bias
        layers.append((t, twin))
    return layers


def _layer_report(
    model: nn.Module, t: Target, layer: LowRankLayer, tied_to: str | None, calls: list[LayerCall] | None, seconds: dict
) -> LayerReport:
    sigma = layer.S.detach().diagonal().abs()  # every init gives a diagonal core
    kappa = float("nan") if sigma.is_meta else (sigma.max() / sigma.min()).item() if sigma.max() > 0 else float("inf")
    costs = {}
    if calls is not None:
        costs = {"dense_flops": dense_flops(t, calls), "flops": low_rank_flops(t, calls, layer.rank)}
        plan = predict(layer, calls, model.training)
        if plan is not None:
            costs |= {"route": plan.route, "gain": plan.gain}
    return LayerReport(t.name, *t.shape, layer.rank, tuple(t.weight.shape), kappa, tied_to, **costs, **seconds)


def _install(model: nn.Module, targets: list[Target], layers: dict[str, LowRankLayer]) -> None:
    replacement: dict[nn.Module, nn.Module] = {}
    owned: dict[nn.Module, dict[str, LowRankLayer]] = {}
    for t in targets:
        _move_hooks(t.module, layers[t.name])
        if t.attention is not None:
            factorize_projection(t.attention, t.name.rpartition(".")[2], layers[t.name])
        elif t.owner is not None:
            owned.setdefault(t.owner, {})[t.child] = layers[t.name]
        else:
            replacement[t.module] = layers[t.name]
    for owner, children in owned.items():
        factorize_parameters(owner, children)
    replace_modules(model, replacement)


def _move_hooks(old: nn.Module, new: nn.Module) -> None:
    """Move the hooks' dictionaries themselves, so that the hooks' handles still work."""
    for name in _HOOKS:
        setattr(new, name, getattr(old, name))
