"""Matrices with known spectra, and the measures by which decompositions are compared (never U against U)."""

import math

import numpy as np
import torch
from torch import Tensor

SPECTRA = {
    "random": lambda k: torch.rand(k, dtype=torch.float64).sort(descending=True).values + 0.1,
    "graded": lambda k: torch.logspace(0, -12, k, dtype=torch.float64),
    "clustered": lambda k: 1 + 1e-6 * torch.linspace(1, 0, k, dtype=torch.float64) * (torch.arange(k) < k // 2),
    "repeated": lambda k: torch.ones(k, dtype=torch.float64),
    "two_values": lambda k: torch.where(torch.arange(k) < (k + 1) // 2, 1.1, 1.0).double(),
    "rank_deficient": lambda k: torch.linspace(2, 1, k, dtype=torch.float64) * (torch.arange(k) < (k + 1) // 2),
    "zero": lambda k: torch.zeros(k, dtype=torch.float64),
}


def orthonormal(m: int, k: int) -> Tensor:
    return torch.linalg.qr(torch.randn(m, k, dtype=torch.float64))[0]


def with_spectrum(sigma, m: int | None = None, n: int | None = None) -> Tensor:
    """[m, n] float64, by default square, with these singular values and zeros."""
    sigma = torch.as_tensor(sigma, dtype=torch.float64)
    k = len(sigma)
    return orthonormal(m or k, k) * sigma @ orthonormal(n or k, k).mT


def non_orthonormality(X: Tensor) -> float:
    """max |XᵀX - I| in float64."""
    X = X.detach().double()
    return (X.mT @ X - torch.eye(X.shape[-1], dtype=X.dtype)).abs().max().item() if X.numel() else 0.0


def singular_values(A: Tensor) -> Tensor:
    """Singular values by float64 LAPACK , values only."""
    return torch.from_numpy(np.linalg.svd(A.detach().double().numpy(), compute_uv=False))


def kappa(S: Tensor) -> float:
    sigma = singular_values(S)
    return math.inf if sigma[-1] == 0 else (sigma[0] / sigma[-1]).item()


def backward_error(dtype: torch.dtype, *sizes: int) -> float:
    """Return the relative error of a backward stable method: rounding adds up like a random walk, 10 eps √n.

    LAPACK shows about a third of it on these matrices.
    """
    return 10 * torch.finfo(dtype).eps * max(math.sqrt(max(sizes, default=1)), 4)
