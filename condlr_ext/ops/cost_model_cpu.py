"""The cost model that chooses, at every call of a layer, between its factorized and its merged products.

The factorized route, thin products with V and with U S, saves work at low rank. The merged route forms W = U S Vᵀ, runs
the dense product and takes the factors' gradients from dW. It is faster at high rank, or where a side is so thin that a
second product costs more than it saves, and with many rows, since forming W costs the same for any number of them.

Costs are in flops of a large product, so the constants are ratios, which carry over between machines better than
seconds do. The choice hardly depends on them: halving or doubling one changes it only near the crossing.
`python -m bench routes` compares it with measured times. Sizes that compiled or exported code keeps open, such as the
batch, count as large (reference.sizes), so that one graph serves all of them. On GPUs the costs are those of
cost_model_gpu, in microseconds.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from . import cost_model_gpu, layers, tables
from ._dispatch import current_backend

ROUTES = ("auto", "factorized", "merged")

CHANNELS = 16  # oneDNN's convolutions pad channels to blocks of this size, except up to 3 channels of an image
MOVE = 60  # reading or writing one number of an activation
COPY = 300  # copying one number of a filter bank into another memory format, which every use of it does
FORM = 1.5  # one flop of the small products that form W or split its gradient
CALL = 10e6  # overhead of a dense layer of any size, forward and backward: autograd and the calls
CALLS = 3  # multiple of that overhead for merged layers and for convolutions
KERNELS = 0.55  # time of one flop of the compiled kernels
FEWER_CALLS = 1.5  # the same for factorized linear layers: small ones are one compiled call each way


class Plan(NamedTuple):
    """Costs of one call and of its backward, if any, by each route and of the dense layer; and their source.

    In flops of a large product if estimated for a CPU, else in microseconds.
    """

    factorized: float
    merged: float
    dense: float
    source: str = "estimated"

    @property
    def route(self) -> str:
        """Name of the cheaper route."""
        return "merged" if self.merged < self.factorized else "factorized"

    @property
    def gain(self) -> float:
        """Predicted time of the dense layer over that of the cheaper route."""
        return self.dense / min(self.factorized, self.merged)


def choose(plan: Callable[..., Plan], input: Tensor, *args) -> str:
    """Return the route that plan (linear or conv) finds cheaper.

    It is "factorized" if the backend is "triton", and in torch.jit.trace, where sizes are tensors.
    """
    if current_backend() == "triton" or torch.jit.is_tracing():
        return "factorized"
    return plan(input, *args).route if input.is_cpu or input.is_cuda else "factorized"


def linear(input: Tensor, U: Tensor, S: Tensor, V: Tensor, bias: Tensor | None) -> Plan:
    """Return the costs of low_rank_linear on these arguments, from their sizes and requires_grad."""
    if input.is_cuda:
        fused = not layers.low_rank_linear.unsupported_reasons("triton", input, U, S, V, bias)
        return _on_gpu(lambda direction: cost_model_gpu.linear(direction, input, U, V), fused, input, U, S, V)
    (m, r), n, numbers = U.shape, V.shape[0], math.prod(reference.sizes(input))
    gradients = _gradients(input, U, S, V)
    if plan := _measured("linear", input.dtype, gradients, numbers // n, n, m, r):
        return plan
    rate = KERNELS if layers.is_served(input, U) else 1
    return _cost_model(n)(m, n, r, numbers, numbers // n, r, n * r, r * m, m * n, 0, FEWER_CALLS, rate, *gradients)


def conv(input, U, S, V, bias, kernel_size, stride, padding, dilation, groups) -> Plan:
    """Return the costs of low_rank_conv on these arguments, from their sizes and requires_grad."""
    geometry = kernel_size, stride, padding, dilation, groups
    if input.is_cuda:
        fused = not layers.low_rank_conv.unsupported_reasons("triton", input, U, S, V, bias, *geometry)
        rows = cost_model_gpu.pixels(reference.sizes(input), *geometry[:-1])
        return _on_gpu(lambda direction: cost_model_gpu.conv(direction, input, rows, U, V), fused, input, U, S, V)
    (m, r), n, shape = U.shape, V.shape[0], reference.sizes(input)
    numbers, rows, taps = math.prod(shape), cost_model_gpu.pixels(shape, *geometry[:-1]), math.prod(kernel_size)
    gradients = _gradients(input, U, S, V)
    if groups == 1 and (plan := _measured("conv", input.dtype, gradients, rows, n, m, r)):
        return plan
    channels = n // taps
    fan_in = taps * (channels if channels <= 3 else _blocks(channels))
    filters = groups * _blocks(m // groups) if m > groups else m
    core = _blocks(r)
    products = groups * core * fan_in, core * filters, filters * fan_in
    return _cost_model(n)(m, n, r, numbers, rows, groups * r, *products, COPY, CALLS, 1, *gradients)


def conv_transpose(input: Tensor, U: Tensor, S: Tensor, V: Tensor, groups: int) -> Plan:
    """Return the costs of a low-rank transposed convolution, in flops on every device."""
    (m, r), n, numbers = U.shape, V.shape[0], math.prod(reference.sizes(input))
    products = r * n, groups * r * m, m * n
    gradients = _gradients(input, U, S, V)
    return _cost_model(n)(m, n, r, numbers, numbers // n, groups * r, *products, COPY, CALLS, 1, *gradients)


def embedding(input: Tensor, U: Tensor, S: Tensor, V: Tensor) -> Plan:
    """Return the costs of a low-rank lookup of as many rows as the input has entries, in flops on every device."""
    (m, r), n, rows = U.shape, V.shape[0], math.prod(reference.sizes(input))
    passes, copied = 1 + 2 * _gradients(input, U, S, V)[0], MOVE * rows * n
    products = 2 * r * (r + n) * passes
    return Plan(rows * products + copied, m * products + copied, copied)


def bilinear(input1: Tensor, U: Tensor, S: Tensor, V: Tensor) -> Plan:
    """Return the costs of a low-rank bilinear layer without those of the outer products, in flops on every device."""
    (m, r), n, shape = U.shape, V.shape[0], reference.sizes(input1)
    rows = math.prod(shape[:-1])
    gradients = _gradients(input1, U, S, V)
    return _cost_model(n)(m, n, r, rows * shape[-1], rows, r, n * r, r * m, m * n, 0, CALLS, 1, *gradients)


def _measured(layer: str, dtype: torch.dtype, gradients: tuple[bool, bool], *size: int) -> Plan | None:
    """Return the plan by the times measured on this CPU; None without any, or where code is traced."""
    if torch.compiler.is_compiling():
        return None
    direction = "both" if any(gradients) else "forward"
    costs = tables.on_cpu(direction, layer, dtype, torch.get_num_threads(), *size)
    return costs and Plan(min(costs.kernels, costs.products), costs.merged, costs.dense, costs.source)


def _on_gpu(costs, fused: bool, input, U, S, V) -> Plan:
    """Return the plan from the costs of each direction that will run; fused: Triton kernels serve the layer."""
    directions = [costs("forward")] + ([costs("backward")] if any(_gradients(input, U, S, V)) else [])
    factorized = sum(min(c.kernels if fused else c.products, c.products) for c in directions)
    merged, dense = (sum(getattr(c, name) for c in directions) for name in ("merged", "dense"))
    return Plan(factorized, merged, dense, "; ".join(dict.fromkeys(c.source for c in directions)))


def _blocks(channels: int) -> int:
    return (channels + CHANNELS - 1) // CHANNELS * CHANNELS


def _gradients(input: Tensor, U: Tensor, S: Tensor, V: Tensor) -> tuple[bool, bool]:
    """Return whether a backward will need the gradients of the factors, and of the input."""
    graph = torch.is_grad_enabled()
    return graph and (U.requires_grad or S.requires_grad or V.requires_grad), graph and input.requires_grad


def _cost_model(n):
    """Return `_plan`, cached unless code is traced, where sizes of the factors may be symbols."""
    return _plan if torch.compiler.is_compiling() or type(n) is not int else _remembered


def _plan(m, n, r, numbers, rows, width, first, second, full, copy, calls, rate, factors, image) -> Plan:
    """Return the plan.

    Args:
        m: Rows of U [m, r].
        n: Rows of V [n, r].
        r: Rank.
        numbers: Elements of the input.
        rows: Rows or pixels of the output.
        width: Elements of P for each row.
        first: Multiply-adds of the product with V for each row.
        second: Those of the product with U S.
        full: Those of the dense product.
        copy: Cost of copying an element of the weights.
        calls: Calls of the factorized route.
        rate: Time of a flop of the factorized route over that of torch's products.
        factors: Whether the gradients of the factors are needed.
        image: Whether the gradient of the input is needed.
    """
    passes = 1 + factors + image
    P = rows * width
    outer = (numbers + rows * m) * passes  # traffic of every route
    form = r * min(m * (r + n), n * (r + m))

    thin = first * passes + second * (1 + factors + (factors or image))
    factorized = rate * 2 * rows * thin + MOVE * (outer + P * (2 + 3 * factors + 2 * image))
    factorized += FORM * 2 * min(rows, m) * r * r * (1 + 3 * factors) + copy * n * r * 2 * passes

    dense = 2 * rows * full * passes + MOVE * outer + copy * m * n * passes
    merged = FORM * 2 * (form * (1 + image) + factors * (m * n * r + 2 * m * r * r + form))
    merged += dense + copy * m * n * passes
    return Plan(factorized + calls * CALL, merged + CALLS * CALL, dense + CALL)


_remembered = functools.lru_cache(maxsize=4096)(_plan)
