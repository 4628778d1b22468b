"""step: one constrained SGD step of a whole network; reference everywhere, one compiled call on CPUs."""

import torch

from .. import reference
from ._dispatch import Op, reasons_not_compiled

STEP = (
    "step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor hyper, Tensor(c!) skipped) -> ()"
)


def _fake(params, grads, momentum_buffers, hyper, skipped) -> None:
    torch._check(len(params) == len(grads) == len(momentum_buffers) == 4 * hyper.shape[0])


def _cpu(params, grads, momentum_buffers, hyper, skipped) -> list[str]:
    reasons = reasons_not_compiled((*params, *grads, *momentum_buffers, skipped), _DTYPES)
    if not all(t.is_contiguous() for t in (*params, *grads, *momentum_buffers)):
        reasons.append("a parameter, gradient or buffer is not contiguous")
    return reasons


_DTYPES = (torch.float32, torch.float64, torch.int64)  # int64: the counter

step = Op(STEP, reference=reference.step, fake=_fake, cpu=_cpu)
