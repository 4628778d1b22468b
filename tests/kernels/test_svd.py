"""svd and polar by Triton kernels, and what they have in common with clip_spectrum, in Triton's interpreter."""

import math

import numpy as np
import pytest
import torch
from helpers.kernels import ON_CPU, host_waits, run_on_cpu, with_orthogonal_columns
from helpers.matrices import SPECTRA, non_orthonormality, orthonormal, singular_values, with_spectrum

from condlr_ext import ops
from condlr_ext.kernels.status import ALL_ZERO, NOT_CONVERGED, NOT_FINITE, OK

pytestmark = ON_CPU
if run_on_cpu():
    from condlr_ext.kernels.triton.runtime import cooperative
    from condlr_ext.kernels.triton.spectral import bound, jacobi, newton_schulz, product
    from condlr_ext.kernels.triton.spectral import launch as spectral

SLOW = [pytest.param(k, marks=pytest.mark.slow) for k in (32, 48, 64)]
RANKS = [1, 2, 3, 5, 8, 16, 17, 33, *SLOW]
INF = math.inf


def errors(A, U, sigma, V):
    """Return the errors of the reconstruction, of U and V as orthonormal, and of sigma, in Frobenius norms."""
    A64, U, sigma, V = A.double(), U.double(), sigma.double(), V.double()
    norm = A64.norm() if A64.any() else 1.0
    eye = torch.eye(U.shape[-1], dtype=torch.float64)
    return torch.tensor(
        [
            ((U * sigma) @ V.mT - A64).norm() / norm,
            (U.mT @ U - eye).norm(),
            (V.mT @ V - eye).norm(),
            (sigma - singular_values(A)).norm() / norm,
        ]
    )


def assert_as_good_as_lapack(A, U, sigma, V):
    """Assert errors of at most twice LAPACK's at the same dtype, or 2 eps √k where LAPACK is nearly exact."""
    theirs = np.linalg.svd(A.numpy(), full_matrices=False)
    theirs = errors(A, torch.from_numpy(theirs[0]), torch.from_numpy(theirs[1]), torch.from_numpy(theirs[2]).mT)
    floor = 2 * torch.finfo(A.dtype).eps * math.sqrt(len(sigma))
    ours = errors(A, U, sigma, V)
    assert (ours <= (2 * theirs).clamp_min(floor)).all(), f"{ours} against {theirs}, at least {floor}"
    assert (sigma >= 0).all() and (sigma.diff() <= 0).all()


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("k", RANKS)
def test_svd(k, kind):
    A = with_spectrum(SPECTRA[kind](k), k, k).float()
    U, sigma, V, info = spectral.svd(A)
    assert info == OK
    assert_as_good_as_lapack(A, U, sigma, V)


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("m,n", [(5, 5), (17, 17), (12, 5), (5, 40)])
def test_svd_float64(m, n, kind):
    A = with_spectrum(SPECTRA[kind](min(m, n)), m, n)
    U, sigma, V, info = spectral.svd(A)
    assert info == OK and U.dtype == sigma.dtype == V.dtype == torch.float64
    assert_as_good_as_lapack(A, U, sigma, V)


@pytest.mark.ptx
@pytest.mark.parametrize("kind", ["random", "graded", "rank_deficient", "clustered"])
@pytest.mark.parametrize("m,n", [(40, 7), (7, 40), (100, 1), (1, 5), (300, 20)])
def test_svd_tall_and_wide(m, n, kind):
    A = with_spectrum(SPECTRA[kind](min(m, n)), m, n).float()
    assert_as_good_as_lapack(A, *spectral.svd(A)[:3])


@pytest.mark.parametrize("m,n,kind", [(65, 65, "random"), (70, 100, "two_values")])
def test_svd_by_blocks(m, n, kind):
    A = with_spectrum(SPECTRA[kind](min(m, n)), m, n).float()
    U, sigma, V, info = spectral.svd(A)
    assert info == OK
    assert_as_good_as_lapack(A, U, sigma, V)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("m,n", [(96, 96), (128, 128), (66, 200)])
