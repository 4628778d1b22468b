"""Optimizers of other packages under a Projector; those that step or swap weights elsewhere are refused by name."""

import pytest
import pytorch_optimizer
import schedulefree
import torch
from helpers.clients import TAU
from helpers.training import assert_constraint
from torch import nn
from torch.nn import functional as F

import condlr_ext
from condlr_ext.optim import CondLRAdamW, CondLRSGD, Projector

X = torch.rand(64, 32, generator=torch.Generator().manual_seed(0))
Y = X[:, :10].argmax(1)


def mlp():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    condlr_ext.factorize(model, rank=0.25, exclude="4")
    return model


def backward(model):
    loss = F.cross_entropy(model(X), Y)
    loss.backward()
    return loss


@pytest.mark.parametrize("name", "Lion Prodigy SOAP AdaBelief Adan Lamb ADOPT".split())
def test_one_step_per_batch(name):
    model = mlp()
    optimizer = getattr(pytorch_optimizer, name)(model.parameters(), lr=1e-3)
    Projector(model, tau=TAU).attach(optimizer)
    for _ in range(5):
        optimizer.zero_grad()
        backward(model)
        optimizer.step()
        assert_constraint(model, TAU)


def test_lookahead():
    """Attached to the wrapper, so that its interpolated weights are projected."""
    model = mlp()
    optimizer = pytorch_optimizer.Lookahead(torch.optim.AdamW(model.parameters(), lr=1e-2), k=2, alpha=0.5)
    Projector(model, tau=TAU).attach(optimizer)
    for _ in range(5):
        optimizer.zero_grad()
        backward(model)
        optimizer.step()
        assert_constraint(model, TAU)


@pytest.mark.parametrize("base", [CondLRSGD, torch.optim.SGD])
def test_sharpness_aware_steps(base):
    """Its base optimizer steps."""
    model = mlp()
    options = {"tau": TAU} if base is CondLRSGD else {}
    optimizer = pytorch_optimizer.SAM(model.parameters(), base_optimizer=base, lr=0.02, **options)
    if base is not CondLRSGD:
        Projector(model, tau=TAU).attach(optimizer.base_optimizer)
    for _ in range(5):
        backward(model)
        optimizer.first_step(zero_grad=True)
        backward(model)
        optimizer.second_step(zero_grad=True)
        assert_constraint(model, TAU)


def test_attached_to_sam_itself():
    model = mlp()
    optimizer = pytorch_optimizer.SAM(model.parameters(), base_optimizer=torch.optim.SGD, lr=0.02)
    with pytest.raises(ValueError, match="base_optimizer"):
        Projector(model, tau=TAU).attach(optimizer)


@pytest.mark.parametrize("name", ["AdamWScheduleFree", "SGDScheduleFree", "RAdamScheduleFree"])
def test_schedule_free_optimizers_are_refused(name):
    model = mlp()
    options = {} if name == "RAdamScheduleFree" else {"warmup_steps": 2}
    optimizer = getattr(schedulefree, name)(model.parameters(), lr=0.05, **options)
    with pytest.raises(ValueError, match=name):
        Projector(model, tau=TAU).attach(optimizer)


@pytest.mark.parametrize("optimizer", [CondLRSGD, CondLRAdamW])
def test_options_of_torch_are_accepted(optimizer):
    optimizer(mlp(), lr=1e-3, tau=TAU, fused=None, foreach=None)
