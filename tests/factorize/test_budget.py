"""factorize by a budget: equal spend over the layers."""

import pytest
import torch
from helpers.models import mlp, tied
from torch import nn

from condlr_ext import LowRankLinear, factorize
from condlr_ext.factorize.budget import allocate_ranks, parameter_cost, stored_parameters


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


def test_equal_spend_example():
    model = mlp()
    report = factorize(model, budget=0.27, exclude="4")
    assert [(x.name, x.rank) for x in report.layers] == [("0", 32), ("2", 20)]
    assert isinstance(model[0], LowRankLinear) and type(model[4]) is nn.Linear
    assert report.kept <= 0.27 and "32" in str(report) and "skipped" not in str(report)


def test_a_budget_counts_tied_layers_once():
    model = tied()
    report = factorize(model, budget=0.5, dry_run=True)
    assert {r.name: r.rank for r in report.layers} == {"0": 2, "2": 2, "1": 2} and report.kept <= 0.5
    flops = factorize(model, budget=0.5, measure="flops", example_input=torch.randn(100, 12), dry_run=True)
    assert flops.spent <= 0.5 and flops.layers[0].flops == flops.layers[1].flops > 0
