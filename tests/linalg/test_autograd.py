"""Gradients: gradcheck in float64 on every backend, double backward, torch.func, only what is asked for."""

import itertools
import math
from functools import partial

import pytest
import torch
from helpers.layers import ROUTES
from helpers.matrices import SPECTRA, with_spectrum
from torch.autograd import gradcheck, gradgradcheck

from condlr_ext import functional, linalg, reference

F64 = torch.float64


def factors(m, n, r, requires_grad=True):
    shapes = ((m, r), (r, r), (n, r), (m,))
    return [torch.randn(s, dtype=F64, requires_grad=requires_grad) for s in shapes]


@pytest.mark.parametrize(
    "lead,m,n,r", [((4,), 3, 5, 2), ((2, 3), 5, 3, 3), ((), 4, 4, 1), ((0,), 3, 5, 2), ((9,), 2, 2, 2)]
)
@pytest.mark.parametrize("with_bias", [True, False])
@ROUTES
def test_linear(backend, lead, m, n, r, with_bias, route):
    U, S, V, b = factors(m, n, r)
    X = torch.randn(*lead, n, dtype=F64, requires_grad=True)
    args = (X, U, S, V, b if with_bias else None)
    layer = partial(functional.low_rank_linear, route=route)
    assert gradcheck(layer, args)
    assert gradgradcheck(layer, args)


CONVS = [
    dict(d=1, stride=2, padding=1, dilation=2, groups=1, k=(3,)),
    dict(d=2, stride=1, padding="same", dilation=1, groups=1, k=(2, 3)),
    dict(d=2, stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2, k=(3, 2)),
    dict(d=3, stride=1, padding=0, dilation=1, groups=1, k=(1, 2, 2)),
]


@pytest.mark.parametrize("conv", CONVS, ids=str)
@ROUTES
def test_conv(backend, conv, route):
    d, k, g = conv["d"], conv["k"], conv["groups"]
    m, c, r = 4, 2, 2
    U, S, V, b = factors(m, c * math.prod(k), r)
    X = torch.randn(2, c * g, *[5, 4, 3][:d], dtype=F64, requires_grad=True)
    fn = getattr(functional, f"low_rank_conv{d}d")

    def call(X, U, S, V, b):
        return fn(X, U, S, V, b, conv["stride"], conv["padding"], conv["dilation"], g, kernel_size=k, route=route)

    dense = getattr(torch.nn.functional, f"conv{d}d")
    W = (U @ S @ V.mT).reshape(m, c, *k)
    torch.testing.assert_close(
        call(X, U, S, V, b), dense(X, W, b, conv["stride"], conv["padding"], conv["dilation"], g)
    )
    assert gradcheck(call, (X, U, S, V, b))
    assert gradgradcheck(call, (X, U, S, V, b))


@ROUTES
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_any_subset_of_the_gradients(backend, kind, route):
    """Each is the one that asking for all gives, in a first and in a second backward."""
    U, S, V, b = factors(4, 8, 2, requires_grad=False)
    if kind == "linear":
        X, fn = torch.randn(3, 8, dtype=F64), functional.low_rank_linear
    else:
        X, fn = torch.randn(3, 2, 3, 4, dtype=F64), partial(functional.low_rank_conv2d, kernel_size=2, stride=(1, 2))

    def gradients(needed):
        args = [t.clone().requires_grad_(w) for t, w in zip((X, U, S, V, b), needed, strict=True)]
        leaves = [t for t in args if t.requires_grad]
        loss = fn(*args, route=route).pow(3).sum()
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.pow(2).sum() for g in first), leaves)
        plain = torch.autograd.grad(fn(*args, route=route).pow(3).sum(), leaves)
        torch.testing.assert_close(plain, first)
        return first, second

    every, _ = gradients([True] * 5)
    for needed in itertools.product([False, True], repeat=5):
        if any(needed):
            first, second = gradients(needed)
            torch.testing.assert_close(first, tuple(g for g, w in zip(every, needed, strict=True) if w))
            with torch.autograd.forward_ad.dual_level():  # plain products, through torch's own derivatives
                expected = gradients(needed)[1]
            torch.testing.assert_close(second, expected)


