"""clip_spectrum by Triton kernels, in Triton's interpreter."""

import math

import pytest
import torch
from helpers.kernels import ON_CPU, run_on_cpu, with_orthogonal_columns
from helpers.matrices import SPECTRA, kappa, orthonormal, singular_values, with_spectrum

from condlr_ext import reference
from condlr_ext.kernels.status import ALL_ZERO, OK

pytestmark = ON_CPU
if run_on_cpu():
    from condlr_ext.kernels.triton.spectral import launch as spectral

INF = math.inf


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["random", "two_values", "graded"])
def test_rank_64(kind):
    A = with_spectrum(SPECTRA[kind](64), 64, 64).float()
    out, info = spectral.clip_spectrum(A, 0.1, 0, INF)
    exact = reference.clip_spectrum(A.double(), 0.1)
    assert info == OK and kappa(out) <= 1.1 * (1 + 5e-6) and (out - exact).norm() <= 1e-6 * exact.norm()


@pytest.mark.parametrize("band", range(3))
@pytest.mark.parametrize("tau", [0.0, 0.1, 10.0])
@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("k", [1, 2, 7])
def test_clip_spectrum(k, kind, tau, band):
    A = with_spectrum(SPECTRA[kind](k), k, k).float()
    out, info = spectral.clip_spectrum(A, tau, band, INF)
    if kind == "zero":
        assert info == ALL_ZERO and torch.equal(out, A)
        return
    assert info == OK and kappa(out) <= (1 + tau) * (1 + 5e-6)
    exact = reference.clip_spectrum(A.double(), tau, reference.BANDS[band])
    assert (out - exact).norm() <= 1e-6 * exact.norm()


def test_ill_conditioned_cores_are_clipped_in_float64():
    A = with_spectrum(torch.logspace(0, -3, 24, dtype=torch.float64), 24, 24).float()
    exact = reference.clip_spectrum(A.double(), 0.1)
    out, _ = spectral.clip_spectrum(A, 0.1, 0, INF)
    assert (out - exact).norm() <= 1.1 * (exact.float() - exact).norm()  # nothing but the rounding of the result


@pytest.mark.parametrize("kind", ["clustered", "two_values", "rank_deficient"])
@pytest.mark.parametrize("m,n", [(17, 17), (32, 48)])
def test_larger_cores(m, n, kind):
    A = with_spectrum(SPECTRA[kind](min(m, n)), m, n).float()
    out, info = spectral.clip_spectrum(A, 0.1, 0, INF)
    exact = reference.clip_spectrum(A.double(), 0.1)
    assert info == OK and kappa(out) <= 1.1 * (1 + 5e-6) and (out - exact).norm() <= 1e-6 * exact.norm()


@pytest.mark.ptx
def test_by_blocks():
    A = with_orthogonal_columns(torch.linspace(2, 1, 70))
    out, info = spectral.clip_spectrum(A, 0.1, 2, INF)
    exact = reference.clip_spectrum(A.double(), 0.1, "optimal")
    assert info == OK and kappa(out) <= 1.1 * (1 + 5e-6) and (out - exact).norm() <= 1e-6 * exact.norm()


@pytest.mark.ptx
@pytest.mark.parametrize("band", range(3))
@pytest.mark.parametrize("tau", [1e4, 1e6, 1e17, 1e200])
def test_bound_is_hard_for_large_tau(tau, band):
    A = with_spectrum(torch.logspace(0, -7, 12, dtype=torch.float64), 12, 12).float()
    A[:, 3] = 0
    out, _ = spectral.clip_spectrum(A, tau, band, INF)
    assert kappa(out) <= (1 + tau) * (1 + 5e-6) or tau > 1e6
    assert torch.isfinite(out).all() and (out - A).abs().max() < A.abs().max()


