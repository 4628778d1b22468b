"""timm: its models, optimizers, averages and checkpoints."""

import copy

import pytest
import timm
import timm.optim
import torch
from helpers.clients import TAU, check_round_trip, train
from helpers.training import assert_constraint
from timm.layers import ScaledStdConv2d
from timm.scheduler import CosineLRScheduler
from timm.utils import CheckpointSaver, ModelEmaV2, ModelEmaV3, adaptive_clip_grad
from torch import nn

import condlr_ext

# name: size of the image and options
MODELS = {
    "resnet10t": (64, {}),
    "vit_tiny_patch16_224": (32, dict(img_size=32, patch_size=8, depth=2, embed_dim=64, num_heads=2)),
    "deit_tiny_distilled_patch16_224": (32, dict(img_size=32, patch_size=8, depth=1, embed_dim=64, num_heads=2)),
    "swin_tiny_patch4_window7_224": (
        64,
        dict(img_size=64, window_size=4, embed_dim=32, depths=(1, 1), num_heads=(1, 2)),
    ),
    "convnext_atto": (64, dict(depths=(1, 1, 1, 1), dims=(16, 24, 32, 48))),
    "mobilenetv3_small_050": (64, {}),
    "efficientnet_lite0": (64, {}),
    "regnetx_002": (64, {}),
    "resmlp_12_224": (64, dict(img_size=64)),
    "densenet121": (64, dict(growth_rate=8, block_config=(1, 1, 1, 1))),
    "repvgg_a0": (64, {}),
    "levit_128s": (224, {}),
    "xcit_nano_12_p16_224": (32, dict(img_size=32, depth=1)),
    "maxvit_pico_rw_256": (64, dict(img_size=64, depths=(1, 1, 1, 1))),
    "hrnet_w18_small": (64, {}),
}


def vit(**options):
    sizes = dict(img_size=32, patch_size=8, depth=2, embed_dim=64, num_heads=2, num_classes=10)
    return timm.create_model("vit_tiny_patch16_224", **(sizes | options))


def low_rank_vit(**options):
    torch.manual_seed(0)
    model = vit(**options)
    condlr_ext.factorize(model, rank=0.25, exclude="head")
    return model


IMAGES = {"x": torch.rand(4, 3, 32, 32)}


@pytest.mark.parametrize("name", MODELS)
def test_models(name, tmp_path):
    size, options = MODELS[name]
    check_round_trip(
        lambda: timm.create_model(name, num_classes=10, **options),
        {"x": torch.rand(4, 3, size, size)},
        tmp_path / "model.safetensors",
        budget=0.5,
    )


@pytest.mark.parametrize(
    "name",
    "sgd adamw lamb lion muon adamp adafactor nadamw adopt mars lookahead_adamw sgdp madgrad adan laprop".split(),
)
def test_optimizers_under_a_projector(name):
    model = low_rank_vit()
    optimizer = timm.optim.create_optimizer_v2(model, opt=name, lr=1e-3, weight_decay=0.01, layer_decay=0.9)
    condlr_ext.optim.Projector(model, tau=TAU).attach(optimizer)
    train(model, IMAGES, optimizer)
    assert_constraint(model, TAU)


def test_parameter_groups_of_timm():
    model = low_rank_vit()
    groups = timm.optim.param_groups_layer_decay(model, weight_decay=0.01, layer_decay=0.75)
    optimizer = condlr_ext.optim.CondLRAdamW(groups, lr=1e-3, tau=TAU)
    train(model, IMAGES, optimizer)
    assert_constraint(model, TAU)


def test_schedulers_clipping_and_averages():
    model = low_rank_vit()
    optimizer = condlr_ext.optim.CondLRSGD(model, lr=0.05, momentum=0.9, tau=TAU)
    scheduler = CosineLRScheduler(optimizer, t_initial=4, warmup_t=2, warmup_lr_init=1e-3)
    averages = ModelEmaV2(model, decay=0.5), ModelEmaV3(model, decay=0.5)
    for step in range(4):
        train(model, IMAGES, optimizer, steps=1)
        adaptive_clip_grad(model.parameters())
        scheduler.step(step)
        for average in averages:
            average.update(model)
    assert_constraint(model, TAU)
    for average in averages:  # their condition numbers are those of the averaged weight
        for name, number in condlr_ext.condition_numbers(average.module).items():
            layer = average.module.get_submodule(name)
            sigma = torch.linalg.svdvals(layer.weight.flatten(1).detach().double())[: layer.rank]
            assert number == pytest.approx((sigma[0] / sigma[-1]).item(), rel=1e-4)


