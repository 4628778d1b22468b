"""svd, qr, polar, clip_spectrum, cond on every backend: invariants on all kinds of spectra, errors, dtypes, strides."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.matrices import (
    SPECTRA,
    backward_error,
    kappa,
    non_orthonormality,
    orthonormal,
    singular_values,
    with_spectrum,
)

from condlr_ext import errors, linalg, reference

DATA = Path(__file__).parents[1] / "data"
SHAPES = [(1, 1), (3, 3), (17, 17), (33, 33), (64, 64), (40, 7), (7, 40), (100, 1), (1, 5), (130, 33)]
DTYPES = [torch.float32, torch.float64]


def relative(error, A):
    scale = A.double().norm().item()
    return error.double().norm().item() / scale if scale else error.double().norm().item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("m,n", SHAPES)
def test_svd(backend, m, n, kind, dtype):
    k = min(m, n)
    A = with_spectrum(SPECTRA[kind](k), m, n).to(dtype)
    U, sigma, V = linalg.svd(A)
    bound = backward_error(dtype, m, n)
    assert U.shape == (m, k) and sigma.shape == (k,) and V.shape == (n, k) and U.dtype == dtype
    assert (sigma >= 0).all() and (sigma.diff() <= 0).all()
    assert relative((U * sigma) @ V.mT - A, A) <= bound
    assert max(non_orthonormality(U), non_orthonormality(V)) <= bound
    torch.testing.assert_close(sigma.double(), singular_values(A), rtol=0, atol=bound * A.double().norm().item())


@pytest.mark.parametrize("name", ["clamped_core_raises", "clamped_core_nan"])
def test_cores_that_break_lapack(backend, name):
    A = torch.from_numpy(np.load(DATA / f"{name}.npy"))
    bound = backward_error(torch.float32, 128)
    U, sigma, V = linalg.svd(A)
    assert relative((U * sigma) @ V.mT - A, A) <= bound
    assert max(non_orthonormality(U), non_orthonormality(V)) <= bound
    assert non_orthonormality(linalg.polar(A).Q) <= bound
    assert kappa(linalg.clip_spectrum(A, 0.0)) <= 1 + 5e-6


def test_reference_svd_survives_a_lapack_that_fails(monkeypatch):
    """Raises in float32, NaN without a word in float64: Jacobi still answers."""
    lapack = torch.linalg.svd

    def broken(A, full_matrices=True):
        if A.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return tuple(t * math.nan for t in lapack(A, full_matrices=full_matrices))

    monkeypatch.setattr(torch.linalg, "svd", broken)
    for m, n, kind in ((20, 20, "repeated"), (9, 5, "rank_deficient"), (5, 9, "graded"), (4, 4, "zero")):
        A = with_spectrum(SPECTRA[kind](min(m, n)), m, n).float()
        U, sigma, V = reference.svd(A)
        bound = backward_error(torch.float32, m, n)
        assert relative((U * sigma) @ V.mT - A, A) <= bound
        assert max(non_orthonormality(U), non_orthonormality(V)) <= bound


@pytest.mark.parametrize("dtype,exponent", [(torch.float32, 30), (torch.float32, -30), (torch.float64, 200)])
def test_scaled_far_from_one(backend, dtype, exponent):
    A = with_spectrum(SPECTRA["random"](12), 12, 12)
    scaled = (A * 10.0**exponent).to(dtype)
    sigma = linalg.svd(scaled).sigma.double() / 10.0**exponent
    torch.testing.assert_close(sigma, singular_values(A), rtol=backward_error(dtype, 12) * 10, atol=0)
    assert non_orthonormality(linalg.polar(scaled).Q) <= backward_error(dtype, 12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["random", "graded", "rank_deficient", "zero"])
@pytest.mark.parametrize("m,n", SHAPES)
def test_qr(backend, m, n, kind, dtype):
    k = min(m, n)
    A = with_spectrum(SPECTRA[kind](k), m, n).to(dtype)
    Q, R = linalg.qr(A)
    bound = backward_error(dtype, m, n)
    assert Q.shape == (m, k) and R.shape == (k, n)
    assert relative(Q @ R - A, A) <= bound
    assert non_orthonormality(Q) <= bound
    assert (R.tril(-1) == 0).all()
    assert (R.diagonal() >= 0).all()
    if kind == "random":
        assert (R.diagonal() > 0).all()
        # full rank and a positive diagonal make Q unique: the same as LAPACK's after its signs are turned
        Q64, R64 = np.linalg.qr(A.double().numpy()[:, :k])
        Q64 = torch.from_numpy(Q64 * np.where(np.diag(R64) < 0, -1, 1))
        assert (Q.double() - Q64).abs().max() <= bound * kappa(A[:, :k])
    assert torch.equal(linalg.orthonormalize(A), Q)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("m,n", [(1, 1), (5, 5), (33, 33), (20, 6), (6, 20)])
def test_polar(backend, m, n, kind, dtype):
    A = with_spectrum(SPECTRA[kind](min(m, n)), m, n).to(dtype)
    Q, H = linalg.polar(A)
    bound = backward_error(dtype, m, n)
    assert non_orthonormality(Q if m >= n else Q.mT) <= bound
    assert torch.equal(H, H.mT)
    assert relative(Q @ H - A, A) <= 2 * bound
    assert torch.linalg.eigvalsh(H.double()).min() >= -bound * A.double().norm()


@pytest.mark.parametrize("band", reference.BANDS)
@pytest.mark.parametrize("tau", [0.0, 0.1, 0.5, 10.0])
@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("k", [1, 2, 5, 16, 33, 64])
def test_clip_bounds_kappa(backend, k, kind, tau, band):
    for dtype in DTYPES:
        A = with_spectrum(SPECTRA[kind](k), k, k).to(dtype)
        out = linalg.clip_spectrum(A, tau, band)
        if kind == "zero":
            assert torch.equal(out, A)
            continue
        # storing each entry to half an eps moves sigma by at most eps / 2 ‖S‖
        slack = 5e-6 if dtype == torch.float32 else 1e-13
        assert kappa(out) <= (1 + tau) * (1 + slack * (1 + tau))
        before, after = singular_values(A), singular_values(out)
        lo, hi = reference.clip_edges(before, tau, band)
        expected = before.clamp(lo, hi)
        torch.testing.assert_close(after, expected, rtol=0, atol=backward_error(dtype, k) * before[0].item())


@pytest.mark.parametrize("k", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("tau", [0.0, 0.1, 1.0])
def test_optimal_band_is_the_nearest(k, tau):
    """No other band [a, (1 + tau) a] clips with a smaller change of the singular values."""
    for kind in ("random", "graded", "rank_deficient", "two_values", "clustered"):
        sigma = SPECTRA[kind](k)
        lo, hi = reference.band_edges(sigma, tau, "optimal")
        best = (sigma.clamp(lo, hi) - sigma).norm()
        a = torch.linspace(0, sigma[0].item(), 2000, dtype=torch.float64).unsqueeze(-1)
        assert best <= (sigma.clamp(a, (1 + tau) * a) - sigma).norm(dim=-1).min() + 1e-12


@pytest.mark.parametrize("band", reference.BANDS)
def test_clip_sigma_max(backend, band):
    A = 3 * with_spectrum(SPECTRA["random"](20), 20, 20).float()
    out = singular_values(linalg.clip_spectrum(A, 0.1, band, sigma_max=1.5))
    assert out[0] <= 1.5 * (1 + 5e-6) and out[0] / out[-1] <= 1.1 * (1 + 5e-6)
    lo, hi = reference.band_edges(singular_values(A), 0.1, band)
    edge = torch.tensor([min(hi.item(), 1.5)])
    torch.testing.assert_close(out[:1], edge.double(), rtol=1e-6, atol=0)
    below = linalg.clip_spectrum(A, math.inf, band, sigma_max=1.5)
    torch.testing.assert_close(singular_values(below), singular_values(A).clamp(max=1.5), rtol=0, atol=1e-6)


@pytest.mark.parametrize("band", reference.BANDS)
@pytest.mark.parametrize("tau", [100.0, 1e4, 1e6, 1e17, 1e200])
def test_the_bound_is_hard_for_large_tau_too(backend, tau, band):
    """Storing the clipped matrix rounds every entry: the lower edge leaves a margin for it."""
    for _ in range(5):
        A = with_spectrum(torch.logspace(0, -7, 12, dtype=torch.float64), 12, 12).float()
        A[:, 3] = 0
        out = linalg.clip_spectrum(A, tau, band)
        assert kappa(out) <= (1 + tau) * (1 + 5e-6) or tau > 1e6
        assert torch.isfinite(out).all() and (out - A).abs().max() < A.abs().max()


def test_clip_leaves_what_is_in_the_band(backend):
    A = with_spectrum(torch.linspace(1.04, 1.0, 12, dtype=torch.float64), 12, 12)
    for dtype in DTYPES:
        for band in reference.BANDS:
            assert torch.equal(linalg.clip_spectrum(A.to(dtype), 0.5, band), A.to(dtype))
            assert torch.equal(linalg.clip_spectrum(A.to(dtype), math.inf, band), A.to(dtype))
    one = torch.tensor([[-2.5]])
    assert torch.equal(linalg.clip_spectrum(one, 0.0), one)
    torch.testing.assert_close(linalg.clip_spectrum(one, 0.0, sigma_max=1.0), torch.tensor([[-1.0]]))


def test_rms_clip_shrinks_and_optimal_does_not(backend):
    """rms and mean are not idempotent: each action moves the scale down; the projection keeps what it made."""
    A = with_spectrum(SPECTRA["random"](16), 16, 16)
    once = {band: linalg.clip_spectrum(A, 0.1, band) for band in reference.BANDS}
    twice = {band: linalg.clip_spectrum(once[band], 0.1, band) for band in reference.BANDS}
    assert twice["rms"].norm() < once["rms"].norm() * (1 - 1e-6)
    torch.testing.assert_close(twice["optimal"], once["optimal"], rtol=0, atol=1e-12)


def test_tau_zero_is_the_scaled_polar_factor(backend):
    A = with_spectrum(SPECTRA["random"](9), 9, 9)
    Q = linalg.polar(A).Q
    torch.testing.assert_close(linalg.clip_spectrum(A, 0.0), Q * A.norm() / 3, rtol=0, atol=1e-13)


@pytest.mark.parametrize("m,n", [(0, 3), (3, 0), (0, 0), (4, 3)])
@pytest.mark.parametrize("batch", [(), (0,), (2, 0), (1,), (2, 3)])
def test_batches_and_empties(backend, batch, m, n):
    A = torch.randn(*batch, m, n, dtype=torch.float64)
    k = min(m, n)
    U, sigma, V = linalg.svd(A)
    assert U.shape == (*batch, m, k) and sigma.shape == (*batch, k) and V.shape == (*batch, n, k)
    Q, R = linalg.qr(A)
    assert Q.shape == (*batch, m, k) and R.shape == (*batch, k, n)
    assert linalg.polar(A).Q.shape == A.shape and linalg.clip_spectrum(A, 0.1).shape == A.shape
    if k:
        flat = A.reshape(-1, m, n)
        each = [linalg.svd(a).sigma for a in flat]
        assert torch.equal(sigma.reshape(-1, k), torch.stack(each) if each else sigma.reshape(-1, k))
        assert linalg.cond(A).shape == batch


def test_strides_do_not_matter(backend):
    base = torch.randn(2, 9, 14, dtype=torch.float64)
    for A in (base.mT, base[:, ::2, 1::3], base.transpose(0, 1), base.expand(3, 2, 9, 14)[:, 1]):
        for fn in (linalg.svd, linalg.qr, linalg.polar):
            for a, b in zip(fn(A), fn(A.contiguous()), strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
        torch.testing.assert_close(linalg.clip_spectrum(A, 0.1), linalg.clip_spectrum(A.contiguous(), 0.1))


def test_input_is_not_written(backend):
    A = torch.randn(6, 6)
    before = A.clone()
    results = [*linalg.svd(A), *linalg.qr(A), *linalg.polar(A), linalg.clip_spectrum(A, math.inf)]
    assert torch.equal(A, before)
    assert all(t.data_ptr() != A.data_ptr() for t in results)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_in_float32(backend, dtype):
    A = torch.randn(8, 5).to(dtype)
    assert torch.equal(linalg.svd(A).sigma, linalg.svd(A.float()).sigma.to(dtype))
    assert linalg.qr(A).Q.dtype == linalg.clip_spectrum(A, 0.1).dtype == dtype


def test_autocast_has_no_effect(backend):
    A = torch.randn(20, 20)

    def everything():
        return linalg.clip_spectrum(A, 0.1), *linalg.svd(A), *linalg.qr(A), *linalg.polar(A), linalg.cond(A)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = everything()
    outside = everything()
    for a, b in zip(inside, outside, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_input_is_named(backend, value):
    A = torch.randn(3, 4, 4)
    A[1, 2, 3] = value
    for fn in (linalg.svd, linalg.qr, linalg.polar, lambda A: linalg.clip_spectrum(A, 0.1), linalg.cond):
        with pytest.raises(errors.NonFiniteError, match=r"A must be finite, got NaN or Inf in matrix \[1\] \(1 of 3\)"):
            fn(A)


def test_cond(backend):
    sigma = torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64)
    A = torch.stack(
        [with_spectrum(sigma, 5, 3), torch.zeros(5, 3), with_spectrum(sigma * torch.tensor([1, 1, 0]), 5, 3)]
    )
    kappas = linalg.cond(A)
    torch.testing.assert_close(kappas[0], torch.tensor(4.0, dtype=torch.float64))
    assert kappas[1] == math.inf and kappas[2] > 1e15


def test_nan_under_vmap_stays_nan(backend):
    A = torch.eye(3).repeat(2, 1, 1)
    A[1, 0, 0] = math.nan
    kappas = torch.vmap(linalg.cond)(A)
    assert kappas[0] == 1 and kappas[1].isnan()


def test_threads_do_not_change_the_result(backend):
    A = torch.randn(7, 70, 66) if backend == "cpu" else torch.randn(7, 20, 12)  # LAPACK splits large ones
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append([*linalg.svd(A), *linalg.qr(A), linalg.clip_spectrum(A, 0.1)])
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_float32_error_is_no_worse_than_lapacks(backend):
    """Against float64: at most twice the error of torch.linalg in float32, over many matrices."""
    ours, theirs = [], []
    for n in (5, 17, 33, 64):
        for _ in range(10):
            A = with_spectrum(SPECTRA["random"](n), n, n)
            exact = singular_values(A.float())
            U, sigma, V = linalg.svd(A.float())
            ours.append((sigma.double() - exact).abs().max() + ((U * sigma) @ V.mT - A.float()).abs().max())
            U, sigma, Vh = torch.linalg.svd(A.float())
            theirs.append((sigma.double() - exact).abs().max() + ((U * sigma) @ Vh - A.float()).abs().max())
    assert torch.stack(ours).mean() <= 2 * torch.stack(theirs).mean()


@pytest.mark.parametrize(
    "call,error,text",
    [
        (lambda: linalg.svd(torch.randn(3)), errors.ShapeError, r"linalg.svd: A must have at least two dimensions"),
        (lambda: linalg.svd(torch.ones(3, 3, dtype=torch.int32)), TypeError, "real floating-point tensor, got torch.int32"),
        (lambda: linalg.qr([[1.0]]), TypeError, "linalg.qr: A must be a real floating-point tensor, got list"),
        (lambda: linalg.clip_spectrum(torch.eye(2), -0.1), ValueError, "tau must be a number >= 0 .* got -0.1"),
        (lambda: linalg.clip_spectrum(torch.eye(2), math.nan), ValueError, "tau must be a number >= 0"),
        (lambda: linalg.clip_spectrum(torch.eye(2), 0.1, "media"), ValueError, "band must be one of rms, mean, optimal, got 'media'"),
        (lambda: linalg.clip_spectrum(torch.eye(2), 0.1, sigma_max=0), ValueError, "sigma_max must be None or a number > 0, got 0"),
        (lambda: linalg.cond(torch.ones(0, 3)), errors.ShapeError, "must have rows and columns"),
    ],
)  # fmt: skip
def test_bad_input(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_orthonormal_helper():
    assert non_orthonormality(orthonormal(9, 4)) < 1e-14


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cond_of_low_precision_is_that_of_the_same_numbers(dtype):
    """Their largest singular value may be more than float16 holds."""
    A = (3000 * torch.randn(200, 200)).to(dtype)
    torch.testing.assert_close(linalg.cond(A), linalg.cond(A.float()), rtol=0, atol=0)
