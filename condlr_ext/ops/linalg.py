"""svd, qr, polar, clip_spectrum: reference everywhere, compiled kernels on CPUs, Triton kernels on GPUs.

`info` is int32, one status per matrix: OK, NOT_CONVERGED, NOT_FINITE (outputs are NaN; clip_spectrum returns its input)
or ALL_ZERO (clip_spectrum only, returns its input).
"""

import torch
from torch import Tensor

from .. import reference
from ..kernels.status import ALL_ZERO, NOT_CONVERGED, NOT_FINITE, OK  # noqa: F401  callers read them from here
from ._dispatch import NO_CHOICE, Op, unsupported_by_compiled


def _check(A: Tensor, tau: float = 0.0, band: int = 0, sigma_max: float = 1.0) -> None:
    """Check the arguments of direct calls; the public functions have better error messages."""
    torch._check(A.dim() >= 2, lambda: f"A must be a matrix or a batch of matrices, got shape {list(A.shape)}")
    torch._check(A.is_floating_point(), lambda: f"A must be real floating point, got {A.dtype}")
    torch._check(tau >= 0, lambda: f"tau must be >= 0, got {tau}")
    torch._check(0 <= band < len(reference.BANDS), lambda: f"band must be 0, 1 or 2, got {band}")
    torch._check(sigma_max > 0, lambda: f"sigma_max must be > 0, got {sigma_max}")


def _flagged(fn):
    """Wrap fn to return NaN and NOT_FINITE for matrices of a batch that are not finite."""

    def run(A: Tensor):
        _check(A)
        finite = torch.isfinite(A).all(-1).all(-1)
        outputs = fn(torch.where(finite[..., None, None], A, 0))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        masks = (finite.reshape(*finite.shape, *[1] * (o.dim() - finite.dim())) for o in outputs)
        flagged = (torch.where(m, o, torch.nan).contiguous() for m, o in zip(masks, outputs, strict=True))
        return *flagged, torch.where(finite, OK, NOT_FINITE).to(torch.int32)

    return run


def _clip_spectrum(A: Tensor, tau: float, band: int, sigma_max: float):
    _check(A, tau, band, sigma_max)
    finite = torch.isfinite(A).all(-1).all(-1)
    zero = (A == 0).all(-1).all(-1)
    clipped = reference.clip_spectrum(torch.where(finite[..., None, None], A, 0), tau, reference.BANDS[band], sigma_max)
    info = torch.where(zero, ALL_ZERO, torch.where(finite, OK, NOT_FINITE)).to(torch.int32)
    return torch.where(finite[..., None, None], clipped, A).contiguous(), info


def _info(A: Tensor) -> Tensor:
    return A.new_empty(A.shape[:-2], dtype=torch.int32)


def _svd_fake(A: Tensor):
    _check(A)
    *batch, m, n = A.shape
    k = min(m, n)
    return A.new_empty(*batch, m, k), A.new_empty(*batch, k), A.new_empty(*batch, n, k), _info(A)


def _qr_fake(A: Tensor):
    _check(A)
    *batch, m, n = A.shape
    k = min(m, n)
    return A.new_empty(*batch, m, k), A.new_empty(*batch, k, n), _info(A)


def _same_shape_fake(A: Tensor, *constraint):
    _check(A, *constraint)
    return A.new_empty(A.shape), _info(A)


LARGEST = 512  # above, a matrix that needs Jacobi sweeps takes seconds


def _cpu_unsupported(A: Tensor, *_) -> list[str]:
    reasons = unsupported_by_compiled((A,))
    if min(A.shape[-2:]) > LARGEST:
        reasons.append(f"min(m, n) = {min(A.shape[-2:])} exceeds {LARGEST}")
    return reasons


# on one thread and on two, which our kernels use for batches only
_RULE = "sizes measured on AMD EPYC, 2026-11-21"
_LAPACK = "LAPACK was measured to be faster at this size"


def _svd_prefer_reference(A: Tensor) -> str:
    if not A.is_cpu:
        return ""  # not measured on other devices
    m, n = A.shape[-2:]
    slower = min(m, n) > 200 if A.dtype == torch.float64 else m > 16 * n > 16 * 64
    return _LAPACK if slower else ""


def _qr_prefer_reference(A: Tensor) -> str:
    if not A.is_cpu:
        return ""
    m, n = A.shape[-2], min(A.shape[-2:])
    slower = A.dim() == 2 and (n > 200 and m < 2 * n if A.dtype == torch.float64 else m * n * n > 1e8)
    return _LAPACK if slower else ""


LARGEST_ON_GPU = 512  # one program sorts the singular values or factors the Gram matrix


def _triton_unsupported(A: Tensor, *_) -> list[str]:
    reasons = []
    if A.dtype not in (torch.float32, torch.float64):
        reasons.append(f"A is {A.dtype}, the kernels serve torch.float32 and torch.float64")
    if min(A.shape[-2:]) > LARGEST_ON_GPU:
        reasons.append(f"min(m, n) = {min(A.shape[-2:])} exceeds {LARGEST_ON_GPU}")
    return reasons


def _rests_on(device: str) -> str:
    return _RULE if device == "cpu" else NO_CHOICE


def _batch_first(op):
    """Return the vmap rule of a batched op: the mapped dimension becomes a leading one."""

    def rule(info, in_dims, A: Tensor, *args):
        outputs = op(A.movedim(in_dims[0], 0), *args)
        return outputs, (0,) * len(outputs)

    return rule


svd = Op(
    "svd(Tensor A) -> (Tensor U, Tensor sigma, Tensor V, Tensor info)",
    reference=_flagged(reference.svd),
    fake=_svd_fake,
    cpu_unsupported=_cpu_unsupported,
    prefer_reference=_svd_prefer_reference,
    rests_on=_rests_on,
    triton="spectral.launch.svd",
    triton_unsupported=_triton_unsupported,
    vmap=_batch_first,
)
qr = Op(
    "qr(Tensor A) -> (Tensor Q, Tensor R, Tensor info)",
    reference=_flagged(reference.qr),
    fake=_qr_fake,
    cpu_unsupported=_cpu_unsupported,
    prefer_reference=_qr_prefer_reference,
    rests_on=_rests_on,
    triton="qr.launch.qr",
    triton_unsupported=_triton_unsupported,
    vmap=_batch_first,
)
polar = Op(
    "polar(Tensor A) -> (Tensor Q, Tensor info)",
    reference=_flagged(reference.polar),
    fake=_same_shape_fake,
    cpu_unsupported=_cpu_unsupported,
    prefer_reference=_svd_prefer_reference,
    rests_on=_rests_on,
    triton="spectral.launch.polar",
    triton_unsupported=_triton_unsupported,
    vmap=_batch_first,
)
clip_spectrum = Op(
    "clip_spectrum(Tensor A, float tau, int band, float sigma_max) -> (Tensor out, Tensor info)",
    reference=_clip_spectrum,
    fake=_same_shape_fake,
    cpu_unsupported=_cpu_unsupported,
    triton="spectral.launch.clip_spectrum",
    triton_unsupported=_triton_unsupported,
    vmap=_batch_first,
)
