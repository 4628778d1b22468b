"""Costs of each way to run a layer on a GPU: measured where the table has a similar size, otherwise estimated.

An estimate is a sum over kernels, each as long as its arithmetic or its memory traffic at the rates of the data sheet,
or as a launch. It ranks the ways; it does not predict times. On a device without a measurement and a data sheet, plain
PyTorch serves the layers.
"""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from . import tables
from .tables import Costs

BLOCK = 64  # rows of one program of the forward kernel
LAUNCH = 4e-6  # seconds of the shortest kernel
LIBRARY = 0.75  # fraction of peak arithmetic that a library's products reach
KERNEL = 0.5  # the same for our kernels: a guess, they have not yet run on a GPU
L2 = 80e9  # bytes/s that one multiprocessor reads from the L2 cache


class Size(NamedTuple):
    """Sizes of a layer: rows or pixels of Y, V [n, r] and U [m, r], elements of X, bytes of one.

    The first half of a convolution (conv) is torch's.
    """

    rows: int
    n: int
    m: int
    r: int
    numbers: int
    itemsize: int
    conv: bool


class Rates(NamedTuple):
    """Peak bytes/s, and peak flop/s in float16 or bfloat16, tf32, float32, float64."""

    memory: float
    half: float
    tf32: float
    single: float
    double: float


# data sheets of A100, H100, B200, MI300X
_RATES = {
    (8, 0): Rates(2.0e12, 312e12, 156e12, 19.5e12, 19.5e12),
    (9, 0): Rates(3.3e12, 990e12, 495e12, 67e12, 67e12),
    (10, 0): Rates(8.0e12, 2250e12, 1100e12, 80e12, 40e12),
    (9, 4): Rates(5.3e12, 1307e12, 654e12, 163e12, 163e12),
}
_OTHER = Rates(0.9e12, 140e12, 70e12, 35e12, 0.6e12)  # a desktop card, for the choice among torch's products
UNKNOWN = "plain PyTorch: neither measured nor known"


def linear(direction: str, rows_of: Tensor, U: Tensor, V: Tensor) -> Costs:
    """Return the costs of a linear layer in a direction, "forward" or "backward"; rows_of is X or the gradient of Y."""
    rows = math.prod(reference.sizes(rows_of)[:-1])
    n, (m, r) = V.shape[0], U.shape
    return costs(direction, rows_of.dtype, rows_of.device, Size(rows, n, m, r, rows * n, rows_of.itemsize, False))


def conv(direction: str, input: Tensor, rows: int, U: Tensor, V: Tensor) -> Costs:
    """Return the costs of a convolution with `rows` output pixels, whose first half is torch's."""
    size = Size(rows, V.shape[0], *U.shape, math.prod(reference.sizes(input)), input.itemsize, True)
    return costs(direction, input.dtype, input.device, size)


def pixels(shape, kernel_size, stride, padding, dilation) -> int:
    """Return the number of output pixels of a convolution, over the batch, for an input of this shape."""
    rows = shape[0]
    for size, k, s, p, d in zip(shape[2:], kernel_size, stride, padding, dilation, strict=True):
        rows *= (size + 2 * p - d * (k - 1) - 1) // s + 1
    return rows


def costs(direction: str, dtype: torch.dtype, device: torch.device, size: Size) -> Costs:
    """Return the costs measured on this kind of device at the nearest size, or estimated ones.

    A measured size may differ by a factor of 2 in each number. Traced code cannot look up the table and estimates.
    """
    precision = _precision(dtype, size.conv)
    return (estimate if torch.compiler.is_compiling() else _known)(direction, precision, device, size)


@functools.lru_cache(maxsize=4096)
def _known(direction: str, precision: str, device: torch.device, size: Size) -> Costs:
    table = tables.of(torch.cuda.get_device_name(device))
    found = table and table.find(direction, "conv" if size.conv else "linear", precision, *size[:4])
    return found or estimate(direction, precision, device, size)


def source(device: torch.device) -> str:
    """Return what the costs on this device rest on."""
    table = tables.of(torch.cuda.get_device_name(device))
    if table:
        return table.source
    return UNKNOWN if _rates(device) is None else "estimated from the data sheet"


