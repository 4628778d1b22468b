"""LowRankMultiheadAttention against nn.MultiheadAttention and in torch's transformers."""

import copy

import pytest
import torch
from helpers.layers import assert_close_float64
from helpers.models import Encoder, example_input
from torch import nn

from condlr_ext import LowRankLinear, factorize, functional, reference, to_dense
from condlr_ext.errors import ShapeError
from condlr_ext.nn import LowRankMultiheadAttention

ATTENTIONS = [
    dict(),
    dict(batch_first=True),
    dict(bias=False),
    dict(kdim=24, vdim=20, batch_first=True),
    dict(add_bias_kv=True),
    dict(add_zero_attn=True, batch_first=True),
]


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", ATTENTIONS, ids=str)
def test_multihead_attention_is_its_dense_twin(options, training, need_weights):
    """Self- and cross-attention, masks of every kind, without a batch, with gradients and without."""
    torch.manual_seed(1)
    low = nn.MultiheadAttention(32, 4, **options).double().train(training)
    factorize(low, rank=5)
    assert type(low) is LowRankMultiheadAttention and isinstance(low, nn.MultiheadAttention)
    separate = "kdim" in options
    layers = ["q_proj", "k_proj", "v_proj", "out_proj"] if separate else ["in_proj", "out_proj"]
    assert sorted(n for n, m in low.named_modules() if isinstance(m, LowRankLinear)) == sorted(layers)
    dense = to_dense(copy.deepcopy(low))
    assert type(dense) is nn.MultiheadAttention and type(dense.out_proj) is type(nn.MultiheadAttention(4, 2).out_proj)
    widths = 32, options.get("kdim", 32), options.get("vdim", 32)
    lengths = 5, 6, 6

    def inputs(batch):
        if not batch:
            return [torch.randn(t, w, dtype=torch.float64) for t, w in zip(lengths, widths, strict=True)]
        order = (lambda b, t: (b, t)) if options.get("batch_first") else (lambda b, t: (t, b))
        return [torch.randn(*order(2, t), w, dtype=torch.float64) for t, w in zip(lengths, widths, strict=True)]

    causal = torch.triu(torch.ones(5, 6, dtype=torch.bool), 1)
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[1, 4:] = True
    per_head = torch.randn(8, 5, 6, dtype=torch.float64)
    cases = [
        (inputs(True), {}),
        (inputs(False), {}),
        (inputs(True), {"attn_mask": causal}),
        (inputs(True), {"attn_mask": per_head, "average_attn_weights": False}),
        (inputs(True), {"key_padding_mask": padding}),
        (inputs(True), {"key_padding_mask": padding, "attn_mask": causal}),
    ]
    if not separate:
        x = inputs(True)[0]
        square = torch.triu(torch.ones(5, 5, dtype=torch.bool), 1)
        cases += [
            ([x, x, x], {}),
            ([x, x, x], {"attn_mask": square}),
            ([x, x, x], {"attn_mask": square, "is_causal": True}),
        ]
    q, k, v = inputs(True)
    if not separate:
        cases.append(([q, k, k], {"attn_mask": causal}))  # as in a decoder: two products instead of three
    for qkv, masks in cases:
        ours, theirs = (m(*qkv, need_weights=need_weights, **masks) for m in (low, dense))
        assert_close_float64(ours[0], theirs[0])
        assert (ours[1] is None) == (theirs[1] is None)
        if theirs[1] is not None:
            assert_close_float64(ours[1], theirs[1])
        gradients = []
        for m in (low, dense):
            leaves = [t.clone().requires_grad_() for t in qkv]
            shared = [leaves[next(j for j in range(3) if qkv[j] is t)] for t in qkv]  # the same ones are the same
            m(*shared, need_weights=need_weights, **masks)[0].pow(2).sum().backward()
            gradients.append([leaf.grad for leaf in shared])
            assert all(g is not None for g in gradients[-1])
        for g, h in zip(*gradients, strict=True):
            assert_close_float64(g, h)
        with torch.no_grad():
            assert_close_float64(low(*qkv, need_weights=need_weights, **masks)[0], theirs[0])


