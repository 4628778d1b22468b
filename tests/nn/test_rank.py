"""Ranks as ints, fractions and shares of the energy."""

import math

import pytest
import torch
from helpers.models import Conv1D, mlp
from torch import nn

from condlr_ext import Energy, LowRankLinear, factorize
from condlr_ext.errors import RankError


def test_rank_by_energy():
    """Ranks of a weight with known spectrum: 8, 4, 2, 1, 0, 0 hold 64, 80, 84, 85 of 85."""
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
