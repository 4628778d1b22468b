"""Spectra, orthonormality and shapes of layers of every kind."""

import numpy as np
import pytest
import torch
from torch import nn

import condlr_ext
from condlr_ext.baselines import TwoFactorConv, TwoFactorLinear
from condlr_ext.experiments.inspect_layers import core, matrix_shape, orthonormality_error


def test_core_has_the_spectrum_of_the_weight():
    linear = nn.Linear(12, 9).double()
    expected = np.linalg.svd(linear.weight.detach().numpy(), compute_uv=False)
    for layer in (
        linear,
        TwoFactorLinear.from_dense(linear, 4),
        condlr_ext.LowRankLinear.from_dense(linear, rank=4),
    ):
        sigma = np.linalg.svd(core(layer).numpy(), compute_uv=False)
        np.testing.assert_allclose(sigma, expected[: len(sigma)], rtol=1e-12)
    assert len(sigma) == 4


def test_orthonormality_error_is_the_largest_entry():
    layer = condlr_ext.LowRankLinear.from_dense(nn.Linear(6, 5).double(), rank=2)
    with torch.no_grad():
        layer.V[:, 1] *= 1.5
    assert orthonormality_error(layer) == pytest.approx(1.5**2 - 1, rel=1e-12)


def test_matrix_shape_of_every_layer():
    for layer in (torch.nn.Conv2d(4, 6, 3), torch.nn.Linear(36, 6)):
        assert matrix_shape(layer) == (6, 36)
    low_rank = condlr_ext.LowRankConv2d(4, 6, 3, rank=2)
    assert matrix_shape(low_rank) == (6, 36) == matrix_shape(TwoFactorConv.from_dense(torch.nn.Conv2d(4, 6, 3), 2))
