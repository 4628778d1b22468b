"""Argument checks for functions that run a classifier on inputs in [0, 1]; `caller` names the function in errors."""

import math
import numbers
import warnings

import torch
from torch import Tensor

from .errors import NonFiniteError, ShapeError

_INTEGER = (
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64,
)  # fmt: skip


def check_labels(caller: str, y: Tensor) -> Tensor:
    """Return the labels as int64, the only integers that all of torch takes; raise unless they are integers."""
    if not isinstance(y, Tensor) or y.dtype not in _INTEGER:
        raise TypeError(f"{caller}: y must be an integer tensor of labels, got {_dtype_or_type(y)}")
    return y.long()


def check_batch(caller: str, x: Tensor, y: Tensor) -> Tensor:
    """Return y as int64; raise unless x [B, ...] is floating point in [0, 1] and y [B] integer, on one device."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"{caller}: x must be a floating-point tensor, got {_dtype_or_type(x)}")
    labels = check_labels(caller, y)
    if x.ndim == 0 or y.shape != x.shape[:1]:
        raise ShapeError(f"{caller}: x [B, ...] needs y [B], got x {list(x.shape)} and y {list(y.shape)}")
    if x.device != y.device:
        raise ValueError(f"{caller}: x and y must be on one device, got {x.device} and {y.device}")
    if x.numel():
        low, high = x.aminmax()
        if not (low >= 0 and high <= 1):  # NaN fails too
            raise ValueError(
                f"{caller}: x must lie in [0, 1], got values in [{low:.4g}, {high:.4g}]; attack plain "
                "inputs and put any normalization into the model"
            )
    return labels


def _dtype_or_type(value) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def check_logits(caller: str, logits: Tensor, y: Tensor) -> None:
    """Raise unless logits are [N, C] and finite and all labels y [N] are in 0..C-1."""
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(y):
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits)
        raise ShapeError(f"{caller}: the model must return logits [{len(y)}, C], got {got}")
    if not torch.isfinite(logits).all():
        raise NonFiniteError(f"{caller}: the model returns non-finite logits")
    if len(y) and not (y.min() >= 0 and y.max() < logits.shape[1]):
        raise ValueError(
            f"{caller}: labels must be in 0..{logits.shape[1] - 1} (the model has {logits.shape[1]} "
            f"classes), got {y.min()}..{y.max()}"
        )


def check_eps(caller: str, eps, x: Tensor, norm: str | None = None) -> Tensor:
    """Return eps as a 0-D or 1-D tensor with dtype and device of x; raise unless every entry is finite and >= 0.

    Warn of an l-infinity budget above 1, which is all of [0, 1]: likely a number of gray levels.
    """
    try:
        if isinstance(eps, bool):
            raise TypeError
        budgets = torch.as_tensor(eps, dtype=x.dtype, device=x.device).detach()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{caller}: eps must be a number or a 1-D sequence of numbers, got {eps!r}") from None
    if budgets.ndim > 1 or budgets.numel() == 0:
        raise ShapeError(f"{caller}: eps must be a number or a non-empty 1-D sequence, got shape {list(budgets.shape)}")
    if not (torch.isfinite(budgets) & (budgets >= 0)).all():
        raise ValueError(f"{caller}: eps must be finite and >= 0, got {eps}")
    if norm == "linf" and (budgets > 1).any():
        warnings.warn(
            f"eps is in the units of inputs in [0, 1], got {budgets.max():g} in linf, which reaches every input; 8 of"
            " 255 gray levels are 8 / 255",
            stacklevel=3,
        )
    return budgets


def check_count(caller: str, name: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{caller}: {name} must be an integer >= 1, got {value!r}")


def check_choice(caller: str, name: str, value, known) -> None:
    if value not in known:
        raise ValueError(f"{caller}: {name} must be one of {', '.join(known)}, got {value!r}")


def check_step_size(caller: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not (math.isfinite(value) and value > 0):
        raise ValueError(f"{caller}: step_size must be finite and > 0, got {value!r}")
