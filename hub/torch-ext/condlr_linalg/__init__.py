"""Batched svd, qr, polar and clip_spectrum of small and thin matrices, without gradients.

The last two dimensions are the matrix, leading ones are batch. Triton kernels serve float32 and float64 tensors on a
GPU with min(m, n) <= 512, plain PyTorch all others. A matrix with NaN or Inf gives NaN.
"""

import torch
from torch import Tensor

from . import reference
from .kernels.triton import devices

__all__ = ["clip_spectrum", "layers", "polar", "qr", "svd"]

_LARGEST = 512


def svd(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U [*, m, k], sigma [*, k] descending and V [*, n, k] with A = U diag(sigma) Vᵀ, k = min(m, n)."""
    return _run("spectral", "svd", reference.svd, A)[:3]


def qr(A: Tensor) -> tuple[Tensor, Tensor]:
    """Return Q [*, m, k] and R [*, k, n] with A = Q R and diag(R) >= 0, k = min(m, n); Q is orthonormal at any rank."""
    return _run("qr", "qr", reference.qr, A)[:2]


def polar(A: Tensor) -> Tensor:
    """Return the matrix [*, m, n] with orthonormal columns (rows if m < n) that is nearest to A."""
    return _run("spectral", "polar", reference.polar, A)[0]


def clip_spectrum(A: Tensor, tau: float, band: str = "rms", sigma_max: float = float("inf")) -> Tensor:
    """Return A with its singular values in a band whose edges have the ratio 1 + tau; matrices of zeros stay.

    Args:
        A: [*, m, n].
        tau: >= 0.
        band: "rms", "mean" (around that mean of the singular values) or "optimal" (the nearest such matrix).
        sigma_max: Bound of the upper edge.

    Raises:
        ValueError: An argument is out of range.
    """
    if not tau >= 0 or not sigma_max > 0 or band not in reference.BANDS:
        raise ValueError(
            f"clip_spectrum: tau must be >= 0, sigma_max > 0 and band one of {', '.join(reference.BANDS)}, got {tau},"
            f" {sigma_max} and {band!r}"
        )
    if _served(A):
        from .kernels.triton.spectral import launch

        return launch.clip_spectrum(A, tau, reference.BANDS.index(band), sigma_max)[0]
    return _where_finite(lambda X: reference.clip_spectrum(X, tau, band, sigma_max), A)[0]


def _served(A: Tensor) -> bool:
    if A.dim() < 2 or A.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"A must be float32 or float64 [*, m, n], got {A.dtype} of shape {list(A.shape)}")
    return devices.INSTALLED and devices.serves(A) and min(A.shape[-2:]) <= _LARGEST


def _run(module: str, name: str, plain, A: Tensor) -> tuple[Tensor, ...]:
    if not _served(A):
        return _where_finite(plain, A)
    if module == "qr":
        from .kernels.triton.qr import launch
    else:
        from .kernels.triton.spectral import launch
    return getattr(launch, name)(A)


def _where_finite(function, A: Tensor) -> tuple[Tensor, ...]:
    """Return the results for the finite matrices of a batch, NaN for the others."""
    finite = torch.isfinite(A).all(-1).all(-1)
    results = function(torch.where(finite[..., None, None], A, 0))
    results = results if isinstance(results, tuple) else (results,)
    masks = (finite.reshape(*finite.shape, *[1] * (r.dim() - finite.dim())) for r in results)
    return tuple(torch.where(m, r, torch.nan) for m, r in zip(masks, results, strict=True))


from . import layers  # noqa: E402  it calls these
