"""What launches ask of an H200, counted while they are executed on the CPU; for `bench.kernels`.

The counts of rotations and of iterations depend on the matrices, which are random, with a fixed seed.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import torch
from helpers.matrices import with_spectrum
from helpers.ptx import driver
from torch import Tensor

from condlr_ext.kernels.triton.linear import launch as layers
from condlr_ext.kernels.triton.qr.launch import qr
from condlr_ext.kernels.triton.spectral import launch as spectral
from condlr_ext.kernels.triton.step.launch import step
from condlr_ext.reference import HYPER

from . import h200
from .machine import DTYPES


@dataclass(frozen=True)
class Executed:
    """A launch: flops by kind, instructions of warps, bytes asked for and touched, as `helpers.ptx.count` has them."""

    problem: str
    kernel: str
    blocks: int
    fp32: int
    fp64: int
    fp64_tensor: int
    instructions: int
    asked: int
    touched: int
    floor: float  # microseconds at the data sheet's rates
    bound: str


def launches(compute: Callable[[], object]) -> list[driver.Launched]:
    """Return what compute() launches on an H200, with counts."""
    with (
        mock.patch.object(driver, "MULTIPROCESSORS", h200.MULTIPROCESSORS),
        driver.executing(90, counts=True) as run,
    ):
        compute()
    return run.launches


@functools.cache
def layer(dtype: str, rows: int, n: int, m: int, rank: int, bias: bool = True) -> list[driver.Launched]:
    """Return the launches of a layer, forward and backward: two of `chain`, `sums`, `combine`."""
    torch.set_num_threads(1)
    shapes = (rows, n), (m, rank), (rank, rank), (n, rank), (m,), (rows, m)
    X, U, S, V, b, G = (torch.randn(shape).to(DTYPES[dtype]) for shape in shapes)

    def compute():
        Y, P = layers.low_rank_linear(X, U, S, V, b if bias else None)
        layers.low_rank_linear_backward(G, X, P, U, S, V, [True] * 4 + [bias])

    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
    try:
        return launches(compute)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def _core(r: int, kappa: float) -> Tensor:
    return with_spectrum(torch.linspace(1, 1 / kappa, r, dtype=torch.float64), r, r).float().contiguous()


def _step(layer_count: int, width: int, r: int) -> None:
    """Take a step with momentum, tau 0.1, as small as in training."""
    params = []
    for _ in range(layer_count):
        U, V = (torch.linalg.qr(torch.randn(width, r))[0].contiguous() for _ in range(2))
        params += [U, _core(r, 1.1), V, torch.zeros(width)]
    grads, buffers = [1e-3 * torch.randn_like(p) for p in params], [torch.zeros_like(p) for p in params]
    hyper = torch.zeros(layer_count, 4, len(HYPER), dtype=torch.float64)
    for name, value in (("lr", 0.1), ("momentum", 0.9), ("tau", 0.1), ("sigma_max", math.inf)):
        hyper[..., HYPER.index(name)] = value
    step(params, grads, buffers, hyper, torch.zeros(layer_count, dtype=torch.int64))


# one matrix each: more are more blocks, that do the same
PROBLEMS: dict[str, Callable[[], object]] = {
    "qr of 256 x 64": lambda: qr(torch.randn(1, 256, 64)),
    "svd of 64 x 64": lambda: spectral.svd(torch.randn(1, 64, 64)),
    "svd of 96 x 96": lambda: spectral.svd(torch.randn(1, 96, 96)),
    "polar of 96 x 96, kappa 3": lambda: spectral.polar(_core(96, 3)[None]),
    "clip of 64 x 64, kappa 1.2": lambda: spectral.clip_spectrum(_core(64, 1.2)[None], 0.1, 0, math.inf),
    "clip of 96 x 96, kappa 1.2": lambda: spectral.clip_spectrum(_core(96, 1.2)[None], 0.1, 0, math.inf),
    "step of 2 layers 256 x 256, rank 32": lambda: _step(2, 256, 32),
}


def floor(blocks: int, flops: dict[str, int], instructions: int, touched: int) -> tuple[float, str]:
    """Return the microseconds that a launch takes at least, and what they are needed for.

    Arithmetic and instructions are those of as many multiprocessors as there are blocks; what was touched comes from
    memory, or goes there, once.
    """
    share = min(1.0, blocks / h200.MULTIPROCESSORS)
    seconds = {f"{kind} arithmetic": count / (share * h200.FLOPS[kind]) for kind, count in flops.items()}
    seconds |= {"instructions": instructions / (share * h200.INSTRUCTIONS), "memory": touched / h200.MEMORY}
    bound = max(seconds, key=seconds.__getitem__)
    return 1e6 * seconds[bound], bound


def problem(name: str) -> list[Executed]:
    """Execute a problem and return its launches, but those that find nothing to do."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    found = []
    for kernel, grid, _, counts in launches(PROBLEMS[name]):
        flops, blocks = counts.flops, math.prod(grid)
        assert set(flops) <= {"fp32", "fp64", "fp64 tensor"}, flops
        if flops:
            at_least, bound = floor(blocks, flops, counts.instructions, counts.touched)
            each = flops["fp32"], flops["fp64"], flops["fp64 tensor"], counts.instructions, counts.asked, counts.touched
            found.append(Executed(name, kernel, blocks, *each, at_least, bound))
    return found
