"""LowRankAdapter, add_adapters and merge_adapters."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.layers import spread
from helpers.matrices import non_orthonormality
from helpers.models import MODELS, Conv1D, example_input
from torch import nn

import condlr_ext
from condlr_ext import LowRankAdapter, add_adapters, merge_adapters
from condlr_ext.adapters import adapters
from condlr_ext.errors import NonFiniteError, RankError
from condlr_ext.optim import CondLRSGD

LAYERS = {
    "linear": (lambda: nn.Linear(12, 9), (5, 12)),
    "linear without bias": (lambda: nn.Linear(12, 9, bias=False), (2, 3, 12)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 9, 7)),
    "conv2d grouped": (lambda: nn.Conv2d(4, 6, 3, dilation=2, groups=2, padding="same", padding_mode="circular"), (2, 4, 9, 7)),
    "conv3d": (lambda: nn.Conv3d(2, 6, 2), (2, 2, 4, 5, 4)),
    "transposed": (lambda: Conv1D(9, 12), (5, 12)),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_starts_as_the_frozen_layer_and_is_its_sum(name):
    make, shape = LAYERS[name]
    layer, x = make(), torch.randn(shape)
    expected = copy.deepcopy(layer)
    adapter = LowRankAdapter(layer, 2, scale=0.5)
    trained = {n for n, p in adapter.named_parameters() if p.requires_grad}
    assert trained == {"delta.U", "delta.S", "delta.V"} and adapter.rank == 2 and adapter.delta.bias is None
    # the change has the norm eps ‖W‖, hence eps ‖W‖ times the operator norm of unfolding, at most sqrt(kernel)
    unfolding = layer.weight[0, 0].numel() ** 0.5 if layer.weight.dim() > 2 else 1
    bound = torch.finfo(torch.float32).eps * layer.weight.norm() * x.flatten(1).norm(dim=1).max() * unfolding
    assert (adapter(x) - expected(x)).abs().max() <= 2 * bound
    change = 0.5 * adapter.delta.weight
    assert change.norm().item() == pytest.approx(torch.finfo(torch.float32).eps * layer.weight.norm().item(), rel=1e-4)
    assert adapter.condition_number() == pytest.approx(1)

    spread(adapter).double()
    dense = copy.deepcopy(expected).double()
    with torch.no_grad():
        dense.weight += 0.5 * adapter.delta.weight
    torch.testing.assert_close(adapter(x.double()), dense(x.double()))
    torch.testing.assert_close(adapter.weight, dense.weight)
    assert (adapter.bias is None) == (expected.bias is None)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_start_is_relative_to_the_weight_at_any_scale(scale):
    layer = nn.Linear(8, 6)
    layer.weight.data *= scale
    norm = layer.weight.double().norm().item()
    adapter = LowRankAdapter(layer, 2)
    assert adapter.delta.S.double().norm().item() == pytest.approx(torch.finfo(torch.float32).eps * norm, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_start_in_other_precisions(dtype):
    layer = nn.Linear(32, 16).to(dtype)
    x = torch.randn(8, 32, dtype=dtype)
    before = layer(x)
    adapter = LowRankAdapter(layer, 4)
    eps = torch.finfo(dtype).eps
    bound = eps * layer.weight.norm() * x.norm(dim=1).max() + 2 * eps * before.abs().max()
    assert (adapter(x) - before).abs().max() <= 2 * bound
    assert adapter.delta.S.count_nonzero() == 4
    assert adapter.condition_number() <= 1 + torch.finfo(dtype).eps  # of the weight as stored
    zero = nn.Linear(6, 5)
    nn.init.zeros_(zero.weight)
    assert LowRankAdapter(zero, 2).delta.S.count_nonzero() == 2
    assert LowRankAdapter(nn.Linear(6, 5, device="meta"), 2).delta.S.is_meta


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_and_unmerge_are_exact(name, dtype):
    make, shape = LAYERS[name]
    adapter, x = spread(LowRankAdapter(make().to(dtype), 2, scale=-0.3)).eval(), torch.randn(shape).to(dtype)
    weight, before, state = adapter.layer.weight.clone(), adapter(x), copy.deepcopy(adapter.state_dict())
    assert adapter.merge() is adapter and adapter.merged and adapter.merge().merged
    exact = (weight.double() - 0.3 * copy.deepcopy(adapter.delta).double().weight).detach()
    # one rounding of the sum, and what a float32 product of three factors is off by
    tolerance = torch.finfo(dtype).eps * exact.abs().max() + 20 * torch.finfo(torch.float32).eps * exact.norm()
    assert (adapter.layer.weight.double() - exact).abs().max() <= tolerance
    assert torch.equal(adapter.weight, adapter.layer.weight)
    scale = float(before.detach().double().abs().max())
    torch.testing.assert_close(adapter(x), before, rtol=0, atol=8 * torch.finfo(dtype).eps * scale)
    for key, value in adapter.state_dict().items():  # of the unmerged layer
        assert torch.equal(value, state[key])
    copied = copy.deepcopy(adapter)
    assert copied.unmerge() is copied and torch.equal(copied.layer.weight, weight) and adapter.merged
    assert torch.equal(adapter.unmerge().layer.weight, weight) and not adapter.merged
    assert torch.equal(adapter(x), before)


def test_merged_adapters_refuse_training_and_bad_weights():
    adapter, x = spread(LowRankAdapter(nn.Linear(6, 5), 2)), torch.randn(3, 6)
    adapter.merge()
    with pytest.raises(RuntimeError, match=r"is merged and would not be trained; call unmerge\(\)"):
        adapter(x)
    with torch.no_grad():
        adapter(x)
    other = spread(LowRankAdapter(nn.Linear(6, 5), 2), seed=1)
    adapter.load_state_dict(other.state_dict())
    assert not adapter.merged and torch.equal(adapter(x), other(x))
    with torch.no_grad():
        adapter.delta.S[0, 0] = torch.inf
    before = adapter.layer.weight.clone()
    with pytest.raises(NonFiniteError, match="LowRankAdapter.merge: the merged weight must be finite"):
        adapter.merge()
    assert torch.equal(adapter.layer.weight, before) and not adapter.merged


@pytest.mark.parametrize("kind", ["resnet", "vit", "encoder"])
def test_training_under_the_bound_moves_only_the_change(kind):
    model = MODELS[kind]().eval()
    x = example_input(kind, batch=16)
    y = torch.arange(16) % 10
    expected = model(x)
    made = add_adapters(model, 3, exclude=lambda name, _: name in ("head", "fc"))
    assert made and all(adapters(model)[name] is a for name, a in made.items()) and "head" not in made
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"U", "S", "V"}
    optimizer = CondLRSGD(model, 0.5, momentum=0.5, tau=0.2, sigma_max=3.0)
    start = F.cross_entropy(model(x), y).item()
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        assert all(a.condition_number() <= 1.2 * (1 + 5e-6) for a in made.values())
    assert loss.item() < 0.98 * start and int(optimizer.skipped) == 0
    assert all(non_orthonormality(X) < 5e-6 for a in made.values() for X in (a.delta.U, a.delta.V))
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)

    expected = model(x)
    types = [type(m) for m in MODELS[kind]().modules()]
    assert merge_adapters(model) is model and [type(m) for m in model.modules()] == types
    torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-3 * float(expected.detach().abs().max()))


def test_attention_reads_the_weight_of_an_adapted_output_projection():
    model = MODELS["encoder"]()
    made = add_adapters(model, 2, include="*.out_proj")
    assert len(made) == 2
    x = example_input("encoder")
    before = model(x)
    for adapter in made.values():
        spread(adapter)
    loss = model(x).square().sum()
    loss.backward()
    assert not torch.allclose(model(x), before) and all(a.delta.S.grad.any() for a in made.values())


def test_add_adapters_chooses_layers_and_shares_modules():
    shared = nn.Linear(6, 6)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.Linear(6, 4)), "c": nn.Conv1d(6, 6, 1)})
    assert list(add_adapters(copy.deepcopy(model), 2)) == ["a", "b.1", "c"]
    assert list(add_adapters(copy.deepcopy(model), 2, include=nn.Conv1d)) == ["c"]
    assert list(add_adapters(copy.deepcopy(model), 2, include=["b.*", "c"], exclude=lambda n, m: m.out_channels == 6 if n == "c" else False)) == ["b.1"]  # fmt: skip
    made = add_adapters(model, 0.5, include="a", scale=2.0)
    assert model["a"] is model["b"][0] is made["a"] and made["a"].rank == 3 and made["a"].scale == 2.0
    assert list(add_adapters(model, 2, include="*")) == ["b.1", "c"]  # what is in an adapter is left alone
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".delta." not in n)


@pytest.mark.parametrize(
    "options,error,text",
    [
        (dict(rank=9), RankError, r"add_adapters: layer 0: LowRankLinear: rank must be in 1..min\(m, n\) = 8"),
        (
            dict(rank=2, scale=0),
            ValueError,
            "add_adapters: layer 0: LowRankAdapter: scale must be a finite number other than 0, got 0",
        ),
        (dict(rank=2, include="nine"), ValueError, "add_adapters: include 'nine' matches nothing"),
        (
            dict(rank=2, exclude=[3]),
            TypeError,
            "add_adapters: exclude entries must be names, types or predicates, got 3",
        ),
        (
            dict(rank=2, include=nn.Conv2d),
            ValueError,
            "add_adapters: no nn.Linear, nn.Conv1d/2d/3d or HF's Conv1D with",
        ),
    ],
)
def test_add_adapters_errors_leave_the_model_unchanged(options, error, text):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 6))
    with pytest.raises(error, match=text):
        add_adapters(model, **options)
    assert [type(m) for m in model] == [nn.Linear] * 2 and all(p.requires_grad for p in model.parameters())
    with pytest.raises(TypeError, match="must be nn.Linear, nn.Conv1d/2d/3d or HF's Conv1D, got ReLU"):
        LowRankAdapter(nn.ReLU(), 2)
    with pytest.raises(ValueError, match="add_adapters: model must contain the layers, got a bare Linear"):
        add_adapters(nn.Linear(3, 3), 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_shared_weight_changes_in_the_adapter_alone(dtype):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head, self.twin = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False), nn.Linear(8, 20)
            self.head.weight = self.twin.weight = self.embedding.weight

        def forward(self, i):
            x = self.embedding(i)
            return self.head(x) + self.twin(x)

    model, i = Tied().eval(), torch.arange(20)
    add_adapters(model, 3, scale=0.5)
    for seed, adapter in enumerate(adapters(model).values()):
        spread(adapter, seed)
    weight, expected = model.embedding.weight, model.double()(i)
    before = weight.clone()
    for adapter in adapters(model).values():
        adapter.merge()
    torch.testing.assert_close(model(i), expected)
    assert torch.equal(weight, before) and model.embedding.weight is weight
    copied = copy.deepcopy(model)
    model.to(dtype)
    for m in (model, copied):
        for adapter in adapters(m).values():
            adapter.unmerge()
        assert m.head.layer.weight is m.twin.layer.weight is m.embedding.weight  # tied again
        assert torch.equal(m.embedding.weight, before.to(m.embedding.weight.dtype))
    torch.testing.assert_close(merge_adapters(copied)(i), expected)
    assert isinstance(copied.head, nn.Linear) and torch.equal(copied.embedding.weight, before)


def test_a_merged_adapter_moves_with_what_is_kept_aside():
    adapter = spread(LowRankAdapter(nn.Linear(6, 5), 2))
    before = adapter.layer.weight.clone()
    adapter.merge().double()
    state = adapter.state_dict()["layer.weight"]
    assert state.dtype == torch.float64 and torch.equal(state, before.double())
    assert adapter.unmerge().layer.weight.dtype == torch.float64 and torch.equal(adapter.layer.weight, before.double())


@pytest.mark.parametrize("wrap", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_computed_weights_are_refused(wrap):
    model = nn.Sequential(wrap(nn.Linear(6, 5)), nn.Linear(5, 4))
    with pytest.raises(ValueError, match="add_adapters: layer 0: .* must be a parameter, got one that is computed"):
        add_adapters(model, 2)
    assert not adapters(model) and model[1].weight.requires_grad
    add_adapters(model, 2, include="1")
    wrap(model[1].layer)
    with pytest.raises(ValueError, match="LowRankAdapter.merge: .* must be a parameter"):
        merge_adapters(model)


@pytest.mark.parametrize("name", LAYERS)
def test_adapters_on_low_rank_layers(name, tmp_path):
    build, shape = LAYERS[name]
    model, x = nn.Sequential(build()), torch.randn(shape)
    condlr_ext.factorize(model, rank=3)
    base, before = copy.deepcopy(model), model(x)
    add_adapters(model, 2, scale=0.5)
    torch.testing.assert_close(model(x), before)
    adapter = spread(model[0])
    assert not any(p.requires_grad for p in adapter.layer.parameters())
    optimizer = CondLRSGD(model, lr=0.1, tau=0.0)  # the frozen layer stays, be it off the bound
    assert all(torch.equal(p, q) for p, q in zip(adapter.layer.parameters(), base[0].parameters(), strict=True))
    for _ in range(2):
        model(x).square().sum().backward()
        optimizer.step()
    assert adapter.delta.condition_number() <= 1 + 5e-6
    assert all(torch.equal(p, q) for p, q in zip(adapter.layer.parameters(), base[0].parameters(), strict=True))
    expected = model(x)
    close = {"rtol": 1e-4, "atol": 1e-5 * expected.abs().max().item()}
    torch.testing.assert_close(adapter.weight, adapter.layer.weight + 0.5 * adapter.delta.weight)
    with pytest.raises(ValueError, match="LowRankAdapter.merge: .* got a low-rank one; merge_adapters makes it dense"):
        adapter.merge()
    merged = merge_adapters(copy.deepcopy(model))
    assert type(merged[0]) is type(build())
    torch.testing.assert_close(merged(x), expected, **close)
    torch.testing.assert_close(condlr_ext.to_dense(copy.deepcopy(model))(x), expected, **close)
    condlr_ext.save(model, tmp_path / "whole.safetensors")
    again = copy.deepcopy(base)
    add_adapters(again, 2, scale=0.5)
    condlr_ext.load(again, tmp_path / "whole.safetensors")
    assert torch.equal(again(x), expected)
    if "grouped" not in name:  # PEFT's LoRA has no such convolutions
        condlr_ext.save_lora(model, tmp_path / "lora")
        for other in (copy.deepcopy(base), condlr_ext.to_dense(copy.deepcopy(base))):
            condlr_ext.load_lora(other, tmp_path / "lora")
            torch.testing.assert_close(other(x), expected, **close)


def test_low_rank_layers_without_adapters_are_not_passed_over_in_silence():
    model = nn.Sequential(nn.ConvTranspose1d(4, 6, 3), nn.Linear(8, 6), nn.GRU(6, 8))
    condlr_ext.factorize(model, rank=2, exclude="1")
    names = "0, 2.weight_ih_l0_factors, 2.weight_hh_l0_factors"
    with pytest.raises(
        ValueError, match=f"add_adapters: these layers are low-rank already: {names}; call to_dense first"
    ):
        add_adapters(model, 2)
    assert type(model[1]) is nn.Linear and model[1].weight.requires_grad
    assert list(add_adapters(model, 2, exclude=condlr_ext.nn.LowRankLayer)) == ["1"]


def test_factorize_and_to_dense_leave_adapters_alone():
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 10))
    add_adapters(model, 2, include="0")
    spread(model[0])
    report = condlr_ext.factorize(model, rank=10)
    assert "LowRankAdapter" in report.skipped["0.layer"] and type(model[0].layer) is nn.Linear
    x = torch.randn(4, 12)
    expected = model(x)
    assert condlr_ext.to_dense(model)[0].delta.S is not None and type(model[2]) is nn.Linear
    torch.testing.assert_close(merge_adapters(model)(x), expected)
