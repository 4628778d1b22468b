"""Options, models and losses that RankController refuses, without changing anything."""

import copy
import math

import pytest
import torch
from helpers.planted import BATCHES, Planted
from torch import nn

from condlr_ext import LowRankLinear
from condlr_ext.errors import NonFiniteError, RankError
from condlr_ext.optim import CondLRSGD, Projector, RankController


@pytest.mark.parametrize(
    "options, error, text",
    [
        ({"min_rank": 0}, ValueError, "min_rank must be an int >= 1, got 0"),
        ({"moves": 1.5}, ValueError, "moves must be an int >= 1, got 1.5"),
        ({"moves": True}, ValueError, "moves must be an int >= 1"),
        ({"tolerance": 1}, ValueError, r"tolerance must be a number in \[0, 1\), got 1"),
        ({"theta": math.nan}, ValueError, r"theta must be a number in \[0, 1\), got nan"),
        ({"budget": 0}, ValueError, "budget must be None or a number > 0, got 0"),
        ({"max_rank": 2}, RankError, "max_rank must be at least its 3 directions in use, got 2"),
        ({"max_rank": 21}, RankError, r"layer : rank must be in 1..min\(m, n\) = 20"),
        ({"min_rank": 4}, RankError, "min_rank must be at most its largest rank 3, got 4"),
    ],
)
def test_options_are_checked_and_nothing_has_changed(options, error, text):
    data = Planted(3)
    with pytest.raises(error, match=text):
        RankController(data.model, CondLRSGD(data.model, 0.1, tau=0.1), **options)
    assert data.model.rank == 3 and data.model.U.shape == (20, 3)


def test_wrong_models_and_optimizers():
    data = Planted(3)
    with pytest.raises(TypeError, match="must be CondLRSGD or CondLRAdamW, got SGD"):
        RankController(data.model, torch.optim.SGD(data.model.parameters(), 0.1))
    with pytest.raises(ValueError, match="layer '' is none of the optimizer's"):
        RankController(data.model, CondLRSGD(Planted(3).model, 0.1, tau=0.1))
    dense = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="must have low-rank layers that are trained, found none"):
        RankController(dense, CondLRSGD(dense, 0.1, tau=0.1))
    pair = nn.Sequential(LowRankLinear(8, 8, rank=2), LowRankLinear(8, 8, rank=2))
    optimizer = CondLRSGD(pair, 0.1, tau=0.1)
    pair[1].V = pair[0].V
    with pytest.raises(ValueError, match="layers '0' and '1' share V"):
        RankController(pair, optimizer)
    RankController(data.model, CondLRSGD(data.model, 0.1, tau=0.1), max_rank=10)
    with pytest.raises(ValueError, match="must use all of its columns, got 3 of 10 directions in use"):
        Projector(data.model, 0.1).attach(torch.optim.SGD(data.model.parameters(), 0.1))


@pytest.mark.parametrize(
    "loss, batches, error, text",
    [
        (lambda d, b: d.loss(b), [], ValueError, "batches must hold at least one, got none"),
        (lambda d, b: d.model(d.x[b]), BATCHES, ValueError, r"one element, got shape \[150, 20\]"),
        (lambda d, b: d.loss(b).item(), BATCHES, ValueError, "one element, got float"),
        (lambda d, b: d.loss(b) * math.inf, BATCHES, NonFiniteError, "the loss must be finite, got inf"),
        (lambda d, b: d.x[b].square().sum(), BATCHES, ValueError, "the loss does not depend on layer ''"),
        (lambda d, b: d.loss(b).detach(), BATCHES, ValueError, "the loss does not depend on layer ''"),
        (lambda d, b: d.model(0 * d.x[b]).square().sum().sqrt(), BATCHES, NonFiniteError, "the gradient of layer ''"),
    ],
)
@pytest.mark.parametrize("tau", [0.1, math.inf])
def test_bad_losses_change_nothing(loss, batches, error, text, tau):
    data = Planted(3)
    optimizer = CondLRSGD(data.model, 0.1, 0.9, tau=tau)
    controller = RankController(data.model, optimizer, max_rank=10)
    data.train(optimizer)
    before = copy.deepcopy(data.model.state_dict())
    with pytest.raises(error, match=text):
        controller.update(lambda batch: loss(data, batch), batches)
    assert type(data.model) is LowRankLinear and data.model.training
    assert all(torch.equal(a, b) for a, b in zip(before.values(), data.model.state_dict().values(), strict=True))
    controller.update(data.loss, BATCHES)


def test_factors_and_states_that_cannot_be_updated():
    data = Planted(3)
    optimizer = CondLRSGD(data.model, 0.1, 0.9, tau=0.1)
    controller = RankController(data.model, optimizer, max_rank=10)
    data.train(optimizer)
    optimizer.state[data.model.V]["preconditioner"] = torch.zeros_like(data.model.V)
    with pytest.raises(TypeError, match="cannot turn the state 'preconditioner' of V of layer ''"):
        controller.update(data.loss, BATCHES)
    del optimizer.state[data.model.V]["preconditioner"]
    with torch.no_grad():
        data.model.U[0, 9] = math.nan
    with pytest.raises(NonFiniteError, match="the loss must be finite"):
        controller.update(data.loss, BATCHES)
    with pytest.raises(NonFiniteError, match="U of layer '' must be finite"):
        controller.update(lambda b: data.model.V.sum(), BATCHES)


def test_core_steps_that_diverge_are_refused():
    data = Planted(3)
    optimizer = CondLRSGD(data.model, 0.1, tau=math.inf)
    controller = RankController(data.model, optimizer, max_rank=10)
    optimizer.param_groups[0]["lr"] = 1e6
    before = copy.deepcopy(data.model.state_dict())
    with pytest.raises(NonFiniteError, match="layer ''"):
        controller.update(data.loss, BATCHES)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), data.model.state_dict().values(), strict=True))
