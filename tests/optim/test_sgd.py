"""CondLRSGD: which step it takes, that it learns, options that are read at each step, bad input."""

import copy
import math

import pytest
import torch
from helpers.training import assert_constraint, batches, make_model, train
from torch import nn
from torch.nn import functional as F

import condlr_ext
from condlr_ext import LowRankLinear
from condlr_ext.errors import NonFiniteError
from condlr_ext.optim import CondLRSGD


@pytest.mark.parametrize("tau", [0.0, 0.1, 0.5, math.inf])
def test_learns_under_the_constraint(backend, tau):
    model = make_model()
    optimizer = CondLRSGD(model, 0.2, 0.3, tau=tau)
    losses = train(model, optimizer, batches(150))
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])
    assert_constraint(model, tau)
    assert optimizer.skipped == 0 and isinstance(optimizer, torch.optim.Optimizer)


def test_backends_give_the_same_training():
    runs = []
    for name in ("reference", "cpu"):
        with condlr_ext.backend(name):
            model = make_model()
            runs.append(train(model, CondLRSGD(model, 0.1, 0.9, tau=0.1), batches(20)))
    assert runs[0] == pytest.approx(runs[1], rel=1e-4)


def test_dense_parameters_follow_torch_sgd_exactly():
    options = dict(lr=0.1, momentum=0.9, dampening=0.0, weight_decay=0.01, nesterov=True)
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    twin = copy.deepcopy(dense)
    ours, theirs = CondLRSGD(dense, **options, tau=0.1), torch.optim.SGD(twin.parameters(), **options, fused=True)
    for _ in range(5):
        x = torch.randn(3, 4)
        for model, optimizer in ((dense, ours), (twin, theirs)):
            optimizer.zero_grad()
            model(x).pow(2).sum().backward()
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(dense.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("where", ["grad", "buffer"])
def test_memory_layouts_that_differ_are_not_fused(where):
    """torch's fused SGD walks raw memory: a channels_last gradient would be added to the wrong weights."""
    conv = nn.Conv2d(3, 4, 2, bias=False)
    twin = copy.deepcopy(conv)
    ours, theirs = CondLRSGD(conv, 0.1, 0.9, tau=0.1), torch.optim.SGD(twin.parameters(), 0.1, 0.9)
    for step in range(3):
        grad = torch.randn(4, 3, 2, 2)
        last = where == "grad" or step == 0  # the first gradient gives the buffer its strides
        conv.weight.grad = grad.to(memory_format=torch.channels_last) if last else grad
        twin.weight.grad = grad
        ours.step(), theirs.step()
    torch.testing.assert_close(conv.weight, twin.weight, rtol=0, atol=1e-6)


def test_arguments_of_the_step_are_kept_and_made_anew_when_something_changes():
    model = make_model()
    optimizer = CondLRSGD(model, 0.1, 0.9, tau=0.1)
    train(model, optimizer, batches(2))
    calls = optimizer._calls
    train(model, optimizer, batches(3))
    assert optimizer._calls is calls
    for change in ("buffer", "backend", "gradient", "momentum", "dtype"):
        twin, other = copy.deepcopy((model, optimizer))
        other._calls_key = None  # what a step without any memory does
        with condlr_ext.backend("reference" if change == "backend" else "auto"):
            for m, o in ((model, optimizer), (twin, other)):
                if change == "buffer":
                    o.state[m[0].U]["momentum_buffer"] = torch.ones_like(m[0].U)
                if change == "momentum":
                    o.param_groups[0]["momentum"] = 0.0
                if change == "dtype":
                    m.float() if m[0].U.dtype == torch.float64 else m.double()
                m.zero_grad()
                for p in m.parameters():
                    p.grad = torch.full_like(p, 0.1)
                if change == "gradient":
                    m[0].V.grad = None
                before = o._calls
                o.step()
                assert o._calls is not before
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True)), change


def test_a_step_makes_no_tensors_after_the_first():
    model = make_model()
    optimizer = CondLRSGD(model, 0.1, 0.9, tau=0.1)
    train(model, optimizer, batches(3))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        optimizer.step()
    events = profile.events()
    assert any("condlr_ext::step" in e.name for e in events)
    assert not [e for e in events if e.cpu_memory_usage > 0]


def test_bias_of_a_low_rank_layer_follows_torch_sgd(backend):
    layer = LowRankLinear(4, 3, rank=2)
    twin = nn.Parameter(layer.bias.detach().clone())
    options = dict(lr=0.1, momentum=0.9, dampening=0.1, weight_decay=0.01, maximize=True)
    ours, theirs = CondLRSGD(layer, **options, tau=0.1), torch.optim.SGD([twin], **options)
    for _ in range(4):
        for p in layer.parameters():
            p.grad = torch.randn_like(p)
        twin.grad = layer.bias.grad.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(layer.bias, twin)


SGD_OPTIONS = [
    dict(momentum=0.0, weight_decay=0.1),
    dict(momentum=0.9, dampening=0.3, weight_decay=0.1),
    dict(momentum=0.9, nesterov=True, weight_decay=0.1),
    dict(momentum=0.9, nesterov=True, maximize=True),
    dict(momentum=0.5, dampening=-0.5, maximize=True),
]


