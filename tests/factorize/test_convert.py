"""factorize and to_dense: ranks, functions, hooks, flags and errors, which change nothing."""

import copy
import math
import pickle

import pytest
import torch
from helpers.models import Conv1D, ResNet, mlp
from torch import nn

import condlr_ext
from condlr_ext import Energy, LowRankConv2d, LowRankLinear, factorize, to_dense
from condlr_ext.errors import NonFiniteError, RankError


def test_rank_forms():
    for rank, expected in (
        (20, (20, 20)),
        (0.2, (13, 52)),
        ({"0": 5}, (5, None)),
        ({"0": 0.5, "2": 7}, (32, 7)),
    ):
        model = mlp()
        factorize(model, rank=rank, exclude="4")
        assert tuple(getattr(model[i], "rank", None) for i in (0, 2)) == expected
    assert factorize(mlp()).budget == 0.3


def test_full_rank_keeps_the_function_and_goes_back():
    model = ResNet(8).double().eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    before = model(x)
    report = factorize(model, rank=1.0)
    assert len(report.layers) == 10 and isinstance(model.layer1.conv1, LowRankConv2d)
    torch.testing.assert_close(model(x), before)
    assert to_dense(model) is model and type(model.layer1.conv1) is nn.Conv2d
    torch.testing.assert_close(model(x), before)


def test_hooks_move_along_and_back():
    model = mlp()
    seen = []
    handles = [
        model[0].register_forward_pre_hook(lambda m, args: seen.append(("pre", type(m)))),
        model[0].register_forward_hook(lambda m, args, kwargs, y: 2 * y, with_kwargs=True),
        model[0].register_full_backward_hook(lambda m, gi, go: seen.append(("backward", type(m)))),
    ]
    x = torch.randn(3, 64)
    before = model[0](x)
    for convert, cls in ((lambda: factorize(model, rank=1.0), LowRankLinear), (lambda: to_dense(model), nn.Linear)):
        convert()
        seen.clear()
        y = model[0](x)
        y.sum().backward()
        assert seen == [("pre", cls), ("backward", cls)]
        torch.testing.assert_close(y, before, rtol=0, atol=1e-5)
    handles[1].remove()
    torch.testing.assert_close(2 * model[0](x), before, rtol=0, atol=1e-5)


