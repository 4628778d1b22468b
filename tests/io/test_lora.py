"""LoRA files: plain LoRA for other readers, read back with the same function."""

import copy
import json
import math
import os
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from helpers.layers import spread
from helpers.matrices import non_orthonormality
from helpers.models import Conv1D
from safetensors.torch import load_file, save_file
from torch import nn

import condlr_ext
from condlr_ext import add_adapters, load_lora, save_lora
from condlr_ext.adapters import adapters
from condlr_ext.errors import CheckpointError
from condlr_ext.optim import CondLRSGD


class Lora(nn.Module):
    """PEFT's LoRA, from its paper: base(x) + scaling B(A(x))."""

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


def net():
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(3, 8, 3, padding=1),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(8, 6, 3, stride=2, bias=False),
            pool=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            mlp=nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 5)),
            relu2=nn.ReLU(),
            out=nn.Linear(5, 4),
        )
    )


def adapted_net():
    torch.manual_seed(3)
    plain = net()
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
    plain, x = net(), torch.randn(4, 3, 8, 8)
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


def test_a_layer_under_two_names_is_written_under_both(tmp_path):
    first = nn.Linear(6, 6)
    plain = nn.Sequential(OrderedDict(a=first, relu=nn.ReLU(), b=first, c=nn.Linear(6, 6)))
    model, x = copy.deepcopy(plain), torch.randn(5, 6)
    add_adapters(model, 2)
    with torch.no_grad():
        for adapter in adapters(model).values():
            adapter.delta.S.copy_(0.3 * torch.eye(2))
    save_lora(model, tmp_path)
    torch.testing.assert_close(evaluate_lora(plain, tmp_path)(x), model(x), rtol=1e-5, atol=1e-5)
    again = copy.deepcopy(plain)
    made = load_lora(again, tmp_path)
    assert list(made) == ["a", "c"] and again.a is again.b is made["a"]
    torch.testing.assert_close(again(x), model(x), rtol=1e-5, atol=1e-5)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors["base_model.model.b.lora_A.weight"] *= 2
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="'a' and 'b' are one layer and must have one change"):
        load_lora(copy.deepcopy(plain), tmp_path)


def test_layers_with_a_transposed_weight(tmp_path):
    """HF's Conv1D: PEFT's A and B are those of its transpose, whatever fan_in_fan_out says, which PEFT corrects."""
    torch.manual_seed(0)
    plain = nn.Sequential(Conv1D(9, 6), nn.ReLU(), nn.Linear(9, 4))
    for include, all_transposed in (("0", True), (None, False)):
        model, x = copy.deepcopy(plain), torch.randn(5, 6)
        for adapter in add_adapters(model, 2, include=include, scale=0.5).values():
            spread(adapter)
        save_lora(model, tmp_path)
        path = tmp_path / "adapter_config.json"
        config, tensors = json.loads(path.read_text()), load_file(tmp_path / "adapter_model.safetensors")
        A, B = (tensors[f"base_model.model.0.lora_{k}.weight"] for k in "AB")
        assert config["fan_in_fan_out"] is all_transposed and A.shape == (2, 6) and B.shape == (9, 2)
        torch.testing.assert_close(model[0].weight, plain[0].weight + 0.5 * (B @ A).mT)
        for told in (True, False):
            path.write_text(json.dumps(config | {"fan_in_fan_out": told}))
            again = copy.deepcopy(plain)
            load_lora(again, tmp_path)
            torch.testing.assert_close(again(x), model(x))