@pytest.mark.parametrize("options", SGD_OPTIONS, ids=str)
def test_core_follows_torch_sgd_and_the_factors_the_projected_direction(backend, options):
    """At tau = Inf: S is torch's, U is qf(U - lr (I - UUᵀ) D (SSᵀ + δ²)⁻¹) for the D that torch adds to a parameter."""
    layer = LowRankLinear(7, 6, rank=3, dtype=torch.float64)
    twin, lr = copy.deepcopy(layer), 0.02
    ours = CondLRSGD(layer, lr, **options, tau=math.inf)
    theirs = torch.optim.SGD([twin.S, twin.bias], lr, **options)
    directions = [torch.zeros_like(p) for p in (twin.U, twin.V)]
    sgd = torch.optim.SGD(directions, 1.0, **options | {"weight_decay": 0.0})
    for _ in range(5):
        for p, q in zip(layer.parameters(), twin.parameters(), strict=True):
            p.grad, q.grad = (torch.randn_like(p),) * 2
        for D, X in zip(directions, (layer.U, layer.V), strict=True):
            D.zero_()
            D.grad = X.grad.clone()
        sgd.step()  # adds -D to 0
        S = twin.S.detach()
        with torch.no_grad():
            for D, X, core in zip(directions, (twin.U, twin.V), (S, S.mT), strict=True):
                gram = core @ core.mT
                gram.diagonal().add_((1e-6 * torch.linalg.matrix_norm(core, 2)) ** 2)
                xi = (D - X @ (X.mT @ D)) @ torch.linalg.inv(gram)
                Q, R = torch.linalg.qr(X + lr * xi)
                X.copy_(Q * R.diagonal().sign())
        theirs.step()
        ours.step()
    for p, q in zip(layer.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-11)


def test_autograd_notices_a_step_between_forward_and_backward(backend):
    model = nn.Sequential(LowRankLinear(4, 4, rank=2), nn.Tanh(), LowRankLinear(4, 4, rank=2))
    optimizer = CondLRSGD(model, 0.1, tau=0.1)
    loss = model(torch.randn(3, 4)).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_scheduler_and_tensor_lr_are_read_at_each_step():
    model = make_model()
    optimizer = CondLRSGD(model, torch.tensor(0.1), tau=0.1)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2], gamma=0.0)
    data = list(batches(4))
    train(model, optimizer, data[:2], scheduler)
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, data[2:], scheduler)
    for p, q in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


def test_parameters_without_gradients_and_clipping():
    model = make_model()
    optimizer = CondLRSGD(model, 0.1, tau=0.1)
    optimizer.step()  # nothing has a gradient
    F.cross_entropy(model(next(iter(batches(1)))[0]), torch.zeros(16, dtype=torch.long)).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    assert_constraint(model, 0.1)


def test_momentum_changed_in_place_is_read():
    model = make_model()
    optimizer = CondLRSGD(model, 0.1, torch.tensor(0.9), tau=0.1)
    train(model, optimizer, batches(1))
    optimizer.param_groups[0]["momentum"].fill_(0.25)
    train(model, optimizer, batches(1))
    assert (optimizer._calls[0].table[..., 1] == 0.25).all()


model = make_model()


def nan_core():
    broken = make_model()
    broken[3].S.data[1, 1] = math.nan
    return broken


@pytest.mark.parametrize(
    "call,error,text",
    [
        (lambda: CondLRSGD(model, -0.1, tau=0.1), ValueError, "lr must be finite and >= 0, got -0.1"),
        (lambda: CondLRSGD(model, math.nan, tau=0.1), ValueError, "lr must be finite and >= 0, got nan"),
        (lambda: CondLRSGD(model, 0.1, -1, tau=0.1), ValueError, "momentum must be finite and >= 0"),
        (lambda: CondLRSGD(model, 0.1, weight_decay=-1, tau=0.1), ValueError, "weight_decay must be finite and >= 0"),
        (lambda: CondLRSGD(model, 0.1, nesterov=True, tau=0.1), ValueError, "nesterov needs momentum > 0 and dampening 0"),
        (lambda: CondLRSGD(model, 0.1, tau=-0.5), ValueError, "tau must be a number >= 0 .* got -0.5"),
        (lambda: CondLRSGD(model, 0.1, tau=0.1, band="max"), ValueError, "band must be one of"),
        (lambda: CondLRSGD(model, 0.1, tau=0.1, sigma_max=-1), ValueError, "sigma_max must be None or a number > 0"),
        (lambda: CondLRSGD([(n, p) for n, p in model.named_parameters() if n != "3.V"], 0.1, tau=0.1), ValueError, "layer '3' has S, U .* but not V"),
        (lambda: CondLRSGD(nan_core(), 0.1, tau=0.1), NonFiniteError, "S of layer '3' must be finite, got NaN or Inf"),
        (lambda: CondLRSGD([], 0.1, tau=0.1), ValueError, "empty parameter list"),
    ],
)  # fmt: skip
def test_bad_input(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_dampening_that_is_set_before_the_first_step_leaves_it_undamped(backend):
    model = nn.Sequential(LowRankLinear(6, 5, rank=3), nn.Linear(5, 4))
    optimizer = CondLRSGD(model, 0.1, 0.9, tau=1.0)
    optimizer.param_groups[0]["dampening"] = 0.5
    before = [layer.bias.detach().clone() for layer in model]
    for count in (1.0, 1.0 + 0.9 + 0.5):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        for layer, bias in zip(model, before, strict=True):
            torch.testing.assert_close(layer.bias, bias - 0.1 * count)