def test_dry_run_says_what_would_happen_and_does_nothing():
    model = ResNet(8).train()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.randn(2, 3, 8, 8)
    random = torch.get_rng_state()
    dry = factorize(model, budget=0.4, example_input=x, dry_run=True)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items()) and set(state) == set(
        model.state_dict()
    )
    assert all(m.training for m in model.modules()) and not any(m._forward_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    real = factorize(model, budget=0.4, example_input=x)
    assert dry.dry_run and not real.dry_run and dry.layers == real.layers
    assert "would keep 3" in str(dry) and str(real) == str(dry).replace("would keep", "kept")
    assert [r.kappa for r in real.layers] == pytest.approx(list(condlr_ext.condition_numbers(model).values()), rel=1e-4)


def test_hf_conv1d_and_back():
    model = nn.Sequential(Conv1D(24, 8), nn.GELU(), Conv1D(8, 24)).double()
    model[0].weight.requires_grad_(False)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    before = model(x)
    weight, bias = model[0].weight.detach().clone(), model[0].bias
    report = factorize(model, rank=1.0)
    layer = model[0]
    assert [(r.m, r.n, r.rank) for r in report.layers] == [(24, 8, 8), (8, 24, 8)]
    assert (
        layer.U.shape == (24, 8) and layer.V.shape == (8, 8) and layer.bias is bias and (layer.nf, layer.nx) == (24, 8)
    )
    assert layer.weight.shape == (8, 24) and not layer.U.requires_grad
    torch.testing.assert_close(layer.weight, weight)
    torch.testing.assert_close(model(x), before)
    assert type(to_dense(copy.deepcopy(pickle.loads(pickle.dumps(layer))))) is Conv1D
    to_dense(model)
    assert type(model[0]) is Conv1D and model[0].weight.shape == (8, 24) and model[0].nf == 24
    assert not model[0].weight.requires_grad and model[2].weight.requires_grad
    torch.testing.assert_close(model(x), before)
    with pytest.raises(TypeError, match="module must be HF's Conv1D, got Linear"):
        condlr_ext.nn.LowRankTransposedLinear.from_dense(nn.Linear(3, 3), rank=1)
    with pytest.raises(ValueError, match="a bare Conv1D; use LowRankTransposedLinear.from_dense"):
        factorize(Conv1D(3, 3), rank=1)


@pytest.mark.parametrize("init", ["svd", "random"])
def test_what_is_trained_and_the_mode_are_kept(init):
    model = mlp().eval()
    model[0].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    factorize(model, rank=2, init=init, exclude="4")
    assert not any(p.requires_grad for p in model[0].parameters()) and not model[0].training
    assert {n: p.requires_grad for n, p in model[2].named_parameters()} == {
        "U": True,
        "S": True,
        "V": True,
        "bias": False,
    }
    to_dense(model)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == {
        "0.weight": False, "0.bias": False, "2.weight": True, "2.bias": False, "4.weight": True, "4.bias": True,
    }  # fmt: skip
    assert not model[0].training and not model[2].training


def test_meta_modules():
    model, x = nn.Sequential(nn.Linear(6, 6, device="meta")), torch.empty(4, 6, device="meta")
    report = factorize(model, rank=2, example_input=x)
    assert model[0].U.is_meta and model[0].rank == 2
    assert math.isnan(report.layers[0].kappa) and report.layers[0].flops == 2 * 4 * 2 * 12 + 2 * 4 * 4
    with pytest.raises(ValueError, match='layer 0: measure="time" needs real weights, got the meta device'):
        factorize(nn.Sequential(nn.Linear(6, 6, device="meta")), measure="time", budget=1, example_input=x)
    with pytest.raises(ValueError, match='layer 0: init="pca" needs real weights and inputs, got the meta device'):
        factorize(nn.Sequential(nn.Linear(6, 6, device="meta")), rank=2, init="pca", example_input=x)


def test_random_init_and_dtype():
    model = mlp().double()
    weight = model[0].weight.detach().clone()
    bias = model[0].bias
    factorize(model, rank=4, init="random")
    assert model[0].U.dtype == torch.float64 and (model[0].weight - weight).norm() > weight.norm()
    # the scale is that of the weight that was there; of none, torch's default
    assert model[0].weight.norm().item() == pytest.approx(weight.norm().item()) and model[0].bias is bias
    zero = nn.Sequential(nn.Linear(30, 60))
    nn.init.zeros_(zero[0].weight)
    factorize(zero, rank=10, init="random")
    assert zero[0].weight.norm().item() == pytest.approx((60 / 3) ** 0.5, rel=1e-5)


class BatchNet(ResNet):
    """Fails on anything but batches of 2."""

    def forward(self, x):
        if len(x) != 2:
            raise RuntimeError("two images, please")
        return super().forward(x)


@pytest.mark.parametrize(
    "options,text",
    [
        (dict(rank=2, measure="flops"), "measure='flops' is for a budget, got rank=2"),
        (dict(budget=0.3, measure="flops"), "measure='flops' needs example_input, got None"),
        (dict(budget=0.3, measure="memory"), "measure must be one of parameters, flops, time, got 'memory'"),
        (dict(rank=2, example_input=torch.zeros(3, 3, 8, 8)), "the model fails on example_input: two images, please"),
    ],
)
def test_bad_measures_and_examples_leave_the_model_unchanged(options, text):
    model = BatchNet().train()
    with pytest.raises(ValueError, match=text):
        factorize(model, **options)
    assert type(model.stem[0]) is nn.Conv2d
    assert all(m.training for m in model.modules()) and not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(
    "options,error,text",
    [
        (dict(budget=0.3, rank=4), ValueError, "give budget or rank, not both"),
        (dict(budget=0), ValueError, "budget must be a number > 0, got 0"),
        (dict(rank=11), RankError, r"layer 4: rank must be in 1..min\(m, n\) = 10 for a 10 x 256 weight, got 11"),
        (dict(rank=-1), RankError, "got -1"),
        (dict(rank={"0": 3, "nine": 2}), ValueError, "rank names layers that are not there or not eligible: nine"),
        (dict(rank=2, include="nine"), ValueError, "include 'nine' matches nothing"),
        (dict(rank=2, exclude=3), TypeError, "exclude must be a name, a type"),
        (dict(rank=2, include=nn.Conv2d), ValueError, "no layer to factorize with include=<class"),
        (dict(rank={}), ValueError, "no layer to factorize with include=None, exclude=None, rank={}"),
        (dict(budget=float("inf")), ValueError, "budget must be a number > 0, got inf"),
        (dict(rank=2, init="zeros"), ValueError, 'init must be "svd", "random" or "pca", got .zeros'),
        (dict(rank=2, init="pca"), ValueError, 'init="pca" needs example_input, a batch of the data, got None'),
        (dict(rank=2, init="pca", example_input=torch.zeros(3, 7)), ValueError, "the model fails on example_input"),
        (dict(rank=2, init="pca", example_input=torch.full((3, 64), torch.nan)), NonFiniteError, "layer 0: its inputs on"),
    ],
)  # fmt: skip
def test_errors_leave_the_model_unchanged(options, error, text):
    model = mlp()
    with pytest.raises(error, match=text):
        factorize(model, **options)
    assert [type(m) for m in model] == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_random_init_has_the_scale_of_the_weight(scale):
    model = mlp()
    model[0].weight.data *= scale
    norm = model[0].weight.double().norm().item()
    factorize(model, rank=4, init="random")
    assert model[0].weight.double().norm().item() == pytest.approx(norm, rel=1e-5)


def test_singular_values_beyond_the_dtype_are_named():
    model = mlp().half()
    model[2].weight.data.fill_(6e4)
    with pytest.raises(NonFiniteError, match="factorize: layer 2: .*within the range of torch.float16"):
        factorize(model, rank=3)
    assert type(model[0]) is nn.Linear


def test_nan_weight_names_the_layer():
    model = mlp()
    model[2].weight.data[3, 3] = torch.nan
    for options in (dict(rank=3), dict(rank=3, init="random"), dict(rank=Energy(0.5))):
        with pytest.raises(NonFiniteError, match="factorize: layer 2"):
            factorize(model, **options)
        assert type(model[0]) is nn.Linear


def test_a_bare_layer_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match="use LowRankLinear.from_dense"):
        factorize(nn.Linear(4, 4), rank=2)
    layer = LowRankLinear(4, 4, rank=2)
    assert type(to_dense(layer)) is nn.Linear
    assert condlr_ext.condition_numbers(layer)[""] <= 1 + 1e-6
