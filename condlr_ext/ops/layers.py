"""low_rank_linear and low_rank_conv with their backwards.

On CPUs a linear layer takes one compiled call each way where that is faster; all others are products by torch's own
libraries (oneDNN, MKL) in the cheapest order, which the "cpu" backend serves too. On GPUs Triton kernels serve the
layers unless cost_model_gpu finds the products faster. Gradients that are not asked for are empty tensors.
"""

import math

import torch
from torch import Tensor

from .. import _cpu, reference
from . import cost_model_gpu, tables
from ._dispatch import COMPILED, Op

_ON_AMD = _cpu.is_amd()


def _cpu_unsupported(input: Tensor, *_) -> list[str]:
    return [] if input.device.type == "cpu" else [f"the input is on {input.device}"]


def _check_conv(input, kernel_size, stride, padding, dilation, groups):
    """Check the arguments of direct calls; the public functions check more."""
    d = len(kernel_size)
    torch._check(groups >= 1, lambda: f"low_rank_conv: groups must be >= 1, got {groups}")
    torch._check(
        input.dim() == d + 2 and len(stride) == len(padding) == len(dilation) == d,
        lambda: f"low_rank_conv: a kernel of {d} dimensions needs an input of {d + 2}, got {list(input.shape)}",
    )


def _conv(input, U, S, V, bias, *geometry):
    _check_conv(input, *geometry)
    return reference.low_rank_conv(input, U, S, V, bias, *geometry)


def _or_empty(backward):
    """Make gradients that are not asked for empty tensors, and the others contiguous except dX."""

    def run(grad, *args):
        dX, *factors = (grad.new_empty(0) if g is None else g for g in backward(grad, *args))
        return dX, *(g.contiguous() for g in factors)

    return run


_linear_backward = _or_empty(reference.low_rank_linear_backward)
_conv_backward = _or_empty(reference.low_rank_conv_backward)

_LIBRARIES = "torch's products"
_KERNELS = _LIBRARIES if COMPILED.ops_reason else "compiled, or torch's"
_COMPILED_DTYPES = (torch.float32, torch.float64)
# of the compiled kernels; measured: with fewer rows, a product reads its matrix once and the calls decide
LEAST_ROWS = 16
IN_CACHE = 2**18  # elements of U and V; with more, threads need as many rows each
MEASURED_THREADS = 2  # up to here, on AMD, torch's products by MKL are slower than the kernels, whatever the size
LARGEST = 8e6  # elsewhere: multiply-adds of the forward times threads
_ROUTES = "routes estimated"  # by cost_model_cpu
_RULE = "kernels measured on AMD EPYC, 2026-12-01"
_LAYER = "Tensor input, Tensor U, Tensor S, Tensor V, Tensor? bias"
_GRADS = "(Tensor dX, Tensor dU, Tensor dS, Tensor dV, Tensor db)"
_FACTORS = "Tensor U, Tensor S, Tensor V, bool[5] mask"
_GEOMETRY = "int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups"


def _threads() -> int:
    return torch.get_num_threads()


# a trace cannot ask; torch.compiler.assume_constant_result sets the same, but imports all of dynamo
_threads._dynamo_marked_constant = True


def is_served(input: Tensor, U: Tensor) -> bool:
    """Return whether the compiled kernels of a factorized linear layer on a CPU are faster than torch's products.

    With or without gradients, so that a forward has the same bits.
    """
    if COMPILED.ops_reason or input.dtype not in _COMPILED_DTYPES:
        return False
    *lead, width = reference.sizes(input)
    rows, factors, threads = math.prod(lead), U.shape[1] * (U.shape[0] + width), _threads()
    if not torch.compiler.is_compiling():  # a trace cannot look up a table
        costs = tables.on_cpu("both", "linear", input.dtype, threads, rows, width, *U.shape)
        if costs is not None:
            return costs.kernels <= costs.products
    if rows < LEAST_ROWS * (threads if factors > IN_CACHE else 1):
        return False
    return (_ON_AMD and threads <= MEASURED_THREADS) or rows * factors * threads <= LARGEST


def _op(schema, implementation, cpu_is=_LIBRARIES, **triton) -> Op:
    def rests_on(device: str) -> str:
        if device == "cpu":
            table = tables.of(tables.cpu(), torch.get_num_threads())
            rule = _ROUTES if cpu_is == _LIBRARIES else f"{_ROUTES}, {_RULE}"
            return rule if table is None else table.source
        return cost_model_gpu.source(torch.device("cuda"))

    return Op(
        schema,
        reference=implementation,
        fake=implementation,
        cpu_unsupported=_cpu_unsupported,
        cpu_is=cpu_is,
        rests_on=rests_on,
        **triton,
    )


