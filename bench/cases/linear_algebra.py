"""Linear algebra on batches of matrices: svd, qr, polar, the clip of a spectrum, orthonormalization.

A provider is right if no error of its results is more than twice that of torch.linalg in the same dtype.
"""

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import cycle

import numpy as np
import torch
from torch import Tensor, nn

from condlr_ext import backend, linalg, ops, reference

from ..inputs import TAU, core_after_step
from ..machine import DTYPES
from ..registry import CONTEXT, OURS, SAME, Operation, Provider, TimedCall, Work
from .baselines import clamp_by_eigh, clamp_by_svd

DIFFERENT = 16  # matrices in a batch; the others are copies, since exact results are computed on the CPU
SETS = 2  # of inputs, used in turn
MAX_SECONDS = 1.0  # of a call of torch.linalg
LARGE = 1024  # rows up to which maps by way of a square matrix are timed
MAX_ERROR = {"fp32": 1e-4, "fp64": 1e-12}  # a limit, whatever the error of torch.linalg
KAPPA = {"fp32": 5e-6, "fp64": 1e-12}  # relative excess over the bound that the package allows itself


@dataclass(frozen=True)
class Batch:
    count: int
    m: int
    n: int

    def __str__(self) -> str:
        return f"{self.count} x {self.m}x{self.n}"


@dataclass(frozen=True)
class Kind:
    """The differences between the operations on A [count, m, n].

    Attributes:
        op: Operator whose backends are compared, called with A and `arguments`.
        ours: Our function; returns a tuple of tensors, as do the others.
        torch: The same by torch.linalg.
        errors: Largest errors of the batch by name, of (A, results, exact), all in float64.
        flops: Of one matrix m x n.
        arguments: Of `op` after A.
        matrix: Makes a random matrix m x n.
        exact: Exact result of A in float64 on the CPU, for `errors`.
        others: (module that has to be installed, function of this module and A) by name.
        numbers: Read and written for one matrix.
        compiles: Whether torch's form has several ops, so that torch.compile is tried.
        context: Makes related things by name: functions that return (function of A, errors, limits).
    """

    op: ops._dispatch.Op
    ours: Callable[[Tensor], tuple]
    torch: Callable[[Tensor], tuple]
    errors: Callable[[Tensor, tuple, Tensor | None], dict[str, Tensor]]
    flops: Callable[[int, int], float]
    arguments: tuple = ()
    matrix: Callable[[int, int], Tensor] = torch.randn
    exact: Callable[[Tensor], Tensor | None] = lambda A: None
    others: dict[str, tuple[str, Callable]] | None = None
    numbers: Callable[[int, int], int] = lambda m, n: 2 * m * n
    compiles: bool = False
    context: Callable[[Tensor], dict[str, Callable[[], tuple[Callable, Callable]]]] | None = None


