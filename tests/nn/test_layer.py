"""All layers: initialization, conversion, dtypes, meta device, copies, errors."""

import copy
import math
import pickle

import pytest
import torch
from helpers.layers import randomize
from helpers.matrices import kappa, non_orthonormality
from torch import nn
from torch.nn.utils import prune

import condlr_ext
from condlr_ext import LowRankConv2d, LowRankLinear, functional
from condlr_ext.errors import NonFiniteError, RankError, ShapeError


def test_fresh_layers_are_on_the_constraint_set_at_torchs_scale():
    for layer in (LowRankLinear(200, 300, rank=40), LowRankConv2d(16, 32, 3, groups=2, rank=20)):
        assert max(non_orthonormality(layer.U), non_orthonormality(layer.V)) < 1e-6
        assert kappa(layer.S.detach()) <= 1 + 1e-6 and layer.condition_number() <= 1 + 1e-6
    x = torch.randn(2000, 200)
    variance = LowRankLinear(200, 300, bias=False, rank=40)(x).var()
    assert variance.item() == pytest.approx(nn.Linear(200, 300, bias=False)(x).var().item(), rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_condition_number_is_that_of_the_weight(dtype):
    """An average of two layers is on no constraint set; one with scaled columns has another weight than its core."""
    for change in ("none", "average", "scaled", "dependent"):
        torch.manual_seed(0)
        layer, other = (LowRankLinear(30, 20, rank=5, dtype=dtype) for _ in range(2))
        with torch.no_grad():
            if change == "average":
                for p, q in zip(layer.parameters(), other.parameters(), strict=True):
                    p.add_(q).div_(2)
            elif change == "scaled":
                layer.V.mul_(torch.arange(1, 6))
            elif change == "dependent":
                layer.U[:, 1] = layer.U[:, 0]
        U, S, V = (X.detach().double() for X in (layer.U, layer.S, layer.V))
        sigma = torch.linalg.svdvals(U @ S @ V.mT)[:5]
        if change == "dependent":
            assert layer.condition_number() > 1e12
        else:
            assert layer.condition_number() == pytest.approx((sigma[0] / sigma[-1]).item(), rel=1e-5)
        assert condlr_ext.condition_numbers(nn.Sequential(layer))["0"] == layer.condition_number()
    layer.V.data[0] = math.nan
    with pytest.raises(NonFiniteError, match="LowRankLinear.condition_number: V must be finite"):
        layer.condition_number()


def test_from_dense_is_the_best_approximation():
    dense = nn.Linear(30, 20).double()
    sigma = torch.linalg.svdvals(dense.weight)
    for r in (1, 7, 20):
        layer = LowRankLinear.from_dense(dense, rank=r)
        error = (layer.weight - dense.weight).norm()
        assert error.item() == pytest.approx(sigma[r:].norm().item(), abs=1e-12)
        assert torch.equal(layer.bias, dense.bias) and layer.rank == r
    assert LowRankLinear.from_dense(dense, rank=0.3).rank == 6


def test_from_dense_keeps_mode_grad_and_dtype():
    dense = nn.Conv2d(3, 8, 3, padding=1).to(torch.bfloat16).eval().requires_grad_(False)
    layer = LowRankConv2d.from_dense(dense, rank=4)
    assert not layer.training and not layer.S.requires_grad and layer.U.dtype == torch.bfloat16
    assert layer.padding == (1, 1)
    with pytest.raises(TypeError, match="LowRankLinear.from_dense: module must be Linear, got Conv2d"):
        LowRankLinear.from_dense(dense, rank=2)


@pytest.mark.parametrize("value", [torch.zeros(4, 5), nn.Parameter(torch.zeros(4, 5)), None], ids=type)
def test_weight_is_differentiable_and_read_only(value):
    layer = LowRankLinear(5, 4, rank=2)
    layer.weight.sum().backward()
    assert all(p.grad is not None for p in (layer.U, layer.S, layer.V))
    with pytest.raises(AttributeError, match="LowRankLinear.weight is formed from U, S and V and cannot be assigned"):
        layer.weight = value
    assert set(layer.state_dict()) == {"U", "S", "V", "bias"}


def test_tools_that_look_at_weights():
    """Reading works; those that would put another weight in its place refuse, and leave the layer as it was."""
    layer = LowRankConv2d(3, 8, 3, rank=2)
    x = torch.randn(1, 3, 5, 5)
    before = layer(x)
    assert prune.L1Unstructured(amount=0.5).compute_mask(layer.weight, torch.ones(8, 3, 3, 3)).sum() == 108
    assert torch.nn.init._calculate_fan_in_and_fan_out(layer.weight) == (27, 72)
    assert layer.weight.device == layer.U.device and layer.weight.dtype == layer.U.dtype
    penalty = layer.weight.abs().sum()
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(penalty, (layer.U, layer.S, layer.V)))
    for tool in (
        lambda: prune.l1_unstructured(layer, "weight", 0.5),
        lambda: torch.nn.utils.parametrizations.spectral_norm(layer),
        lambda: torch.nn.utils.parametrizations.weight_norm(layer),
    ):
        with pytest.raises((TypeError, ValueError, KeyError)):
            tool()
        assert type(layer) is LowRankConv2d and set(layer.state_dict()) == {"U", "S", "V", "bias"}
        assert torch.equal(layer(x), before)


