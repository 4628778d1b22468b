"""factorize and to_dense: which layers, which ranks, what is tied stays tied, nothing changed on error."""

import copy
import math
import pickle
import time

import pytest
import torch
from helpers.models import Conv1D
from torch import nn
from torch.nn.utils import prune

import condlr_ext
from condlr_ext import Energy, LowRankConv2d, LowRankLinear, factorize, to_dense
from condlr_ext.errors import NonFiniteError, RankError, ShapeError
from condlr_ext.factorize import principal
from condlr_ext.factorize.budget import allocate_ranks, parameter_cost, stored_parameters
from condlr_ext.factorize.costs import Clock, LayerCall
from condlr_ext.factorize.principal import patches
from condlr_ext.factorize.selection import select


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
    ranks = allocate_ranks({k: parameter_cost(*s) for k, s in shapes.items()}, budget)
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


def test_shared_modules_stay_shared():
    shared = nn.Linear(6, 6)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.Linear(6, 6))})
    factorize(model, rank=2)
    assert model["a"] is model["b"][0] and isinstance(model["a"], LowRankLinear)


def tied():
    model = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 12), nn.Linear(12, 8))
    model[2].weight = model[0].weight
    return model


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


def test_a_budget_counts_tied_layers_once():
    model = tied()
    report = factorize(model, budget=0.5, dry_run=True)
    assert {r.name: r.rank for r in report.layers} == {"0": 2, "2": 2, "1": 2} and report.kept <= 0.5
    flops = factorize(model, budget=0.5, measure="flops", example_input=torch.randn(100, 12), dry_run=True)
    assert flops.spent <= 0.5 and flops.layers[0].flops == flops.layers[1].flops > 0


def test_weights_tied_to_something_else_are_left_alone():
    model = nn.ModuleDict({"embed": nn.Embedding(9, 6), "out": nn.Linear(6, 9, bias=False), "mid": nn.Linear(6, 6)})
    model["out"].weight = model["embed"].weight
    report = factorize(model, rank=2)
    assert [x.name for x in report.layers] == ["mid"] and report.skipped == {
        "out": "its weight is tied to that of embed"
    }
    assert model["out"].weight is model["embed"].weight
    # of two tied layers only one is wanted
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


def test_rank_by_energy():
    """Of a weight with known spectrum: 8, 4, 2, 1, 0, 0 hold 64, 80, 84, 85 of 85."""
    Q, P = (torch.linalg.qr(torch.randn(n, 6, dtype=torch.float64))[0] for n in (9, 7))
    W = Q * torch.tensor([8.0, 4.0, 2.0, 1.0, 0.0, 0.0], dtype=torch.float64) @ P.mT
    for weight, model, cls in (
        (W, nn.Sequential(nn.Linear(7, 9)), nn.Linear),
        (W.mT, nn.Sequential(nn.Linear(9, 7)), nn.Linear),
        (W.mT, nn.Sequential(Conv1D(9, 7)), Conv1D),
        (1e-160 * W, nn.Sequential(nn.Linear(7, 9)), nn.Linear),  # whose squares underflow
    ):
        model.double()[0].weight.data = weight.clone()
        for share, rank in ((64 / 85 - 1e-6, 1), (64 / 85 + 1e-6, 2), (0.95, 3), (0.99, 4), (1.0, 4)):
            report = factorize(model, rank=Energy(share), dry_run=True)
            assert report.layers[0].rank == rank and type(model[0]) is cls
            assert math.isclose(report.layers[0].kappa, 2 ** (rank - 1), rel_tol=1e-9)
    # in a dictionary, and in from_dense
    model = mlp()
    factorize(model, rank={"0": 5, "2": Energy(0.5), "4": 0.5})
    assert [model[0].rank, model[4].rank] == [5, 5] and 20 < model[2].rank < 128
    linear = nn.Linear(7, 9).double()
    linear.weight.data = W
    assert LowRankLinear.from_dense(linear, rank=Energy(0.95)).rank == 3
    linear.weight.data = torch.zeros_like(W)
    assert LowRankLinear.from_dense(linear, rank=Energy(0.95)).rank == 1


