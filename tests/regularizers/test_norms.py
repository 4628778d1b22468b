"""Penalties on the largest singular value by hand."""

import math

import torch
from helpers.matrices import orthonormal, with_spectrum

from condlr_ext.regularizers import (
    lipschitz,
    spectral_norm,
)

F64 = torch.float64


def test_spectral_norm_and_lipschitz_by_hand():
    A, B = with_spectrum([3.0, 2.0], 5, 4), with_spectrum([0.5, 0.2])
    torch.testing.assert_close(spectral_norm([A, B]), torch.tensor((9 + 0.25) / 2, dtype=F64))
    torch.testing.assert_close(lipschitz([A, B], bound=1.5), torch.tensor(math.log(2), dtype=F64))
    leaf = B.clone().requires_grad_()
    lipschitz(leaf).backward()
    assert not leaf.grad.any()  # within the bound
    # at a repeated largest value: the same subgradient whatever basis the SVD picks, here A / (‖A‖ r) for all tied
    Q = orthonormal(6, 6).requires_grad_()
    lipschitz(2 * Q).backward()
    torch.testing.assert_close(Q.grad, Q.detach() / 6)
    half = with_spectrum([2.0, 2.0, 1.0, 1.0]).requires_grad_()
    spectral_norm(half).backward()
    torch.testing.assert_close(half.grad, with_spectrum_of(half.detach(), lambda s: torch.where(s > 1.5, s / 2, 0)))


def with_spectrum_of(A, function):
    U, s, Vh = torch.linalg.svd(A)
    return U * function(s) @ Vh
