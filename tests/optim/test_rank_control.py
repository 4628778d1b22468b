"""RankController: finds planted ranks, keeps the bound, carries momentum, and nobody but the optimizer notices."""

import copy
import io
import math

import pytest
import torch
from helpers.matrices import kappa, non_orthonormality
from torch import nn
from torch.nn import functional as F

import condlr_ext
from condlr_ext import LowRankConv2d, LowRankLinear
from condlr_ext.errors import NonFiniteError, RankError
from condlr_ext.factorize.budget import stored_parameters
from condlr_ext.optim import CondLRAdamW, CondLRSGD, Projector, RankController, compact
from condlr_ext.optim.rank_control import _View

BATCHES = torch.arange(600).split(150)


class Planted:
    """Regression on y = W x + noise with W of rank 3 and equal singular values, which every bound admits."""

    def __init__(self, start: int, m=20, n=30, rank=3, dtype=None):
        x = torch.randn(600, n)
        W = 2 * torch.linalg.qr(torch.randn(m, rank))[0] @ torch.linalg.qr(torch.randn(n, rank))[0].mT
        self.x, self.y = x.to(dtype or x.dtype), (x @ W.mT + 0.05 * torch.randn(600, m)).to(dtype or x.dtype)
        self.model = LowRankLinear(n, m, rank=start, bias=False, dtype=dtype)

    def loss(self, batch):
        return F.mse_loss(self.model(self.x[batch]), self.y[batch])

    def train(self, optimizer, steps=None):
        for batch in BATCHES[:steps]:
            optimizer.zero_grad()
            self.loss(batch).backward()
            optimizer.step()