LARGEST_RANK = 256  # of the Triton kernels, which keep a tile [rows, rank] on chip


def _rank_unsupported(U: Tensor) -> list[str]:
    rank = U.shape[1]
    return [f"rank {rank} exceeds {LARGEST_RANK}, what stays on chip"] if rank > LARGEST_RANK else []


def _groups_unsupported(groups: int) -> list[str]:
    return [f"groups = {groups}, only 1 is served"] if groups != 1 else []


def _conv_unsupported(input, U, *rest) -> list[str]:
    layout = [] if _channels_last(input) else ["the input is not in channels_last memory format"]
    return _rank_unsupported(U) + _groups_unsupported(rest[-1]) + layout


def _channels_last(image: Tensor) -> bool:
    """Return whether the image is channels_last only; with one channel or pixel torch may answer in either format."""
    return image.movedim(1, -1).is_contiguous() and not image.is_contiguous()


def _linear_prefer_reference(input: Tensor, U: Tensor, S: Tensor, V: Tensor, bias) -> str:
    return _compare(cost_model_gpu.linear("forward", input, U, V)) if input.is_cuda else ""


def _linear_backward_prefer_reference(grad: Tensor, input, P, U: Tensor, S: Tensor, V: Tensor, mask) -> str:
    return _compare(cost_model_gpu.linear("backward", grad, U, V)) if grad.is_cuda else ""


def _conv_prefer_reference(input, U, S, V, bias, kernel_size, stride, padding, dilation, groups) -> str:
    if not input.is_cuda:
        return ""
    if reference.is_pointwise(kernel_size, stride, padding):
        return _compare(cost_model_gpu.linear("forward", input.movedim(1, -1), U, V))
    rows = cost_model_gpu.pixels(input.shape, kernel_size, stride, padding, dilation)
    return _compare(cost_model_gpu.conv("forward", input, rows, U, V))


def _conv_backward_prefer_reference(
    grad, input, P, U, S, V, mask, kernel_size, stride, padding, dilation, groups
) -> str:
    if not grad.is_cuda:
        return ""
    for name, image in ("gradient", grad), ("input", input):
        if image is not None and not _channels_last(image):
            return f"the {name} is not in channels_last memory format"
    if reference.is_pointwise(kernel_size, stride, padding):
        return _compare(cost_model_gpu.linear("backward", grad.movedim(1, -1), U, V))
    return _compare(
        cost_model_gpu.conv("backward", grad if input is None else input, grad.numel() // grad.shape[1], U, V)
    )


def _compare(costs: cost_model_gpu.Costs) -> str:
    """Return the reason to prefer products; empty if the Triton kernels are no slower."""
    if costs.kernels <= costs.products:
        return ""
    return f"products take {costs.products:.3g} us, the Triton kernels {costs.kernels:.3g} us ({costs.source})"


low_rank_linear = _op(
    f"low_rank_linear({_LAYER}) -> (Tensor output, Tensor P)",
    reference.low_rank_linear,
    _KERNELS,
    triton="linear.launch.low_rank_linear",
    triton_unsupported=lambda input, U, *_: _rank_unsupported(U),
    prefer_reference=_linear_prefer_reference,
)
low_rank_linear_backward = _op(
    f"low_rank_linear_backward(Tensor grad, Tensor? input, Tensor? P, {_FACTORS}) -> {_GRADS}",
    _linear_backward,
    _KERNELS,
    triton="linear.launch.low_rank_linear_backward",
    triton_unsupported=lambda grad, input, P, U, *_: _rank_unsupported(U),
    prefer_reference=_linear_backward_prefer_reference,
)
low_rank_conv = _op(
    f"low_rank_conv({_LAYER}, {_GEOMETRY}) -> (Tensor output, Tensor P)",
    _conv,
    triton="linear.launch.low_rank_conv",
    triton_unsupported=_conv_unsupported,
    prefer_reference=_conv_prefer_reference,
)
low_rank_conv_backward = _op(
    f"low_rank_conv_backward(Tensor grad, Tensor? input, Tensor? P, {_FACTORS}, {_GEOMETRY}) -> {_GRADS}",
    _conv_backward,
    triton="linear.launch.low_rank_conv_backward",
    triton_unsupported=lambda grad, input, P, U, *rest: _rank_unsupported(U) + _groups_unsupported(rest[-1]),
    prefer_reference=_conv_backward_prefer_reference,
)
