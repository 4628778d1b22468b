"""The compiled kernels of linear layers: errors against float64, any subset of gradients, any number of threads."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from condlr_ext import ops
from condlr_ext.autograd import LowRankLinearFunction

pytestmark = pytest.mark.skipif(bool(ops.COMPILED.ops_reason), reason="no compiled kernels")
SIZES = [(1, 5, 4, 2), (3, 64, 32, 7), (9, 17, 33, 17), (70, 40, 30, 9), (300, 200, 64, 40), (513, 96, 128, 64)]


def kernels(*args):
    return LowRankLinearFunction.apply("cpu", *args)


def products(X, U, S, V, b):
    return F.linear(F.linear(X @ V, S), U, b)


def results(function, tensors, G, mask):
    leaves = [t.detach().clone().requires_grad_(needed) for t, needed in zip(tensors, mask, strict=True)]
    Y = function(*leaves)
    return [Y, *torch.autograd.grad(Y, [t for t in leaves if t.requires_grad], G)]


def problem(rows, n, m, r, dtype):
    torch.manual_seed(0)
    tensors = [torch.randn(shape, dtype=dtype) for shape in ((rows, n), (m, r), (r, r), (n, r), (m,))]
    return tensors, torch.randn(rows, m, dtype=dtype)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("sizes", SIZES)
def test_errors_are_at_most_twice_those_of_torchs_products(sizes, dtype):
    tensors, G = problem(*sizes, dtype)
    every = [True] * 5
    exact = results(products, [t.double() for t in tensors], G.double(), every)
    ours, theirs = results(kernels, tensors, G, every), results(products, tensors, G, every)
    for mine, other, truth in zip(ours, theirs, exact, strict=True):
        scale = truth.norm()
        limit = 2 * (other - truth).norm() / scale if dtype == torch.float32 else 0
        assert (mine - truth).norm() / scale <= max(limit, 8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("sizes", [(20, 12, 30, 5), (40, 12, 30, 5)], ids=["thin", "folded"])
def test_any_subset_of_the_gradients(sizes):
    tensors, G = problem(*sizes, torch.float64)
    for mask in itertools.product([False, True], repeat=5):
        if any(mask):
            torch.testing.assert_close(results(kernels, tensors, G, mask), results(products, tensors, G, mask))


@pytest.mark.parametrize("rows", [100, 2000], ids=["thin", "folded"])
def test_results_do_not_depend_on_the_number_of_threads(rows, threads):
    tensors, G = problem(rows, 300, 200, 77, torch.float32)
    found = []
    for count in (1, 2, 3, 5):
        threads(count)
        found.append(results(kernels, tensors, G, [True] * 5))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(other, found[0], strict=True))


@pytest.mark.parametrize("rows", [0, 1, 31])
def test_few_rows(rows):
    tensors, G = problem(rows, 7, 6, 3, torch.float64)
    every = [True] * 5
    torch.testing.assert_close(results(kernels, tensors, G, every), results(products, tensors, G, every))
