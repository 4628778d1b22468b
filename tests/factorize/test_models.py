"""Whole networks: factorized, trained under the bound and taken back."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers.layers import assert_close_float64
from helpers.models import MODELS, Conv1D, Encoder, ResNet, ViT, example_input
from torch import nn

import condlr_ext
from condlr_ext import LowRankConv2d, factorize, to_dense
from condlr_ext.nn import LowRankLayer, LowRankTransposedLinear

EACH = pytest.mark.parametrize("name", MODELS)


def built(name):
    """Return the model in float64 and eval mode, and an input."""
    x = example_input(name)
    return MODELS[name]().double().eval(), x.double() if x.is_floating_point() else x


@EACH
def test_full_rank_is_the_same_function_and_goes_back(name):
    model, x = built(name)
    before = model(x)
    state, classes = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    trained = {n: p.requires_grad for n, p in model.named_parameters()}
    report = factorize(model, rank=1.0, example_input=x)
    dense_left = [n for n, m in model.named_modules() if type(m) in (nn.Linear, nn.Conv2d, Conv1D)]
    others = {"vit": {"pos_embed"}, "gpt": {"wte", "wpe"}}.get(name, set())  # matrices of no layer
    assert set(dense_left) == set(report.skipped) - others == ({"lm_head"} if name == "gpt" else set())
    assert report.model_parameters == sum(p.numel() for p in model.parameters())
    assert sum(isinstance(m, LowRankLayer) for m in model.modules()) == len(report.layers)
    assert_close_float64(model(x), before)
    assert to_dense(model) is model and [type(m) for m in model.modules()] == classes
    assert_close_float64(model(x), before)
    after = model.state_dict()
    assert list(after) == list(state) and trained == {n: p.requires_grad for n, p in model.named_parameters()}
    for key, value in state.items():
        torch.testing.assert_close(after[key], value)
    model.load_state_dict(state)
    assert torch.equal(model(x), before)
    if name == "gpt":
        assert model.lm_head.weight is model.wte.weight


@EACH
def test_low_rank_is_its_dense_twin_in_function_and_gradient(name):
    model, x = built(name)
    factorize(model, rank=0.4)
    dense = to_dense(copy.deepcopy(model))
    (gradient,) = torch.autograd.grad(model(x).pow(2).sum(), model_input(model, name))
    (expected,) = torch.autograd.grad(dense(x).pow(2).sum(), model_input(dense, name))
    assert_close_float64(gradient, expected)
    assert_close_float64(model(x), dense(x))


def model_input(model, name):
    """A parameter at the bottom that is not factorized: its gradient has been through every layer."""
    return {
        "resnet": lambda: model.stem[1].weight,
        "vit": lambda: model.pos_embed,
        "encoder": lambda: model.encoder.layers[0].self_attn.in_proj_bias,
        "gpt": lambda: model.wpe.weight,
    }[name]()


@EACH
def test_two_lines_train_under_the_bound(name):
    model, x = MODELS[name](), example_input(name, 16)
    labels = torch.randint(0, 10, model(x).shape[:-1])
    report = factorize(model, budget=0.4)
    optimizer = condlr_ext.optim.CondLRSGD(model, lr=0.05, momentum=0.9, tau=0.5)
    assert report.kept <= 0.4 or all(r.rank == 1 for r in report.layers if r.parameters > r.dense_parameters)
    assert max(condlr_ext.condition_numbers(model).values()) <= 1.5 * (1 + 5e-6)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x).flatten(0, -2), labels.flatten())
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
        assert max(condlr_ext.condition_numbers(model).values()) <= 1.5 * (1 + 5e-6)
    assert losses[-1] < 0.8 * losses[0] and optimizer.skipped == 0
    model.eval()
    before = model(x)
    torch.testing.assert_close(to_dense(model)(x), before, rtol=0, atol=1e-4 * before.abs().max().item())


@EACH
def test_factorized_networks_are_copied_pickled_and_moved(name):
    model, x = MODELS[name]().eval(), example_input(name)
    factorize(model, rank=0.5)
    before = model(x)
    fresh = MODELS[name]().eval()
    factorize(fresh, rank=0.5, init="random")
    fresh.load_state_dict(model.state_dict())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fresh):
        assert torch.equal(twin(x), before)
    double = model.double()(x.double() if x.is_floating_point() else x)
    torch.testing.assert_close(double.float(), before, rtol=0, atol=1e-4)


def test_selection_by_name_type_and_predicate():
    def names(model, **options):
        return [r.name for r in factorize(model, rank=1, **options, dry_run=True).layers]

    attention = "encoder.layers.0.self_attn"
    one = Encoder(depth=1)
    everything = [
        f"{attention}.in_proj",
        f"{attention}.out_proj",
        "encoder.layers.0.linear1",
        "encoder.layers.0.linear2",
    ]
    assert sorted(names(one)) == sorted([*everything, "head"])
    # the name and the type of an attention stand for its projections
    assert names(one, include=attention) == names(one, include=nn.MultiheadAttention) == everything[:2]
    assert names(one, exclude=["*.self_attn", "head"]) == everything[2:]
    assert names(one, exclude=[nn.MultiheadAttention, "head"]) == everything[2:]
    assert names(one, include=f"{attention}.in_proj") == everything[:1]
    assert names(one, include="*.out_proj") == everything[1:2]
    assert names(one, include=lambda name, m: m.out_features == 96) == everything[:1]
    assert names(ViT(depth=1), include=["*qkv", "*.mlp.*"]) == ["blocks.0.attn.qkv", "blocks.0.mlp.0", "blocks.0.mlp.2"]
    assert names(ResNet(), include=nn.Conv2d, exclude="*shortcut*")[0] == "stem.0"
    assert names(ResNet(), include=lambda name, m: getattr(m, "groups", 1) > 1) == ["layer2.conv2"]
    assert factorize(Encoder(), rank={f"{attention}.in_proj": 5, "head": 0.5}).layers[0].rank == 5


def test_layers_of_a_resnet_keep_their_geometry():
    model = ResNet()
    factorize(model, rank=3)
    grouped, dilated, shortcut = model.layer2.conv2, model.layer3.conv2, model.layer2.shortcut[0]
    assert all(isinstance(m, LowRankConv2d) and m.bias is None for m in (grouped, dilated, shortcut))
    assert grouped.groups == 4 and dilated.dilation == (2, 2) and shortcut.stride == (2, 2)
    nhwc = ResNet().to(memory_format=torch.channels_last)
    x = example_input("resnet").to(memory_format=torch.channels_last)
    factorize(nhwc, rank=3)
    features = nhwc.layer1(nhwc.stem(x))
    assert features.is_contiguous(memory_format=torch.channels_last)
    assert to_dense(nhwc).layer1.conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_conv1d_of_a_gpt_has_its_own_class():
    model, x = MODELS["gpt"](), example_input("gpt")
    report = factorize(model, rank=4, example_input=x)
    layer = model.h[0].attn["c_attn"]
    assert type(layer) is LowRankTransposedLinear and layer.weight.shape == (32, 96)
    assert report.skipped == {
        "lm_head": "its weight is tied to that of wte",
        "wte": "an embedding is factorized where include or rank names it",
        "wpe": "an embedding is factorized where include or rank names it",
    }
    torch.testing.assert_close(layer(model.wpe.weight), model.wpe.weight @ layer.weight + layer.bias)
