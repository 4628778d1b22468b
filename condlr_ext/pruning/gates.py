"""Hard-concrete gates, with which training can switch off output channels of dense layers."""

import math
import numbers

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.types import Device

from .._modules import DENSE, select_layers
from .._types import Patterns

LOWER, UPPER = -0.1, 1.1  # the concrete variable is stretched to this interval, then clipped to [0, 1]
TEMPERATURE = 2 / 3
LOG_ALPHA_MAX = math.log(1e2)


class HardConcreteGate(nn.Module):
    """Multiplies each output channel of a weight by a gate z in [0, 1], a parametrization of torch.nn.utils.

    In training one z per channel and forward pass is drawn from the hard-concrete distribution; in eval mode
    z = clip(sigmoid(log_alpha) (1.1 + 0.1) - 0.1, 0, 1).

    Args:
        channels: Number of gates.
        closed: In (0, 1); the gates start with sigmoid(log_alpha) = 1 - closed.
        device: Device of log_alpha [channels].
        dtype: dtype of log_alpha.

    Raises:
        ValueError: closed is out of range.

    Source: Louizos, Welling, Kingma (arXiv 1712.01312), section 2.2; temperature 2/3 and |log_alpha| <= log 100
        as in the public TSCNC code.
    """

    log_alpha: nn.Parameter

    def __init__(self, channels: int, closed: float = 0.3, device: Device = None, dtype: torch.dtype | None = None):
        super().__init__()
        if not isinstance(closed, numbers.Real) or not 0 < closed < 1:
            raise ValueError(f"HardConcreteGate: closed must be a number in (0, 1), got {closed!r}")
        start = math.log((1 - closed) / closed)
        self.log_alpha = nn.Parameter(torch.full((channels,), start, device=device, dtype=dtype))

    def open_probability(self) -> Tensor:
        """Return P(z > 0) per channel, [channels]."""
        return torch.sigmoid(_Bounded.apply(self.log_alpha) - TEMPERATURE * math.log(-LOWER / UPPER))

    def forward(self, weight: Tensor) -> Tensor:
        log_alpha = _Bounded.apply(self.log_alpha)
        if self.training:
            u = torch.rand_like(log_alpha).clamp(1e-6, 1 - 1e-6)
            s = torch.sigmoid((torch.logit(u) + log_alpha) / TEMPERATURE)
        else:
            s = torch.sigmoid(log_alpha)
        z = (s * (UPPER - LOWER) + LOWER).clamp(0, 1)
        return weight * z.to(weight.dtype).view(-1, *[1] * (weight.dim() - 1))


class _Bounded(torch.autograd.Function):
    """clamp(x, ±LOG_ALPHA_MAX) whose gradient is 0 only where descent would leave the interval."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clamp(-LOG_ALPHA_MAX, LOG_ALPHA_MAX)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        leaving = ((x >= LOG_ALPHA_MAX) & (grad < 0)) | ((x <= -LOG_ALPHA_MAX) & (grad > 0))
        return torch.where(leaving, 0, grad)


def add_gates(model: nn.Module, *, exclude: Patterns = (), closed: float = 0.3) -> list[str]:
    """Put a HardConcreteGate on the weight of every nn.Linear and nn.Conv1d/2d/3d of the model, in place.

    make_permanent removes the gates and leaves the weights as eval mode has them.

    Args:
        model: Changed in place; its new parameters are `<layer>.parametrizations.weight.0.log_alpha`.
        exclude: Layer names or fnmatch patterns to leave alone, such as the classifier.
        closed: As in HardConcreteGate.

    Returns:
        The names of the gated layers.

    Raises:
        TypeError: model is no module.
        ValueError: closed is out of range, no layer is left, or a weight is shared or already parametrized.
    """
    layers = select_layers("add_gates", model, DENSE, exclude)
    for name, layer in layers.items():
        if parametrize.is_parametrized(layer, "weight"):
            raise ValueError(f"add_gates: the weight of {name} must not be parametrized, got {layer.parametrizations}")
        check_weight("add_gates", model, name, layer)
    gates = {
        name: HardConcreteGate(len(layer.weight), closed, device=layer.weight.device, dtype=layer.weight.dtype)
        for name, layer in layers.items()
    }
    for name, layer in layers.items():
        parametrize.register_parametrization(layer, "weight", gates[name].train(layer.training))
    return list(layers)


def check_weight(caller: str, model: nn.Module, name: str, layer: nn.Module) -> None:
    """Raise ValueError unless the layer's weight is a parameter that nothing else in the model uses."""
    weight = original_weight(layer)
    if weight is None:
        raise ValueError(f"{caller}: the weight of {name} must be one tensor, got {layer.parametrizations.weight}")
    owners = [key for key, p in model.named_parameters(remove_duplicate=False) if p is weight]
    if len(owners) > 1:
        raise ValueError(f"{caller}: the weight of {name} must be its own, got one shared by {', '.join(owners)}")


def original_weight(layer: nn.Module) -> nn.Parameter | None:
    """Return the weight parameter from before parametrization; None if it is kept in several tensors (weight_norm)."""
    if not parametrize.is_parametrized(layer, "weight"):
        return layer.weight
    return getattr(layer.parametrizations.weight, "original", None)
