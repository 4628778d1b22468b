"""FAB, the fast adaptive boundary attack (Croce and Hein, arXiv 1907.02044), which needs no budget."""

import torch
from torch import Tensor, nn

from .._checks import check_batch, check_choice, check_count, check_logits
from .._modules import frozen
from ..errors import NonFiniteError
from .balls import BALLS, unsqueeze_like
from .search import input_gradient, rivals, select_samples

OVERSHOOT = 1.05  # eta of the paper: how far beyond the linearized boundary
MOST_BIAS = 0.1  # alpha_max: the largest weight of the step from the clean input
BACKWARD = 0.9  # beta: where on the way from the clean input to an adversarial one the search goes on
BISECTIONS = 5  # of the way from the clean input to the nearest adversarial one, at the end


def fab(
    model: nn.Module, x: Tensor, y: Tensor, *, norm: str = "linf", steps: int = 100, targets: int = 9
) -> tuple[Tensor, Tensor]:
    """Search each sample's nearest misclassified input by FAB-T, without random starts.

    For each target class, the point and the clean input are projected onto the linearized boundary between label and
    target within the box; the next point lies between both projections, biased towards the one that is nearer to the
    clean input. From every misclassified point the search goes on a tenth of the way back.

    Args:
        model: Classifier returning logits [B, C], C >= 2; attacked in eval mode, its state is restored.
        x: Inputs in [0, 1], [B, ...], floating point.
        y: Labels [B], integer.
        norm: "linf" or "l2", the norm that is made small.
        steps: Steps >= 1 for each target.
        targets: >= 1: how many classes, those of highest clean logit first.

    Returns:
        Misclassified inputs like x, and the norm of their perturbations [B]: 0 where x itself is misclassified, Inf,
        with x unchanged, where none was found.

    Raises:
        ValueError: An argument out of range, or a model whose output carries no gradient to its input.
        TypeError: An argument of the wrong type.
        ShapeError: Shapes of the arguments or of the logits.
        NonFiniteError: NaN or Inf in the logits or the input gradient.

    Source: Croce and Hein (arXiv 1907.02044), algorithm 1, with targets as in arXiv 2003.01690.
    """
    y = check_batch("fab", x, y)
    check_choice("fab", "norm", norm, BALLS)
    for name, count in (("steps", steps), ("targets", targets)):
        check_count("fab", name, count)
    best, distance = x.detach().clone(), x.new_full((len(x),), torch.inf)
    if x.numel() == 0:
        return best, distance
    with frozen(model):
        clean = x.detach()
        with torch.no_grad():
            logits = model(clean)
            check_logits("fab", logits, y)
        distance[logits.argmax(1) != y] = 0
        rows = distance.nonzero()[:, 0]
        for target in rivals(logits, y)[:, :targets].unbind(1):
            _approach(model, clean[rows], y[rows], target[rows], norm, steps, rows, best, distance)
        _bisect(model, clean, y, norm, best, distance)
    return best, distance


def _approach(model, clean, y, target, norm, steps, rows, best, distance) -> None:
    """Run algorithm 1 for one target class of each sample; keep what is nearer in best and distance."""
    point = clean
    for _ in range(steps):
        point = point.detach().requires_grad_()
        logits = model(point)
        gap = (logits.gather(1, target[:, None]) - logits.gather(1, y[:, None]))[:, 0]
        slope = input_gradient("fab", gap, point)
        if not torch.isfinite(slope).all():
            raise NonFiniteError("fab: the gradient with respect to the input is not finite")
        gap, point = gap.detach().to(point), point.detach()
        missing = -gap + (slope * point).flatten(1).sum(1)  # what <slope, z> is on the boundary
        near = _to_hyperplane(point, slope, missing, norm)
        far = _to_hyperplane(clean, slope, missing, norm)
        size, bias = BALLS[norm].norm(near), BALLS[norm].norm(far)
        total = size + bias
        bias = unsqueeze_like((size / torch.where(total > 0, total, 1)).clamp_max(MOST_BIAS), clean)
        point = ((1 - bias) * (point + OVERSHOOT * near) + bias * (clean + OVERSHOOT * far)).clamp(0, 1)
        with torch.no_grad():
            wrong = model(point).argmax(1) != y
        _keep_nearer(point, clean, wrong, norm, rows, best, distance)
        point = select_samples(wrong, clean + BACKWARD * (point - clean), point)


def _to_hyperplane(point: Tensor, slope: Tensor, value: Tensor, norm: str) -> Tensor:
    """Return the smallest step d with <slope, point + d> = value and point + d in [0, 1].

    Where the box does not reach the plane, the step goes as far as the box lets it. With the sign s of what is missing,
    entry i moves by min(t a_i, room_i), a_i = 1 (linf) or |slope_i| (l2); t is found among the sorted room_i / a_i.
    """
    flat, w = point.flatten(1), slope.flatten(1)
    missing = value - (w * flat).sum(1)
    w = w * missing.sign()[:, None]
    weight = w.abs()
    room = torch.where(w > 0, 1 - flat, flat)
    rate = torch.ones_like(weight) if norm == "linf" else weight
    limit = torch.where(weight > 0, room / torch.where(rate > 0, rate, 1), torch.inf)
    limit, order = limit.sort(1)
    gain = (weight * rate).gather(1, order)  # of <slope, d> per unit of t, while entry i still moves
    finite = torch.where(limit < torch.inf, limit, 0)
    moving = gain.sum(1, keepdim=True) - gain.cumsum(1) + gain  # those not yet at their limit
    before = (gain * finite).cumsum(1) - gain * finite  # those that are
    reached = before + moving * finite
    first = torch.searchsorted(reached, missing.abs()[:, None]).clamp_max(reached.shape[1] - 1)
    left, slope_left = missing.abs()[:, None] - before.gather(1, first), moving.gather(1, first)
    t = torch.where(slope_left > 0, left / torch.where(slope_left > 0, slope_left, 1), torch.finfo(w.dtype).max)
    return (w.sign() * torch.minimum(t * rate, room)).view_as(point)


def _keep_nearer(point, clean, wrong, norm, rows, best, distance) -> None:
    reached = BALLS[norm].norm(point - clean)
    nearer = wrong & (reached < distance[rows])
    best[rows[nearer]], distance[rows[nearer]] = point[nearer], reached[nearer]


@torch.no_grad()
def _bisect(model, clean, y, norm, best, distance) -> None:
    """Shorten the perturbations that were found along the way from the clean inputs."""
    rows = ((distance > 0) & (distance < torch.inf)).nonzero()[:, 0]
    if not len(rows):
        return
    start, end = clean[rows], best[rows]
    low, high = torch.zeros_like(distance[rows]), torch.ones_like(distance[rows])
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        point = start + unsqueeze_like(middle, start) * (end - start)
        wrong = model(point).argmax(1) != y[rows]
        _keep_nearer(point, start, wrong, norm, rows, best, distance)
        low, high = torch.where(wrong, low, middle), torch.where(wrong, middle, high)
