"""The Triton qr in Triton's interpreter: invariants on all kinds of matrices against LAPACK, and outcomes."""

import math
from itertools import product

import pytest
import torch
from helpers.kernels import ON_CPU, host_waits, run_on_cpu
from helpers.matrices import SPECTRA, backward_error, non_orthonormality, with_spectrum

from condlr_ext.kernels.status import NOT_FINITE, OK
from condlr_ext.kernels.triton import devices

pytestmark = ON_CPU
if run_on_cpu():
    from condlr_ext.kernels.triton.qr import cholesky_qr
    from condlr_ext.kernels.triton.qr import launch as qr
    from condlr_ext.kernels.triton.runtime import launching

DTYPES = [torch.float32, torch.float64]


def residual(A, Q, R):
    """‖Q R - A‖ / ‖A‖ in float64, for each matrix."""
    A = A.double()
    error = torch.linalg.matrix_norm(Q.double() @ R.double() - A)
    return error / torch.linalg.matrix_norm(A).clamp_min(1e-300)


def check(A, Q, R):
    """The invariants, each within what a backward stable method may be off by."""
    bound = backward_error(A.dtype, *A.shape[-2:])
    assert residual(A, Q, R).max() <= bound
    assert max(non_orthonormality(q) for q in Q.reshape(-1, *Q.shape[-2:])) <= bound
    assert (R.tril(-1) == 0).all() and (R.diagonal(dim1=-2, dim2=-1) >= 0).all()


@pytest.mark.ptx
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "m,n", [(1, 1), (1, 4), (3, 3), (17, 5), (40, 16), (70, 35), (20, 45), pytest.param(33, 33, marks=pytest.mark.slow)]
)
def test_all_spectra(m, n, dtype):
    k = min(m, n)
    A = torch.stack([with_spectrum(sigma(k), m, n) for sigma in SPECTRA.values()]).to(dtype)
    Q, R, info = qr.qr(A)
    assert Q.shape == (len(SPECTRA), m, k) and R.shape == (len(SPECTRA), k, n)
    assert (info == OK).all() and info.dtype == torch.int32
    check(A, Q, R)
    full = list(SPECTRA).index("random")
    assert (R[full].diagonal() > 0).all()


@pytest.mark.parametrize("low", [-520, -530])
def test_short_columns(low):
    """Their squares are no numbers of float64."""
    A = torch.randn(1, 9, 6, dtype=torch.float64) * torch.exp2(torch.linspace(0, low, 6, dtype=torch.float64))
    A[:, :, 4] = A[:, :, 5] * 3  # too close for Cholesky's factor
    Q, R, info = qr.qr(A)
    assert (info == OK).all()
    check(A, Q, R)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m,n,condition", [(60, 20, 1e2), (60, 20, 1e4), (60, 20, 1e6), (33, 33, 1e6), (90, 33, 1e9)])
def test_error_is_no_worse_than_lapacks(m, n, condition, dtype):
    """Over ill-conditioned matrices at most twice the largest error of torch.linalg.qr, which is Householder's."""
    A = with_spectrum(torch.logspace(0, -math.log10(condition), n, dtype=torch.float64), m, n)[None].to(dtype)
    Q, R, info = qr.qr(A)
    Q_theirs, R_theirs = torch.linalg.qr(A)
    assert (info == OK).all() and (R.diagonal(dim1=-2, dim2=-1) > 0).all()
    assert max(map(non_orthonormality, Q)) <= 2 * max(map(non_orthonormality, Q_theirs))
    assert residual(A, Q, R).max() <= 2 * residual(A, Q_theirs, R_theirs).max()


