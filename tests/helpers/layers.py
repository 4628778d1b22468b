"""Geometries of convolutions, and layers with random parameters."""

import torch

CONVS = [
    dict(kernel_size=3),
    dict(kernel_size=3, padding=1, bias=False),
    dict(kernel_size=3, stride=2, padding=2, dilation=2),
    dict(kernel_size=2, padding="same", dilation=3),
    dict(kernel_size=3, padding="valid", groups=2),
    dict(kernel_size=3, padding=2, padding_mode="reflect"),
    dict(kernel_size=3, padding="same", padding_mode="circular", groups=2),
    dict(kernel_size=3, padding=1, padding_mode="replicate", stride=2),
    dict(kernel_size=1),
    dict(kernel_size=3, padding="same", dilation=2, groups=2),
    dict(kernel_size=2, padding="same", padding_mode="reflect", dilation=3, bias=False),
    dict(kernel_size=3, stride=2, padding=3, dilation=2, groups=2, padding_mode="circular"),
]


def randomize(layer):
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn_like(p))
    return layer
