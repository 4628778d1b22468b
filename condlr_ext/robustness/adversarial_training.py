"""Adversarial training: the losses of Madry et al. and TRADES, for any attack, and one epoch with them."""

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import check_batch, check_count, check_eps, check_labels, check_logits, check_step_size
from .._modules import frozen
from ..attacks.balls import BALLS
from ..attacks.search import input_gradient
from ..errors import NonFiniteError, ShapeError

Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]  # (model, x, y) -> x_adv like x
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]  # (model, x, y) -> scalar


def adversarial_loss(model: nn.Module, x: Tensor, y: Tensor, attack: Attack) -> Tensor:
    """Return the mean cross-entropy at attacked inputs, CE(f(attack(x)), y).

    Args:
        model: Classifier returning logits [B, C], in the mode it trains in.
        x: Inputs in [0, 1], [B, ...], floating point.
        y: Labels [B], integer.
        attack: (model, x, y) -> x_adv like x; functools.partial of any function of condlr_ext.attacks with one budget.

    Returns:
        A scalar, differentiable in the model's parameters.

    Raises:
        ValueError: No samples.
        TypeError: Labels that are no integers.
        ShapeError: The attack's result is not like x.
        NonFiniteError: The attack's result has NaN or Inf.

    Source: Madry et al. (arXiv 1706.06083), eq. 2.1.
    """
    y = check_labels("adversarial_loss", y)
    return F.cross_entropy(model(_attacked("adversarial_loss", attack, model, x, y)), y)


def trades_loss(model: nn.Module, x: Tensor, y: Tensor, attack: Attack, beta: float = 6.0) -> Tensor:
    """Return the TRADES loss, CE(f(x), y) + beta KL(softmax f(x) ‖ softmax f(x_adv)), means over the batch.

    Args:
        model: Classifier returning logits [B, C], in the mode it trains in; called on clean and attacked inputs
            separately, so that their batch statistics do not mix.
        x: Inputs in [0, 1], [B, ...], floating point.
        y: Labels [B], integer.
        attack: (model, x, y) -> x_adv like x; the paper's ascends the KL term: functools.partial(kl_pgd, eps=...).
        beta: >= 0; the paper uses 1 to 6.

    Returns:
        A scalar, differentiable in the model's parameters.

    Raises:
        ValueError: beta < 0 or no samples.
        TypeError: Labels that are no integers.
        ShapeError: The attack's result is not like x.
        NonFiniteError: The attack's result has NaN or Inf.

    Source: Zhang et al. (arXiv 1901.08573), eq. 5.
    """
    if not 0 <= beta < math.inf:
        raise ValueError(f"trades_loss: beta must be a finite number >= 0, got {beta!r}")
    y = check_labels("trades_loss", y)
    attacked = _attacked("trades_loss", attack, model, x, y)
    clean = model(x)
    return F.cross_entropy(clean, y) + beta * _kl(clean, model(attacked)).mean()


def kl_pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    *,
    steps: int = 10,
    step_size: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Attack as TRADES does: l-infinity ascent on KL(softmax f(x) ‖ softmax f(x')), the last iterate.

    Args:
        model: Classifier returning logits [B, C]; attacked in eval mode, its state is restored.
        x: Inputs in [0, 1], [B, ...], floating point.
        y: Labels [B], integer; checked, but not used.
        eps: l-infinity budget >= 0, one number, in the units of x.
        steps: >= 1.
        step_size: > 0; default 2.5 eps / steps, as in pgd.
        generator: Source of the start, x + 0.001 N(0, 1) (at x itself the gradient is 0); default torch's global one.

    Returns:
        Adversarial inputs like x, within eps of it and in [0, 1].

    Raises:
        ValueError: An argument out of range, or a model whose output carries no gradient to its input.
        TypeError: An argument of the wrong type.
        ShapeError: Shapes of the arguments or of the logits.
        NonFiniteError: NaN or Inf in the logits or the input gradient.

    Source: Zhang et al. (arXiv 1901.08573), algorithm 1.
    """
    y = check_batch("kl_pgd", x, y)
    check_count("kl_pgd", "steps", steps)
    budget = check_eps("kl_pgd", eps, x, "linf")
    if budget.ndim:
        raise ShapeError(f"kl_pgd: eps must be one number, got shape {list(budget.shape)}")
    if step_size is None:
        step_size = 2.5 * budget / steps
    else:
        check_step_size("kl_pgd", step_size)
    with frozen(model):
        x, y = x.detach().clone(), y.clone()
        noise = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
        point = (x + 0.001 * noise).clamp(0, 1)
        if x.numel() == 0:
            return point
        with torch.no_grad():
            clean = model(x)
        check_logits("kl_pgd", clean, y)
        for _ in range(steps):
            point.requires_grad_()
            grad = input_gradient("kl_pgd", _kl(clean, model(point)), point)
            if not torch.isfinite(grad).all():
                raise NonFiniteError("kl_pgd: the gradient with respect to the input is not finite")
            point = BALLS["linf"].move(point.detach() + step_size * grad.sign(), x, budget)
    return point


def train_epoch(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    loss: Loss,
    penalty: Callable[[nn.Module], Tensor] | None = None,
) -> float:
    """Train one epoch, in train mode, with one step of the optimizer per batch on loss(model, x, y) + penalty(model).

    Args:
        model: Trained in place.
        batches: Pairs (x, y), such as those of a DataLoader.
        optimizer: Any torch optimizer over the model's parameters.
        loss: (model, x, y) -> mean over the batch, such as functools.partial(trades_loss, attack=attack).
        penalty: model -> scalar, such as those of condlr_ext.regularizers.

    Returns:
        The mean loss per sample, without the penalty.

    Raises:
        NonFiniteError: The loss or the penalty is not finite; that step is not taken.
        ValueError: No batch.
    """
    model.train()
    sum_of_losses, samples = 0.0, 0
    for x, y in batches:
        optimizer.zero_grad()
        value = loss(model, x, y)
        objective = value if penalty is None else value + penalty(model)
        if not torch.isfinite(objective):
            raise NonFiniteError(f"train_epoch: loss + penalty must be finite, got {objective.item()}")
        objective.backward()
        optimizer.step()
        sum_of_losses, samples = sum_of_losses + value.item() * len(y), samples + len(y)
    if not samples:
        raise ValueError("train_epoch: batches must hold at least one sample, got none")
    return sum_of_losses / samples


def _attacked(caller: str, attack: Attack, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    if not len(x):
        raise ValueError(f"{caller}: x must hold at least one sample, got shape {list(x.shape)}")
    attacked = attack(model, x, y)
    if not isinstance(attacked, Tensor) or attacked.shape != x.shape:
        got = list(attacked.shape) if isinstance(attacked, Tensor) else type(attacked).__name__
        raise ShapeError(f"{caller}: attack must return a tensor like x {list(x.shape)}, got {got}")
    if not torch.isfinite(attacked).all():
        raise NonFiniteError(f"{caller}: attack must return finite inputs, got NaN or Inf")
    return attacked.detach()


def _kl(logits: Tensor, other: Tensor) -> Tensor:
    """Return KL(softmax logits ‖ softmax other) per sample, [B]."""
    log_p, log_q = logits.log_softmax(1), other.log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(1)