@pytest.mark.ptx
@pytest.mark.parametrize("band", range(3))
@pytest.mark.parametrize("exponent", [0, 20, -20])
def test_cap(exponent, band):
    scale = 10.0**exponent
    A = (3 * scale * with_spectrum(SPECTRA["random"](7), 7, 7)).float()
    for tau in (0.1, INF):
        out, _ = spectral.clip_spectrum(A, tau, band, 1.5 * scale)
        exact = reference.clip_spectrum(A.double(), tau, reference.BANDS[band], 1.5 * scale)
        assert (out.double() / scale - exact / scale).norm() <= 1e-6 * (exact / scale).norm()
        assert singular_values(out)[0] <= 1.5 * scale * (1 + 5e-6)


def test_leaves_what_is_in_the_band():
    A = with_spectrum(torch.linspace(1.04, 1.0, 12, dtype=torch.float64), 12, 12).float()
    for band in range(3):
        for tau in (0.5, INF):
            assert torch.equal(spectral.clip_spectrum(A, tau, band, INF)[0], A)
    orthogonal = orthonormal(24, 24).float()
    for band in range(3):
        assert torch.equal(spectral.clip_spectrum(orthogonal, 0.0, band, INF)[0], orthogonal)
    one = torch.tensor([[-2.5]])
    assert torch.equal(spectral.clip_spectrum(one, 0.0, 0, INF)[0], one)
    torch.testing.assert_close(spectral.clip_spectrum(one, 0.0, 0, 1.0)[0], torch.tensor([[-1.0]]))


@pytest.mark.ptx
def test_reads_tau_and_sigma_max_on_the_device():
    A = torch.randn(2, 6, 6)
    expected = spectral.clip_spectrum(A, 0.1, 0, 1.5)[0]
    for dtype, shape in ((torch.float64, ()), (torch.float64, (1,))):
        tau, sigma_max = (torch.full(shape, x, dtype=dtype) for x in (0.1, 1.5))
        assert torch.equal(spectral.clip_spectrum(A, tau, 0, sigma_max)[0], expected)


@pytest.mark.ptx
def test_matrices_of_a_batch_have_their_own_constraints():
    A = torch.randn(4, 6, 6)
    hyper = torch.zeros(3, 10, dtype=torch.float64)
    hyper[:, 7:] = torch.tensor([[0.1, 0, INF], [0.3, 1, 1.5], [0.2, 2, 1.0]])
    row = [2, 0, 1, 1]
    out, info = spectral.clip_each(A, hyper[:, 7:], torch.tensor(row, dtype=torch.int32))
    for i, r in enumerate(row):
        tau, band, sigma_max = hyper[r, 7:].tolist()
        assert torch.equal(out[i], spectral.clip_spectrum(A[i], tau, int(band), sigma_max)[0])
    assert (info == OK).all()


TAUS, RATIOS = (0.0, 0.1, INF), (0.8, 0.7, 1e-3, 1e-8, 1e-20)


@pytest.mark.parametrize(
    "ratio,tau,band",  # each ratio with a tau and a band of its own; the other combinations are slow
    [
        pytest.param(ratio, tau, band, marks=[pytest.mark.slow] * ((i + j) % 3 != band or i % 3 != j))
        for i, ratio in enumerate(RATIOS)
        for j, tau in enumerate(TAUS)
        for band in range(3)
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_cap_far_below_the_input_is_met(dtype, ratio, tau, band):
    """The correction form is exact relative to the input, the promise is relative to the result."""
    for spread in (2.5, 1e4):
        A = with_spectrum(torch.linspace(1, 1 / spread, 12, dtype=torch.float64), 12, 12).to(dtype)
        out, info = spectral.clip_spectrum(A, tau, band, ratio)
        sigma = singular_values(out)
        rounding = 2e-6 if dtype == torch.float32 else 1e-12
        assert info == OK and sigma[0] <= ratio * (1 + rounding)
        assert tau == INF or kappa(out) <= (1 + tau) * (1 + 2.5 * rounding)


def test_a_low_cap_above_rank_64():
    A = with_orthogonal_columns(torch.linspace(2, 1, 70))
    for sigma_max in (1.2, 1e-6):
        out, info = spectral.clip_spectrum(A, 0.1, 0, sigma_max)
        assert info == OK and singular_values(out)[0] <= sigma_max * (1 + 2e-6) and kappa(out) <= 1.1 * (1 + 5e-6)
