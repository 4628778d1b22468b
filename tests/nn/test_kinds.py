"""What a layer remembers for inputs of one kind never outlives what it was chosen for."""

import copy
import pickle

import pytest
import torch
from helpers.layers import randomize
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

from condlr_ext import LowRankConv2d, LowRankLinear, backend
from condlr_ext.errors import ShapeError

LAYERS = {
    "linear": (lambda: LowRankLinear(12, 9, rank=4), (40, 12)),
    "few rows": (lambda: LowRankLinear(12, 9, rank=4), (2, 12)),
    "merged": (lambda: LowRankLinear(64, 64, rank=64), (4096, 64)),
    "conv": (lambda: LowRankConv2d(3, 8, 3, stride=2, padding=1, rank=5), (2, 3, 9, 9)),
    "channels last": (
        lambda: LowRankConv2d(3, 8, 3, rank=5).to(memory_format=torch.channels_last), (2, 3, 9, 9)
    ),
    "reflect": (lambda: LowRankConv2d(3, 8, 3, padding=1, padding_mode="reflect", rank=5), (2, 3, 9, 9)),
    "same": (lambda: LowRankConv2d(3, 8, 2, padding="same", rank=5), (2, 3, 9, 9)),
}  # fmt: skip


def expected(layer, x):
    dense = layer.to_dense()
    return dense.double()(x.double()).to(x.dtype)


def assert_near(result, want):
    assert result.shape == want.shape and result.dtype == want.dtype
    assert (result - want).norm() <= 1e-5 * want.norm()


def check(layer, x):
    assert_near(layer(x), expected(layer, x))


@pytest.fixture(params=LAYERS)
def known(request):
    """A layer and an input of a kind that it has seen, with and without gradients."""
    torch.manual_seed(0)
    make, shape = LAYERS[request.param]
    layer, x = randomize(make()), torch.randn(shape)
    for _ in range(2):
        layer(x)
        with torch.no_grad():
            layer(x)
    return layer, x


def test_the_second_call_is_the_first(known):
    layer, x = known
    fresh = copy.deepcopy(layer)
    leaf = x.clone().requires_grad_()
    for _ in range(3):
        results = []
        for module in (layer, fresh):
            y = module(leaf)
            results.append([y, *torch.autograd.grad(y.square().sum(), [leaf, *module.parameters()])])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    check(layer, x)


def test_factors_that_were_replaced_or_changed(known):
    layer, x = known
    with torch.no_grad():
        layer.S.mul_(2)
    check(layer, x)
    layer.V.data = torch.randn_like(layer.V)
    check(layer, x)
    other = randomize(copy.deepcopy(layer))
    layer.U, layer.S, layer.V = other.U, other.S, other.V
    check(layer, x)
    layer.bias = None
    check(layer, x)
    layer.double()
    check(layer, x.double())
    with pytest.raises(TypeError, match="all tensors must have one dtype"):
        layer(x)
    layer.route = "factorized"
    check(layer, x.double())


@pytest.mark.parametrize("change", ["prune", "parametrize"])
@pytest.mark.parametrize("role", ["bias", "S"])
def test_parameters_that_became_computed(known, role, change):
    layer, x = known
    if change == "prune":
        prune.random_unstructured(layer, role, 0.5)
    else:

        class Half(nn.Module):
            def forward(self, p):
                return 0.5 * p

        parametrize.register_parametrization(layer, role, Half())
    check(layer, x)


CHANGES = {"stride": (1, 2), "padding": (2, 1), "dilation": (2, 1), "padding_mode": "circular"}


@pytest.mark.parametrize("name", CHANGES)
def test_a_geometry_that_changes(name):
    layer, x = randomize(LowRankConv2d(4, 8, 3, padding=1, rank=3)), torch.randn(2, 4, 9, 9)
    layer(x)
    setattr(layer, name, CHANGES[name])
    check(layer, x)


@pytest.mark.parametrize("mode", ["counter", "vmap"])
def test_a_first_call_under_a_transform_is_not_remembered(mode):
    layer, x = LowRankLinear(512, 512, rank=16), torch.randn(64, 512)
    twin = copy.deepcopy(layer)
    if mode == "counter":
        with FlopCounterMode(display=False):
            layer(x)
    else:
        torch.func.vmap(layer)(x.unsqueeze(0))
    assert torch.equal(layer(x), twin(x))


@pytest.mark.parametrize("error", [KeyError, RuntimeError])
def test_errors_of_others_pass_through(known, error):
    """A layer does not run again where a hook of someone else has raised."""
    layer, x = known
    leaf, raised = x.clone().requires_grad_(), []
    layer(leaf)

    def pack(t):
        if not raised:
            raised.append(t)
            raise error("once")
        return t

    with pytest.raises(error, match="once"), torch.autograd.graph.saved_tensors_hooks(pack, pack):
        layer(leaf)


def test_a_bias_of_another_shape_or_dtype(known):
    layer, x = known
    layer.bias.data = torch.ones(1)
    with pytest.raises(ShapeError, match="bias must be"):
        layer(x)
    layer.bias.data = torch.zeros(layer.U.shape[0], dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="all tensors must have one dtype"):
        layer(x)


def test_wrong_inputs_are_still_named(known):
    layer, x = known
    with pytest.raises(ShapeError, match="input"):
        layer(x[:, :2])
    with pytest.raises(TypeError, match="all tensors must have one dtype"):
        layer(x.double())
    with pytest.raises(TypeError, match="input must be a real floating-point tensor, got list"):
        layer(x.tolist())
    with pytest.raises(ValueError, match="all tensors must be on one device"):
        layer(x.to("meta"))


def test_copies_remember_nothing(known):
    layer, x = known
    for twin in (copy.deepcopy(layer), copy.copy(layer), pickle.loads(pickle.dumps(layer))):
        assert layer._products and not twin._products
        assert torch.equal(twin(x), layer(x))


def test_transforms_and_counters_after_ordinary_calls(known):
    layer, x = known
    want = expected(layer, x)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() > 0
    assert_near(torch.func.vmap(layer)(x.unsqueeze(0))[0], want)
    jvp = torch.func.jvp(layer, (x,), (x,))[1]
    assert_near(jvp, want - expected(layer, torch.zeros_like(x)))
    doubled = {name: 2 * p.detach() for name, p in layer.named_parameters()}
    zero = expected(layer, torch.zeros_like(x))
    got = torch.func.functional_call(layer, doubled, (x,))
    assert_near(got, 8 * (want - zero) + 2 * zero)
    check(layer, x)
    with torch.inference_mode():
        check(layer, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    with backend("reference"):
        check(layer, x)
    traced = torch.jit.trace(layer, x)
    assert_near(traced(x), want)
    traced = torch.fx.symbolic_trace(nn.Sequential(layer))
    assert_near(traced(x), want)
