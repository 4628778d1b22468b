"""The timed networks, as dense PyTorch modules with a batch."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condlr_ext.experiments.networks import HEAD, TransformerBlock, build


@dataclass(frozen=True)
class NetworkRank:
    """A factorized network; rank as in condlr_ext.factorize, an int or a fraction of min(m, n)."""

    network: str
    rank: int | float

    def __str__(self) -> str:
        return f"{self.network} {self.rank:.0%}" if isinstance(self.rank, float) else f"{self.network} rank {self.rank}"


@dataclass(frozen=True)
class Network:
    """A dense network. Its classifier `head` is never factorized. Without classes the loss is mean(output²)."""

    build: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    classes: int | None = None
    head: str | None = None

    def batch(self) -> tuple[Tensor, Tensor | None]:
        """Return random inputs and labels; the input of a block inside a network (no classes) requires a gradient."""
        if len(self.input_shape) == 4:  # channels_last by its strides, also with one channel
            B, C, H, W = self.input_shape
            x = torch.randn(B, H, W, C).movedim(-1, 1)
        else:
            x = torch.randn(self.input_shape)
        if self.classes is None:
            return x.requires_grad_(), None
        return x, torch.randint(0, self.classes, self.input_shape[:1])

    def loss(self, output: Tensor, y: Tensor | None) -> Tensor:
        return output.square().mean() if y is None else F.cross_entropy(output, y)


def classifier(name: str, batch: int, *shape: int) -> Network:
    """Return a network of the experiments for inputs of this shape, with ten classes."""
    return Network(lambda: build(name, shape, 10), (batch, *shape), 10, HEAD)


def mlp_block(n: int) -> nn.Module:
    return nn.Sequential(nn.Linear(n, n), nn.GELU(), nn.Linear(n, n))


def transformer() -> nn.Module:
    """Return the linear layers of twelve blocks of width 768: query, key, value, output, MLP."""
    block = [(768, 768)] * 4 + [(768, 3072), (3072, 768)]
    return nn.Sequential(*(nn.Linear(n, m) for n, m in block * 12))


def vit_block(width: int, heads: int) -> nn.Module:
    return TransformerBlock(width, heads)


def gpt_block(width: int, heads: int) -> nn.Module:
    return TransformerBlock(width, heads, causal=True)


NETWORKS = {
    "digits MLP": classifier("mlp", 32, 64),
    "LeNet5": classifier("lenet5", 128, 1, 28, 28),
    "VGG16": classifier("vgg16", 128, 3, 32, 32),
    "WRN16-4": classifier("wrn16-4", 128, 3, 32, 32),
    "ViT block": Network(lambda: vit_block(384, 6), (16, 197, 384)),  # that of ViT-S/16 on images 224 x 224
    "GPT block": Network(lambda: gpt_block(768, 12), (2, 1024, 768)),  # that of GPT-2
    "MLP block 1024": Network(lambda: mlp_block(1024), (2048, 1024)),
    "MLP block 4096": Network(lambda: mlp_block(4096), (2048, 4096)),
    "transformer": Network(transformer, (1, 768)),  # for the step alone
    "small LeNet5": classifier("lenet5", 4, 1, 16, 16),
    "small ViT block": Network(lambda: vit_block(24, 2), (2, 5, 24)),
    "small GPT block": Network(lambda: gpt_block(16, 2), (2, 7, 16)),
}
SMALL = [NetworkRank("digits MLP", 0.2), NetworkRank("small ViT block", 0.5), NetworkRank("small GPT block", 3)]
FRACTIONS = (0.2, 0.5)
CLASSIC = ("LeNet5", "VGG16", "WRN16-4")
BLOCKS = ("ViT block", "GPT block")
MLP_BLOCKS = ("MLP block 1024", "MLP block 4096")


def at(names: tuple[str, ...], fractions: tuple[float, ...] = FRACTIONS) -> list[NetworkRank]:
    return [NetworkRank(name, fraction) for name in names for fraction in fractions]
