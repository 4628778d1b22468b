"""Lipschitz constants in l2 of torch's activations, poolings, averages and shape changes.

Every rule is per sample and for eval mode. A constant is that of the map between whole tensors, so broadcasting and
repetition count. Operations without a rule here have no bound.
"""

import math
import operator
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layer_norms import windows_per_element

# the largest slope of the scalar function, rounded up where it has no closed form
GELU, SILU, MISH = 1.13, 1.1, 1.09
SELU = 1.0507009873554805 * 1.6732632423543772

_MODULES: dict[type, Callable[[nn.Module], float | None] | float] = {
    **dict.fromkeys(
        (
            nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
            nn.Flatten, nn.Unflatten, nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Tanh, nn.Softsign, nn.LogSigmoid,
            nn.Softshrink, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle,
        ),
        1.0,
    ),
    nn.LeakyReLU: lambda m: max(1.0, abs(m.negative_slope)),
    nn.ELU: lambda m: max(1.0, abs(m.alpha)),
    nn.CELU: lambda m: _celu(m.alpha),
    nn.Softplus: lambda m: _softplus(m.beta, m.threshold),
    nn.PReLU: lambda m: max(1.0, m.weight.detach().abs().max().item()),
    nn.RReLU: lambda m: max(1.0, abs(m.lower + m.upper) / 2),
    nn.SELU: SELU, nn.GELU: GELU, nn.SiLU: SILU, nn.Mish: MISH, nn.Hardswish: 1.5,
    nn.Sigmoid: 0.25, nn.Hardsigmoid: 1 / 6,
    nn.Softmax: 0.5, nn.Softmax2d: 0.5,  # xᵀ (diag p − p pᵀ) x, a variance, is at most (max − min)² / 4 <= |x|² / 2
}  # fmt: skip

_AVERAGES = (
    nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d,
    nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d,
    nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d,
)  # fmt: skip
_MAX_POOLS = {nn.MaxPool1d: 1, nn.MaxPool2d: 2, nn.MaxPool3d: 3}
_POSITIVE_MODES = ("nearest", "nearest-exact", "linear", "bilinear", "trilinear", "area")

_SAME = (
    "relu relu_ relu6 tanh hardtanh softsign logsigmoid abs neg positive clone contiguous flatten"
    " unflatten reshape view permute transpose swapaxes swapdims movedim moveaxis squeeze unsqueeze t roll flip chunk"
    " split tensor_split unbind clamp clip clamp_min clamp_max pixel_shuffle pixel_unshuffle narrow select float double"
).split()
_SLOPES = {"sigmoid": 0.25, "hardsigmoid": 1 / 6, "silu": SILU, "gelu": GELU, "mish": MISH, "hardswish": 1.5,
           "selu": SELU, "softmax": 0.5}  # fmt: skip
_POSITIVE = (
    "mean sum avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d expand"
    " repeat pad interpolate"
).split()
_KNOWN = (
    *_SAME, *_SLOPES, *_POSITIVE, "leaky_relu", "elu", "celu", "softplus", "dropout", "max_pool1d", "max_pool2d",
    "max_pool3d",
)  # fmt: skip
_NAMES = {
    getattr(space, name): name for name in _KNOWN for space in (operator, torch, F) if hasattr(space, name)
}  # by object: a user's own function may have any name


def module_constant(module: nn.Module, value: Tensor) -> float | None:
    """Return the constant of a module without weights for inputs like value; None if there is no rule."""
    kind = type(module)
    if kind in _MODULES:
        rule = _MODULES[kind]
        return rule if isinstance(rule, float) else rule(module)
    if kind in _MAX_POOLS and not module.return_indices:
        return _max_pool(_MAX_POOLS[kind], module.kernel_size, module.stride, module.dilation)
    if kind in _AVERAGES or (kind is nn.Upsample and module.mode in _POSITIVE_MODES):
        return positive_map_constant(module, value)
    return None


def function_constant(target, value: Tensor, args: tuple, kwargs: dict) -> float | None:
    """Return the constant of target(value, *args, **kwargs) in value; target is a function or a method's name."""
    name = target if isinstance(target, str) and target in _KNOWN else _NAMES.get(target)
    if name in _SAME:
        return None if any(isinstance(a, torch.dtype) for a in args) else 1.0  # view(dtype) reads bits as other numbers
    if name in _SLOPES:
        return _SLOPES[name]
    if name in ("leaky_relu", "elu"):
        slope = args[0] if args else kwargs.get("negative_slope", kwargs.get("alpha", 1.0))
        return max(1.0, abs(slope))
    if name in ("celu", "softplus"):
        return {"celu": _celu, "softplus": _softplus}[name](*args, **kwargs)
    if name == "dropout":
        training = args[1] if len(args) > 1 else kwargs.get("training", True)
        return None if training else 1.0
    if name in _POSITIVE:
        if name == "interpolate" and kwargs.get("mode", args[2] if len(args) > 2 else "nearest") not in _POSITIVE_MODES:
            return None

        def call(t):
            return getattr(t, target)(*args, **kwargs) if isinstance(target, str) else target(t, *args, **kwargs)

        return positive_map_constant(call, value)
    if name is not None and name.startswith("max_pool"):
        return _max_pool_call(int(name[-2]), *args, **kwargs)
    return None


def _celu(alpha=1.0, inplace=False) -> float | None:
    return 1.0 if alpha > 0 else None  # otherwise the slope is unbounded


def _softplus(beta=1.0, threshold=20.0) -> float | None:
    return 1.0 if beta > 0 and threshold >= 20 else None  # at the threshold it jumps by log(1 + exp(-threshold)) / beta


def positive_map_constant(function: Callable[[Tensor], Tensor], value: Tensor) -> float:
    """Return a bound on the norm of an affine map with coefficients >= 0, √(largest row sum · largest column sum).

    Source: Schur's test; exact where rows do not overlap.
    """
    ones = torch.ones(value.shape, dtype=torch.float64, device=value.device, requires_grad=True)
    with torch.enable_grad():
        rows = function(ones) - function(torch.zeros_like(ones))
        (columns,) = torch.autograd.grad(rows.sum(), ones)
    return math.sqrt(rows.amax().item()) * math.sqrt(columns.amax().item())


def _max_pool_call(d, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
    return None if return_indices else _max_pool(d, kernel_size, stride or kernel_size, dilation)


def _max_pool(d: int, kernel_size, stride, dilation) -> float:
    """Return √(windows that share an element): the maximum over one window is 1-Lipschitz."""
    sizes = (x if isinstance(x, (tuple, list)) else (x,) * d for x in (kernel_size, stride, dilation))
    return math.sqrt(math.prod(map(windows_per_element, *sizes)))
