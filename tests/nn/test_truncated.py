"""Randomized SVD of large weights."""

import pytest
import torch
from helpers.matrices import non_orthonormality
from torch import nn

from condlr_ext import LowRankLinear
from condlr_ext.nn import truncated
from condlr_ext.nn.truncated import randomized_svd


@pytest.mark.parametrize("m,n", [(1100, 1030), (1030, 1100)])
@pytest.mark.parametrize("spectrum", ["flat", "graded", "low rank"])
def test_large_weights_take_a_randomized_svd(m, n, spectrum, monkeypatch):
    """Its error is within 1 % of the best, for fresh weights, graded ones and those of lower rank; reproducibly."""
    A = torch.randn(m, n) / n**0.5
    if spectrum != "flat":
        sigma = torch.logspace(0, -3, 1030) if spectrum == "graded" else torch.ones(1030) * (torch.arange(1030) < 30)
        A = torch.linalg.qr(torch.randn(m, 1030))[0] * sigma @ torch.linalg.qr(torch.randn(n, 1030))[0].mT
    calls = []
    monkeypatch.setattr(truncated, "randomized_svd", lambda *args: calls.append(args) or randomized_svd(*args))
    linear = nn.Linear(n, m, device="meta")
    linear.weight, linear.bias = nn.Parameter(A), nn.Parameter(torch.zeros(m))
    state = torch.get_rng_state()
    layer = LowRankLinear.from_dense(linear, rank=60)
    assert len(calls) == 1 and torch.equal(torch.get_rng_state(), state)
    sigma = torch.linalg.eigvalsh(A.double().mT @ A.double()).flip(0).clamp_min(0).sqrt()
    best = sigma[60:].norm()
    rounding = max(m, n) ** 0.5 * torch.finfo(torch.float32).eps  # of the products' sums of max(m, n) terms
    assert (layer.weight - A).norm() <= 1.01 * best + rounding * sigma.norm()
    assert max(non_orthonormality(layer.U), non_orthonormality(layer.V)) < 1e-5
    assert (layer.S.diagonal().diff() <= 0).all() and (layer.S.diagonal() >= 0).all()
    assert torch.equal(LowRankLinear.from_dense(linear, rank=60).weight, layer.weight)
    truncated.truncated_svd(A[:100], 10)
    assert len(calls) == 2  # small ones are exact
