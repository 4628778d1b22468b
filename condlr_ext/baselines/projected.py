"""ProjectedSGD: projected SGD with momentum on the Stiefel manifold."""

import torch
from torch import Tensor

from .stiefel import StiefelSGD


class ProjectedSGD(StiefelSGD):
    """SGD with momentum on the Stiefel manifold: tangent projection, then the QR retraction.

    For X [n, p], XᵀX = I, and its momentum B: M = momentum B + grad; B <- D = M - X (XᵀM + MᵀX) / 2; X <- qf(X - lr D),
    qf the QR factor with a positive diagonal of R. The momentum is transported by the projection of the next step.

    This is the step of U and V of every low-rank layer; cores, biases and dense weights follow torch.optim.SGD. The
    tables of CondLR compare full networks whose dense weights are orthonormal themselves (compression 0 %): name these
    in `weights`. With tau the cores are bounded as by CondLRSGD (band "rms"); CondLRSGD also preconditions the
    gradients of U and V by (S Sᵀ)⁻¹ and (Sᵀ S)⁻¹ and has no component U Ω, Ω skew.

    It shares all but the retraction with CayleySGD, including the differences from the code released with CondLR.

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

    Source: Absil, Mahony and Sepulchre, Optimization algorithms on matrix manifolds (2008), examples 3.6.2 and 4.1.3.
    """

    @staticmethod
    def retract(X: Tensor, xi: Tensor) -> Tensor:
        """Return qf(X + xi); X + xi has full rank, because its Gram matrix is I + xiᵀ xi."""
        Q, R = torch.linalg.qr(X + xi)
        return Q * torch.where(R.diagonal() < 0, -1.0, 1.0).to(Q.dtype)
