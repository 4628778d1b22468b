"""LowRankLinear against nn.Linear: function, gradients, shapes, errors of rounding."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers.layers import ROUTES, gradients, randomize
from torch import nn

import condlr_ext
from condlr_ext import LowRankLinear, functional


@pytest.mark.parametrize("m,n,r", [(1, 1, 1), (3, 17, 2), (33, 5, 5), (10, 64, 10), (63, 100, 17)])
@pytest.mark.parametrize("lead", [(), (7,), (2, 3), (0,), (300,)], ids=str)
@ROUTES
def test_linear_is_its_dense_twin(backend, m, n, r, lead, route):
    for bias in (True, False):
        layer = randomize(LowRankLinear(n, m, bias, rank=r, dtype=torch.float64))
        layer.route = route
        dense = layer.to_dense()
        x = torch.randn(*lead, n, dtype=torch.float64)
        torch.testing.assert_close(layer(x), dense(x))
        wide = torch.randn(*lead, 2 * n, dtype=torch.float64)[..., ::2]
        torch.testing.assert_close(layer(wide), dense(wide))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows,m,n,r", [(3, 33, 17, 5), (64, 20, 30, 20), (40, 100, 7, 3), (300, 150, 90, 70)])
@ROUTES
def test_error_is_that_of_plain_pytorch(backend, dtype, rows, m, n, r, route):
    """Outputs and gradients: at most twice the error of the same products in plain PyTorch at the same dtype."""

    def plain(X, U, S, V, b):
        return X @ V @ S.mT @ U.mT + b if route == "factorized" else F.linear(X, U @ S @ V.mT, b)

    layer = partial(functional.low_rank_linear, route=route)
    shapes = ((rows, n), (m, r), (r, r), (n, r), (m,))
    exact = [torch.randn(s, dtype=dtype).double() / s[-1] ** 0.5 for s in shapes]
    low = [t.to(dtype) for t in exact]
    truth = [plain(*exact), *gradients(plain, exact)]
    ours = [layer(*low), *gradients(layer, low)]
    theirs = [plain(*low), *gradients(plain, low)]
    for o, p, t in zip(ours, theirs, truth, strict=True):
        assert o.dtype == dtype
        # the order of the products may differ: one rounding of the result is always allowed
        atol = torch.finfo(dtype).eps * t.abs().max()
        assert (o.double() - t).abs().max() <= 2 * (p.double() - t).abs().max() + atol


@ROUTES
@pytest.mark.parametrize("shape", [(20,), (7, 20), (0, 20), (2, 64, 20), (3, 4, 5, 20)], ids=str)
def test_outputs_of_linear_layers_may_be_changed_in_place(backend, shape, route):
    layer = LowRankLinear(20, 30, rank=5, dtype=torch.float64)
    layer.route = route
    x = torch.randn(shape, dtype=torch.float64)
    expected = torch.autograd.grad(F.relu(layer(x)).square().sum(), list(layer.parameters()))
    got = torch.autograd.grad(layer(x).relu_().square().sum(), list(layer.parameters()))
    torch.testing.assert_close(got, expected)


def test_a_large_head_with_an_activation_in_place():
    """The sizes are those that products serve, not the one compiled call."""
    model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(inplace=True), nn.Linear(512, 10))
    condlr_ext.factorize(model, budget=0.3)
    model(torch.randn(128, 512)).sum().backward()
