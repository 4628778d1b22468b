"""TSCNC's penalties by hand, on low-rank layers and with gates."""

import copy
import math

import pytest
import torch
from torch import nn

import condlr_ext
from condlr_ext import pruning
from condlr_ext.errors import NonFiniteError
from condlr_ext.regularizers import (
    cnc,
    transformed_l1,
    tsc,
)

F64 = torch.float64


def test_cnc_released_is_the_public_formula_and_moves_with_scale():
    W = torch.randn(5, 9, dtype=F64)
    formula = (1e-5 + torch.linalg.det(W @ W.mT / 5)).log() ** 2
    torch.testing.assert_close(cnc(W, form="released"), formula)
    assert abs(cnc(2 * W, form="released") - formula) > 1
    torch.testing.assert_close(cnc(2 * W), cnc(W))
    # unit determinant is the optimum of the released form whatever the condition number
    assert cnc(math.sqrt(2) * torch.diag(torch.tensor([100.0, 0.01], dtype=F64)), form="released") < 1e-9
    assert cnc(torch.diag(torch.tensor([100.0, 0.01], dtype=F64))) > 100
    torch.testing.assert_close(cnc(W.mT, form="released"), torch.tensor(math.log(1e-5) ** 2, dtype=F64))
    wide = 10 * torch.randn(60, 400)  # the determinant is about 1e250
    assert torch.isfinite(cnc(wide, form="released")) and cnc(wide, form="released") > 1e4


def test_transformed_l1_limits():
    t = torch.tensor([0.0, 1e-3, 1.0, 50.0], dtype=F64)
    torch.testing.assert_close(transformed_l1(-t, 1e9), t, rtol=1e-6, atol=0)
    torch.testing.assert_close(transformed_l1(t, 1e-9), (t > 0).to(F64), rtol=1e-5, atol=0)
    assert transformed_l1(torch.tensor(1.0), 3.0) == 1


def test_tsc_by_hand_and_its_released_sign():
    layer = nn.Linear(3, 2).double()
    t = (layer.weight.square().sum(1) * 12.5 + 1e-3 * 3).detach()
    torch.testing.assert_close(tsc(layer).detach(), (101 * t / (100 + t)).sum())
    torch.testing.assert_close(tsc(layer, form="released").detach(), (101 * t / (100 - t)).sum())
    layer.weight.data *= 20
    assert tsc(layer, form="released") < 0 < tsc(layer)  # beyond its pole the released penalty is a reward
    torch.autograd.gradcheck(lambda W: torch.func.functional_call(Call(layer, tsc), {"layer.weight": W}), layer.weight)


class Call(nn.Module):
    def __init__(self, layer, function):
        super().__init__()
        self.layer, self.function = layer, function

    def forward(self):
        return self.function(self.layer)


def test_tsc_of_a_low_rank_layer_is_that_of_its_weight(model):
    dense = condlr_ext.to_dense(copy.deepcopy(model))
    torch.testing.assert_close(tsc(model), tsc(dense), rtol=1e-6, atol=0)
    assert tsc(model, exclude=["8", "0"]) < tsc(model)


def test_tsc_of_gates_counts_open_ones_and_closes_useless_channels():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    dense = tsc(model, exclude="2").item()
    pruning.add_gates(model, exclude="2")
    gate = model[0].parametrizations.weight[0]
    W, p = model[0].parametrizations.weight.original, gate.open_probability()
    t = p * (12.5 * W.square().sum(1) + 4e-3)
    torch.testing.assert_close(tsc(model, exclude="2"), (101 * t / (100 + t)).sum())
    assert tsc(model, exclude="2") < dense
    optimizer = torch.optim.SGD([gate.log_alpha], lr=5)
    for _ in range(60):
        optimizer.zero_grad()
        tsc(model, exclude="2").backward()
        optimizer.step()
    assert (gate.open_probability() < 0.1).all()


def test_nan_names_the_layer_in_tsc():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight.data[0, 0] = math.inf
    with pytest.raises(NonFiniteError, match="tsc: the penalty of 1 is not finite"):
        tsc(model)
