"""Per-sample losses that attacks ascend: larger means closer to, or deeper into, a wrong class."""

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """-log softmax(z)_y per sample; logits [N, C], y [N] -> [N]."""
    return F.cross_entropy(logits, y, reduction="none")


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio -(z_y - max_{i != y} z_i) / (z_(1) - z_(3)), z_(k) the k-th largest logit.

    Invariant to shift and scale of the logits, so a saturated softmax does not hide its gradient.
    logits [N, C >= 3], y [N] -> [N], positive only where the sample is misclassified.

    Source: Croce and Hein, "Reliable evaluation of adversarial robustness" (arXiv 2003.01690), eq. 6.
    """
    if logits.shape[-1] < 3:
        raise ValueError(f'pgd: loss="dlr" needs at least 3 classes, got {logits.shape[-1]}; use loss="ce"')
    top = logits.topk(3, dim=1).values
    own = logits.gather(1, y[:, None])[:, 0]
    rival = torch.where(logits.argmax(1) == y, top[:, 1], top[:, 0])
    return (rival - own) / (top[:, 0] - top[:, 2] + 1e-12)  # 1e-12: three equal logits


LOSSES = {"ce": cross_entropy, "dlr": dlr}
