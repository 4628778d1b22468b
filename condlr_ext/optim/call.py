"""The arguments of one call of the step op, kept from step to step while the parameters stay what they are."""

import functools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import ops
from ..errors import BackendError


@dataclass
class StepCall:
    """The layers of one device that have a gradient, four slots each in the order of ROLES.

    layers: their indices in the optimiser. at: per slot, where its parameter stands among all parameters of the
    optimiser if it has a gradient, else None. targets, buffers: what the op writes; fresh: whether a buffer starts.
    places: (group, index) of the slot, that of S where the layer has no bias. copies: parameters with a master.
    """

    device: torch.device
    capturable: bool = False
    layers: list[int] = field(default_factory=list)
    at: list[int | None] = field(default_factory=list)
    targets: list[Tensor] = field(default_factory=list)
    buffers: list[Tensor] = field(default_factory=list)
    fresh: list[bool] = field(default_factory=list)
    places: list[tuple[int, int]] = field(default_factory=list)
    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def __post_init__(self):
        self.backend_asked = ops.current_backend()
        self.backend: str | None = None  # the one that serves, found in the first run
        self.options: list[list] | None = None  # the options of all groups that the table was made from
        self.table: Tensor | None = None
        self.live: list[tuple[Tensor, Tensor, Tensor]] = []  # options that are tensors, see CondLRSGD
        self._known: list[tuple] = []
        self.written: list[Tensor] = []

    @functools.cached_property
    def index(self) -> Tensor:
        """`layers` on the device."""
        return torch.tensor(self.layers, device=self.device)

    def add(self, index: int | None, p: Tensor | None, target: Tensor, buffer: Tensor, fresh: bool, place) -> None:
        """One slot; p is None where the layer has no bias."""
        self.at.append(index)
        self.targets.append(target)
        self.buffers.append(buffer)
        self.fresh.append(fresh)
        self.places.append(place)
        if index is None:
            return
        self._known.append((index, p, p.dtype, buffer if buffer.numel() and not fresh else None))
        self.written += [target, buffer] if buffer.numel() else [target]
        if target is not p:
            self.copies.append((p, target))

    def holds(self, params: list[Tensor], state) -> bool:
        """Whether the next step can use the same arguments, for the same parameters with a gradient."""
        return self.backend_asked == ops.current_backend() and all(
            params[i] is p
            and p.dtype is dtype
            and p.device == self.device
            and p.is_contiguous()
            and (buffer is None or state[p].get("momentum_buffer") is buffer)
            for i, p, dtype, buffer in self._known
        )

    def run(self, grads: list[Tensor | None], table: Tensor, skipped: Tensor) -> None:
        """Steps the layers; grads of all parameters of the optimiser."""
        empty = self.targets[0].new_empty(0)
        given = [
            empty if i is None else _dense(grads[i], target.dtype)
            for i, target in zip(self.at, self.targets, strict=True)
        ]
        args = (self.targets, given, self.buffers, table, skipped)
        if self.backend is None:
            self.backend = ops.step.step.choose(*args)
            if self.capturable and (reasons := ops.step.step.reasons_not("triton", *args)):
                raise BackendError(f"CondLRSGD: capturable=True needs the Triton step: {'; '.join(reasons)}")
        ops.step.step.run(self.backend, *args)
        # autograd must notice: compiled kernels write through raw pointers
        torch.autograd.graph.increment_version(self.written)
        for p, master in self.copies:
            p.copy_(master)


def _dense(grad: Tensor, dtype: torch.dtype) -> Tensor:
    if grad.is_sparse:
        raise RuntimeError("CondLRSGD does not take sparse gradients for low-rank layers")
    return grad if grad.dtype is dtype and grad.is_contiguous() else grad.to(dtype).contiguous()
