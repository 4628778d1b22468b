"""APGD: gradient ascent with momentum that sets its own step size (Croce and Hein, arXiv 2003.01690)."""

from functools import partial

import torch
from torch import Tensor, nn

from .balls import BALLS
from .checks import check_batch, check_choice, check_count, check_eps, frozen
from .gradient import spread
from .losses import LOSSES, targeted_dlr
from .search import Search, laid_out, untouched, where

MOMENTUM = 0.75  # alpha of the paper: weight of the new step against the last one
RISES_NEEDED = 0.75  # rho: share of the steps between two checkpoints that must raise the loss
TARGETED = "dlr-targeted"
APGD_LOSSES = (*LOSSES, TARGETED)


def apgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps,
    *,
    norm: str = "linf",
    loss: str = "ce",
    steps: int = 100,
    restarts: int = 1,
    targets: int = 9,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Auto-PGD: ascent with momentum from a step of 2 eps, halved at fixed checkpoints where it stops helping.

    z = P(x_k + eta d(grad)), x_{k+1} = P(x_k + 0.75 (z - x_k) + 0.25 (x_k - x_{k-1})), P the projection onto the ball
    and then the box. At each checkpoint the samples that rose in fewer than 75 % of the steps since the last one, or
    whose best loss and step size have not changed since, halve eta and return to their best point. Of all points
    visited, the clean input included, each sample keeps a misclassified one if there is any, and among those (else
    among all) the one of highest loss; once it has one, further restarts and targets leave it out. All budgets go
    through the model in one batch.

    Args:
        model: classifier returning logits [B, C]; attacked in eval mode, its state is restored.
        x (Tensor): inputs in [0, 1], [B, ...], floating point.
        y (Tensor): labels [B], integer.
        eps (float or 1-D sequence): radii >= 0 of the ball, in the units of x.
        norm: "linf" or "l2".
        loss: "ce" (APGD-CE), "dlr" (APGD-DLR, needs 3 classes), "dlr-targeted" (APGD-T, needs 4), "log-odds" or
            "ce-rescaled".
        steps, restarts: counts >= 1; every restart begins at a random point of the ball, as in pgd.
        targets: of "dlr-targeted": how many classes, those of highest clean logit first, each with its own restarts.
        generator: source of the random starts, on the device of x; default torch's global one.

    Returns:
        Tensor: adversarial inputs like x, [E, B, ...] for E budgets.

    Raises:
        ValueError, TypeError: bad argument; ShapeError, NonFiniteError: the model's output or input gradient.

    Source: Croce and Hein (arXiv 2003.01690), algorithm 1, section 3 and, for the targeted loss, eq. 7.
    """
    check_batch("apgd", x, y)
    budgets = check_eps("apgd", eps, x)
    check_choice("apgd", "norm", norm, BALLS)
    check_choice("apgd", "loss", loss, APGD_LOSSES)
    for name, count in (("steps", steps), ("restarts", restarts), ("targets", targets)):
        check_count("apgd", name, count)
    if x.numel() == 0:
        return untouched(x, budgets)

    ball = BALLS[norm]
    with frozen(model):
        center, labels, radius = laid_out(x, y, budgets)
        search = Search("apgd", model, labels, LOSSES.get(loss, LOSSES["dlr"]), loss, center, center)
        targeted = _targets(search, targets) if loss == TARGETED else [None]
        for ascent, target in enumerate(target for target in targeted for _ in range(restarts)):
            start = (center + radius * spread(ball.noise(x, generator), center)).clamp(0, 1)
            if ascent and not len(search.narrow()):
                break
            rows = search.rows
            if target is not None:
                search.objective = partial(targeted_dlr, target=target[rows])
            _climb(search, ball, center[rows], radius[rows], start[rows], steps)
        (best,) = search.strongest()
    return best.view(*budgets.shape, *x.shape)


def checkpoints(steps: int) -> list[int]:
    """Steps w_j = ceil(p_j steps) with p = 0.22, then p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06), below 1."""
    previous, current, found = 0, 22, []  # in hundredths, so that ceil is exact
    while current < 100:
        found.append(-(-current * steps // 100))
        previous, current = current, current + max(current - previous - 3, 6)
    return found


def _targets(search: Search, targets: int) -> tuple[Tensor, ...]:
    """Target classes [N] of each ascent, those of highest clean logit first."""
    order = search.start_logits.argsort(1, descending=True)
    others = order[order != search.labels[:, None]].view(len(order), -1)
    return others[:, :targets].unbind(1)


def _climb(search: Search, ball, center: Tensor, radius: Tensor, start: Tensor, steps: int) -> None:
    """One run of algorithm 1 for every sample of search.rows at once."""

    def feasible(point: Tensor) -> Tensor:
        return (center + ball.project(point - center, radius)).clamp(0, 1)

    stride = 2 * radius
    point = previous = best = start
    value, grad = search.visit(start, start)
    best_value, best_grad = value, grad
    rises = torch.zeros_like(value)
    halved, value_then, last = torch.zeros_like(value, dtype=torch.bool), value, 0
    ends = set(checkpoints(steps))
    for k in range(1, steps + 1):
        target = feasible(point + stride * ball.direction(grad))
        if k > 1:
            target = feasible(point + MOMENTUM * (target - point) + (1 - MOMENTUM) * (point - previous))
        previous, point, before = point, target, value
        value, grad = search.visit(point, point)
        rises += value > before
        better = value > best_value
        best, best_grad = where(better, point, best), where(better, grad, best_grad)
        best_value = torch.maximum(value, best_value)
        if k in ends:
            stuck = ~halved & (best_value == value_then)
            halved = (rises < RISES_NEEDED * (k - last)) | stuck
            stride = where(halved, stride / 2, stride)
            point, grad = where(halved, best, point), where(halved, best_grad, grad)
            value = torch.where(halved, best_value, value)
            rises, value_then, last = torch.zeros_like(rises), best_value, k
