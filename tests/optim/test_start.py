"""Construction: layers are put on the constraint set; frozen, meta, singular and zero ones."""

import copy
import math

import pytest
import torch
from helpers.matrices import kappa, non_orthonormality
from helpers.training import assert_constraint, batches, make_model, train
from torch import nn

from condlr_ext import LowRankLinear
from condlr_ext.optim import CondLRAdamW, CondLRSGD


def test_start_puts_the_factors_on_the_constraint_set_without_changing_the_function():
    model = nn.Sequential(LowRankLinear(9, 8, rank=4, dtype=torch.float64))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p))
    weight = model[0].weight.detach().clone()
    CondLRSGD(model, 0.1, tau=math.inf)  # no bound: only the factors are made orthonormal
    assert max(non_orthonormality(model[0].U), non_orthonormality(model[0].V)) < 1e-13
    torch.testing.assert_close(model[0].weight, weight)
    CondLRSGD(model, 0.1, tau=0.2)
    assert kappa(model[0].S) <= 1.2 * (1 + 1e-12)
    S = model[0].S.detach().clone()
    CondLRSGD(model, 0.1, tau=0.2)
    assert torch.equal(model[0].S, S)  # already inside: a resumed model stays bit for bit
    CondLRSGD(model, 0.1, tau=0.2, sigma_max=0.5)
    assert torch.linalg.matrix_norm(model[0].S, 2) <= 0.5 * (1 + 1e-12)


def test_frozen_layers_are_not_touched():
    model = make_model()
    model[0].requires_grad_(False)
    with torch.no_grad():
        model[0].S.copy_(torch.diag(torch.arange(1.0, 5.0)))
    before = [p.clone() for p in model[0].parameters()]
    train(model, CondLRSGD(model, 0.1, 0.9, tau=0.0), batches(2))
    assert all(torch.equal(p, q) for p, q in zip(model[0].parameters(), before, strict=True))


def test_meta_model_can_have_an_optimizer():
    optimizer = CondLRSGD(nn.Sequential(LowRankLinear(5, 4, rank=2, device="meta")), 0.1, tau=0.1)
    assert (
        optimizer.param_groups[0]["roles"] == ["U", "S", "V", "other"]
        and optimizer.param_groups[0]["params"][0].is_meta
    )


def test_singular_core_loaded_after_construction_trains_again(backend):
    model = nn.Sequential(LowRankLinear(6, 5, rank=3))
    optimizer = CondLRSGD(model, 0.01, tau=0.1)
    with torch.no_grad():
        model[0].S.copy_(torch.diag(torch.tensor([1.0, 0.5, 0.0])))
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert optimizer.skipped == 0
    assert_constraint(model, 0.1)


def test_a_zero_core_is_named():
    model = nn.Sequential(LowRankLinear(6, 5, rank=3))
    with torch.no_grad():
        model[0].S.zero_()
    with pytest.warns(UserWarning, match="CondLRSGD: the core of layer '0' is zero"):
        CondLRSGD(model, 0.1, tau=0.1)


def test_frozen_factors_keep_their_values():
    layer = LowRankLinear(6, 5, rank=3)
    layer.S.requires_grad_(False)
    before = layer.S.clone()
    optimizer = CondLRSGD(layer, 0.1, tau=0.1)
    layer(torch.randn(4, 6)).square().sum().backward()
    optimizer.step()
    assert torch.equal(layer.S, before) and non_orthonormality(layer.U) < 2e-6
    with torch.no_grad():
        layer.S.copy_(torch.diag(torch.tensor([3.0, 2.0, 1.0])))
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match="S of layer '' is frozen and the layer not on the constraint set"):
        CondLRSGD(layer, 0.1, tau=0.1)
    assert all(torch.equal(before[name], p) for name, p in layer.state_dict().items())
    CondLRSGD(layer, 0.1, tau=2.0)
    layer.bfloat16()
    before = layer.S.clone()
    CondLRSGD(layer, 0.1, tau=2.0)  # what rounding takes off the set is no reason
    assert torch.equal(layer.S, before)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_a_frozen_core_off_the_set_is_found_at_any_scale(scale):
    layer = LowRankLinear(6, 5, rank=3)
    layer.S.requires_grad_(False)
    with torch.no_grad():
        layer.S.copy_(scale * torch.diag(torch.tensor([3.0, 2.0, 1.0])))
    with pytest.raises(ValueError, match="S of layer '' is frozen and the layer not on the constraint set"):
        CondLRSGD(layer, 0.1, tau=0.1)


def test_a_layer_unfrozen_later_starts_on_the_constraint_set():
    layer = LowRankLinear(6, 5, rank=3, dtype=torch.float64).requires_grad_(False)
    with torch.no_grad():
        layer.U.copy_(torch.randn_like(layer.U))
    weight = layer.weight.clone()
    optimizer = CondLRSGD(layer, 0.0, tau=math.inf)
    layer.requires_grad_()
    for p in layer.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    torch.testing.assert_close(layer.weight, weight)
    assert non_orthonormality(layer.U) < 1e-13


@pytest.mark.parametrize("make", [CondLRSGD, CondLRAdamW])
def test_a_model_without_low_rank_layers_is_not_silent(make):
    """As when factorize comes after the optimizer."""
    with pytest.warns(UserWarning, match=f"{make.__name__}: there is no low-rank layer among the parameters") as caught:
        make(nn.Sequential(nn.Linear(4, 4)), lr=0.1, tau=0.1)
    assert caught[0].filename == __file__
