"""Costs on an example input: FLOPs, measured time, and the report of them."""

import time

import pytest
import torch
from helpers.models import ResNet, mlp
from torch import nn

from condlr_ext import factorize
from condlr_ext.factorize.costs import Clock, LayerCall
from condlr_ext.factorize.selection import select


def test_report_on_an_example():
    """FLOPs by hand: of the stem, a 3 x 3 convolution from 3 to 8 channels, 64 pixels, batch 2."""
    model = ResNet(8)
    report = factorize(model, rank=2, example_input=torch.randn(2, 3, 8, 8))
    stem, head = report.layers[0], report.layers[-1]
    assert stem.name == "stem.0" and stem.weight_shape == (8, 3, 3, 3) and (stem.m, stem.n) == (8, 27)
    assert stem.dense_flops == 2 * 128 * 8 * 27 and stem.flops == 2 * 128 * 2 * (8 + 27) + 2 * 8 * 4
    assert head.dense_flops == 2 * 2 * 10 * 32 and head.flops == 2 * 2 * 2 * (10 + 32) + 2 * 2 * 4
    plan = model.stem[0].plan(torch.empty(2, 3, 8, 8))  # the image needs no gradient
    assert (stem.route, stem.gain) == (plan.route, plan.gain)
    text = str(report).splitlines()
    assert text[0].split() == ["layer", "weight", "rank", "κ", "parameters", "kept", "Mflop", "route", "gain"]
    assert "8 x 27" in text[1] and "216 -> 74" in text[1] and f"0.0553 -> {stem.flops / 1e6:.3g}" in text[1]
    assert len({len(line) for line in text[: 1 + len(report.layers)]}) == 1  # columns are aligned


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
    model = ResNet(8)
    x = torch.randn(4, 3, 16, 16)
    report = factorize(model, budget=budget, measure="flops", example_input=x, exclude="layer2.conv2")  # without groups
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
    """The clock follows the FLOPs, doubles them for training, and is noisy where ranks are low."""

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