def digits_like(count=256, seed=3):
    """Ten classes of noisy patterns, 64 inputs in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 10, (count,), generator=generator)
    patterns = torch.rand(10, 64, generator=generator)
    return (patterns[y] + 0.4 * torch.randn(count, 64, generator=generator)).clamp(0, 1), y


def mlp(rank=6):
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 10))
    condlr_ext.factorize(model, rank=rank, exclude="4", init="random")
    return model


def fit(model, optimizer, x, y, epochs=1):
    for _ in range(epochs):
        for batch in torch.arange(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()


def assert_constraint(layer, tau, atol=2e-6):
    r = layer.active_rank
    assert non_orthonormality(layer.U[:, :r]) <= atol
    assert non_orthonormality(layer.V[:, :r]) <= atol
    assert kappa(layer.S[:r, :r]) <= (1 + tau) * (1 + 5e-6)
    assert not layer.U[:, r:].any() and not layer.V[:, r:].any()
    assert not layer.S[r:].any() and not layer.S[:, r:].any()


def tensors(optimizer):
    return [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]


# ------------------------------------------------------------------------------------------------ the ranks


@pytest.mark.parametrize("start", [1, 8])
@pytest.mark.parametrize("tau", [0.0, 0.1, 1.0, math.inf])
def test_planted_rank_is_found(tau, start):
    data = Planted(start)
    optimizer = CondLRSGD(data.model, 0.5, 0.5, tau=tau)
    controller = RankController(data.model, optimizer, max_rank=10)
    ranks = []
    for _ in range(10):
        data.train(optimizer)
        assert_constraint(data.model, tau)
        report = controller.update(data.loss, BATCHES)
        assert_constraint(data.model, tau)  # at once, not only after the next step
        ranks.append(data.model.active_rank)
        assert report.layers[0].rank_after == ranks[-1] <= 10
    assert ranks[-5:] == [3] * 5
    data.train(optimizer)
    assert data.loss(torch.arange(600)) < 1.1 * 0.05**2  # the noise


@pytest.mark.parametrize("tau", [0.1, math.inf])
def test_capacity_is_the_limit(tau):
    data = Planted(1)
    optimizer = CondLRSGD(data.model, 0.5, 0.5, tau=tau)
    controller = RankController(data.model, optimizer, max_rank=2)
    for _ in range(5):
        data.train(optimizer)
        controller.update(data.loss, BATCHES)
        assert data.model.S.shape == (2, 2)
    assert data.model.active_rank == 2
    assert_constraint(data.model, tau)


def test_planted_rank_is_found_with_adam():
    data = Planted(6)
    optimizer = CondLRAdamW(data.model, 0.02, weight_decay=0.0, tau=0.1)
    controller = RankController(data.model, optimizer, max_rank=10)
    for _ in range(25):
        data.train(optimizer)
        controller.update(data.loss, BATCHES)
        assert_constraint(data.model, 0.1)
    data.train(optimizer)
    assert data.model.active_rank == 3
    assert_constraint(data.model, 0.1)
    assert {t.shape for t in tensors(optimizer) if t.dim()} == {(20, 10), (10, 10), (30, 10)}


def test_rank_goes_where_it_is_worth_most():
    """A layer that needs rank 6 has 2, one that needs 1 has 6: the budget holds, the ranks change places."""
    torch.manual_seed(1)
    x = torch.randn(600, 24)
    basis = [torch.linalg.qr(torch.randn(24, 6))[0] for _ in range(3)]
    y = torch.cat((2 * x @ basis[0] @ basis[1].mT, 2 * x @ basis[2][:, :1] @ basis[1][:, :1].mT), 1)

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide = LowRankLinear(24, 24, rank=2, bias=False)
            self.thin = LowRankLinear(24, 24, rank=6, bias=False)

        def forward(self, x):
            return torch.cat((self.wide(x), self.thin(x)), 1)

    model = Pair()
    optimizer = CondLRSGD(model, 0.5, 0.5, tau=0.1)
    allowed = stored_parameters(6, 24, 24) + stored_parameters(2, 24, 24)
    controller = RankController(model, optimizer, max_rank=1.0, budget=allowed / (2 * 24 * 24))
    assert controller.budget == allowed

    def loss(batch):
        return F.mse_loss(model(x[batch]), y[batch])

    for _ in range(8):
        for batch in BATCHES:
            optimizer.zero_grad()
            loss(batch).backward()
            optimizer.step()
        report = controller.update(loss, BATCHES)
        assert report.parameters <= allowed
    assert report.ranks == {"wide": 6, "thin": 1}


def test_untrained_network_loses_nothing():
    x, y = digits_like()
    model = Encoder()
    condlr_ext.factorize(model, rank=4, include=nn.Linear, exclude="head")
    controller = RankController(model, CondLRSGD(model, 0.1, tau=0.1))
    report = controller.update(lambda b: F.cross_entropy(model(x[b]), y[b]), torch.arange(256).split(128))
    assert all(row.rank_after == row.rank_before for row in report.layers)


@pytest.mark.parametrize("tau", [0.1, math.inf])
def test_smaller_budget_is_reached_by_and_by(tau):
    x, y = digits_like()
    model = mlp(rank=24)
    optimizer = CondLRSGD(model, 0.1, 0.5, tau=tau)
    controller = RankController(model, optimizer, budget=0.3, min_rank=2)
    whole = torch.arange(len(x)).split(128)
    sizes = []
    for _ in range(12):
        fit(model, optimizer, x, y)
        report = controller.update(lambda b: F.cross_entropy(model(x[b]), y[b]), whole)
        sizes.append(report.parameters)
        assert ("over the budget" in str(report)) == (report.parameters > controller.budget)
        assert all(r >= 2 for r in report.ranks.values())
        if math.isfinite(tau):
            assert all(row.dropped <= controller.moves and row.added <= controller.moves for row in report.layers)
    assert sizes[0] > controller.budget or math.isinf(tau)
    assert sizes[-1] <= controller.budget
    assert sizes[-1] > 0.7 * controller.budget or math.isinf(tau)  # and is spent


# --------------------------------------------------------------------------------------- what is reported


@pytest.mark.parametrize("tau", [0.1, math.inf])
def test_report_says_what_happened(tau):
    x, y = digits_like()
    model = mlp()
    optimizer = CondLRSGD(model, 0.1, 0.5, tau=tau)
    controller = RankController(model, optimizer, max_rank=24, core_steps=3)
    fit(model, optimizer, x, y, 2)
    batches = list(torch.arange(256).split(64))

    def loss(batch):
        return F.cross_entropy(model(x[batch]), y[batch])

    before = {name: (layer.active_rank, layer.weight.detach().clone()) for name, layer in low_rank(model)}
    loss_before = loss(torch.arange(256)).item()
    report = controller.update(loss, iter(batches))
    assert report.loss_before == pytest.approx(loss_before, rel=1e-6)
    assert report.loss_after == pytest.approx(loss(torch.arange(256)).item(), rel=1e-6)
    assert report.change == report.loss_after - report.loss_before < 0
    used = 0
    for row, (name, layer) in zip(report.layers, low_rank(model), strict=True):
        assert (row.name, row.rank_before, row.rank_after) == (name, before[name][0], layer.active_rank)
        assert row.rank_after == row.rank_before + row.added - row.dropped
        used += stored_parameters(layer.active_rank, row.m, row.n)
        moved = torch.linalg.svdvals(layer.weight.detach() - before[name][1])
        if math.isfinite(tau):  # the function changes by what left and what entered, by nothing else
            assert (moved > 1e-4).sum() == row.added + row.dropped > 0
            assert row.expected < 0
        else:
            assert (moved > 1e-4).any() and row.expected is None
    assert report.parameters == used
    assert f"loss {report.loss_before:.5g} -> {report.loss_after:.5g}" in str(report)


def low_rank(model):
    return [(name, m) for name, m in model.named_modules() if isinstance(m, condlr_ext.nn.LowRankLayer)]


def test_one_move_changes_the_loss_as_expected():
    data = Planted(2)
    optimizer = CondLRSGD(data.model, 0.5, tau=0.5)
    controller = RankController(data.model, optimizer, max_rank=10, moves=1)
    for _ in range(10):
        data.train(optimizer)
    report = controller.update(data.loss, BATCHES)
    (row,) = report.layers
    assert (row.dropped, row.added) == (0, 1)
    assert report.change == pytest.approx(row.expected, rel=1e-4)
    assert torch.allclose(torch.linalg.svdvals(data.model.S.detach())[3:], torch.zeros(7))


def test_nothing_worth_a_change_changes_nothing():
    data = Planted(3)
    optimizer = CondLRSGD(data.model, 0.5, 0.5, tau=0.1)
    controller = RankController(data.model, optimizer, max_rank=10)
    for _ in range(20):
        data.train(optimizer)
    before = copy.deepcopy((data.model.state_dict(), optimizer.state_dict()["state"]))
    report = controller.update(data.loss, BATCHES)
    assert report.change == 0 and report.ranks == {"": 3}
    assert all(torch.equal(a, b) for a, b in zip(before[0].values(), data.model.state_dict().values(), strict=True))
    for old, new in zip(before[1].values(), optimizer.state_dict()["state"].values(), strict=True):
        assert torch.equal(old["momentum_buffer"], new["momentum_buffer"])


def test_nobody_else_is_touched():
    torch.manual_seed(0)
    model = nn.Sequential(
        LowRankConv2d(3, 8, 3, padding=1, rank=4),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.5),
        LowRankConv2d(8, 8, 3, groups=2, padding="same", padding_mode="reflect", rank=4),
        nn.Flatten(),
        nn.Linear(8 * 36, 4),
    )
    model[2].eval()
    modes = [m.training for m in model.modules()]
    optimizer = CondLRSGD(model, 0.1, tau=0.2)
    controller = RankController(model, optimizer, max_rank=0.9)
    x, y = torch.randn(16, 3, 6, 6), torch.randint(0, 4, (16,))
    model(x).sum().backward()
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    frozen = copy.deepcopy([*model[1].state_dict().values(), *model[6].state_dict().values()])
    classes, random = [type(m) for m in model.modules()], torch.get_rng_state()
    report = controller.update(lambda batch: F.cross_entropy(model(x[batch]), y[batch]), torch.arange(16).split(8))
    assert any(row.added + row.dropped for row in report.layers)
    assert torch.equal(random, torch.get_rng_state())
    assert [m.training for m in model.modules()] == modes
    assert [type(m) for m in model.modules()] == classes
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True) if g is not None)
    now = [*model[1].state_dict().values(), *model[6].state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(frozen, now, strict=True))
    assert list(model.state_dict()) == [
        *("0.U", "0.S", "0.V", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"),
        *("1.num_batches_tracked", "4.U", "4.S", "4.V", "4.bias", "6.weight", "6.bias"),
    ]


# ---------------------------------------------------------------------------------- the step, with room


@pytest.mark.parametrize(
    "make",
    [
        lambda m: CondLRSGD(m, 0.1, 0.9, weight_decay=0.01, nesterov=True, tau=0.3),
        lambda m: CondLRSGD(m, 0.1, tau=math.inf),
        lambda m: CondLRAdamW(m, 0.1, amsgrad=True, tau=0.3),
    ],
    ids=["sgd", "free", "adamw"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_with_room_is_stepped_as_the_small_one(make, dtype, backend):
    """Bit for bit: the gradients are the same, the step sees what is in use."""
    small = nn.Sequential(LowRankLinear(12, 9, rank=3, dtype=dtype), LowRankConv2d(2, 6, 3, rank=2, dtype=dtype))
    roomy = copy.deepcopy(small)
    optimizers = make(small), make(roomy)
    RankController(roomy, optimizers[1], max_rank=6)
    assert [layer.rank for layer in roomy] == [6, 6] and [layer.active_rank for layer in roomy] == [3, 2]
    for step in range(4):
        for p, q in zip(small.parameters(), roomy.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = torch.randn_like(q) if step % 2 else torch.zeros_like(q)  # whatever lies outside: not read
            q.grad[tuple(slice(k) for k in p.shape)] = p.grad
        for optimizer in optimizers:
            optimizer.step()
        for p, q in zip(small.parameters(), roomy.parameters(), strict=True):
            assert torch.equal(p, q[tuple(slice(k) for k in p.shape)])
    assert [layer.active_rank for layer in roomy] == [3, 2]
    for layer, twin in zip(small, roomy, strict=True):
        assert layer.condition_number() == twin.condition_number()
    for p, q in zip(small.parameters(), roomy.parameters(), strict=True):
        for key, value in optimizers[0].state[p].items():
            assert torch.equal(value, optimizers[1].state[q][key][tuple(slice(k) for k in value.shape)])
            assert optimizers[1].state[q][key].shape in (q.shape, ())


def test_room_has_no_gradient_and_no_effect():
    model = LowRankLinear(12, 9, rank=3)
    x = torch.randn(5, 12)
    y = model(x)
    optimizer = CondLRSGD(model, 0.1, tau=0.3)
    RankController(model, optimizer, max_rank=1.0)
    assert model.rank == 9 and model.active_rank == 3 and model.S.shape == (9, 9)
    assert torch.allclose(model(x), y, atol=1e-6)
    model(x).square().sum().backward()
    assert not model.U.grad[:, 3:].any() and not model.S.grad[3:].any() and not model.V.grad[:, 3:].any()
    assert model.condition_number() == pytest.approx(1)
    dense = condlr_ext.to_dense(nn.Sequential(model))
    assert torch.allclose(dense(x), y, atol=1e-6)


def test_singular_core_is_not_room():
    """Zeros of the core alone: the optimizer lifts them, as it does with any singular core."""
    model = LowRankLinear(12, 9, rank=4)
    with torch.no_grad():
        model.S.copy_(torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0])))
    assert model.active_rank == 4 and model.condition_number() == math.inf
    CondLRSGD(model, 0.1, tau=0.3)
    assert_constraint(model, 0.3)
    assert model.active_rank == 4


def test_optimizer_notices_factors_of_another_rank():
    data = Planted(4)
    optimizer = CondLRSGD(data.model, 0.5, 0.5, tau=0.1)
    RankController(data.model, optimizer, max_rank=10)
    data.train(optimizer)
    for rank in (2, 7):
        other = LowRankLinear(30, 20, rank=rank, bias=False)
        RankController(other, CondLRSGD(other, 0.1, tau=0.1), max_rank=10)
        data.model.load_state_dict(other.state_dict())
        data.train(optimizer)
        assert data.model.active_rank == rank
        assert_constraint(data.model, 0.1)


# --------------------------------------------------------------------------------- momentum, checkpoints


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
    assert all(torch.equal(a, b) for a, b in zip(tensors(optimizer), tensors(optimizer2), strict=True))


# ----------------------------------------------------------------------------- precision, compilers, modules


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


def test_compiled_model_is_adapted_and_not_compiled_again():
    x, y = digits_like()
    torch._dynamo.reset()
    model = mlp()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    optimizer = CondLRSGD(model, 0.1, 0.5, tau=0.1)
    controller = RankController(model, optimizer, max_rank=24)
    fit(compiled, optimizer, x, y)
    with torch.no_grad():
        compiled(x[:64])
    before = {name: layer.active_rank for name, layer in low_rank(model)}
    with torch._dynamo.config.patch(error_on_recompile=True):
        report = controller.update(lambda b: F.cross_entropy(compiled(x[b]), y[b]), torch.arange(256).split(64))
        assert report.ranks != before
        fit(compiled, optimizer, x, y)
        with torch.no_grad():
            assert torch.allclose(compiled(x[:64]), model(x[:64]), atol=1e-5)
    for _, layer in low_rank(model):
        assert_constraint(layer, 0.1)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 12, 3, padding=1)
        self.body = nn.ModuleList(nn.Conv2d(12, 12, 3, padding=1) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(12) for _ in range(2))
        self.head = nn.Linear(12, 10)

    def forward(self, x):
        x = F.relu(self.stem(x.view(-1, 1, 8, 8)))
        for conv, norm in zip(self.body, self.norms, strict=True):
            x = x + F.relu(norm(conv(x)))
        return self.head(x.mean((2, 3)))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 1), nn.Linear(16, 10)
        self.embed = nn.Linear(8, 16)

    def forward(self, x):
        return self.head(self.encoder(self.embed(x.view(-1, 8, 8))).mean(1))


@pytest.mark.parametrize(
    "make, layers",
    [(Residual, ["stem", "body.0", "body.1"]), (Encoder, ["encoder.layers.0.linear1", "encoder.layers.0.linear2"])],
    ids=["residual", "transformer"],
)
def test_on_whole_networks(make, layers):
    """The transformer reads the weights of its layers, and calls them, as it pleases."""
    x, y = digits_like()
    model = make()
    condlr_ext.factorize(model, rank=3, include=layers)
    optimizer = CondLRSGD(model, 0.1, 0.9, tau=0.5)
    controller = RankController(model, optimizer, max_rank=0.9)
    fit(model, optimizer, x, y, 8)
    report = controller.update(lambda b: F.cross_entropy(model(x[b]), y[b]), torch.arange(256).split(128))
    assert set(report.ranks) == set(layers)
    assert sum(row.added for row in report.layers) > 0
    assert report.loss_after < report.loss_before
    for _, layer in low_rank(model):
        assert_constraint(layer, 0.5)
    fit(model, optimizer, x, y)
    ranks = {name: layer.active_rank for name, layer in low_rank(model)}
    model.eval()
    with torch.no_grad():
        expected = model(x)
        assert compact(model) is model
        assert {name: layer.rank for name, layer in low_rank(model)} == ranks
        assert torch.allclose(model(x), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimizer_of", [CondLRSGD, CondLRAdamW])
def test_compact_carries_the_state(optimizer_of, dtype):
    data = Planted(3, dtype=dtype)
    optimizer = optimizer_of(data.model, 0.05, tau=0.1, **({"momentum": 0.9} if optimizer_of is CondLRSGD else {}))
    RankController(data.model, optimizer, max_rank=10)
    data.train(optimizer)
    before = data.model.weight.detach()
    roomy, optimizer_roomy = copy.deepcopy((data.model, optimizer))
    compact(data.model, optimizer)
    assert data.model.rank == 3 and data.model.U.shape == (20, 3) and data.model.S.shape == (3, 3)
    assert torch.allclose(data.model.weight, before, atol=1e-6)
    assert {t.shape for t in tensors(optimizer) if t.dim()} == {(20, 3), (3, 3), (30, 3)}
    for p, q in zip(data.model.parameters(), roomy.parameters(), strict=True):
        p.grad = torch.randn_like(p)
        q.grad = F.pad(p.grad, (0, 7, 0, 7 if len(p) == 3 else 0))
    optimizer.step()
    optimizer_roomy.step()
    for p, q in zip(data.model.parameters(), roomy.parameters(), strict=True):
        assert torch.equal(p, q[: len(p), :3])


def test_room_can_be_made_in_the_middle_of_training():
    data = Planted(2)
    optimizer = CondLRSGD(data.model, 0.3, 0.9, tau=0.1)
    data.train(optimizer)
    buffer = optimizer.state[data.model.U]["momentum_buffer"].clone()
    RankController(data.model, optimizer, max_rank=0.5)
    assert data.model.U.shape == (20, 10)
    padded = optimizer.state[data.model.U]["momentum_buffer"]
    assert torch.equal(padded, F.pad(buffer, (0, 8)))
    data.train(optimizer)
    assert data.model.active_rank == 2
    assert_constraint(data.model, 0.1)


def test_cap_and_a_tau_that_has_just_shrunk():
    data = Planted(4)
    optimizer = CondLRSGD(data.model, 0.5, 0.5, tau=1.0, sigma_max=1.5)
    controller = RankController(data.model, optimizer, max_rank=10)
    data.train(optimizer)
    data.train(optimizer)
    optimizer.param_groups[0]["tau"] = 0.05
    report = controller.update(data.loss, BATCHES)
    assert report.layers[0].added + report.layers[0].dropped > 0
    assert_constraint(data.model, 0.05)
    assert torch.linalg.matrix_norm(data.model.S.detach(), 2) <= 1.5 * (1 + 1e-6)


def test_frozen_layers_are_left_alone():
    model = mlp()
    model[0].requires_grad_(False)
    before = copy.deepcopy(model[0].state_dict())
    optimizer = CondLRSGD(model, 0.1, tau=0.1)
    x, y = digits_like()
    controller = RankController(model, optimizer, max_rank=24)
    report = controller.update(lambda b: F.cross_entropy(model(x[b]), y[b]), [slice(None)])
    assert set(report.ranks) == {"2"}
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model[0].state_dict().values(), strict=True))


# ------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "options, error, text",
    [
        ({"min_rank": 0}, ValueError, "min_rank must be an int >= 1, got 0"),
        ({"moves": 1.5}, ValueError, "moves must be an int >= 1, got 1.5"),
        ({"core_steps": True}, ValueError, "core_steps must be an int >= 1"),
        ({"tolerance": 1}, ValueError, r"tolerance must be a number in \[0, 1\), got 1"),
        ({"theta": math.nan}, ValueError, r"theta must be a number in \[0, 1\), got nan"),
        ({"budget": 0}, ValueError, "budget must be None or a number > 0, got 0"),
        ({"max_rank": 2}, RankError, "max_rank must be at least its 3 directions in use, got 2"),
        ({"max_rank": 21}, RankError, r"layer : rank must be in 1..min\(m, n\) = 20"),
        ({"min_rank": 4}, RankError, "min_rank must be at most its largest rank 3, got 4"),
    ],
)
def test_options_are_checked_and_nothing_has_changed(options, error, text):
    data = Planted(3)
    with pytest.raises(error, match=text):
        RankController(data.model, CondLRSGD(data.model, 0.1, tau=0.1), **options)
    assert data.model.rank == 3 and data.model.U.shape == (20, 3)


def test_wrong_models_and_optimizers():
    data = Planted(3)
    with pytest.raises(TypeError, match="must be CondLRSGD or CondLRAdamW, got SGD"):
        RankController(data.model, torch.optim.SGD(data.model.parameters(), 0.1))
    with pytest.raises(ValueError, match="layer '' is none of the optimizer's"):
        RankController(data.model, CondLRSGD(Planted(3).model, 0.1, tau=0.1))
    dense = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="must have low-rank layers that are trained, found none"):
        RankController(dense, CondLRSGD(dense, 0.1, tau=0.1))
    pair = nn.Sequential(LowRankLinear(8, 8, rank=2), LowRankLinear(8, 8, rank=2))
    optimizer = CondLRSGD(pair, 0.1, tau=0.1)
    pair[1].V = pair[0].V
    with pytest.raises(ValueError, match="layers '0' and '1' share V"):
        RankController(pair, optimizer)
    RankController(data.model, CondLRSGD(data.model, 0.1, tau=0.1), max_rank=10)
    with pytest.raises(ValueError, match="no room left by rank adaptation, got 3 of 10 directions in use"):
        Projector(data.model, 0.1).attach(torch.optim.SGD(data.model.parameters(), 0.1))


@pytest.mark.parametrize(
    "loss, batches, error, text",
    [
        (lambda d, b: d.loss(b), [], ValueError, "batches must hold at least one, got none"),
        (lambda d, b: d.model(d.x[b]), BATCHES, ValueError, r"one element, got shape \[150, 20\]"),
        (lambda d, b: d.loss(b).item(), BATCHES, ValueError, "one element, got float"),
        (lambda d, b: d.loss(b) * math.inf, BATCHES, NonFiniteError, "the loss must be finite, got inf"),
        (lambda d, b: d.x[b].square().sum(), BATCHES, ValueError, "the loss does not depend on layer ''"),
        (lambda d, b: d.loss(b).detach(), BATCHES, ValueError, "the loss does not depend on layer ''"),
        (lambda d, b: d.model(0 * d.x[b]).square().sum().sqrt(), BATCHES, NonFiniteError, "the gradient of layer ''"),
    ],
)
@pytest.mark.parametrize("tau", [0.1, math.inf])
def test_bad_losses_change_nothing(loss, batches, error, text, tau):
    data = Planted(3)
    optimizer = CondLRSGD(data.model, 0.1, 0.9, tau=tau)
    controller = RankController(data.model, optimizer, max_rank=10)
    data.train(optimizer)
    before = copy.deepcopy(data.model.state_dict())
    with pytest.raises(error, match=text):
        controller.update(lambda batch: loss(data, batch), batches)
    assert type(data.model) is LowRankLinear and data.model.training
    assert all(torch.equal(a, b) for a, b in zip(before.values(), data.model.state_dict().values(), strict=True))
    controller.update(data.loss, BATCHES)


def test_factors_and_states_that_cannot_be_adapted():
    data = Planted(3)
    optimizer = CondLRSGD(data.model, 0.1, 0.9, tau=0.1)
    controller = RankController(data.model, optimizer, max_rank=10)
    data.train(optimizer)
    optimizer.state[data.model.V]["preconditioner"] = torch.zeros_like(data.model.V)
    with pytest.raises(TypeError, match="cannot turn the state 'preconditioner' of V of layer ''"):
        controller.update(data.loss, BATCHES)
    del optimizer.state[data.model.V]["preconditioner"]
    with torch.no_grad():
        data.model.U[0, 9] = math.nan
    with pytest.raises(NonFiniteError, match="the loss must be finite"):
        controller.update(data.loss, BATCHES)
    with pytest.raises(NonFiniteError, match="U of layer '' must be finite"):
        controller.update(lambda b: data.model.V.sum(), BATCHES)


def test_core_steps_that_diverge_are_refused():
    data = Planted(3)
    optimizer = CondLRSGD(data.model, 0.1, tau=math.inf)
    controller = RankController(data.model, optimizer, max_rank=10, core_steps=400)
    optimizer.param_groups[0]["lr"] = 1e3
    before = copy.deepcopy(data.model.state_dict())
    with pytest.raises(NonFiniteError, match="layer ''"):
        controller.update(data.loss, BATCHES)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), data.model.state_dict().values(), strict=True))
