"""Values and gradients do not depend on the scale of the matrix, as far as its dtype can hold them."""

import math

import pytest
import torch

from condlr_ext import linalg, reference
from condlr_ext.errors import NonFiniteError

F64 = torch.float64
# powers of two, so that scaling does not round: 1e±30 in float32, 1e±160 and beyond in float64
SCALES = [(torch.float32, e) for e in (-100, -73, 64, 100)] + [(F64, e) for e in (-700, -531, 531, 700)]
SCALES = pytest.mark.parametrize("dtype,exponent", SCALES, ids=str)
SHAPES = pytest.mark.parametrize("shape", [(4, 4), (6, 4), (4, 6), (3, 5, 4)], ids=str)
BANDS = ("rms", "mean", "optimal")


def squares(*tensors):
    return sum(((X * X) * torch.linspace(0.5, 2, X.numel()).to(X).view(X.shape)).sum() for X in tensors)


# name: function, its degree in the scale of A
FUNCTIONS = {
    "svd.U and V": (lambda A: squares(linalg.svd(A).U, linalg.svd(A).V), 0),
    "svd.sigma": (lambda A: linalg.svd(A).sigma.sum(), 1),
    "qr.Q": (lambda A: squares(linalg.qr(A).Q), 0),
    "qr.R": (lambda A: linalg.qr(A).R.sum(), 1),
    "orthonormalize": (lambda A: squares(linalg.orthonormalize(A)), 0),
    "polar.Q": (lambda A: squares(linalg.polar(A).Q), 0),
    "polar.H": (lambda A: linalg.polar(A).H.sum(), 1),
    "cond": (lambda A: linalg.cond(A).sum(), 0),
    **{f"clip {band}": (lambda A, band=band: linalg.clip_spectrum(A, 0.3, band).sum(), 1) for band in BANDS},
}


@pytest.mark.parametrize("name", FUNCTIONS)
@SHAPES
@SCALES
def test_gradients_scale_with_the_matrix(backend, dtype, exponent, shape, name):
    function, degree = FUNCTIONS[name]
    gradients = []
    for e in (0, exponent):
        torch.manual_seed(0)
        A = (torch.randn(shape, dtype=F64).to(dtype) * 2.0**e).requires_grad_()
        function(A).backward()
        gradients.append(A.grad.double() * 2.0 ** (e * (1 - degree)))
    bound = 1e-4 if dtype == torch.float32 else 1e-10
    assert (gradients[1] - gradients[0]).norm() <= bound * gradients[0].norm()


@pytest.mark.parametrize("name", [n for n, (_, degree) in FUNCTIONS.items() if degree == 1])
@pytest.mark.parametrize("dtype,exponent", [(torch.float32, -73), (torch.float32, 64), (F64, -531), (F64, 531)])
def test_second_derivatives_scale_with_the_matrix(backend, dtype, exponent, name):
    """Of functions of degree 1; those of degree 0 have second derivatives beyond the dtype there."""
    function, _ = FUNCTIONS[name]
    torch.manual_seed(0)
    A = torch.randn(4, 3, dtype=F64).to(dtype)
    expected = torch.autograd.functional.hessian(function, A)
    got = torch.autograd.functional.hessian(function, A * 2.0**exponent).double() * 2.0**exponent
    assert (got - expected).norm() <= (1e-3 if dtype == torch.float32 else 1e-9) * expected.norm()


