"""Writes to U and V between steps, and what the next step must do about them, on any backend."""

import copy
import math

import pytest
import torch
from torch import nn

import condlr_ext
from condlr_ext import LowRankLinear
from condlr_ext.optim import CondLRAdamW, CondLRSGD

from .matrices import kappa, non_orthonormality
from .training import low_rank_layers


def sgd(model, lr=0.1, **options):
    return CondLRSGD(model, lr, **(dict(momentum=0.9, tau=0.1) | options))


def adamw(model, lr=0.1, **options):
    return CondLRAdamW(model, lr, weight_decay=0.0, **(dict(tau=0.1) | options))


def trained(make, dtype=torch.float32, device=None, *, seed=0, **options):
    """A network of two low-rank layers and its optimizer, after two steps."""
    torch.manual_seed(seed)
    layers = [LowRankLinear(12, 20, rank=5), nn.Tanh(), LowRankLinear(20, 6, rank=4)]
    model = nn.Sequential(*layers).to(device, dtype)
    optimizer = make(model, **options)
    for _ in range(2):
        step(model, optimizer)
    return model, optimizer


def step(model, optimizer):
    optimizer.zero_grad()
    x = torch.randn(16, 12).to(model[0].U)
    model(x).square().sum().backward()
    optimizer.step()


def average_with_another(model):
    other = copy.deepcopy(model)
    for layer in low_rank_layers(other):
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


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr


def check_that_the_weight_does_not_jump(make, write, dtype, device=None):
    model, optimizer = trained(make, dtype, device, tau=math.inf)
    write(model)
    weights = [layer.weight.detach().clone() for layer in low_rank_layers(model)]
    set_lr(optimizer, 0.0)
    step(model, optimizer)
    for layer, weight in zip(low_rank_layers(model), weights, strict=True):
        error = (layer.weight - weight).norm() / weight.norm()
        assert error <= (2e-6 if dtype == torch.float32 else 1e-14)
        assert orthonormality_of(layer) <= (2e-6 if dtype == torch.float32 else 1e-13)
    assert optimizer.skipped == 0


def orthonormality_of(layer):
    return max(non_orthonormality(X.detach().cpu()) for X in (layer.U, layer.V))


def check_the_next_step(make, write, device=None):
    """It keeps the bound and moves everything."""
    model, optimizer = trained(make, device=device)
    write(model)
    before = [p.detach().clone() for p in model.parameters()]
    step(model, optimizer)
    check_the_constraint(model)
    assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert optimizer.skipped == 0


def check_the_constraint(model):
    assert max(condlr_ext.condition_numbers(model).values()) <= 1.1 * (1 + 1e-5)
    for layer in low_rank_layers(model):
        assert orthonormality_of(layer) <= 2e-6 and kappa(layer.S.detach().cpu()) <= 1.1 * (1 + 5e-6)


def check_that_a_frozen_factor_is_refused(make):
    model, optimizer = trained(make)
    model[2].S.requires_grad_(False)
    double_u(model)
    dependent_columns(model)
    before = [p.detach().clone() for p in model[2].parameters()]
    text = f"{type(optimizer).__name__}.step: U and V of '2' must be orthonormal where one of U, S, V is frozen"
    with pytest.raises(ValueError, match=text):
        step(model, optimizer)
    assert all(torch.equal(p, q) for p, q in zip(model[2].parameters(), before, strict=True))
    assert non_orthonormality(model[0].U) <= 2e-6  # the other layer has been stepped


def check_the_identity(make, band, dtype, device=None):
    """A step with lr = 0 and zero gradients, as torch.distributed.checkpoint takes to have a state; training goes on."""
    model, optimizer = trained(make, dtype, device, band=band)
    before = [p.detach().clone() for p in model.parameters()]
    set_lr(optimizer, 0.0)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    set_lr(optimizer, 0.1)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    step(model, optimizer)
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
