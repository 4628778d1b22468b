"""svd, polar and clip_spectrum by Triton kernels, in Triton's interpreter: TRITON_INTERPRET=1 pytest -m interpreter."""

import ast
import inspect
import math

import numpy as np
import pytest
import torch
from helpers.matrices import SPECTRA, kappa, non_orthonormality, orthonormal, singular_values, with_spectrum

from condlr_ext import ops, reference
from condlr_ext.kernels import triton as kernels
from condlr_ext.ops.linalg import ALL_ZERO, NOT_CONVERGED, NOT_FINITE, OK

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not kernels.INTERPRETED, reason="needs a process started with TRITON_INTERPRET=1"),
    # lanes that are masked out later hold what uninitialized memory held, here NaN
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
if kernels.INTERPRETED:
    import triton
    import triton.language as tl

    from condlr_ext.kernels.triton.runtime import cooperative
    from condlr_ext.kernels.triton.spectral import bound, jacobi, newton_schulz, product
    from condlr_ext.kernels.triton.spectral import launch as spectral

    @triton.jit
    def is_within(A_ptr, interval_ptr, workspace_ptr, within_ptr, n, WIDE_TILE: tl.constexpr, BLOCK: tl.constexpr):
        p, q = tl.load(interval_ptr), tl.load(interval_ptr + 1)
        other_ptr = workspace_ptr + n * n
        args = A_ptr, n, n, p, q, workspace_ptr, other_ptr, 0, 1, within_ptr, WIDE_TILE, 128, BLOCK
        tl.store(within_ptr, tl.where(newton_schulz.is_within(*args), 1, 0))

    @triton.jit
    def list_steps(out_ptr, least):
        least = tl.cast(least, tl.float64)
        while least < 1 - 2e-4:
            a, b, least = newton_schulz.step(least)
            tl.store(out_ptr, a)
            tl.store(out_ptr + 1, b)
            out_ptr += 2


SLOW = [pytest.param(k, marks=pytest.mark.slow) for k in (32, 48, 64)]
RANKS = [1, 2, 3, 5, 8, 16, 17, 33, *SLOW]
INF = math.inf


def errors(A, U, sigma, V):
    """Of the reconstruction, of the orthonormality of U and V and of sigma, against float64, Frobenius norms."""
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
    """At most twice LAPACK's error at the same dtype; 2 eps √k where LAPACK meets a matrix that it leaves as it is."""
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


def soon_done(sigma):
    """Columns that are orthogonal already, which leaves little to turn."""
    return orthonormal(len(sigma), len(sigma)).float() * sigma


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["random", "two_values", "graded"])
def test_clip_spectrum_of_64(kind):
    A = with_spectrum(SPECTRA[kind](64), 64, 64).float()
    out, info = spectral.clip_spectrum(A, 0.1, 0, INF)
    exact = reference.clip_spectrum(A.double(), 0.1)
    assert info == OK and kappa(out) <= 1.1 * (1 + 5e-6) and (out - exact).norm() <= 1e-6 * exact.norm()


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


def test_clip_spectrum_of_ill_conditioned_cores_is_in_float64():
    A = with_spectrum(torch.logspace(0, -3, 24, dtype=torch.float64), 24, 24).float()
    exact = reference.clip_spectrum(A.double(), 0.1)
    out, _ = spectral.clip_spectrum(A, 0.1, 0, INF)
    assert (out - exact).norm() <= 1.1 * (exact.float() - exact).norm()  # nothing but the rounding of the result


@pytest.mark.parametrize("kind", ["clustered", "two_values", "rank_deficient"])
@pytest.mark.parametrize("m,n", [(17, 17), (32, 48)])
def test_clip_spectrum_of_larger_cores(m, n, kind):
    A = with_spectrum(SPECTRA[kind](min(m, n)), m, n).float()
    out, info = spectral.clip_spectrum(A, 0.1, 0, INF)
    exact = reference.clip_spectrum(A.double(), 0.1)
    assert info == OK and kappa(out) <= 1.1 * (1 + 5e-6) and (out - exact).norm() <= 1e-6 * exact.norm()