@ROUTES
def test_gradients_of_the_factors_are_contiguous(backend, route):
    """The step takes them as they come."""
    for X, options in ((torch.randn(5, 8), {}), (torch.randn(2, 2, 3, 4), {"kernel_size": 2})):
        U, S, V, b = (p.detach().float().requires_grad_() for p in factors(6, 8, 3))
        for image in (X, X.to(memory_format=torch.channels_last)) if options else (X,):
            fn = functional.low_rank_conv2d if options else functional.low_rank_linear
            fn(image, U, S, V, b, route=route, **options).sum().backward()
            assert all(p.grad.is_contiguous() for p in (U, S, V, b))


def invariant(fn):
    """Outputs of an SVD made independent of the signs of its vectors."""

    def call(A):
        U, sigma, V = fn(A)
        return sigma, U.pow(2), V.pow(2), (U * sigma.unsqueeze(-2) ** 2) @ V.mT

    return call


@pytest.mark.parametrize("shape", [(4, 4), (5, 3), (3, 5), (1, 1), (2, 4, 3), (0, 3, 3)], ids=str)
def test_decompositions(backend, shape):
    A = torch.randn(shape, dtype=F64, requires_grad=True)
    assert gradcheck(invariant(linalg.svd), A)
    assert gradcheck(lambda A: tuple(linalg.qr(A)), A)
    assert gradcheck(lambda A: tuple(linalg.polar(A)), A)
    assert gradcheck(linalg.cond, A)
    assert gradcheck(lambda A: linalg.svd(A).U.pow(2), A) and gradcheck(lambda A: linalg.svd(A).V.pow(2), A)
    assert gradcheck(lambda A: linalg.qr(A).Q, A) and gradcheck(lambda A: linalg.qr(A).R, A)


def test_second_derivatives_of_svd_and_qr(backend):
    A = torch.randn(4, 3, dtype=F64, requires_grad=True)
    assert gradgradcheck(lambda A: linalg.svd(A).sigma, A)
    assert gradgradcheck(lambda A: tuple(linalg.qr(A)), A)


def test_svd_at_repeated_singular_values(backend):
    A = with_spectrum(SPECTRA["repeated"](4), 4, 4).requires_grad_()
    linalg.svd(A).sigma.sum().backward()  # the nuclear norm: its gradient is the polar factor
    torch.testing.assert_close(A.grad, linalg.polar(A.detach()).Q, rtol=0, atol=1e-12)
    with pytest.raises(ArithmeticError, match="equal singular values"):
        linalg.svd(A).U.sum().backward()


def test_polar_at_repeated_singular_values(backend):
    A = with_spectrum(SPECTRA["repeated"](4), 4, 4).requires_grad_()
    assert gradcheck(lambda A: linalg.polar(A).Q, A)


def clip_between(A, lo, hi):
    """Clipping between constant edges, by a decomposition whose vectors are constants only to first order."""
    U, sigma, V = reference.svd(A)
    return (U * sigma.clamp(lo, hi).unsqueeze(-2)) @ V.mT


@pytest.mark.parametrize("band", range(3))
@pytest.mark.parametrize(
    "shape,kind", [((4, 4), "random"), ((6, 4), "random"), ((4, 6), "random"), ((5, 5), "two_values")]
)
def test_clip_spectrum_with_constant_edges(backend, shape, kind, band):
    """Finite differences of the clip between the edges of this matrix, also where singular values repeat."""
    spectrum = SPECTRA[kind](min(shape))
    A = with_spectrum(spectrum, *shape)
    tau = 0.3 if kind == "random" else 0.05
    lo, hi = reference.clip_edges(reference.svd(A)[1], tau, reference.BANDS[band])
    G = torch.randn(shape, dtype=F64)
    X = A.clone().requires_grad_()
    (linalg.clip_spectrum(X, tau, reference.BANDS[band]) * G).sum().backward()
    h = 1e-5
    for _ in range(5):
        D = torch.randn(shape, dtype=F64)
        slope = ((clip_between(A + h * D, lo, hi) - clip_between(A - h * D, lo, hi)) * G).sum() / (2 * h)
        assert abs((X.grad * D).sum() - slope) <= 1e-6 * (1 + abs(slope))