@pytest.mark.parametrize(
    "call,error,text",
    [
        (lambda: Energy(0), RankError, r"Energy: share must be in \(0, 1\], got 0"),
        (lambda: Energy("much"), TypeError, "Energy: share must be a number, got 'much'"),
        (lambda: LowRankLinear(4, 4, rank=Energy(0.5)), TypeError, r"must be an int or a fraction .* got Energy\(0.5\)"),
        (lambda: factorize(nn.Sequential(nn.Linear(4, 4, device="meta")), rank=Energy(0.5)), ValueError,
         "layer 0: rank=Energy.0.5. needs the values of the weight"),
        (lambda: factorize(mlp(), rank="half"), TypeError, "or an Energy, got 'half'"),
    ],
)  # fmt: skip
def test_bad_energy(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_dry_run_says_what_would_happen_and_does_nothing():
    model = Net().train()
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


def test_report_on_an_example():
    """FLOPs by hand: of the stem, a 3 x 3 convolution from 3 to 8 channels, 36 pixels, batch 2."""
    model = Net()
    report = factorize(model, rank=2, example_input=torch.randn(2, 3, 8, 8))
    stem, head = report.layers[0], report.layers[-1]
    assert stem.name == "stem" and stem.weight_shape == (8, 3, 3, 3) and (stem.m, stem.n) == (8, 27)
    assert stem.dense_flops == 2 * 72 * 8 * 27 and stem.flops == 2 * 72 * 2 * (8 + 27) + 2 * 8 * 4
    assert head.dense_flops == 2 * 2 * 5 * 8 and head.flops == 2 * 2 * 2 * (5 + 8) + 2 * 2 * 4
    plan = model.stem.plan(torch.empty(2, 3, 8, 8))  # the image needs no gradient
    assert (stem.route, stem.gain) == (plan.route, plan.gain)
    text = str(report).splitlines()
    assert text[0].split() == ["layer", "weight", "rank", "κ", "parameters", "kept", "Mflop", "route", "gain"]
    assert "8 x 27" in text[1] and "216 -> 74" in text[1] and f"0.0311 -> {stem.flops / 1e6:.3g}" in text[1]
    assert len({len(line) for line in text[:-1]}) == 1  # columns are aligned


def test_a_layers_own_hooks_do_not_disturb_the_example():
    """FLOPs are of what the layer returns, not of what a hook makes of it; a timed layer runs without its hooks."""
    model, x = mlp(), torch.randn(3, 64)
    calls = []
    model[4].register_forward_hook(lambda m, args, y: calls.append(y) or (y, y))
    (target,), _ = select(model, "4", None)
    assert Clock(True).seconds(target, LayerCall((3, 256), True, 3)) > 0 and not calls
    assert factorize(model, rank=2, example_input=x, include="4").layers[0].dense_flops == 2 * 3 * 10 * 256
    assert len(calls) == 1


def test_grouped_convolutions_share_their_filters():
    """Each of the g groups is convolved with all r filters."""
    model = nn.Sequential(nn.Conv2d(8, 12, 3, groups=4))
    report = factorize(model, rank=3, example_input=torch.randn(1, 8, 5, 5))
    (layer,) = report.layers
    assert layer.dense_flops == 2 * 9 * 12 * 18 and layer.flops == 2 * 9 * 3 * (4 * 18 + 12) + 2 * 9 * 9


@pytest.mark.parametrize("budget", [0.1, 0.3, 0.8])
def test_flops_are_spent_evenly(budget):
    model = Net()
    x = torch.randn(4, 3, 16, 16)
    report = factorize(model, budget=budget, measure="flops", example_input=x)
    cost = {r.name: r.flops for r in report.layers}
    total = budget * sum(r.dense_flops for r in report.layers)
    over = any(r.rank == 1 and r.flops > total / len(cost) for r in report.layers)
    assert report.measure == "flops" and (report.spent <= budget or over) and over == (budget == 0.1)
    assert ("over the budget of 10.0%" in str(report)) == over
    step = {}
    for r in report.layers:
        if r.rank < min(r.m, r.n):
            rows = r.dense_flops // (2 * r.m * r.n)
            more = 2 * rows * (r.rank + 1) * (r.m + r.n) + 2 * min(rows, r.m) * (r.rank + 1) ** 2
            step[r.name] = more - r.flops
    assert all(amount > total - sum(cost.values()) for amount in step.values())  # nothing more fits
    spent = [cost[name] for name in step if next(r.rank for r in report.layers if r.name == name) > 1]
    assert not spent or max(spent) - min(spent) <= sum(step.values())


def test_a_flops_budget_leaves_what_cannot_be_saved():
    """A projection to one number costs m n whatever the rank; one module is not part of the forward."""

    class Forward(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.one, self.unused = nn.Linear(64, 64), nn.Linear(64, 1), nn.Linear(64, 64)

        def forward(self, *, x):
            return self.one(self.wide(x))

    model = Forward()
    report = factorize(model, budget=0.25, measure="flops", example_input={"x": torch.randn(100, 64)})
    assert [r.name for r in report.layers] == ["wide"] and report.spent <= 0.25
    assert report.skipped == {
        "one": "no rank makes it cheaper: 0.013 Mflop at rank 1, 0.0128 dense",
        "unused": "it is not called on example_input",
    }


def test_time_is_measured():
    """Against a clock of our own, within a factor of fifty, which tells seconds from milliseconds on any busy machine;
    256 times the work takes many times as long."""
    model, x = nn.Sequential(nn.Linear(256, 512)).eval(), torch.randn(256, 256)
    random = torch.get_rng_state()
    report = factorize(model, budget=0.6, measure="time", example_input=x, dry_run=True)
    assert torch.equal(torch.get_rng_state(), random)
    ours = []
    for _ in range(50):
        start = time.perf_counter()
        with torch.no_grad():
            model[0](x)
        ours.append(time.perf_counter() - start)
    (layer,) = report.layers
    assert 1 / 50 < layer.dense_seconds / min(ours) < 50
    assert 0 < layer.seconds and 1 <= layer.rank < 256 and "ms" in str(report).splitlines()[0]
    assert report.spent <= 0.6 or layer.rank == 1
    (target,), _ = select(model, None, None)
    clock = Clock(False)
    one, many = (clock.seconds(target, LayerCall((rows, 256), False, rows)) for rows in (8, 2048))
    assert many > 5 * one
    assert clock.seconds(target, LayerCall((8, 256), False, 8)) == one  # timed once


@pytest.mark.parametrize("training", [True, False])
def test_time_is_spent_evenly(training, monkeypatch):
    """With a clock that follows the FLOPs, twice as much for training, and is noisy where ranks are low."""

    def seconds(self, target, call, rank=None):
        m, n = target.shape
        passes = 1 + 2 * self._training
        return passes * call.rows * (m * n if rank is None else rank * (m + n) + (5000 if rank == 1 else 0)) * 1e-9

    monkeypatch.setattr(Clock, "seconds", seconds)
    model = mlp().train(training)
    x = torch.randn(50, 64)
    report = factorize(model, budget=0.4, measure="time", example_input=x, exclude="4")
    a, b = report.layers
    assert a.dense_seconds == pytest.approx((1 + 2 * training) * 50 * 64 * 256 * 1e-9)
    share = 0.4 * (a.dense_seconds + b.dense_seconds) / 2
    assert 0.9 * share < a.seconds < 1.1 * share and 0.9 * share < b.seconds < 1.1 * share and report.spent <= 0.4
    # what every rank below costs at least: the line through the ranks that are timed does not fall
    (target,) = select(mlp(), "0", None)[0]
    cost = Clock(training).cost(target, {"0": [LayerCall((50, 64), False, 50)]})
    times = [cost.at(r) for r in range(1, 65)]
    assert times == sorted(times)


class BatchNet(Net):
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
    assert type(model.stem) is nn.Conv2d
    assert all(m.training for m in model.modules()) and not any(m._forward_hooks for m in model.modules())


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


def leading(z, rank):
    """Projector onto the leading eigenvectors of zᵀ z, in float64, by LAPACK."""
    _, Q = torch.linalg.eigh(z.mT.double() @ z.double())
    return Q[:, -rank:] @ Q[:, -rank:].mT


def assert_on_leading(layer, W, z):
    """The layer has the weight W on the leading directions of z [N, n], and orthonormal factors."""
    W = W.detach().flatten(1).double()
    expected = W @ leading(z, layer.rank)
    torch.testing.assert_close(layer.weight.flatten(1).double(), expected, rtol=0, atol=4e-6 * W.norm().item())
    for X in (layer.U, layer.V):
        torch.testing.assert_close(X.mT @ X, torch.eye(layer.rank), rtol=0, atol=1e-5)


def test_principal_directions_of_each_layers_inputs():
    torch.manual_seed(0)
    model = mlp()
    x = torch.rand(200, 64) * torch.linspace(0, 1, 64).square()
    x[:, :7] = 0  # never lit: nothing of the weight there is worth a direction
    dense = copy.deepcopy(model)
    hidden = torch.relu(dense[0](x))
    states = torch.get_rng_state(), model[0].weight.grad
    report = factorize(model, rank={"0": 30, "2": 12}, init="pca", example_input=x)
    assert torch.equal(states[0], torch.get_rng_state()) and model[0].U.grad is None and model.training
    assert_on_leading(model[0], dense[0].weight, x)
    assert_on_leading(model[2], dense[2].weight, hidden)
    assert model[0].V[:7].abs().max() < 1e-6 and model[0].bias is not None
    assert report.layers[0].kappa == pytest.approx(model[0].condition_number(), rel=1e-4)

    plain = copy.deepcopy(dense)
    factorize(plain, rank={"0": 30, "2": 12})
    ours, theirs = (condlr_ext.robustness.misalignment(m, x) for m in (model, plain))
    assert all(ours[name].mean() < theirs[name].mean() for name in ("0", "2"))


@pytest.mark.parametrize(
    "conv, shape",
    [
        (nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2), (5, 4, 9, 8)),
        (nn.Conv2d(4, 6, (3, 2), padding="same", groups=2), (5, 4, 6, 7)),
        (nn.Conv2d(2, 6, 3, padding=(1, 2), padding_mode="circular"), (5, 2, 6, 7)),
        (nn.Conv2d(2, 6, 3, padding="valid"), (2, 6, 7)),
        (nn.Conv1d(3, 5, 4, stride=3, padding=2), (6, 3, 11)),
        (nn.Conv3d(2, 6, 2, padding="same", padding_mode="replicate"), (3, 2, 4, 4, 5)),
    ],
    ids=str,
)  # fmt: skip
def test_patches_are_what_the_flattened_weight_is_multiplied_with(conv, shape, monkeypatch):
    torch.manual_seed(0)
    conv, x = copy.deepcopy(conv).double(), torch.randn(shape, dtype=torch.float64)
    batch = x if x.dim() == len(conv.kernel_size) + 2 else x[None]
    z = patches(conv, batch)
    expected = conv(batch) - conv.bias.view(-1, *[1] * len(conv.kernel_size))
    W = conv.weight.flatten(1).view(conv.groups, -1, z.shape[1])
    N, m = expected.shape[:2]
    produced = torch.einsum("ngpk,gmk->ngmp", z.view(N, conv.groups, -1, z.shape[1]), W).reshape(expected.shape)
    torch.testing.assert_close(produced, expected)
    monkeypatch.setattr(principal, "ENTRIES", 1)  # sample by sample
    model = nn.Sequential(copy.deepcopy(conv).float())
    factorize(model, rank=3, init="pca", example_input=x.float())
    assert_on_leading(model[0], conv.weight, z)


def test_principal_directions_of_attention_ties_and_layers_not_called():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=6, batch_first=True)
    packed, q, k = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(4, 5, 8), torch.randn(4, 3, 6)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.cross, self.packed = attention, packed
            self.a, self.b, self.unused = (nn.Linear(8, 8) for _ in range(3))
            self.b.weight = self.a.weight

        def forward(self, q, k):
            y = self.cross(q, k, k, need_weights=False)[0]
            return self.b(torch.relu(self.a(self.packed(y, y, y, need_weights=False)[0])))

    model = Net()
    dense = copy.deepcopy(model)
    y = dense.cross(q, k, k, need_weights=False)[0].detach()
    first = dense.packed(y, y, y, need_weights=False)[0].detach()
    twice = torch.cat([first.flatten(0, 1), torch.relu(dense.a(first)).detach().flatten(0, 1)])
    factorize(model, rank=3, init="pca", example_input=(q, k))
    assert_on_leading(model.cross.q_proj, dense.cross.q_proj_weight, q.flatten(0, 1))
    assert_on_leading(model.cross.v_proj, dense.cross.v_proj_weight, k.flatten(0, 1))
    assert_on_leading(model.packed.in_proj, dense.packed.in_proj_weight, y.flatten(0, 1))
    assert_on_leading(model.a, dense.a.weight, twice)
    assert model.a.V is model.b.V
    plain = copy.deepcopy(dense)
    factorize(plain, rank=3)
    for name in ("cross.out_proj", "packed.out_proj", "unused"):  # as with "svd"
        assert torch.equal(model.get_submodule(name).weight, plain.get_submodule(name).weight)


