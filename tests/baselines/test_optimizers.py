"""All optimizers of the baselines: learning, resuming, errors, other parameters, devices."""

import copy
import math
import pickle

import pytest
import torch
from helpers.baselines import assert_same_state, layers_of, low_rank, mlp, train
from helpers.matrices import non_orthonormality
from helpers.models import DigitsCNN, digits_encoder
from torch import nn
from torch.nn import functional as F

from condlr_ext import LowRankLinear
from condlr_ext.baselines import (
    DLRT,
    CayleySGD,
    ProjectedSGD,
    ReleasedCondLR,
    RobustDLRT,
)
from condlr_ext.errors import NonFiniteError

OPTIMIZERS = {
    "released": lambda model, lr, **k: ReleasedCondLR(model, lr, **k, tau=0.1),
    "released tau 0": lambda model, lr, **k: ReleasedCondLR(model, lr, **k, tau=0),
    "cayley": CayleySGD,
    "cayley bound": lambda model, lr, **k: CayleySGD(model, lr, **k, tau=0.1),
    "projected": ProjectedSGD,
    "projected bound": lambda model, lr, **k: ProjectedSGD(model, lr, **k, tau=0.1),
    "dlrt": lambda model, lr, **k: DLRT(model, lr, **k, tolerance=0.1),
    "robust dlrt": lambda model, lr, **k: RobustDLRT(model, lr, **k, beta=0.05, tolerance=0.1, core_steps=5),
}
every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


@every_optimizer
@pytest.mark.parametrize(
    "build, lr, steps, most", [(mlp, 0.3, 60, 0.9), (DigitsCNN, 0.1, 30, 0.6), (digits_encoder, 0.1, 40, 0.95)]
)
def test_learns_digits(make, build, lr, steps, most, digits):
    model = low_rank(build, rank=0.5)
    optimizer = make(model, lr, momentum=0.3)
    losses = train(model, optimizer, digits, steps)
    assert sum(losses[-5:]) < most * sum(losses[:5])
    assert isinstance(optimizer, torch.optim.Optimizer)
    for layer in layers_of(model):
        assert max(non_orthonormality(layer.U), non_orthonormality(layer.V)) < 3e-6
        assert layer.rank == len(layer.S) == layer.U.shape[1] == layer.V.shape[1]


@every_optimizer
def test_resumes_exactly(make, digits):
    model = low_rank()
    optimizer = make(model, 0.1, momentum=0.5)
    train(model, optimizer, digits, 8)
    twin = copy.deepcopy(model)
    resumed = make(twin, 0.3, momentum=0.1)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    copied_model, copied = pickle.loads(pickle.dumps((model, optimizer)))
    losses = train(model, optimizer, digits, 8, start=8)
    assert train(twin, resumed, digits, 8, start=8) == losses
    assert train(copied_model, copied, digits, 8, start=8) == losses
    for p, q, c in zip(model.parameters(), twin.parameters(), copied_model.parameters(), strict=True):
        assert torch.equal(p, q) and torch.equal(p, c)


@every_optimizer
def test_other_parameters_follow_torch_sgd(make, digits):
    """With the layers' own loss gone, the classifier of fixed features is trained as torch's SGD trains it."""
    model = low_rank(dtype=torch.float64)
    optimizer = make(model, 0.1, momentum=0.9, weight_decay=0.01)
    head = copy.deepcopy(model[4])
    theirs = torch.optim.SGD(head.parameters(), 0.1, momentum=0.9, weight_decay=0.01)
    features = torch.randn(32, 48, dtype=torch.float64)
    taken = 0
    for _ in range(12):
        before = model[4].weight.clone()

        def closure():
            optimizer.zero_grad()
            for p in (p for layer in layers_of(model) for p in layer.parameters()):
                p.grad = torch.zeros_like(p)
            loss = model[4](features).square().sum() / 32
            loss.backward()
            return loss

        optimizer.step(closure)
        if torch.equal(before, model[4].weight):  # RobustDLRT makes bases
            continue
        taken += 1
        theirs.zero_grad()
        (head(features).square().sum() / 32).backward()
        theirs.step()
        torch.testing.assert_close(model[4].weight, head.weight, rtol=1e-12, atol=1e-14)
    assert taken >= 10


@every_optimizer
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_gradient_changes_nothing(make, value, digits):
    model = low_rank()
    optimizer = make(model, 0.1, momentum=0.5)
    train(model, optimizer, digits, 3)
    before, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    calls = []

    def closure():
        calls.append(0)
        optimizer.zero_grad()
        F.cross_entropy(model(digits[0][:8]), digits[1][:8]).backward()
        if len(calls) == (3 if isinstance(optimizer, DLRT) else 1):
            model[4].bias.grad[0] = value

    with pytest.raises(NonFiniteError, match=r"NaN or Inf in that of 4\.bias; nothing was changed"):
        optimizer.step(closure)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert_same_state(state, optimizer.state_dict())