def test_a_failed_save_leaves_no_folder(tmp_path, monkeypatch):
    _, model = adapted_net()
    real, count = os.fsync, iter(range(100))

    def disk_full(descriptor):
        if next(count) == 2:  # the file of the settings, after the tensors and their folder
            raise OSError("no space left")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="save_lora: cannot write .*lora: no space left"):
        save_lora(model, tmp_path / "new" / "lora")
    assert not list(tmp_path.iterdir())
    (tmp_path / "lora").mkdir()
    count = iter([2])
    with pytest.raises(OSError, match="no space left"):
        save_lora(model, tmp_path / "lora")
    assert not list((tmp_path / "lora").iterdir())


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
    fails("modules_to_save must be a list of names", config=config | {"modules_to_save": "head"})
    fails("bias must be none, all or lora_only, got some", config=config | {"bias": "some"})
    fails("use_dora=True is more than low-rank factors", config=config | {"use_dora": True})
    fails("must have r, an integer, .* got None and", config={k: v for k, v in config.items() if k != "r"})
    for bad in ({"r": True}, {"r": "2"}, {"r": 2.0}, {"r": None}):
        fails("must have r, an integer", config=config | {"rank_pattern": {}} | bad)
    for alpha in ("2", [2], math.nan, math.inf, 0, 1e308, 10**400, True, None):
        fails(
            "and lora_alpha, a finite number other than 0", config=config | {"lora_alpha": alpha, "alpha_pattern": {}}
        )
    for pattern in ([1], 7, "x"):
        fails("rank_pattern must be a dict", config=config | {"rank_pattern": pattern})
    fails("recursion", config="[" * 200_000)
    fails("more than 1048576 bytes", config=" " * 2**20 + "{}")
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
    fails(r"must have lora_A \[r, n, ...\]", tensors | {key: torch.ones(2, 6, dtype=torch.int32)})
    other = key.replace("lora_A", "lora_B")
    fails(r"must have lora_A \[r, n, ...\]", tensors | {key: torch.ones(0, 6), other: torch.ones(16, 0)})
    fails("of layer 'mlp.0' must be finite, got NaN or Inf", tensors | {key: torch.full((2, 6), torch.nan)})
    renamed = {k.replace("mlp.0", "mlp.9"): v for k, v in tensors.items()}
    fails(
        "layer 'mlp.9' must be nn.Linear, nn.Conv1d/2d/3d or HF's Conv1D, dense or low-rank, got no such module",
        renamed,
        error=ValueError,
    )
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
    with pytest.raises(CheckpointError, match="LowRankAdapters of conv1, conv2, .* call add_adapters first"):
        condlr_ext.load(plain, tmp_path / "m.safetensors")


@pytest.fixture
def folder(tmp_path):
    """A plain LoRA of layer 0, and a function that writes other settings."""
    save_file(
        {
            "base_model.model.0.lora_A.weight": torch.randn(2, 8),
            "base_model.model.0.lora_B.weight": torch.randn(6, 2),
        },
        tmp_path / "adapter_model.safetensors",
    )

    def write(**settings):
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["0"]} | settings
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        return tmp_path

    return write


NEUTRAL = [
    dict(init_lora_weights=True), dict(init_lora_weights="gaussian"), dict(init_lora_weights="eva"),
    dict(lora_dropout=0.1), dict(loftq_config={}), dict(alora_invocation_tokens=None), dict(use_qalora=False),
    dict(a_setting_of_the_future=None, another=False), dict(rank_pattern={r"^0": 2}), dict(rank_pattern={r"[0-9]+": 2}),
]  # fmt: skip


@pytest.mark.parametrize("settings", NEUTRAL, ids=str)
def test_neutral_settings_are_read(folder, settings):
    assert list(load_lora(nn.Sequential(nn.Linear(8, 6)), folder(**settings))) == ["0"]


REFUSED = [
    *(dict(init_lora_weights=w) for w in ("pissa", "pissa_niter_16", "olora", "corda", "lora_ga", "loftq")),
    dict(alora_invocation_tokens=[3]), dict(use_qalora=True), dict(use_bdlora={"a": 1}), dict(kasa_config={"beta": 1}),
    dict(a_setting_of_the_future=True), dict(another=2), dict(trainable_token_indices=[1]), dict(lora_bias=True),
    dict(rank_pattern={"(a+)+!": 2}), dict(rank_pattern=[1]), dict(alpha_pattern={"0": 10**400}), dict(r=0),
    dict(rank_pattern={".*.*.*.*x": 2}), dict(lora_alpha="many"), dict(rank_pattern={"(": 1}),
]  # fmt: skip


@pytest.mark.parametrize("settings", REFUSED, ids=lambda s: str(s)[:40])
def test_other_settings_are_refused(folder, settings):
    """What is not known to leave the function alone, and what would choose the time that reading takes."""
    model = nn.Sequential(nn.Linear(8, 6))
    with pytest.raises(CheckpointError):
        load_lora(model, folder(**settings))
    assert isinstance(model[0], nn.Linear)


def test_deep_settings_are_refused(folder):
    path = folder() / "adapter_config.json"
    path.write_text("[" * 10**5 + "]" * 10**5)
    with pytest.raises(CheckpointError, match="cannot read"):
        load_lora(nn.Sequential(nn.Linear(8, 6)), path.parent)
