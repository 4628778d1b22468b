"""transformers: tiny random models of every kind, generation, and the Trainer."""

import copy

import pytest
import torch
import transformers
from helpers.clients import TAU, check_round_trip, output, train
from helpers.training import assert_constraint
from transformers import AutoModel, AutoModelForCausalLM, Trainer, TrainingArguments

import condlr_ext

IDS = torch.randint(5, 90, (2, 12), generator=torch.Generator().manual_seed(0))
IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

TEXT = {"input_ids": IDS}
SIZES = dict(vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
GROUPED = SIZES | dict(num_key_value_heads=2)
NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
VIT = dict(image_size=32, patch_size=8, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
EXPERTS = GROUPED | dict(num_local_experts=4, num_experts_per_tok=2)

# model: class of the configuration, its options, inputs
CAUSAL = {
    "gpt2": (dict(vocab_size=100, n_embd=64, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)),
    "llama": GROUPED,
    "mistral": GROUPED,
    "qwen2": GROUPED | dict(tie_word_embeddings=True),
    "qwen3_moe": GROUPED | dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=16),
    "mixtral": EXPERTS,
    "phi3": GROUPED | dict(pad_token_id=0, embd_pdrop=0.0, resid_pdrop=0.0),
    "gpt_neox": SIZES,
    "opt": dict(vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, ffn_dim=128, dropout=0.0,
                word_embed_proj_dim=64, max_position_embeddings=64),
    "mamba": dict(vocab_size=100, hidden_size=64, num_hidden_layers=1, state_size=8),
}  # fmt: skip
OTHERS = {
    "bert": (SIZES | NO_DROPOUT, TEXT),
    "deberta-v2": (SIZES | NO_DROPOUT, TEXT),
    "distilbert": (dict(vocab_size=100, dim=64, n_layers=2, n_heads=4, hidden_dim=128, dropout=0.0), TEXT),
    "t5": (
        dict(vocab_size=100, d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4, dropout_rate=0.0),
        TEXT | {"decoder_input_ids": IDS},
    ),
    "vit": (VIT | dict(intermediate_size=128) | NO_DROPOUT, {"pixel_values": IMAGES}),
    "swin": (
        dict(image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[1, 2], window_size=4, drop_path_rate=0.0),
        {"pixel_values": IMAGES},
    ),
    "convnext": (dict(hidden_sizes=[16, 32], depths=[1, 1], num_stages=2), {"pixel_values": IMAGES}),
    "whisper": (
        dict(vocab_size=100, d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, num_mel_bins=20,
             decoder_attention_heads=2, encoder_ffn_dim=128, decoder_ffn_dim=128, max_source_positions=20, pad_token_id=0,
             bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, dropout=0.0),
        {"input_features": torch.rand(2, 20, 40), "decoder_input_ids": IDS},
    ),
    "clip": (
        dict(text_config=dict(SIZES, max_position_embeddings=16), vision_config=VIT | dict(intermediate_size=128)),
        TEXT | {"pixel_values": IMAGES},
    ),
}  # fmt: skip


def causal(name):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(name, **CAUSAL[name]))


def low_rank_llama():
    model = causal("llama")
    condlr_ext.factorize(model, rank=0.25, exclude="lm_head")
    return model


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_models(name, tmp_path):
    check_round_trip(
        lambda: causal(name), TEXT | {"use_cache": False}, tmp_path / "model.safetensors", budget=0.5, exclude="*head*"
    )