def test_attention_is_served_as_named():
    """Only the chosen projections become low-rank, the rest keeps its parameters; a second call works."""
    model = Encoder(depth=1)
    attention = model.encoder.layers[0].self_attn
    weight, x = attention.in_proj_weight, torch.randn(2, 3, 32, dtype=torch.float64)
    factorize(model, rank=4, include="*.out_proj")
    assert isinstance(attention.out_proj, LowRankLinear) and attention.in_proj_weight is weight
    assert_close_float64(attention.double()(x, x, x)[0], to_dense(copy.deepcopy(attention))(x, x, x)[0])
    factorize(model, rank=6, include="*.in_proj")
    assert type(attention) is LowRankMultiheadAttention and attention.in_proj.rank == 6
    assert attention.q_proj_weight is None and attention.in_proj_weight.requires_grad
    assert {"in_proj.U", "in_proj_bias", "out_proj.S"} <= set(attention.state_dict())
    assert "in_proj_weight" not in attention.state_dict()
    with pytest.raises(
        AttributeError, match="LowRankMultiheadAttention.in_proj_weight is formed from the factors of in_proj"
    ):
        attention.in_proj_weight = weight
    with pytest.raises(TypeError, match="build an nn.MultiheadAttention and factorize it"):
        LowRankMultiheadAttention(8, 2)
    with pytest.raises(ValueError, match="low-rank already: .*self_attn.in_proj; call to_dense first"):
        factorize(model, rank=2)
    # two attentions with one weight
    first, second = nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2)
    second.in_proj_weight = first.in_proj_weight
    pair = nn.ModuleList([first, second])
    report = factorize(pair, rank=3)
    assert [r.tied_to for r in report.layers if r.name == "1.in_proj"] == ["0.in_proj"]
    assert first.in_proj.U is second.in_proj.U
    to_dense(pair)
    assert first.in_proj_weight is second.in_proj_weight and list(first._parameters) == list(
        nn.MultiheadAttention(8, 2)._parameters
    )
    assert set(vars(first)) == set(vars(nn.MultiheadAttention(8, 2)))


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.filterwarnings("ignore:.*nested.*")
def test_fast_paths_of_the_transformer_are_the_slow_path(norm_first, activation, monkeypatch):
    """The encoder layer's fused kernel reads the layers' weights; with a padding mask the encoder passes nested tensors."""
    low = Encoder(norm_first=norm_first, activation=activation).double().eval()
    factorize(low, rank=4)
    dense = to_dense(copy.deepcopy(low))
    x = example_input("encoder", dtype=torch.float64)
    padding = torch.zeros(4, 12, dtype=torch.bool)
    padding[2, 7:] = True
    fused, calls = torch._transformer_encoder_layer_fwd, []
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *args: calls.append(args[0]) or fused(*args))
    for mask in (None, padding):
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with torch.no_grad():
                slow = low(x, mask)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
        assert not calls
        with torch.no_grad():
            assert_close_float64(low(x, mask), dense(x, mask))
            assert len(calls) == 4  # two layers each
            nested = [c.is_nested for c in calls]
            assert nested == [mask is not None and not norm_first] * 4
            if not any(nested):  # else what is padded comes out as zero, here and in torch
                assert_close_float64(low(x, mask), slow)
        calls.clear()
        assert_close_float64(low(x, mask), slow)  # with gradients the layers run as modules
        assert not calls


@pytest.mark.parametrize("route", ["factorized", "merged"])
def test_attention_runs_by_the_routes_of_its_layers(route, monkeypatch):
    """Thin products alone, or W formed once for each distinct input."""
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    factorize(attention, rank=2)
    for layer in (attention.in_proj, attention.out_proj):
        layer.route = route
    chosen, choose = [], functional.linear_products

    def watched(*args):
        chosen.append(choose(*args))
        return chosen[-1]

    monkeypatch.setattr(functional, "linear_products", watched)
    x, y, z = torch.randn(3, 2, 3, 8)
    for inputs, calls in (((x, x, x), 2), ((x, y, y), 3), ((x, y, z), 4)):
        chosen.clear()
        attention._modules["out_proj"]._products.clear()
        attention(*inputs)
        projections = chosen[: calls - 1]  # then the output's
        assert all((products is reference.merged_linear) == (route == "merged") for products in projections)


