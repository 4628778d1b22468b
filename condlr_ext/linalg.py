"""Batched linear algebra of small and thin matrices: svd, qr, polar, clip_spectrum, cond.

The last two dimensions are the matrix, leading ones are batch. float32 and float64 are computed as they are, float16
and bfloat16 in float32 and rounded back; autocast has no effect. NaN or Inf in a CPU tensor raises, and so does a
result that exceeds the range of its dtype; on other devices, where a check would wait for the device, and in compiled
code the result for that matrix is NaN, or Inf where it exceeds the range. torch.func.grad, vmap and their compositions
work; forward-mode derivatives (jvp) do not.

Scale does not matter down to where entries of the result fall below the smallest normal number, 1e-38 in float32: those
have fewer digits, or are zero with torch.set_flush_denormal(True), and bounds hold no closer than that.
"""

import math
import numbers
from typing import NamedTuple

import torch
from torch import Tensor

from . import autograd, ops, reference
from .errors import ConvergenceError, NonFiniteError, ShapeError

__all__ = ["clip_spectrum", "cond", "orthonormalize", "polar", "qr", "svd"]


class SVDResult(NamedTuple):
    """A = U diag(sigma) Vᵀ (V, not its transpose)."""

    U: Tensor
    sigma: Tensor
    V: Tensor


class QRResult(NamedTuple):
    """A = Q R."""

    Q: Tensor
    R: Tensor


class PolarResult(NamedTuple):
    """A = Q H."""

    Q: Tensor
    H: Tensor


def svd(A: Tensor) -> SVDResult:
    """Compute the reduced singular value decomposition A = U diag(sigma) Vᵀ.

    U and V are orthonormal even where sigma is zero. Not unique: pairs of columns of U and V may change sign, and
    rotate within the space of a repeated singular value.

    Args:
        A: [*, m, n].

    Returns:
        U [*, m, k], sigma [*, k] descending and non-negative, V [*, n, k], k = min(m, n).

    Raises:
        NonFiniteError: NaN or Inf in A, or a singular value that exceeds the range of its dtype.
        ConvergenceError: The iteration did not converge.
        ArithmeticError: Backward through U or V where two singular values are equal, or one of a matrix that is not
            square is zero to rounding. The gradient through sigma alone is always defined.

    Examples:
        >>> U, sigma, V = condlr_ext.linalg.svd(torch.randn(10, 6, 4))
        >>> U.shape, sigma.shape, V.shape
        (torch.Size([10, 6, 4]), torch.Size([10, 4]), torch.Size([10, 4, 4]))

    Source:
        Eigenvectors of AᵀA and one-sided Jacobi: G. Golub and C. Van Loan, Matrix Computations, sections 8.3 and
        8.6.3. Gradient: J. Townsend, Differentiating the singular value decomposition (2016).
    """
    U, sigma, V = _apply("svd", ops.linalg.svd, autograd.SVDFunction, A)
    _check_range("svd", "sigma", sigma)
    return SVDResult(U, sigma, V)


def qr(A: Tensor) -> QRResult:
    """Compute the reduced QR decomposition A = Q R with diag(R) >= 0, which makes it unique at full rank.

    The gradient needs full rank.

    Args:
        A: [*, m, n]. For m < n, Q is that of the first m columns and R = Qᵀ A.

    Returns:
        Q [*, m, k], k = min(m, n), orthonormal even for rank-deficient A; R [*, k, n] upper triangular (trapezoidal),
            its diagonal positive at full column rank.

    Raises:
        NonFiniteError: NaN or Inf in A, or an entry of R that exceeds the range of its dtype.
        ArithmeticError: Backward where a column depends on those before it to rounding.

    Source:
        Householder reflections. Gradient: J. Roberts and L. Roberts, arXiv 2009.10071, eq. 14.
    """
    Q, R = _apply("qr", ops.linalg.qr, autograd.QRFunction, A)
    _check_range("qr", "R", R)
    return QRResult(Q, R)