class MatrixProblem:
    """Batches of matrices for one row."""

    def __init__(self, kind: Kind, shape: Batch, dtype: str, device):
        self._kind, self._shape, self._dtype, self._device = kind, shape, dtype, device
        self._sets = [self._matrices() for _ in range(SETS)]
        flops, numbers = kind.flops(shape.m, shape.n), kind.numbers(shape.m, shape.n)
        self.work = {"call": [Work(shape.count * flops, shape.count * numbers * self._A.element_size())]}
        kernels = {"cpu": "cpu", "cuda": "triton"}[device.kind]
        chosen = kind.op.automatic(self._A, *kind.arguments)
        self.providers = {"ours": partial(self._provider, kind.ours, OURS)}
        if chosen != kernels:
            self.providers[f"ours: {kernels}"] = partial(self._provider, on(kernels, kind.ours), OURS)
        if chosen != "reference":
            self.providers["reference"] = partial(self._provider, on("reference", kind.ours), SAME, share=0.5)
        self.providers["torch.linalg"] = partial(self._provider, kind.torch, SAME)
        if kind.compiles:
            self.providers["compiled"] = partial(self._compiled, kind.torch)
        for name, (module, function) in (kind.others or {}).items():
            if module == "torch" or (module == "cupy") == (device.kind == "cuda"):
                self.providers[name] = partial(self._other, module, function)
        for name, make in (kind.context(self._A) if kind.context else {}).items():
            self.providers[name] = partial(self._context, make)

    @property
    def _A(self) -> Tensor:
        return self._sets[0]

    def _matrices(self) -> Tensor:
        shape = self._shape
        different = [self._kind.matrix(shape.m, shape.n) for _ in range(min(shape.count, DIFFERENT))]
        A = torch.stack([different[i % DIFFERENT] for i in range(shape.count)])
        return A.to(self._device.device, DTYPES[self._dtype])

    def _provider(self, function: Callable, role: str, share: float = 1.0) -> Provider:
        if self._device.kind == "cuda" and role == SAME:
            self._check_duration(function)
        sets = cycle(self._sets)
        call = TimedCall(lambda: function(next(sets)), self._errors, rewind=lambda: self._first(sets))
        return Provider({"call": call}, self._limits, role, share=share)

    def _first(self, sets: cycle) -> None:
        """Go on with the first set, whose results are checked."""
        while next(sets) is not self._sets[-1]:
            pass

    def _compiled(self, function: Callable) -> Provider:
        return self._provider(torch.compile(function, dynamic=False), SAME)

    def _other(self, module: str, function: Callable) -> Provider:
        if importlib.util.find_spec(module) is None:
            raise ImportError(f"{module} is not installed")
        provider = self._provider(partial(function, importlib.import_module(module)), SAME)
        return dataclasses.replace(provider, captured=module != "cupy")

    def _context(self, make: Callable) -> Provider:
        function, errors, limits = make()
        return Provider({"call": TimedCall(lambda: function(self._A), errors)}, limits, CONTEXT, share=0.5)

    def _check_duration(self, function: Callable) -> None:
        """Raise TimeoutError if a call takes too long: torch.linalg goes through a batch matrix by matrix."""
        different = self._A[:DIFFERENT]
        function(different)
        call = TimedCall(lambda: function(different), dict)
        seconds = self._device.seconds(call, 1, cold=False) * self._shape.count / len(different)
        if seconds > MAX_SECONDS:
            raise TimeoutError(f"a call would take {seconds:.0f} s")

    @cached_property
    def _exact(self) -> Tensor | None:
        return self._kind.exact(self._A[:DIFFERENT].cpu().double())

    def _errors(self, out: tuple) -> dict[str, float]:
        return errors(self._kind, self._A, out, self._exact)

    @cached_property
    def _limits(self) -> dict[str, float]:
        """Return twice the errors of torch.linalg on the different matrices, at least two roundings."""
        different = self._A[:DIFFERENT]
        found = errors(self._kind, different, self._kind.torch(different), self._exact)
        eps, most = torch.finfo(self._A.dtype).eps, MAX_ERROR[self._dtype]
        least = {key: KAPPA[self._dtype] if key == "kappa" else 2 * eps * self._shape.n**0.5 for key in found}
        return {key: min(max(2 * error, least[key]), most) for key, error in found.items()} | {"finite": 0.0, "": most}


def errors(kind: Kind, A: Tensor, out: tuple, exact: Tensor | None) -> dict[str, float]:
    if not all(t.isfinite().all() for t in out):
        return {"finite": float("inf")}
    found = kind.errors(A.double(), tuple(t.double() for t in out), exact)
    return {key: error.item() for key, error in found.items()}


def on(name: str, function: Callable) -> Callable:
    """Return the function on the package's backend of that name."""

    def run(A):
        with backend(name):
            return function(A)

    return run


def torch_svd(A: Tensor):
    U, sigma, Vh = torch.linalg.svd(A, full_matrices=False)
    return U, sigma, Vh.mT


def torch_polar(A: Tensor):
    U, sigma, Vh = torch.linalg.svd(A, full_matrices=False)
    return U @ Vh, (Vh.mT * sigma.unsqueeze(-2)) @ Vh


def cupy_svd(cupy, A: Tensor):
    U, sigma, Vh = map(torch.from_dlpack, cupy.linalg.svd(cupy.from_dlpack(A), full_matrices=False))
    return U, sigma, Vh.mT


def cupy_qr(cupy, A: Tensor):
    return tuple(map(torch.from_dlpack, cupy.linalg.qr(cupy.from_dlpack(A))))


def numpy_svd(numpy, A: Tensor):
    U, sigma, Vh = map(torch.from_numpy, numpy.linalg.svd(A.numpy(), full_matrices=False))
    return U, sigma, Vh.mT


def numpy_qr(numpy, A: Tensor):
    return tuple(map(torch.from_numpy, numpy.linalg.qr(A.numpy())))


def one_by_one(function: Callable) -> Callable:
    """Return a function of a batch by a SciPy function of single matrices, as all are in older versions."""
    return lambda scipy, A: tuple(map(torch.stack, zip(*(function(scipy, a) for a in A), strict=True)))


def scipy_svd(scipy, A: Tensor):
    U, sigma, Vh = map(torch.from_numpy, scipy.svd(A.numpy(), full_matrices=False, check_finite=False))
    return U, sigma, Vh.mT


def scipy_qr(scipy, A: Tensor):
    return tuple(map(torch.from_numpy, scipy.qr(A.numpy(), mode="economic", check_finite=False)))


def scipy_polar(scipy, A: Tensor):
    return tuple(map(torch.from_numpy, scipy.polar(A.numpy())))