def _precision(dtype: torch.dtype, conv: bool) -> str:
    if dtype == torch.float32:
        backend = torch.backends.cudnn.conv if conv else torch.backends.cuda.matmul
        return "tf32" if backend.fp32_precision == "tf32" else "float32"
    return str(dtype).removeprefix("torch.")


# what torch.compiler.assume_constant_result sets, without importing torch._dynamo: it cannot trace fp32_precision
_precision._dynamo_marked_constant = True


def estimate(direction: str, precision: str, device: torch.device, size: Size) -> Costs:
    """Return the costs from the rates of the device."""
    known = _rates(device)
    rates = known or _OTHER
    flops = getattr(rates, {"tf32": "tf32", "float32": "single", "float64": "double"}.get(precision, "half"))
    programs = torch.cuda.get_device_properties(device).multi_processor_count
    cost = (_forward if direction == "forward" else _backward)(size, rates.memory, flops, programs)
    kernels, *others = (1e6 * seconds for seconds in cost)
    return Costs(kernels if known else math.inf, *others, "estimated" if known else UNKNOWN)


def _rates(device: torch.device) -> Rates | None:
    properties = torch.cuda.get_device_properties(device)
    return _RATES.get((properties.major, properties.minor))


def _forward(size: Size, memory: float, flops: float, programs: int):
    rows, n, m, r, numbers, itemsize, conv = size

    def product(a, b, c, moved):
        return max(LAUNCH, 2 * a * b * c / (LIBRARY * flops), itemsize * moved / memory)

    first = product(rows, n, r, numbers + n * r + rows * r)
    core = product(min(rows, m), r, r, r * (r + 2 * min(rows, m)))
    last = product(rows, r, m, rows * r + r * m + rows * m)
    bias = 0 if conv else product(0, 0, 0, 2 * rows * m)  # a convolution adds it itself
    dense = product(rows, n, m, numbers + n * m + rows * m)
    form = product(m, r, n, n * r + m * r + m * n) + product(min(m, n), r, r, 0)
    chain = _chain(rows, 0 if conv else n, m, r, itemsize, memory, flops, programs)
    return chain + (first if conv else 0), first + core + last + bias, form + dense, dense


def _chain(rows, n, m, r, itemsize, memory: float, flops: float, programs: int) -> float:
    """Return the time of the forward kernel, whose programs share memory bandwidth and each read U and V from L2."""
    blocks = (rows + BLOCK - 1) // BLOCK
    waves = (blocks + programs - 1) // programs
    arithmetic = 2 * BLOCK * r * (n + m + r) * programs / (KERNEL * flops)
    cache = itemsize * r * (n + m + r) / L2
    moved = itemsize * rows * (n + m + r) / memory
    return LAUNCH + max(waves * max(arithmetic, cache), moved)


def _backward(size: Size, memory: float, flops: float, programs: int):
    rows, n, m, r, numbers, itemsize, conv = size

    def product(a, b, c, moved):
        return max(LAUNCH, 2 * a * b * c / (LIBRARY * flops), itemsize * moved / memory)

    of_Y = product(rows, m, r, rows * m + m * r + rows * r)  # Q = G U, Gᵀ P
    of_X = product(rows, n, r, numbers + n * r + rows * r)  # dX, Xᵀ Q
    core = product(min(rows, m), r, r, r * (r + 2 * min(rows, m)))
    db = product(0, 0, 0, rows * m)
    products = 2 * of_Y + 2 * of_X + 3 * core + product(r, rows, r, 2 * rows * r) + db
    ours = m + (0 if conv else n)
    sums = max(2 * rows * r * (ours + r) / (KERNEL * flops), itemsize * rows * (ours + 2 * r) / memory)
    combine = max(2 * r * r * ours / (KERNEL * flops), 8 * 4 * r * ours / memory)  # 4 splits, written and read
    triton = _chain(rows, m, ours - m, r, itemsize, memory, flops, programs) + 2 * LAUNCH + sums + combine
    dense = product(rows, m, n, rows * m + n * m + numbers) + product(m, rows, n, rows * m + n * m + numbers) + db
    form = product(m, r, n, n * r + m * r + m * n) + product(min(m, n), r, r, 0)
    return triton + (2 * of_X if conv else 0), products, 3 * form + dense, dense