@pytest.mark.parametrize(
    "call,error,text",
    [
        (lambda m, x: m(x[..., :4], x, x), ShapeError, r"with widths 8, 8, 8, got query \[2, 3, 4\]"),
        (lambda m, x: m(x, x[0], x), ShapeError, r"must be \[B, T, width\] or \[T, width\]"),
        (lambda m, x: m(x, x, x[:, :2]), ShapeError, "key and value must have one length"),
        (lambda m, x: m(x[:1], x, x), ShapeError, "all one batch size"),
        (lambda m, x: m(x, x, x, attn_mask=torch.zeros(3, 4)), ShapeError,
         r"attn_mask must be \[3, 3\] or \[4, 3, 3\], got \[3, 4\]"),
        (lambda m, x: m(x, x, x, key_padding_mask=torch.zeros(3)), ShapeError, r"key_padding_mask must be \[2, 3\]"),
        (lambda m, x: m(x, x, x, attn_mask=torch.zeros(3, 3, dtype=torch.int)), TypeError, "bools or floats, got torch.int32"),
        (lambda m, x: m(x, x, x, is_causal=True), ValueError, "is_causal is a hint about attn_mask, which is None"),
    ],
)  # fmt: skip
def test_bad_input_of_an_attention(call, error, text):
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    factorize(attention, rank=2)
    with pytest.raises(error, match=text):
        call(attention, torch.randn(2, 3, 8))


def test_attention_under_dropout_autocast_and_compile():
    """The same random numbers as the dense twin; autocast's dtype; one graph."""
    low = nn.MultiheadAttention(16, 2, dropout=0.4, batch_first=True)
    factorize(low, rank=16)
    dense = to_dense(copy.deepcopy(low))
    x = torch.randn(3, 5, 16)
    for need_weights in (True, False):
        outputs = []
        for m in (low, dense):
            torch.manual_seed(3)
            outputs.append(m(x, x, x, need_weights=need_weights)[0])
        torch.testing.assert_close(*outputs, rtol=0, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert low(x, x, x)[0].dtype == torch.bfloat16
    low.eval()
    compiled = torch.compile(low, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, x, x)[0], low(x, x, x)[0])


def test_hooks_of_an_attention_stay():
    model = Encoder(depth=1)
    attention, seen = model.encoder.layers[0].self_attn, []
    handle = attention.register_forward_hook(lambda m, args, y: seen.append(type(m)))
    factorize(model, rank=2)
    model(example_input("encoder"))
    to_dense(model)
    model(example_input("encoder"))
    assert seen == [LowRankMultiheadAttention, nn.MultiheadAttention]
    handle.remove()
    model(example_input("encoder"))
    assert len(seen) == 2


def test_a_transformer_with_a_decoder():
    model = nn.Transformer(32, 4, 1, 1, 48, dropout=0.0, batch_first=True).double()
    source, target = torch.randn(2, 5, 32, dtype=torch.float64), torch.randn(2, 4, 32, dtype=torch.float64)
    before = model(source, target)
    report = factorize(model, rank=1.0, example_input=(source, target))
    assert {"decoder.layers.0.multihead_attn.in_proj", "decoder.layers.0.multihead_attn.out_proj"} <= {
        r.name for r in report.layers
    }
    assert_close_float64(model(source, target), before)
    flops = {r.name: r.dense_flops for r in report.layers}
    assert flops["encoder.layers.0.self_attn.in_proj"] == 2 * 10 * 96 * 32
    # queries from 8 tokens, keys and values from 10
    assert flops["decoder.layers.0.multihead_attn.in_proj"] == 2 * (8 + 10 + 10) * 32 * 32
    assert flops["decoder.layers.0.multihead_attn.out_proj"] == 2 * 8 * 32 * 32
    cross = next(r for r in report.layers if r.name == "decoder.layers.0.multihead_attn.in_proj")
    thin = 2 * 8 * 32 * (32 + 32) + 2 * 8 * 32**2 + 2 * 10 * 32 * (32 + 64) + 2 * 10 * 32**2
    assert cross.flops == thin and cross.gain > 0
    assert_close_float64(to_dense(model)(source, target), before)
