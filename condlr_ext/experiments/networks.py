"""Dense networks of the experiments and benchmarks, by name. The classifier is called "head".

Each is built for the shape [C, H, W] of its images, or of any sample for "mlp", and a number of classes. Inputs are in
[0, 1]: the normalization of a data set is the network's first layer, so that attacks see what the sensor sees.

Sources: LeNet5, VGG16 and WRN16-4 as in the experiments of CondLR (NeurIPS 2023), with the residual additions that
its released code leaves out; "cnn" is LeNet5 for 8 x 8 digits.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAD = "head"


class Normalize(nn.Module):
    """(x - mean) / std by channel; x [B, C, H, W]."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def _network(body: Sequence[nn.Module], features: int, classes: int) -> nn.Sequential:
    return nn.Sequential(OrderedDict(body=nn.Sequential(*body), head=nn.Linear(features, classes)))


def mlp(shape: Sequence[int], classes: int, hidden: int = 256) -> nn.Sequential:
    """Return n - 256 - 256 - classes with ReLU."""
    return nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            fc1=nn.Linear(math.prod(shape), hidden),
            relu1=nn.ReLU(),
            fc2=nn.Linear(hidden, hidden),
            relu2=nn.ReLU(),
            head=nn.Linear(hidden, classes),
        )
    )


def cnn(shape: Sequence[int], classes: int) -> nn.Sequential:
    """Return convolutions 3 x 3 of 20 and 50 channels, each pooled, a layer of 200 (8 x 8 images); LeakyReLU."""
    channels, height, width = shape
    features = 50 * (height // 4) * (width // 4)
    body = [nn.Conv2d(channels, 20, 3, padding=1), nn.LeakyReLU(), nn.MaxPool2d(2)]
    body += [nn.Conv2d(20, 50, 3, padding=1), nn.LeakyReLU(), nn.MaxPool2d(2)]
    body += [nn.Flatten(), nn.Linear(features, 200), nn.LeakyReLU()]
    return _network(body, 200, classes)


def lenet5(shape: Sequence[int], classes: int) -> nn.Sequential:
    """Return a network of 430 500 weights for images [1, 28, 28] and 10 classes."""
    channels, height, width = shape
    features = 50 * ((height // 2 - 6) // 2) * ((width // 2 - 6) // 2)
    body = [nn.Conv2d(channels, 20, 5), nn.LeakyReLU(), nn.MaxPool2d(2)]
    body += [nn.Conv2d(20, 50, 5), nn.LeakyReLU(), nn.MaxPool2d(2)]
    body += [nn.Flatten(), nn.Linear(features, 500), nn.LeakyReLU()]
    return _network(body, 500, classes)


def vgg16(shape: Sequence[int], classes: int) -> nn.Sequential:
    """Return a network of 15 239 872 weights for images [3, 32, 32] and 10 classes."""
    channels, height, width = shape
    body = []
    for out, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            body += [nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out, momentum=0.9)]
            body.append(nn.LeakyReLU())
            channels = out
        body.append(nn.MaxPool2d(2))
    body += [nn.Flatten(), nn.Linear(512 * (height // 32) * (width // 32), 512), nn.LeakyReLU()]
    body += [nn.Linear(512, 512), nn.LeakyReLU(), nn.Dropout(0.2)]
    return _network(body, 512, classes)


class WideBlock(nn.Module):
    """Pre-activation residual block; a 1 x 1 shortcut where the shape changes."""

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


def wrn16_4(shape: Sequence[int], classes: int) -> nn.Sequential:
    """Return a network of 2 745 264 weights for images [3, 32, 32] and 10 classes; any image size."""
    body, channels = [nn.Conv2d(shape[0], 16, 3, padding=1, bias=False)], 16
    for width, stride in ((64, 1), (128, 2), (256, 2)):
        body += [WideBlock(channels, width, stride), WideBlock(width, width, 1)]
        channels = width
    body += [nn.BatchNorm2d(256), nn.LeakyReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return _network(body, 256, classes)


class Attention(nn.Module):
    """Multi-head self-attention, causal or not, with one linear layer for queries, keys and values; x [B, T, D]."""

    def __init__(self, dim: int, heads: int, causal: bool = False):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(attended.transpose(1, 2).reshape(B, T, D))


class TransformerBlock(nn.Module):
    """Pre-norm: attention, then an MLP of four times the width with GELU, both residual."""

    def __init__(self, dim: int, heads: int, causal: bool = False):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(dim), Attention(dim, heads, causal)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Vision transformer (Dosovitskiy et al., arXiv 2010.11929) on 8 x 8 patches of the image, mean-pooled."""

    def __init__(self, shape: Sequence[int], classes: int, dim: int, depth: int, heads: int):
        super().__init__()
        channels, height, width = shape
        patch = height // 8, width // 8
        self.patches = nn.Conv2d(channels, dim, patch, patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, 64, dim))
        self.blocks = nn.Sequential(*(TransformerBlock(dim, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).mT + self.position
        return self.head(self.norm(self.blocks(tokens)).mean(1))


def vit(shape: Sequence[int], classes: int) -> nn.Module:
    """Return a small ViT: width 128, 6 blocks, 4 heads; image sides are multiples of 8."""
    return ViT(shape, classes, dim=128, depth=6, heads=4)


NETWORKS: dict[str, Callable[[Sequence[int], int], nn.Module]] = {
    "mlp": mlp, "cnn": cnn, "lenet5": lenet5, "vgg16": vgg16, "wrn16-4": wrn16_4, "vit": vit,
}  # fmt: skip
_SIDES = {"cnn": 4, "lenet5": 16, "vgg16": 32, "wrn16-4": 4, "vit": 8}  # the smallest image
_MULTIPLES = {"vit": 8}


def build(name: str, shape: Sequence[int], classes: int, *, mean: Sequence[float] | None = None, std=None) -> nn.Module:
    """Return a dense network with torch's initialization.

    Args:
        name: One of NETWORKS.
        shape: Shape of one sample, [C, H, W]; "mlp" takes any.
        classes: Outputs of the head.
        mean: One value per channel, subtracted first.
        std: One value per channel, the divisor after that.

    Raises:
        ValueError: An unknown name, or a shape that the network does not take.
    """
    if name not in NETWORKS:
        raise ValueError(f"network: must be one of {', '.join(NETWORKS)}, got {name!r}")
    if name != "mlp":
        side, multiple = _SIDES[name], _MULTIPLES.get(name, 1)
        if len(shape) != 3 or min(shape[1:]) < side or any(s % multiple for s in shape[1:]):
            rule = f" in multiples of {multiple}" if multiple > 1 else ""
            raise ValueError(
                f"network: {name} takes images [C, H, W] with H, W >= {side}{rule}, got samples {list(shape)}"
            )
    model = NETWORKS[name](shape, classes)
    if mean is None:
        return model
    return nn.Sequential(OrderedDict(normalize=Normalize(mean, std), network=model))


def place(model: nn.Module, device: str) -> nn.Module:
    """Move the model, in place, to the device, in the image format in which convolutions are fast, on CPUs too."""
    return model.to(device, memory_format=torch.channels_last)


def check_device(where: str, device: str) -> None:
    """Raise ValueError if the device cannot compute here."""
    try:
        torch.ones(2, dtype=torch.float32, device=device).sum().item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{where}: device must be one that is here, got {device!r}: {reason}") from None