def test_svd_by_more_blocks(m, n, kind):
    A = with_spectrum(SPECTRA[kind](min(m, n)), m, n).float()
    U, sigma, V, info = spectral.svd(A)
    assert info == OK
    assert_as_good_as_lapack(A, U, sigma, V)


@pytest.mark.parametrize("exponent", [30, 20, -20, -30, -36])
def test_svd_scaled_far_from_one(exponent):
    A = (with_spectrum(SPECTRA["random"](12), 12, 12) * 10.0**exponent).float()
    U, sigma, V, info = spectral.svd(A)
    # the factors are of A / scale, and squares of the entries would not have been finite or normal
    scaled = A.double() / 10.0**exponent
    back = (U.double() * (sigma.double() / 10.0**exponent)) @ V.double().mT
    assert (back - scaled).norm() / scaled.norm() <= 1e-6
    assert max(non_orthonormality(U), non_orthonormality(V)) <= 1e-6


@pytest.mark.ptx
def test_svd_of_unequal_lengths_and_zero_columns():
    A = torch.randn(20, 9)
    A[:, [0, 4, 8]] = 0
    A[:, 3] *= 1e-7
    U, sigma, V, _ = spectral.svd(A)
    assert_as_good_as_lapack(A, U, sigma, V)
    assert (sigma[-3:] == 0).all()


def test_svd_of_orthogonal_columns_in_any_order():
    lengths = torch.tensor([1.0, 3.0, 0.0, 2.0, 5.0])
    A = orthonormal(7, 5).float() * lengths
    U, sigma, V, _ = spectral.svd(A)
    torch.testing.assert_close(sigma, lengths.sort(descending=True).values)
    assert_as_good_as_lapack(A, U, sigma, V)


@pytest.mark.ptx
def test_small_singular_values_are_accurate_where_columns_are_graded():
    """LAPACK knows sigma to eps sigma_1; rotations know it relative to itself if A = B D with B well-conditioned."""
    scales = torch.logspace(0, -12, 9)
    A = with_spectrum(torch.linspace(2, 1, 9, dtype=torch.float64), 12, 9).float() * scales
    sigma, info = spectral.svd(A)[1::2]
    exact = spectral.svd(A.double())[1]  # in the same sense to 1e-15
    assert info == OK
    torch.testing.assert_close(sigma.double(), exact, rtol=3e-6, atol=0)


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize(
    "m,n", [(1, 1), (5, 5), (17, 17), (20, 6), (6, 20), pytest.param(33, 33, marks=pytest.mark.slow)]
)
def test_polar(m, n, kind):
    A = with_spectrum(SPECTRA[kind](min(m, n)), m, n).float()
    Q, info = spectral.polar(A)
    tall = Q if m >= n else Q.mT
    H = (Q.mT @ A if m >= n else A @ Q.mT).double()
    bound = 2 * torch.finfo(A.dtype).eps * math.sqrt(max(m, n))
    assert info == OK and non_orthonormality(tall) <= bound
    assert (H - H.mT).norm() <= bound * A.norm() and torch.linalg.eigvalsh(H).min() >= -bound * A.norm()