@pytest.mark.skipif(not devices.INTERPRETED, reason="kept launches pass the recorder by")
def test_cholesky_does_what_it_can(monkeypatch):
    """Up to 1e6 in float32 and 1e2 in float64 nothing is left to the slow way, beyond everything is."""
    seen = []
    monkeypatch.setattr(cholesky_qr, "rescue", Recorder(cholesky_qr.rescue, seen))
    for dtype, condition in product(DTYPES, (1e2, 1e6, 1e12)):
        A = with_spectrum(torch.logspace(0, -math.log10(condition), 20, dtype=torch.float64), 80, 20).to(dtype)
        qr.qr(A[None])
    late = cholesky_qr.RESCUE.value
    assert seen == [OK, OK, late, OK, late, late]


class Recorder:
    """A kernel that notes the state it finds."""

    def __init__(self, kernel, seen):
        self.kernel, self.seen, self.fn = kernel, seen, kernel.fn

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.seen += args[6].tolist()
            return self.kernel[grid](*args, **options)

        return launch


@pytest.mark.parametrize(
    "dtype,scale",
    [(torch.float32, 1e20), (torch.float32, 1e-20), (torch.float64, 1e200), (torch.float64, 1e-200)],
    ids=str,
)
@pytest.mark.parametrize("kind", ["random", "rank_deficient"])
def test_scale_does_not_matter(kind, dtype, scale):
    A = scale * with_spectrum(SPECTRA[kind](9), 30, 9)
    A = A.to(dtype)
    Q, R, info = qr.qr(A)
    assert info == OK
    check(A / scale, Q, R / scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_and_zero_columns(dtype):
    A = torch.randn(3, 24, 6, dtype=dtype)
    A[0, :, 3] = A[0, :, 1]
    A[1, :, 0] = A[1, :, 4] = 0
    A[2] = A[2, :, :1]
    Q, R, info = qr.qr(A)
    assert (info == OK).all()
    check(A, Q, R)


@pytest.mark.ptx
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("m,n", [(20, 7), (7, 20)])
def test_non_finite_matrices_are_flagged_alone(m, n, value):
    A = torch.randn(3, m, n)
    A[1, m - 1, 2] = value
    Q, R, info = qr.qr(A)
    assert info.tolist() == [OK, NOT_FINITE, OK]
    assert Q[1].isnan().all() and R[1].isnan().all()
    check(A[::2], Q[::2], R[::2])


@pytest.mark.parametrize("m,n", [(0, 3), (3, 0), (0, 0), (5, 2)])
@pytest.mark.parametrize("batch", [(), (0,), (2, 0), (2, 1)])
def test_batches_and_empties(batch, m, n):
    A = torch.randn(*batch, m, n)
    Q, R, info = qr.qr(A)
    k = min(m, n)
    assert Q.shape == (*batch, m, k) and R.shape == (*batch, k, n) and info.shape == batch
    assert (info == OK).all()
    if A.numel():
        check(A, Q, R)


@pytest.mark.ptx
def test_strides_and_the_rest_of_the_batch_do_not_matter():
    base = torch.randn(2, 9, 14)
    for A in (base.mT, base[:, ::2, 1::3], base.transpose(0, 1), base.expand(3, 2, 9, 14)[:, 1]):
        Q, R, _ = qr.qr(A)
        for i, a in enumerate(A):
            for batched, alone in zip((Q[i], R[i]), qr.qr(a.contiguous())[:2], strict=True):
                assert torch.equal(batched, alone)


def test_the_input_is_not_written():
    A = torch.stack([torch.randn(12, 5), torch.zeros(12, 5)])
    before = A.clone()
    qr.qr(A)
    assert torch.equal(A, before)


@pytest.mark.ptx
def test_long_sums_are_split():
    """More rows than one program sums, and the same bits every time."""
    A = torch.randn(700, 5)
    assert len(qr._plan(1, 700, 5, A.device).gram_work) > 1
    Q, R, _ = qr.qr(A)
    check(A, Q, R)
    again = qr.qr(A)
    assert torch.equal(Q, again[0]) and torch.equal(R, again[1])


def test_the_host_does_not_wait():
    for module in (qr, launching):
        assert host_waits(module) == [], module