def svd_errors(A: Tensor, out: tuple, _) -> dict[str, Tensor]:
    U, sigma, V = out
    disorder = torch.cat((sigma.diff(dim=-1), -sigma), -1).clamp_min(0)
    return {
        "A": relative((U * sigma.unsqueeze(-2)) @ V.mT - A, A),
        "U": non_orthonormality(U),
        "V": non_orthonormality(V),
        "order": relative(disorder.unsqueeze(-1), A),
    }


def qr_errors(A: Tensor, out: tuple, _) -> dict[str, Tensor]:
    Q, R = out
    return {"A": relative(Q @ R - A, A), "Q": non_orthonormality(Q), "R": relative(R.tril(-1), A)}


def polar_errors(A: Tensor, out: tuple, _) -> dict[str, Tensor]:
    Q, H = out
    shift = 1e-5 * torch.linalg.matrix_norm(A)[:, None, None] * torch.eye(H.shape[-1], dtype=H.dtype, device=H.device)
    indefinite = torch.linalg.cholesky_ex((H + H.mT) / 2 + shift).info != 0
    return {
        "A": relative(Q @ H - A, A),
        "Q": non_orthonormality(Q),
        "H": relative(H - H.mT, A),
        "sign": torch.where(indefinite.any(), torch.inf, 0.0),
    }


def clip_errors(A: Tensor, out: tuple, exact: Tensor) -> dict[str, Tensor]:
    (clipped,) = out
    sigma = torch.from_numpy(np.linalg.svd(clipped[:DIFFERENT].cpu().numpy(), compute_uv=False))
    truth = exact.to(A.device)[torch.arange(len(A), device=A.device) % DIFFERENT]
    excess = sigma[:, 0] / sigma[:, -1] / (1 + TAU) - 1
    return {"clipped": relative(clipped - truth, truth), "kappa": excess.max().clamp_min(0)}


def basis_errors(A: Tensor, out: tuple, _) -> dict[str, Tensor]:
    """Return the errors of an orthonormal basis of A's columns."""
    (Q,) = out
    return {"Q": non_orthonormality(Q), "span": relative(A - Q @ (Q.mT @ A), A)}


def relative(E: Tensor, A: Tensor) -> Tensor:
    """Return the largest ‖E‖ / ‖A‖ of the batch, in Frobenius norms."""
    return (torch.linalg.matrix_norm(E) / torch.linalg.matrix_norm(A)).max()


def non_orthonormality(Q: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(Q.mT @ Q - torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)).max()


def single(function: Callable) -> Callable:
    return lambda A: (function(A),)


def cube(m: int, n: int) -> float:
    """Return the flops of an iterative method, nominally 9 n³, after the QR of a tall matrix."""
    return 9 * n**3 + (4 * m * n * n if m > n else 0)


def correction(m: int, n: int) -> float:
    """Return the flops of a clip: Gram matrix, tridiagonal form, vectors and correction for a third of the values."""
    return 4 * n**3


def householder(m: int, n: int) -> float:
    return 4 * m * n * n - 4 * n**3 / 3


def parametrized(A: Tensor) -> dict[str, Callable]:
    """Return the ways of others to keep a matrix orthonormal, for orientation.

    They map any matrix to an orthonormal one, neither the nearest nor a basis of its columns; that of torch.optim.Muon
    is approximate, with singular values around 1.
    """
    _, m, n = A.shape

    def errors(out: tuple) -> dict[str, float]:
        return {"Q": non_orthonormality(out[0].double()).item()}

    A = A[0] / torch.linalg.matrix_norm(A[0], 2)  # scaled as a step of the maps

    def mapped(map_: Callable, X: Tensor):
        map_ = torch.no_grad()(map_)
        return lambda _: (map_(X),), errors, {"Q": 1e-4}

    def large() -> None:
        if m > LARGE:
            raise MemoryError(f"it works on an {m} x {m} matrix: left out above {LARGE}")

    def orthogonal(name: str):
        if name != "householder":
            large()
        layer = nn.utils.parametrizations.orthogonal(
            nn.Linear(n, m, bias=False, device=A.device, dtype=A.dtype), orthogonal_map=name, use_trivialization=False
        )
        map_ = layer.parametrizations.weight[0]
        return mapped(map_, map_.right_inverse(torch.linalg.qr(A).Q) if name == "householder" else A)

    def geotorch():
        if importlib.util.find_spec("geotorch") is None:
            raise ImportError("geotorch is not installed")
        large()
        return mapped(importlib.import_module("geotorch").Stiefel((m, n)).to(A), A)

    def muon():
        from torch.optim._muon import DEFAULT_A, DEFAULT_B, DEFAULT_C, EPS, _zeropower_via_newtonschulz

        def run(_):
            return (_zeropower_via_newtonschulz(A, (DEFAULT_A, DEFAULT_B, DEFAULT_C), 5, EPS),)

        def spread(out: tuple) -> dict[str, float]:
            sigma = np.linalg.svd(out[0].double().cpu().numpy(), compute_uv=False)
            return {"|sigma - 1|": float(np.abs(sigma - 1).max())}

        return run, spread, {"|sigma - 1|": 1.0}

    found = {f"torch orthogonal, {name}": partial(orthogonal, name) for name in ("matrix_exp", "cayley", "householder")}
    return found | {"geotorch": geotorch, "torch Muon, 5 steps": muon}


