"""factorize and to_dense on real modules: which layers, which ranks, nothing changed on error."""

import pytest
import torch
from torch import nn

import condlr_ext
from condlr_ext import LowRankConv2d, LowRankLinear, factorize, to_dense
from condlr_ext.errors import NonFiniteError, RankError
from condlr_ext.factorize import allocate_ranks, stored_parameters


def mlp():
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


class Block(nn.Module):
    """A residual block with its own forward, which must survive."""

    def __init__(self, c):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(c, c, 3, padding=1), nn.Conv2d(c, c, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(c)

    def forward(self, x):
        return x + self.conv2(torch.relu(self.norm(self.conv1(x))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.blocks = nn.ModuleList([Block(8), Block(8)])
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


def test_equal_spend_example():
    model = mlp()
    report = factorize(model, budget=0.27, exclude="4")
    assert [(x.name, x.rank) for x in report.layers] == [("0", 32), ("2", 20)]
    assert isinstance(model[0], LowRankLinear) and type(model[4]) is nn.Linear
    assert report.kept <= 0.27 and "32" in str(report) and "skipped" not in str(report)


@pytest.mark.parametrize("budget", [0.01, 0.1, 0.27, 0.5, 0.9, 2.0])
def test_allocation_spends_the_budget_evenly(budget):
    shapes = {"a": (256, 64), "b": (256, 256), "c": (10, 256), "d": (300, 70), "e": (64, 9)}
    ranks = allocate_ranks(shapes, budget)
    cost = {k: stored_parameters(ranks[k], *s) for k, s in shapes.items()}
    total = budget * sum(m * n for m, n in shapes.values())
    assert all(1 <= ranks[k] <= min(s) for k, s in shapes.items())
    share = total / len(shapes)
    assert sum(cost.values()) <= total or any(r == 1 and cost[k] > share for k, r in ranks.items())
    step = {k: stored_parameters(ranks[k] + 1, *s) - cost[k] for k, s in shapes.items() if ranks[k] < min(s)}
    assert all(price > total - sum(cost.values()) for price in step.values())  # nothing more fits
    # layers that are not full rank got the same, to within what rounding down left over
    spent = [cost[k] for k in step if ranks[k] > 1]
    assert not spent or max(spent) - min(spent) <= sum(step.values())


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
    model = Net().double().eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    before = model(x)
    report = factorize(model, rank=1.0)
    assert len(report.layers) == 6 and isinstance(model.blocks[0].conv1, LowRankConv2d)
    torch.testing.assert_close(model(x), before)
    assert to_dense(model) is model and type(model.blocks[0].conv1) is nn.Conv2d
    torch.testing.assert_close(model(x), before)


def test_include_exclude():
    def names(**options):
        return [x.name for x in factorize(Net(), rank=2, **options).layers]

    assert names(include="blocks.*") == [
        "blocks.0.conv1",
        "blocks.0.conv2",
        "blocks.1.conv1",
        "blocks.1.conv2",
    ]
    assert names(include=nn.Linear) == ["head"]
    assert names(exclude=[nn.Linear, "*.conv1"]) == ["stem", "blocks.0.conv2", "blocks.1.conv2"]
    assert names(include=lambda name, m: m.bias is None) == ["blocks.0.conv2", "blocks.1.conv2"]
    # a plain name is the whole name: "4" is module 4, not 14
    deep = nn.Sequential(*[nn.Linear(4, 4) for _ in range(15)])
    assert [x.name for x in factorize(deep, rank=1, include="4").layers] == ["4"]


def test_shared_modules_and_tied_weights():
    shared = nn.Linear(6, 6)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.Linear(6, 6))})
    factorize(model, rank=2)
    assert model["a"] is model["b"][0] and isinstance(model["a"], LowRankLinear)

    tied = nn.ModuleDict({"embed": nn.Embedding(9, 6), "out": nn.Linear(6, 9, bias=False), "mid": nn.Linear(6, 6)})
    tied["out"].weight = tied["embed"].weight
    report = factorize(tied, rank=2)
    assert [x.name for x in report.layers] == ["mid"] and "tied to that of embed" in report.skipped["out"]
    assert tied["out"].weight is tied["embed"].weight


def test_subclasses_are_left_alone_with_a_reason():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "out": nn.Linear(8, 8)})
    report = factorize(model, rank=2)
    assert [x.name for x in report.layers] == ["out"]
    assert "NonDynamicallyQuantizableLinear" in report.skipped["attention.out_proj"]


def test_hooks_are_not_lost():
    model = mlp()
    model[0].register_forward_hook(lambda *_: None)
    report = factorize(model, rank=2)
    assert report.skipped == {"0": "it has hooks, which would be lost"} and type(model[0]) is nn.Linear


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


def test_parametrised_and_meta_modules():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)), nn.Linear(6, 6))
    report = factorize(model, rank=2)
    assert [x.name for x in report.layers] == ["1"] and "0" in report.skipped
    meta = nn.Sequential(nn.Linear(6, 6, device="meta"))
    factorize(meta, rank=2)
    assert meta[0].U.is_meta and meta[0].rank == 2


def test_random_init_and_dtype():
    model = mlp().double()
    weight = model[0].weight.detach().clone()
    factorize(model, rank=4, init="random")
    assert model[0].U.dtype == torch.float64 and (model[0].weight - weight).norm() > weight.norm()


@pytest.mark.parametrize(
    "options,error,text",
    [
        (dict(budget=0.3, rank=4), ValueError, "give budget or rank, not both"),
        (dict(budget=0), ValueError, "budget must be a number > 0, got 0"),
        (dict(rank=11), RankError, r"layer 4: rank must be in 1..min\(m, n\) = 10 for a 10 x 256 weight, got 11"),
        (dict(rank=-1), RankError, "got -1"),
        (dict(rank={"0": 3, "nine": 2}), ValueError, "rank names layers that are not there or not eligible: nine"),
        (dict(rank=2, include="nine"), ValueError, "include 'nine' matches no module"),
        (dict(rank=2, exclude=3), TypeError, "exclude must be a name, a type"),
        (dict(rank=2, include=nn.Conv2d), ValueError, "no layer to factorise with include=<class"),
        (dict(rank={}), ValueError, "no layer to factorise with include=None, exclude=None, rank={}"),
        (dict(budget=float("inf")), ValueError, "budget must be a number > 0, got inf"),
        (dict(rank=2, init="zeros"), ValueError, 'init must be "svd" or "random"'),
    ],
)  # fmt: skip
def test_errors_leave_the_model_unchanged(options, error, text):
    model = mlp()
    with pytest.raises(error, match=text):
        factorize(model, **options)
    assert [type(m) for m in model] == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]


def test_nan_weight_names_the_layer():
    model = mlp()
    model[2].weight.data[3, 3] = torch.nan
    with pytest.raises(NonFiniteError, match="factorize: layer 2"):
        factorize(model, rank=3)
    assert type(model[0]) is nn.Linear


def test_a_bare_layer_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match="use LowRankLinear.from_dense"):
        factorize(nn.Linear(4, 4), rank=2)
    layer = LowRankLinear(4, 4, rank=2)
    assert type(to_dense(layer)) is nn.Linear
    assert condlr_ext.condition_numbers(layer)[""] <= 1 + 1e-6
