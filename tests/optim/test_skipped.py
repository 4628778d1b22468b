"""Gradients that cannot be stepped: layers left unchanged, counted or named; sparse gradients."""

import copy
import math

import pytest
import torch
from helpers.training import batches, make_model, train
from torch import nn
from torch.nn import functional as F

from condlr_ext import LowRankLinear
from condlr_ext.errors import NonFiniteError
from condlr_ext.optim import CondLRSGD


def test_non_finite_gradient_is_counted_or_raised():
    model = make_model()
    optimizer = CondLRSGD(model, 0.1, 0.9, tau=0.1)
    train(model, optimizer, batches(1))
    before = copy.deepcopy(model.state_dict())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model[3].S.grad[0, 0] = math.nan
    optimizer.step()
    after = model.state_dict()
    assert all(torch.equal(after[k], before[k]) == k.startswith("3.") for k in before)
    assert optimizer.skipped == 1

    strict = CondLRSGD(model, 0.1, 0.9, tau=0.1, check_finite=True)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NonFiniteError, match="the gradient of 3.S must be finite.*nothing was changed"):
        strict.step()
    assert all(torch.equal(model.state_dict()[k], before[k]) for k in before)
    model[3].S.grad.zero_()
    with torch.no_grad():
        model[3].S.zero_()
    with pytest.raises(NonFiniteError, match="left unchanged, because the core is zero.*'3'"):
        strict.step()


def test_grad_scaler_skips_the_step():
    model = make_model()
    optimizer = CondLRSGD(model, 0.1, tau=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    ((x, y),) = batches(1)
    for poison in (True, False):
        before = copy.deepcopy(model.state_dict())
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        if poison:
            model[5].weight.grad[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update()
        same = all(torch.equal(model.state_dict()[k], before[k]) for k in before)
        assert same == poison


def test_a_skipped_first_step_does_not_start_the_momentum(backend):
    layer = LowRankLinear(4, 3, rank=2)
    twin = nn.Parameter(layer.bias.detach().clone())
    options = dict(lr=0.1, momentum=0.9, dampening=0.5)
    ours, theirs = CondLRSGD(layer, **options, tau=0.1), torch.optim.SGD([twin], **options)
    for p in layer.parameters():
        p.grad = torch.randn_like(p)
    good = layer.S.grad.clone()
    layer.S.grad = good * math.nan
    ours.step()
    assert ours.skipped == 1 and not ours.state[layer.bias]["momentum_buffer"].any()
    layer.S.grad, twin.grad = good, layer.bias.grad.clone()
    ours.step()
    theirs.step()
    torch.testing.assert_close(layer.bias, twin)


def test_skipped_counts_also_when_some_layers_have_no_gradient():
    model = make_model()
    optimizer = CondLRSGD(model, 0.1, 0.9, tau=0.1)
    for p in model[3].parameters():
        p.grad = torch.full_like(p, math.nan)
    optimizer.step()
    late = LowRankLinear(3, 3, rank=2)
    optimizer.add_param_group({"params": [(f"late.{n}", p) for n, p in late.named_parameters()]})
    optimizer.step()
    assert optimizer.skipped == 2


def test_check_finite_takes_sparse_gradients():
    model = nn.ModuleDict({"embed": nn.Embedding(9, 4, sparse=True), "low": LowRankLinear(4, 3, rank=2)})
    optimizer = CondLRSGD(model, 0.1, tau=0.1, check_finite=True)
    for poison in (False, True):
        optimizer.zero_grad()
        (model["low"](model["embed"](torch.tensor([1, 2]))).sum() * (math.nan if poison else 1)).backward()
        if poison:
            with pytest.raises(NonFiniteError, match="gradient of embed.weight"):
                optimizer.step()
        else:
            optimizer.step()


def test_sparse_gradients_are_for_dense_parameters_alone():
    model = nn.ModuleDict({"embed": nn.Embedding(9, 4, sparse=True), "low": LowRankLinear(4, 3, rank=2)})
    optimizer = CondLRSGD(model, 0.1, tau=0.1)
    model["low"](model["embed"](torch.tensor([1, 2]))).sum().backward()
    model["low"].U.grad = model["low"].U.grad.to_sparse()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="takes no sparse gradients for low-rank layers, got one for low.U"):
        optimizer.step()
    assert all(torch.equal(model.state_dict()[k], before[k]) for k in before)
