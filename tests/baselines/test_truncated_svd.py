"""Pruning by tolerance, budget and rank on known spectra."""

import copy
import math

import pytest
import torch
from helpers.baselines import train
from helpers.matrices import singular_values, with_spectrum
from helpers.models import DigitsCNN
from torch import nn

from condlr_ext import LowRankConv2d
from condlr_ext.baselines import (
    svd_prune,
)
from condlr_ext.baselines.rank_adaptive import kept_rank


def planted():
    """Two layers with known spectra and a classifier."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 25), nn.ReLU(), nn.Linear(25, 4)).double()
    with torch.no_grad():
        model[0].weight.copy_(with_spectrum(0.5 ** torch.arange(20.0, dtype=torch.float64), 30, 20))
        model[2].weight.copy_(with_spectrum(0.9 ** torch.arange(25.0, dtype=torch.float64), 25, 30))
    return model


def ranks_of(report):
    return {layer.name: layer.rank for layer in report.layers}


def test_prune_by_tolerance():
    model, dense = planted(), planted()
    report = svd_prune(model, tolerance=0.1, exclude="4")
    # tails of geometric spectra: q^r, and (q^2r - q^50) / (1 - q^50) < 0.01 at q = 0.9: r = 20 or more
    expected = {name: kept_rank(singular_values(dense.get_submodule(name).weight), 0.1) for name in ("0", "2")}
    assert ranks_of(report) == expected and expected["0"] == 4 and 18 <= expected["2"] <= 22
    for name in ("0", "2"):
        W = dense.get_submodule(name).weight.detach()
        error = (model.get_submodule(name).weight - W).norm() / W.norm()
        assert error < 0.1
        torch.testing.assert_close(error, singular_values(W)[expected[name] :].norm() / W.norm())


@pytest.mark.parametrize("scale", [1e-170, 1e170])
def test_prune_does_not_depend_on_the_scale(scale):
    ranks = []
    for factor in (1.0, scale):
        model = planted().double()
        for p in model.parameters():
            p.data *= factor
        ranks.append(
            [ranks_of(svd_prune(copy.deepcopy(model), **how)) for how in (dict(tolerance=0.1), dict(budget=0.5))]
        )
    assert ranks[0] == ranks[1]


@pytest.mark.parametrize("budget", [0.2, 0.5, 0.9, 3.0])
def test_prune_by_budget_is_the_least_tolerance(budget):
    model, dense = planted(), planted()
    report = svd_prune(model, budget=budget, exclude="4")
    assert report.kept <= budget
    spectra = {name: singular_values(dense.get_submodule(name).weight) for name in ("0", "2")}
    dropped = {name: (s[ranks_of(report)[name] :].norm() / s.norm()).item() for name, s in spectra.items()}
    if budget == 3.0:
        assert ranks_of(report) == {"0": 20, "2": 25}
        return
    # one more rank for the layer with the larger error would be the next smaller tolerance: it must not fit
    worst = max(dropped, key=dropped.get)
    more = {name: rank + (name == worst) for name, rank in ranks_of(report).items()}
    cost = sum(r * sum(dense.get_submodule(name).weight.shape) + r * r for name, r in more.items())
    assert cost > budget * (600 + 750)
    other = "0" if worst == "2" else "2"  # and the other layer has no rank that this tolerance would drop
    s = spectra[other]
    assert (s[ranks_of(report)[other] - 1 :].norm() / s.norm()).item() >= dropped[worst]


def test_prune_takes_zero_weights():
    model = planted()
    nn.init.zeros_(model[2].weight)
    report = svd_prune(model, budget=0.5, exclude="4")
    assert ranks_of(report)["2"] == 1 and ranks_of(report)["0"] > 4 and report.kept <= 0.5


def test_prune_by_rank_and_errors():
    model = planted()
    before = copy.deepcopy(model.state_dict())
    for options, text in (
        ({}, "give one of rank, tolerance and budget"),
        ({"rank": 2, "budget": 0.5}, "give one of rank, tolerance and budget"),
        ({"tolerance": 1.0}, r"tolerance must be in \[0, 1\), got 1.0"),
        ({"budget": 0}, r"budget must be in \(0, inf\), got 0"),
        ({"budget": math.nan}, "budget must be in"),
        ({"tolerance": 0.1, "include": "nothing"}, "matches nothing"),
    ):
        with pytest.raises(ValueError, match=text):
            svd_prune(model, **options)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert "over the budget" in str(svd_prune(copy.deepcopy(model), budget=1e-3))
    assert ranks_of(svd_prune(model, rank={"0": 3, "2": 0.2})) == {"0": 3, "2": 5}


def test_pruned_network_is_fine_tuned(digits):
    torch.manual_seed(0)
    model = DigitsCNN()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.8)
    train(model, optimizer, digits, 60)
    svd_prune(model, tolerance=0.5, exclude="head")
    assert isinstance(model.down, LowRankConv2d) and model.down.rank < 12
    losses = train(model, torch.optim.SGD(model.parameters(), 0.02, momentum=0.8), digits, 30, start=60)
    assert sum(losses[-5:]) < sum(losses[:5])
