"""The Triton kernels of a linear layer and plain PyTorch, forward and backward, in one precision of the products."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from condlr_ext import reference

PRECISIONS = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "tf32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
ALL = [True] * 5


@contextmanager
def precision(name: str) -> Iterator[torch.dtype]:
    """Yield the dtype of a precision; inside, float32 products are those that it means."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    try:
        yield PRECISIONS[name]
    finally:
        torch.set_float32_matmul_precision(before)


def ours(*tensors):
    """Return Y, P and all gradients by the kernels, for X, U, S, V, b and the gradient of Y."""
    from condlr_ext.kernels.triton.linear import launch  # needs Triton

    return _run(launch.low_rank_linear, launch.low_rank_linear_backward, *tensors)


def plain(*tensors):
    """Return the same by plain PyTorch."""
    return _run(reference.low_rank_linear, reference.low_rank_linear_backward, *tensors)


def _run(forward, backward, X, U, S, V, b, G):
    Y, P = forward(X, U, S, V, b)
    return Y, P, *backward(G, X, P, U, S, V, ALL)
