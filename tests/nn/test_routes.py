"""The factorized and the merged route, and the plan that chooses between them."""

import copy
import pickle
from functools import partial

import pytest
import torch
from helpers.layers import randomize
from torch.utils.flop_counter import FlopCounterMode

from condlr_ext import LowRankConv2d, LowRankLinear, functional, reference
from condlr_ext.errors import ShapeError


def test_route_is_validated_and_kept():
    layer = randomize(LowRankConv2d(2, 3, 3, rank=2))
    assert layer.route == "auto" and "route" not in repr(layer)
    layer.route = "merged"
    assert "route=merged" in repr(layer) and set(layer.state_dict()) == {"U", "S", "V", "bias"}
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.route == "merged"
    with pytest.raises(
        ValueError, match="LowRankConv2d.route: route must be one of auto, factorized, merged, got 'fast'"
    ):
        layer.route = "fast"
    assert layer.route == "merged"
    low_rank_conv = partial(functional.low_rank_conv2d, kernel_size=3)
    for fn, shapes in (
        (functional.low_rank_linear, [(3, 5), (4, 2), (2, 2), (5, 2)]),
        (low_rank_conv, [(1, 2, 6, 6), (4, 2), (2, 2), (18, 2)]),
    ):
        with pytest.raises(ValueError, match="route must be one of auto, factorized, merged, got 'fast'"):
            fn(*map(torch.randn, shapes), route="fast")


def test_plan_says_which_route_and_why():
    """Far from the crossing, where no machine should disagree."""
    x = torch.empty(64, 256, 16, 16)
    low = LowRankConv2d(256, 256, 3, padding=1, rank=0.2).plan(x)
    assert low.route == "factorized" and low.factorized < low.merged and 2 < low.gain < 5
    full = LowRankConv2d(64, 64, 3, padding=1, rank=1.0).plan(torch.empty(64, 64, 32, 32))
    assert full.route == "merged" and full.gain < 1 < full.factorized / full.merged
    shortcut = LowRankConv2d(16, 64, 1, rank=8).plan(torch.empty(64, 16, 32, 32))
    assert shortcut.route == "merged" and shortcut.gain > 0.8
    wide = LowRankLinear(512, 512, rank=512)
    assert wide.plan(torch.empty(8192, 512)).route == "merged"
    assert wide.plan(torch.empty(4, 512)).route == "factorized"  # forming W costs more than the rows
    with torch.no_grad():
        inference = wide.plan(torch.empty(8192, 512))
    assert inference.dense < 0.6 * wide.plan(torch.empty(8192, 512)).dense
    with pytest.raises(ShapeError, match=r"input must be \[\*, 512\]"):
        wide.plan(torch.empty(4, 5))


def test_auto_takes_the_route_of_the_plan():
    layer = LowRankLinear(64, 64, rank=64)
    for rows, route in ((1, "factorized"), (4096, "merged")):
        x = torch.randn(rows, 64)
        assert layer.plan(x).route == route
        products = functional.linear_products("auto", *layer._arguments(x))
        assert (products is reference.merged_linear) == (route == "merged")


def test_flops_are_counted():
    layer, x = LowRankLinear(20, 30, rank=5, bias=False), torch.randn(64, 20)
    for route, forward in (("factorized", 2 * 64 * 5 * (20 + 30) + 2 * 30 * 5 * 5), ("merged", 2 * 64 * 20 * 30)):
        layer.route = route
        merging = 2 * 5 * 20 * (5 + 30) if route == "merged" else 0  # S Vᵀ, then U (S Vᵀ)
        with FlopCounterMode(display=False) as counter:
            y = layer(x)
            assert counter.get_total_flops() == forward + merging
            y.sum().backward()
            assert counter.get_total_flops() > 2 * (forward + merging)
    convolution = LowRankConv2d(3, 8, 3, rank=4)
    with FlopCounterMode(display=False) as counter:
        convolution(torch.randn(2, 3, 8, 8)).sum().backward()
    assert counter.get_total_flops() > 2 * 2 * 36 * 4 * (27 + 8)