@pytest.mark.ptx
def test_matrices_of_a_batch_do_not_affect_each_other():
    kinds = ["two_values", "graded", "zero", "random", "repeated", "random"]
    A = torch.stack([with_spectrum(SPECTRA[kind](6), 6, 6).float() for kind in kinds]).reshape(3, 2, 6, 6)
    A[1, 1, 2, 5], A[2, 0, 0, 0] = math.nan, -INF
    out, clip_info = spectral.clip_spectrum(A, 0.1, 0, INF)
    outputs = [*spectral.svd(A), *spectral.polar(A), out, clip_info]
    for i in range(3):
        for j in range(2):
            each = [*spectral.svd(A[i, j]), *spectral.polar(A[i, j]), *spectral.clip_spectrum(A[i, j], 0.1, 0, INF)]
            for all_, one in zip(outputs, each, strict=True):
                torch.testing.assert_close(all_[i, j], one, rtol=0, atol=0, equal_nan=True)
    strange = torch.zeros(3, 2, dtype=torch.bool)
    strange[1, 1] = strange[2, 0] = True
    U, sigma, V, info, Q, polar_info = outputs[:6]
    for t in (U, sigma, V, Q):
        assert t[strange].isnan().all() and t[~strange].isfinite().all()
    assert (info[strange] == NOT_FINITE).all() and (info[~strange] == OK).all() and torch.equal(info, polar_info)
    torch.testing.assert_close(out[strange], A[strange], rtol=0, atol=0, equal_nan=True)
    assert (clip_info[strange] == NOT_FINITE).all() and clip_info[1, 0] == ALL_ZERO


def test_non_finite_in_blocks():
    A = torch.stack([with_orthogonal_columns(torch.linspace(2, 1, 66))] * 2)
    A[0, 65, 65] = math.nan
    U, sigma, V, info = spectral.svd(A)
    assert info.tolist() == [NOT_FINITE, OK] and all(t[0].isnan().all() for t in (U, sigma, V))
    assert_as_good_as_lapack(A[1], U[1], sigma[1], V[1])


@pytest.mark.ptx
@pytest.mark.parametrize("n", [20, 66])
def test_too_few_sweeps_are_reported(n, monkeypatch):
    monkeypatch.setattr(jacobi, "SWEEPS", 2)
    monkeypatch.setattr(jacobi, "SWEEPS_OF_BLOCKS", 1)
    A = torch.stack([torch.randn(n, n), torch.eye(n)])
    assert spectral.svd(A)[3].tolist() == [NOT_CONVERGED, OK]


@pytest.mark.parametrize("m,n", [(0, 3), (3, 0), (0, 0), (4, 3)])
@pytest.mark.parametrize("batch", [(), (0,), (2, 0), (2, 3)])
def test_batches_and_empties(batch, m, n):
    A = torch.randn(*batch, m, n)
    k = min(m, n)
    U, sigma, V, info = spectral.svd(A)
    assert U.shape == (*batch, m, k) and sigma.shape == (*batch, k) and V.shape == (*batch, n, k)
    Q, polar_info = spectral.polar(A)
    out, clip_info = spectral.clip_spectrum(A, 0.1, 0, INF)
    assert Q.shape == out.shape == A.shape
    assert info.shape == polar_info.shape == clip_info.shape == batch and info.dtype == torch.int32


def test_strides_do_not_matter():
    base = torch.randn(2, 4, 6)
    for A in (base.mT[0], base[:, ::2, 1::3], base.expand(2, 2, 4, 6)[:, 1]):
        before = A.clone()
        for fn in (spectral.svd, spectral.polar, lambda A: spectral.clip_spectrum(A, 0.1, 0, INF)):
            for a, b in zip(fn(A), fn(A.contiguous()), strict=True):
                assert torch.equal(a, b) and a.is_contiguous() == b.is_contiguous()
        assert torch.equal(A, before)


def test_unsupported_reasons():
    op = ops.linalg.svd
    assert op.unsupported_reasons("triton", torch.empty(512, 2000)) == []
    assert op.unsupported_reasons("triton", torch.empty(513, 600)) == ["min(m, n) = 513 exceeds 512"]
    assert "float16" in op.unsupported_reasons("triton", torch.empty(3, 3, dtype=torch.float16))[0]


def test_the_host_does_not_wait():
    for module in (spectral, product, bound, newton_schulz):
        assert host_waits(module) == [], module
    assert host_waits(cooperative) == ["item"]  # of a flag in the memory of the host
