"""A small network with two low-rank layers, its data, and a training loop, for the tests of the optimizers."""

import torch
from torch import nn
from torch.nn import functional as F

from condlr_ext import LowRankConv2d, LowRankLinear
from condlr_ext.nn import LowRankLayer

from .matrices import kappa, non_orthonormality


def make_model(seed=0, dtype=None):
    """Images [B, 1, 4, 4] to three classes; layers 0 and 3 are low-rank, layer 5 is dense."""
    torch.manual_seed(seed)
    return nn.Sequential(
        LowRankConv2d(1, 6, 3, padding=1, rank=4, dtype=dtype),
        nn.ReLU(),
        nn.Flatten(),
        LowRankLinear(6 * 16, 12, rank=5, dtype=dtype),
        nn.ReLU(),
        nn.Linear(12, 3, dtype=dtype),
    )


def batches(count, dtype=torch.float32, seed=1):
    """Images whose class is the largest of the first three pixels."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        x = torch.randn(16, 1, 4, 4, generator=generator)
        yield x.to(dtype), x.flatten(1)[:, :3].argmax(1)


def backward(model, x, y):
    """Compute fresh gradients; return the loss."""
    model.zero_grad()
    loss = F.cross_entropy(model(x).float(), y)
    loss.backward()
    return loss


def train(model, optimizer, data, scheduler=None):
    """Take one step per batch; return the losses."""
    losses = []
    for x, y in data:
        losses.append(backward(model, x, y).item())
        optimizer.step()
        if scheduler:
            scheduler.step()
    return losses


def low_rank_layers(model):
    return [m for m in model.modules() if isinstance(m, LowRankLayer)]


def assert_constraint(model, tau, atol=2e-6):
    """All low-rank layers keep the bound, and U and V are orthonormal."""
    for layer in low_rank_layers(model):
        assert kappa(layer.S) <= (1 + tau) * (1 + 5e-6)
        assert max(non_orthonormality(layer.U), non_orthonormality(layer.V)) <= atol
