"""Writes to U, V and S between steps: the weight does not jump, and the next step keeps the bound."""

import copy
import math

import pytest
import torch
from helpers.matrices import kappa, non_orthonormality
from torch import nn

import condlr_ext
from condlr_ext import LowRankLinear
from condlr_ext.optim import CondLRAdamW, CondLRSGD

MAKERS = [
    lambda model, lr, **options: CondLRSGD(model, lr, momentum=0.9, **options),
    lambda model, lr, **options: CondLRAdamW(model, lr, weight_decay=0.0, **options),
]


def trained(make, lr=0.1, tau=0.1, dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = nn.Sequential(
        LowRankLinear(12, 20, rank=5, dtype=dtype), nn.Tanh(), LowRankLinear(20, 6, rank=4, dtype=dtype)
    )
    optimizer = make(model, lr, tau=tau, **options)
    for _ in range(2):
        step(model, optimizer)
    return model, optimizer


def step(model, optimizer, scale=1.0):
    optimizer.zero_grad()
    x = torch.randn(16, 12, dtype=model[0].U.dtype)
    (scale * model(x).square().sum()).backward()
    optimizer.step()


def average_with_another(model):
    other = copy.deepcopy(model)
    for layer in (other[0], other[2]):
        layer.reset_parameters()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        p.data.mul_(0.5).add_(q.data, alpha=0.5)  # past the version counter


def through_a_vector(model):
    vector = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(vector + 0.05 * torch.randn_like(vector), model.parameters())


def double_u(model):
    with torch.no_grad():
        model[0].U.mul_(2)


def dependent_columns(model):
    with torch.no_grad():
        model[2].V[:, 1] = model[2].V[:, 0]


WRITES = [average_with_another, through_a_vector, double_u, dependent_columns]


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("make", MAKERS, ids=["sgd", "adamw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_weight_does_not_jump(backend, dtype, make, write):
    model, optimizer = trained(make, tau=math.inf, dtype=dtype)
    write(model)
    weights = [layer.weight.detach().clone() for layer in (model[0], model[2])]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    step(model, optimizer)
    for layer, weight in zip((model[0], model[2]), weights, strict=True):
        error = (layer.weight - weight).norm() / weight.norm()
        assert error <= (2e-6 if dtype == torch.float32 else 1e-14)
        assert max(non_orthonormality(layer.U), non_orthonormality(layer.V)) <= (
            2e-6 if dtype == torch.float32 else 1e-13
        )
    assert optimizer.skipped == 0


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("make", MAKERS, ids=["sgd", "adamw"])
def test_the_next_step_keeps_the_bound_and_goes_downhill(backend, make, write):
    model, optimizer = trained(make)
    write(model)
    before = [p.detach().clone() for p in model.parameters()]
    step(model, optimizer)
    assert max(condlr_ext.condition_numbers(model).values()) <= 1.1 * (1 + 1e-5)
    for layer in (model[0], model[2]):
        assert max(non_orthonormality(layer.U), non_orthonormality(layer.V)) <= 2e-6 and kappa(layer.S) <= 1.1 * (
            1 + 5e-6
        )
    assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert optimizer.skipped == 0


def test_the_step_is_that_of_the_new_factors():
    """Plain SGD from (2 U) S Vᵀ is that from U (2 S) Vᵀ: the same weight, gradients of the chain rule."""
    model = nn.Sequential(LowRankLinear(9, 7, rank=3, dtype=torch.float64))
    twin = copy.deepcopy(model)
    optimizers = [CondLRSGD(m, 0.1, tau=math.inf) for m in (model, twin)]
    with torch.no_grad():
        model[0].U.mul_(2)
        twin[0].S.mul_(2)
    x = torch.randn(8, 9, dtype=torch.float64)
    for m, optimizer in zip((model, twin), optimizers, strict=True):
        m(x).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(model[0].weight, twin[0].weight)


def test_a_frozen_factor_is_refused_by_name():
    model, optimizer = trained(MAKERS[0])
    model[2].S.requires_grad_(False)
    double_u(model)
    dependent_columns(model)
    before = [p.detach().clone() for p in model[2].parameters()]
    optimizer.zero_grad()
    model(torch.randn(4, 12)).sum().backward()
    with pytest.raises(
        ValueError, match="CondLRSGD.step: U and V of '2' must be orthonormal where one of U, S, V is frozen"
    ):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model[2].parameters(), before, strict=True))
    assert non_orthonormality(model[0].U) <= 2e-6  # the other layer has been stepped


@pytest.mark.parametrize("band", ["rms", "mean", "optimal"])
@pytest.mark.parametrize("make", MAKERS, ids=["sgd", "adamw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_step_with_lr_0_and_zero_gradients_is_the_identity(backend, make, band, dtype):
    """torch.distributed.checkpoint takes such a step to have a state."""
    model, optimizer = trained(make, band=band, dtype=dtype)
    before = [p.detach().clone() for p in model.parameters()]
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for group, lr in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = lr
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
