"""Columns that rounding leaves far below the others: orthonormal all the same, and no digit of a result is lost."""

import pytest
import torch
from helpers.matrices import backward_error, non_orthonormality

from condlr_ext import linalg

DTYPES = [torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_q_of_columns_that_cancel_again_and_again(backend, dtype):
    """Each column that is a multiple of the first leaves 1e-16 of the last remainder: 1e-200 after a few."""
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        rows, columns = (2 * torch.randint(0, 2, (20,), generator=generator).double() - 1 for _ in range(2))
        A = torch.outer(rows, columns)
        A[seed % 20, ::5] = 0.5
        A = A.to(dtype)
        Q, R = linalg.qr(A)
        assert non_orthonormality(Q) <= backward_error(dtype, 20), seed
        assert (Q.double() @ R.double() - A).norm() <= backward_error(dtype, 20) * A.norm()


@pytest.mark.parametrize("low", [-400, -480, -520, -700, -900, -1000])
def test_q_of_short_columns(backend, low):
    """Their squares are no numbers of float64; each column of Q R is right to its own length."""
    A = torch.randn(9, 6, dtype=torch.float64) * torch.exp2(torch.linspace(0, low, 6, dtype=torch.float64))
    A[:, 4] = A[:, 5] * 3  # too close for Cholesky's factor
    Q, R = linalg.qr(A)
    assert non_orthonormality(Q) <= backward_error(torch.float64, 9)
    assert ((Q @ R - A).norm(dim=0) <= backward_error(torch.float64, 9) * A.norm(dim=0)).all()


@pytest.mark.parametrize("seed", [3, 10, 11])
def test_v_of_graded_columns_beside_null_ones(backend, seed):
    """What rounding leaves of the null columns is graded too, down to 1e-46, and takes rotations by large angles."""
    generator = torch.Generator().manual_seed(seed)
    grades = 10.0 ** (-30 * torch.linspace(0, 1, 12, dtype=torch.float64))
    A = torch.randn(200, 32, 12, dtype=torch.float64, generator=generator) * grades
    A = (A * 2.0**43).round() / 2.0**43
    U, sigma, V = linalg.svd(A)
    for X in (U, V):
        error = (X.mT @ X - torch.eye(12, dtype=torch.float64)).abs().max()
        assert error <= 2 * backward_error(torch.float64, 32)
    assert ((U * sigma.unsqueeze(1)) @ V.mT - A).norm(dim=(1, 2)).max() <= backward_error(torch.float64, 32) * A.norm()
