"""low_rank_linear and low_rank_conv with their backwards: products in the cheapest order by torch's own libraries.

On CPUs those libraries (oneDNN, MKL) are the implementation, so the "cpu" backend serves them too. Gradients that
are not asked for come back empty.
"""

import torch
from torch import Tensor

from .. import reference
from ._dispatch import Op


def _cpu(input: Tensor, *_) -> list[str]:
    return [] if input.device.type == "cpu" else [f"the input is on {input.device}"]


def _conv(input, U, S, V, bias, kernel_size, stride, padding, dilation, groups):
    """What a direct call must respect; the public functions say more."""
    d = len(kernel_size)
    torch._check(groups >= 1, lambda: f"low_rank_conv: groups must be >= 1, got {groups}")
    torch._check(
        input.dim() == d + 2 and len(stride) == len(padding) == len(dilation) == d,
        lambda: f"low_rank_conv: a kernel of {d} dimensions needs an input of {d + 2}, got {list(input.shape)}",
    )
    return reference.low_rank_conv(input, U, S, V, bias, kernel_size, stride, padding, dilation, groups)


def _or_empty(gradients, like: Tensor):
    dX, *factors = (like.new_empty(0) if g is None else g for g in gradients)
    return dX, *(g.contiguous() for g in factors)


def _linear_backward(grad, input, P, U, S, V, mask):
    return _or_empty(reference.low_rank_linear_backward(grad, input, P, U, S, V, mask), input)


def _conv_backward(grad, input, P, U, S, V, mask, *geometry):
    return _or_empty(reference.low_rank_conv_backward(grad, input, P, U, S, V, mask, *geometry), input)


_LIBRARIES = "torch's products, oneDNN or MKL"
_GRADS = "(Tensor dX, Tensor dU, Tensor dS, Tensor dV, Tensor db)"
_SAVED = "Tensor grad, Tensor input, Tensor P, Tensor U, Tensor S, Tensor V, bool[5] mask"
_GEOMETRY = "int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups"

low_rank_linear = Op(
    "low_rank_linear(Tensor input, Tensor U, Tensor S, Tensor V, Tensor? bias) -> (Tensor output, Tensor P)",
    reference=reference.low_rank_linear,
    fake=reference.low_rank_linear,
    cpu=_cpu,
    cpu_is=_LIBRARIES,
)
low_rank_linear_backward = Op(
    f"low_rank_linear_backward({_SAVED}) -> {_GRADS}",
    reference=_linear_backward,
    fake=_linear_backward,
    cpu=_cpu,
    cpu_is=_LIBRARIES,
)
low_rank_conv = Op(
    "low_rank_conv(Tensor input, Tensor U, Tensor S, Tensor V, Tensor? bias, "
    f"{_GEOMETRY}) -> (Tensor output, Tensor P)",
    reference=_conv,
    fake=_conv,
    cpu=_cpu,
    cpu_is=_LIBRARIES,
)
low_rank_conv_backward = Op(
    f"low_rank_conv_backward({_SAVED}, {_GEOMETRY}) -> {_GRADS}",
    reference=_conv_backward,
    fake=_conv_backward,
    cpu=_cpu,
    cpu_is=_LIBRARIES,
)
