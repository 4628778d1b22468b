"""Real models in bfloat16, float16, float64 and under autocast: what is rounded, and what the bound holds for."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.matrices import kappa, non_orthonormality
from helpers.models import MODELS, example_input
from torch import nn

import condlr_ext
from condlr_ext.nn import LowRankLayer
from condlr_ext.optim import CondLRSGD

TAU = 0.1
NETWORKS = pytest.mark.parametrize("name", ["resnet", "vit", "encoder"])
LOW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def low_rank(name: str, dtype=torch.float32):
    torch.manual_seed(0)
    model = MODELS[name]()
    condlr_ext.factorize(model, rank=0.5)
    return model.to(dtype)


def data(name: str, dtype=torch.float32):
    torch.manual_seed(1)
    return example_input(name, 8, dtype), torch.randint(0, 10, (8,))


def assert_on_constraint_set(model, optimizer, dtype):
    """The factors, or their masters, in the precision they are kept in."""
    # what tests/ops/test_step.py asks of one step in float32, and the same in units of float64
    orthonormal, bound = (1e-14, 1e-13) if dtype == torch.float64 else (2e-6, 5e-6)
    for layer in model.modules():
        if isinstance(layer, LowRankLayer):
            U, S, V = (optimizer.state[p].get("master", p).detach() for p in (layer.U, layer.S, layer.V))
            assert U.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert max(non_orthonormality(U), non_orthonormality(V)) <= orthonormal
            assert kappa(S) <= (1 + TAU) * (1 + bound)


@NETWORKS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_modules_of_any_dtype_train(name, dtype):
    model, (x, y) = low_rank(name, dtype), data(name, dtype)
    optimizer = CondLRSGD(model, 0.05, 0.9, tau=TAU)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        output = model(x)
        loss = F.cross_entropy(output.float(), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        assert_on_constraint_set(model, optimizer, dtype)
    assert output.dtype == dtype and {p.grad.dtype for p in model.parameters()} == {dtype}
    assert losses[-1] < 0.8 * losses[0] and optimizer.skipped == 0
    for p in model.parameters():
        master = optimizer.state[p].get("master", p)
        assert torch.equal(p, master.to(dtype))


@LOW
def test_dense_parameters_of_low_precision_take_torchs_step(dtype):
    """torch's fused SGD leaves whole blocks of them as they were on CPUs, in versions that are still in use."""
    layer = nn.Linear(40, 30).to(dtype)
    twin = copy.deepcopy(layer)
    optimizers = CondLRSGD(layer, 0.1, 0.9, tau=TAU), torch.optim.SGD(twin.parameters(), 0.1, 0.9, foreach=False)
    for step in range(3):
        for net, optimizer in zip((layer, twin), optimizers, strict=True):
            for p in net.parameters():
                p.grad = torch.full_like(p, 1.0 + step)
            optimizer.step()
    # a fused rule may round less often
    for p, q in zip(layer.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=4 * torch.finfo(dtype).eps)


@NETWORKS
@LOW
def test_autocast_trains_float32_parameters(name, dtype):
    """Products in the low dtype; parameters, gradients and the step in float32. The losses are float32's to rounding."""
    runs = {}
    for enabled in (False, True):
        model, (x, y) = low_rank(name), data(name)
        optimizer = CondLRSGD(model, 0.02, 0.9, tau=TAU)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=enabled and dtype == torch.float16)
        losses = []
        for _ in range(6):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=dtype, enabled=enabled):
                output = model(x)
            loss = F.cross_entropy(output.float(), y)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
            assert_on_constraint_set(model, optimizer, torch.float32)
        assert output.dtype == (dtype if enabled else torch.float32)
        assert {t.dtype for p in model.parameters() for t in (p, p.grad)} == {torch.float32}
        runs[enabled] = torch.tensor(losses)
    difference = (runs[True] - runs[False]).abs()
    assert difference[0] <= 4 * torch.finfo(dtype).eps * runs[False][0]
    assert difference.max() <= 0.1 * (runs[False][0] - runs[False][-1])


@LOW
def test_the_step_does_not_see_autocast(dtype):
    """A whole iteration inside an autocast region, as some training loops have it: factorizations stay in float32."""
    model = low_rank("vit")
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    twin = copy.deepcopy(model)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        q.grad = p.grad.clone()
    CondLRSGD(model, 0.05, 0.9, tau=TAU).step()
    with torch.autocast("cpu", dtype=dtype):
        CondLRSGD(twin, 0.05, 0.9, tau=TAU).step()
        assert condlr_ext.condition_numbers(twin) == condlr_ext.condition_numbers(model)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_small_steps_add_up_in_the_masters():
    """Steps below the rounding of bfloat16 parameters are not lost, which plain bfloat16 training does."""
    model = low_rank("encoder", torch.bfloat16)
    x, y = data("encoder", torch.bfloat16)
    optimizer = CondLRSGD(model, 1e-4, tau=TAU)
    layer = next(m for m in model.modules() if isinstance(m, LowRankLayer))
    before, start = layer.U.detach().clone(), optimizer.state[layer.U]["master"].clone()
    moved = torch.zeros_like(start)
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(model(x).float(), y).backward()
        previous = optimizer.state[layer.U]["master"].clone()
        optimizer.step()
        moved += (optimizer.state[layer.U]["master"] - previous).abs()
    change = (optimizer.state[layer.U]["master"] - start).abs()
    assert (layer.U == before).float().mean() > 0.95  # the stored copy hardly moves
    assert change.sum() > 0.9 * moved.sum() > 0  # the master goes all the way
