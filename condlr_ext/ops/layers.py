"""low_rank_linear and low_rank_conv, factorised and merged, with their backwards.

On CPUs small factorised linear layers are one compiled call each way; everything else is products by torch's own
libraries (oneDNN, MKL) in the cheapest order, which the "cpu" backend serves too. Gradients that are not asked for come
back empty.
"""

import torch
from torch import Tensor

from .. import reference
from ._dispatch import COMPILED, Op


def _cpu(input: Tensor, *_) -> list[str]:
    return [] if input.device.type == "cpu" else [f"the input is on {input.device}"]


def _check_conv(input, kernel_size, stride, padding, dilation, groups):
    """What a direct call must respect; the public functions say more."""
    d = len(kernel_size)
    torch._check(groups >= 1, lambda: f"low_rank_conv: groups must be >= 1, got {groups}")
    torch._check(
        input.dim() == d + 2 and len(stride) == len(padding) == len(dilation) == d,
        lambda: f"low_rank_conv: a kernel of {d} dimensions needs an input of {d + 2}, got {list(input.shape)}",
    )


def _conv(input, U, S, V, bias, *geometry):
    _check_conv(input, *geometry)
    return reference.low_rank_conv(input, U, S, V, bias, *geometry)


def _merged_conv(input, U, S, V, bias, *geometry):
    _check_conv(input, *geometry)
    return reference.merged_conv(input, U, S, V, bias, *geometry)


def _or_empty(backward):
    """The gradients that are not asked for as empty tensors, the others contiguous but for dX, which is as it comes."""

    def run(grad, *args):
        dX, *factors = (grad.new_empty(0) if g is None else g for g in backward(grad, *args))
        return dX, *(g.contiguous() for g in factors)

    return run


_linear_backward = _or_empty(reference.low_rank_linear_backward)
_conv_backward = _or_empty(reference.low_rank_conv_backward)
_merged_linear_backward = _or_empty(reference.merged_linear_backward)
_merged_conv_backward = _or_empty(reference.merged_conv_backward)

_LIBRARIES = "torch's products, oneDNN or MKL"
_SMALL = (
    _LIBRARIES if COMPILED.ops_reason else f"compiled kernel for small layers in float32 and float64, else {_LIBRARIES}"
)
_LAYER = "Tensor input, Tensor U, Tensor S, Tensor V, Tensor? bias"
_GRADS = "(Tensor dX, Tensor dU, Tensor dS, Tensor dV, Tensor db)"
_FACTORS = "Tensor U, Tensor S, Tensor V, bool[5] mask"
_GEOMETRY = "int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups"


def _op(schema, implementation, cpu_is=_LIBRARIES) -> Op:
    return Op(schema, reference=implementation, fake=implementation, cpu=_cpu, cpu_is=cpu_is)


low_rank_linear = _op(f"low_rank_linear({_LAYER}) -> (Tensor output, Tensor P)", reference.low_rank_linear, _SMALL)
low_rank_linear_backward = _op(
    f"low_rank_linear_backward(Tensor grad, Tensor? input, Tensor? P, {_FACTORS}) -> {_GRADS}",
    _linear_backward,
    _SMALL,
)
low_rank_conv = _op(f"low_rank_conv({_LAYER}, {_GEOMETRY}) -> (Tensor output, Tensor P)", _conv)
low_rank_conv_backward = _op(
    f"low_rank_conv_backward(Tensor grad, Tensor? input, Tensor? P, {_FACTORS}, {_GEOMETRY}) -> {_GRADS}",
    _conv_backward,
)
merged_linear = _op(f"merged_linear({_LAYER}) -> Tensor", reference.merged_linear)
merged_linear_backward = _op(
    f"merged_linear_backward(Tensor grad, Tensor? input, {_FACTORS}) -> {_GRADS}", _merged_linear_backward
)
merged_conv = _op(f"merged_conv({_LAYER}, {_GEOMETRY}) -> Tensor", _merged_conv)
merged_conv_backward = _op(
    f"merged_conv_backward(Tensor grad, Tensor? input, {_FACTORS}, {_GEOMETRY}) -> {_GRADS}", _merged_conv_backward
)