@every_optimizer
def test_autocast_has_no_effect_on_the_step(make, digits):
    results = []
    for enabled in (False, True):
        model = low_rank()
        optimizer = make(model, 0.1, momentum=0.5)

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            with torch.autocast("cpu", enabled=False):
                F.cross_entropy(model(digits[0][:64]), digits[1][:64]).backward()

        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            for _ in range(7):
                optimizer.step(closure)
        results.append(model.state_dict())
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


@pytest.mark.parametrize("name", ["released", "released tau 0", "cayley bound", "projected bound"])
def test_a_step_that_overflows_changes_nothing(name, digits):
    model = low_rank()
    optimizer = OPTIMIZERS[name](model, 0.1)
    optimizer.param_groups[0]["lr"] = 1e38
    before = copy.deepcopy(model.state_dict())
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e3)
    with pytest.raises(NonFiniteError, match="NaN or Inf in 0.S, 2.S; nothing was changed"):
        optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda m: ReleasedCondLR(m, -0.1, tau=0.1), "ReleasedCondLR: lr must be a finite number >= 0, got -0.1"),
        (lambda m: ReleasedCondLR(m, 0.1, math.inf, tau=0.1), "momentum must be a finite number"),
        (lambda m: ReleasedCondLR(m, 0.1, tau=-0.1), "tau must be a finite number >= 0"),
        (lambda m: ReleasedCondLR(m, 0.1, tau=math.inf), "tau must be a finite number >= 0"),
        (lambda m: ReleasedCondLR(mlp(), 0.1, tau=0.1), "must have low-rank layers"),
        (lambda m: ReleasedCondLR(m.half(), 0.1, tau=0.1), "U of layer '0' must be float32 or float64, got torch.float16"),
        (lambda m: ReleasedCondLR(m.to("meta"), 0.1, tau=0.1), "got a meta tensor"),
        (lambda m: CayleySGD(m, 0.1, tau=-1), "CayleySGD: tau must be a number >= 0"),
        (lambda m: CayleySGD(mlp(), 0.1), "must have low-rank layers, or weights name dense ones"),
        (lambda m: CayleySGD(m, 0.1, weights="5"), "weights must be names of modules .* got '5'"),
        (lambda m: ProjectedSGD(m, 0.1, weight_decay="x"), "ProjectedSGD: weight_decay must be"),
        (lambda m: DLRT(m, 0.1, tolerance=1), r"DLRT: tolerance must be a number in \[0, 1\), got 1"),
        (lambda m: DLRT(m, 0.1, tolerance=0.1, min_rank=0), "min_rank must be an int >= 1, got 0"),
        (lambda m: DLRT(mlp(), 0.1, tolerance=0.1), "must have low-rank layers that are trained, got none"),
        (lambda m: DLRT(m.requires_grad_(False), 0.1, tolerance=0.1), "layers that are trained, got none"),
        (lambda m: RobustDLRT(m, 0.1, beta=-1, tolerance=0.1), "beta must be a finite number >= 0, got -1"),
        (lambda m: RobustDLRT(m, 0.1, beta=0, tolerance=0.1, core_steps=0), "core_steps must be an int >= 1, got 0"),
    ],
)  # fmt: skip
def test_bad_arguments(make, text):
    with pytest.raises(ValueError, match=text):
        make(low_rank())


def test_more_bad_arguments():
    model = low_rank()
    with pytest.raises(TypeError, match="DLRT: model must be a module"):
        DLRT(model.parameters(), 0.1, tolerance=0.1)
    with pytest.raises(TypeError, match="a closure that computes loss and gradients is needed"):
        DLRT(model, 0.1, tolerance=0.1).step(None)
    model[0].U.requires_grad_(False)
    with pytest.raises(ValueError, match="layer '0' must have all of U, S, V trained or none, got S, V"):
        DLRT(model, 0.1, tolerance=0.1)
    model[2].S.data[0, 0] = math.nan
    for make in (OPTIMIZERS["released"], CayleySGD):
        with pytest.raises(NonFiniteError, match="S of layer '2' must be finite"):
            make(model, 0.1)
    for make in (OPTIMIZERS["released"], OPTIMIZERS["robust dlrt"]):
        model = low_rank()
        optimizer = make(model, 0.1)
        model[4].weight.grad = torch.zeros(10, 48).to_sparse()
        with pytest.raises(RuntimeError, match="step does not take sparse gradients"):
            optimizer.step()
        with pytest.raises(ValueError, match="add_param_group: "):
            optimizer.add_param_group({"params": [("extra", nn.Parameter(torch.ones(1)))]})


@pytest.mark.gpu
@every_optimizer
def test_on_cuda_as_on_the_cpu(make):
    torch.backends.cuda.matmul.allow_tf32 = False
    results = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = nn.Sequential(LowRankLinear(12, 9, rank=4), nn.Tanh(), LowRankLinear(9, 5, rank=3)).double()
        x = torch.randn(16, 12, dtype=torch.float64).to(device)
        model.to(device)
        optimizer = make(model, 0.1, momentum=0.5)

        def closure(model=model, optimizer=optimizer, x=x):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            return loss

        results.append([optimizer.step(closure).item() for _ in range(12)])
    assert results[0] == pytest.approx(results[1], rel=1e-8)
