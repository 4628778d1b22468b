"""layer_metrics: what a run logs of its layers."""

import pytest
import torch
from helpers.layers import randomize
from torch import nn

import condlr_ext
from condlr_ext import LowRankConv2d, LowRankLinear
from condlr_ext.errors import NonFiniteError


def test_metrics_are_those_of_the_weight():
    model = nn.Sequential(randomize(LowRankConv2d(2, 5, 3, rank=3)), randomize(LowRankLinear(7, 6, rank=4)), nn.ReLU())
    metrics = condlr_ext.layer_metrics(model)
    numbers = condlr_ext.condition_numbers(model)
    assert list(metrics)[:3] == ["0/rank", "0/kappa", "0/sigma_max"] and len(metrics) == 10
    for name, rank in (("0", 3), ("1", 4)):
        layer = model[int(name)]
        sigma = torch.linalg.svdvals(layer.weight.detach().flatten(1).double())[:rank]
        assert metrics[f"{name}/rank"] == rank and metrics[f"{name}/kappa"] == numbers[name]
        assert metrics[f"{name}/sigma_max"] == pytest.approx(sigma[0].item(), rel=1e-4)
        assert metrics[f"{name}/sigma_min"] == pytest.approx(sigma[-1].item(), rel=1e-4)
        error = max((X.mT @ X - torch.eye(rank)).abs().max().item() for X in (layer.U, layer.V))
        assert metrics[f"{name}/orthonormality"] == pytest.approx(error, rel=1e-4)


def test_directions_out_of_use_do_not_count_and_nan_is_named():
    model = nn.Sequential(LowRankLinear(7, 6, rank=4))
    with torch.no_grad():
        for X in (model[0].U, model[0].V):
            X[:, 3] = 0
        model[0].S[3], model[0].S[:, 3] = 0, 0
    metrics = condlr_ext.layer_metrics(model)
    assert metrics["0/rank"] == 3 and metrics["0/kappa"] == pytest.approx(1) and metrics["0/orthonormality"] < 1e-6
    with torch.no_grad():
        model[0].V[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="layer_metrics: layer 0: LowRankLinear.metrics: V must be finite"):
        condlr_ext.layer_metrics(model)
