"""State of the optimizers: state_dict, resuming, copies, float32 masters, states that do not fit."""

import copy
import itertools
import math
import pickle

import pytest
import torch
from helpers.matrices import kappa, non_orthonormality
from helpers.training import batches, make_model, train
from torch import nn
from torch.nn import functional as F

from condlr_ext import LowRankLinear
from condlr_ext.errors import NonFiniteError
from condlr_ext.optim import CondLRAdamW, CondLRSGD, param_groups


def test_closure_and_state_dict_keys():
    model = make_model()
    optimizer = CondLRSGD(model, 0.1, 0.9, tau=0.1)
    x, y = next(iter(batches(1)))

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert first.item() > optimizer.step(closure).item()
    assert set(optimizer.state_dict()["state"][0]) == {"momentum_buffer"}


@pytest.mark.parametrize("order", ["optimizer last", "optimizer first"])
def test_resume_is_bit_exact(backend, order, tmp_path):
    def fresh():
        model = make_model(seed=5)
        optimizer = CondLRSGD(param_groups(model, factors={"lr": 0.05}), 0.1, 0.9, tau=0.1, sigma_max=2.0)
        return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)

    data = list(batches(12))
    model, optimizer, scheduler = fresh()
    train(model, optimizer, data[:6], scheduler)
    path = tmp_path / "state.pt"
    torch.save(
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
        },
        path,
    )
    expected = train(model, optimizer, data[6:], scheduler)

    saved = torch.load(path, weights_only=True)
    if order == "optimizer last":
        again = make_model(seed=9)
        again.load_state_dict(saved["model"])
        resumed = CondLRSGD(param_groups(again, factors={"lr": 0.05}), 0.1, 0.9, tau=0.1, sigma_max=2.0)
        plan = torch.optim.lr_scheduler.StepLR(resumed, 3, 0.5)
    else:
        again, resumed, plan = fresh()
        again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    plan.load_state_dict(saved["scheduler"])
    assert train(again, resumed, data[6:], plan) == expected
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


def test_pickle_and_deepcopy_keep_training():
    model = make_model()
    optimizer = CondLRSGD(model, 0.1, 0.9, tau=0.1)
    data = list(batches(6))
    train(model, optimizer, data[:3])
    pair = copy.deepcopy((model, optimizer))
    assert train(*pair, data[3:]) == train(model, optimizer, data[3:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_parameters_have_float32_masters(dtype):
    model = make_model(dtype=dtype)
    optimizer = CondLRSGD(model, 0.1, 0.5, tau=0.1)
    data = list(batches(8, dtype))
    train(model, optimizer, data[:4])
    for module in (model[0], model[3]):
        U, S = (optimizer.state[p]["master"] for p in (module.U, module.S))
        assert U.dtype == torch.float32 and non_orthonormality(U) < 2e-6 and kappa(S) <= 1.1 * (1 + 5e-6)
        assert torch.equal(module.U, U.to(dtype))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    expected = train(model, optimizer, data[4:])
    again = make_model(seed=3, dtype=dtype)
    resumed = CondLRSGD(again, 0.1, 0.5, tau=0.1)
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    assert train(again, resumed, data[4:]) == expected


def test_options_survive_pickle_and_deepcopy():
    model = make_model()
    optimizer = CondLRSGD(model, 0.1, 0.9, tau=0.1, check_finite=True)
    train(model, optimizer, batches(1))
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert twin.check_finite and twin.skipped == 0
        for group in twin.param_groups:
            for p in group["params"]:
                p.grad = torch.full_like(p, math.nan)
        with pytest.raises(NonFiniteError):
            twin.step()


def test_weights_loaded_after_construction_reach_the_masters():
    model, other = make_model(dtype=torch.bfloat16), make_model(seed=4, dtype=torch.bfloat16)
    optimizer = CondLRSGD(model, 0.0, tau=0.1)
    CondLRSGD(other, 0.0, tau=0.1)
    model.load_state_dict(other.state_dict())
    train(model, optimizer, batches(1, torch.bfloat16))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0.02)


def test_masters_and_momentum_are_restored_in_float32():
    model = make_model(dtype=torch.bfloat16)
    optimizer = CondLRSGD(model, 0.1, 0.5, tau=0.1)
    train(model, optimizer, batches(3, torch.bfloat16))
    again = copy.deepcopy(model)
    resumed = CondLRSGD(again, 0.1, 0.5, tau=0.1)
    resumed.load_state_dict(optimizer.state_dict())
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        for key in optimizer.state[p]:
            assert torch.equal(optimizer.state[p][key], resumed.state[q][key])
            assert optimizer.state[p][key].dtype == resumed.state[q][key].dtype
    assert optimizer.state[model[0].U]["momentum_buffer"].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cls", [CondLRSGD, CondLRAdamW])
def test_low_precision_resumes_bit_for_bit_in_any_order(cls, dtype):
    """Changes that an optimizer makes to the rounded model must not be taken for edits by the user."""
    options = {"momentum": 0.5} if cls is CondLRSGD else {"eps": 1e-4}
    data = list(batches(6, dtype))
    model = make_model(dtype=dtype)
    optimizer = cls(model, 0.01, tau=0.1, **options)
    train(model, optimizer, data[:3])
    weights, state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, data[3:])
    for order in itertools.permutations(["optimizer", "weights", "state"]):
        if order.index("optimizer") > order.index("state"):
            continue
        again = make_model(seed=3, dtype=dtype)
        for what in order:
            if what == "optimizer":
                resumed = cls(again, 0.01, tau=0.1, **options)
            elif what == "weights":
                again.load_state_dict(weights)
            else:
                resumed.load_state_dict(copy.deepcopy(state))  # torch takes tensors over as they are
        train(again, resumed, data[3:])
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True)), order


