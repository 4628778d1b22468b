"""scikit-learn's handwritten digits, real data that small networks learn in seconds."""

import pytest
import torch
from torch import Tensor


def shuffled_digits() -> tuple[Tensor, Tensor]:
    """Return images [1797, 64] in [0, 1] and labels [1797] in a fixed order; skip the test without scikit-learn.

    Seeds torch.
    """
    data = pytest.importorskip("sklearn.datasets").load_digits()
    torch.manual_seed(0)
    order = torch.randperm(len(data.target))
    return torch.tensor(data.data / 16, dtype=torch.float32)[order], torch.tensor(data.target)[order]


def shuffled_batches(x: Tensor, y: Tensor, size: int = 64) -> list[tuple[Tensor, Tensor]]:
    order = torch.randperm(len(x))
    return [(x[i], y[i]) for i in order.split(size)]
