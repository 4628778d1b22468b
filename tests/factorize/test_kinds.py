"""Every kind of layer that factorize serves: it converts, trains under the bound, goes back, folds and is saved."""

import copy

import pytest
import torch
from helpers.models import GPT
from helpers.training import assert_constraint
from torch import nn

import condlr_ext


def mean_square(output):
    y = first(output)
    return (y - torch.linspace(-1, 1, y.shape[-1])).square().mean()


class Autoencoder(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.ConvTranspose2d(8, 6, 4, 2, 1, groups=2), nn.ReLU(),
            nn.ConvTranspose2d(6, 3, 3, padding=1),
        )  # fmt: skip


class Pair(nn.Module):
    """Tokens to the scores of pairs of them."""

    def __init__(self):
        super().__init__()
        self.embed, self.pair = nn.Embedding(11, 8, padding_idx=0), nn.Bilinear(8, 8, 12)

    def forward(self, tokens):
        x = self.embed(tokens)
        return self.pair(x, x.flip(1))


class Recurrent(nn.Module):
    """Sequences [B, T, 6] through torch's recurrent modules and cells."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(6, 8, num_layers=2, bidirectional=True, batch_first=True, proj_size=5)
        self.gru = nn.GRU(10, 8, batch_first=True, bias=False)
        self.rnn = nn.RNN(8, 8, batch_first=True)
        self.cells = nn.ModuleList([nn.LSTMCell(8, 8), nn.GRUCell(8, 8), nn.RNNCell(8, 8)])

    def forward(self, x):
        x = self.rnn(self.gru(self.lstm(x)[0])[0])[0][:, -1]
        for cell in self.cells:
            x = first(cell(x))
        return x


class Experts(nn.Module):
    """Stacks of matrices [E, m, n] as transformers keeps those of Mixtral, and a router."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(8, 4)
        self.up, self.down = nn.Parameter(0.3 * torch.randn(4, 12, 8)), nn.Parameter(0.3 * torch.randn(4, 8, 12))

    def forward(self, x):
        weights = self.router(x).softmax(-1)
        return sum(weights[..., i : i + 1] * (x @ self.up[i].mT).relu() @ self.down[i].mT for i in range(4))


# name: the model, an input, layers to expect, and factorize's include
KINDS = {
    "Conv1D of a GPT": (lambda: GPT(depth=1), lambda: (torch.randint(40, (2, 8)),), ["h.0.attn.c_attn"], "h.*"),
    "tied embedding": (lambda: GPT(depth=1), lambda: (torch.randint(40, (2, 8)),), ["wte", "lm_head", "wpe"], "*"),
    "embedding and bilinear": (Pair, lambda: (torch.randint(11, (5, 6)),), ["embed", "pair"], "*"),
    "recurrent": (
        Recurrent,
        lambda: (torch.rand(3, 5, 6),),
        [
            "lstm.weight_ih_l1_reverse_factors",
            "lstm.weight_hr_l0_factors",
            "gru.weight_hh_l0_factors",
            "cells.1.weight_ih_factors",
        ],
        None,
    ),
    "experts": (
        Experts,
        lambda: (torch.rand(3, 5, 8),),
        ["up_factors.3", "down_factors.0", "router"],
        ["up", "down", "router"],
    ),
    "transposed convolutions": (Autoencoder, lambda: (torch.rand(2, 3, 8, 8),), ["2", "4"], None),
}
EACH = pytest.mark.parametrize("kind", KINDS)


def built(kind):
    build, example, names, include = KINDS[kind]
    torch.manual_seed(0)
    return build().eval(), example(), names, include


def first(output):
    return output if isinstance(output, torch.Tensor) else first(output[0])


def assert_same(a, b):
    torch.testing.assert_close(first(a), first(b), rtol=0, atol=1e-5 * first(b).abs().max().item())


@EACH
def test_full_rank_is_the_same_function_and_goes_back(kind):
    model, x, names, include = built(kind)
    parameters = [name for name, _ in model.named_parameters()]
    state, classes, expected = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()], model(*x)
    report = condlr_ext.factorize(model, rank=1.0, include=include)
    assert set(names) <= {layer.name for layer in report.layers}
    assert report.model_parameters == sum(p.numel() for p in model.parameters())
    assert_same(model(*x), expected)
    condlr_ext.to_dense(model)
    assert [type(m) for m in model.modules()] == classes and list(model.state_dict()) == list(state)
    assert [name for name, _ in model.named_parameters()] == parameters
    assert_same(model(*x), expected)
    model.load_state_dict(state)
    assert torch.equal(first(model(*x)), first(expected))


@pytest.mark.parametrize("optimizer", ["CondLRSGD", "CondLRAdamW"])
@EACH
def test_trains_under_the_bound_and_comes_back_in_every_way(kind, optimizer, tmp_path):
    model, x, names, include = built(kind)
    condlr_ext.factorize(model, rank=0.5, include=include)
    assert set(names) <= condlr_ext.nn.low_rank_layers(model).keys()
    optimizer = getattr(condlr_ext.optim, optimizer)(model, lr=0.01, tau=0.1)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = mean_square(model(*x))
        loss.backward()
        optimizer.step()
        assert_constraint(model, 0.1)
        losses.append(loss.item())
    assert losses[-1] < losses[0] and optimizer.skipped == 0
    assert all(p.grad is not None for p in model.parameters())

    expected = model(*x)
    for twin in (
        condlr_ext.to_dense(copy.deepcopy(model)),
        condlr_ext.fold(copy.deepcopy(model), example_input=x),
    ):
        assert not condlr_ext.nn.low_rank_layers(twin)
        assert_same(twin(*x), expected)
    condlr_ext.save(model, tmp_path / "model.safetensors", optimizer)
    again, *_ = built(kind)
    condlr_ext.load(again, tmp_path / "model.safetensors")
    assert torch.equal(first(again(*x)), first(expected))


@pytest.mark.parametrize("options", [{"measure": "flops"}, {"init": "pca"}], ids=str)
@EACH
def test_budgets_and_starts_know_the_kind_or_say_why_not(kind, options):
    model, x, names, include = built(kind)
    budget = {} if "init" in options else {"budget": 0.9}
    options = options | budget | ({"rank": 0.5} if not budget else {})
    try:
        report = condlr_ext.factorize(model, example_input=x, include=include, **options)
    except ValueError as error:
        assert "no rank makes it cheaper" in str(error) or "is not known" in str(error)  # tiny layers
        return
    for name in names:
        assert name in {layer.name for layer in report.layers} or name in report.skipped
    assert str(report)
    assert first(model(*x)).isfinite().all()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("tied")])  # refused by name
def test_ranks_change_in_training(kind):
    model, x, _, include = built(kind)
    condlr_ext.factorize(model, rank=0.75, include=include)
    optimizer = condlr_ext.optim.CondLRSGD(model, lr=0.01, tau=0.5)
    control = condlr_ext.optim.RankController(model, optimizer, budget=0.3, moves=2)
    before = mean_square(model(*x)).item()
    report = control.update(lambda batch: mean_square(model(*batch)), [x])
    after = mean_square(model(*x)).item()
    assert report.loss_before == pytest.approx(before, rel=1e-4) and report.loss_after == pytest.approx(after, rel=1e-4)
    assert max(condlr_ext.condition_numbers(model).values()) <= 1.5 * (1 + 5e-6)
