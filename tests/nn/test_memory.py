"""Memory that a training iteration keeps."""

import math

import pytest
import torch
from torch import nn

import condlr_ext
from condlr_ext import LowRankLinear


def vgg16() -> nn.Sequential:
    layers, channels = [], 3
    for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
        if width == 0:
            layers.append(nn.MaxPool2d(2))
            continue
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.LeakyReLU()]
        channels = width
    head = [nn.Linear(512, 512), nn.LeakyReLU(), nn.Linear(512, 512), nn.LeakyReLU(), nn.Linear(512, 10)]
    return nn.Sequential(*layers, nn.Flatten(), *head)


def saved_bytes(model: nn.Module, x: torch.Tensor) -> int:
    """Return the bytes that the forward keeps for the backward, beside parameters and buffers."""
    known = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    storages = {}

    def pack(t):
        if t.untyped_storage()._cdata not in known:
            storages[t.untyped_storage()._cdata] = t.untyped_storage()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = model(x)
    assert output.requires_grad
    return sum(s.nbytes() for s in storages.values())


def test_memory_of_a_training_iteration_is_below_the_dense_models():
    """Saved tensors, parameters and gradients of VGG16 at 20 % rank; of P no more is kept than its size says."""
    with torch.device("meta"):
        dense, x = vgg16(), torch.empty(128, 3, 32, 32)
        saved = {"dense": saved_bytes(dense, x)}
        total = {"dense": saved["dense"] + 8 * sum(p.numel() for p in dense.parameters())}
        low_rank = vgg16()
        condlr_ext.factorize(low_rank, rank=0.2, exclude=str(len(low_rank) - 1), init="random")
        layers = [m for m in low_rank.modules() if isinstance(m, condlr_ext.nn.LowRankLayer)]
        images = [128 if isinstance(layer, LowRankLinear) else math.inf for layer in layers]
        sizes = [(*layer.matrix_shape, layer.rank) for layer in layers]
        folded = 4 * sum(min(m, rows) * r for rows, (m, _, r) in zip(images, sizes, strict=True))  # U S, or P Sᵀ
        formed = 4 * sum(m * n + min(m, n) * r for m, n, r in sizes)  # W, and U S or S Vᵀ
        for layer in low_rank:
            if isinstance(layer, condlr_ext.nn.LowRankLayer):
                layer.register_forward_hook(lambda layer, _, y: pixels.append(layer.rank * y.numel() // y.shape[1]))
        for route in ("factorized", "merged"):
            pixels = []
            for layer in low_rank:
                if isinstance(layer, condlr_ext.nn.LowRankLayer):
                    layer.route = route
            saved[route] = saved_bytes(low_rank, x)
            total[route] = saved[route] + 8 * sum(p.numel() for p in low_rank.parameters())
            thin = 4 * sum(pixels)
    assert saved["merged"] == saved["dense"] + formed and saved["factorized"] == saved["dense"] + thin + folded
    assert total["factorized"] < 0.93 * total["dense"] and total["merged"] < 0.96 * total["dense"]


@pytest.mark.parametrize("rows", [4, 8, 32])
def test_frozen_layers_keep_nothing_they_do_not_need(rows):
    layer = LowRankLinear(40, 30, rank=5).requires_grad_(False)
    x = torch.randn(rows, 40, requires_grad=True)
    W, US = 30 * 40 * 4, 30 * 5 * 4
    for route, weights in (("factorized", 0), ("merged", W)):
        layer.route = route
        assert saved_bytes(layer, x) == weights
        layer.V.requires_grad_(True)
        assert saved_bytes(layer, x) == x.numel() * 4 + weights + (US if route == "merged" else 0)
        layer.V.requires_grad_(False)
    layer.route = "factorized"
    layer.U.requires_grad_(True)
    assert saved_bytes(layer, x.detach()) == rows * 5 * 4
