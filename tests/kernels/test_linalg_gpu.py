"""svd, qr, polar and clip_spectrum by Triton kernels on a CUDA device. Not yet run on one."""

import itertools
import math

import pytest
import torch
from helpers.cuda import DEVICE, captured, litter, never_waiting, on_another_stream
from helpers.matrices import SPECTRA, backward_error, kappa, non_orthonormality, singular_values, with_spectrum

import condlr_ext
from condlr_ext import linalg, ops, reference
from condlr_ext.kernels.status import ALL_ZERO, NOT_FINITE, OK
from condlr_ext.reference import BANDS

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("float32_convolutions")]

DTYPES = [torch.float32, torch.float64]
RANKS = [1, 3, 16, 17, 33, 64, 100, 200]
SCALED = [("random", 1e20), ("random", 1e-20), ("rank_deficient", 1e-20)]
KINDS = [(kind, 1.0) for kind in SPECTRA] + SCALED
SCALES = torch.tensor([scale for _, scale in KINDS], dtype=torch.float64)[:, None, None]


@pytest.fixture(autouse=True)
def by_the_kernels():
    """Calls that the kernels cannot serve raise BackendError."""
    with condlr_ext.backend("triton"):
        yield


CLIP = 0.1, 0, math.inf  # tau, band, sigma_max
OPS = {
    "svd": ops.linalg.svd,
    "qr": ops.linalg.qr,
    "polar": ops.linalg.polar,
    "clip": lambda A: ops.linalg.clip_spectrum(A, *CLIP),
}


def every_kind(m, n, dtype):
    """Return a batch of matrices [m, n] of all spectra and scales, on the device."""
    k = min(m, n)
    return torch.stack([scale * with_spectrum(SPECTRA[kind](k), m, n) for kind, scale in KINDS]).to(DEVICE, dtype)


def unscaled(*tensors):
    """Return the tensors in float64 on the CPU, divided by the scales: 1e-20 squared underflows in float32."""
    return tuple(t.cpu().double() / SCALES for t in tensors)


def residual(E, A):
    """Return the largest ‖E‖ / ‖A‖ of a batch, ‖E‖ for a zero matrix."""
    norm = torch.linalg.matrix_norm(A)
    return (torch.linalg.matrix_norm(E) / torch.where(norm > 0, norm, 1)).max()


def worst_gram(X):
    return max(map(non_orthonormality, X.cpu()))