def test_inputs_of_few_dimensions_leave_the_rest_to_the_weight():
    torch.manual_seed(0)
    few, W = torch.randn(3, 9) @ torch.eye(9), nn.Linear(9, 9, dtype=torch.float64)
    P = leading(few, 3)
    model = nn.Sequential(copy.deepcopy(W))
    factorize(model, rank=5, init="pca", example_input=few.double())
    U, sigma, Vh = torch.linalg.svd(W.weight - W.weight @ P)
    expected = W.weight @ P + (U[:, :2] * sigma[:2]) @ Vh[:2]
    torch.testing.assert_close(model[0].weight, expected, rtol=0, atol=1e-9)
    plain = nn.Sequential(copy.deepcopy(W))
    factorize(plain, rank=5)
    for nothing in (torch.zeros(4, 9, dtype=torch.float64), torch.zeros(0, 9, dtype=torch.float64)):
        model = nn.Sequential(copy.deepcopy(W))
        factorize(model, rank=5, init="pca", example_input=nothing)
        assert torch.equal(model[0].weight, plain[0].weight)


def test_row_space_of_from_dense():
    W, basis = nn.Linear(7, 5), torch.linalg.qr(torch.randn(7, 2)).Q
    layer = LowRankLinear.from_dense(W, 2, row_space=basis)
    torch.testing.assert_close(layer.weight, W.weight @ basis @ basis.mT)
    with pytest.raises(ShapeError, match=r"LowRankLinear.from_dense: row_space must be \[7, 3\], got \[7, 2\]"):
        LowRankLinear.from_dense(W, 3, row_space=basis)
    for bad in (1.1 * basis, torch.full((7, 2), torch.nan)):
        with pytest.raises(ValueError, match="row_space must have orthonormal columns to 1e-4, got"):
            LowRankLinear.from_dense(W, 2, row_space=bad)


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


def test_what_is_compiled_on_its_own_is_skipped():
    """Its wrapper would go on to run the dense layer."""
    model = nn.Sequential(nn.Linear(20, 20), torch.compile(nn.Linear(20, 20), backend="eager"))
    report = factorize(model, rank=2)
    assert [layer.name for layer in report.layers] == ["0"]
    assert "compiled on its own" in report.skipped["1._orig_mod"] and type(model[1]._orig_mod) is nn.Linear
