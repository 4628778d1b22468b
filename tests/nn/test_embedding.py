"""LowRankEmbedding and LowRankBilinear against torch's layers."""

import pytest
import torch
import torch.nn.functional as F
from helpers.layers import ROUTES, gradients, randomize
from helpers.models import GPT
from helpers.training import assert_constraint
from torch import nn

import condlr_ext
from condlr_ext.errors import RankError
from condlr_ext.nn import LowRankBilinear, LowRankEmbedding

IDS = torch.tensor([[3, 0, 5], [3, 9, 1]])


@ROUTES
@pytest.mark.parametrize("padding_idx", [None, 0, -1])
def test_embedding_in_function_and_gradients(route, padding_idx):
    layer = randomize(LowRankEmbedding(10, 6, padding_idx, rank=4, dtype=torch.float64))
    layer.route = route
    factors = [layer.U, layer.S, layer.V]

    def ours(*factors):
        return torch.func.functional_call(layer, dict(zip("USV", factors, strict=True)), (IDS,))

    def dense(U, S, V):
        return F.embedding(IDS, U @ S @ V.mT)

    torch.testing.assert_close(ours(*factors), dense(*factors))
    (U, *_), (full, *_) = gradients(ours, factors), gradients(dense, factors)
    if padding_idx is not None and route == "factorized":
        full[padding_idx] = 0
    if padding_idx is None or route == "factorized":
        torch.testing.assert_close(U, full)


@pytest.mark.parametrize("optimizer", ["CondLRSGD", "CondLRAdamW"])
def test_the_padding_row_stays_zero(optimizer):
    dense = nn.Embedding(10, 6, padding_idx=3)
    model = nn.Sequential(LowRankEmbedding.from_dense(dense, 4), nn.Linear(6, 5))
    fresh = LowRankEmbedding(10, 6, padding_idx=3, rank=4)
    assert not fresh.U[3].any() and fresh.condition_number() == pytest.approx(1)
    optimizer = getattr(condlr_ext.optim, optimizer)(model, lr=0.05, tau=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(IDS).flatten(0, 1), torch.arange(6) % 5).backward()
        optimizer.step()
        assert_constraint(model, 0.1)
        assert model[0].weight[3].abs().max() <= 1e-6
    assert model[0].to_dense().padding_idx == 3


def test_a_tied_output_layer_shares_the_factors():
    model, ids = GPT(depth=1), torch.randint(40, (2, 8))
    report = condlr_ext.factorize(model, rank=8, include=["wte", "lm_head"])
    assert {layer.name: layer.tied_to for layer in report.layers} == {"wte": None, "lm_head": "wte"}
    assert model.wte.U is model.lm_head.U and model.wte.S is model.lm_head.S
    expected = model(ids)
    torch.testing.assert_close(condlr_ext.fold(model)(ids), expected)
    assert model.wte[0].weight is model.lm_head[1].weight  # U S
    again = GPT(depth=1)
    with pytest.raises(ValueError, match="its weight is tied to that of wte"):
        condlr_ext.factorize(again, rank=8, include="lm_head")
    again.lm_head.weight = nn.Parameter(again.wte.weight.detach().clone())
    assert "wte" in condlr_ext.factorize(again, rank=8).skipped


@pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}], ids=str)
def test_options_of_dense_rows_are_refused(option):
    dense = nn.Embedding(10, 6, **option)
    reason = f"its {next(iter(option))} acts on rows of a dense weight"
    with pytest.raises(ValueError, match=reason):
        LowRankEmbedding.from_dense(dense, 4)
    report = condlr_ext.factorize(nn.Sequential(dense, nn.Linear(6, 6)), rank=2, include=["0", "1"])
    assert report.skipped == {"0": reason}


def test_embedding_keeps_its_dtype_under_autocast_and_traces():
    layer = LowRankEmbedding(10, 6, rank=4)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(IDS).dtype == torch.float32
    torch.testing.assert_close(torch.fx.symbolic_trace(layer)(IDS), layer(IDS))
    torch.testing.assert_close(torch.export.export(layer, (IDS,)).module()(IDS), layer(IDS))


def test_fresh_layers_have_the_scale_of_torch():
    torch.manual_seed(0)
    for layer, dense in (
        (LowRankEmbedding(200, 64, rank=8), nn.Embedding(200, 64)),
        (LowRankBilinear(16, 12, 90, rank=8), nn.Bilinear(16, 12, 90)),
    ):
        assert layer.weight.norm().item() == pytest.approx(dense.weight.norm().item(), rel=0.03)
    with pytest.raises(RankError):
        LowRankEmbedding(10, 6, rank=7)


@ROUTES
@pytest.mark.parametrize("bias", [True, False])
def test_bilinear_in_function_gradients_and_conversions(route, bias):
    layer = randomize(LowRankBilinear(3, 4, 7, bias, rank=5, dtype=torch.float64))
    layer.route = route
    parameters = dict(layer.named_parameters())
    inputs = torch.randn(2, 6, 3, dtype=torch.float64), torch.randn(2, 6, 4, dtype=torch.float64)

    def ours(x, y, *values):
        return torch.func.functional_call(layer, dict(zip(parameters, values, strict=True)), (x, y))

    def dense(x, y, U, S, V, *b):
        return F.bilinear(x, y, (U @ S @ V.mT).reshape(7, 3, 4), *b)

    values = [*inputs, *parameters.values()]
    torch.testing.assert_close(ours(*values), dense(*values))
    for a, b in zip(gradients(ours, values), gradients(dense, values), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(layer.to_dense()(*inputs), layer(*inputs))
    assert type(layer.folded()) is nn.Bilinear
    again = LowRankBilinear.from_dense(layer.to_dense(), 5)
    torch.testing.assert_close(again(*inputs), layer(*inputs))
    assert again.plan(inputs[0]).route in ("factorized", "merged")