def test_clip_spectrum_by_blocks():
    A = soon_done(torch.linspace(2, 1, 70))
    out, info = spectral.clip_spectrum(A, 0.1, 2, INF)
    exact = reference.clip_spectrum(A.double(), 0.1, "optimal")
    assert info == OK and kappa(out) <= 1.1 * (1 + 5e-6) and (out - exact).norm() <= 1e-6 * exact.norm()


@pytest.mark.parametrize("band", range(3))
@pytest.mark.parametrize("tau", [1e4, 1e6, 1e17, 1e200])
def test_clip_spectrum_bound_is_hard_for_large_tau(tau, band):
    A = with_spectrum(torch.logspace(0, -7, 12, dtype=torch.float64), 12, 12).float()
    A[:, 3] = 0
    out, _ = spectral.clip_spectrum(A, tau, band, INF)
    assert kappa(out) <= (1 + tau) * (1 + 5e-6) or tau > 1e6
    assert torch.isfinite(out).all() and (out - A).abs().max() < A.abs().max()


@pytest.mark.parametrize("band", range(3))
@pytest.mark.parametrize("exponent", [0, 20, -20])
def test_clip_spectrum_cap(exponent, band):
    scale = 10.0**exponent
    A = (3 * scale * with_spectrum(SPECTRA["random"](7), 7, 7)).float()
    for tau in (0.1, INF):
        out, _ = spectral.clip_spectrum(A, tau, band, 1.5 * scale)
        exact = reference.clip_spectrum(A.double(), tau, reference.BANDS[band], 1.5 * scale)
        assert (out.double() / scale - exact / scale).norm() <= 1e-6 * (exact / scale).norm()
        assert singular_values(out)[0] <= 1.5 * scale * (1 + 5e-6)


def test_clip_spectrum_leaves_what_is_in_the_band():
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


def test_clip_spectrum_reads_tau_and_sigma_max_on_the_device():
    A = torch.randn(2, 6, 6)
    expected = spectral.clip_spectrum(A, 0.1, 0, 1.5)[0]
    for dtype, shape in ((torch.float64, ()), (torch.float64, (1,))):
        tau, sigma_max = (torch.full(shape, x, dtype=dtype) for x in (0.1, 1.5))
        assert torch.equal(spectral.clip_spectrum(A, tau, 0, sigma_max)[0], expected)


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


def test_a_batch_is_its_matrices_well_conditioned_ill_conditioned_zero_and_non_finite():
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
    A = torch.stack([soon_done(torch.linspace(2, 1, 66))] * 2)
    A[0, 65, 65] = math.nan
    U, sigma, V, info = spectral.svd(A)
    assert info.tolist() == [NOT_FINITE, OK] and all(t[0].isnan().all() for t in (U, sigma, V))
    assert_as_good_as_lapack(A[1], U[1], sigma[1], V[1])


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


def test_reasons_not():
    op = ops.linalg.svd
    assert op.unsupported_reasons("triton", torch.empty(512, 2000)) == []
    assert op.unsupported_reasons("triton", torch.empty(513, 600)) == ["min(m, n) = 513 exceeds 512"]
    assert "float16" in op.unsupported_reasons("triton", torch.empty(3, 3, dtype=torch.float16))[0]


# what a matrix looks like in training, and at the ends of what counts as well_conditioned
TAME = {
    "kappa_10": lambda k: torch.linspace(1, 0.1, k, dtype=torch.float64),
    "outlier": lambda k: torch.where(torch.arange(k) == 0, 1.0, 0.101).double(),
    "equal": lambda k: torch.full((k,), 0.3, dtype=torch.float64),
    "at_both_edges": SPECTRA["two_values"],
    "out_a_little": lambda k: torch.linspace(1.06, 0.94, k, dtype=torch.float64),
    "in_band": lambda k: torch.linspace(1.04, 1.0, k, dtype=torch.float64),
}
LARGER = [(65, 65), *(pytest.param(*shape, marks=pytest.mark.slow) for shape in ((70, 100), (120, 96), (128, 128)))]


def batch_of(spectra, m, n):
    return torch.stack([with_spectrum(spectrum(min(m, n)), m, n) for spectrum in spectra]).float()