def test_meta_layers_and_their_parameters_later(backend):
    for layer in (
        LowRankLinear(20, 10, rank=3, device="meta"),
        LowRankConv2d(4, 6, 3, groups=2, rank=3, device="meta"),
    ):
        assert all(p.is_meta for p in layer.parameters()) and layer.weight.is_meta
        layer.to_empty(device="cpu").reset_parameters()
        assert max(non_orthonormality(layer.U), non_orthonormality(layer.V)) < 1e-6
        assert layer.condition_number() <= 1 + 1e-6 and layer.bias.isfinite().all()


def test_autocast_runs_in_its_dtype(backend):
    layer = LowRankLinear(20, 10, rank=4)
    conv = LowRankConv2d(2, 4, 3, rank=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, z = layer(torch.randn(3, 20)), conv(torch.randn(1, 2, 5, 5))
    assert y.dtype == z.dtype == torch.bfloat16
    (y.float().sum() + z.float().sum()).backward()
    assert layer.S.grad.dtype == torch.float32 and torch.isfinite(conv.V.grad).all()


def test_autocast_does_not_reach_to_dense_and_the_start():
    layer = LowRankLinear(20, 10, rank=4)
    exact = layer.to_dense().weight
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.to_dense().weight, exact)
        S = layer.S.detach().clone()
        condlr_ext.optim.CondLRSGD(layer, 0.1, tau=0.1)
    assert torch.equal(layer.S, S)


def test_factors_are_orthonormal_in_their_own_precision():
    layer = LowRankLinear(30, 20, rank=5, dtype=torch.float64)
    assert max(non_orthonormality(layer.U), non_orthonormality(layer.V)) < 1e-14


def test_meta_device_then_materialise():
    layer = LowRankLinear(6, 5, rank=2, device="meta")
    assert layer(torch.randn(3, 6, device="meta")).shape == (3, 5)
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert non_orthonormality(layer.U) < 1e-6
    assert torch.isfinite(layer(torch.randn(3, 6))).all()


def test_state_dict_pickle_deepcopy():
    layer = randomize(LowRankConv2d(2, 3, 3, rank=2))
    x = torch.randn(1, 2, 5, 5)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
    other = LowRankConv2d(2, 3, 3, rank=2)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x)) and set(layer.state_dict()) == {"U", "S", "V", "bias"}


def test_repr_names_the_rank():
    assert "rank=2" in repr(LowRankLinear(6, 5, rank=2))
    assert "rank=2, bias=False, groups=2" in repr(LowRankConv2d(2, 4, 3, groups=2, bias=False, rank=2))


U, S, V = torch.randn(4, 2), torch.randn(2, 2), torch.randn(5, 2)


X = torch.randn(3, 5)


linear, conv = functional.low_rank_linear, functional.low_rank_conv2d


image, Vc = torch.randn(1, 2, 6, 6), torch.randn(18, 2)


