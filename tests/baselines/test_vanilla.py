"""Two-factor layers W = A B: the balanced truncated SVD, put in whole or not at all."""

import numpy as np
import pytest
import torch
from torch import nn

from condlr_ext.baselines import TwoFactorLinear, vanilla_low_rank
from condlr_ext.errors import RankError
from condlr_ext.experiments.networks import mlp


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
