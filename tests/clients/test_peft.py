"""PEFT: LoRA files both ways, its layers left alone, and what is refused by name."""

import pytest
import torch
from helpers.clients import TAU
from helpers.layers import spread
from peft import LoraConfig, LoraModel, PeftModel, get_peft_model
from peft.utils import register_peft_method
from torch import nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForSequenceClassification

import condlr_ext
from condlr_ext.errors import CheckpointError

X, Y = torch.rand(64, 32), torch.randint(0, 10, (64,))
IDS = torch.randint(5, 90, (2, 12))


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def cnn():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2))


def gpt2():
    torch.manual_seed(0)
    sizes = dict(vocab_size=100, n_embd=64, n_layer=1, n_head=4)
    return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)).eval()


def llama_classifier():
    torch.manual_seed(0)
    sizes = dict(vocab_size=100, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=128)
    return LlamaForSequenceClassification(LlamaConfig(**sizes, pad_token_id=0, num_labels=3)).eval()


# name: the model, a function of it, and the layers
BASES = {
    "mlp": (mlp, lambda model: model(X), ["0", "2"]),
    "cnn": (cnn, lambda model: model(torch.linspace(0, 1, 2 * 3 * 64).reshape(2, 3, 8, 8)), ["0", "2"]),
    "gpt2": (gpt2, lambda model: model(IDS).logits, ["c_attn", "c_fc"]),
    "llama": (llama_classifier, lambda model: model(IDS).logits, ["q_proj", "down_proj"]),
}


def randomized(model):
    """With a B that is not zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(0.1 * torch.randn_like(p))
    return model


def assert_same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * max(1.0, theirs.abs().max().item()))


@pytest.mark.parametrize("name", BASES)
def test_adapters_are_a_lora_of_peft(name, tmp_path):
    build, function, layers = BASES[name]
    model = build()
    condlr_ext.add_adapters(model, rank=4, include=[f"*{layer}" for layer in layers], scale=2.0)
    for module in model.modules():
        if isinstance(module, condlr_ext.LowRankAdapter):
            spread(module)
    condlr_ext.save_lora(model, tmp_path)
    loaded = PeftModel.from_pretrained(build(), tmp_path).eval()
    assert_same(function(loaded), function(model))
    assert_same(function(loaded.merge_and_unload()), function(condlr_ext.merge_adapters(model)))


SETTINGS = {
    "plain": {},
    "rslora": dict(use_rslora=True),
    "patterns": dict(rank_pattern={"0": 2, "c_fc": 2, "down_proj": 2}, alpha_pattern={"2": 3, "c_attn": 3}),
    "dropout": dict(lora_dropout=0.1),
    "gaussian start": dict(init_lora_weights="gaussian"),
    "biases": dict(bias="all"),
    "biases of its layers": dict(bias="lora_only"),
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("name", BASES)
def test_a_lora_of_peft_becomes_adapters(name, settings, tmp_path):
    build, function, layers = BASES[name]
    theirs = randomized(
        get_peft_model(build(), LoraConfig(r=4, target_modules=layers, fan_in_fan_out=name == "gpt2", **settings))
    ).eval()
    theirs.save_pretrained(tmp_path)
    model = build()
    condlr_ext.load_lora(model, tmp_path)
    assert_same(function(model.eval()), function(theirs))
    optimizer = condlr_ext.optim.CondLRAdamW(model, lr=1e-3, tau=TAU)
    function(model).pow(2).sum().backward()
    optimizer.step()
    assert max(condlr_ext.condition_numbers(model).values()) <= (1 + TAU) * (1 + 5e-6)


def test_saved_modules_go_both_ways(tmp_path):
    theirs = get_peft_model(mlp(), LoraConfig(r=4, target_modules=["0", "2"], modules_to_save=["4"]))
    with torch.no_grad():
        theirs.base_model.model[4].modules_to_save["default"].weight.mul_(2)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = mlp()
    condlr_ext.load_lora(ours, tmp_path / "theirs")
    assert_same(ours(X), theirs.eval()(X))
    optimizer = condlr_ext.optim.CondLRAdamW(ours, lr=0.01, tau=TAU)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(ours(X), Y).backward()
        optimizer.step()
    condlr_ext.save_lora(ours, tmp_path / "ours")
    assert_same(PeftModel.from_pretrained(mlp(), tmp_path / "ours")(X), ours(X))


REFUSED = {
    "dora": dict(use_dora=True),
    "bias of lora_B": dict(lora_bias=True),
    "pissa": dict(init_lora_weights="pissa"),
    "olora": dict(init_lora_weights="olora"),
    "alora": dict(alora_invocation_tokens=[1]),
}


@pytest.mark.parametrize("settings", REFUSED.values(), ids=REFUSED)
def test_other_functions_are_refused(settings, tmp_path):
    get_peft_model(mlp(), LoraConfig(r=4, target_modules=["0"], **settings)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=next(iter(settings))):
        condlr_ext.load_lora(mlp(), tmp_path)


def test_layers_of_peft_are_left_alone():
    model = get_peft_model(mlp(), LoraConfig(r=4, target_modules=["0"]))
    report = condlr_ext.factorize(model, rank=4)
    assert [layer.name for layer in report.layers] == ["base_model.model.2", "base_model.model.4"]
    assert "merge_and_unload" in report.skipped["base_model.model.0.base_layer"]
    merged = model.merge_and_unload()
    assert sum(isinstance(m, condlr_ext.LowRankLinear) for m in merged.modules()) == 2


def test_peft_registers_no_method_from_outside():
    """If this fails, PEFT takes new methods by now: a CondLRConfig becomes possible."""
    with pytest.raises(ValueError, match="Unknown PEFT type CONDLR, please add an entry"):
        register_peft_method(name="condlr", config_cls=LoraConfig, model_cls=LoraModel)