@pytest.mark.parametrize("m,n", LARGER)
def test_polar_by_products(m, n, monkeypatch):
    monkeypatch.setattr(spectral, "_svd", None)  # asked for nothing
    A = batch_of(TAME.values(), m, n)
    tall = A if m >= n else A.mT
    Q = torch.full_like(tall, math.nan)
    assert newton_schulz.polar_factor(tall, Q).tolist() == [0] * len(A)
    exact = reference.polar(tall.double())
    theirs = torch.from_numpy(np.stack([u @ v for u, _, v in (np.linalg.svd(a, full_matrices=False) for a in tall)]))
    for q, a, e, t in zip(Q, tall, exact, theirs, strict=True):
        assert non_orthonormality(q) <= 2 * non_orthonormality(t)
        assert (q - e).norm() <= (t - e).norm()  # sums are in float64
        H = q.mT.double() @ a.double()
        assert torch.linalg.eigvalsh((H + H.mT) / 2).min() > 0


@pytest.mark.parametrize("tau,band,sigma_max", [(0.1, 0, INF), (0.0, 1, INF), (1.0, 0, 0.25), (INF, 1, 0.9)])
@pytest.mark.parametrize("m,n", LARGER)
def test_clip_spectrum_by_products(m, n, tau, band, sigma_max):
    A = batch_of(TAME.values(), m, n)
    constraint = torch.tensor([[tau, band, sigma_max]], dtype=torch.float64)
    out = torch.full_like(A, math.nan)
    tall, into = (A, out) if m >= n else (A.mT, out.mT)
    wanted = newton_schulz.clip_spectrum(tall, constraint, torch.zeros(len(A), dtype=torch.int32), into)
    assert wanted.tolist() == [0] * len(A)
    for kind, a, o in zip(TAME, A, out, strict=True):
        exact = reference.clip_spectrum(a.double(), tau, reference.BANDS[band], sigma_max)
        # rounding is relative to what is left or was taken away, of an outlier to its singular value
        scale = 2.5 * exact.norm() if kind == "outlier" else max(a.norm(), exact.norm())
        assert (o - exact).norm() <= 4e-7 * scale, kind
        assert kappa(o) <= (1 + tau) * (1 + 5e-6) and singular_values(o)[0] <= sigma_max * (1 + 5e-6)
        unchanged = kind == "equal" and sigma_max > 0.3 or kind == "in_band" and (tau, sigma_max) == (0.1, INF)
        assert torch.equal(o, a) == unchanged, kind


