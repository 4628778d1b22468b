"""The symmetric eigensolver of the C++ core through _core.so, at every instruction set, against NumPy in float64."""

import functools
import os

import numpy as np
import pytest
import torch

if os.environ.get("CONDLR_EXT_BUILD") == "none":
    pytest.skip("built without compiled parts", allow_module_level=True)
from helpers import host  # noqa: E402

ISAS = host.isa_levels()
DTYPES = [np.float32, np.float64]
SIZES = [1, 2, 3, 5, 8, 9, 16, 17, 31, 32, 33, 40, 64, 65, 80, 100, 128]


def rng(*seed):
    return np.random.default_rng(seed)


@functools.cache
def orthogonal(n, seed=0):
    return np.linalg.qr(rng(n, seed).standard_normal((n, n)))[0]


def with_spectrum(values):
    Q = orthogonal(len(values))
    return (Q * values) @ Q.T


def conditioned_core(n, perturbation):
    """SᵀS of a core on the edges of its band (kappa 1.1), moved by one step."""
    sigma = np.concatenate(
        [np.full(n // 5, 1.05), rng(n, 3).uniform(0.955, 1.05, n - n // 5 - n // 4), np.full(n // 4, 0.955)]
    )
    S = (orthogonal(n, 1) * sigma) @ orthogonal(n, 2).T
    step = rng(n, 4).standard_normal((n, n))
    S = S + perturbation * step / max(np.linalg.norm(step, 2), 1e-300)
    return S.T @ S


def wilkinson(n):
    return np.diag(np.abs(np.arange(n) - (n - 1) / 2)) + np.eye(n, k=1) + np.eye(n, k=-1)


def glued(n):
    A = wilkinson(n)
    for i in range(7, n - 1, 7):
        A[i, i + 1] = A[i + 1, i] = 1e-6
    return A


def rank_one(n):
    x = rng(n).standard_normal(n)
    return np.outer(x, x)


MATRICES = {
    "random": lambda n: with_spectrum(rng(n).standard_normal(n)),
    "core_1e-2": lambda n: conditioned_core(n, 1e-2),
    "core_1e-3": lambda n: conditioned_core(n, 1e-3),
    "graded": lambda n: with_spectrum(np.logspace(0, -12, n)),
    "graded_entries": lambda n: with_spectrum(np.ones(n) + np.arange(n)) * np.outer(*[np.logspace(0, -15, n)] * 2),
    "graded_upwards": lambda n: with_spectrum(np.ones(n) + np.arange(n)) * np.outer(*[np.logspace(-15, 0, n)] * 2),
    "clustered": lambda n: with_spectrum(1 + 1e-7 * rng(n).standard_normal(n) * (np.arange(n) < n // 2)),
    "two_values": lambda n: with_spectrum(np.where(np.arange(n) < n // 2, 1.1, -1.0)),
    "zero": lambda n: np.zeros((n, n)),
    "identity": np.eye,
    "diagonal": lambda n: np.diag(rng(n).standard_normal(n)),
    "rank_one": rank_one,
    "all_ones": lambda n: np.ones((n, n)),
    "laplacian": lambda n: 2 * np.eye(n) - np.eye(n, k=1) - np.eye(n, k=-1),
    "wilkinson": wilkinson,
    "glued": glued,
    "huge": lambda n: 1e18 * with_spectrum(rng(n).standard_normal(n)),
    "tiny": lambda n: 1e-18 * with_spectrum(rng(n).standard_normal(n)),
}


def check(A, isa, head=None, tail=0):
    """Backward stability: rounding of n transformations adds up like a random walk, a few units a step."""
    n = len(A)
    values, V, converged = host.eigh(A, head, tail, isa=isa)
    chosen = np.r_[: n if head is None else head, n - tail : n]
    assert converged and values.dtype == V.dtype == A.dtype and V.shape == (len(chosen), n)
    assert (np.diff(values) <= 0).all()
    lower = np.tril(A).astype(np.float64)
    exact = lower + np.tril(lower, -1).T
    eigenvalues = np.linalg.eigvalsh(exact)[::-1]
    norm = np.abs(eigenvalues).max(initial=0)
    tolerance = 4 * np.finfo(A.dtype).eps * max(np.sqrt(n), 4)
    assert np.abs(values - eigenvalues).max() <= tolerance * norm
    V, values = V.astype(np.float64), values.astype(np.float64)
    assert np.abs(V @ V.T - np.eye(len(V))).max(initial=0) <= tolerance
    assert np.linalg.norm(V @ exact - values[chosen, None] * V, axis=1).max(initial=0) <= tolerance * norm


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", MATRICES)
def test_eigh(kind, dtype, isa):
    for n in SIZES:
        check(MATRICES[kind](n).astype(dtype), isa)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", MATRICES)
def test_large(kind, dtype):
    for n in (200, 257):
        check(MATRICES[kind](n).astype(dtype), None, head=n // 3, tail=n // 5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["random", "core_1e-3", "two_values"])
def test_512(kind, dtype):
    check(MATRICES[kind](512).astype(dtype), None)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_small_steps_of_the_root_finder(dtype, isa):
    """Roots in the middle between poles: at a few of these scales a step is small before it has converged."""
    for scale in rng(0).uniform(0.1, 3, 100):
        check((scale * MATRICES["laplacian"](40)).astype(dtype), isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 5, 8, 17, 64, 65, 100])
def test_partial_vectors(n, dtype, isa):
    for kind in ("core_1e-2", "clustered", "wilkinson"):
        for head, tail in ((0, 0), (1, 0), (0, 1), (n // 3, n - n // 3), (n // 4, n // 5)):
            check(MATRICES[kind](n).astype(dtype), isa, head, tail)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["random", "core_1e-3"])
def test_as_accurate_as_lapack(kind, dtype):
    """Residual and orthogonality over many sizes: at most twice those of LAPACK at the same dtype."""
    ours, lapack = np.zeros(2), np.zeros(2)
    for n in range(20, 130, 10):
        A = MATRICES[kind](n).astype(dtype)
        values, V, _ = host.eigh(A)
        w, X = torch.linalg.eigh(torch.from_numpy(A))  # NumPy would compute in float64
        for total, lam, rows in ((ours, values, V), (lapack, w.numpy(), X.numpy().T)):
            rows = rows.astype(np.float64)
            residual = rows @ A.astype(np.float64) - lam.astype(np.float64)[:, None] * rows
            total += np.linalg.norm(residual) / np.linalg.norm(A), np.linalg.norm(rows @ rows.T - np.eye(n))
    assert (ours <= 2 * lapack).all(), (ours, lapack)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_non_finite_matrix_is_refused(bad, dtype, isa):
    for n in (1, 8, 40, 128):
        for i, j in ((0, 0), (n - 1, 0), (n - 1, n - 1), (n // 2, n // 3)):
            A = MATRICES["random"](n).astype(dtype)
            A[i, j] = bad
            assert not host.eigh(A, isa=isa)[2]


@pytest.mark.parametrize("isa", ISAS)
def test_only_the_lower_half_is_read(isa):
    for n in (5, 40):
        check(np.tril(MATRICES["random"](n)) + np.triu(np.full((n, n), np.nan), 1), isa)


def test_results_repeat_bit_for_bit():
    A = MATRICES["core_1e-2"](100).astype(np.float32)
    for first, second in zip(host.eigh(A), host.eigh(A), strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: host.eigh(np.zeros((2, 3))), r"eigh: A must be square, got float64 of shape \(2, 3\)"),
        (lambda: host.eigh(np.eye(3), 2, 2), "at most n = 3 together, got 2 and 2"),
        (lambda: host.eigh(np.eye(3), 1, 2**63 - 1), "at most n = 3 together, got 1 and 9223372036854775807"),
        (lambda: host.eigh(np.eye(3), -1), "must be >= 0 .* got -1 and 0"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
