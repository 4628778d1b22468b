"""Low-rank adapters of a whole model: add, set, find, merge."""

import math

import torch
from torch import Tensor, nn

from ._modules import check_module, chooser, is_peft_layer, refuse_wrapped, replace_modules, undone_on_error
from ._types import Layers
from .nn import LowRankAdapter, LowRankLayer, LowRankMultiheadAttention
from .nn.formed_parameters import is_formed

__all__ = ["add_adapters", "adapters", "merge_adapters"]


def add_adapters(
    model: nn.Module,
    rank: float,
    *,
    include: Layers | None = None,
    exclude: Layers | None = None,
    scale: float = 1.0,
) -> dict[str, LowRankAdapter]:
    """Freeze a model and wrap its linear and convolutional layers in LowRankAdapters, in place.

    To train other parameters too (a new classifier, say), unfreeze them afterwards; where a model has adapters already,
    only the layers that get new ones are frozen. An error leaves the model as it was.

    Args:
        model: Changed in place; its forward code is untouched, and its function changes by rounding only.
        rank: For all layers: an int, at most min(m, n) of each, or a fraction of that.
        include: The layers to wrap: a name (whole, or an fnmatch pattern), a type, a predicate (name, module) -> bool,
            or a list of these. Default: all. Layers inside adapters and PEFT's layers are always
            skipped.
        exclude: The layers to skip, given likewise; wins over include.
        scale: Factor of the change, see LowRankAdapter.

    Returns:
        The new adapters by name.

    Raises:
        ValueError: No layer is left, a pattern matches no module, the model is wrapped (DistributedDataParallel), a
            low-rank layer is of another kind or a parameter of its module, or a weight is computed, sharded or
            quantized.
        RankError: The rank does not fit a layer.

    Examples:
        >>> adapters = condlr_ext.add_adapters(model, rank=8, exclude="head")
        >>> optimizer = condlr_ext.optim.CondLRSGD(model, lr=0.1, tau=0.5)
    """
    check_module("add_adapters", model)
    if LowRankAdapter.serves(model):
        raise ValueError(
            f"add_adapters: model must contain the layers, got a bare {type(model).__name__}; use LowRankAdapter"
        )
    refuse_wrapped("add_adapters", model)
    chosen = chooser("add_adapters", include, exclude, [name for name, _ in model.named_modules()])
    wrappers = [m for m in model.modules() if isinstance(m, LowRankAdapter) or is_peft_layer(m)]
    inside = {id(part) for wrapper in wrappers for part in wrapper.modules()}
    owners = [m for m in model.modules() if isinstance(m, LowRankMultiheadAttention) or is_formed(m)]
    owned = {id(part) for owner in owners for part in owner.modules() if isinstance(part, LowRankLayer)}
    layers, low_rank = {}, []
    for name, module in model.named_modules():
        if id(module) in inside or not chosen(name, module):
            continue
        if LowRankAdapter.serves(module) and id(module) not in owned:
            layers[name] = module
        elif isinstance(module, LowRankLayer):
            low_rank.append(name)
    if low_rank:
        raise ValueError(
            f"add_adapters: these layers are low-rank already: {', '.join(low_rank)}; call to_dense first, or leave"
            " them out by exclude, since only linear layers and convolutions that a model calls get adapters then"
        )
    if not layers:
        raise ValueError(
            f"add_adapters: no nn.Linear, nn.Conv1d/2d/3d or HF's Conv1D with include={include!r}, exclude={exclude!r}"
        )
    with undone_on_error(model):
        made = {name: _make("add_adapters", name, layer, rank, scale) for name, layer in layers.items()}
    _freeze_base(model)
    replace_modules(model, {layers[name]: adapter for name, adapter in made.items()})
    return made


def adapters(model: nn.Module) -> dict[str, LowRankAdapter]:
    """Return the adapters of a model by name."""
    check_module("adapters", model)
    return {name: m for name, m in model.named_modules() if isinstance(m, LowRankAdapter)}