def test_products_serve_some_matrices_of_a_batch():
    k = 65
    well_conditioned = batch_of([TAME["kappa_10"], TAME["equal"]], k, k)
    A = torch.stack(
        (
            well_conditioned[0],
            soon_done(torch.logspace(0, -3, k)),
            torch.zeros(k, k),
            well_conditioned[1],
            torch.randn(k, k),
        )
    )
    A[4, 3, 60] = math.nan
    out, info = spectral.clip_spectrum(A, 0.1, 0, INF)
    assert info.tolist() == [OK, OK, ALL_ZERO, OK, NOT_FINITE]
    for a, o in zip(A[:2], out[:2], strict=True):
        exact = reference.clip_spectrum(a.double(), 0.1)
        assert (o - exact).norm() <= 4e-7 * exact.norm() and kappa(o) <= 1.1 * (1 + 5e-6)
    assert torch.equal(out[2:4], A[2:4])
    torch.testing.assert_close(out[4], A[4], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("others", ["non-finite", pytest.param("ill_conditioned", marks=pytest.mark.slow)])
def test_polar_of_a_batch_of_which_products_serve_some(others):
    k = 65
    well_conditioned = batch_of([TAME["kappa_10"]], k, k)[0]
    A = torch.stack(
        (
            torch.full((k, k), INF),
            well_conditioned,
            well_conditioned * 1e-20 if others == "ill_conditioned" else well_conditioned,
        )
    )
    if others == "ill_conditioned":
        A[0] = soon_done(torch.logspace(0, -3, k))
    Q, info = spectral.polar(A)
    assert info.tolist() == [OK if others == "ill_conditioned" else NOT_FINITE, OK, OK]
    assert (Q[1] - Q[2]).abs().max() <= 1e-6
    for q, a in zip(Q, A, strict=True):
        if a.isfinite().all():
            H = q.mT.double() @ (a.double() / a.abs().max())
            assert non_orthonormality(q) <= 2e-7 and torch.linalg.eigvalsh((H + H.mT) / 2).min() > -1e-7
        else:
            assert q.isnan().all()


def shifted(spectrum, k, at, by):
    sigma = spectrum(k)
    sigma[at] *= 1 + by
    return with_spectrum(sigma, k, k)


def good_and_bad(k, tau):
    """Matrices with kappa 1 + tau up to rounding, and such that exceed it; p and q of their band."""
    half = lambda k: torch.where(torch.arange(k) < (k + 1) // 2, 1 + tau, 1.0).double()  # noqa: E731
    good = [shifted(half, k, at, by) for at in (0, -1) for by in (0.0, 4e-7, -4e-7)]
    bad = [shifted(half, k, 0, 2.5e-6), shifted(half, k, 0, 1.0)]
    bad += [shifted(half, k, -1, by) for by in (-2.5e-6, -1.0)] if k > 1 else []
    bad += [torch.full((k, k), math.nan, dtype=torch.float64)]
    lo, hi = 1 - 1.5e-6, (1 + tau) * (1 + 1.5e-6)
    return good, bad, torch.tensor([2.0, -(hi * hi + lo * lo)], dtype=torch.float64) / (hi * hi - lo * lo)


@pytest.mark.parametrize("k", [1, 20, 64])
@pytest.mark.parametrize("tau", [0.0, 0.1, 4.0])
def test_check_tells_a_violated_bound_from_rounding(k, tau):
    good, bad, interval = good_and_bad(k, tau)
    A = torch.stack([*good, *bad, *bad])
    interval = interval.repeat(len(A), 1)
    interval[-len(bad) :] = 0  # not checked
    wanted = torch.zeros(len(A), dtype=torch.int32)
    bound.check(A, interval, wanted)
    assert wanted.tolist() == [0] * len(good) + [1] * len(bad) + [0] * len(bad)


@pytest.mark.parametrize("k", [65, pytest.param(96, marks=pytest.mark.slow)])
@pytest.mark.parametrize("tau", [0.0, 0.1, 4.0])
def test_so_do_polynomials(k, tau):
    def check(A, interval):
        within = torch.full((1,), -1)
        is_within[(1,)](A, interval, A.new_empty(2, k, k), within, k, WIDE_TILE=128, BLOCK=16384)
        return within.item()

    good, bad, interval = good_and_bad(k, tau)
    assert [check(A, interval) for A in good] == [1] * len(good)
    assert [check(A, interval) for A in bad] == [0] * len(bad)
    assert check(bad[0], torch.zeros_like(interval)) == 1  # not checked


def test_a_violated_bound_is_repaired(monkeypatch):
    A = batch_of([TAME["out_a_little"]], 20, 20)
    checks, check, multiply = [], bound.check, spectral.product

    def spoilt(X, Y, out, **options):
        """In float32, singular values move nine tenths of the way."""
        if X.dtype == torch.float32 and "weight" in options:
            options["weight"] = options["weight"] * 0.9
        return multiply(X, Y, out, **options)

    def watched(out, interval, wanted):
        check(out, interval, wanted)
        checks.append((kappa(out[0]), wanted.tolist()))

    monkeypatch.setattr(spectral, "product", spoilt)
    monkeypatch.setattr(bound, "check", watched)
    out, info = spectral.clip_spectrum(A, 0.05, 0, INF)
    ((spoilt_kappa, wanted),) = checks
    assert spoilt_kappa > 1.05 * (1 + 5e-6) and wanted == [1]
    exact = reference.clip_spectrum(A.double(), 0.05)
    assert info.tolist() == [OK] and kappa(out[0]) <= 1.05 * (1 + 5e-6) and (out - exact).norm() <= 1e-7 * exact.norm()


def test_a_violated_bound_is_repaired_by_blocks(monkeypatch):
    A = soon_done(TAME["out_a_little"](66).float())[None]
    clip, outcomes = newton_schulz.clip_spectrum, []

    def watched(*args):
        outcomes.append(clip(*args).tolist())
        return torch.tensor(outcomes[-1], dtype=torch.int32)

    monkeypatch.setattr(newton_schulz, "clip_spectrum", watched)
    monkeypatch.setattr(newton_schulz, "SIGN", 0.1)  # steps that stop too early
    with monkeypatch.context() as unchecked:
        unchecked.setattr(newton_schulz, "is_within", lambda *args: True)
        spoilt, _ = spectral.clip_spectrum(A, 0.05, 0, INF)
    assert kappa(spoilt[0]) > 1.05 * (1 + 5e-6)
    out, info = spectral.clip_spectrum(A, 0.05, 0, INF)
    assert outcomes == [[0], [1]]
    exact = reference.clip_spectrum(A.double(), 0.05)
    assert info.tolist() == [OK] and kappa(out[0]) <= 1.05 * (1 + 5e-6) and (out - exact).norm() <= 1e-7 * exact.norm()


def test_steps_take_every_interval_to_one():
    for least in (newton_schulz.POLAR, newton_schulz.SIGN):
        steps = torch.zeros(40, 2, dtype=torch.float64)
        list_steps[(1,)](steps, least)
        steps = steps[steps[:, 0] > 0].tolist()
        x = torch.cat((torch.logspace(math.log10(least), 0, 10001, dtype=torch.float64).clamp_max(1), torch.ones(1)))
        tiny = least * torch.logspace(-6, 0, 100, dtype=torch.float64)
        above = torch.full((1,), 1.002, dtype=torch.float64)  # what rounding may make of 1
        for i, (a, b) in enumerate(steps):
            x, tiny = x * (a - b * x**2), tiny * (a - b * tiny**2)
            assert x.min() > 0 and x.max() <= 1 + 1e-12 and tiny.min() > 0 and tiny.max() <= 1 + 1e-12
            if i == 0:
                assert above * (a - b * above**2) > 0
        assert (1 - x).max() <= 2e-4 and (1 - x * (3 - x**2) / 2).abs().max() <= 1e-7


def test_product_adds_in_float64_where_asked():
    X = torch.randn(1, 40, 3000)
    exact = X.double() @ X.double().mT
    out = product.product(X, X.mT, torch.empty(1, 40, 40, dtype=torch.float64), wide=True)
    torch.testing.assert_close(out, exact, rtol=1e-13, atol=1e-11)


@pytest.mark.parametrize("m,n,k", [(1, 1, 1), (150, 3, 140), (5, 130, 17)])
def test_product(m, n, k):
    X, Y, C, weight = torch.randn(2, m, k), torch.randn(2, n, k).mT, torch.randn(2, n, m).mT, torch.randn(2, k)
    out = product.product(X, Y, torch.empty(2, m, n), C=C, weight=weight, alpha=-0.5, beta=2.0, gamma=1.5)
    expected = -0.5 * (X * weight[:, None]).double() @ Y.double() + 2 * C.double() + 1.5 * torch.eye(m, n)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5)
    C[0, 0, 0] = INF
    kept = torch.full((3, m, n), 7.0)
    mode = torch.tensor([0, 1, 2], dtype=torch.int32)
    X, Y, C, weight = (torch.cat((t, t[:1])) for t in (X, Y, C, weight))
    product.product(X, Y, kept, C=C, weight=weight, mode=mode)
    assert (kept[0] == 7).all() and torch.equal(kept[1], C[1]) and kept[2, 0, 0] == INF


def test_host_code_does_not_wait_for_the_device():
    waits = {"item", "tolist", "cpu", "numpy", "nonzero", "synchronize", "any", "all", "equal", "unique"}
    for module in (spectral, product, bound, newton_schulz, cooperative):
        calls = [node for node in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(node, ast.Call)]
        names = {
            call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "") for call in calls
        }
        assert not names & (waits | {"bool", "float", "int"})
