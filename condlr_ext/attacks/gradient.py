"""FGSM and projected gradient ascent (PGD) in the l-infinity and l2 balls, for one budget or many at once."""

import math

import torch
from torch import Tensor, nn

from ..errors import NonFiniteError
from .checks import check_batch, check_count, check_eps, check_logits, frozen
from .losses import LOSSES, cross_entropy


def fgsm(model: nn.Module, x: Tensor, y: Tensor, eps) -> Tensor:
    """Fast gradient sign method: clip(x + eps sign(grad_x CE), 0, 1).

    Args:
        model: classifier returning logits [B, C]; attacked in eval mode, its state is restored.
        x (Tensor): inputs in [0, 1], [B, ...], floating point.
        y (Tensor): labels [B], integer.
        eps (float or 1-D sequence): l-infinity budgets >= 0, in the units of x.

    Returns:
        Tensor: adversarial inputs like x, [E, B, ...] for E budgets. A sample whose gradient is 0 stays.

    Raises:
        ValueError, TypeError: bad argument; ShapeError, NonFiniteError: the model's output.

    Source: Goodfellow, Shlens, Szegedy (arXiv 1412.6572), section 4.
    """
    check_batch("fgsm", x, y)
    budgets = check_eps("fgsm", eps, x)
    if x.numel() == 0:
        return x.detach().expand(*budgets.shape, *x.shape).clone()
    with frozen(model):
        _, grad = clean_gradient("fgsm", model, x, y)
    return (x + budgets.view(*budgets.shape, *[1] * x.ndim) * grad.sign()).clamp(0, 1)


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps,
    *,
    norm: str = "linf",
    steps: int = 30,
    step_size: float | None = None,
    restarts: int = 1,
    random_start: bool = True,
    loss: str = "ce",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Projected gradient ascent, x' <- clip(project(x' + step_size direction(grad_x loss)), 0, 1), best kept.

    Of all points visited, the clean input included, each sample keeps a misclassified one if there is any,
    and among those (else among all) the one of highest loss. All budgets go through the model in one batch.

    Args:
        model: classifier returning logits [B, C]; attacked in eval mode, its state is restored.
        x (Tensor): inputs in [0, 1], [B, ...], floating point.
        y (Tensor): labels [B], integer.
        eps (float or 1-D sequence): radii >= 0 of the ball, in the units of x.
        norm: "linf" (direction: the sign) or "l2" (direction: the normalised gradient).
        steps, restarts: counts >= 1; more than one restart needs random_start.
        step_size: > 0; default 2.5 eps / steps.
        random_start: start uniformly in the ball, the same directions for every budget.
        loss: "ce" or "dlr" (needs 3 classes).
        generator: source of the random starts, on the device of x; default torch's global one.

    Returns:
        Tensor: adversarial inputs like x, [E, B, ...] for E budgets.

    Raises:
        ValueError, TypeError: bad argument; ShapeError, NonFiniteError: the model's output or input gradient.

    Source: Madry et al. (arXiv 1706.06083), section 2.1; loss "dlr" from Croce and Hein (arXiv 2003.01690).
    """
    check_batch("pgd", x, y)
    budgets = check_eps("pgd", eps, x)
    check_count("pgd", "steps", steps)
    check_count("pgd", "restarts", restarts)
    for name, value, known in (("norm", norm, _BALLS), ("loss", loss, LOSSES)):
        if value not in known:
            raise ValueError(f"pgd: {name} must be one of {', '.join(known)}, got {value!r}")
    if step_size is not None and not (math.isfinite(step_size) and step_size > 0):
        raise ValueError(f"pgd: step_size must be finite and > 0, got {step_size}")
    if restarts > 1 and not random_start:
        raise ValueError(f"pgd: restarts={restarts} needs random_start=True, without it every restart is the same")
    if x.numel() == 0:
        return x.detach().expand(*budgets.shape, *x.shape).clone()

    objective, (unit_noise, direction, project) = LOSSES[loss], _BALLS[norm]
    copies, per_sample = max(1, budgets.numel()), [1] * (x.ndim - 1)
    with frozen(model):
        center, labels = x.detach().repeat(copies, *per_sample), y.long().repeat(copies)
        radius = budgets.reshape(-1).repeat_interleave(len(x)).view(-1, *per_sample)
        stride = 2.5 * radius / steps if step_size is None else step_size
        with torch.no_grad():
            logits = model(center)
            check_logits("pgd", logits, labels)
            best, best_loss, best_wrong = center, objective(logits, labels), logits.argmax(1) != labels
        finite = torch.ones((), dtype=torch.bool, device=x.device)
        for _ in range(restarts):
            point = center.clone()
            if random_start:
                noise = unit_noise(x, generator).repeat(copies, *per_sample)
                point = (center + radius * noise).clamp(0, 1)
            for step in range(steps + 1):
                point = point.requires_grad_()
                logits = model(point)
                value = objective(logits, labels)
                (grad,) = _gradient("pgd", value, point)
                point, value = point.detach(), value.detach()
                finite &= torch.isfinite(value).all() & torch.isfinite(grad).all()
                wrong = logits.argmax(1) != labels
                better = (wrong & ~best_wrong) | ((wrong == best_wrong) & (value > best_loss))
                best = torch.where(better.view(-1, *per_sample), point, best)
                best_loss, best_wrong = torch.where(better, value, best_loss), best_wrong | wrong
                if step < steps:
                    moved = project(point + stride * direction(grad) - center, radius)
                    point = (center + moved).clamp(0, 1)
        if not finite:
            raise NonFiniteError("pgd: the loss or its gradient with respect to the input is not finite")
    return best.view(*budgets.shape, *x.shape)


def clean_gradient(function: str, model: nn.Module, x: Tensor, y: Tensor):
    """Logits [B, C] of a frozen model at x and the gradient of each sample's cross-entropy, both checked."""
    x, y = x.detach().clone().requires_grad_(), y.long().clone()
    logits = model(x)
    check_logits(function, logits, y)
    (grad,) = _gradient(function, cross_entropy(logits, y), x)
    if not torch.isfinite(grad).all():
        raise NonFiniteError(f"{function}: the gradient with respect to the input is not finite")
    return logits.detach(), grad


