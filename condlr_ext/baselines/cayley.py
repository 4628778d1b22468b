"""CayleySGD: Cayley SGD with momentum of Li, Li and Todorovic."""

import torch
from torch import Tensor

from .. import reference
from .stiefel import StiefelSGD


class CayleySGD(StiefelSGD):
    """SGD with momentum on the Stiefel manifold, moving along Cayley transforms.

    For X [n, p], XᵀX = I, and its momentum B: M = momentum B + grad; A = M Xᵀ - X (XᵀM Xᵀ) / 2, W = A - Aᵀ (skew);
    B <- W X, which is M projected onto the tangent space; with a = min(lr, 1 / ‖W‖_F),

        X <- (I + a W / 2)⁻¹ (I - a W / 2) X.

    This is the step of U and V of every low-rank layer; cores, biases and dense weights follow torch.optim.SGD. The
    paper and the tables of CondLR compare full networks whose dense weights are orthonormal themselves (compression
    0 %): name these in `weights`. With tau the cores are bounded as by CondLRSGD (band "rms"), so that only the
    geometry of the step differs.

    Differences from the paper: the transform is exact, by a solve with a 2p x 2p matrix, instead of two steps of the
    fixed-point iteration that converges to it, and the cap of the step (q = 1/2) uses the Frobenius norm. Differences
    from the code released with CondLR: there the momentum of constrained matrices stays zero, the start is not
    orthonormal, the r x r cores are constrained too, and tall matrices follow plain SGD.

    Args:
        model: A module, or parameter groups from optim.param_groups.
        lr: Step size.
        momentum: As in torch.optim.SGD.
        weight_decay: As in torch.optim.SGD; has no effect on orthonormal matrices.
        tau: Slack >= 0 of the cores' condition number; Inf leaves the cores free.
        weights: Names of modules whose weight, flattened to [m, n], is kept with orthonormal columns (rows if wide).

    Raises:
        ValueError: Options out of range, nothing to constrain, an unknown name, factors neither float32 nor float64.
        NonFiniteError: NaN or Inf in a factor.

    Source: Li, Li and Todorovic, Efficient Riemannian optimization on the Stiefel manifold via the Cayley transform,
        ICLR 2020 (arXiv 2002.01113), algorithm 1; the solve: Wen and Yin, Math. Program. 142 (2013), lemma 4.
    """

    @staticmethod
    def retract(X: Tensor, xi: Tensor) -> Tensor:
        """Return (I - W / 2)⁻¹ (I + W / 2) X for the skew W with W X = xi, scaled to ‖W‖_F <= 1."""
        scale = reference.magnitude(xi)
        xi = xi / scale  # and so is W
        A = torch.cat([xi - X @ (X.mT @ xi) / 2, X], 1)  # W = A Bᵀ
        B = torch.cat([X, X @ (X.mT @ xi) / 2 - xi], 1)
        BtA, BtX = B.mT @ A, B.mT @ X
        norm = ((A.mT @ A) * (B.mT @ B)).sum().clamp_min(0).sqrt()
        step = 1 / norm.maximum(1 / scale)
        identity = torch.eye(BtA.shape[0], dtype=X.dtype, device=X.device)
        Y = X + step * A @ torch.linalg.solve(identity - step / 2 * BtA, BtX)
        # a Newton step to orthonormality, without which rounding adds up over the steps
        return Y + Y @ (identity[: X.shape[1], : X.shape[1]] - Y.mT @ Y) / 2
