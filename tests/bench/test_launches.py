"""The host side of launches, with a driver that does nothing: what is kept, what is compiled, what it costs."""

import pytest
import torch

pytest.importorskip("triton")

from helpers.kernels import run_on_cpu

from bench import launches
from bench.idle import driver_of
from condlr_ext.kernels.triton.linear import launch as layers
from condlr_ext.kernels.triton.linear import low_rank
from condlr_ext.kernels.triton.runtime import launching

pytestmark = pytest.mark.skipif(run_on_cpu(), reason="kernels run here")


@pytest.fixture(autouse=True)
def idle():
    with driver_of(80):
        yield


def compiled(kernel) -> int:
    """Return for how many specializations a kernel was compiled for the idle driver."""
    return len(kernel.device_caches["idle sm_80"][0])


def test_a_short_batch_compiles_nothing():
    U, S, V = (torch.randn(shape) for shape in ((48, 16), (16, 16), (32, 16)))
    counts = []
    for rows in (256, 100, 16, 1):
        X, G = torch.randn(rows, 32), torch.randn(rows, 48)
        _, P = layers.low_rank_linear(X, U, S, V)
        layers.low_rank_linear_backward(G, X, P, U, S, V, [True] * 5)
        counts.append([compiled(kernel) for kernel in (low_rank.chain, low_rank.sums, low_rank.combine)])
    assert all(each == counts[0] for each in counts) and min(counts[0]) > 0


def test_a_kept_kernel_is_that_of_its_arguments():
    """Alignment, strides of 1 and multiples of 16 have kernels of their own, as in Triton."""
    flat, S = torch.randn(16 * 33 + 1), torch.randn(16, 16)
    U, V = torch.randn(48, 16), torch.randn(32, 16)
    aligned, odd, shifted = flat[: 16 * 32].view(16, 32), flat[: 16 * 33].view(16, 33), flat[1 : 1 + 512].view(16, 32)
    seen = set()
    for X, factor in ((aligned, V), (odd, torch.randn(33, 16)), (shifted, V), (aligned, V)):
        before = set(launching._kept)
        layers.low_rank_linear(X, U, S, factor)
        seen |= {key for key in launching._kept if key not in before}
    assert len(seen) == 3 and len({id(launching._kept[key][0]) for key in seen}) == 3
    layers.low_rank_linear(aligned, U, S.mT, V)  # its stride of 1 is the other one
    assert len(launching._kept) == 4


def test_costs():
    by_triton, kept, again, *_ = (float(value) for _, value in launches.launches(8))
    assert again < kept < by_triton