CLIP = Kind(
    ops.linalg.clip_spectrum, single(partial(linalg.clip_spectrum, tau=TAU)), single(partial(clamp_by_svd, tau=TAU)),
    clip_errors, correction, arguments=linalg.check_constraint("bench", TAU, "rms", None), compiles=True,
    matrix=lambda m, n: core_after_step(n), exact=lambda A: reference.clip_spectrum(A, TAU),
    others={"torch.linalg, eigh": ("torch", lambda torch, A: (clamp_by_eigh(A, TAU),))},
)  # fmt: skip
ILL_CONDITIONED = Kind(**(vars(CLIP) | {"matrix": torch.randn}))
SVD = Kind(
    ops.linalg.svd, linalg.svd, torch_svd, svd_errors, cube, numbers=lambda m, n: m * n + (m + n + 1) * min(m, n),
    others={"NumPy": ("numpy", numpy_svd), "SciPy": ("scipy.linalg", one_by_one(scipy_svd)),
            "CuPy": ("cupy", cupy_svd)},
)  # fmt: skip
QR = Kind(
    ops.linalg.qr, linalg.qr, torch.linalg.qr, qr_errors, householder,
    numbers=lambda m, n: m * n + (m + n) * min(m, n),
    others={"NumPy": ("numpy", numpy_qr), "SciPy": ("scipy.linalg", one_by_one(scipy_qr)), "CuPy": ("cupy", cupy_qr)},
)  # fmt: skip
POLAR = Kind(
    ops.linalg.polar, linalg.polar, torch_polar, polar_errors, cube, numbers=lambda m, n: 2 * m * n + n * n,
    compiles=True,
    others={"SciPy": ("scipy.linalg", one_by_one(scipy_polar))},
)  # fmt: skip
BASIS = Kind(
    ops.linalg.qr, single(linalg.orthonormalize), single(lambda A: torch.linalg.qr(A).Q), basis_errors, householder,
    context=parametrized,
)  # fmt: skip


def square(size: str, device) -> list[Batch]:
    if size == "smoke":
        return [Batch(4, 8, 8)]
    if device.kind == "cuda":
        return [Batch(c, r, r) for r in (8, 16, 32, 33, 48, 64, 96, 128, 256) for c in (1, 16, 64, 512)]
    counts = (1, 16, 64) if size == "full" else (16,)
    return [Batch(count, r, r) for r in (8, 16, 32, 64, 103, 128, 256) for count in counts]


def tall(size: str, device) -> list[Batch]:
    if size == "smoke":
        return [Batch(1, 64, 8)]
    if device.kind == "cuda":
        return [Batch(c, 4096, r) for r in (8, 16, 32, 33, 48, 64, 96, 128, 256) for c in (1, 16, 64)]
    shapes = [(64, 64), (256, 32), (512, 52), (4608, 103)] + [(1024, 64), (4096, 256)] * (size == "full")
    return [Batch(1, m, n) for m, n in shapes]


def first_step(size: str, device) -> list[Batch]:
    return [shape for shape in square(size, device) if size == "smoke" or shape.count in (16, 64)]


def bases(size: str, device) -> list[Batch]:
    if size == "smoke":
        return [Batch(1, 32, 4)]
    return [Batch(1, m, n) for m, n in ((64, 64), (256, 32), (768, 32), (4096, 32), (4096, 128))]


HEADLINES = Batch(16, 64, 64), Batch(64, 64, 64), Batch(64, 4096, 64)


def operation(name: str, what: str, kind: Kind, shapes: Callable) -> Operation:
    return Operation(name, what, partial(MatrixProblem, kind), shapes, headline=HEADLINES.__contains__)


OPERATIONS = (
    operation("clip", "singular values of cores clipped to kappa <= 1 + tau, as after a step", CLIP, square),
    operation("clip ill-conditioned", "the same on random cores, as at the first step", ILL_CONDITIONED, first_step),
    operation("svd", "singular value decompositions of batches", SVD, square),
    operation("polar", "polar decompositions of batches", POLAR, square),
    operation("qr", "thin QR with Q, of single tall matrices and of batches", QR,
              lambda size, device: tall(size, device) + square(size, device)),
    operation("orthonormalize", "an orthonormal basis, beside what else keeps a matrix orthonormal", BASIS, bases),
)  # fmt: skip