def orthonormalize(A: Tensor) -> Tensor:
    """Return qr(A).Q, an orthonormal basis of A's columns: the QR retraction onto Stiefel(m, n).

    Args:
        A: [*, m, n], m >= n.

    Raises:
        NonFiniteError: NaN or Inf in A.
        ArithmeticError: Backward as in qr.
    """
    return _apply("orthonormalize", ops.linalg.qr, autograd.QRFunction, A)[0]


def polar(A: Tensor) -> PolarResult:
    """Compute the polar decomposition A = Q H: Q the nearest matrix with orthonormal columns (rows if m < n).

    The gradient needs full rank; it is finite at repeated singular values.

    Args:
        A: [*, m, n].

    Returns:
        Q [*, m, n], completed arbitrarily for a singular A; H = (Aᵀ A)^½ [*, n, n], symmetric positive semi-definite.

    Raises:
        NonFiniteError: NaN or Inf in A, or an entry of H that exceeds the range of its dtype.
        ConvergenceError: The iteration did not converge.
        ArithmeticError: Backward where singular values are zero to rounding; a square matrix may have one.

    Source:
        N. Higham, Functions of Matrices, chapter 8.
    """
    (Q,) = _apply("polar", ops.linalg.polar, autograd.PolarFunction, A)
    with ops.no_autocast(A.device.type):
        if _is_moderate(A):
            H = _symmetric(Q.mT @ A)
        else:
            scale = reference.magnitude(A)
            H = _symmetric(Q.mT @ (A / scale)) * scale
    _check_range("polar", "H", H)
    return PolarResult(Q, H)


def clip_spectrum(A: Tensor, tau: float, band: str = "rms", sigma_max: float | None = None) -> Tensor:
    """Clip the singular values of A to a band [lo, hi] with hi / lo <= 1 + tau.

    A matrix inside its band, or of zeros, is returned unchanged. In other matrices zero singular values are raised to
    lo along completed directions. Backward holds the edges of the band constant.

    Args:
        A: [*, m, n].
        tau: Slack >= 0; kappa of the result is at most 1 + tau to rounding. Inf: no band, only the cap.
        band: Place of the band. "rms" (CondLR): around s = ‖sigma‖ / √k with half-width tau s / (2 + tau); "mean":
            around the mean; "optimal": the nearest matrix with kappa <= 1 + tau in the Frobenius norm. "rms" and
            "mean" shrink the scale a little each time they act, which regularizes when applied after every training
            step; "optimal" does not.
        sigma_max: A band whose upper edge exceeds this is scaled down to end there. Default: no cap.

    Returns:
        [*, m, n].

    Raises:
        NonFiniteError: NaN or Inf in A, or an entry of the result that exceeds the range of its dtype.
        ConvergenceError: The iteration did not converge.
        ValueError: tau < 0, an unknown band, or sigma_max <= 0.

    Examples:
        >>> S = condlr_ext.linalg.clip_spectrum(torch.randn(8, 8), tau=0.1)
        >>> bool(condlr_ext.linalg.cond(S) <= 1.1001)
        True

    Source:
        Savostianova et al., Robust low-rank training via approximate orthonormal constraints, NeurIPS 2023. "optimal":
        the Euclidean projection of sigma, exact by sorting.
    """
    constraint = check_constraint("linalg.clip_spectrum", tau, band, sigma_max)
    (out,) = _apply("clip_spectrum", ops.linalg.clip_spectrum, autograd.ClipSpectrumFunction, A, *constraint)
    _check_range("clip_spectrum", "the result", out)
    return out


def cond(A: Tensor) -> Tensor:
    """Compute the condition number kappa = sigma_1 / sigma_k, k = min(m, n).

    Args:
        A: [*, m, n].

    Returns:
        [*], Inf for a singular matrix, and where kappa exceeds the range of its dtype.

    Raises:
        NonFiniteError: NaN or Inf in A.
        ConvergenceError: The iteration did not converge.
        ShapeError: A has no rows or no columns.
    """
    _check_matrix("cond", A)
    if 0 in A.shape[-2:]:
        raise ShapeError(f"linalg.cond: A must have rows and columns, got shape {list(A.shape)}")
    A = A.to(torch.promote_types(A.dtype, torch.float32))  # in float16 the largest could be Inf
    A = A / reference.magnitude(A)  # sigma itself could be beyond the range, or have few digits left below it
    _, sigma, _ = _apply("cond", ops.linalg.svd, autograd.SVDFunction, A)
    return reference.cond_from_sigma(sigma)


