"""LowRankConv against torch's convolutions: function, gradients, geometry, memory formats."""

import copy
import itertools
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers.layers import CONVS, ROUTES, gradients, randomize
from helpers.matrices import backward_error, non_orthonormality
from torch import nn

from condlr_ext import LowRankConv1d, LowRankConv2d, LowRankConv3d, functional


@pytest.mark.parametrize("options", CONVS, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("cls", [LowRankConv1d, LowRankConv2d, LowRankConv3d])
@ROUTES
def test_conv_is_its_dense_twin(backend, cls, options, route):
    d = cls._d
    layer = randomize(cls(4, 6, **options, rank=3, dtype=torch.float64))
    layer.route = route
    dense = layer.to_dense()
    assert type(dense) is cls._dense and (dense.bias is None) == (options.get("bias") is False)
    x = torch.randn(2, 4, *[9, 8, 7][:d], dtype=torch.float64)
    torch.testing.assert_close(layer(x), dense(x))
    torch.testing.assert_close(layer(x[0]), dense(x[0]))
    if d == 2:
        nhwc = x.to(memory_format=torch.channels_last)
        torch.testing.assert_close(layer(nhwc), dense(x))
    assert layer.weight.shape == dense.weight.shape
    back = cls.from_dense(dense, rank=3)
    torch.testing.assert_close(back.weight, dense.weight)
    assert max(non_orthonormality(back.U), non_orthonormality(back.V)) < 1e-12


def test_geometry_may_differ_by_dimension(backend):
    """Depthwise, one size per dimension."""
    options = dict(kernel_size=(1, 3, 5), stride=(2, 1, 3), padding=(0, 1, 2), dilation=(1, 2, 1), groups=4)
    layer = randomize(LowRankConv3d(4, 8, **options, rank=2, dtype=torch.float64))
    x = torch.randn(2, 4, 6, 7, 8, dtype=torch.float64)
    for route in ("factorized", "merged"):
        layer.route = route
        torch.testing.assert_close(layer(x), layer.to_dense()(x))


def test_conv_of_one_tap_is_a_linear_map():
    layer = randomize(LowRankConv2d(5, 4, 1, rank=3, dtype=torch.float64))
    x = torch.randn(2, 5, 3, 3, dtype=torch.float64)
    flat = F.linear(x.movedim(1, -1), layer.weight.flatten(1), layer.bias).movedim(-1, 1)
    torch.testing.assert_close(layer(x), flat)


def image_layer(dtype, groups=1, **options):
    """Tensors of a convolution, and the layer and its plain twin as functions of them."""
    shapes = ((2, 6, 9, 9), (8, 5), (5, 5), (6 // groups * 9, 5), (8,))
    tensors = [torch.randn(s, dtype=dtype).double() / max(s[-1], 5) ** 0.5 for s in shapes]

    def plain(X, U, S, V, b):
        if options["route"] == "merged":
            return F.conv2d(X, (U @ S @ V.mT).reshape(8, -1, 3, 3), b, padding=1, groups=groups)
        filters = V.mT.reshape(5, -1, 3, 3).repeat(groups, 1, 1, 1)
        P = F.conv2d(X, filters, padding=1, groups=groups)
        return F.conv2d(P, (U @ S)[:, :, None, None], b, groups=groups)

    layer = partial(functional.low_rank_conv2d, kernel_size=3, padding=1, groups=groups, **options)
    return tensors, layer, plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("groups", [1, 2])
@ROUTES
def test_conv_error_is_that_of_plain_pytorch(backend, dtype, groups, route):
    """Outputs and gradients, in both memory formats, as for the linear layer."""
    exact, layer, plain = image_layer(dtype, groups, route=route)
    truth = [plain(*exact), *gradients(plain, exact)]
    for memory_format in (torch.contiguous_format, torch.channels_last):
        low = [t.to(dtype) for t in exact]
        low[0] = low[0].contiguous(memory_format=memory_format)
        ours, theirs = ([fn(*low), *gradients(fn, low)] for fn in (layer, plain))
        for o, p, t in zip(ours, theirs, truth, strict=True):
            assert o.dtype == dtype
            atol = torch.finfo(dtype).eps * t.abs().max()
            assert (o.double() - t).abs().max() <= 2 * (p.double() - t).abs().max() + atol


@ROUTES
def test_autocast_is_as_right_as_the_dtype(route):
    exact, layer, plain = image_layer(torch.float32, route=route)
    single = [t.float() for t in exact]
    truth = [plain(*exact), *gradients(plain, exact)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = [layer(*single), *gradients(layer, single)]
        theirs = [plain(*single), *gradients(plain, single)]
    assert ours[0].dtype == torch.bfloat16 and all(g.dtype == torch.float32 for g in ours[1:])
    for o, p, t in zip(ours, theirs, truth, strict=True):
        atol = torch.finfo(torch.bfloat16).eps * t.abs().max()
        assert (o.double() - t).abs().max() <= 2 * (p.double() - t).abs().max() + atol


@ROUTES
def test_channels_last_without_copies(route):
    """No activation changes its memory format on the way, and nothing is copied but filters."""
    layer = LowRankConv2d(16, 32, 3, padding=1, rank=8)
    layer.route = route
    # from 16 images on torch leaves pointwise convolutions to oneDNN also on one thread
    x = torch.randn(16, 16, 12, 12).to(memory_format=torch.channels_last).requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        y = layer(x)
        y.backward(torch.randn_like(y))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert x.grad.is_contiguous(memory_format=torch.channels_last)
    copies = [e.input_shapes[0] for e in profile.events() if e.name in ("aten::copy_", "aten::_to_copy")]
    assert copies and all(math.prod(shape) < x.numel() for shape in copies)


def test_float32_conv_error_is_that_of_plain_pytorch(backend):
    for groups, padding in itertools.product((1, 2), (0, 1)):
        layer = randomize(LowRankConv2d(6, 8, 3, padding=padding, groups=groups, rank=5))
        x = torch.randn(2, 6, 9, 9)
        exact = copy.deepcopy(layer).double()(x.double())
        plain = layer.to_dense()(x)
        bound = 2 * (plain.double() - exact).abs().max() + backward_error(torch.float32, 5) * exact.abs().max()
        assert (layer(x).double() - exact).abs().max() <= bound


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("d", [2, 3])
def test_memory_format_is_that_of_the_dense_twin(channels, d):
    """Also of an image with one channel, whose own strides do not tell, and through factorize and to_dense."""
    last = (torch.channels_last, torch.channels_last_3d)[d - 2]
    dense = (nn.Conv2d, nn.Conv3d)[d - 2](channels, 4, 3, padding=1)
    cls = (LowRankConv2d, LowRankConv3d)[d - 2]
    x = torch.randn(2, channels, *[5] * d)
    before = cls.from_dense(dense, rank=1.0)
    assert before(x).is_contiguous() and not before.channels_last
    for layer in (before.to(memory_format=last), cls.from_dense(dense.to(memory_format=last), rank=1.0)):
        y = copy.deepcopy(layer).double().float()(x)  # other conversions leave the format alone
        assert y.stride() == dense(x).stride() and y.is_contiguous(memory_format=last)
        torch.testing.assert_close(y, dense(x), rtol=0, atol=1e-5)
        assert layer.to_dense().weight.stride() == dense.weight.stride()
    if d == 2:  # torch has no way back from channels_last_3d that a module could take
        assert before.to(memory_format=torch.contiguous_format)(x).is_contiguous()


@ROUTES
def test_outputs_of_convolutions_may_be_changed_in_place(backend, route):
    layer = LowRankConv2d(3, 8, 3, rank=4)
    layer.route = route
    for x in (
        torch.randn(2, 3, 8, 8),
        torch.randn(3, 8, 8),
        torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last),
    ):
        layer(x).relu_().sum().backward()
