"""Per-sample losses that attacks ascend: larger means closer to, or deeper into, a wrong class."""

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """-log softmax(z)_y per sample; logits [N, C], y [N] -> [N]."""
    return F.cross_entropy(logits, y, reduction="none")


def log_odds(logits: Tensor, y: Tensor) -> Tensor:
    """log((1 - p_y) / p_y) = log sum_{i != y} exp(z_i) - z_y with p = softmax(z), in float64.

    Cross-entropy is softplus(log-odds): both ascend in the same direction, but this one has no gap of the logits at
    which its gradient is rounding noise or 0. logits [N, C >= 2], y [N] -> [N].
    """
    z = logits.double()
    own = z.gather(1, y[:, None])
    return z.scatter(1, y[:, None], -torch.inf).logsumexp(1) - own[:, 0]


def rescaled_cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of each sample's logits divided by their largest minus their mean, a constant in backward.

    Like "dlr" blind to the scale of the logits. logits [N, C], y [N] -> [N].
    """
    scale = (logits.amax(1, keepdim=True) - logits.mean(1, keepdim=True)).detach()
    return cross_entropy(logits / torch.where(scale > 0, scale, 1), y)


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio -(z_y - max_{i != y} z_i) / (z_(1) - z_(3)), z_(k) the k-th largest logit.

    Invariant to shift and scale of the logits, so a saturated softmax does not hide its gradient.
    logits [N, C >= 3], y [N] -> [N], positive only where the sample is misclassified.

    Source: Croce and Hein, "Reliable evaluation of adversarial robustness" (arXiv 2003.01690), eq. 6.
    """
    logits = _wide(logits)
    top = logits.topk(3, dim=1).values
    own = logits.gather(1, y[:, None])[:, 0]
    rival = torch.where(logits.argmax(1) == y, top[:, 1], top[:, 0])
    return (rival - own) / _or_one(top[:, 0] - top[:, 2])


def targeted_dlr(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """-(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2) for target classes t [N]; logits [N, C >= 4], y [N] -> [N].

    Source: Croce and Hein (arXiv 2003.01690), eq. 7.
    """
    logits = _wide(logits)
    top = logits.topk(4, dim=1).values
    own, aim = (logits.gather(1, labels[:, None])[:, 0] for labels in (y, target))
    return (aim - own) / _or_one(top[:, 0] - (top[:, 2] + top[:, 3]) / 2)


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _or_one(gap: Tensor) -> Tensor:
    """Of equal logits 1, so that there is a gradient that half precision can hold."""
    return torch.where(gap > 0, gap, 1)


LOSSES = {"ce": cross_entropy, "log-odds": log_odds, "ce-rescaled": rescaled_cross_entropy, "dlr": dlr}
CLASSES_NEEDED = {"log-odds": 2, "dlr": 3, "dlr-targeted": 4}
