"""What is trained beside a LoRA is written as PEFT's modules_to_save and bias, and read back."""

import copy
import json

import pytest
import torch
from helpers.layers import spread
from safetensors.torch import load_file, save_file
from torch import nn

from condlr_ext import add_adapters, load_lora, save_lora
from condlr_ext.errors import CheckpointError

PREFIX = "base_model.model."


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8))
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 3)
        self.shift = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return self.head(self.norm(self.body(x))) + self.shift


def adapted(trained=("norm", "head"), biases=("body.2", "body.0.layer")):
    model = Net()
    spread(add_adapters(model, 2, include="body.0")["body.0"])
    for name in trained:
        model.get_submodule(name).requires_grad_(True)
    for name in biases:
        model.get_submodule(name).bias.requires_grad_(True)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and "delta" not in name:
                p.add_(torch.randn_like(p))
    model(torch.randn(4, 6))  # the statistics change too
    return model.eval()


def contents(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, load_file(folder / "adapter_model.safetensors")


def test_trained_modules_and_biases_are_written_and_come_back(tmp_path):
    model, x = adapted(), torch.randn(5, 6)
    save_lora(model, tmp_path / "a")
    config, tensors = contents(tmp_path / "a")
    assert config["modules_to_save"] == ["head", "norm"] and config["bias"] == "all"
    values = {
        "body.0.base_layer.bias": model.body[0].bias,
        "body.2.bias": model.body[2].bias,
        **{f"head.{key}": value for key, value in model.head.state_dict().items()},
        **{f"norm.{key}": value for key, value in model.norm.state_dict().items()},
    }
    others = {key: value for key, value in tensors.items() if ".lora_" not in key}
    assert others.keys() == {PREFIX + name for name in values} and len(tensors) == len(others) + 2
    assert all(torch.equal(tensors[PREFIX + name], value) for name, value in values.items())

    again = Net()
    load_lora(again, tmp_path / "a")
    y = model(x)
    tolerance = 40 * torch.finfo(torch.float32).eps * float(y.detach().abs().max())
    torch.testing.assert_close(again.eval()(x), y, rtol=0, atol=tolerance)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    save_lora(again, tmp_path / "b")  # nothing is lost on the second way either
    same, copied = contents(tmp_path / "b")
    assert same == config and copied.keys() == tensors.keys()
    assert all(torch.equal(copied[key], value) for key, value in others.items())


def test_without_trained_parts_nothing_is_added(tmp_path):
    save_lora(adapted((), ()), tmp_path)
    config, tensors = contents(tmp_path)
    assert config["modules_to_save"] is None and config["bias"] == "none" and len(tensors) == 2


def test_what_peft_has_no_words_for_is_named(tmp_path):
    model = adapted()
    model.shift.requires_grad_(True)
    model.body[0].layer.requires_grad_(True)
    with pytest.raises(ValueError, match="shift, body.0.layer.bias, body.0.layer.weight cannot be written: PEFT"):
        save_lora(model, tmp_path / "a")
    with pytest.raises(ValueError, match="exclude 'nothing' matches nothing in the model"):
        save_lora(model, tmp_path / "a", exclude="nothing")
    assert not (tmp_path / "a").exists()
    save_lora(model, tmp_path / "a", exclude=["shift", "body.0.*", "norm"])
    config, tensors = contents(tmp_path / "a")
    assert config["modules_to_save"] == ["head"] and PREFIX + "body.2.bias" in tensors and len(tensors) == 5
    model = nn.Sequential(nn.ModuleList([nn.Linear(4, 4)]), nn.Linear(4, 4))
    model[0].register_parameter("gain", nn.Parameter(torch.ones(1)))  # on a module that PEFT cannot wrap
    add_adapters(model, 1, include="1")
    model[0].gain.requires_grad_(True)
    with pytest.raises(ValueError, match="0.gain cannot be written"):
        save_lora(model, tmp_path / "b")


def test_names_that_mean_other_modules_too_get_the_prefix(tmp_path):
    """PEFT wraps every module whose name ends in an entry, and leaves LoRA out of what an entry matches."""
    model = nn.ModuleDict({"0": nn.Linear(4, 4), "a": nn.ModuleDict({"0": nn.Linear(4, 4)}), "r": nn.Linear(4, 4)})
    model["model"], model["head"] = nn.Linear(4, 4), nn.Linear(4, 4)
    add_adapters(model, 1, include="a.0")
    for name in ("0", "r", "model", "head"):
        model[name].requires_grad_(True)
    save_lora(model, tmp_path)
    saved = {
        "head",
        PREFIX + "0",
        PREFIX + "r",
        PREFIX + "model",
    }  # "base_layer" ends in r, "base_model.model" in model
    assert set(contents(tmp_path)[0]["modules_to_save"]) == saved


def test_a_tied_weight_is_written_under_all_names_and_only_read_so(tmp_path):
    def tied():
        torch.manual_seed(0)
        model = nn.ModuleDict(
            {"embed": nn.Embedding(5, 4), "body": nn.Linear(4, 4), "out": nn.Linear(4, 5, bias=False)}
        )
        model["out"].weight = model["embed"].weight
        return model

    model = tied()
    add_adapters(model, 1, include="body")
    model["embed"].requires_grad_(True)
    with torch.no_grad():
        model["embed"].weight.mul_(2)
    save_lora(model, tmp_path)
    config, tensors = contents(tmp_path)
    assert config["modules_to_save"] == ["embed", "out"]
    again = tied()
    load_lora(again, tmp_path)
    assert torch.equal(again["out"].weight, model["embed"].weight) and again["out"].weight is again["embed"].weight

    def fails(match, error=ValueError):
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(error, match=match):
            load_lora(tied(), tmp_path)

    tensors[PREFIX + "out.weight"] = tensors[PREFIX + "out.weight"] + 1
    fails("another value under another name")
    del tensors[PREFIX + "out.weight"]
    fails("the saved module 'out' lacks weight", CheckpointError)
    config["modules_to_save"] = ["embed"]
    fails("embed.weight has further names in the model")


def test_files_of_peft_with_copies_of_biases(tmp_path):
    """With bias="all" PEFT writes the biases of a saved module three times, those of adapted layers under two names."""
    model, x = adapted(("head",)), torch.randn(5, 6)
    save_lora(model, tmp_path)
    config, tensors = contents(tmp_path)
    for name in ("original_module", "modules_to_save"):
        tensors[f"{PREFIX}head.{name}.bias"] = torch.zeros(3)
    tensors[PREFIX + "body.0.bias"] = tensors.pop(PREFIX + "body.0.base_layer.bias")
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config["modules_to_save"] = ["head", "score", "classifier"]  # PEFT adds usual names, there or not
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    again = Net()
    load_lora(again, tmp_path)
    torch.testing.assert_close(again.head.weight, model.head.weight, rtol=0, atol=0)
    torch.testing.assert_close(again.body(x), model.body(x), rtol=1e-5, atol=1e-5)


def test_bad_parts_change_nothing(tmp_path):
    model = adapted()
    save_lora(model, tmp_path)
    config, good = contents(tmp_path)

    def fails(match, error, **changes):
        tensors = good | {PREFIX + key.replace("__", "."): value for key, value in changes.items()}
        save_file({key: t for key, t in tensors.items() if t is not None}, tmp_path / "adapter_model.safetensors")
        base = Net()
        before = copy.deepcopy(base.state_dict())
        with pytest.raises(error, match=match):
            load_lora(base, tmp_path)
        assert all(torch.equal(before[key], value) for key, value in base.state_dict().items())
        assert all(p.requires_grad for p in base.parameters()) and type(base.body[0]) is nn.Linear

    fails(
        "the saved module 'norm' lacks running_mean, running_var",
        CheckpointError,
        norm__running_mean=None,
        norm__running_var=None,
    )
    fails("head.weight must be finite", CheckpointError, head__weight=torch.full((3, 8), torch.nan))
    huge = torch.full((3, 8), 1e300, dtype=torch.float64)
    fails("head.weight must be finite in torch.float32", CheckpointError, head__weight=huge)
    fails(
        r"head.weight is torch.float32 \[4, 8\] in the file and torch.float32 \[3, 8\]",
        ValueError,
        head__weight=torch.ones(4, 8),
    )
    fails(r"head.bias is torch.int64 \[3\] in the file", ValueError, head__bias=torch.ones(3, dtype=torch.int64))
    fails("the model has no tensor base_model.model.body.1.bias", ValueError, body__1__bias=torch.ones(8))
    fails("unknown keys base_model.model.shift", CheckpointError, shift=torch.ones(3))
    with torch.device("meta"):
        skeleton = Net()
    save_file(good, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="no tensor .* that values can be written to"):
        load_lora(skeleton, tmp_path)


def test_parts_of_eight_bits_are_read(tmp_path):
    save_lora(adapted(), tmp_path)
    _, good = contents(tmp_path)
    small = {key: t.to(torch.float8_e4m3fn) if "head" in key or "lora" in key else t for key, t in good.items()}
    save_file(small, tmp_path / "adapter_model.safetensors")
    model = Net()
    load_lora(model, tmp_path)
    assert torch.equal(model.head.weight, small[f"{PREFIX}head.weight"].float())


def test_adapters_that_are_there_stay_trained():
    model = Net()
    first = add_adapters(model, 2, include="body.0")["body.0"]
    model.head.requires_grad_(True)
    add_adapters(model, 2, include="body.2")
    assert all(p.requires_grad for p in (*first.delta.parameters(), *model.head.parameters()))
    assert not model.body[2].layer.weight.requires_grad and not model.norm.weight.requires_grad


def test_peft_itself_reads_and_writes_the_same(tmp_path):
    peft = pytest.importorskip("peft")
    model, x = adapted(), torch.randn(5, 6)
    y = model(x)
    tolerance = {"rtol": 0, "atol": 40 * torch.finfo(torch.float32).eps * float(y.detach().abs().max())}
    save_lora(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(Net(), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(theirs(x), y, **tolerance)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = Net()
    load_lora(again, tmp_path / "theirs")
    torch.testing.assert_close(again.eval()(x), y, **tolerance)
