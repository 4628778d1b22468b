"""The op step: one constrained step of a whole network; reference, compiled for CPUs, Triton."""

import torch

from .. import reference
from ._dispatch import Op, unsupported_by_compiled

STEP = (
    "step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor hyper, Tensor(c!) skipped) -> ()"
)


def _check(params, grads, momentum_buffers, hyper, skipped) -> None:
    """Raise for arguments that do not fit each other."""
    layers = hyper.shape[0]
    torch._check(
        hyper.dtype == torch.float64 and hyper.shape == (layers, 4, len(reference.HYPER)),
        lambda: (
            f"step: hyper must be float64 [layers, 4, {len(reference.HYPER)}], got {hyper.dtype} {list(hyper.shape)}"
        ),
    )
    torch._check(
        len(params) == len(grads) == len(momentum_buffers) == 4 * layers,
        lambda: (
            f"step: params, grads and momentum_buffers must hold 4 tensors for each of the {layers} layers of hyper,"
            f" got {len(params)}, {len(grads)} and {len(momentum_buffers)}"
        ),
    )
    torch._check(
        skipped.dtype == torch.int64 and skipped.shape == (layers,),
        lambda: f"step: skipped must be int64 [{layers}], got {skipped.dtype} {list(skipped.shape)}",
    )
    for i, (p, g, b) in enumerate(zip(params, grads, momentum_buffers, strict=True)):
        torch._check(
            g.numel() == 0 or (g.shape == p.shape and b.shape in (p.shape, (0,))),
            lambda i=i, p=p, g=g, b=b: (
                f"step: layer {i // 4}: grad and buffer of {reference.ROLES[i % 4]} must have its shape"
                f" {list(p.shape)} or none, got {list(g.shape)} and {list(b.shape)}"
            ),
        )


def _reference(params, grads, momentum_buffers, hyper, skipped) -> None:
    _check(params, grads, momentum_buffers, hyper, skipped)
    reference.step(params, grads, momentum_buffers, hyper, skipped)


def _cpu(params, grads, momentum_buffers, hyper, skipped) -> list[str]:
    reasons = unsupported_by_compiled((*params, *grads, *momentum_buffers, skipped), _DTYPES)
    if not all(t.is_contiguous() for t in (*params, *grads, *momentum_buffers)):
        reasons.append("a parameter, gradient or buffer is not contiguous")
    return reasons


LARGEST_RANK = 512  # in the Triton kernels one program factors the Gram matrix


def _triton_unsupported(params, grads, momentum_buffers, hyper, skipped) -> list[str]:
    reasons = []
    dtypes = {t.dtype for t in (*params, *grads, *momentum_buffers)}
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.float64}:
        got = ", ".join(sorted(map(str, dtypes)))
        reasons.append(f"the layers are {got}, the kernels serve torch.float32 or torch.float64")
    if not all(t.is_contiguous() for t in (*params, *grads, *momentum_buffers)):
        reasons.append("a parameter, gradient or buffer is not contiguous")
    rank = max((U.shape[1] for U in params[::4]), default=0)
    if rank > LARGEST_RANK:
        reasons.append(f"rank {rank} exceeds {LARGEST_RANK}")
    return reasons


_DTYPES = (torch.float32, torch.float64, torch.int64)  # int64: the counter

step = Op(
    STEP,
    reference=_reference,
    fake=_check,
    cpu_unsupported=_cpu,
    triton="step.launch.step",
    triton_unsupported=_triton_unsupported,
)
