"""Layers with inactive columns: the optimizers step the active part as a layer of that size."""

import copy
import math

import pytest
import torch
from helpers.planted import Planted, assert_constraint
from torch import nn
from torch.nn import functional as F

import condlr_ext
from condlr_ext import LowRankConv2d, LowRankLinear
from condlr_ext.optim import CondLRAdamW, CondLRSGD, RankController


@pytest.mark.parametrize(
    "make",
    [
        lambda m: CondLRSGD(m, 0.1, 0.9, weight_decay=0.01, nesterov=True, tau=0.3),
        lambda m: CondLRSGD(m, 0.1, tau=math.inf),
        lambda m: CondLRAdamW(m, 0.1, amsgrad=True, tau=0.3),
    ],
    ids=["sgd", "free", "adamw"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_with_inactive_columns_is_stepped_as_the_small_one(make, dtype, backend):
    """Bit for bit: the gradients are the same, the step sees what is in use."""
    small = nn.Sequential(LowRankLinear(12, 9, rank=3, dtype=dtype), LowRankConv2d(2, 6, 3, rank=2, dtype=dtype))
    padded = copy.deepcopy(small)
    optimizers = make(small), make(padded)
    RankController(padded, optimizers[1], max_rank=6)
    assert [layer.rank for layer in padded] == [6, 6] and [layer.active_rank for layer in padded] == [3, 2]
    for step in range(4):
        for p, q in zip(small.parameters(), padded.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = torch.randn_like(q) if step % 2 else torch.zeros_like(q)  # whatever lies outside: not read
            q.grad[tuple(slice(k) for k in p.shape)] = p.grad
        for optimizer in optimizers:
            optimizer.step()
        for p, q in zip(small.parameters(), padded.parameters(), strict=True):
            assert torch.equal(p, q[tuple(slice(k) for k in p.shape)])
    assert [layer.active_rank for layer in padded] == [3, 2]
    for layer, twin in zip(small, padded, strict=True):
        assert layer.condition_number() == twin.condition_number()
    for p, q in zip(small.parameters(), padded.parameters(), strict=True):
        for key, value in optimizers[0].state[p].items():
            assert torch.equal(value, optimizers[1].state[q][key][tuple(slice(k) for k in value.shape)])
            assert optimizers[1].state[q][key].shape in (q.shape, ())


def test_inactive_columns_have_no_gradient_and_no_effect():
    model = LowRankLinear(12, 9, rank=3)
    x = torch.randn(5, 12)
    y = model(x)
    optimizer = CondLRSGD(model, 0.1, tau=0.3)
    RankController(model, optimizer, max_rank=1.0)
    assert model.rank == 9 and model.active_rank == 3 and model.S.shape == (9, 9)
    assert torch.allclose(model(x), y, atol=1e-6)
    model(x).square().sum().backward()
    assert not model.U.grad[:, 3:].any() and not model.S.grad[3:].any() and not model.V.grad[:, 3:].any()
    assert model.condition_number() == pytest.approx(1)
    dense = condlr_ext.to_dense(nn.Sequential(model))
    assert torch.allclose(dense(x), y, atol=1e-6)


def test_singular_core_is_not_inactive():
    """Zeros of the core alone: the optimizer lifts them, as it does with any singular core."""
    model = LowRankLinear(12, 9, rank=4)
    with torch.no_grad():
        model.S.copy_(torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0])))
    assert model.active_rank == 4 and model.condition_number() == math.inf
    CondLRSGD(model, 0.1, tau=0.3)
    assert_constraint(model, 0.3)
    assert model.active_rank == 4


def test_optimizer_notices_factors_of_another_rank():
    data = Planted(4)
    optimizer = CondLRSGD(data.model, 0.5, 0.5, tau=0.1)
    RankController(data.model, optimizer, max_rank=10)
    data.train(optimizer)
    for rank in (2, 7):
        other = LowRankLinear(30, 20, rank=rank, bias=False)
        RankController(other, CondLRSGD(other, 0.1, tau=0.1), max_rank=10)
        data.model.load_state_dict(other.state_dict())
        data.train(optimizer)
        assert data.model.active_rank == rank
        assert_constraint(data.model, 0.1)


def test_columns_can_be_added_in_the_middle_of_training():
    data = Planted(2)
    optimizer = CondLRSGD(data.model, 0.3, 0.9, tau=0.1)
    data.train(optimizer)
    buffer = optimizer.state[data.model.U]["momentum_buffer"].clone()
    RankController(data.model, optimizer, max_rank=0.5)
    assert data.model.U.shape == (20, 10)
    padded = optimizer.state[data.model.U]["momentum_buffer"]
    assert torch.equal(padded, F.pad(buffer, (0, 8)))
    data.train(optimizer)
    assert data.model.active_rank == 2
    assert_constraint(data.model, 0.1)