def test_checkpoint_saver_resumes_bitwise(tmp_path):
    def run(model, optimizer, steps):
        train(model, IMAGES, optimizer, steps)

    model = low_rank_vit()
    optimizer = condlr_ext.optim.CondLRSGD(model, lr=0.05, momentum=0.9, tau=TAU)
    run(model, optimizer, 2)
    saver = CheckpointSaver(model, optimizer, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path))
    saver.save_checkpoint(0, metric=0.5)
    again = low_rank_vit()
    other = condlr_ext.optim.CondLRSGD(again, lr=0.05, momentum=0.9, tau=TAU)
    timm.models.resume_checkpoint(again, str(tmp_path / "last.pth.tar"), other, log_info=False)
    run(model, optimizer, 2)
    run(again, other, 2)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


WAYS = {
    "gradient checkpointing": lambda model: model.set_grad_checkpointing(),
    "channels_last": lambda model: model.to(memory_format=torch.channels_last),
    "another image size": lambda model: model.set_input_size(img_size=(32, 32)),
    "new head": lambda model: model.reset_classifier(7),
}


@pytest.mark.parametrize("way", WAYS)
def test_ways_of_timm(way):
    model = low_rank_vit()
    WAYS[way](model)
    optimizer = condlr_ext.optim.CondLRSGD(model, lr=0.05, tau=TAU)
    train(model, IMAGES, optimizer)
    assert_constraint(model, TAU)


@pytest.mark.parametrize("name", ["repvgg_a0", "mobileone_s0", "levit_128s", "fastvit_t8"])
def test_branches_merge_after_training(name):
    """timm merges branches of convolutions into one and reads their weights."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).eval()
    condlr_ext.factorize(model, budget=0.5)
    size = 224 if name == "levit_128s" else 64
    x = torch.rand(2, 3, size, size)
    with torch.no_grad():
        expected = model(x)
        merged = timm.utils.reparameterize_model(condlr_ext.to_dense(copy.deepcopy(model)))
        torch.testing.assert_close(merged(x), expected, rtol=0, atol=1e-3 * expected.abs().max().item())


def test_features():
    model = timm.create_model("resnet10t", features_only=True)
    condlr_ext.factorize(model, budget=0.5)
    assert [f.shape[1] for f in model(torch.rand(2, 3, 64, 64))] == model.feature_info.channels()


def test_standardized_convolutions_become_plain_ones():
    """ScaledStdConv2d is left alone, with a reason; with its standardized weight in a plain convolution it converts."""

    def standardized(conv: ScaledStdConv2d) -> nn.Conv2d:
        plain = nn.Conv2d(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
            conv.groups, conv.bias is not None,
        )  # fmt: skip
        scale = (conv.gain * conv.scale).view(-1)
        flat = conv.weight.reshape(1, len(conv.weight), -1)
        weight = nn.functional.batch_norm(flat, None, None, scale, training=True, momentum=0.0, eps=conv.eps)
        with torch.no_grad():
            plain.weight.copy_(weight.reshape_as(conv.weight))
            plain.bias.copy_(conv.bias)
        return plain

    torch.manual_seed(0)
    model = timm.create_model("nf_resnet26", num_classes=10).eval()
    x = torch.rand(2, 3, 64, 64)
    before = model(x)
    report = condlr_ext.factorize(copy.deepcopy(model), budget=0.5)
    assert report.skipped["stem.conv"] == "a ScaledStdConv2d may do more than its base class"
    for name, module in list(model.named_modules()):
        if type(module) is ScaledStdConv2d:
            model.set_submodule(name, standardized(module))
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-3)
    report = condlr_ext.factorize(model, budget=0.5)
    assert "stem.conv" in [layer.name for layer in report.layers]
    optimizer = condlr_ext.optim.CondLRSGD(model, lr=1e-3, tau=TAU)
    train(model, {"x": x}, optimizer)
    assert_constraint(model, TAU)
