"""A model with all kinds of layers."""

import pytest
from torch import nn

import condlr_ext


@pytest.fixture
def model():
    """Dense, low-rank and convolutional layers, two of equal shape."""
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=2), nn.Flatten(),
        nn.Linear(96, 20), nn.Tanh(), nn.Linear(20, 20), nn.Linear(20, 20), nn.Linear(20, 4),
    )  # fmt: skip
    condlr_ext.factorize(model, rank={"0": 5, "6": 7, "7": 7})
    return model.double()