def sizes(r):
    return (r, r), (3 * r + 5, r), (r, 2 * r + 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("r", RANKS)
def test_svd(r, dtype):
    for m, n in sizes(r):
        A = every_kind(m, n, dtype)
        U, sigma, V, info = ops.linalg.svd(A)
        bound = backward_error(dtype, m, n)
        assert (info == OK).all()
        assert (sigma >= 0).all() and (sigma.diff() <= 0).all()
        A, (values,) = unscaled(A)[0], unscaled(sigma.unsqueeze(-2))
        U, V = U.cpu().double(), V.cpu().double()
        assert residual((U * values) @ V.mT - A, A) <= bound
        assert max(worst_gram(U), worst_gram(V)) <= bound
        for x, y in zip(values.squeeze(-2), map(singular_values, A), strict=True):
            assert (x - y).abs().max() <= bound * y[0].clamp_min(1e-300)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("r", RANKS)
def test_qr(r, dtype):
    for m, n in (*sizes(r), (5000, r)):
        A = every_kind(m, n, dtype)
        Q, R, info = ops.linalg.qr(A)
        bound = backward_error(dtype, m, n)
        assert (info == OK).all()
        assert (R.tril(-1) == 0).all() and (R.diagonal(dim1=-2, dim2=-1) >= 0).all()
        A, R = unscaled(A, R)
        assert residual(Q.cpu().double() @ R - A, A) <= bound
        assert worst_gram(Q) <= bound


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("r", RANKS)
def test_polar(r, dtype):
    for m, n in sizes(r):
        A = every_kind(m, n, dtype)
        Q, info = ops.linalg.polar(A)
        bound = backward_error(dtype, m, n)
        assert (info == OK).all()
        (A,), Q = unscaled(A), Q.cpu().double()
        if m < n:
            A, Q = A.mT, Q.mT
        assert worst_gram(Q) <= bound
        H = Q.mT @ A
        assert residual(H - H.mT, A) <= bound and residual(Q @ H - A, A) <= bound
        assert (torch.linalg.eigvalsh(H)[:, 0] >= -bound * torch.linalg.matrix_norm(A)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("band", range(3), ids=BANDS)
@pytest.mark.parametrize("r", RANKS)
def test_clip_spectrum(r, band, dtype):
    """Singular values, the distance, and the bound, which is hard: directions of equal ones are anyone's choice."""
    before = every_kind(r, r, dtype)
    zero = [kind for kind, _ in KINDS].index("zero")
    for tau in (0.0, 0.1, 10.0):
        out, info = ops.linalg.clip_spectrum(before, tau, band, math.inf)
        assert info.tolist() == [ALL_ZERO if i == zero else OK for i in range(len(KINDS))]
        assert torch.equal(out[zero], before[zero])
        for i, (X, A) in enumerate(zip(*unscaled(out, before), strict=True)):
            if i == zero:
                continue
            sigma = singular_values(A)
            clipped = sigma.clamp(*reference.clip_edges(sigma, tau, BANDS[band]))
            atol = backward_error(dtype, r) * sigma[0].item()
            torch.testing.assert_close(singular_values(X), clipped, rtol=0, atol=atol)
            assert torch.linalg.norm(X - A) <= torch.linalg.norm(clipped - sigma) + r * atol
            assert kappa(X) <= (1 + tau) * (1 + (5e-6 if dtype == torch.float32 else 1e-12 * r))
            if r == 1 or (tau and kappa(A) < 1 + tau / 2 and sigma[-1] > 0.99 * sigma[0]):
                assert torch.equal(out[i], before[i])  # in band


def test_cap():
    A = with_spectrum(torch.linspace(3, 1, 40, dtype=torch.float64), 40, 40).to(DEVICE, torch.float32)
    out = linalg.clip_spectrum(A, 0.5, sigma_max=0.7)
    sigma = singular_values(out.cpu())
    assert 0.7 * (1 - 1e-5) <= sigma[0] <= 0.7 * (1 + 1e-5) and kappa(out.cpu()) <= 1.5 * (1 + 5e-6)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("r", [17, 100])
def test_what_is_not_finite_is_flagged_alone(r, name):
    A = torch.randn(4, r, r, device=DEVICE)
    expected = OPS[name](A)
    A[1, r - 1, 2], A[2, 0, 0] = math.nan, -math.inf
    *outputs, info = OPS[name](A)
    assert info.tolist() == [OK, NOT_FINITE, NOT_FINITE, OK]
    for out, good in zip(outputs, expected, strict=False):
        assert torch.equal(out[::3], good[::3])
        if name != "clip":
            assert out[1:3].isnan().all()
    if name == "clip":
        torch.testing.assert_close(outputs[0][1:3], A[1:3], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", OPS)
def test_strides_and_empty_batches(name):
    base = torch.randn(3, 24, 40, device=DEVICE)
    for A in (base.mT, base[:, ::2, 1::3], base.transpose(0, 1), base.expand(2, 3, 24, 40)[1]):
        for got, expected in zip(OPS[name](A), OPS[name](A.contiguous()), strict=True):
            assert torch.equal(got, expected)
    for shape in ((0, 5, 5), (2, 0, 3), (2, 3, 0)):
        assert OPS[name](torch.empty(shape, device=DEVICE))[-1].shape == shape[:1]


def repeatable():
    """Yield batches for one program per matrix and for several, with a rank-deficient matrix each."""
    for r, dtype in itertools.product((16, 33, 64, 100), DTYPES):
        A = torch.randn(24, r, r, dtype=dtype, device=DEVICE)
        A[5, :, 1] = A[5, :, 0]
        yield A


@pytest.mark.parametrize("name", OPS)
def test_repeated_runs_give_the_same_bits(name):
    """A race would not."""
    for A in repeatable():
        first = OPS[name](A)
        for _ in range(10):
            assert all(torch.equal(a, b) for a, b in zip(OPS[name](A), first, strict=True))


@pytest.mark.parametrize("r", [65, 130, 512])
@pytest.mark.parametrize("name", ["svd", "polar", "clip"])
def test_groups_give_the_bits_of_single_programs(name, r):
    """One matrix takes many programs, each of a batch larger than the number of multiprocessors one."""
    A = with_spectrum(torch.linspace(1, 0.3, r, dtype=torch.float64), r, r).to(DEVICE, torch.float32)
    batch = OPS[name](A.repeat(torch.cuda.get_device_properties(DEVICE).multi_processor_count + 1, 1, 1))
    for _ in range(10):
        assert all(torch.equal(one, many[0]) for one, many in zip(OPS[name](A), batch, strict=True))


@pytest.mark.parametrize("name", OPS)
def test_what_memory_held_before_does_not_show(name):
    torch.use_deterministic_algorithms(False)  # under which torch would fill it
    for A in repeatable():
        expected = OPS[name](A)
        assert all(t.isfinite().all() for t in expected)
        for value in (math.nan, 1e30, 0.0):
            litter(value)
            assert all(torch.equal(a, b) for a, b in zip(OPS[name](A), expected, strict=True))


@pytest.mark.parametrize("name", OPS)
def test_other_stream(name):
    for r in (33, 100):
        A = torch.randn(8, r, r, device=DEVICE)
        expected = OPS[name](A)
        got = on_another_stream(lambda A=A: OPS[name](A * 1.0))
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("name", OPS)
def test_replayed_from_a_graph(name):
    for r in (33, 100):
        A, results = torch.randn(8, r, r, device=DEVICE), []
        replay = captured(lambda A=A, results=results: results.append(OPS[name](A)))
        A.copy_(torch.randn_like(A))
        replay()
        assert all(torch.equal(a, b) for a, b in zip(results[-1], OPS[name](A), strict=True))


def test_linear_algebra_does_not_wait():
    functions = linalg.svd, linalg.qr, linalg.polar, lambda A: linalg.clip_spectrum(A, 0.1)
    for r, function in itertools.product((33, 100), functions):
        A = torch.randn(4, r, r, device=DEVICE)
        function(A)
        with never_waiting():
            function(A)


def test_waiting_is_noticed():
    with pytest.raises(RuntimeError, match="synchronizing"), never_waiting():
        torch.ones(1, device=DEVICE).item()


def test_batches_beyond_32_bits():
    """Offsets pass 2**31 elements."""
    count, r = (1 << 31) // 32**2 + 100, 32
    if torch.cuda.mem_get_info()[0] < 45 * 2**30:
        pytest.skip("needs 45 GB of free memory")
    torch.use_deterministic_algorithms(False)
    A = torch.randn(count, r, r, device=DEVICE)
    U, sigma, V, info = ops.linalg.svd(A)
    assert (info == OK).all()
    for some in (slice(0, 50), slice(count - 50, count)):
        exact = A[some].double()
        product = (U[some].double() * sigma[some].double().unsqueeze(-2)) @ V[some].double().mT
        assert residual(product - exact, exact) <= backward_error(torch.float32, r)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("m, n", [(3, 3), (9, 2)])
def test_more_matrices_than_a_second_grid_dimension_has(name, m, n):
    """65535, and for the products of two matrices each half as many."""
    A = torch.randn(70000, m, n, device=DEVICE, dtype=torch.float64)
    some = OPS[name](A[-1000:])
    assert all(torch.equal(a[-1000:], b) for a, b in zip(OPS[name](A), some, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("name", OPS)
def test_second_device(name):
    A = torch.randn(3, 33, 33, device=DEVICE)
    assert torch.cuda.current_device() == 0
    for got, expected in zip(OPS[name](A.to("cuda:1")), OPS[name](A), strict=True):
        assert got.device.index == 1 and torch.equal(got.to(A.device), expected)


def test_auto_takes_the_kernels():
    with condlr_ext.backend("auto"):
        A = torch.randn(4, 33, 33, device=DEVICE)
        for name, op in (("svd", ops.linalg.svd), ("qr", ops.linalg.qr), ("polar", ops.linalg.polar)):
            assert op.automatic(A) == "triton", name
            automatic = op(A)
            with condlr_ext.backend("triton"):
                assert all(torch.equal(a, b) for a, b in zip(automatic, op(A), strict=True))