@pytest.mark.parametrize(
    "call,error,text",
    [
        (lambda: LowRankLinear(6, 5, rank=6), RankError, r"LowRankLinear: rank must be in 1..min\(m, n\) = 5 for a 5 x 6 weight, got 6"),
        (lambda: LowRankLinear(6, 5, rank=0), RankError, "got 0"),
        (lambda: LowRankLinear(6, 5, rank=1.5), RankError, r"a fraction must be in \(0, 1\], got 1.5"),
        (lambda: LowRankLinear(6, 5, rank=True), TypeError, "rank must be an int or a fraction"),
        (lambda: LowRankLinear("a", 5, rank=1), ValueError, "in_features must be an int >= 1, got 'a'"),
        (lambda: LowRankLinear(3, -5, rank=1), ValueError, "out_features must be an int >= 1, got -5"),
        (lambda: LowRankConv2d(0, 6, 3, rank=1), ValueError, "in_channels must be an int >= 1, got 0"),
        (lambda: LowRankConv2d(4, 6, 3, stride=1.5, rank=2), ValueError, "stride must be an int or 2 ints >= 1, got 1.5"),
        (lambda: LowRankConv2d(4, 6, None, rank=2), ValueError, "kernel_size must be an int or 2 ints >= 1, got None"),
        (lambda: LowRankConv2d(4, 6, 3, groups=3, rank=2), ValueError, "groups must divide in_channels = 4 and out_channels = 6, got 3"),
        (lambda: LowRankConv2d(4, 6, 3, padding="half", rank=2), ValueError, "padding must be ints"),
        (lambda: LowRankConv2d(4, 6, 3, padding="same", stride=2, rank=2), ValueError, "needs stride 1"),
        (lambda: LowRankConv2d(4, 6, (3, 3, 3), rank=2), ValueError, "kernel_size must be an int or 2 ints >= 1"),
        (lambda: LowRankConv2d(4, 6, 3, padding_mode="mirror", rank=2), ValueError, "padding_mode must be one of"),
        (lambda: linear(torch.randn(3, 4), U, S, V), ShapeError, r"input must be \[\*, 5\] to fit V \[5, 2\], got \[3, 4\]"),
        (lambda: linear(X, U, torch.randn(3, 3), V), ShapeError, "must share r"),
        (lambda: linear(X, U[0], S, V), ShapeError, "U, S, V must be matrices"),
        (lambda: linear(X, U, S, V, torch.randn(3)), ShapeError, r"bias must be \[4\] to fit U, got \[3\]"),
        (lambda: linear(X, torch.randn(4, 6), torch.randn(6, 6), torch.randn(5, 6)), RankError, "= 4, got 6"),
        (lambda: linear(X.double(), U, S, V), TypeError, "one dtype, got input torch.float64, U torch.float32"),
        (lambda: linear(X.int(), U, S, V), TypeError, "input must be a real floating-point tensor, got torch.int32"),
        (lambda: linear(X.to("meta"), U, S, V), ValueError, "one device, got cpu, meta"),
        (lambda: conv(image, U, S, Vc, kernel_size=2), ShapeError, "multiple of prod|must have 3 or 4 dimensions"),
        (lambda: conv(image[:, :1], U, S, Vc, kernel_size=3), ShapeError, "with 2 channels to fit V"),
        (lambda: conv(image, U, S, Vc, groups=3, kernel_size=3), ValueError, "groups must be a positive divisor of C_out = 4"),
        (lambda: conv(image, U, S, Vc, dilation=4, kernel_size=3), ShapeError, "is smaller than the kernel"),
        (lambda: conv(image, U, S, Vc, stride=0, kernel_size=3), ValueError, "stride must be an int or 2 ints >= 1, got 0"),
    ],
)  # fmt: skip
def test_bad_input(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_nan_core_is_named():
    model = nn.Sequential(nn.Linear(4, 4), LowRankLinear(4, 4, rank=2))
    model[1].S.data[0, 1] = math.nan
    with pytest.raises(NonFiniteError, match="layer 1: .*S must be finite"):
        condlr_ext.condition_numbers(model)


def test_parameters_can_be_swapped():
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        layer = LowRankLinear(6, 5, rank=2)
        U = layer.U
        layer.double().load_state_dict(LowRankLinear(6, 5, rank=2).state_dict())
        assert layer.U is U and U.dtype == torch.float64
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def test_row_space_of_from_dense():
    W, basis = nn.Linear(7, 5), torch.linalg.qr(torch.randn(7, 2)).Q
    layer = LowRankLinear.from_dense(W, 2, row_space=basis)
    torch.testing.assert_close(layer.weight, W.weight @ basis @ basis.mT)
    with pytest.raises(ShapeError, match=r"LowRankLinear.from_dense: row_space must be \[7, 3\], got \[7, 2\]"):
        LowRankLinear.from_dense(W, 3, row_space=basis)
    for bad in (1.1 * basis, torch.full((7, 2), torch.nan)):
        with pytest.raises(ValueError, match="row_space must have orthonormal columns to 1e-4, got"):
            LowRankLinear.from_dense(W, 2, row_space=bad)


def test_the_weight_cannot_be_pruned():
    layer = LowRankLinear(8, 6, rank=2)
    with pytest.raises(ValueError, match="LowRankLinear.weight is formed from U, S and V and cannot be pruned"):
        prune.l1_unstructured(layer, "weight", 0.5)
    assert not layer._forward_pre_hooks and set(layer._parameters) == {"U", "S", "V", "bias"}
