"""APGD: gradient ascent with momentum that sets its own step size (Croce and Hein, arXiv 2003.01690)."""

from functools import partial

import torch
from torch import Tensor, nn

from .._checks import check_batch, check_choice, check_count, check_eps
from .._modules import frozen
from .._types import Budgets
from .balls import BALLS, Ball
from .losses import LOSSES, targeted_dlr
from .search import Search, repeat_for_budgets, rivals, sample_start, select_samples, unperturbed

MOMENTUM = 0.75  # alpha of the paper: weight of the new step against the last one
RISES_NEEDED = 0.75  # rho: share of the steps between two checkpoints that must raise the loss
TARGETED = "dlr-targeted"
APGD_LOSSES = (*LOSSES, TARGETED)


def apgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: Budgets,
    *,
    norm: str = "linf",
    loss: str = "ce",
    steps: int = 100,
    restarts: int = 1,
    targets: int = 9,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Attack by APGD: ascent with momentum from a step of 2 eps, halved at fixed checkpoints where it stops helping.

    z = P(x_k + eta d(grad)), x_{k+1} = P(x_k + 0.75 (z - x_k) + 0.25 (x_k - x_{k-1})), P the projection onto the ball
    and then the box. At each checkpoint the samples that rose in fewer than 75 % of the steps since the last one, or
    whose best loss and step size have not changed since, halve eta and return to their best point. Of all points
    visited, the clean input included, each sample keeps a misclassified one if there is any, and among those (else
    among all) the one of highest loss; once it has one, further restarts and targets leave it out. All budgets go
    through the model in one batch.

    Args:
        model: Classifier returning logits [B, C]; attacked in eval mode, its state is restored.
        x: Inputs in [0, 1], [B, ...], floating point.
        y: Labels [B], integer.
        eps: Radius >= 0 of the ball in the units of x, or a 1-D sequence of E radii.
        norm: "linf" or "l2".
        loss: "ce" (APGD-CE), "dlr" (APGD-DLR, needs 3 classes), "dlr-targeted" (APGD-T, needs 4), "log-odds" or
            "ce-rescaled".
        steps: Steps >= 1 of each restart.
        restarts: >= 1; each begins at a random point of the ball, as in pgd.
        targets: >= 1, for "dlr-targeted": how many classes, those of highest clean logit first, each with its own
            restarts.
        generator: Source of the random starts, on the device of x; default torch's global one.

    Returns:
        Adversarial inputs like x; [E, B, ...] for E budgets.

    Raises:
        ValueError: An argument out of range, or a model whose output carries no gradient to its input.
        TypeError: An argument of the wrong type.
        ShapeError: Shapes of the arguments or of the logits.
        NonFiniteError: NaN or Inf in the logits or the input gradient.

    Source: Croce and Hein (arXiv 2003.01690), algorithm 1, section 3 and, for the targeted loss, eq. 7.
    """
    y = check_batch("apgd", x, y)
    budgets = check_eps("apgd", eps, x, norm)
    check_choice("apgd", "norm", norm, BALLS)
    check_choice("apgd", "loss", loss, APGD_LOSSES)
    for name, count in (("steps", steps), ("restarts", restarts), ("targets", targets)):
        check_count("apgd", name, count)
    if x.numel() == 0:
        return unperturbed(x, budgets)

    with frozen(model):
        center, labels, radius = repeat_for_budgets(x, y, budgets)
        search = start_search("apgd", model, center, labels, loss)
        draw = partial(sample_start, BALLS[norm], x, center, radius, generator)
        ascend_from(search, norm, center, radius, draw, steps, restarts, targets if loss == TARGETED else 0)
        (best,) = search.strongest()
    return best.view(*budgets.shape, *x.shape)


def start_search(caller: str, model: nn.Module, center: Tensor, labels: Tensor, loss: str) -> Search:
    return Search(caller, model, labels, LOSSES.get(loss, LOSSES["dlr"]), loss, center, center)


def ascend_from(
    search: Search, norm: str, center: Tensor, radius: Tensor, draw, steps: int, restarts: int, targets: int,
    hasty: bool = False,
) -> None:  # fmt: skip
    """Run algorithm 1 from each restart, for each target class, on the samples that have not fallen before.

    Args:
        search: Over center.
        center: [N, ...].
        radius: [N, 1, ...].
        draw: Function without arguments returning random starts [N, ...].
        targets: How many target classes; 0: the loss of the search, without a target.
        hasty: Whether samples leave at checkpoints too once they have fallen, and not only between ascents.
    """
    classes = rivals(search.clean_logits, search.labels)[:, :targets].unbind(1) if targets else [None]
    for ascent, target in enumerate(target for target in classes for _ in range(restarts)):
        start = draw()
        if (ascent or hasty) and not len(search.drop_misclassified()):
            break
        _ascend(search, BALLS[norm], center, radius, start, steps, target, hasty)


def _ascend(search: Search, ball: Ball, center, radius, start, steps: int, target: Tensor | None, hasty: bool) -> None:
    """Run algorithm 1 once, for all samples of search.rows in one batch."""
    center, radius, start = center[search.rows], radius[search.rows], start[search.rows]
    if target is not None:
        search.objective, search.extra = targeted_dlr, (target,)
    stride = 2 * radius
    point = previous = best = start
    loss, grad = search.loss_and_gradient(start, start)
    best_loss, best_grad = loss, grad
    rises = torch.zeros_like(loss)
    halved, checkpoint_loss, checkpoint = torch.zeros_like(loss, dtype=torch.bool), loss, 0
    schedule = set(checkpoints(steps))
    for k in range(1, steps + 1):
        move = ball.move(point + stride * ball.direction(grad), center, radius)
        if k > 1:
            mixed = point + MOMENTUM * (move - point) + (1 - MOMENTUM) * (point - previous)
            move = ball.move(mixed, center, radius)
        previous, point, previous_loss = point, move, loss
        loss, grad = search.loss_and_gradient(point, point)
        rises += loss > previous_loss
        better = loss > best_loss
        best, best_grad = select_samples(better, point, best), select_samples(better, grad, best_grad)
        best_loss = torch.maximum(loss, best_loss)
        if k in schedule:
            stuck = ~halved & (best_loss == checkpoint_loss)
            halved = (rises < RISES_NEEDED * (k - checkpoint)) | stuck
            stride = select_samples(halved, stride / 2, stride)
            point, grad = select_samples(halved, best, point), select_samples(halved, best_grad, grad)
            loss = torch.where(halved, best_loss, loss)
            rises, checkpoint_loss, checkpoint = torch.zeros_like(rises), best_loss, k
            if hasty and (fallen := search.wrong[search.rows]).any():
                if not len(search.drop_misclassified()):
                    return
                center, radius, stride, point, previous, best, loss, grad, best_loss, best_grad, rises, halved = (
                    t[~fallen] for t in (
                        center, radius, stride, point, previous, best, loss, grad, best_loss, best_grad, rises, halved,
                    )
                )  # fmt: skip
                checkpoint_loss = best_loss


def checkpoints(steps: int) -> list[int]:
    """Return the steps w_j = ceil(p_j steps), j >= 1, for all p_j < 1.

    p_0 = 0, p_1 = 0.22, p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06).
    """
    previous, current, found = 0, 22, []  # in hundredths, so that ceil is exact
    while current < 100:
        found.append(-(-current * steps // 100))
        previous, current = current, current + max(current - previous - 3, 6)
    return found