def _gradient(function: str, value: Tensor, x: Tensor):
    if not value.requires_grad:
        raise ValueError(f"{function}: the model's output carries no gradient to its input")
    return torch.autograd.grad(value.sum(), x)


def _norms(t: Tensor) -> Tensor:
    """l2 norm of each sample, broadcastable against t."""
    return torch.linalg.vector_norm(t.reshape(len(t), -1), dim=1).view(-1, *[1] * (t.ndim - 1))


def _linf_noise(x: Tensor, generator) -> Tensor:
    return torch.rand(x.shape, dtype=x.dtype, device=x.device, generator=generator) * 2 - 1


def _linf_project(delta: Tensor, radius: Tensor) -> Tensor:
    return delta.clamp(-radius, radius)


def _l2_noise(x: Tensor, generator) -> Tensor:
    """Uniform in the unit ball: a normal direction and a radius u^(1/d)."""
    like = {"dtype": x.dtype, "device": x.device, "generator": generator}
    radius = torch.rand(len(x), *[1] * (x.ndim - 1), **like) ** (1 / x[0].numel())
    return radius * _l2_direction(torch.randn(x.shape, **like))


def _l2_direction(grad: Tensor) -> Tensor:
    # divided by its largest entry first: the squares of a tiny gradient underflow
    largest = grad.abs().reshape(len(grad), -1).amax(1).view(-1, *[1] * (grad.ndim - 1))
    scaled = grad / torch.where(largest > 0, largest, 1)
    return scaled / _norms(scaled).clamp_min(1)


def _l2_project(delta: Tensor, radius: Tensor) -> Tensor:
    norms = _norms(delta)
    return torch.where(norms > radius, delta * (radius / torch.where(norms > 0, norms, 1)), delta)


_BALLS = {
    "linf": (_linf_noise, torch.sign, _linf_project),
    "l2": (_l2_noise, _l2_direction, _l2_project),
}
