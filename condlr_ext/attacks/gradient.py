"""The fast gradient method (FGSM) and projected gradient ascent (PGD), for one budget or many at once."""

import torch
from torch import Tensor, nn

from ..errors import NonFiniteError
from .balls import BALLS
from .checks import check_batch, check_choice, check_count, check_eps, check_logits, check_step_size, frozen
from .losses import LOSSES
from .search import Search, gradient, laid_out, untouched


def fgsm(model: nn.Module, x: Tensor, y: Tensor, eps, *, norm: str = "linf", loss: str = "ce") -> Tensor:
    """Fast gradient (sign) method: clip(x + eps direction(grad_x loss), 0, 1).

    Args:
        model: classifier returning logits [B, C]; attacked in eval mode, its state is restored.
        x (Tensor): inputs in [0, 1], [B, ...], floating point.
        y (Tensor): labels [B], integer.
        eps (float or 1-D sequence): budgets >= 0, in the units of x.
        norm: "linf" (direction: the sign) or "l2" (direction: the normalized gradient).
        loss: "ce"; "log-odds": its direction without rounding at saturated logits; "ce-rescaled"; "dlr".

    Returns:
        Tensor: adversarial inputs like x, [E, B, ...] for E budgets. A sample whose gradient is 0 stays.

    Raises:
        ValueError, TypeError: bad argument; ShapeError, NonFiniteError: the model's output.

    Source: Goodfellow, Shlens, Szegedy (arXiv 1412.6572), section 4.
    """
    check_batch("fgsm", x, y)
    budgets = check_eps("fgsm", eps, x)
    check_choice("fgsm", "norm", norm, BALLS)
    check_choice("fgsm", "loss", loss, LOSSES)
    if x.numel() == 0:
        return untouched(x, budgets)
    with frozen(model):
        _, grad = clean_gradient("fgsm", model, x, y, loss)
    return (x.detach() + budgets.view(*budgets.shape, *[1] * x.ndim) * BALLS[norm].direction(grad)).clamp(0, 1)


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
        norm: "linf" (direction: the sign) or "l2" (direction: the normalized gradient).
        steps, restarts: counts >= 1; more than one restart needs random_start.
        step_size: > 0; default 2.5 eps / steps.
        random_start: start anywhere in the ball: uniformly in the "linf" one, in a uniform direction at a uniform
            distance in the "l2" one; the same for every budget.
        loss: "ce"; "log-odds": its direction without rounding at saturated logits; "ce-rescaled"; "dlr" (needs 3
            classes).
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
    check_choice("pgd", "norm", norm, BALLS)
    check_choice("pgd", "loss", loss, LOSSES)
    if step_size is not None:
        check_step_size("pgd", step_size)
    if restarts > 1 and not random_start:
        raise ValueError(f"pgd: restarts={restarts} needs random_start=True, without it every restart is the same")
    if x.numel() == 0:
        return untouched(x, budgets)

    ball = BALLS[norm]
    with frozen(model):
        center, labels, radius = laid_out(x, y, budgets)
        stride = 2.5 * radius / steps if step_size is None else step_size
        search = Search("pgd", model, labels, LOSSES[loss], loss, center, center)
        for _ in range(restarts):
            point = center
            if random_start:
                point = (center + radius * spread(ball.noise(x, generator), center)).clamp(0, 1)
            for _ in range(steps):
                _, grad = search.visit(point, point)
                moved = ball.project(point + stride * ball.direction(grad) - center, radius)
                point = (center + moved).clamp(0, 1)
            search.score(point, point)
        (best,) = search.strongest()
    return best.view(*budgets.shape, *x.shape)


def spread(noise: Tensor, center: Tensor) -> Tensor:
    """noise [B, ...] repeated for every budget of center [E B, ...]."""
    return noise.repeat(len(center) // len(noise), *[1] * (noise.ndim - 1))


def clean_gradient(function: str, model: nn.Module, x: Tensor, y: Tensor, loss: str = "ce"):
    """Logits [B, C] of a frozen model at x and the gradient of each sample's loss, both checked."""
    x, y = x.detach().clone().requires_grad_(), y.long().clone()
    logits = model(x)
    check_logits(function, logits, y, loss)
    grad = gradient(function, LOSSES[loss](logits, y), x)
    if not torch.isfinite(grad).all():
        raise NonFiniteError(f"{function}: the gradient with respect to the input is not finite")
    return logits.detach(), grad
