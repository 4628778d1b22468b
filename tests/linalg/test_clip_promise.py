"""The promise of the clip: sigma_1 <= sigma_max (1 + 2e-6), kappa <= (1 + tau)(1 + 5e-6), whatever the input's scale."""

import math

import pytest
import torch
from helpers.matrices import singular_values, with_spectrum
from torch import nn

import condlr_ext
from condlr_ext import linalg

BANDS = ("rms", "mean", "optimal")
EXCESS = {torch.float32: (2e-6, 5e-6), torch.float64: (1e-12, 1e-12)}  # of the cap, of kappa


def excess(out, tau, sigma_max):
    sigma = singular_values(out)
    return (sigma[0] / sigma_max - 1).item(), (sigma[0] / sigma[-1] / (1 + tau) - 1).item()


@pytest.mark.parametrize("dtype", EXCESS, ids=str)
@pytest.mark.parametrize("band", BANDS)
@pytest.mark.parametrize("ratio", [0.99, 0.76, 0.74, 0.3, 1e-2, 1e-5, 1e-9, 1e-15, 1e-25])
def test_a_cap_far_below_the_input_is_met(backend, ratio, band, dtype):
    """The correction form is exact relative to the input, the promise is relative to the result."""
    for m, n, spread, tau in ((16, 16, 2.5, 0.1), (40, 9, 1.0, 0.0), (5, 7, 1e4, 0.5), (32, 32, 1e8, 1e-7)):
        sigma = torch.linspace(1, 1 / spread, min(m, n), dtype=torch.float64)
        A = with_spectrum(sigma, m, n).to(dtype)
        over_cap, over_kappa = excess(linalg.clip_spectrum(A, tau, band, ratio), tau, ratio)
        assert over_cap <= EXCESS[dtype][0], (m, n, spread, tau)
        assert over_kappa <= EXCESS[dtype][1], (m, n, spread, tau)


@pytest.mark.parametrize("dtype", EXCESS, ids=str)
@pytest.mark.parametrize("band", BANDS)
@pytest.mark.parametrize("make", [condlr_ext.optim.CondLRSGD, condlr_ext.optim.CondLRAdamW])
def test_one_huge_finite_gradient_breaks_neither_bound_nor_cap(backend, make, band, dtype):
    for scale in (1e1, 1e6, 1e12, 1e15, 1e20, 1e30):
        layer = condlr_ext.LowRankLinear(24, 20, bias=False, rank=8, dtype=dtype)
        optimizer = make(nn.Sequential(layer), 0.1, tau=0.1, band=band, sigma_max=1.5, check_finite=scale < 1e15)
        for p in layer.parameters():
            p.grad = torch.zeros_like(p)
        layer.S.grad = scale * torch.randn_like(layer.S)
        optimizer.step()
        over_cap, over_kappa = excess(layer.S.detach(), 0.1, 1.5)
        assert over_cap <= EXCESS[dtype][0] and over_kappa <= EXCESS[dtype][1], scale
        assert math.isfinite(layer.condition_number())


@pytest.mark.parametrize("tau", [1e8, 1e12, 1e200])
def test_the_optimal_band_of_a_singular_matrix_at_large_tau(backend, tau):
    """The singular value 0 rises by next to nothing and the others stay; an error of a knot would let all go to 0."""
    for _ in range(40):
        sigma = torch.rand(4, dtype=torch.float64) + 0.1
        sigma[3] = 0
        A = torch.diag(sigma)
        assert (linalg.clip_spectrum(A, tau, "optimal") - A).abs().max() <= 2e-8
