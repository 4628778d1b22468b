"""Writes to U, V and S between steps: the weight does not jump, and the next step keeps the bound."""

import copy
import math

import pytest
import torch
from helpers import external_writes as writes
from torch import nn

from condlr_ext import LowRankLinear, linalg
from condlr_ext.optim import CondLRSGD, step_args

MAKERS = [writes.sgd, writes.adamw]


@pytest.mark.parametrize("write", writes.WRITES)
@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_weight_does_not_jump(backend, dtype, make, write):
    writes.check_that_the_weight_does_not_jump(make, write, dtype)


@pytest.mark.parametrize("write", writes.WRITES)
@pytest.mark.parametrize("make", MAKERS)
def test_the_next_step_keeps_the_bound_and_moves_everything(backend, make, write):
    writes.check_the_next_step(make, write)


def test_dependent_columns_leave_no_core_without_the_bound(backend):
    """Their triangle is singular, exactly or to rounding; its inverse must not reach the core."""
    for seed in range(60):
        model, optimizer = writes.trained(writes.sgd, seed=seed)
        writes.dependent_columns(model)
        writes.step(model, optimizer)
        writes.check_the_constraint(model)


def test_a_step_that_is_left_out_leaves_what_was_written(backend):
    model, optimizer = writes.trained(writes.sgd)
    with torch.no_grad():
        model[0].V.copy_(100 * torch.randn(12, 5))
    optimizer.zero_grad()
    model(torch.randn(16, 12)).sum().backward()
    for p in model[0].parameters():
        p.grad = 1e36 * torch.randn_like(p)
    before = copy.deepcopy((model[0].state_dict(), [optimizer.state[p] for p in model[0].parameters()]))
    optimizer.step()
    assert optimizer.skipped == 1
    after = model[0].state_dict(), [optimizer.state[p] for p in model[0].parameters()]
    torch.testing.assert_close(after, before, rtol=0, atol=0)


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


def test_a_frozen_factor_is_refused_by_name(backend):
    writes.check_that_a_frozen_factor_is_refused(writes.sgd)


@pytest.mark.parametrize("band", ["rms", "mean", "optimal"])
@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_step_with_lr_0_and_zero_gradients_is_the_identity(backend, make, band, dtype):
    writes.check_the_identity(make, band, dtype)


class Device:
    """A GPU that runs behind the host: `done` says whether the copies that were asked for have come."""

    def __init__(self, monkeypatch):
        self.done, self.capturing = False, False
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)

    def record_event(self):
        return self

    def query(self):
        assert not self.capturing
        return self.done


@pytest.mark.parametrize("make", MAKERS)
def test_a_gpu_is_not_waited_for(monkeypatch, make):
    """A layer that was written to stays until its mark has come, and each step that leaves it so is counted."""
    device = Device(monkeypatch)
    model, optimizer = writes.trained(make)
    (call,) = optimizer._calls
    call._marks = step_args._Marks()
    writes.step(model, optimizer)
    assert optimizer.skipped == 0
    model[0].U.data.mul_(2)
    before = [p.detach().clone() for p in model.parameters()]
    for steps, device.capturing in ((1, False), (2, True)):
        writes.step(model, optimizer)
        same = [torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
        assert same == [True] * 4 + [False] * 4 and optimizer.skipped == steps
    device.done, device.capturing = True, False
    before = [p.detach().clone() for p in model.parameters()]
    writes.step(model, optimizer)
    writes.check_the_constraint(model)
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert optimizer._skipped[torch.device("cpu")].tolist() == [2, 0] and optimizer._calls == [call]


def test_a_write_that_the_version_counter_shows_is_looked_for_at_once(monkeypatch):
    Device(monkeypatch)
    model, optimizer = writes.trained(writes.sgd)
    optimizer._calls[0]._marks = step_args._Marks()
    monkeypatch.setattr(
        step_args, "has_marks", lambda skipped, real=step_args.has_marks: looked.append(1) or real(skipped)
    )
    for write in (None, "U", "V"):
        looked = []
        if write:
            with torch.no_grad():
                getattr(model[2], write).mul_(2)
        writes.step(model, optimizer)
        writes.check_the_constraint(model)
        assert bool(looked) == bool(write) and optimizer.skipped == 0
        optimizer._calls[0]._marks = step_args._Marks()


def test_without_a_bound_a_singular_core_at_its_cap_stays(backend):
    for seed in range(5):
        torch.manual_seed(seed)
        layer = LowRankLinear(12, 11, rank=10, bias=False)
        optimizer = CondLRSGD(nn.Sequential(layer), 0.0, tau=math.inf, sigma_max=0.01)
        with torch.no_grad():
            layer.S.copy_(linalg.clip_spectrum(torch.randn(10, 10), math.inf, sigma_max=0.01))
            layer.S[:, -1] = 0
        before = [p.detach().clone() for p in layer.parameters()]
        for p in layer.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
        assert all(torch.equal(p, q) for p, q in zip(layer.parameters(), before, strict=True)), seed
