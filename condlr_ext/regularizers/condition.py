"""Penalties on unequal singular values: the log-volume, which bounds kappa, and that of RobustDLRT."""

import math
import numbers

import torch
from torch import Tensor

from .. import linalg, reference
from ..errors import ShapeError
from .matrices import Matrices, sum_penalty


def log_volume(matrices: Matrices, floor: float = 1e-3) -> Tensor:
    """Return Σ log K, K = mean(σ²)^r / Π σ² = (tr A / r)^r / det A, A = S Sᵀ: 0 iff all σ are equal.

    Invariant under scaling and smooth, also at repeated singular values; kappa <= √K + √(K−1) (see kappa_bound).

    Args:
        matrices: A module (all its nn.Linear, nn.Conv and low-rank layers, see layer_matrices), one tensor [*, m, n],
            or a mapping or list of such; r = min(m, n).
        floor: In [0, 1); its square is added to each σ² / mean(σ²), so that singular matrices have a finite value and
            gradient. The further σ is below floor times the rms, the less it is pulled up; exact zeros not at all.

    Returns:
        A scalar. A zero matrix counts as one with every σ at the floor, with gradient 0.

    Raises:
        TypeError: A matrix is no real floating-point tensor.
        ShapeError: A matrix is empty or not [*, m, n].
        ValueError: No matrices, or floor out of range.
        NonFiniteError: NaN or Inf in a matrix, or a singular one and floor = 0, by name.

    Notes:
        One batched SVD per shape, differentiated through σ alone. A second derivative needs distinct σ.

    Source: the arithmetic and the geometric mean of the eigenvalues of A; see kappa_bound.
    """
    check_floor("regularizers.log_volume", floor)
    return sum_penalty("regularizers.log_volume", matrices, lambda A: log_volumes(A, floor))


def kappa_bound(A: Tensor) -> Tensor:
    """Return the upper bound √K + √(K−1) on the condition number, K = mean(σ²)^r / Π σ², without computing σ.

    Exact for r = 2.

    Args:
        A: [*, m, n], floating point.

    Returns:
        [*], float64; Inf for a singular matrix. Not differentiable; log_volume is.

    Raises:
        ShapeError: A is no matrix, or has no rows or columns.
        NonFiniteError: NaN or Inf in A.

    Source: Merikoski, Urpala, Virtanen, Tam, Uhlig, A best upper bound for the 2-norm condition number of a matrix,
        Linear Algebra and its Applications 254 (1997).
    """
    if A.dim() < 2 or 0 in A.shape[-2:]:
        raise ShapeError(f"regularizers.kappa_bound: A must be [*, m, n] with rows and columns, got {list(A.shape)}")
    A = A.detach().double()
    A = A / reference.magnitude(A)
    R = linalg.qr(A.mT if A.shape[-2] < A.shape[-1] else A).R
    r = R.shape[-1]
    log_K = r * (R.square().sum((-2, -1)) / r).log() - 2 * R.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    log_K = torch.where(R.any(-1).any(-1), log_K, torch.inf).clamp_min(0)
    return (log_K / 2).exp() * (1 + torch.sqrt(-torch.expm1(-log_K)))


def robust_dlrt(matrices: Matrices) -> Tensor:
    """Return RobustDLRT's penalty Σ ‖SᵀS − a² I‖_F, a² = ‖S‖²_F / r: √r standard deviations of the σ².

    kappa <= exp(penalty / (√2 σ_r²)). Of degree 2 in the scale of S. It is a norm, not its square: near 0 the gradient
    keeps the size 2‖S‖, and the optimizer's step decides how near 0 the penalty gets.

    Args:
        matrices: As in log_volume; the smaller of the two Gram matrices is taken.

    Returns:
        A scalar. Value and gradient are 0 if the residual is within the rounding of SᵀS, its direction being noise.

    Raises:
        TypeError: A matrix is no real floating-point tensor.
        ShapeError: A matrix is empty or not [*, m, n].
        ValueError: No matrices.
        NonFiniteError: NaN, Inf or overflow, by name.

    Source: Schotthöfer, Yang, Schnake (arXiv 2505.08022), section 3.
    """

    def penalty(A: Tensor) -> Tensor:
        eps, dtype = torch.finfo(A.dtype).eps, A.dtype
        A = A.double()  # where squares leave the range of float32, the gradient, which has the size of A, does not
        gram = A.mT @ A
        energy = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
        r = A.shape[-1]
        eye = torch.eye(r, dtype=A.dtype, device=A.device)
        residual = gram - (energy / r)[..., None, None] * eye
        noise = torch.linalg.matrix_norm(residual.detach()) <= 2 * eps * energy.detach()
        return torch.linalg.vector_norm(torch.where(noise[..., None, None], 0, residual), dim=(-2, -1)).to(dtype)

    return sum_penalty("regularizers.robust_dlrt", matrices, penalty)


def check_floor(caller: str, floor) -> None:
    if not isinstance(floor, numbers.Real) or not 0 <= floor < 1:
        raise ValueError(f"{caller}: floor must be a number in [0, 1), got {floor!r}")


def log_volumes(A: Tensor, floor: float) -> Tensor:
    """Return log K [*] of A [*, m, n], m >= n."""
    sigma = linalg.svd(A / reference.magnitude(A)).sigma  # K does not change, squares stay in range
    share = sigma.square()
    mean = share.mean(-1, keepdim=True)
    share = share / torch.where(mean > 0, mean, 1)
    return sigma.shape[-1] * math.log1p(floor**2) - (share + floor**2).log().sum(-1)