@pytest.mark.parametrize("name", OTHERS)
def test_other_models(name, tmp_path):
    options, inputs = OTHERS[name]

    def build():
        torch.manual_seed(0)
        return AutoModel.from_config(transformers.AutoConfig.for_model(name, **options))

    check_round_trip(build, inputs, tmp_path / "model.safetensors", budget=0.5)


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2", "mixtral", "opt"])
def test_generation_is_that_of_the_dense_model(name):
    model = causal(name).eval()
    condlr_ext.factorize(model, rank=0.5)
    twins = [condlr_ext.to_dense(copy.deepcopy(model)), condlr_ext.fold(copy.deepcopy(model), example_input=TEXT)]
    options = dict(max_new_tokens=8, do_sample=False, pad_token_id=0)
    expected = model.generate(IDS, **options)
    for twin in twins:
        assert torch.equal(twin.generate(IDS, **options), expected)


def test_gradient_checkpointing_and_bfloat16():
    model = low_rank_llama()
    model.gradient_checkpointing_enable()
    model.to(torch.bfloat16)
    optimizer = condlr_ext.optim.CondLRAdamW(model, lr=1e-3, tau=TAU)
    losses = train(model, TEXT | {"use_cache": False}, optimizer, steps=6)
    assert losses[-1] < losses[0] and optimizer.skipped == 0


def test_tied_weights_stay_tied():
    model = causal("qwen2")
    report = condlr_ext.factorize(model, rank=0.5)
    assert report.skipped["lm_head"].startswith("its weight is tied to that of model.embed_tokens")
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.resize_token_embeddings(120)  # the embedding is dense
    assert output(model(IDS)).shape == (2, 12, 120)


# ------------------------------------------------------------------------------------------------- Trainer

DATA = [{"input_ids": row, "labels": row} for row in torch.randint(5, 90, (16, 12))]


def trainer(folder, model, optimizer=None, **options):
    arguments = dict(
        output_dir=str(folder), per_device_train_batch_size=4, max_steps=4, report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="no", logging_steps=1,
    )  # fmt: skip
    scheduler = optimizer and torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    return Trainer(
        model, TrainingArguments(**(arguments | options)), train_dataset=DATA, optimizers=(optimizer, scheduler)
    )


OPTIONS = {
    "plain": {},
    "accumulation": dict(gradient_accumulation_steps=2),
    "clipping": dict(max_grad_norm=0.01),
    "bf16": dict(bf16=True),
    "checkpointing": dict(gradient_checkpointing=True),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_trainer(tmp_path, options):
    model = low_rank_llama()
    optimizer = condlr_ext.optim.CondLRAdamW(model, lr=1e-3, tau=TAU)
    trainer(tmp_path, model, optimizer, **options).train()
    assert_constraint(model, TAU)
    assert optimizer.skipped == 0


def test_trainer_makes_the_optimizer(tmp_path):
    model = low_rank_llama()
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no"
    )
    chosen = condlr_ext.optim.CondLRAdamW, {"lr": 1e-3, "tau": TAU}
    Trainer(model, arguments, train_dataset=DATA, optimizer_cls_and_kwargs=chosen).train()
    assert_constraint(model, TAU)


def test_trainer_resumes_bitwise(tmp_path):
    def run(folder, **options):
        model = low_rank_llama()
        optimizer = condlr_ext.optim.CondLRAdamW(model, lr=1e-3, tau=TAU)
        resume = options.pop("resume", None)
        trainer(folder, model, optimizer, **options).train(resume_from_checkpoint=resume)
        return model

    whole = run(tmp_path / "a", save_strategy="steps", save_steps=2)
    resumed = run(tmp_path / "b", resume=str(tmp_path / "a" / "checkpoint-2"))
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_stacked_experts(name, implementation, tmp_path):
    def build():
        model = causal(name)
        model.set_experts_implementation(implementation)
        return model

    check_round_trip(
        build, TEXT | {"use_cache": False}, tmp_path / "model.safetensors", budget=0.5, include="*.mlp.experts.*"
    )


def test_tied_embedding_is_factorized_with_its_head(tmp_path):
    check_round_trip(
        lambda: causal("qwen2"),
        TEXT | {"use_cache": False},
        tmp_path / "model.safetensors",
        budget=0.5,
        include=["*embed_tokens", "lm_head"],
    )
