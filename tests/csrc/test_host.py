"""The C++ core through _core.so, at every instruction set of this machine, against NumPy in float64."""

import functools
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

if os.environ.get("CONDLR_EXT_BUILD") == "none":
    pytest.skip("built without compiled parts", allow_module_level=True)
from helpers import host  # noqa: E402

from condlr_ext import _native  # noqa: E402

DATA = Path(__file__).parents[1] / "data"
ISAS = host.isa_levels()
DTYPES = [np.float32, np.float64]
UNIT = {np.float32: 2.0**-24, np.float64: 2.0**-53}  # half a unit in the last place
SQUARE = [(r, r) for r in (1, 2, 3, 5, 8, 16, 17, 32, 33, 64, 100, 128)]
SHAPES = [*SQUARE, (300, 17), (17, 300), (131, 64), (64, 131), (40, 1), (1, 40), (9, 8), (8, 9)]
INF = math.inf

SPECTRA = {
    "random": lambda k: np.sort(rng(k).uniform(0.1, 1.1, k))[::-1],
    "graded": lambda k: np.logspace(0, -12, k),
    "clustered": lambda k: 1 + 1e-7 * np.linspace(1, 0, k) * (np.arange(k) < (k + 1) // 2),
    "repeated": lambda k: np.ones(k),
    "two_values": lambda k: np.where(np.arange(k) < (k + 1) // 2, 1.1, 1.0),
    "rank_deficient": lambda k: np.linspace(2, 1, k) * (np.arange(k) < (k + 1) // 2),
    "zero": np.zeros,
}


def rng(*seed):
    return np.random.default_rng(seed)


@functools.cache
def orthonormal(m, k, *seed):
    return np.linalg.qr(rng(m, k, *seed).standard_normal((m, k)))[0]


def with_spectrum(sigma, m, n, dtype=np.float64):
    k = min(m, n)
    return ((orthonormal(m, k, 1) * sigma) @ orthonormal(n, k, 2).T).astype(dtype)


def f64(*arrays):
    return arrays[0].astype(np.float64) if len(arrays) == 1 else [a.astype(np.float64) for a in arrays]


def off_orthonormal(X):
    X = f64(X)
    return np.abs(X.T @ X - np.eye(X.shape[1])).max(initial=0)


def tolerance(dtype, *sizes):
    """Return the error that rounding may cause, relative to the norm of the matrix.

    float64: a backward stable method, a few units per entry that add up like a random walk. float32 is
    computed in float64 and stored: three factors, each entry half a unit off, move their product by 3 such
    units at most.
    """
    in_double = 8 * np.finfo(np.float64).eps * max(math.sqrt(max(sizes)), 4)
    return in_double if dtype == np.float64 else 3 * UNIT[np.float32] + in_double


def sigma_of(A):
    return np.linalg.svd(f64(A), compute_uv=False)


def kappa(A):
    sigma = sigma_of(A)
    return sigma[0] / sigma[-1]


# ---- svd, qr, polar


def check_svd(A, isa):
    m, n = A.shape
    k = min(m, n)
    U, sigma, V, info = host.svd(A, isa=isa)
    assert info == 0 and U.shape == (m, k) and sigma.shape == (k,) and V.shape == (n, k)
    assert U.dtype == sigma.dtype == V.dtype == A.dtype
    assert (sigma >= 0).all() and (np.diff(sigma) <= 0).all()
    bound = tolerance(A.dtype.type, m, n)
    assert off_orthonormal(U) <= bound and off_orthonormal(V) <= bound
    exact = sigma_of(A)
    norm = np.linalg.norm(exact)
    U, sigma, V = f64(U, sigma, V)
    assert np.linalg.norm((U * sigma) @ V.T - f64(A)) <= bound * norm
    assert np.abs(sigma - exact).max(initial=0) <= bound * norm


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", SPECTRA)
def test_svd(kind, dtype, isa):
    for m, n in SHAPES:
        check_svd(with_spectrum(SPECTRA[kind](min(m, n)), m, n, dtype), isa)


@pytest.mark.parametrize("dtype", DTYPES)
def test_svd_of_256(dtype):
    check_svd(rng(256).standard_normal((256, 256)).astype(dtype), None)


def test_svd_is_as_accurate_as_lapack():
    """Residual and orthonormality in float64, summed over shapes: at most twice those of LAPACK."""
    ours, lapack = np.zeros(3), np.zeros(3)
    for m, n in SHAPES:
        A = rng(m, n).standard_normal((m, n))
        U, sigma, V, _ = host.svd(A)
        factors = [(ours, U, sigma, V)]
        U, sigma, Vt = np.linalg.svd(A, full_matrices=False)
        factors.append((lapack, U, sigma, Vt.T))
        for total, U, sigma, V in factors:
            residual = np.linalg.norm((U * sigma) @ V.T - A) / np.linalg.norm(A)
            total += [residual, off_orthonormal(U), off_orthonormal(V)]
    assert (ours <= 2 * lapack).all(), (ours, lapack)


def scaled_columns(m, n, kappa):
    """Short columns, as LAPACK's SVD treats well and a Gram matrix badly."""
    return rng(m, n).standard_normal((m, n)) * np.logspace(0, -math.log10(kappa), n)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kappa", [1e3, 1e6, 1e12, 1e30])
def test_svd_at_many_scales(kappa, dtype, isa):
    """Eigenvectors of the Gram matrix, again for what is short beside it, rotations for the rest, null columns."""
    for m, n in ((9, 9), (24, 24), (100, 65)):
        A = scaled_columns(m, n, kappa).astype(dtype)
        A[:, 3] = 0
        for B in (A, A.T):
            check_svd(B, isa)
            Q, info = host.polar(B, isa=isa)
            assert info == 0 and off_orthonormal(Q if B is A else Q.T) <= tolerance(dtype, m, n)


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("dtype", DTYPES)
def test_svd_of_200(dtype, kind):
    check_svd(with_spectrum(SPECTRA[kind](200), 200, 200, dtype), None)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("log_kappa", [1, 3, 5, 7, 9, 14])
def test_qr_of_any_condition(log_kappa, dtype, isa):
    """One pass of Cholesky-QR, two, three, Householder; short columns cost no pass and no digit."""
    for m, n in ((65, 65), (130, 40)):
        bound = tolerance(dtype, m, n)
        A = with_spectrum(np.logspace(0, -log_kappa, n), m, n)
        for B in (A, A * np.logspace(0, -20, n)):
            B = B.astype(dtype)
            Q, R, info = host.qr(B, isa=isa)
            assert info == 0 and off_orthonormal(Q) <= bound
            # column by column: Householder is backward stable in each
            residual = np.linalg.norm(f64(Q) @ f64(R) - f64(B), axis=0)
            assert (residual <= bound * np.linalg.norm(f64(B), axis=0) + np.finfo(dtype).tiny).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "dtype,scale", [(np.float32, 1e30), (np.float32, 1e-30), (np.float64, 1e200), (np.float64, 1e-200)]
)
def test_extreme_scales(dtype, scale, isa):
    """A power of two scales first: nothing overflows, underflows or loses a digit."""
    for m, n in ((17, 17), (40, 9), (9, 40)):
        A = (scale * with_spectrum(SPECTRA["random"](min(m, n)), m, n)).astype(dtype)
        k, bound = min(m, n), tolerance(dtype, m, n)
        U, sigma, V, info = host.svd(A, isa=isa)
        U, sigma, V = f64(U, sigma / dtype(scale), V)
        B = f64(A / dtype(scale))
        assert info == 0 and max(off_orthonormal(U), off_orthonormal(V)) <= bound
        assert np.linalg.norm((U * sigma) @ V.T - B) <= (bound + 4 * UNIT[dtype]) * np.linalg.norm(B)
        Q, R, info = host.qr(A, isa=isa)
        assert info == 0 and off_orthonormal(Q) <= bound
        assert np.linalg.norm(f64(Q) @ f64(R / dtype(scale)) - B) <= (bound + 4 * UNIT[dtype]) * np.linalg.norm(B)
        Q, info = host.polar(A, isa=isa)
        assert info == 0 and off_orthonormal(Q if m >= n else Q.T) <= bound
        out, info = host.clip_spectrum(A, 0.5, isa=isa)
        assert info == 0 and kappa(out / dtype(scale)) <= 1.5 * (1 + 5e-6)
        assert host.svd(np.zeros((k, k), dtype) + np.finfo(dtype).smallest_subnormal, isa=isa)[3] == 0


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", SPECTRA)
def test_qr(kind, dtype, isa):
    for m, n in SHAPES:
        k = min(m, n)
        A = with_spectrum(SPECTRA[kind](k), m, n, dtype)
        Q, R, info = host.qr(A, isa=isa)
        assert info == 0 and Q.shape == (m, k) and R.shape == (k, n) and Q.dtype == R.dtype == dtype
        bound = tolerance(dtype, m, n)
        assert off_orthonormal(Q) <= bound
        assert np.linalg.norm(f64(Q) @ f64(R) - f64(A)) <= bound * np.linalg.norm(f64(A))
        assert (R.diagonal() >= 0).all() and (np.tril(R, -1) == 0).all()


def test_qr_is_the_sign_fixed_qr():
    """At full rank R is unique; LAPACK's, signed, agrees to the condition of the matrix (at most 11 here)."""
    for m, n in ((30, 12), (12, 12), (12, 30)):
        A = with_spectrum(SPECTRA["random"](12), m, n)
        Q, R, _ = host.qr(A)
        q, r = np.linalg.qr(A)
        sign = np.sign(r.diagonal())
        bound = 11 * (11 if m < n else 1) * tolerance(np.float64, m, n)
        assert np.abs(Q - q * sign).max() <= bound * np.linalg.norm(A)
        assert np.abs(R - r * sign[:, None]).max() <= bound * np.linalg.norm(A)


def test_qr_of_a_zero_column_keeps_the_sign_plus():
    A = np.diag([2.0, 0.0, -3.0])
    Q, R, info = host.qr(A)
    assert info == 0
    np.testing.assert_array_equal(Q, np.diag([1.0, 1.0, -1.0]))
    np.testing.assert_array_equal(R, np.diag([2.0, 0.0, 3.0]))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", SPECTRA)
def test_polar(kind, dtype, isa):
    """Q orthonormal, and QᵀA (or A Qᵀ) symmetric positive semidefinite, which makes Q the polar factor."""
    for m, n in SHAPES:
        A = with_spectrum(SPECTRA[kind](min(m, n)), m, n, dtype)
        Q, info = host.polar(A, isa=isa)
        assert info == 0 and Q.shape == A.shape and Q.dtype == dtype
        bound = tolerance(dtype, m, n)
        assert off_orthonormal(Q if m >= n else Q.T) <= bound
        H = f64(Q).T @ f64(A) if m >= n else f64(A) @ f64(Q).T
        norm = np.linalg.norm(f64(A))
        assert np.linalg.norm(H - H.T) <= 2 * bound * norm
        assert np.linalg.eigvalsh((H + H.T) / 2).min() >= -bound * norm


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_non_finite_matrices_are_flagged(dtype, bad, isa):
    for m, n in ((5, 3), (3, 5), (1, 1)):
        A = rng(m, n).standard_normal((m, n)).astype(dtype)
        A[-1, -1] = bad
        for op in (host.svd, host.qr, host.polar):
            *outputs, info = op(A, isa=isa)
            assert info == 2 and all(np.isnan(out).all() for out in outputs)
        out, info = host.clip_spectrum(A, 0.1, isa=isa)
        assert info == 2
        np.testing.assert_array_equal(out, A)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m,n", [(0, 3), (3, 0), (0, 0)])
def test_empty_matrices(m, n, dtype):
    A = np.zeros((m, n), dtype)
    assert [x.shape for x in host.svd(A)[:3]] == [(m, 0), (0,), (n, 0)] and host.svd(A)[3] == 0
    assert [x.shape for x in host.qr(A)[:2]] == [(m, 0), (0, n)] and host.qr(A)[2] == 0
    for out, info in (host.polar(A), host.clip_spectrum(A, 0.1)):
        assert out.shape == (m, n) and info == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_do_not_matter(dtype):
    big = rng(7).standard_normal((40, 60)).astype(dtype)
    for view in (
        big.T,
        big[::2, ::3],
        big[::-1, 5:9],
        np.asfortranarray(big),
        np.broadcast_to(big[:1], (4, 60)),
    ):
        for op in (host.svd, host.qr, host.polar, lambda A: host.clip_spectrum(A, 0.1)):
            for got, expected in zip(op(view), op(np.ascontiguousarray(view)), strict=True):
                np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["clamped_core_raises", "clamped_core_nan"])
def test_cores_that_break_lapack(name, isa):
    A = np.load(DATA / f"{name}.npy")
    bound = tolerance(np.float32, 128)
    U, sigma, V, info = host.svd(A, isa=isa)
    assert info == 0 and max(off_orthonormal(U), off_orthonormal(V)) <= bound
    assert np.linalg.norm((f64(U) * f64(sigma)) @ f64(V).T - f64(A)) <= bound * np.linalg.norm(f64(A))
    Q, info = host.polar(A, isa=isa)
    assert info == 0 and off_orthonormal(Q) <= bound
    out, info = host.clip_spectrum(A, 0.0, isa=isa)
    lambdas = np.linalg.eigvalsh(f64(out).T @ f64(out))  # not by the SVD that fails
    assert info == 0 and math.sqrt(lambdas[-1] / lambdas[0]) <= 1 + 5e-6


# ---- clip_spectrum


def band_of(sigma, tau, band, sigma_max=INF):
    """The band by its definition; the optimal one by bisection on its increasing equation."""
    c = 1 + tau
    if tau == INF or len(sigma) == 1:
        lo, hi = 0.0, INF
    elif band == 2:
        if sigma[0] <= c * sigma[-1]:
            lo = sigma[-1]
        else:
            left, right = sigma[-1], sigma[0]
            for _ in range(200):
                a = (left + right) / 2
                g = np.maximum(a - sigma, 0).sum() - c * np.maximum(sigma - c * a, 0).sum()
                left, right = (a, right) if g < 0 else (left, a)
            lo = (left + right) / 2
        hi = c * lo
    else:
        s = sigma.mean() if band == 1 else math.sqrt((sigma**2).mean())
        e = tau * s / (2 + tau)
        lo, hi = s - e, s + e
    if hi > sigma_max:
        lo, hi = (0.0 if hi == INF else lo * sigma_max / hi), sigma_max
    return lo, hi


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("band", [0, 1, 2])
@pytest.mark.parametrize("kind", [k for k in SPECTRA if k != "zero"])
def test_clip(kind, band, dtype, isa):
    """The result is A with clipped singular values; kappa <= 1 + tau survives storage at a large tau too."""
    for (m, n), tau in itertools.product([(2, 2), (17, 17), (64, 64), (40, 9), (9, 40)], [0, 0.1, 0.5, 30, 1e6]):
        A = with_spectrum(SPECTRA[kind](min(m, n)), m, n, dtype)
        for sigma_max in (INF, 0.7):
            out, info = host.clip_spectrum(A, tau, band, sigma_max, isa=isa)
            assert info == 0 and out.dtype == dtype
            U, sigma, Vt = np.linalg.svd(f64(A), full_matrices=False)
            lo, hi = band_of(sigma, tau, band, sigma_max)
            expected = (U * sigma.clip(lo, hi)) @ Vt
            assert kappa(out) <= (1 + tau) * (1 + 5e-6)
            assert sigma_of(out)[0] <= sigma_max * (1 + 5e-6)
            if sigma[-1] > 1e-6:  # else the lifted directions are not unique
                # rounding, and the lower edge's rise by at most what storing the matrix costs
                error = np.linalg.norm(f64(out) - expected)
                assert error <= 2 * math.sqrt(min(m, n)) * tolerance(dtype, m, n) * np.linalg.norm(expected)


CORES = {
    "well_conditioned": lambda k: np.sort(rng(k).uniform(1, 1.3, k))[::-1],
    "repeated": SPECTRA["repeated"],
    "two_values": SPECTRA["two_values"],
    "clustered": SPECTRA["clustered"],
    "just_well_conditioned": lambda k: np.geomspace(2.99, 1, k),
    "just_ill_conditioned": lambda k: np.geomspace(3.01, 1, k),
    "one_small": lambda k: np.r_[np.full(k - 1, 1.0), 1e-3],
    "ill_conditioned": lambda k: np.geomspace(1, 1e-4, k),
    "graded": SPECTRA["graded"],
    "rank_deficient": SPECTRA["rank_deficient"],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", CORES)
@pytest.mark.parametrize("m,n", [(7, 7), (65, 65), (100, 100), (128, 128), (200, 200), (150, 70), (70, 150)])
def test_clip_of_large_cores(m, n, kind, dtype):
    """The bound holds in the arithmetic of the dtype, where kappa allows it, and in double."""
    k = min(m, n)
    A = with_spectrum(CORES[kind](k), m, n, dtype)
    U, sigma, Vt = np.linalg.svd(f64(A), full_matrices=False)
    for tau, band, sigma_max in ((0, 0, INF), (0.1, 0, INF), (0.1, 1, 0.9), (0.1, 2, INF), (INF, 0, 0.8)):
        out, info = host.clip_spectrum(A, tau, band, sigma_max)
        assert info == 0
        lo, hi = band_of(sigma, tau, band, sigma_max)
        after = sigma_of(out)
        assert after[0] <= min(hi, sigma_max) * (1 + 5e-6) + 1e-12
        assert tau == INF or after[0] / after[-1] <= (1 + tau) * (1 + 5e-6)
        if sigma[-1] > 1e-4:
            expected = (U * sigma.clip(lo, hi)) @ Vt
            error = np.linalg.norm(f64(out) - expected)
            assert error <= 2 * math.sqrt(k) * tolerance(dtype, m, n) * np.linalg.norm(expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_clip_at_the_edges_of_the_band(dtype, isa):
    """Singular values on, just inside and just outside an edge: what is in the band by more than rounding returns
    bit for bit, what is out of it by more does not."""
    for k in (5, 33, 100):
        for edge in (1e-5, -1e-5):
            sigma = np.r_[1.5 * (1 + edge), np.linspace(1.4, 1.1, k - 2), 1.0]
            for factor in (1.0, 1e-20):
                A = (factor * with_spectrum(sigma, k, k)).astype(dtype)
                out, info = host.clip_spectrum(A, INF, 0, 1.5 * factor, isa=isa)
                assert info == 0 and np.array_equal(out, A) == (edge < 0)
                assert sigma_of(out)[0] <= 1.5 * factor * (1 + 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_clip_moves_in_band_directions_by_rounding_only(dtype):
    """Correction form: the part of A in the in-band directions is the same to half a unit per entry."""
    sigma = np.concatenate(([3.0], np.linspace(1.04, 0.96, 30), [0.1]))
    A = with_spectrum(sigma, 32, 32, dtype)
    out, _ = host.clip_spectrum(A, 0.5)
    U, s, Vt = np.linalg.svd(f64(A))
    lo, hi = band_of(s, 0.5, 0)
    inside = (s >= lo) & (s <= hi)
    assert inside.sum() == 30
    change = U[:, inside].T @ (f64(out) - f64(A)) @ Vt[inside].T
    assert np.linalg.norm(change) <= 2 * UNIT[dtype] * np.linalg.norm(f64(out)) + 1e-15 * np.linalg.norm(A)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_in_band_matrices_come_back_bit_for_bit(dtype, isa):
    for m, n in ((8, 8), (33, 33), (20, 5), (5, 20)):
        k = min(m, n)
        A = with_spectrum(np.linspace(1.02, 0.98, k), m, n, dtype)
        for tau, band in itertools.product((0.1, 2.0, INF), (0, 1, 2)):
            out, info = host.clip_spectrum(A, tau, band, 2.0, isa=isa)
            assert info == 0
            np.testing.assert_array_equal(out, A)
    # orthogonal matrices times a number: tau = 0 finds nothing to do in float64 either
    for s in (1.0, 0.3):
        A = s * np.eye(9)[rng(0).permutation(9)]
        for band in (0, 1, 2):
            np.testing.assert_array_equal(host.clip_spectrum(A, 0.0, band, isa=isa)[0], A)


@pytest.mark.parametrize("dtype", DTYPES)
def test_clip_of_a_single_singular_value(dtype):
    for shape in ((1, 1), (6, 1), (1, 6)):
        A = rng(*shape).standard_normal(shape).astype(dtype)
        norm = np.linalg.norm(f64(A))
        for band in (0, 1, 2):
            np.testing.assert_array_equal(host.clip_spectrum(A, 0.0, band)[0], A)
            np.testing.assert_array_equal(host.clip_spectrum(A, 0.0, band, 2 * norm)[0], A)
            out, info = host.clip_spectrum(A, 0.0, band, norm / 2)
            assert info == 0 and np.abs(f64(out) - f64(A) / 2).max() <= 2 * UNIT[dtype] * norm


def test_an_all_zero_matrix_is_flagged_and_returned():
    for dtype, shape in itertools.product(DTYPES, ((4, 4), (1, 1), (3, 5))):
        out, info = host.clip_spectrum(np.zeros(shape, dtype), 0.1)
        assert info == 3 and not out.any()


@pytest.mark.parametrize("tau", [0.0, 0.05, 0.5, 3.0])
def test_the_optimal_band_is_the_frobenius_projection(tau):
    """No band [a, (1 + tau) a] is nearer, and its edge solves the stationarity equation; ties, zeros too."""
    c = 1 + tau
    for seed, k in itertools.product(range(8), (2, 3, 7, 20)):
        sigma = np.sort(rng(seed, k).lognormal(0, 1.5, k))[::-1]
        sigma[-1] *= seed % 2
        sigma[: k // 2] = sigma[0] if seed % 3 == 0 else sigma[: k // 2]
        A = np.diag(sigma)
        clipped = np.sort(sigma_of(host.clip_spectrum(A, tau, 2)[0]))[::-1]
        distance = np.linalg.norm(clipped - sigma)
        edges = np.linspace(0, sigma[0], 4001)[:, None]
        brute = np.linalg.norm(sigma.clip(edges, c * edges) - sigma, axis=1).min()
        assert distance <= brute * (1 + 1e-12) + 1e-13
        if sigma[0] > c * sigma[-1]:
            a = clipped[-1]
            low, high = np.maximum(a - sigma, 0).sum(), c * np.maximum(sigma - c * a, 0).sum()
            assert abs(low - high) <= 1e-12 * c * c * sigma.sum()


# ---- the step

U, S, V, BIAS = range(4)
COLUMNS = dict(lr=0.1, momentum=0, dampening=0, weight_decay=0, nesterov=0, maximize=0, fresh=0, precondition=1)
COLUMNS |= dict(tau=0.1, band=0, sigma_max=INF)  # in the order of reference.HYPER


def hyper(**changes):
    return np.tile(np.array([float((COLUMNS | changes)[name]) for name in COLUMNS]), (4, 1))


def numpy_step(params, grads, buffers, rows, dtype):
    """The step by its formulas, in plain NumPy at this dtype. Returns new params and buffers."""
    h = [dict(zip(COLUMNS, row, strict=True)) for row in rows]
    params, grads, buffers = ([np.array(a, dtype) for a in group] for group in (params, grads, buffers))
    new, new_buffers = list(params), list(buffers)
    old_S = params[S]
    for role in (U, S, V, BIAS):
        if grads[role].size == 0:
            continue
        p, o = params[role], h[role]
        d = -grads[role] if o["maximize"] else grads[role]
        if role in (S, BIAS):
            d = d + dtype(o["weight_decay"]) * p
        if o["momentum"]:
            mu = dtype(o["momentum"])
            B = d if o["fresh"] else mu * buffers[role] + dtype(1 - o["dampening"]) * d
            d = d + mu * B if o["nesterov"] else B
            new_buffers[role] = B
        if role in (U, V):
            core = old_S if role == U else old_S.T
            if h[S]["tau"] < INF and np.linalg.matrix_rank(core) < len(core):
                u, sigma, vt = np.linalg.svd(core)
                lo, hi = band_of(f64(sigma), h[S]["tau"], int(h[S]["band"]), h[S]["sigma_max"])
                core = (u * sigma.clip(lo, hi).astype(dtype)) @ vt
            gram = (core @ core.T).astype(np.float64)
            if h[S]["tau"] == INF:
                gram += np.eye(len(gram)) * (1e-6 * np.linalg.norm(f64(core), 2)) ** 2
            D = d - p @ (p.T @ d)
            if o["precondition"]:
                D = D @ np.linalg.inv(gram).astype(dtype)
            q, r = np.linalg.qr(p - dtype(o["lr"]) * D)
            new[role] = q * np.where(r.diagonal() < 0, -1, 1).astype(dtype)
        elif role == S:
            u, sigma, vt = np.linalg.svd(p - dtype(o["lr"]) * d)
            lo, hi = band_of(f64(sigma), o["tau"], int(o["band"]), o["sigma_max"])
            new[role] = (u * sigma.clip(lo, hi)) @ vt
        else:
            new[role] = p - dtype(o["lr"]) * d
    return new, new_buffers


def layer(m, n, r, dtype, seed=0):
    g = rng(m, n, r, seed)
    core = orthonormal(r, r, 3) * g.uniform(1, 1.1, r) @ orthonormal(r, r, 4).T
    params = [orthonormal(m, r, 1), core, orthonormal(n, r, 2), g.standard_normal(m)]
    grads = [g.standard_normal(p.shape) for p in params]
    buffers = [g.standard_normal(p.shape) for p in params]
    return [[np.ascontiguousarray(a, dtype=dtype) for a in group] for group in (params, grads, buffers)]


def check_step(params, grads, buffers, rows, isa=None):
    """Off the float64 result by at most twice what the formulas in plain NumPy at this dtype are off by."""
    dtype = params[U].dtype.type
    inputs = [a.copy() for a in (*params, *grads, *buffers)]
    new, new_buffers, skipped = host.step_layer(params, grads, buffers, rows, isa=isa)
    assert not skipped
    for before, after in zip(inputs, (*params, *grads, *buffers), strict=True):
        np.testing.assert_array_equal(before, after)  # new arrays: the arguments are not written to
    exact = numpy_step(params, grads, buffers, rows, np.float64)
    plain = numpy_step(params, grads, buffers, rows, np.float32)
    for role in (U, S, V, BIAS):
        for got, truth, other in (
            (new[role], exact[0][role], plain[0][role]),
            (new_buffers[role], exact[1][role], plain[1][role]),
        ):
            assert got.dtype == dtype and got.shape == truth.shape
            # The floor: Cholesky-QR rounds a Gram matrix, an inverse, a product and the result. In float64
            # the yardstick is the float32 one scaled by the ratio of the units, and the truth itself is no
            # better than a backward stable method.
            yardstick = np.linalg.norm(other - truth) * UNIT[dtype] / UNIT[np.float32]
            floor = 4 * UNIT[dtype] if dtype == np.float32 else tolerance(dtype, *truth.shape)
            assert np.linalg.norm(got - truth) <= 2 * yardstick + floor * np.linalg.norm(truth), role
    for role in (U, V):
        r = params[S].shape[0]
        assert off_orthonormal(new[role]) <= 8 * UNIT[dtype] * max(math.sqrt(r), 2)
    o = dict(zip(COLUMNS, rows[S], strict=True))
    if grads[S].size and len(params[S]) > 1:
        assert kappa(new[S]) <= (1 + o["tau"]) * (1 + 5e-6) and sigma_of(new[S])[0] <= o["sigma_max"] * (1 + 5e-6)
    return new, new_buffers


RULES = {
    "plain": {},
    "momentum": dict(momentum=0.9),
    "fresh": dict(momentum=0.9, dampening=0.3, fresh=1),
    "dampening": dict(momentum=0.8, dampening=0.3),
    "nesterov": dict(momentum=0.9, nesterov=1),
    "maximize": dict(maximize=1, momentum=0.5),
    "weight_decay": dict(weight_decay=0.1, momentum=0.5),
    "mean_band": dict(band=1, tau=0.5),
    "optimal_band": dict(band=2, tau=0.02),
    "orthogonal": dict(tau=0.0),
    "sigma_max": dict(sigma_max=0.8),
    "free": dict(tau=INF),
    "free_below_a_cap": dict(tau=INF, sigma_max=0.9),
    "long_step": dict(lr=30.0),
    "tiny_step": dict(lr=1e-6),
    "not_preconditioned": dict(precondition=0, momentum=0.9),
    "long_step_not_preconditioned": dict(precondition=0, lr=3.0),
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
def test_step(rule, dtype, isa):
    for m, n, r in ((1, 1, 1), (5, 4, 3), (33, 17, 17), (64, 300, 13), (130, 70, 33)):
        check_step(*layer(m, n, r, dtype), hyper(**RULES[rule]), isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lr", [0.01, 0.3])
def test_step_over_several_blocks_of_rows(lr, dtype, isa):
    """Factors that pass through the cache in pieces, for steps short and long."""
    for m, n, r in ((700, 523, 40), (300, 280, 130)):
        check_step(*layer(m, n, r, dtype), hyper(lr=lr, momentum=0.9), isa)


@pytest.mark.parametrize("direction", ["along", "across"])
def test_drift_does_not_survive_a_step_along_the_factor(direction):
    """Rounding that has piled up in UᵀU comes back through a direction with a large part in the span of U."""
    params, grads, buffers = layer(60, 50, 8, np.float32)
    for role in (U, V):
        params[role] += (1e-5 * rng(role).standard_normal(params[role].shape)).astype(np.float32)
        grads[role] = np.float32(0.5) * params[role] if direction == "along" else np.float32(0.02) * grads[role]
    new, _, skipped = host.step_layer(params, grads, buffers, hyper(lr=1.0))
    assert not skipped and max(off_orthonormal(new[U]), off_orthonormal(new[V])) <= 24 * UNIT[np.float32]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lr", [300.0, 1e5, 1e12])
def test_huge_steps_stay_orthonormal(lr, dtype, isa):
    """The second Cholesky pass, and Householder where even that is not enough."""
    params, grads, buffers = layer(80, 40, 16, dtype)
    new, _, skipped = host.step_layer(params, grads, buffers, hyper(lr=lr), isa=isa)
    assert not skipped
    for role in (U, V):
        assert off_orthonormal(new[role]) <= 8 * UNIT[dtype] * math.sqrt(16)


def test_a_drifting_factor_is_pulled_back():
    """Parameters off the manifold by 4e-5 are orthonormal after one step; those further off are left alone."""
    params, grads, buffers = layer(40, 30, 8, np.float32)
    params[U] *= np.float32(1.00002)
    grads[V][:] = 0
    new, _, skipped = host.step_layer(params, grads, buffers, hyper())
    assert not skipped and max(off_orthonormal(new[U]), off_orthonormal(new[V])) <= 24 * UNIT[np.float32]
    for change in (1.001, np.inf):
        params[V][:, 3] = params[V][:, 2] if change == np.inf else params[V][:, 3] * np.float32(change)
        new, _, skipped = host.step_layer(params, grads, buffers, hyper())
        assert skipped and all(np.array_equal(a, b) for a, b in zip(new, params, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_roles_have_their_own_rates(dtype):
    rows = hyper(momentum=0.9)
    rows[:, 0] = [0.3, 0.01, 0.07, 1.0]
    rows[:, 1] = [0.9, 0.0, 0.5, 0.2]
    check_step(*layer(20, 12, 6, dtype), rows)


@pytest.mark.parametrize("present", [r for n in range(4) for r in itertools.combinations(range(4), n)])
def test_a_role_without_gradient_stays(present):
    params, grads, buffers = layer(12, 10, 4, np.float32)
    for role in set(range(4)) - set(present):
        grads[role] = np.empty(0, np.float32)
    new, new_buffers = check_step(params, grads, buffers, hyper(momentum=0.9, weight_decay=0.1))
    for role in range(4):
        assert np.array_equal(new[role], params[role]) == (role not in present)
        assert np.array_equal(new_buffers[role], buffers[role]) == (role not in present)


def test_a_layer_without_bias_or_momentum_needs_no_arrays_for_them():
    params, grads, buffers = layer(12, 10, 4, np.float64)
    params[BIAS] = grads[BIAS] = np.empty(0)
    check_step(params, grads, [np.empty(0)] * 4, hyper())


def assert_skipped(params, grads, buffers, rows, isa=None):
    new, new_buffers, skipped = host.step_layer(params, grads, buffers, rows, isa=isa)
    assert skipped
    for got, kept in zip((*new, *new_buffers), (*params, *buffers), strict=True):
        np.testing.assert_array_equal(got, kept)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("role", [U, S, V, BIAS])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_non_finite_gradient_leaves_the_layer_alone(bad, role, dtype, isa):
    params, grads, buffers = layer(12, 10, 4, dtype)
    grads[role].flat[-1] = bad
    assert_skipped(params, grads, buffers, hyper(momentum=0.9), isa)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_that_cannot_be_taken_leaves_the_layer_alone(dtype):
    params, grads, buffers = layer(12, 10, 4, dtype)
    rows = hyper(momentum=0.9)

    zero = [0 * p if role == S else p for role, p in enumerate(params)]
    for tau in (0.1, INF):
        assert_skipped(zero, grads, buffers, hyper(momentum=0.9, tau=tau))
    only_S = [g if role == S else np.empty(0, dtype) for role, g in enumerate(grads)]
    assert not host.step_layer(zero, only_S, buffers, rows)[2]  # nothing needs its inverse

    to_zero = [params[S] * dtype(1) if role == S else g for role, g in enumerate(grads)]
    assert_skipped(params, to_zero, buffers, hyper(lr=1.0))  # S - lr dS = 0
    assert_skipped(params, grads, buffers, hyper(lr=float(np.finfo(dtype).max)))  # overflows
    broken = [np.full_like(b, np.nan) if role == BIAS else b for role, b in enumerate(buffers)]
    assert_skipped(params, grads, broken, rows)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zeros", ["one", "half"])
def test_a_singular_core_counts_as_what_it_is_on_the_constraint_set(zeros, dtype, isa):
    """Its zero singular values are lifted in the preconditioner. Many seeds: pivots of a singular Gram matrix vary."""
    for (m, n, r), rule in itertools.product(
        [(5, 4, 2), (9, 7, 3), (12, 10, 4), (64, 30, 17)],
        ["plain", "mean_band", "optimal_band", "orthogonal", "sigma_max"],
    ):
        for seed in range(8):
            params, grads, buffers = layer(m, n, r, dtype, seed)
            core = rng(r, seed).standard_normal((r, r)).astype(dtype)
            k = 1 if zeros == "one" else r // 2
            core[:, r - k :] = core[:, :k]  # exactly singular at either dtype
            params[S] = core
            new, _ = check_step(params, grads, buffers, hyper(**RULES[rule]), isa)
            assert all((new[role] != params[role]).any() for role in (U, S, V))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("r", [2, 4, 16, 64])
def test_an_ill_conditioned_core_is_not_a_singular_one(r, isa):
    """kappa = 1e6 inverts as it is; at a tiny rate the direction is visible, which clipped it would not be."""
    params, grads, buffers = layer(80, 70, r, np.float64)
    rows = hyper(lr=1e-15)
    for sigma in (np.logspace(0, -6, r), np.where(np.arange(r) < r // 2, 1, 1e-6)):
        params[S] = with_spectrum(sigma, r, r)
        new, _, skipped = host.step_layer(params, grads, buffers, rows, isa=isa)
        exact, _ = numpy_step(params, grads, buffers, rows, np.float64)
        assert not skipped
        for role in (U, V):
            moved = np.linalg.norm(exact[role] - params[role])
            # the inverse has condition 1e12: three digits of it survive
            assert moved > 1e-4 and np.linalg.norm(new[role] - exact[role]) <= 1e-3 * moved


def test_a_singular_core_moves_when_nothing_constrains_it():
    """tau = inf damps the inverse with 1e-6 sigma_1; at a tiny rate the direction is visible."""
    params, grads, buffers = layer(12, 10, 4, np.float64)
    params[S] = with_spectrum(np.array([3.0, 2.0, 1.0, 0.0]), 4, 4)
    rows = hyper(tau=INF, lr=1e-14)
    new, _, skipped = host.step_layer(params, grads, buffers, rows)
    exact, _ = numpy_step(params, grads, buffers, rows, np.float64)
    assert not skipped
    for role in (U, V):
        moved = np.linalg.norm(exact[role] - params[role])
        # the inverse has condition 1e12: four digits of it survive
        assert moved > 1e-4 and np.linalg.norm(new[role] - exact[role]) <= 1e-3 * moved


def test_results_repeat_bit_for_bit():
    params, grads, buffers = layer(64, 40, 16, np.float32)
    first, second = (host.step_layer(params, grads, buffers, hyper(momentum=0.9)) for _ in range(2))
    for a, b in zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True):
        np.testing.assert_array_equal(a, b)


# ---- the module itself


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment, timeout=60
    )


LOAD = f"""
import importlib.util, sys
sys.modules["torch"] = None  # importing it raises
spec = importlib.util.spec_from_file_location("_native", {_native.__file__!r})
host = importlib.util.module_from_spec(spec)
spec.loader.exec_module(host)
"""


def test_it_loads_without_torch():
    assert python(LOAD + "print(host.isa_levels())").stdout.strip() == str(ISAS)


@pytest.mark.parametrize("isa", ISAS)
def test_the_environment_lowers_the_instruction_set(isa):
    assert python(LOAD + "print(host.isa())", CONDLR_EXT_ISA=isa).stdout.strip() == isa


def test_an_unknown_instruction_set_is_an_error():
    result = python(LOAD + "host.isa()", CONDLR_EXT_ISA="sse9")
    assert result.returncode != 0 and "got 'sse9' (from the environment variable CONDLR_EXT_ISA)" in result.stderr
    with pytest.raises(ValueError, match="must be one this machine runs .*baseline.*, got 'sse9'"):
        host.svd(np.eye(2), isa="sse9")


def test_build_info():
    info = host.build_info()
    assert (
        int(info["cxx_standard"]) >= 201703
        and info["torch_target"] == "2.10"
        and info["compiler"]
        and info["build_type"]
    )
    assert "-ffast-math" not in info["cxx_flags"] and "-march=native" not in info["cxx_flags"]
    assert set(ISAS) <= set(info["isa_levels"]) and ISAS[0] == "baseline" and host.isa() in ISAS
    assert all(isinstance(present, bool) for present in host.cpu_features().values())


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: host.svd(np.eye(2, dtype=int)), "svd: A must be float32 or float64, got int64"),
        (lambda: host.qr(np.zeros(3)), r"qr: A must be a matrix, got float64 of shape \(3,\)"),
        (lambda: host.polar(np.zeros((2, 2, 2))), r"polar: A must be a matrix, .*\(2, 2, 2\)"),
        (
            lambda: host.clip_spectrum(np.eye(2), -0.1),
            "clip_spectrum: tau must be >= 0 .*, got -0.1",
        ),
        (lambda: host.clip_spectrum(np.eye(2), math.nan), "clip_spectrum: tau must be >= 0 .*, got nan"),
        (lambda: host.clip_spectrum(np.eye(2), 0.1, 3), "clip_spectrum: band must be 0 .*, got 3"),
        (
            lambda: host.clip_spectrum(np.eye(2), 0.1, 0, 0.0),
            "clip_spectrum: sigma_max must be > 0 .*, got 0",
        ),
    ],
)
def test_bad_matrices_and_settings_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def changed(group, role, value):
    def change(groups):
        groups[group][role] = value(groups[group][role])

    return change


@pytest.mark.parametrize(
    "change,message",
    [
        (changed(0, U, lambda a: a[:3]), "r <= m, n"),
        (changed(0, S, lambda a: a[:3]), "U, S, V must be"),
        (changed(1, V, lambda a: a[:3]), "grads must have the shapes of params, got float32"),
        (changed(2, V, lambda a: a[:3]), "momentum_buffers must have the shapes of params, got float32"),
        (changed(1, S, lambda a: a.astype(np.float64)), "grads must have the dtype of U, got float64"),
        (lambda groups: groups[1].pop(), "grads must be the arrays of U, S, V and bias, got 3"),
    ],
)
def test_bad_layers_are_refused(change, message):
    groups = layer(12, 10, 4, np.float32)
    change(groups)
    with pytest.raises(ValueError, match=message):
        host.step_layer(*groups, hyper(momentum=0.9))


@pytest.mark.parametrize("column,value", [("tau", -1.0), ("band", 3.0), ("band", 0.5), ("sigma_max", 0.0)])
def test_bad_hyperparameters_are_refused(column, value):
    with pytest.raises(ValueError, match=f"step_layer: {column} must be"):
        host.step_layer(*layer(12, 10, 4, np.float32), hyper(**{column: value}))
