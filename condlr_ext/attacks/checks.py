"""Argument checks shared by attacks and robustness evaluation, and the state a model has under attack."""

import math
import numbers
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..errors import NonFiniteError, ShapeError
from .losses import CLASSES_NEEDED


def _kind(value) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def check_batch(function: str, x: Tensor, y: Tensor) -> None:
    """x [B, ...] floating in [0, 1], y [B] integer on the same device."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"{function}: x must be a floating-point tensor, got {_kind(x)}")
    integer = isinstance(y, Tensor) and not (y.is_floating_point() or y.is_complex() or y.dtype == torch.bool)
    if not integer:
        raise TypeError(f"{function}: y must be an integer tensor of labels, got {_kind(y)}")
    if x.ndim == 0 or y.shape != x.shape[:1]:
        raise ShapeError(f"{function}: x [B, ...] needs y [B], got x {list(x.shape)} and y {list(y.shape)}")
    if x.device != y.device:
        raise ValueError(f"{function}: x and y must be on one device, got {x.device} and {y.device}")
    if x.numel():
        low, high = x.aminmax()
        if not (low >= 0 and high <= 1):  # NaN fails too
            raise ValueError(
                f"{function}: x must lie in [0, 1], got values in [{low:.4g}, {high:.4g}]; attack plain "
                "inputs and put any normalization into the model"
            )


def check_logits(function: str, logits: Tensor, y: Tensor, loss: str = "ce") -> None:
    """logits [N, C], finite, with every label below C and as many classes as the loss needs."""
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(y):
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits)
        raise ShapeError(f"{function}: the model must return logits [{len(y)}, C], got {got}")
    if not torch.isfinite(logits).all():
        raise NonFiniteError(f"{function}: the model returns non-finite logits")
    if len(y) and not (y.min() >= 0 and y.max() < logits.shape[1]):
        raise ValueError(
            f"{function}: labels must be in 0..{logits.shape[1] - 1} (the model has {logits.shape[1]} "
            f"classes), got {y.min()}..{y.max()}"
        )
    if logits.shape[1] < CLASSES_NEEDED.get(loss, 1):
        raise ValueError(
            f'{function}: loss="{loss}" needs at least {CLASSES_NEEDED[loss]} classes, got {logits.shape[1]}; '
            'use loss="ce"'
        )


def check_eps(function: str, eps, x: Tensor) -> Tensor:
    """eps as a 0-D or 1-D tensor like x, every entry finite and >= 0."""
    try:
        if isinstance(eps, bool):
            raise TypeError
        budgets = torch.as_tensor(eps, dtype=x.dtype, device=x.device).detach()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{function}: eps must be a number or a 1-D sequence of numbers, got {eps!r}") from None
    if budgets.ndim > 1 or budgets.numel() == 0:
        raise ShapeError(
            f"{function}: eps must be a number or a non-empty 1-D sequence, got shape {list(budgets.shape)}"
        )
    if not (torch.isfinite(budgets) & (budgets >= 0)).all():
        raise ValueError(f"{function}: eps must be finite and >= 0, got {eps}")
    return budgets


def check_count(function: str, name: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{function}: {name} must be an integer >= 1, got {value!r}")


def check_choice(function: str, name: str, value, known) -> None:
    if value not in known:
        raise ValueError(f"{function}: {name} must be one of {', '.join(known)}, got {value!r}")


def check_step_size(function: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not (math.isfinite(value) and value > 0):
        raise ValueError(f"{function}: step_size must be finite and > 0, got {value!r}")


@contextmanager
def frozen(model: nn.Module):
    """Inside, the model is in eval mode, its parameters take no gradient, gradients to inputs are recorded.

    Afterwards every submodule's mode and every parameter's requires_grad are what they were.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model under attack must be a torch.nn.Module, got {type(model)}")
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval()
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for module, training in modes:
            if type(module).train is not nn.Module.train:  # what it does beside setting the flag
                module.train(training)
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)
