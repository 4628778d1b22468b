"""Q R is A to the rounding of A, up to any condition number: at most twice the residual of LAPACK."""

import pytest
import torch
from helpers.matrices import orthonormal

from condlr_ext import linalg


def residual(Q, R, A):
    """Root mean square over all columns, each relative to its length."""
    return ((Q @ R - A).norm(dim=-2) / A.norm(dim=-2)).square().mean().sqrt().item()


@pytest.mark.parametrize("kappa", [1e1, 1e2, 1e4, 1e5, 1e6, 1e7, 1e8, 1e10, 1e14])
@pytest.mark.parametrize("shape", [(8, 8), (16, 16), (24, 24), (40, 17), (64, 64), (200, 46)], ids=str)
def test_residual_is_that_of_lapack(backend, shape, kappa):
    m, n = shape
    two_scales = torch.where(torch.rand(20, n) < 0.5, 1.0, 1 / kappa).double()
    graded = torch.logspace(0, -torch.tensor(kappa).log10().item(), n, dtype=torch.float64).expand(20, n)
    for sigma in (two_scales, graded):
        A = torch.stack([(orthonormal(m, n) * s) @ orthonormal(n, n).mT for s in sigma])
        Q, R = linalg.qr(A)
        assert residual(Q, R, A) <= 2 * max(residual(*torch.linalg.qr(A), A), torch.finfo(A.dtype).eps)