def test_second_derivatives_of_degree_zero_at_moderate_scales(backend):
    torch.manual_seed(0)
    A = torch.randn(4, 3)
    for name in ("svd.U and V", "qr.Q", "polar.Q", "cond"):
        function, _ = FUNCTIONS[name]
        expected = torch.autograd.functional.hessian(function, A)
        got = torch.autograd.functional.hessian(function, A * 2.0**-60).double() * 2.0**-120
        assert (got - expected).norm() <= 1e-3 * expected.norm(), name


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("make", ["equal columns", "twice a column", "random"])
def test_qr_without_full_rank_to_rounding_has_no_gradient(backend, make, dtype):
    for n in (2, 8, 40):
        A = {
            "equal columns": torch.ones(n + 1, n, dtype=dtype),
            "twice a column": torch.randn(n + 2, 1, dtype=dtype) * torch.arange(1, n + 1, dtype=dtype),
            "random": torch.randn(n + 8, n // 2, dtype=dtype) @ torch.randn(n // 2, n, dtype=dtype),
        }[make].requires_grad_()
        with pytest.raises(ArithmeticError, match="linalg.qr: the gradient is not defined"):
            linalg.qr(A).Q.sum().backward()
    near = torch.randn(6, 3, dtype=F64)
    near[:, 2] = near[:, 0] + 1e-5 * near[:, 1].flip(0)  # nearly dependent is not dependent
    near = near.to(dtype).requires_grad_()
    linalg.qr(near).Q.sum().backward()
    graded = (torch.randn(6, 4, dtype=F64).to(dtype) * torch.tensor([1.0, 1e-10, 1e-20, 1e-30])).requires_grad_()
    linalg.qr(graded).Q[:, 0].sum().backward()  # nor are short columns
    assert torch.isfinite(near.grad).all()


@pytest.mark.parametrize("shape", [(6, 4), (4, 4), (4, 6)], ids=str)
def test_svd_and_polar_without_rank_to_rounding_have_no_gradient(backend, shape):
    m, n = shape
    for A in (torch.randn(m, 1, dtype=F64) * torch.arange(1, n + 1), torch.ones(m, n, dtype=F64)):
        A.requires_grad_()
        for name in ("svd", "polar"):
            with pytest.raises(ArithmeticError, match=f"linalg.{name}: the gradient"):
                getattr(linalg, name)(A)[0].sum().backward()
        linalg.svd(A).sigma.sum().backward()
        A.grad = None
        linalg.clip_spectrum(A, 0.1).sum().backward()  # completed directions count as constants
        assert A.grad.abs().max() < 1e3


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_near_overflow_is_right_or_named(backend, dtype):
    top = torch.finfo(dtype).max
    relative = torch.rand(3, 6, 4, dtype=F64) - 0.5
    A = (2 * relative).to(dtype) * top
    Q = linalg.polar(relative).Q
    torch.testing.assert_close(linalg.cond(A).double(), linalg.cond(relative), rtol=1e-5, atol=0)
    torch.testing.assert_close(linalg.orthonormalize(A).double(), linalg.orthonormalize(relative), rtol=0, atol=1e-5)
    capped = linalg.clip_spectrum(A, 0.0, sigma_max=2.0)
    torch.testing.assert_close(capped.double(), 2 * Q, rtol=0, atol=1e-5)
    half = linalg.svd(A / 4)  # sigma fits there
    torch.testing.assert_close(half.sigma.double() / (top / 2), linalg.svd(relative).sigma, rtol=1e-5, atol=0)
    torch.testing.assert_close(linalg.polar(A / 4).Q.double(), Q, rtol=0, atol=1e-5)
    full = torch.full((2, 6, 4), top, dtype=dtype)
    for name, what in (("svd", "sigma"), ("qr", "R"), ("polar", "H")):
        with pytest.raises(NonFiniteError, match=f"linalg.{name}: {what} must be within the range of {dtype}"):
            getattr(linalg, name)(full)
    with pytest.raises(ArithmeticError, match="linalg.qr: .*whose R exceeds the range"):
        linalg.orthonormalize(full.clone().requires_grad_()).sum().backward()
    # the columns get equal lengths by entries larger and smaller than top
    signs = torch.randn(32, 8).sign().to(dtype) * top
    with pytest.raises(NonFiniteError, match=f"linalg.clip_spectrum: the result must be within the range of {dtype}"):
        linalg.clip_spectrum(signs, 0.0)


def test_half_precision_result_beyond_its_range_is_named(backend):
    A = torch.full((4, 4), 6e4).half()
    with pytest.raises(NonFiniteError, match="linalg.svd: sigma must be within the range of torch.float16"):
        linalg.svd(A)
    assert linalg.cond(A[:1]) == 1


def test_largest_numbers_still_have_a_polar_factor(backend):
    A = torch.diag(torch.tensor([3e38, 1e38, 2e38]))
    Q, H = linalg.polar(A)
    torch.testing.assert_close(Q, torch.eye(3))
    torch.testing.assert_close(H, A)


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_norm_at_any_scale(dtype):
    X = torch.randn(3, 5, 4, dtype=F64).to(dtype)
    least, most = (-140, 124) if dtype == torch.float32 else (-1060, 1020)
    for e in (least, 0, most):
        got = reference.norm(X * 2.0**e, (1, 2))
        assert got.shape == (3,) and got.dtype == dtype
        expected = torch.linalg.vector_norm(X, dim=(1, 2)) * 2.0**e
        torch.testing.assert_close(got, expected, rtol=1e-2 if e == least else 1e-6, atol=0)
    assert reference.norm(X, 1, keepdim=True).shape == (3, 1, 4)
    assert reference.norm(torch.zeros(2, 0), 1).tolist() == [0, 0] and reference.norm(torch.zeros(3)) == 0
    scale = reference.magnitude(torch.tensor([[3.0, -5.0], [0.0, 0.0], [math.inf, 1.0], [math.nan, 1.0]]), -1)
    assert scale.squeeze(1).tolist() == [4, 1, 1, 1]


def test_flushed_denormals_leave_the_bound_alone(backend):
    """Down to where entries of the result themselves are denormal, see the module's docstring."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush")
    try:
        A = torch.randn(6, 6)
        for exponent in (-100, -60, 60, 100):
            sigma = torch.linalg.svdvals(linalg.clip_spectrum(A * 2.0**exponent, 0.1).double() * 2.0**-exponent)
            assert sigma[0] <= 1.1 * (1 + 5e-6) * sigma[-1]
            Q = linalg.qr(A * 2.0**exponent).Q.double()
            assert (Q.mT @ Q - torch.eye(6)).abs().max() < 1e-5
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("dtype,exponent", [(torch.float32, -130), (torch.float32, -140), (F64, -1030), (F64, -1060)])
def test_results_of_denormal_matrices(backend, dtype, exponent):
    """The exact results for the digits that the entries have left; the cap counts, forward and backward."""
    half, rest = 2.0 ** (exponent // 2), 2.0 ** (exponent - exponent // 2)  # their product may be no number

    def at_scale(X):
        return X.detach().double() / half / rest

    tiny = (torch.randn(40, 30, dtype=F64) * 2.0**8 * half * rest).to(dtype).requires_grad_()
    A = at_scale(tiny)
    unit = at_scale(torch.tensor(torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps, dtype=F64))
    bound = 1e-5 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(linalg.cond(tiny).double(), linalg.cond(A), rtol=bound, atol=0)
    Q, H = linalg.polar(tiny)
    # half a unit for each entry of H, the square root of their number in the norm
    assert (Q.double() @ at_scale(H) - A).norm() <= bound * A.norm() + 30 * unit
    out = linalg.clip_spectrum(tiny, math.inf, sigma_max=64 * half * rest)
    assert torch.linalg.svdvals(at_scale(out))[0] <= 64 * (1 + bound) + 40 * unit
    out.sum().backward()
    B = A.clone().requires_grad_()
    linalg.clip_spectrum(B, math.inf, sigma_max=64.0).sum().backward()
    assert (tiny.grad.double() - B.grad).norm() <= 1e3 * bound * B.grad.norm()
