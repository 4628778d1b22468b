"""Small classifiers and batches for the tests of attacks."""

import torch
from torch import nn


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def linear_model(d=12, dtype=torch.float64):
    """Two classes, logits (w·x, -w·x): grad_x CE is a negative multiple of w for y = 0."""
    w = torch.randn(d, dtype=dtype)
    return Function(lambda x: torch.stack((x @ w, -(x @ w)), dim=1)), w


def network(classes=5, dtype=torch.float64):
    return nn.Sequential(nn.Linear(9, 20), nn.Tanh(), nn.Linear(20, classes)).to(dtype)


def batch(n=7, d=9, classes=5, dtype=torch.float64):
    return torch.rand(n, d, dtype=dtype), torch.randint(classes, (n,))


def image_network():
    """Images [B, 1, 4, 4] to three classes, by a convolution and two linear layers."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3)
    )  # fmt: skip


def image_batch(n=12):
    return torch.rand(n, 1, 4, 4), torch.randint(3, (n,))