def merge_adapters(model: nn.Module) -> nn.Module:
    """Replace every adapter by its layer with the change added to the weight, in place.

    A low-rank layer becomes dense: no bound holds for the sum.

    Args:
        model: Changed in place.

    Returns:
        The model, or the layer of a model that is itself an adapter.

    Raises:
        NonFiniteError: NaN or Inf in a merged weight; no module is replaced then.
    """
    check_module("merge_adapters", model)
    found = adapters(model)
    with undone_on_error(model):
        for adapter in found.values():
            if isinstance(adapter.layer, LowRankLayer):
                adapter.layer = adapter.layer.to_dense()
            adapter.merge()
    if isinstance(model, LowRankAdapter):
        return model.layer
    replace_modules(model, {adapter: adapter.layer for adapter in found.values()})
    return model


def set_adapters(
    model: nn.Module, changes: dict[str, tuple[Tensor, Tensor, Tensor, float]], where: str
) -> dict[str, LowRankAdapter]:
    """Wrap the named layers in adapters with given U, S, V and scale, replacing adapters that they have already.

    A model without adapters is frozen.

    An all-zero core, which cannot be trained, is replaced by the start of a new adapter. An error leaves the model as
    it was.

    Args:
        model: Changed in place.
        changes: {layer: (U, S, V, scale)}.
        where: First words of error texts.

    Returns:
        The new adapters by name, in the model's order.

    Raises:
        ValueError: A name is no linear or convolutional layer, factors do not fit it, it is on the meta device, or two
            names of one layer have different factors.
    """
    modules, layers, names = dict(model.named_modules(remove_duplicate=False)), {}, {}
    for name, (U, S, V, scale) in changes.items():
        module = modules.get(name)
        layer = module.layer if isinstance(module, LowRankAdapter) else module
        if not LowRankAdapter.serves(layer):
            got = "no such module" if module is None else type(module).__name__
            raise ValueError(
                f"{where}: layer {name!r} must be nn.Linear, nn.Conv1d/2d/3d or HF's Conv1D, dense or low-rank, got"
                f" {got}"
            )
        if layer.weight.is_meta:
            raise ValueError(f"{where}: layer {name!r} is on the meta device; call model.to_empty(device=...) first")
        if isinstance(module, LowRankAdapter) and module.merged:
            raise ValueError(f"{where}: the adapter of layer {name!r} is merged; call unmerge() first")
        m, n = LowRankAdapter.matrix_shape(layer)
        if (U.shape[0], V.shape[0]) != (m, n):
            raise ValueError(
                f"{where}: layer {name!r} is {m} x {n}, the change in the file {U.shape[0]} x {V.shape[0]}"
            )
        for role, factor in zip("USV", (U, S, V), strict=True):
            if not torch.isfinite(factor).all():
                raise ValueError(f"{where}: {role} of layer {name!r} must be finite, got NaN or Inf")
        if not (math.isfinite(scale) and scale != 0):
            raise ValueError(f"{where}: scale of layer {name!r} must be finite and not 0, got {scale}")
        first = names.setdefault(module, name)
        *factors, first_scale = changes[first]
        if scale != first_scale or not all(map(torch.equal, factors, (U, S, V))):
            raise ValueError(f"{where}: {first!r} and {name!r} are one layer and must have one change")
        if first == name:
            layers[name] = module, layer
    replacement = {}
    with undone_on_error(model):
        made = {}
        for name, (_, layer) in layers.items():
            _, S, _, scale = changes[name]
            made[name] = _make(where, name, layer, len(S), scale)
    for name, (module, _) in layers.items():
        (U, S, V, _), adapter = changes[name], made[name]
        if S.any():
            with torch.no_grad():
                for p, value in zip((adapter.delta.U, adapter.delta.S, adapter.delta.V), (U, S, V), strict=True):
                    p.copy_(value)
        replacement[module] = adapter
    _freeze_base(model)
    replace_modules(model, replacement)
    return {name: m for name, m in model.named_modules(remove_duplicate=False) if name in layers}


def _freeze_base(model: nn.Module) -> None:
    """Freeze a model before it gets its first adapters; later it stays as its user has set it."""
    if not adapters(model):
        model.requires_grad_(False)


def _make(where: str, name: str, layer: nn.Module, rank, scale: float) -> LowRankAdapter:
    try:
        return LowRankAdapter(layer, rank, scale=scale)
    except ValueError as error:
        raise type(error)(f"{where}: layer {name}: {error}") from None
