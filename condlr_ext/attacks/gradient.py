"""The fast gradient method (FGSM) and projected gradient ascent (PGD), for one budget or many at once."""

import torch
from torch import Tensor, nn

from .._checks import check_batch, check_choice, check_count, check_eps, check_logits, check_step_size
from .._modules import frozen
from .._types import Budgets
from ..errors import NonFiniteError
from .balls import BALLS
from .losses import LOSSES, check_classes
from .search import Search, input_gradient, repeat_for_budgets, sample_start, unperturbed


def fgsm(model: nn.Module, x: Tensor, y: Tensor, eps: Budgets, *, norm: str = "linf", loss: str = "ce") -> Tensor:
    """Attack by the fast gradient (sign) method: clip(x + eps direction(grad_x loss), 0, 1).

    Args:
        model: Classifier returning logits [B, C]; attacked in eval mode, its state is restored.
        x: Inputs in [0, 1], [B, ...], floating point.
        y: Labels [B], integer.
        eps: Budget >= 0 in the units of x, or a 1-D sequence of E budgets.
        norm: "linf" (direction: the sign) or "l2" (direction: the normalized gradient).
        loss: "ce"; "log-odds", the direction of "ce" without rounding at saturated logits; "ce-rescaled"; "dlr".

    Returns:
        Adversarial inputs like x; [E, B, ...] for E budgets. A sample whose gradient is 0 does not move.

    Raises:
        ValueError: An argument out of range, or a model whose output carries no gradient to its input.
        TypeError: An argument of the wrong type.
        ShapeError: Shapes of the arguments or of the logits.
        NonFiniteError: NaN or Inf in the logits or the input gradient.

    Source: Goodfellow, Shlens, Szegedy (arXiv 1412.6572), section 4.
    """
    y = check_batch("fgsm", x, y)
    budgets = check_eps("fgsm", eps, x, norm)
    check_choice("fgsm", "norm", norm, BALLS)
    check_choice("fgsm", "loss", loss, LOSSES)
    if x.numel() == 0:
        return unperturbed(x, budgets)
    with frozen(model):
        _, grad = clean_gradient("fgsm", model, x, y, loss)
    return (x.detach() + budgets.view(*budgets.shape, *[1] * x.ndim) * BALLS[norm].direction(grad)).clamp(0, 1)


def clean_gradient(caller: str, model: nn.Module, x: Tensor, y: Tensor, loss: str = "ce") -> tuple[Tensor, Tensor]:
    """Return the logits [B, C] of a frozen model at x and the gradient of each sample's loss, both checked."""
    x, y = x.detach().clone().requires_grad_(), y.clone()
    logits = model(x)
    check_logits(caller, logits, y)
    check_classes(caller, logits, loss)
    grad = input_gradient(caller, LOSSES[loss](logits, y), x)
    if not torch.isfinite(grad).all():
        raise NonFiniteError(f"{caller}: the gradient with respect to the input is not finite")
    return logits.detach(), grad


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: Budgets,
    *,
    norm: str = "linf",
    steps: int = 30,
    step_size: float | None = None,
    restarts: int = 1,
    random_start: bool = True,
    loss: str = "ce",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Attack by projected gradient ascent, x' <- clip(project(x' + step_size direction(grad_x loss)), 0, 1).

    Of all points visited, the clean input included, each sample keeps a misclassified one if there is any,
    and among those (else among all) the one of highest loss. All budgets go through the model in one batch.

    Args:
        model: Classifier returning logits [B, C]; attacked in eval mode, its state is restored.
        x: Inputs in [0, 1], [B, ...], floating point.
        y: Labels [B], integer.
        eps: Radius >= 0 of the ball in the units of x, or a 1-D sequence of E radii.
        norm: "linf" (direction: the sign) or "l2" (direction: the normalized gradient).
        steps: Steps >= 1 of each restart.
        step_size: > 0; default 2.5 eps / steps.
        restarts: >= 1; more than one needs random_start.
        random_start: Start at a random point of the ball, the same in units of eps for every budget: uniform in
            "linf", in "l2" a uniform direction at a uniform distance.
        loss: "ce"; "log-odds", the direction of "ce" without rounding at saturated logits; "ce-rescaled"; "dlr"
            (needs 3 classes).
        generator: Source of the random starts, on the device of x; default torch's global one.

    Returns:
        Adversarial inputs like x; [E, B, ...] for E budgets.

    Raises:
        ValueError: An argument out of range, or a model whose output carries no gradient to its input.
        TypeError: An argument of the wrong type.
        ShapeError: Shapes of the arguments or of the logits.
        NonFiniteError: NaN or Inf in the logits or the input gradient.

    Source: Madry et al. (arXiv 1706.06083), section 2.1; loss "dlr" from Croce and Hein (arXiv 2003.01690).
    """
    y = check_batch("pgd", x, y)
    budgets = check_eps("pgd", eps, x, norm)
    check_count("pgd", "steps", steps)
    check_count("pgd", "restarts", restarts)
    check_choice("pgd", "norm", norm, BALLS)
    check_choice("pgd", "loss", loss, LOSSES)
    if step_size is not None:
        check_step_size("pgd", step_size)
    if restarts > 1 and not random_start:
        raise ValueError(f"pgd: restarts={restarts} needs random_start=True, without it every restart is the same")
    if x.numel() == 0:
        return unperturbed(x, budgets)

    ball = BALLS[norm]
    with frozen(model):
        center, labels, radius = repeat_for_budgets(x, y, budgets)
        stride = 2.5 * radius / steps if step_size is None else step_size
        search = Search("pgd", model, labels, LOSSES[loss], loss, center, center)
        for _ in range(restarts):
            point = sample_start(ball, x, center, radius, generator) if random_start else center
            for _ in range(steps):
                _, grad = search.loss_and_gradient(point, point)
                point = ball.move(point + stride * ball.direction(grad), center, radius)
            search.update(point, point)
        (best,) = search.strongest()
    return best.view(*budgets.shape, *x.shape)
