"""How much arithmetic and memory traffic a network needs at least: its forward, backward, step and inference."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from condlr_ext.experiments.networks import Attention, TransformerBlock, WideBlock

from .cases.networks import Network
from .registry import Work

_ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.GELU)
STEP_NUMBERS = {"SGD": 5, "AdamW": 7}  # per parameter: it, gradient and buffers read, it and the buffers written


@dataclass(frozen=True)
class LayerCost:
    """A layer with weight m x n applied to `rows` rows of its (unfolded) input."""

    name: str
    m: int
    n: int
    rows: int
    first: bool = False  # owes its input no gradient

    def weights(self, r: int | None) -> int:
        """Numbers in V and U S at rank r, which are all that a forward needs; None: in the dense weight."""
        return self.m * self.n if r is None else r * (self.m + self.n)

    def forward(self, r: int | None) -> int:
        """Flops: of Y = X Wᵀ, or the cheaper of X V, then U S, and of W formed and the dense product."""
        m, n, N = self.m, self.n, self.rows
        dense = 2 * N * m * n
        return dense if r is None else min(2 * N * r * (m + n) + 2 * min(N, m) * r * r, dense + 2 * m * n * r)

    def backward(self, r: int | None) -> int:
        """Flops: of dW and, but for the first layer, dX; or of their factorized forms with dS, or dU, dS, dV of dW."""
        m, n, N = self.m, self.n, self.rows
        both = 1 if self.first else 2
        dense = both * 2 * N * m * n
        if r is None:
            return dense
        return min(2 * 2 * N * m * r + both * 2 * N * n * r + 2 * 2 * min(N, m) * r * r, dense + 2 * 2 * m * n * r)

    def folded(self, r: int) -> int:
        """Flops of a forward where U S, or W, has been formed before."""
        return 2 * self.rows * min(self.weights(r), self.weights(None))


@dataclass(frozen=True)
class Passes:
    """Flops and numbers moved by what has no weights."""

    flops: tuple[float, float]  # forward, backward
    numbers: tuple[int, int]


@dataclass(frozen=True)
class NetworkCost:
    """Parts that follow each other: products, attention, elementwise passes. ranks: of the factorized layers by name;
    size: bytes of a number.
    """

    layers: list[LayerCost]
    attention: Passes
    elementwise: Passes

    def forward(self, ranks: dict[str, int], size: int = 4) -> list[Work]:
        return self._parts(0, sum(x.forward(ranks.get(x.name)) for x in self.layers), self._weights(ranks), size)

    def backward(self, ranks: dict[str, int], size: int = 4) -> list[Work]:
        """The weights are read, their gradients written."""
        return self._parts(1, sum(x.backward(ranks.get(x.name)) for x in self.layers), 2 * self._weights(ranks), size)

    def inference(self, ranks: dict[str, int], size: int = 4) -> list[Work]:
        """Whatever can be formed of the factors beforehand has been."""
        flops = weights = 0
        for x in self.layers:
            r = ranks.get(x.name)
            flops += x.forward(None) if r is None else x.folded(r)
            weights += x.weights(None) if r is None else min(x.weights(r), x.weights(None))
        return self._parts(0, flops, weights, size)

    def step(self, ranks: dict[str, int], parameters: Iterable[int], numbers: int = STEP_NUMBERS["SGD"]) -> list[Work]:
        """Per factor 8 m r²: UᵀB, U(UᵀB), the preconditioner, half a Gram matrix, a triangular product; per core
        4 r³. Memory: `numbers` per parameter, in float32.
        """
        flops = sum(8 * (x.m + x.n) * r * r + 4 * r**3 for x in self.layers if (r := ranks.get(x.name)))
        return [Work(flops, numbers * 4 * sum(parameters))]

    def _weights(self, ranks: dict[str, int]) -> int:
        return sum(x.weights(ranks.get(x.name)) for x in self.layers)

    def _parts(self, way: int, flops: float, weights: int, size: int) -> list[Work]:
        attention = Work(self.attention.flops[way], size * self.attention.numbers[way])
        return [Work(flops, size * weights), attention, Work(bytes=size * self.elementwise.numbers[way])]


def network_cost(net: Network) -> NetworkCost:
    """Counts the dense network by running it once on the meta device.

    Elementwise passes over memory, forward and backward, an activation fused with the batch norm before it: 3 + 5 with
    one (reads twice and writes; reads gradient and input twice and writes), 2 + 3 with a layer norm (rows fit into a
    cache), 2 + 2 for an activation alone and for a residual. Attention moves queries, keys, values and outputs,
    4 + 8 times the size of one, in 2 + 4 products with T x T scores, half of them where it is causal.
    """
    model = net.build().to("meta")
    layers, normed = [], []
    flops, attended, passed = [0, 0], [0, 0], [0, 0]

    def add(total: list, numel: float, forward: int, backward: int) -> None:
        total[0] += forward * numel
        total[1] += backward * numel

    def on_product(name):
        def hook(module, inputs, output):
            W = module.weight.flatten(1)
            first = not layers and net.classes is not None
            layers.append(LayerCost(name, *W.shape, output.numel() // W.shape[0], first))

        return hook

    def on_norm(module, inputs, output):
        add(passed, output.numel(), 3, 5)
        normed.append(id(output))

    def on_layer_norm(module, inputs, output):
        add(passed, output.numel(), 2, 3)

    def on_activation(module, inputs, output):
        if id(inputs[0]) not in normed:
            add(passed, output.numel(), 2, 2)

    def on_residual(module, inputs, output):
        add(passed, output.numel(), 2, 2)

    def on_residuals(module, inputs, output):
        add(passed, 2 * output.numel(), 2, 2)

    def on_attention(module, inputs, output):
        B, T, D = output.shape
        pairs = B * (T * (T + 1) // 2 if module.causal else T * T)
        add(flops, 2 * pairs * D, 2, 4)
        add(attended, B * T * D, 4, 8)

    hooks = {
        nn.BatchNorm2d: on_norm,
        nn.LayerNorm: on_layer_norm,
        _ACTIVATIONS: on_activation,
        WideBlock: on_residual,
        TransformerBlock: on_residuals,
        Attention: on_attention,
    }
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.register_forward_hook(on_product(name))
        for kind, hook in hooks.items():
            if isinstance(module, kind):
                module.register_forward_hook(hook)
    with torch.no_grad():
        model(torch.empty(net.input_shape, device="meta"))
    return NetworkCost(layers, Passes(tuple(flops), tuple(attended)), Passes((0, 0), tuple(passed)))
