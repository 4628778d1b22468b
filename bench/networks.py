"""The networks that are timed, as dense PyTorch modules with the batch they are trained on."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Network:
    """A dense network; `head`, the classifier, is never factorised. Without classes the loss is ‖output‖²."""

    name: str
    build: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    classes: int | None = 10
    head: str | None = "head"
    quick: bool = False  # small enough for a smoke run

    def batch(self) -> tuple[Tensor, Tensor | None]:
        """Random inputs and labels. A block inside a network (no classes) owes its input a gradient."""
        x = torch.randn(self.input_shape)
        if x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        if self.classes is None:
            return x.requires_grad_(), None
        return x, torch.randint(0, self.classes, self.input_shape[:1])

    def loss(self, output: Tensor, y: Tensor | None) -> Tensor:
        return output.square().mean() if y is None else F.cross_entropy(output, y)


def digits_mlp() -> nn.Module:
    hidden = [nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU()]
    return nn.Sequential(OrderedDict(body=nn.Sequential(*hidden), head=nn.Linear(256, 10)))


def lenet5() -> nn.Module:
    body = [nn.Conv2d(1, 20, 5), nn.LeakyReLU(), nn.MaxPool2d(2)]
    body += [nn.Conv2d(20, 50, 5), nn.LeakyReLU(), nn.MaxPool2d(2)]
    body += [nn.Flatten(), nn.Linear(800, 500), nn.LeakyReLU()]
    return nn.Sequential(OrderedDict(body=nn.Sequential(*body), head=nn.Linear(500, 10)))


def vgg16() -> nn.Module:
    body, channels = [], 3
    for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            body += [nn.Conv2d(channels, width, 3, padding=1, bias=False)]
            body += [nn.BatchNorm2d(width, momentum=0.9), nn.LeakyReLU()]
            channels = width
        body.append(nn.MaxPool2d(2))
    body += [nn.Flatten(), nn.Linear(512, 512), nn.LeakyReLU(), nn.Linear(512, 512), nn.LeakyReLU(), nn.Dropout(0.2)]
    return nn.Sequential(OrderedDict(body=nn.Sequential(*body), head=nn.Linear(512, 10)))


class WideBlock(nn.Module):
    """Pre-activation residual block; a 1x1 shortcut where the shape changes."""

    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(width)
        self.act = nn.LeakyReLU()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.shortcut = None if channels == width else nn.Conv2d(channels, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.norm1(x))
        shortcut = x if self.shortcut is None else self.shortcut(h)
        return shortcut + self.conv2(self.act(self.norm2(self.conv1(h))))


def wrn16_4() -> nn.Module:
    body, channels = [nn.Conv2d(3, 16, 3, padding=1, bias=False)], 16
    for width, stride in ((64, 1), (128, 2), (256, 2)):
        body += [WideBlock(channels, width, stride), WideBlock(width, width, 1)]
        channels = width
    body += [nn.BatchNorm2d(256), nn.LeakyReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(OrderedDict(body=nn.Sequential(*body), head=nn.Linear(256, 10)))


def transformer_mlp(n: int) -> nn.Module:
    return nn.Sequential(nn.Linear(n, n), nn.GELU(), nn.Linear(n, n))


NETWORKS = (
    Network("digits MLP", digits_mlp, (32, 64), quick=True),
    Network("LeNet5", lenet5, (128, 1, 28, 28)),
    Network("VGG16", vgg16, (128, 3, 32, 32)),
    Network("WRN16-4", wrn16_4, (128, 3, 32, 32)),
    Network("MLP block 1024", lambda: transformer_mlp(1024), (2048, 1024), classes=None, head=None),
    Network("MLP block 4096", lambda: transformer_mlp(4096), (2048, 4096), classes=None, head=None),
)