def test_clip_spectrum_gradient_of_an_unclipped_matrix_is_the_identity(backend):
    A = with_spectrum(torch.linspace(1.02, 1, 5, dtype=F64), 5, 5).requires_grad_()
    G = torch.randn(5, 5, dtype=F64)
    (linalg.clip_spectrum(A, 0.5) * G).sum().backward()
    torch.testing.assert_close(A.grad, G, rtol=0, atol=1e-12)


def test_second_derivatives_of_polar_and_clip(backend):
    A = with_spectrum(torch.tensor([2.0, 1.5, 1.2, 0.7], dtype=F64), 5, 4).requires_grad_()
    assert gradgradcheck(lambda A: linalg.polar(A).Q, A)
    G = torch.randn(5, 4, dtype=F64)

    def slope(A):  # the edges are constants in backward: differentiate that backward
        (dA,) = torch.autograd.grad((linalg.clip_spectrum(A, 0.3) * G).sum(), A, create_graph=True)
        return dA

    lo, hi = reference.band_edges(reference.svd(A.detach())[1], 0.3)
    h, D = 1e-5, torch.randn(5, 4, dtype=F64)
    (second,) = torch.autograd.grad((slope(A) * D).sum(), A)

    def fixed(X):
        X = X.detach().requires_grad_()
        U, sigma, V = linalg.svd(X)
        (dX,) = torch.autograd.grad(((U * sigma.clamp(lo, hi)) @ V.mT * G).sum(), X)
        return (dX * D).sum()

    E = torch.randn(5, 4, dtype=F64)
    expected = (fixed(A.detach() + h * E) - fixed(A.detach() - h * E)) / (2 * h)
    torch.testing.assert_close((second * E).sum(), expected, rtol=1e-5, atol=1e-7)
    W = torch.randn(4, 4, dtype=F64)
    B = torch.randn(4, 4, dtype=F64)
    hessian = torch.func.jacrev(torch.func.grad(lambda X: (linalg.polar(X).Q * W).sum()))(B)
    torch.testing.assert_close(hessian, torch.autograd.functional.hessian(lambda X: (linalg.polar(X).Q * W).sum(), B))
    assert hessian.abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_clip_gradient_at_tau_zero_is_that_of_the_polar_direction(backend, dtype):
    """All sigma on both edges at once: no direction is inside, whatever rounding says."""
    A = (2 * linalg.orthonormalize(torch.randn(6, 6, dtype=F64))).to(dtype).requires_grad_()
    G, D = (torch.randn(6, 6, dtype=F64).to(dtype) for _ in range(2))
    (linalg.clip_spectrum(A, 0.0) * G).sum().backward()
    h, X = 1e-6, A.detach().double()
    lo = hi = torch.tensor(X.norm() / 6**0.5)
    slope = ((clip_between(X + h * D, lo, hi) - clip_between(X - h * D, lo, hi)) * G).sum() / (2 * h)
    torch.testing.assert_close(
        (A.grad * D).sum().double(), slope, rtol=1e-4 if dtype == torch.float32 else 1e-6, atol=0
    )


def test_clip_gradient_of_its_own_result_is_the_identity(backend):
    """A clipped matrix has sigma on the edges to rounding, and counts as in band."""
    A = linalg.clip_spectrum(torch.randn(6, 6, dtype=F64), 0.3, "optimal").requires_grad_()
    G = torch.randn(6, 6, dtype=F64)
    (linalg.clip_spectrum(A, 0.3, "optimal") * G).sum().backward()
    torch.testing.assert_close(A.grad, G, rtol=0, atol=1e-10)


def test_undefined_gradients_raise(backend):
    tall = with_spectrum(torch.tensor([2.0, 1.0, 0.0], dtype=F64), 5, 3)
    tall[:, 2] = 0
    tall.requires_grad_()
    with pytest.raises(ArithmeticError, match="linalg.qr: the gradient is not defined"):
        linalg.qr(tall).Q.sum().backward()
    with pytest.raises(ArithmeticError, match="at zero ones of a matrix that is not square"):
        linalg.svd(torch.diag(torch.tensor([2.0, 1.0, 0.0]))[:, :3].repeat(2, 1).requires_grad_()).U.sum().backward()
    close = torch.diag(torch.tensor([1.0, 1e-8, 3e-9])).requires_grad_()
    linalg.svd(close).U.sum().backward()
    assert torch.isfinite(close.grad).all()