def test_float32_momentum_goes_with_a_model_made_double():
    model = make_model()
    optimizer = CondLRSGD(model, 0.1, 0.5, tau=0.1)
    train(model, optimizer, batches(2))
    model.double()
    train(model, optimizer, batches(2, torch.float64))
    assert optimizer.state[model[3].S]["momentum_buffer"].dtype == torch.float64 and optimizer.skipped == 0


def test_state_of_torch_sgd_can_be_loaded():
    model = make_model()
    sgd = torch.optim.SGD(model.named_parameters(), 0.05, 0.9)
    train(model, sgd, batches(2))
    optimizer = CondLRSGD(model, 0.1, 0.5, tau=0.2)
    optimizer.load_state_dict(sgd.state_dict())
    group = optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], group["tau"]) == (0.05, 0.9, 0.2)
    train(model, optimizer, batches(2))
    broken = optimizer.state_dict()
    broken["param_groups"][0]["tau"] = -1
    with pytest.raises(ValueError, match="tau must be a number >= 0"):
        optimizer.load_state_dict(broken)
    assert optimizer.param_groups[0]["tau"] == 0.2


def test_state_of_another_model_is_refused():
    a = CondLRSGD(make_model(), 0.1, tau=0.1)
    b = CondLRSGD(nn.Sequential(*list(make_model().children())[:-1], nn.Sequential(nn.Linear(12, 3))), 0.1, tau=0.1)
    with pytest.raises(
        ValueError,
        match="group 0 holds parameter '5.weight' in the state where the optimizer has '5.0.weight'",
    ):
        b.load_state_dict(a.state_dict())


@pytest.mark.parametrize("cls", [CondLRSGD, CondLRAdamW])
def test_state_of_another_rank_is_refused(cls):
    a, b = (LowRankLinear(20, 30, rank=rank) for rank in (5, 6))
    options = {"momentum": 0.9} if cls is CondLRSGD else {}
    optimizer, other = (cls(layer, 0.1, tau=0.1, **options) for layer in (a, b))
    a(torch.randn(4, 20)).sum().backward()
    optimizer.step()
    before = copy.deepcopy(other.state_dict()["state"])
    text = rf"{cls.__name__}.load_state_dict: .* of U must be \[30, 6\] as the parameter is, got \[30, 5\]"
    with pytest.raises(ValueError, match=text):
        other.load_state_dict(optimizer.state_dict())
    torch.testing.assert_close(other.state_dict()["state"], before, rtol=0, atol=0)
