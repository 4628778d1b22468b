"""Modules that hold matrices as parameters of their own, as torch's RNNs and stacks of experts do, made low-rank.

A low-rank layer per matrix becomes a child, and the parameter a property that is formed from it, once in each forward.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .formed import formed
from .linear import LowRankLinear

_RNN = nn.RNNBase, nn.RNNCellBase
_SUFFIX = "_factors"  # of the child for a parameter


class _Formed:
    """First base of a module's class while some of its parameters are formed."""

    _dense: type[nn.Module]
    _formed: tuple[str, ...]  # names of the parameters

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outer = self.__dict__.get("_weights")
        self.__dict__["_weights"] = {} if outer is None else outer
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.__dict__["_weights"] = outer

    def _weight(self, name: str) -> Tensor | None:
        child = self._modules.get(name + _SUFFIX)
        if child is None:
            return self._parameters[name]
        weights = self.__dict__.get("_weights")
        if weights is None:  # asked from outside
            return formed(_product(child), self.training)
        if name not in weights:
            weights[name] = _product(child)
        return weights[name]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in type(self)._formed and name + _SUFFIX in self._modules:
            raise AttributeError(
                f"{type(self).__name__}.{name} is formed from the factors of {name}{_SUFFIX} and cannot be assigned"
            )
        super().__setattr__(name, value)

    def __reduce_ex__(self, protocol):  # by the dense class, for this one has no name to import
        return _empty, (self._dense, self._formed), super().__reduce_ex__(2)[2]


class _FormedRNN(_Formed):
    _flat_weights = property(lambda self: [getattr(self, name) for name in self._flat_weights_names], lambda *_: None)

    def flatten_parameters(self) -> None:
        """Leave the weights, which are made anew for each forward, where they are."""

    def _weights_have_changed(self) -> bool:
        return False

    def reset_parameters(self) -> None:
        bound = self.hidden_size**-0.5
        for p in self._parameters.values():
            if p is not None:
                nn.init.uniform_(p, -bound, bound)
        for layer in self.children():
            layer.reset_parameters()


@functools.cache
def _formed_class(dense: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    base = _FormedRNN if issubclass(dense, nn.RNNBase) else _Formed
    members = {name: property(lambda self, name=name: self._weight(name)) for name in names}
    members |= {"_dense": dense, "_formed": names, "__module__": dense.__module__, "__doc__": dense.__doc__}
    return type(f"LowRank{dense.__name__}", (base, dense), members)


def _empty(dense: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    cls = _formed_class(dense, names)
    return cls.__new__(cls)


def _product(child: nn.Module) -> Tensor:
    """Return the weight of a layer, or those of a list stacked."""
    layers = child if isinstance(child, nn.ModuleList) else [child]
    if any(type(layer) is not LowRankLinear for layer in layers) or len({layer.rank for layer in layers}) > 1:
        weights = [layer.weight.as_subclass(Tensor) for layer in layers]
        return torch.stack(weights) if layers is child else weights[0]
    if layers is not child:
        return child.U @ child.S @ child.V.mT
    U, S, V = (torch.stack([getattr(layer, role) for layer in layers]) for role in "USV")
    return U @ S @ V.mT


def is_formed(module: nn.Module) -> bool:
    """Return whether some of the module's parameters are formed from low-rank children."""
    return isinstance(module, _Formed)


def matrices(module: nn.Module) -> list[str]:
    """Return the names of a module's parameters that can be formed: weights of RNNs, and stacks of matrices of modules
    that are not torch's.
    """
    torchs_own = type(module).__module__.startswith("torch.")
    names = []
    for name, p in module._parameters.items():
        if (
            p is None
            or is_lazy(p)
            or not (p.dim() == 2 if isinstance(module, _RNN) else p.dim() == 3 and min(p.shape) > 1)
        ):
            continue
        if isinstance(module, _RNN) or not torchs_own:
            names.append(name)
    return names


def views(module: nn.Module, name: str) -> dict[str, nn.Linear]:
    """Return linear layers over the matrices of a parameter, by the names in the module of the layers to come."""
    p, child = module._parameters[name], name + _SUFFIX
    if p.dim() == 2:
        return {child: _view(module, p)}
    slices = (nn.Parameter(W, requires_grad=p.requires_grad) for W in p.detach())
    return {f"{child}.{i}": _view(module, W) for i, W in enumerate(slices)}


def _view(module: nn.Module, W: nn.Parameter) -> nn.Linear:
    view = nn.Linear(W.shape[1], W.shape[0], bias=False, device="meta", dtype=W.dtype)
    view.weight = W
    return view.train(module.training)


def factorize_parameters(module: nn.Module, layers: dict[str, LowRankLinear]) -> None:
    """Form parameters of the module from these layers, in place; `layers` has the names of all views of each."""
    new = tuple(dict.fromkeys(child.partition(".")[0].removesuffix(_SUFFIX) for child in layers))
    dense, before = (module._dense, module._formed) if is_formed(module) else (type(module), ())
    module.__class__ = dense
    module.__dict__.pop("_flat_weights", None)
    for name in new:
        stack = [layer for child, layer in layers.items() if child.startswith(f"{name}{_SUFFIX}.")]
        module._parameters[name] = None  # keeps the order of parameters for to_dense
        module._modules[name + _SUFFIX] = nn.ModuleList(stack) if stack else layers[name + _SUFFIX]
    module.__class__ = _formed_class(dense, before + new)


def to_dense_parameters(module: nn.Module, dense: dict[nn.Module, nn.Module]) -> None:
    """Turn formed parameters into stored ones, in place; `dense` maps low-rank layers to their dense twins."""
    for name in module._formed:
        child = module._modules.pop(name + _SUFFIX)
        if isinstance(child, nn.ModuleList):
            weights = [dense[layer].weight for layer in child]
            trained = any(W.requires_grad for W in weights)
            module._parameters[name] = nn.Parameter(torch.stack([W.detach() for W in weights]), requires_grad=trained)
        else:
            module._parameters[name] = dense[child].weight
    module.__class__ = module._dense
    module.__dict__.pop("_weights", None)
    if isinstance(module, nn.RNNBase):
        module._flat_weights = []
        module._init_flat_weights()
