"""Random factors keep the variance of activations."""

import math

import pytest
import torch
from torch import nn

from condlr_ext import LowRankConv2d, LowRankLinear, factorize


def activations(model, x):
    """Mean square of every layer's output, in order."""
    squares, handles = [], []
    for m in model.modules():
        if isinstance(m, (nn.Linear, nn.Conv2d, LowRankLinear, LowRankConv2d)):
            handles.append(
                m.register_forward_hook(lambda m, args, y: squares.append(y.detach().square().mean().item()))
            )
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return torch.tensor(squares)


def he(model):
    for m in model.modules():
        if isinstance(m, (nn.Linear, nn.Conv2d)):
            nn.init.kaiming_normal_(m.weight, nonlinearity="relu")
    return model


def deep():
    return he(nn.Sequential(*[m for _ in range(20) for m in (nn.Linear(256, 256, bias=False), nn.ReLU())]))


def deep_conv():
    layers = [nn.Conv2d(3, 48, 3, padding=1, padding_mode="circular", bias=False)]
    for _ in range(9):
        layers += [nn.ReLU(), nn.Conv2d(48, 48, 3, padding=1, padding_mode="circular", bias=False)]
    return he(nn.Sequential(*layers))


@pytest.mark.parametrize("build,shape", [(deep, (64, 256)), (deep_conv, (8, 3, 8, 8))], ids=["linear", "conv"])
def test_random_factors_keep_the_variance_through_a_deep_network(build, shape):
    """He's initialization keeps the mean square; so must factors in its place, at any rank.

    The mean square through 20 layers is a product of 20 random ratios: of 8 networks the logarithms are averaged. One
    ratio of |Vᵀx|² to r/n |x|² deviates by about √(2/r), so the mean of the sums by √(2 · 20 / (8 r)) at most (0.4
    for r = 32), and three times that is allowed. A wrong scale, say of √(n/r), would show as 20 log(n/r) = 40.
    """
    x = torch.randn(shape)
    for rank in (0.125, 0.5):
        drift = []
        for _ in range(8):
            model = build()
            dense = activations(model, x)
            report = factorize(model, rank=rank, init="random")
            drift.append((activations(model, x) / dense).log())
        least = min(r.rank for r in report.layers)
        allowed = 3 * math.sqrt(2 * len(drift[0]) / (len(drift) * least))
        assert torch.stack(drift).mean(0).abs().max() <= allowed
