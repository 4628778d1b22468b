"""Truncated SVD, exact or randomized."""

import torch
from torch import Tensor

from .. import linalg, reference

LARGE = 1024  # for smaller min(m, n) the full SVD takes half a second at most
FEW = 8  # randomized up to rank min(m, n) / FEW; above, little is gained
ITERATIONS = 4


def truncated_svd(A: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading singular triplets of A; randomized where A is large and the rank low.

    Args:
        A: [m, n], finite, float32 or float64.
        rank: In 1..min(m, n).

    Returns:
        U [m, rank], sigma [rank] descending, V [n, rank] with A ≈ U diag(sigma) Vᵀ.
    """
    if min(A.shape) >= LARGE and rank * FEW <= min(A.shape):
        return randomized_svd(A, rank)
    U, sigma, V = reference.svd(A)
    return U[:, :rank], sigma[:rank], V[:, :rank]


def randomized_svd(A: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading singular triplets by subspace iteration; torch's random state is not touched.

    Costs 2 (2 ITERATIONS + 2) m n k flops with k = 1.5 rank + 10 vectors. The Frobenius error of the approximation is
    at most 1 % above the smallest possible, even for a spectrum as flat as that of a fresh weight.

    Source:
        N. Halko, P. Martinsson and J. Tropp, SIAM Review 53 (2011), algorithms 4.4 and 5.1.
    """
    m, n = A.shape
    vectors = min(m, n, rank + rank // 2 + 10)
    generator = torch.Generator(A.device).manual_seed(0)
    Y = A @ torch.randn(n, vectors, dtype=A.dtype, device=A.device, generator=generator)
    for _ in range(ITERATIONS):
        Y = A @ linalg.orthonormalize(A.mT @ linalg.orthonormalize(Y))
    Q = linalg.orthonormalize(Y)
    U, sigma, V = reference.svd(Q.mT @ A)
    return Q @ U[:, :rank], sigma[:rank], V[:, :rank]
