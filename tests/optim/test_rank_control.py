"""RankController: finds planted ranks, keeps the bound and the budget, and changes nothing else."""

import copy
import math

import pytest
import torch
from helpers.models import Conv1D, DigitsCNN, digits_encoder
from helpers.planted import BATCHES, Planted, assert_constraint, digits_like, fit, low_rank, mlp, state_tensors
from torch import nn
from torch.nn import functional as F

import condlr_ext
from condlr_ext import LowRankConv2d, LowRankLinear
from condlr_ext.factorize.budget import stored_parameters
from condlr_ext.optim import CondLRAdamW, CondLRSGD, RankController, compact


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
    assert {t.shape for t in state_tensors(optimizer) if t.dim()} == {(20, 10), (10, 10), (30, 10)}


def test_rank_goes_where_it_is_worth_most():
    """A layer that needs rank 6 has 2, one that needs 1 has 6: the budget holds, the two swap ranks."""
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
    model = digits_encoder()
    condlr_ext.factorize(model, rank=4, include=nn.Linear, exclude="2.head")
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


@pytest.mark.parametrize("tau", [0.1, math.inf])
def test_report_says_what_happened(tau):
    x, y = digits_like()
    model = mlp()
    optimizer = CondLRSGD(model, 0.1, 0.5, tau=tau)
    controller = RankController(model, optimizer, max_rank=24)
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


def test_compiled_model_is_updated_and_not_compiled_again():
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


@pytest.mark.parametrize(
    "make, layers",
    [
        (DigitsCNN, ["stem", "grouped", "down"]),
        (digits_encoder, ["2.encoder.layers.0.linear1", "2.encoder.layers.0.linear2"]),
    ],
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


def test_a_weight_that_is_stored_transposed_changes_as_any_other():
    linear, conv1d = nn.Sequential(nn.Linear(9, 14)), nn.Sequential(Conv1D(14, 9))
    with torch.no_grad():
        linear[0].bias.zero_()
        conv1d[0].weight.copy_(linear[0].weight.mT)
    x, y = torch.randn(40, 9), torch.randn(40, 14)
    reports = []
    for model in (linear, conv1d):
        condlr_ext.factorize(model, rank=6)
        controller = RankController(model, CondLRSGD(model, 0.1, tau=1.0), budget=0.6)
        reports.append(controller.update(lambda batch, model=model: F.mse_loss(model(batch[0]), batch[1]), [(x, y)]))
    ours, theirs = reports
    assert theirs.ranks == ours.ranks == {"0": 2}
    assert theirs.layers[0].expected == pytest.approx(ours.layers[0].expected, rel=1e-3)
