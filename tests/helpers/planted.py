"""Regression with a planted rank, and a small classifier, for the tests of RankController."""

import torch
from torch import nn
from torch.nn import functional as F

import condlr_ext
from condlr_ext import LowRankLinear

from .matrices import kappa, non_orthonormality

BATCHES = torch.arange(600).split(150)


class Planted:
    """Regression on y = W x + noise with W of rank 3 and equal singular values, which every bound admits."""

    def __init__(self, start: int, m=20, n=30, rank=3, dtype=None):
        x = torch.randn(600, n)
        W = 2 * torch.linalg.qr(torch.randn(m, rank))[0] @ torch.linalg.qr(torch.randn(n, rank))[0].mT
        self.x, self.y = x.to(dtype or x.dtype), (x @ W.mT + 0.05 * torch.randn(600, m)).to(dtype or x.dtype)
        self.model = LowRankLinear(n, m, rank=start, bias=False, dtype=dtype)

    def loss(self, batch):
        return F.mse_loss(self.model(self.x[batch]), self.y[batch])

    def train(self, optimizer, steps=None):
        for batch in BATCHES[:steps]:
            optimizer.zero_grad()
            self.loss(batch).backward()
            optimizer.step()


def digits_like(count=256, seed=3):
    """Ten classes of noisy patterns, 64 inputs in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 10, (count,), generator=generator)
    patterns = torch.rand(10, 64, generator=generator)
    return (patterns[y] + 0.4 * torch.randn(count, 64, generator=generator)).clamp(0, 1), y


def mlp(rank=6):
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 10))
    condlr_ext.factorize(model, rank=rank, exclude="4", init="random")
    return model


def fit(model, optimizer, x, y, epochs=1):
    for _ in range(epochs):
        for batch in torch.arange(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()


def assert_constraint(layer, tau, atol=2e-6):
    r = layer.active_rank
    assert non_orthonormality(layer.U[:, :r]) <= atol
    assert non_orthonormality(layer.V[:, :r]) <= atol
    assert kappa(layer.S[:r, :r]) <= (1 + tau) * (1 + 5e-6)
    assert not layer.U[:, r:].any() and not layer.V[:, r:].any()
    assert not layer.S[r:].any() and not layer.S[:, r:].any()


def low_rank(model):
    return [(name, m) for name, m in model.named_modules() if isinstance(m, condlr_ext.nn.LowRankLayer)]


def state_tensors(optimizer):
    return [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
