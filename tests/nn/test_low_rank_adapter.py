"""Adapters: the frozen function at the start, the bound, merging, LoRA files that others read."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from helpers.matrices import non_orthonormality
from helpers.models import MODELS, example_input
from safetensors.torch import load_file, save_file
from torch import nn

import condlr_ext
from condlr_ext import LowRankAdapter, add_adapters, load_lora, merge_adapters, save_lora
from condlr_ext.adapters import adapters
from condlr_ext.errors import CheckpointError, NonFiniteError, RankError
from condlr_ext.optim import CondLRSGD

LAYERS = {
    "linear": (lambda: nn.Linear(12, 9), (5, 12)),
    "linear without bias": (lambda: nn.Linear(12, 9, bias=False), (2, 3, 12)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 9, 7)),
    "conv2d grouped": (lambda: nn.Conv2d(4, 6, 3, dilation=2, groups=2, padding="same", padding_mode="circular"), (2, 4, 9, 7)),
    "conv3d": (lambda: nn.Conv3d(2, 6, 2), (2, 2, 4, 5, 4)),
}  # fmt: skip


def spread(adapter, seed=0):
    """A change as after training: any orthonormal U, V, a core with kappa <= 1.5, of the layer's own size."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for X in (adapter.delta.U, adapter.delta.V):
            X.copy_(torch.linalg.qr(torch.randn(X.shape, generator=g, dtype=torch.float64))[0])
        Q = torch.linalg.qr(torch.randn(adapter.rank, adapter.rank, generator=g, dtype=torch.float64))[0]
        adapter.delta.S.copy_(Q * torch.linspace(1.5, 1, adapter.rank))
    return adapter


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_start_in_other_precisions(dtype):
    layer = nn.Linear(32, 16).to(dtype)
    x = torch.randn(8, 32, dtype=dtype)
    before = layer(x)
    adapter = LowRankAdapter(layer, 4)
    eps = torch.finfo(dtype).eps
    bound = eps * layer.weight.norm() * x.norm(dim=1).max() + 2 * eps * before.abs().max()
    assert (adapter(x) - before).abs().max() <= 2 * bound
    assert adapter.delta.S.count_nonzero() == 4 and adapter.condition_number() == 1
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


def test_adapt_chooses_layers_and_shares_modules():
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
        (dict(rank=2, include="nine"), ValueError, "add_adapters: include 'nine' matches no module"),
        (
            dict(rank=2, exclude=[3]),
            TypeError,
            "add_adapters: exclude entries must be names, types or predicates, got 3",
        ),
        (dict(rank=2, include=nn.Conv2d), ValueError, "add_adapters: no nn.Linear or nn.Conv1d/2d/3d with include="),
    ],
)
def test_adapt_errors_leave_the_model_unchanged(options, error, text):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 6))
    with pytest.raises(error, match=text):
        add_adapters(model, **options)
    assert [type(m) for m in model] == [nn.Linear] * 2 and all(p.requires_grad for p in model.parameters())
    with pytest.raises(TypeError, match="LowRankAdapter: layer must be nn.Linear or nn.Conv1d/2d/3d, got ReLU"):
        LowRankAdapter(nn.ReLU(), 2)
    with pytest.raises(ValueError, match="add_adapters: model must contain the layers, got a bare Linear"):
        add_adapters(nn.Linear(3, 3), 2)


# ------------------------------------------------------------------------------------------ LoRA files


class Lora(nn.Module):
    """What PEFT's LoRA computes, from its paper: base(x) + scaling B(A(x))."""

    def __init__(self, base, A, B, scaling):
        super().__init__()
        self.base, self.A, self.B, self.scaling = base, A, B, scaling

    def forward(self, x):
        if isinstance(self.base, nn.Linear):
            return self.base(x) + self.scaling * F.linear(F.linear(x, self.A), self.B)
        conv = getattr(F, f"conv{self.A.dim() - 2}d")
        return self.base(x) + self.scaling * conv(conv(x, self.A, None, self.base.stride, self.base.padding), self.B)


def evaluate_lora(model, folder):
    """An ordinary model with the LoRA of a PEFT folder, read as PEFT documents it, for names of target_modules only."""
    config, tensors = (
        json.loads((folder / "adapter_config.json").read_text()),
        load_file(folder / "adapter_model.safetensors"),
    )
    assert config["peft_type"] == "LORA" and config["bias"] == "none" and not config["use_rslora"]
    names = {key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in tensors}
    model = copy.deepcopy(model)
    for name in names:
        assert name in config["target_modules"]
        A, B = (tensors[f"base_model.model.{name}.lora_{k}.weight"] for k in "AB")
        key = "^" + name.replace(".", r"\.")
        r = config["rank_pattern"].get(key, config["r"])
        assert A.shape[0] == B.shape[1] == r
        model.set_submodule(
            name, Lora(model.get_submodule(name), A, B, config["alpha_pattern"].get(key, config["lora_alpha"]) / r)
        )
    return model


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, stride=2, bias=False)
        self.mlp = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 5))
        self.out = nn.Linear(5, 4)

    def forward(self, x):
        x = self.conv2(torch.relu(self.conv1(x))).mean((2, 3))
        return self.out(torch.relu(self.mlp(x)))