def test_autocast_does_not_reach_the_backwards(backend):
    A = torch.randn(20, 20)
    for fn in (
        lambda A: linalg.svd(A).sigma.sum(),
        lambda A: linalg.qr(A).Q.sum(),
        lambda A: linalg.polar(A).Q.sum(),
        lambda A: linalg.clip_spectrum(A, 0.1).sum(),
    ):
        grads = []
        for enabled in (False, True):
            X = A.clone().requires_grad_()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                fn(X).backward()
            grads.append(X.grad)
        torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-5)


def test_forward_mode_and_hessian_of_the_layers():
    from torch.func import hessian, jvp

    U, S, V, b = factors(4, 5, 2, requires_grad=False)
    x, t = torch.randn(3, 5, dtype=F64), torch.randn(3, 5, dtype=F64)
    layer = lambda x: functional.low_rank_linear(x, U, S, V, b)  # noqa: E731
    value, slope = jvp(layer, (x,), (t,))
    torch.testing.assert_close(value, layer(x))
    torch.testing.assert_close(slope, t @ (U @ S @ V.mT).mT)
    curvature = hessian(lambda S: functional.low_rank_linear(x, U, S, V, b).pow(2).sum())(S)
    expected = torch.autograd.functional.hessian(lambda S: functional.low_rank_linear(x, U, S, V, b).pow(2).sum(), S)
    torch.testing.assert_close(curvature, expected)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, t)
        tangent = torch.autograd.forward_ad.unpack_dual(layer(dual)).tangent
    torch.testing.assert_close(tangent, slope)


def test_zero_core_gradient_is_finite(backend):
    A = torch.zeros(3, 3, dtype=F64, requires_grad=True)
    linalg.clip_spectrum(A, 0.1).sum().backward()
    assert torch.isfinite(A.grad).all()


@ROUTES
def test_func_transforms(backend, route):
    from torch.func import functional_call, grad, jacrev, vmap

    U, S, V, b = factors(4, 5, 2, requires_grad=False)
    X = torch.randn(6, 5, dtype=F64)

    def loss(x, S):
        return functional.low_rank_linear(x, U, S, V, b, route=route).pow(2).sum()

    per_sample = vmap(grad(loss, argnums=1), (0, None))(X, S)
    one_by_one = torch.stack([grad(loss, argnums=1)(x, S) for x in X])
    torch.testing.assert_close(per_sample, one_by_one)
    torch.testing.assert_close(per_sample.sum(0), torch.autograd.functional.jacobian(lambda S: loss(X, S), S))
    cores = torch.randn(3, 2, 2, dtype=F64)
    ensemble = vmap(lambda S: functional.low_rank_linear(X, U, S, V, b))(cores)
    torch.testing.assert_close(ensemble, torch.stack([functional.low_rank_linear(X, U, c, V, b) for c in cores]))
    A = torch.randn(3, 4, 4, dtype=F64)
    torch.testing.assert_close(vmap(lambda A: linalg.svd(A).sigma)(A), linalg.svd(A).sigma)
    torch.testing.assert_close(
        vmap(grad(lambda A: linalg.polar(A).Q.pow(3).sum()))(A),
        torch.stack([grad(lambda A: linalg.polar(A).Q.pow(3).sum())(a) for a in A]),
    )
    assert jacrev(lambda A: linalg.qr(A).R)(A[0]).shape == (4, 4, 4, 4)

    import condlr_ext

    conv = condlr_ext.LowRankConv2d(2, 4, 3, rank=2).double()
    conv.route = route
    images = torch.randn(3, 1, 2, 5, 5, dtype=F64)
    params = dict(conv.named_parameters())
    batched = vmap(lambda x: functional_call(conv, params, (x,)))(images)
    torch.testing.assert_close(batched, torch.stack([conv(x) for x in images]))