def check_constraint(where: str, tau, band, sigma_max) -> tuple[float, int, float]:
    """Validate and return (tau, index of band, sigma_max or Inf); raises ValueError, its text begins with `where`."""
    if not isinstance(tau, numbers.Real) or not tau >= 0:
        raise ValueError(f"{where}: tau must be a number >= 0 (kappa <= 1 + tau), got {tau!r}")
    if band not in reference.BANDS:
        raise ValueError(f"{where}: band must be one of {', '.join(reference.BANDS)}, got {band!r}")
    if sigma_max is None:
        sigma_max = math.inf
    if not isinstance(sigma_max, numbers.Real) or not sigma_max > 0:
        raise ValueError(f"{where}: sigma_max must be None or a number > 0, got {sigma_max!r}")
    return float(tau), reference.BANDS.index(band), float(sigma_max)


def _check_matrix(name: str, A: Tensor) -> None:
    if not isinstance(A, Tensor) or not A.is_floating_point():
        got = A.dtype if isinstance(A, Tensor) else type(A).__name__
        raise TypeError(f"linalg.{name}: A must be a real floating-point tensor, got {got}")
    if A.dim() < 2:
        raise ShapeError(f"linalg.{name}: A must have at least two dimensions [*, m, n], got shape {list(A.shape)}")


def _is_moderate(A: Tensor) -> bool:
    """Return whether products with each matrix keep far from both ends of the range of its dtype, if that can be seen.

    Beyond, sums on the way could overflow, or have few digits left.
    """
    if not ops.can_check(A) or A.numel() == 0:
        return False
    least, most = (t.item() for t in A.detach().abs().amax((-2, -1)).aminmax())
    range_ = torch.finfo(A.dtype)
    return range_.tiny**0.5 < least and most < range_.max**0.5


def _symmetric(X: Tensor) -> Tensor:
    return (X + X.mT) / 2


def _overflowed(result: Tensor) -> bool:
    """Return whether a result of finite tensors is not finite; False where that cannot be looked at."""
    if not ops.can_check(result):
        return False
    result = result.detach()
    return not math.isfinite(result.sum().item()) and not result.isfinite().all()  # the sum is enough most often


def _check_range(name: str, what: str, result: Tensor) -> None:
    if _overflowed(result):
        raise NonFiniteError(
            f"linalg.{name}: {what} must be within the range of {result.dtype}, up to"
            f" {torch.finfo(result.dtype).max:.2e}, got more; divide A by a power of two"
        )


def _apply(name: str, op, function, A: Tensor, *args):
    _check_matrix(name, A)
    A32 = A.float() if A.dtype in (torch.float16, torch.bfloat16) else A
    *outputs, info = (function.apply if _differentiates(A32) else op.run)(op.choose(A32, *args), A32, *args)
    _raise_if_failed(name, info)
    return outputs if A32 is A else [o.to(A.dtype) for o in outputs]


def _differentiates(A: Tensor) -> bool:
    """Return whether a function of A needs its rules of differentiation, or is traced."""
    return torch.compiler.is_compiling() or (A.requires_grad and torch.is_grad_enabled()) or ops.transforms_active()


def _raise_if_failed(name: str, info: Tensor) -> None:
    if not ops.can_check(info) or not (info.any() if info.dim() else info.item()):
        return
    for code, error, text in (
        (ops.linalg.NOT_FINITE, NonFiniteError, "A must be finite, got NaN or Inf"),
        (ops.linalg.NOT_CONVERGED, ConvergenceError, "the iteration did not converge"),
    ):
        bad = (info == code).nonzero()
        if len(bad):
            where = f" in matrix {bad[0].tolist()} ({len(bad)} of {info.numel()})" if info.dim() else ""
            raise error(f"linalg.{name}: {text}{where}")