def adapted_net():
    torch.manual_seed(3)
    plain = Net()
    model = copy.deepcopy(plain)
    made = add_adapters(model, 2, include=["conv2", "mlp.0"], scale=0.7) | add_adapters(
        model, 3, include=["conv1", "mlp.2"], scale=1 / 3
    )
    for k, adapter in enumerate(made.values()):
        spread(adapter, k)
    return plain, model


def test_export_is_plain_lora_and_comes_back(tmp_path):
    plain, model = adapted_net()
    x = torch.randn(4, 3, 8, 8)
    save_lora(model, tmp_path / "lora", base_model="somewhere/net")
    assert sorted(p.name for p in (tmp_path / "lora").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (
        config["target_modules"] == ["conv1", "conv2", "mlp.0", "mlp.2"]
        and config["base_model_name_or_path"] == "somewhere/net"
    )
    assert sorted([config["r"], *config["rank_pattern"].values()]) in ([2, 2, 3], [2, 3, 3], [2, 3, 3, 3], [2, 2, 2, 3])
    expected = model(x)
    tolerance = {"rtol": 0, "atol": 40 * torch.finfo(torch.float32).eps * float(expected.detach().abs().max())}
    torch.testing.assert_close(evaluate_lora(plain, tmp_path / "lora")(x), expected, **tolerance)
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    adapter = model.mlp[2]
    assert torch.equal(tensors["base_model.model.mlp.2.lora_A.weight"], adapter.delta.V.mT)
    torch.testing.assert_close(tensors["base_model.model.mlp.2.lora_B.weight"], adapter.delta.U @ adapter.delta.S)

    again = copy.deepcopy(plain)
    made = load_lora(again, tmp_path / "lora")
    assert {n: (a.rank, pytest.approx(a.scale)) for n, a in adapters(model).items()} == {
        n: (a.rank, a.scale) for n, a in made.items()
    }
    torch.testing.assert_close(again(x), expected, **tolerance)
    assert all(non_orthonormality(X) < 2e-6 for a in made.values() for X in (a.delta.U, a.delta.V))
    assert all(a.condition_number() == pytest.approx(1.5, rel=1e-4) for a in made.values())
    before = [a.delta.S.clone() for a in made.values()]
    CondLRSGD(again, 0.1, tau=0.5 + 1e-4)  # in the band already: an optimizer leaves the function alone
    assert all(torch.equal(a.delta.S, S) for a, S in zip(made.values(), before, strict=True))
    load_lora(again, tmp_path / "lora")  # over the adapters that are there
    torch.testing.assert_close(again(x), expected, **tolerance)


def test_names_that_end_alike_are_told_apart(tmp_path):
    plain = nn.ModuleDict({"0": nn.Linear(4, 4), "a": nn.ModuleDict({"0": nn.Linear(4, 4), "1": nn.Linear(4, 4)})})
    model = copy.deepcopy(plain)
    spread(add_adapters(model, 1, include="0")["0"])
    for adapter in add_adapters(model, 2, include="a.0", scale=2.0).values():
        spread(adapter)
    save_lora(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (
        config["target_modules"] == r"0|a\.0"
    )  # a pattern for the whole name, as a list would mean a.0 by "0" as well
    made = load_lora(plain, tmp_path)
    assert {n: (a.rank, a.scale) for n, a in made.items()} == {"0": (1, 1.0), "a.0": (2, 2.0)}


def test_loras_of_others(tmp_path):
    """Factors that are not orthonormal, rslora, the adapter's name in the key, B = 0, bfloat16."""
    plain, x = Net(), torch.randn(4, 3, 8, 8)
    prefix = "base_model.model."
    tensors = {
        f"{prefix}mlp.0.lora_A.default.weight": torch.randn(3, 6),
        f"{prefix}mlp.0.lora_B.default.weight": torch.randn(16, 3),
        f"{prefix}mlp.2.lora_A.default.weight": torch.randn(3, 16),
        f"{prefix}mlp.2.lora_B.default.weight": torch.zeros(5, 3),
        f"{prefix}conv1.lora_A.default.weight": torch.randn(3, 3, 3, 3),
        f"{prefix}conv1.lora_B.default.weight": torch.randn(8, 3, 1, 1),
        f"{prefix}out.lora_A.default.weight": torch.randn(5, 5).bfloat16(),
        f"{prefix}out.lora_B.default.weight": torch.randn(4, 5).bfloat16(),
    }
    config = {
        "peft_type": "LORA",
        "r": 3,
        "lora_alpha": 6,
        "use_rslora": True,
        "rank_pattern": {"out": 5},
        "alpha_pattern": {"mlp.0": 4},
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    expected = copy.deepcopy(plain)
    for name, scaling in {"mlp.0": 4 / 3**0.5, "conv1": 6 / 3**0.5, "out": 6 / 5**0.5}.items():
        A, B = (tensors[f"{prefix}{name}.lora_{k}.default.weight"].float() for k in "AB")
        expected.set_submodule(name, Lora(expected.get_submodule(name), A, B, scaling))
    made = load_lora(plain, tmp_path)
    y = expected(x)
    torch.testing.assert_close(
        plain(x), y, rtol=0, atol=100 * torch.finfo(torch.float32).eps * float(y.detach().abs().max())
    )
    assert made["out"].rank == 4  # a product of rank 5 factors is 4 x 5
    assert made["mlp.2"].delta.S.any() and made["mlp.2"].condition_number() == 1


def test_lora_errors_change_nothing(tmp_path):
    plain, model = adapted_net()
    good, path = tmp_path / "good", tmp_path / "bad"
    save_lora(model, good)
    config, tensors = (
        json.loads((good / "adapter_config.json").read_text()),
        load_file(good / "adapter_model.safetensors"),
    )
    path.mkdir()

    def fails(match, tensors=tensors, config=config, model=plain, error=CheckpointError):
        if tensors is not None:
            save_file(tensors, path / "adapter_model.safetensors")
        (path / "adapter_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
        before = {n: (type(m), [p.requires_grad for p in m.parameters()]) for n, m in model.named_modules()}
        with pytest.raises(error, match=match) as caught:
            load_lora(model, path)
        assert "\n" not in str(caught.value)
        assert {n: (type(m), [p.requires_grad for p in m.parameters()]) for n, m in model.named_modules()} == before

    fails("cannot read .*adapter_model", tensors=None)
    fails("cannot read .*adapter_config", config="{")
    fails("peft_type must be LORA, got POLAR", config=config | {"peft_type": "POLAR"})
    fails("use_dora=True is more than low-rank factors", config=config | {"use_dora": True})
    fails("must have r and lora_alpha: KeyError", config={k: v for k, v in config.items() if k != "r"})
    fails("has rank 9 in the settings and", config=config | {"r": 9, "rank_pattern": {}})
    key = "base_model.model.mlp.0.lora_A.weight"
    fails("unknown keys base_model.model.mlp.0.lora_magnitude_vector, mlp", tensors | {"base_model.model.mlp.0.lora_magnitude_vector": torch.ones(3), "mlp": torch.ones(1)})  # fmt: skip
    fails("layer 'mlp.0' lacks lora_A", {k: v for k, v in tensors.items() if k != key})
    fails(
        "layer 'mlp.0' has more than one lora_A", tensors | {key.replace(".weight", ".other.weight"): torch.ones(2, 6)}
    )
    fails(r"layer 'mlp.0' must have lora_A \[r, n, ...\]", tensors | {key: torch.ones(5, 6)})
    fails(
        "layer 'mlp.0' is 16 x 6, the change in the file 16 x 7", tensors | {key: torch.randn(2, 7)}, error=ValueError
    )
    fails("must be finite, got NaN or Inf", tensors | {key: torch.full((2, 6), torch.nan)}, error=ValueError)
    renamed = {k.replace("mlp.0", "mlp.9"): v for k, v in tensors.items()}
    fails("layer 'mlp.9' must be nn.Linear or nn.Conv1d/2d/3d, got no such module", renamed, error=ValueError)
    model.mlp[0].merge()
    fails(r"the adapter of layer 'mlp.0' is merged; call unmerge\(\) first", model=model, error=ValueError)

    with pytest.raises(ValueError, match="save_lora: the model has no adapter"):
        save_lora(plain, tmp_path / "none")
    odd = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), nn.Conv2d(4, 4, 3, groups=2))
    for name, what in (("0", "padding_mode circular"), ("1", "groups 2")):
        odd_model = copy.deepcopy(odd)
        add_adapters(odd_model, 2, include=name)
        with pytest.raises(ValueError, match=f"save_lora: layer '{name}' has {what}, which PEFT's LoRA lacks"):
            save_lora(odd_model, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_peft_itself_reads_and_writes_the_same(tmp_path):
    peft = pytest.importorskip("peft")
    plain, model = adapted_net()
    x = torch.randn(4, 3, 8, 8)
    y = model(x)
    tolerance = {"rtol": 0, "atol": 40 * torch.finfo(torch.float32).eps * float(y.detach().abs().max())}
    save_lora(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), str(tmp_path / "ours"))
    torch.testing.assert_close(theirs(x), y, **tolerance)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    load_lora(plain, tmp_path / "theirs")
    torch.testing.assert_close(plain(x), y, **tolerance)


def test_checkpoints_of_adapted_models(tmp_path):
    plain, model = adapted_net()
    optimizer = CondLRSGD(model, 0.1, tau=0.6)
    condlr_ext.save(model, tmp_path / "m.safetensors", optimizer)
    other = copy.deepcopy(plain)
    (
        add_adapters(other, 2, include=["conv2", "mlp.0"], scale=0.7),
        add_adapters(other, 3, include=["conv1", "mlp.2"], scale=1 / 3),
    )
    condlr_ext.load(other, tmp_path / "m.safetensors", CondLRSGD(other, 0.1, tau=0.6))
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(other(x), model(x))
    with pytest.raises(CheckpointError, match="conv1.delta"):
        condlr_ext.load(plain, tmp_path / "m.safetensors")


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
