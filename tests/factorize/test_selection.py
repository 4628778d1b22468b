"""Which layers factorize takes, what stays tied, and why others are skipped."""

import pytest
import torch
from helpers.models import Conv1D, ResNet, tied
from torch import nn
from torch.nn.utils import prune

import condlr_ext
from condlr_ext import LowRankLinear, factorize, to_dense


def test_include_exclude():
    def names(**options):
        return [x.name for x in factorize(ResNet(8), rank=2, **options).layers]

    assert names(include="layer?.conv*") == [f"layer{k}.conv{i}" for k in (1, 2, 3) for i in (1, 2)]
    assert names(include=nn.Linear) == ["fc"]
    assert names(exclude=[nn.Linear, "*.conv1", "layer[23].*"]) == ["stem.0", "layer1.conv2"]
    assert names(include=lambda name, m: m.weight.shape[-1] == 1) == ["layer2.shortcut.0", "layer3.shortcut.0"]
    # a plain name is the whole name: "4" is module 4, not 14
    deep = nn.Sequential(*[nn.Linear(4, 4) for _ in range(15)])
    assert [x.name for x in factorize(deep, rank=1, include="4").layers] == ["4"]


def test_shared_modules_stay_shared():
    shared = nn.Linear(6, 6)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.Linear(6, 6))})
    factorize(model, rank=2)
    assert model["a"] is model["b"][0] and isinstance(model["a"], LowRankLinear)


@pytest.mark.parametrize("init", ["svd", "random"])
def test_tied_layers_share_their_factors_and_are_tied_again(init):
    model = tied().double()
    x = torch.randn(5, 12, dtype=torch.float64)
    report = factorize(model, rank=8, init=init)
    assert [(r.name, r.tied_to) for r in report.layers] == [("0", None), ("2", "0"), ("1", None)]
    assert report.layers[1].parameters == 0 and report.kept == 2 * (8 * 20 + 64) / (2 * 96)
    for name in "USV":
        assert getattr(model[0], name) is getattr(model[2], name)
    assert model[0].bias is not model[2].bias
    # one gradient for both uses, one step for the shared factors: they stay one layer
    before = model(x)
    optimizer = condlr_ext.optim.CondLRSGD(model, lr=0.1, tau=0.5)
    model(x).pow(2).sum().backward()
    optimizer.step()
    assert torch.equal(model[0].weight, model[2].weight) and not torch.allclose(model(x), before)
    after = model(x)
    biases = [layer.bias for layer in model]
    to_dense(model)
    assert model[0].weight is model[2].weight and all(m.bias is b for m, b in zip(model, biases, strict=True))
    torch.testing.assert_close(model(x), after)


def test_weights_tied_to_something_else_are_left_alone():
    model = nn.ModuleDict({"embed": nn.Embedding(9, 6), "out": nn.Linear(6, 9, bias=False), "mid": nn.Linear(6, 6)})
    model["out"].weight = model["embed"].weight
    report = factorize(model, rank=2)
    assert [x.name for x in report.layers] == ["mid"] and report.skipped == {
        "out": "its weight is tied to that of embed"
    }
    assert model["out"].weight is model["embed"].weight
    # of two tied layers only one is chosen
    model = tied()
    report = factorize(model, rank=2, exclude="2")
    assert report.skipped == {"0": "its weight is tied to that of 2"} and model[0].weight is model[2].weight
    with pytest.raises(ValueError, match="0: its weight is tied to that of 2"):
        factorize(model, rank={"0": 2})
    with pytest.raises(ValueError, match=r"0, 2 have one weight and need one rank, got \[2, 3\]"):
        factorize(model, rank={"0": 2, "2": 3})
    # the same parameter, but transposed in one of them
    hf = nn.ModuleDict({"a": Conv1D(6, 6), "b": nn.Linear(6, 6), "c": nn.Linear(6, 6)})
    hf["b"].weight = hf["a"].weight
    report = factorize(hf, rank=2)
    assert set(report.skipped) == {"a", "b"} and [x.name for x in report.layers] == ["c"]


def test_what_is_skipped_says_why():
    class Mine(nn.Linear):
        pass

    class Attention(nn.MultiheadAttention):
        pass

    def replaced():
        layer = nn.Linear(6, 6)
        layer.forward = lambda x: x
        return layer

    def hooked():
        layer = nn.Linear(6, 6)
        layer.register_state_dict_pre_hook(lambda *_: None)
        return layer

    utils = nn.utils
    model = nn.ModuleDict(
        {
            "mine": Mine(6, 6),
            "attention": Attention(6, 2),
            "weight_norm": utils.parametrizations.weight_norm(nn.Linear(6, 6)),
            "spectral_norm": utils.parametrizations.spectral_norm(nn.Conv2d(3, 6, 3)),
            "attention_norm": utils.parametrizations.spectral_norm(nn.MultiheadAttention(6, 2), "in_proj_weight"),
            "old_norm": utils.spectral_norm(nn.Linear(6, 6)),
            "pruned": prune.l1_unstructured(nn.Linear(6, 6), "weight", 0.5),
            "lazy": nn.LazyLinear(6),
            "low": LowRankLinear(6, 6, rank=3),
            "replaced": replaced(),
            "hooked": hooked(),
            "complex": nn.Linear(6, 6, dtype=torch.complex64),
            "plain": nn.Linear(6, 6),
        }
    )
    before = {name: type(module) for name, module in model.named_modules()}
    report = factorize(model, rank=2, exclude="*.out_proj")
    parametrized = "its weight is parametrized (torch.nn.utils.parametrize)"
    assert report.skipped == {
        "mine": "a Mine may do more than its base class",
        "attention": "a Attention may do more than its base class",
        "weight_norm": parametrized,
        "spectral_norm": parametrized,
        "attention_norm": "its in_proj_weight is parametrized (torch.nn.utils.parametrize)",
        "old_norm": "its weight is not a plain parameter (pruned, or normalized by a hook)",
        "pruned": "its weight is not a plain parameter (pruned, or normalized by a hook)",
        "lazy": "its size is not known before its first forward",
        "low": "it is low-rank already, of rank 3",
        "replaced": "its forward was replaced on the instance",
        "hooked": "it has state_dict hooks, which know its dense weight",
        "complex": "its weight is torch.complex64",
    }
    assert "low: left as it is, it is low-rank already" in str(report)
    after = {name: type(module) for name, module in model.named_modules()}
    assert {name for name in before if before[name] is not after[name]} == {"plain"}
    with pytest.raises(ValueError, match="no layer to factorize .* low: it is low-rank already, of rank 3"):
        factorize(model, rank=2, include="low")


def test_what_is_compiled_on_its_own_is_skipped():
    """Its wrapper would go on to run the dense layer."""
    model = nn.Sequential(nn.Linear(20, 20), torch.compile(nn.Linear(20, 20), backend="eager"))
    report = factorize(model, rank=2)
    assert [layer.name for layer in report.layers] == ["0"]
    assert "compiled on its own" in report.skipped["1._orig_mod"] and type(model[1]._orig_mod) is nn.Linear
