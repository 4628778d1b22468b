"""Two-factor layers against the truncated SVD of dense ones."""

import copy

import numpy as np
import pytest
import torch
from helpers.baselines import train
from helpers.matrices import singular_values
from helpers.models import DigitsCNN, digits_encoder
from torch import nn

import condlr_ext
from condlr_ext.baselines import (
    TwoFactorConv,
    TwoFactorLinear,
    vanilla_low_rank,
)
from condlr_ext.errors import RankError
from condlr_ext.experiments.networks import mlp

CONVS = [
    (nn.Conv2d(3, 8, 3, 2, 1), (2, 3, 9, 10)),
    (nn.Conv2d(8, 12, 3, padding="same", dilation=2, groups=4, padding_mode="circular"), (2, 8, 9, 7)),
    (nn.Conv2d(6, 4, (3, 1), groups=2, bias=False), (6, 9, 7)),
    (nn.Conv1d(4, 6, 5, 2, 2, padding_mode="reflect"), (3, 4, 17)),
    (nn.Conv3d(4, 6, 3, groups=2, padding=1), (2, 4, 5, 6, 5)),
    (nn.Conv2d(4, 4, 1), (2, 4, 5, 5)),
]


@pytest.mark.parametrize("conv, shape", CONVS, ids=lambda x: type(x).__name__ if isinstance(x, nn.Module) else str(x))
def test_vanilla_convolution(conv, shape):
    conv = copy.deepcopy(conv).double()
    x = torch.randn(shape, dtype=torch.float64)
    full = min(conv.weight.shape[0], conv.weight[0].numel())
    torch.testing.assert_close(TwoFactorConv.from_dense(conv, full)(x), conv(x))
    layer = TwoFactorConv.from_dense(conv, 2)
    U, sigma, V = condlr_ext.linalg.svd(conv.weight.detach().flatten(1))
    best = (U[:, :2] * sigma[:2] @ V[:, :2].mT).reshape(conv.weight.shape)
    torch.testing.assert_close(layer.weight, best)
    with torch.no_grad():
        conv.weight.copy_(best)
    torch.testing.assert_close(layer(x), conv(x))
    assert sum(p.numel() for p in layer.parameters()) == 2 * sum(best.flatten(1).shape) + len(best) * (
        conv.bias is not None
    )
    halves = [singular_values(part.weight.flatten(1)) for part in layer]
    torch.testing.assert_close(halves[0], halves[1])  # the spectrum is split evenly


def test_vanilla_in_networks(digits):
    torch.manual_seed(0)
    for build, ranks in (
        (DigitsCNN, {"stem": 4, "grouped": 4, "down": 5}),
        (
            digits_encoder,
            {
                f"2.encoder.layers.0.{name}": rank
                for name, rank in {"self_attn.out_proj": 6, "linear1": 8, "linear2": 8}.items()
            },
        ),
    ):
        model = build()
        assert vanilla_low_rank(model, ranks) is model
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.8)
        losses = train(model, optimizer, digits, 30)
        assert sum(losses[-5:]) < 0.95 * sum(losses[:5])
        assert all(p.grad is not None for p in model.parameters())
        x = digits[0][:16]
        model.eval()
        slow = model(x)
        with torch.no_grad():  # the encoder's fast path reads the weights
            torch.testing.assert_close(model(x), slow, rtol=1e-4, atol=1e-5)


def test_vanilla_keeps_sharing_and_refuses_ties():
    layer = nn.Linear(4, 4)
    model = nn.ModuleList([layer, nn.Sequential(layer), nn.Linear(4, 4)])
    vanilla_low_rank(model, {"0": 2})
    assert isinstance(model[0], TwoFactorLinear) and model[1][0] is model[0]
    frozen = nn.Sequential(nn.Linear(4, 4).requires_grad_(False))
    vanilla_low_rank(frozen, {"0": 2})
    assert not any(p.requires_grad for p in frozen.parameters())
    tied = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match="the weight of '0' is tied to that of '1'"):
        vanilla_low_rank(tied, {"0": 2})
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="'0' is no nn.Linear or nn.Conv1d/2d/3d of the model; it has none"):
        vanilla_low_rank(normed, {"0": 2})
    with pytest.raises(RankError, match=r"TwoFactorConv.from_dense: rank must be in 1..4 for \[4, 18\], got 5"):
        vanilla_low_rank(nn.Sequential(nn.Conv2d(2, 4, 3)), {"0": 5})


def test_vanilla_is_the_balanced_truncated_svd():
    linear = nn.Linear(12, 9).double()
    layer = TwoFactorLinear.from_dense(linear, 4)
    down, up = layer[0].weight, layer[1].weight
    U, sigma, Vh = np.linalg.svd(linear.weight.detach().numpy())
    best = (U[:, :4] * sigma[:4]) @ Vh[:4]
    np.testing.assert_allclose((up @ down).detach().numpy(), best, atol=1e-14)
    for gram in (up.mT @ up, down @ down.mT):  # both factors carry sqrt(sigma)
        np.testing.assert_allclose(gram.detach().numpy(), np.diag(sigma[:4]), atol=1e-14)
    x = torch.rand(5, 12, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ torch.from_numpy(best).mT + linear.bias)
    assert layer[0].bias is None
    assert TwoFactorLinear.from_dense(nn.Linear(3, 3, bias=False), 3)[1].bias is None


def test_vanilla_replaces_whole_or_not_at_all():
    model = mlp((8,), 3)
    with pytest.raises(RankError, match=r"rank must be in 1..8 for \[256, 8\], got 9"):
        vanilla_low_rank(model, {"fc2": 4, "fc1": 9})
    with pytest.raises(
        ValueError, match="'relu1' is no nn.Linear or nn.Conv1d/2d/3d of the model; it has fc1, fc2, head"
    ):
        vanilla_low_rank(model, {"fc2": 4, "relu1": 1})
    assert isinstance(model.fc2, nn.Linear)
    assert vanilla_low_rank(model.eval(), {"fc1": 4}) is model and not model.fc1.training
    assert isinstance(model.fc1, TwoFactorLinear) and isinstance(model.fc2, nn.Linear)
