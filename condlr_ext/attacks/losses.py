"""Per-sample losses that attacks ascend: larger means closer to, or deeper into, a wrong class."""

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Return -log softmax(z)_y per sample; logits [N, C], y [N] -> [N]."""
    return F.cross_entropy(logits, y, reduction="none")


def log_odds(logits: Tensor, y: Tensor) -> Tensor:
    """Return log((1 - p_y) / p_y) = log sum_{i != y} exp(z_i) - z_y, p = softmax(z), in float64.

    Cross-entropy is softplus(log-odds): both ascend in the same direction, but however large the gap between the
    logits, the gradient of the log-odds is neither 0 nor rounding noise. logits [N, C >= 2], y [N] -> [N].
    """
    z = logits.double()
    z_true = z.gather(1, y[:, None])
    return z.scatter(1, y[:, None], -torch.inf).logsumexp(1) - z_true[:, 0]


def rescaled_cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Return the cross-entropy of each sample's logits divided by max(z) - mean(z), a constant in backward.

    Like "dlr", it does not depend on the scale of the logits. logits [N, C], y [N] -> [N].
    """
    scale = (logits.amax(1, keepdim=True) - logits.mean(1, keepdim=True)).detach()
    return cross_entropy(logits / torch.where(scale > 0, scale, 1), y)


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Return the difference of logits ratio -(z_y - max_{i != y} z_i) / (z_(1) - z_(3)), z_(k) the k-th largest logit.

    Invariant to shift and scale of the logits, so a saturated softmax does not hide its gradient.
    logits [N, C >= 3], y [N] -> [N], positive only for misclassified samples.

    Source: Croce and Hein, "Reliable evaluation of adversarial robustness" (arXiv 2003.01690), eq. 6.
    """
    z = _at_least_float32(logits)
    top = z.topk(3, dim=1).values
    z_true = z.gather(1, y[:, None])[:, 0]
    z_rival = torch.where(z.argmax(1) == y, top[:, 1], top[:, 0])
    return (z_rival - z_true) / _positive(top[:, 0] - top[:, 2])


def targeted_dlr(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Return -(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2) for target classes t [N]; logits [N, C >= 4], y [N] -> [N].

    Source: Croce and Hein (arXiv 2003.01690), eq. 7.
    """
    z = _at_least_float32(logits)
    top = z.topk(4, dim=1).values
    z_true, z_target = (z.gather(1, classes[:, None])[:, 0] for classes in (y, target))
    return (z_target - z_true) / _positive(top[:, 0] - (top[:, 2] + top[:, 3]) / 2)


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _positive(gap: Tensor) -> Tensor:
    """Replace a gap of 0 by 1, so that equal logits have a gradient that half precision can hold."""
    return torch.where(gap > 0, gap, 1)


LOSSES = {"ce": cross_entropy, "log-odds": log_odds, "ce-rescaled": rescaled_cross_entropy, "dlr": dlr}
CLASSES_NEEDED = {"log-odds": 2, "dlr": 3, "dlr-targeted": 4}


def check_classes(caller: str, logits: Tensor, loss: str) -> None:
    """Raise ValueError if logits [N, C] have fewer classes than the loss needs."""
    needed = CLASSES_NEEDED.get(loss, 1)
    if logits.shape[1] < needed:
        raise ValueError(
            f'{caller}: loss="{loss}" needs at least {needed} classes, got {logits.shape[1]}; use loss="ce"'
        )
