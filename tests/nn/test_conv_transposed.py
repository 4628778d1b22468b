"""LowRankConvTranspose1d, 2d, 3d against torch's layers in float64, in function, gradients and geometry."""

import pytest
import torch
from helpers.layers import ROUTES, gradients, randomize
from torch import nn

from condlr_ext.errors import RankError, ShapeError
from condlr_ext.nn import LowRankConvTranspose1d, LowRankConvTranspose2d, LowRankConvTranspose3d

CLASSES = {1: LowRankConvTranspose1d, 2: LowRankConvTranspose2d, 3: LowRankConvTranspose3d}
GEOMETRIES = [
    dict(kernel_size=3),
    dict(kernel_size=2, stride=2, bias=False),
    dict(kernel_size=3, stride=2, padding=1, output_padding=1),
    dict(kernel_size=3, dilation=2, groups=2),
    dict(kernel_size=3, stride=3, padding=2, output_padding=2, groups=2, bias=False),
]
EACH = pytest.mark.parametrize("d", CLASSES)


def layer_and_input(d, rank=3, **geometry):
    layer = randomize(CLASSES[d](4, 6, **geometry, rank=rank).double())
    return layer, torch.randn(2, 4, *range(5, 5 + d), dtype=torch.float64)


@ROUTES
@EACH
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_function_and_gradients_are_those_of_the_dense_layer(d, geometry, route):
    layer, x = layer_and_input(d, **geometry)
    layer.route = route
    parameters = {name: p for name, p in layer.named_parameters()}

    def ours(x, *values):
        return torch.func.functional_call(layer, dict(zip(parameters, values, strict=True)), (x,))

    def dense(x, U, S, V, *bias):
        weight = (V @ S.mT @ U.mT).reshape(layer.weight_shape)
        module = layer._dense(4, 6, **geometry).double()
        return torch.func.functional_call(module, dict(zip(("weight", "bias"), (weight, *bias), strict=False)), (x,))

    values = [x, *parameters.values()]
    torch.testing.assert_close(ours(*values), dense(*values))
    torch.testing.assert_close(layer.weight, (layer.V @ layer.S.mT @ layer.U.mT).reshape(layer.weight_shape))
    for a, b in zip(gradients(ours, values), gradients(dense, values), strict=True):
        torch.testing.assert_close(a, b)


@EACH
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_conversions(d, geometry):
    dense = getattr(nn, f"ConvTranspose{d}d")(4, 6, **geometry).double().eval()
    layer, x = CLASSES[d].from_dense(dense, 1.0), torch.randn(2, 4, *range(5, 5 + d)).double()
    torch.testing.assert_close(layer(x), dense(x))
    torch.testing.assert_close(layer(x[0]), dense(x)[0])
    again = layer.to_dense()
    assert repr(again) == repr(dense) and list(again.state_dict()) == list(dense.state_dict())
    torch.testing.assert_close(again(x), dense(x))
    low = CLASSES[d].from_dense(dense, 2)
    folded = low.folded()
    torch.testing.assert_close(folded(x), low(x))
    assert folded.stride == dense.stride and folded.output_padding == dense.output_padding
    if isinstance(folded, nn.Sequential):
        assert [type(m).__name__ for m in folded] == [f"Conv{d}d", f"ConvTranspose{d}d"]


def test_size_of_the_output_may_be_given():
    layer, x = layer_and_input(2, kernel_size=3, stride=2, padding=1)
    dense = layer.to_dense()
    for size in ([9, 11], [10, 12], [2, 6, 10, 11]):
        torch.testing.assert_close(layer(x, output_size=size), dense(x, output_size=size))
    with pytest.raises(ValueError, match="output size"):
        layer(x, output_size=[30, 30])


def test_fresh_layers_have_the_scale_of_torch():
    torch.manual_seed(0)
    layer, dense = LowRankConvTranspose2d(32, 48, 3, rank=8), nn.ConvTranspose2d(32, 48, 3)
    assert layer.weight.norm().item() == pytest.approx(dense.weight.norm().item(), rel=0.02)
    assert layer.bias.abs().max() <= dense.bias.abs().max() * 1.1
    assert layer.condition_number() == pytest.approx(1)


def test_channels_last_is_kept():
    layer = LowRankConvTranspose2d(8, 6, 3, rank=4).to(memory_format=torch.channels_last)
    x = torch.randn(2, 8, 5, 5)
    for route in ("factorized", "merged"):
        layer.route = route
        assert layer(x).is_contiguous(memory_format=torch.channels_last)
    assert layer.to_dense().weight.is_contiguous(memory_format=torch.channels_last)


def test_traces_exports_and_transforms():
    layer, x = layer_and_input(2, kernel_size=3, stride=2)
    expected = layer(x)
    torch.testing.assert_close(torch.fx.symbolic_trace(nn.Sequential(layer))(x), expected)
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), expected)
    torch.testing.assert_close(torch.func.vmap(layer)(x), expected)


def test_refusals():
    layer, x = layer_and_input(2, kernel_size=3)
    with pytest.raises(
        ShapeError, match=r"LowRankConvTranspose2d: input must have 3 or 4 .* 4 channels, got \[2, 3, 4"
    ):
        layer(x[:, :3, :4])
    for options, message in (
        (dict(padding="same"), "padding must be ints"),
        (dict(padding_mode="circular"), 'padding_mode must be "zeros"'),
        (dict(groups=3), "groups must divide"),
    ):
        with pytest.raises(ValueError, match=f"^LowRankConvTranspose2d: {message}"):
            LowRankConvTranspose2d(4, 6, 3, **options, rank=1)
    with pytest.raises(RankError, match="in 1..min"):
        LowRankConvTranspose2d(4, 6, 3, rank=5)
