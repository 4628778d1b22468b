"""RankController and the optimizer: state that turns with the bases, resuming, masters, compact."""

import copy
import io

import pytest
import torch
from helpers.matrices import kappa, non_orthonormality
from helpers.planted import BATCHES, Planted, state_tensors
from torch.nn import functional as F

from condlr_ext import LowRankLinear
from condlr_ext.optim import CondLRAdamW, CondLRSGD, RankController, compact
from condlr_ext.optim.rank_control import _View


def turned_and_not(optimizer_of, x, y):
    """The same layer and optimizer twice; the second has been turned to the singular bases of its core."""
    model = LowRankLinear(12, 9, rank=5, bias=False, dtype=torch.float64)
    optimizer = optimizer_of(model)
    for _ in range(3):
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    turned, optimizer_turned = copy.deepcopy((model, optimizer))
    view = _View("", turned, optimizer_turned)
    view.changed = True
    with torch.no_grad():
        view.write()
    assert not torch.allclose(model.S, turned.S)
    assert torch.allclose(model.weight, turned.weight, atol=1e-14)
    return (model, optimizer), (turned, optimizer_turned)


def test_momentum_turns_with_the_bases():
    """A step after a turn is the step before it, but for QR, which is not invariant to second order in lr."""
    x, y = torch.randn(40, 12, dtype=torch.float64), torch.randn(40, 9, dtype=torch.float64)
    pair = turned_and_not(lambda m: CondLRSGD(m, 0.3, 0.9, tau=0.5), x, y)
    steps, errors = [], []
    for lr in (1e-3, 1e-4):
        moved = []
        for model, optimizer in copy.deepcopy(pair):
            before = model.weight.detach()
            optimizer.param_groups[0]["lr"] = lr
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            optimizer.step()
            moved.append(model.weight.detach() - before)
        steps.append(moved[0].norm())
        errors.append((moved[0] - moved[1]).norm())
    assert errors[1] < 1e-3 * steps[1]  # without the momentum's turn it is as large as the step
    assert errors[1] < 0.02 * errors[0]


def test_moments_of_adam_turn_with_the_bases():
    x, y = torch.randn(40, 12, dtype=torch.float64), torch.randn(40, 9, dtype=torch.float64)
    (model, one), (turned, two) = turned_and_not(lambda m: CondLRAdamW(m, 0.03, tau=0.5), x, y)
    P, Q = (getattr(model, k).detach().mT @ getattr(turned, k).detach() for k in "UV")
    first, second = ({k: o.state[getattr(m, k)] for k in "USV"} for m, o in ((model, one), (turned, two)))
    for role, left, right in (("U", None, P), ("S", P, Q), ("V", None, Q)):
        for key, turn in (("exp_avg", lambda X: X), ("exp_avg_sq", torch.square)):
            expected = first[role][key] @ turn(right)
            expected = expected if left is None else turn(left).mT @ expected
            assert torch.allclose(second[role][key], expected, rtol=1e-10, atol=1e-14)
        assert (second[role]["exp_avg_sq"] >= 0).all()


@pytest.mark.parametrize("optimizer_of", [CondLRSGD, CondLRAdamW])
def test_state_of_dropped_and_new_directions(optimizer_of):
    data = Planted(8)
    optimizer = optimizer_of(data.model, 0.05, tau=0.1, **({"momentum": 0.9} if optimizer_of is CondLRSGD else {}))
    controller = RankController(data.model, optimizer, max_rank=10)
    data.train(optimizer)
    report = controller.update(data.loss, BATCHES)
    (row,) = report.layers
    assert row.added > 0 and row.dropped > 0
    r, old = row.rank_after, row.rank_before - row.dropped
    for role, p in (("U", data.model.U), ("S", data.model.S), ("V", data.model.V)):
        for key, value in optimizer.state[p].items():
            if value.dim() != 2:
                continue
            assert value.shape == p.shape and not value[:, r:].any() and (role != "S" or not value[r:].any())
            assert value[:old, :old].any()
            new = value[:, old:r]
            assert (new > 0).all() if "sq" in key and role != "S" else "sq" in key or not new.any()


@pytest.mark.parametrize("optimizer_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_bit_exact(dtype, optimizer_first):
    def build():
        torch.manual_seed(0)
        data = Planted(2, dtype=dtype)
        optimizer = CondLRSGD(data.model, 0.3, 0.5, tau=0.1)
        return data, optimizer, RankController(data.model, optimizer, max_rank=10)

    data, optimizer, controller = build()
    data.train(optimizer)
    controller.update(data.loss, BATCHES)
    data.train(optimizer, 2)
    assert data.model.active_rank > 2
    file = io.BytesIO()
    torch.save({"model": data.model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again, optimizer2, controller2 = build()
    parts = [(again.model, "model"), (optimizer2, "optimizer")]
    for part, key in reversed(parts) if optimizer_first else parts:
        part.load_state_dict(saved[key])
    for run, opt, adapt in ((data, optimizer, controller), (again, optimizer2, controller2)):
        for _ in range(2):
            run.train(opt)
            adapt.update(run.loss, BATCHES)
            run.train(opt)
    assert all(torch.equal(p, q) for p, q in zip(data.model.parameters(), again.model.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(state_tensors(optimizer), state_tensors(optimizer2), strict=True))


def test_bfloat16_parameters_and_their_masters():
    data = Planted(6, dtype=torch.bfloat16)
    optimizer = CondLRSGD(data.model, 0.3, 0.5, tau=0.1)
    controller = RankController(data.model, optimizer, max_rank=10)
    ranks = set()
    for _ in range(6):
        data.train(optimizer)
        controller.update(data.loss, BATCHES)
        ranks.add(data.model.active_rank)
        masters = [optimizer.state[p]["master"] for p in data.model.parameters()]
        assert all(torch.equal(p, m.bfloat16()) for p, m in zip(data.model.parameters(), masters, strict=True))
        U, S, V = (m[tuple(slice(min(k, 20) if k != 10 else data.model.active_rank) for k in m.shape)] for m in masters)
        assert kappa(S) <= 1.1 * (1 + 5e-6)
        r = data.model.active_rank
        assert max(non_orthonormality(masters[0][:, :r]), non_orthonormality(masters[2][:, :r])) <= 2e-6
    assert len(ranks) > 1 and 3 <= data.model.active_rank <= 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimizer_of", [CondLRSGD, CondLRAdamW])
def test_compact_carries_the_state(optimizer_of, dtype):
    data = Planted(3, dtype=dtype)
    optimizer = optimizer_of(data.model, 0.05, tau=0.1, **({"momentum": 0.9} if optimizer_of is CondLRSGD else {}))
    RankController(data.model, optimizer, max_rank=10)
    data.train(optimizer)
    before = data.model.weight.detach()
    padded, optimizer_padded = copy.deepcopy((data.model, optimizer))
    compact(data.model, optimizer)
    assert data.model.rank == 3 and data.model.U.shape == (20, 3) and data.model.S.shape == (3, 3)
    assert torch.allclose(data.model.weight, before, atol=1e-6)
    assert {t.shape for t in state_tensors(optimizer) if t.dim()} == {(20, 3), (3, 3), (30, 3)}
    for p, q in zip(data.model.parameters(), padded.parameters(), strict=True):
        p.grad = torch.randn_like(p)
        q.grad = F.pad(p.grad, (0, 7, 0, 7 if len(p) == 3 else 0))
    optimizer.step()
    optimizer_padded.step()
    for p, q in zip(data.model.parameters(), padded.parameters(), strict=True):
        assert torch.equal(p, q[: len(p), :3])
