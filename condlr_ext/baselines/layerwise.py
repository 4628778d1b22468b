"""Shared by the optimizers in this folder: SGD with momentum one parameter at a time, and argument checks."""

import functools
import math
import numbers
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import ops
from .._modules import not_plain
from .._types import Closure, ModelOrGroups, Options
from ..errors import NonFiniteError
from ..optim.groups import link_layers, module_group

_Method = TypeVar("_Method", bound=Callable[..., Any])


def without_autocast(method: _Method) -> _Method:
    """Turn autocast off in an optimizer's method: bases would not be orthonormal in half precision."""

    @functools.wraps(method)
    def run(self, *args, **kwargs):
        with ops.no_autocast(self.param_groups[0]["params"][0].device.type):
            return method(self, *args, **kwargs)

    return run


def closure_loss(closure: Closure | None) -> Any:
    """Return the loss of an optimizer's closure, called with gradients on; None without a closure."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def heavy_ball(p: Tensor, grad: Tensor, buffer: Tensor | None, group: dict) -> Tensor:
    """Return momentum buffer + grad + weight_decay p, the direction of torch.optim.SGD."""
    if group["weight_decay"]:
        grad = grad + group["weight_decay"] * p
    if group["momentum"] and buffer is not None:
        grad = group["momentum"] * buffer + grad
    return grad


class LayerSGD(Optimizer):
    """Heavy-ball SGD of all parameters; subclasses change the direction, the move and the constraint after it.

    Nothing is written before all new values have been computed and found finite. Low-rank layers are found as in
    CondLRSGD.

    Args:
        model: A module, or parameter groups from optim.param_groups.
        options: Defaults of the groups, lr, momentum and weight_decay among them.
    """

    def __init__(self, model: ModelOrGroups, options: Options):
        self._slots = None
        super().__init__([module_group(model)] if isinstance(model, nn.Module) else model, options)
        self._slots = link_layers(self.param_groups)
        self._link()
        for group in self.param_groups:
            check_options(type(self).__name__, group)
        for name, *factors in self._layers:
            for role, X in zip("USV", factors, strict=True):
                check_factor(type(self).__name__, f"{role} of layer {name!r}", X)

    def add_param_group(self, param_group: Options) -> None:
        if self._slots is not None:
            raise ValueError(f"{type(self).__name__}.add_param_group: all groups must be there at construction")
        super().add_param_group(param_group)

    def __getstate__(self) -> Options:
        return super().__getstate__() | {"_slots": self._slots}

    def __setstate__(self, state: Options) -> None:
        super().__setstate__(state)
        self._link()

    def _link(self) -> None:
        self._names = {
            p: name
            for group in self.param_groups
            for name, p in zip(group.get("param_names", ()), group["params"], strict=False)
        }
        self._group_of = {p: group for group in self.param_groups for p in group["params"]}
        self._layers: list[tuple[str, Tensor, Tensor, Tensor]] = [
            (layer.name, *(self.param_groups[g]["params"][i] for g, i in layer.positions[:3])) for layer in self._slots
        ]

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """Take one step.

        Args:
            closure: Optional; computes loss and gradients.

        Returns:
            The closure's loss, None without one.

        Raises:
            NonFiniteError: A gradient or a new value with NaN or Inf; parameters and state are then unchanged.
            RuntimeError: Sparse gradients.
        """
        loss = closure_loss(closure)
        self._step()
        return loss

    @without_autocast
    def _step(self) -> None:
        check_gradients(type(self).__name__, self._group_of, self._names)
        new: dict[Tensor, Tensor] = {}
        buffers: dict[Tensor, Tensor] = {}  # finite if the new parameters are
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                buffer = self._buffer(p) if group["momentum"] else None
                direction = self._direction(p, heavy_ball(p, p.grad, buffer, group))
                if buffer is not None:
                    buffers[buffer] = direction
                new[p] = self._move(p, direction, group["lr"])
        self._check_values({S: new[S] for _, _, S, _ in self._layers if S in new})  # no SVD takes NaN or Inf
        self._constrain(new)
        self._check_values(new)
        for target, value in (new | buffers).items():
            target.copy_(value)

    def _buffer(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        return state["momentum_buffer"]

    def _direction(self, p: Tensor, direction: Tensor) -> Tensor:
        """Return the direction p moves against, which is also its new momentum."""
        return direction

    def _move(self, p: Tensor, direction: Tensor, lr) -> Tensor:
        """Return the new value of p."""
        return p - lr * direction

    def _constrain(self, new: dict[Tensor, Tensor]) -> None:
        """Change the new values in place; the keys are the parameters and state tensors that will hold them."""

    def _check_values(self, new: dict[Tensor, Tensor]) -> None:
        if bad := not_finite(new, new.values()):
            named = ", ".join(self._names.get(t, "the state of a layer") for t in bad)
            raise NonFiniteError(
                f"{type(self).__name__}.step: the new values must be finite, got NaN or Inf in {named}; nothing was"
                " changed (a smaller lr helps if the training diverges)"
            )


def not_finite(keys, tensors) -> list:
    """Return the keys whose tensors hold NaN or Inf; waits once for each device."""
    by_device: dict[torch.device, list] = {}
    for key, t in zip(keys, tensors, strict=True):
        if t.numel():
            by_device.setdefault(t.device, []).append((key, t))
    bad = []
    for pairs in by_device.values():
        keys, tensors = zip(*pairs, strict=True)
        largest = torch.stack([n.double() for n in torch._foreach_norm(tensors, math.inf)])  # faster than isfinite
        bad += [key for key, fine in zip(keys, torch.isfinite(largest).tolist(), strict=True) if not fine]
    return bad


def check_gradients(caller: str, params, names: dict[Tensor, str]) -> None:
    """Raise NonFiniteError, naming the parameter, if a gradient has NaN or Inf, RuntimeError if it is sparse."""
    params = [p for p in params if p.grad is not None]
    if any(p.grad.is_sparse for p in params):
        raise RuntimeError(f"{caller}.step does not take sparse gradients")
    if bad := not_finite(params, [p.grad for p in params]):
        named = ", ".join(names.get(p, "a parameter without a name") for p in bad)
        raise NonFiniteError(
            f"{caller}.step: gradients must be finite, got NaN or Inf in that of {named}; nothing was changed"
        )


def check_options(caller: str, options: dict) -> None:
    """Raise ValueError unless lr, momentum and weight_decay are finite and >= 0."""
    for key in ("lr", "momentum", "weight_decay"):
        value = options[key]
        if not isinstance(value, (numbers.Real, Tensor)) or not 0 <= float(value) < math.inf:
            raise ValueError(f"{caller}: {key} must be a finite number >= 0, got {value!r}")


def check_factor(caller: str, what: str, X: Tensor) -> None:
    """Raise unless X is whole, finite and float32 or float64: the step factorizes it in its own dtype."""
    if reason := not_plain(X):
        raise ValueError(f"{caller}: {what} {reason}; use CondLRSGD, CondLRAdamW or Projector")
    if X.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{caller}: {what} must be float32 or float64, got {X.dtype}")
    if X.is_meta:
        raise ValueError(f"{caller}: {what} must have values, got a meta tensor")
    if not torch.isfinite(X).all():
        raise NonFiniteError(f"{caller}: {what} must be finite, got NaN or Inf")
