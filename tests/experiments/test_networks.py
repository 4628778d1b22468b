"""The networks of the experiments: sizes as published, residuals that add, normalization inside."""

import pytest
import torch

import condlr_ext
from condlr_ext.experiments import networks

CASES = [
    ("mlp", (1, 8, 8), 84_480),
    ("cnn", (1, 8, 8), 180 + 9000 + 40_000 + 2000),
    ("lenet5", (1, 28, 28), 430_500),
    ("vgg16", (3, 32, 32), 15_239_872),
    ("wrn16-4", (3, 32, 32), 2_745_264),
    ("vit", (3, 32, 32), None),
    ("vit", (1, 8, 8), None),
]


@pytest.mark.parametrize("name, shape, weights", CASES)
def test_sizes(name, shape, weights):
    model = networks.build(name, shape, 10).eval()
    with torch.no_grad():
        assert model(torch.rand(2, *shape)).shape == (2, 10)
    if weights is not None:  # of convolutions and linear layers
        assert weights == sum(p.numel() for p in model.parameters() if p.ndim > 1)
    assert model.get_submodule(networks.HEAD).out_features == 10


def test_residuals_are_added():
    block = networks.WideBlock(4, 4, 1).eval()
    torch.nn.init.zeros_(block.conv2.weight)
    x = torch.rand(2, 4, 6, 6)
    assert torch.equal(block(x), x)
    wider = networks.WideBlock(4, 8, 2).eval()
    torch.nn.init.zeros_(wider.conv2.weight)
    assert torch.equal(wider(x), wider.shortcut(wider.act(wider.norm1(x))))


def test_attention_is_torchs():
    ours, theirs = networks.Attention(12, 3), torch.nn.MultiheadAttention(12, 3, batch_first=True)
    theirs.load_state_dict(
        {f"in_proj_{k}": ours.qkv.get_parameter(k) for k in ("weight", "bias")}
        | {f"out_proj.{k}": ours.out.get_parameter(k) for k in ("weight", "bias")}
    )
    x = torch.rand(2, 5, 12)
    torch.testing.assert_close(ours(x), theirs(x, x, x)[0])


def test_normalization_is_the_first_layer():
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.1, 0.3)
    torch.manual_seed(0)
    plain = networks.build("cnn", (3, 8, 8), 10)
    torch.manual_seed(0)
    model = networks.build("cnn", (3, 8, 8), 10, mean=mean, std=std)
    x = torch.rand(4, 3, 8, 8)
    shifted = (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(model(x), plain(shifted))
    report = condlr_ext.factorize(model, rank=0.2, exclude=f"*{networks.HEAD}")
    assert [layer.name for layer in report.layers] == ["network.body.0", "network.body.3", "network.body.7"]


@pytest.mark.parametrize("name, shape, _", CASES)
def test_every_network_can_be_factorized(name, shape, _):
    model = networks.build(name, shape, 10)
    condlr_ext.factorize(model, budget=0.3, exclude=networks.HEAD, init="random")
    assert model.eval()(torch.rand(1, *shape)).isfinite().all()


@pytest.mark.parametrize(
    "name, shape, message",
    [
        ("resnet", (1, 8, 8), "must be one of mlp, cnn"),
        ("cnn", (64,), r"cnn takes images \[C, H, W\] with H, W >= 4, got samples \[64\]"),
        ("vgg16", (1, 8, 8), "H, W >= 32"),
        ("vit", (1, 28, 28), "in multiples of 8"),
    ],
)
def test_what_does_not_fit(name, shape, message):
    with pytest.raises(ValueError, match=message):
        networks.build(name, shape, 10)
