"""The least arithmetic and memory traffic of a network: forward, backward, step and inference."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from condlr_ext.experiments.networks import Attention, TransformerBlock, WideBlock

from .cases.networks import Network
from .registry import Work

_ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.GELU)
STEP_NUMBERS = {"SGD": 5, "AdamW": 7}  # moved per parameter: it, gradient and buffers read, it and buffers written


@dataclass(frozen=True)
class LayerCost:
    """A layer with weight m x n and `rows` rows of (unfolded) input; the first of a network has no input gradient."""

    name: str
    m: int
    n: int
    rows: int
    first: bool = False

    def weights(self, r: int | None) -> int:
        """Return the numbers that a forward reads: V and U S at rank r, the dense weight for None."""
        return self.m * self.n if r is None else r * (self.m + self.n)

    def forward(self, r: int | None) -> int:
        """Return the flops of Y = X Wᵀ, or of the cheaper of X V, then U S, and W formed, then the dense product."""
        m, n, N = self.m, self.n, self.rows
        dense = 2 * N * m * n
        return dense if r is None else min(2 * N * r * (m + n) + 2 * min(N, m) * r * r, dense + 2 * m * n * r)

    def backward(self, r: int | None) -> int:
        """Return the flops of dW and, but for the first layer, dX; or of the cheaper of the factorized forms with dS,
        and dU, dS, dV formed of dW.
        """
        m, n, N = self.m, self.n, self.rows
        both = 1 if self.first else 2
        dense = both * 2 * N * m * n
        if r is None:
            return dense
        return min(2 * 2 * N * m * r + both * 2 * N * n * r + 2 * 2 * min(N, m) * r * r, dense + 2 * 2 * m * n * r)

    def folded(self, r: int) -> int:
        """Return the flops of a forward with U S, or W, formed before."""
        return 2 * self.rows * min(self.weights(r), self.weights(None))


@dataclass(frozen=True)
class Passes:
    """Flops and moved numbers of modules without weights."""

    flops: tuple[float, float]  # forward, backward
    numbers: tuple[int, int]


@dataclass(frozen=True)
class NetworkCost:
    """The cost of a network, in parts that follow each other: products, attention, elementwise passes.

    The methods take the ranks of the factorized layers by name and the bytes of a number.
    """

    layers: list[LayerCost]
    attention: Passes
    elementwise: Passes

    def forward(self, ranks: dict[str, int], size: int = 4) -> list[Work]:
        return self._parts(0, sum(x.forward(ranks.get(x.name)) for x in self.layers), self._weights(ranks), size)

    def backward(self, ranks: dict[str, int], size: int = 4) -> list[Work]:
        """Return the work of a backward, which reads the weights and writes their gradients."""
        return self._parts(1, sum(x.backward(ranks.get(x.name)) for x in self.layers), 2 * self._weights(ranks), size)

    def inference(self, ranks: dict[str, int], size: int = 4) -> list[Work]:
        """Return the work of a forward for which products of factors were formed before."""
        flops = weights = 0
        for x in self.layers:
            r = ranks.get(x.name)
            flops += x.forward(None) if r is None else x.folded(r)
            weights += x.weights(None) if r is None else min(x.weights(r), x.weights(None))
        return self._parts(0, flops, weights, size)

    def step(self, ranks: dict[str, int], parameters: Iterable[int], numbers: int = STEP_NUMBERS["SGD"]) -> list[Work]:
        """Return the work of a step.

        A factor takes 8 m r² flops: UᵀB, U(UᵀB), the preconditioner, half a Gram matrix, a triangular product; a core
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
    """Count the cost of the dense network in one run on the meta device.

    - Batch norm, with the activation after it: 3 + 5 passes over memory, forward and backward (reads twice and writes;
      reads gradient and input twice and writes).
    - Layer norm: 2 + 3, since rows fit into a cache.
    - Activation alone, residual: 2 + 2.
    - Attention: 4 + 8 times the size of queries, in 2 + 4 products with T x T scores, half of them if causal.
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
