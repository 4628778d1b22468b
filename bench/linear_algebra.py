"""Rows of core linear algebra on batches of 16: svd, clip_spectrum, qr against torch.linalg and NumPy."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from baselines import clamp_by_svd
from subjects import MOVE, TAU, banded_core
from timing import Case, Work
from torch import Tensor

import condlr_ext
from condlr_ext import linalg, ops, reference

BATCH = 16
SIZES = (8, 16, 32, 64, 103, 128, 256)
TALL = ((64, 64), (256, 32), (512, 52), (4608, 103))


class LinearAlgebraRow:
    """One row: providers {name: function of A}, and the error of what they return."""

    def __init__(self, name: str, A: Tensor, providers: dict[str, Callable], error: Callable, flops: float):
        self.names = {name: None}
        self.A, self.providers, self.error = A, providers, error
        self.work = [Work(flops, 2 * 4 * A.numel())]
        # what a backward stable method in float32 may show
        self.limit = 30 * torch.finfo(torch.float32).eps * A.shape[-1] ** 0.5

    def rows(self, wanted: list[str]) -> dict[str, dict[str, Case]]:
        return {name: {key: self._case(fn) for key, fn in self.providers.items()} for name in wanted}

    def _case(self, fn: Callable) -> Case:
        return Case(lambda: fn(self.A), lambda: self.error(fn(self.A)), self.limit, self.work, share=0.2)


def linear_algebra_rows(quick: bool) -> Iterator[LinearAlgebraRow]:
    for r in (8, 32) if quick else SIZES:
        A = torch.stack([core_after_step(r) for _ in range(BATCH)])
        for name, op, fn, others, error in (
            ("svd", ops.linalg.svd, linalg.svd, {"torch.linalg": torch_svd, "NumPy": numpy_svd}, svd_error(A)),
            ("clip", ops.linalg.clip_spectrum, clip, {"gesdd loop": gesdd_loop}, clip_error(A)),
        ):
            arguments = () if name == "svd" else linalg.check_constraint("bench", TAU, "rms", None)
            providers = package(op, fn, A, *arguments) | others
            yield LinearAlgebraRow(f"{name} {BATCH} x {r}x{r}", A, providers, error, BATCH * 9 * r**3)
    for m, n in TALL[1:2] if quick else TALL:
        A = torch.randn(m, n) / m**0.5
        providers = package(ops.linalg.qr, linalg.qr, A) | {"torch.linalg": torch.linalg.qr, "NumPy": numpy_qr}
        yield LinearAlgebraRow(f"qr {m}x{n}", A, providers, qr_error(A), 4 * m * n * n - 4 * n**3 / 3)


def package(op, fn: Callable, A: Tensor, *arguments) -> dict[str, Callable]:
    """The compiled kernel, and what "auto" takes where that is something else."""

    def kernel(A):
        with condlr_ext.backend("cpu"):
            return fn(A)

    return {"ours": kernel} | ({"ours, auto": fn} if op.automatic(A, *arguments) == "reference" else {})


def core_after_step(r: int) -> Tensor:
    """A clipped core moved by one step."""
    S, step = banded_core(r, 1.0), torch.randn(r, r)
    return S + MOVE * S.norm() / step.norm() * step


def clip(A: Tensor) -> Tensor:
    return linalg.clip_spectrum(A, TAU)


def gesdd_loop(A: Tensor) -> Tensor:
    return torch.stack([clamp_by_svd(core, TAU) for core in A])


def torch_svd(A: Tensor):
    U, sigma, Vh = torch.linalg.svd(A, full_matrices=False)
    return U, sigma, Vh.mT


def numpy_svd(A: Tensor):
    U, sigma, Vh = map(torch.from_numpy, np.linalg.svd(A.numpy(), full_matrices=False))
    return U, sigma, Vh.mT


def numpy_qr(A: Tensor):
    return tuple(map(torch.from_numpy, np.linalg.qr(A.numpy())))


def svd_error(A: Tensor) -> Callable:
    exact = torch.from_numpy(np.linalg.svd(A.double().numpy(), compute_uv=False))

    def error(out) -> float:
        U, sigma, V = (t.double() for t in out)
        residual = (U * sigma.unsqueeze(-2)) @ V.mT - A
        return worst(residual, sigma - exact, gram_error(U), gram_error(V))

    return error


def clip_error(A: Tensor) -> Callable:
    U, sigma, Vh = map(torch.from_numpy, np.linalg.svd(A.double().numpy()))
    lo, hi = reference.clip_edges(sigma, TAU)
    exact = (U * sigma.clamp(lo[:, None], hi[:, None]).unsqueeze(-2)) @ Vh
    return lambda out: worst(out - exact)


def qr_error(A: Tensor) -> Callable:
    def error(out) -> float:
        Q, R = (t.double() for t in out)
        return worst(Q @ R - A, gram_error(Q), R.tril(-1))

    return error


def gram_error(Q: Tensor) -> Tensor:
    return Q.mT @ Q - torch.eye(Q.shape[-1], dtype=Q.dtype)


def worst(*errors: Tensor) -> float:
    """Largest entry of all; NaN counts as infinite."""
    return max(e.abs().max().nan_to_num(torch.inf).item() for e in errors)
