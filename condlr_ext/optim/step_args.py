"""The arguments of one call of the step op, kept from step to step while the parameters stay what they are."""

import functools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import ops
from ..errors import BackendError


@dataclass(frozen=True)
class Slot:
    """U, S, V or bias of a layer: the parameter p at `place`, (group, index), for which `target` is stepped.

    at: where p stands among all parameters of the optimizer if it has a gradient, else None. Where the layer has no
    bias p is None, target empty, and place that of S. Where the layer has room for more directions
    (nn.layer.active_rank) target is a copy of `part` of whole, the tensor to be stepped; else part is None.
    """

    at: int | None
    p: Tensor | None
    target: Tensor
    place: tuple[int, int]
    whole: Tensor | None = None
    part: tuple[slice, slice] | None = None


@dataclass
class StepCall:
    """The layers of one device that have a gradient, `parts` entries of the op each, an entry being four slots.

    owner: the optimizer's name, for errors. layers: their indices in the optimizer. slots: in the order of ROLES;
    buffers: their momentum buffers, empty where there is none, kept: as the state holds them; fresh: whether one
    starts. copies: parameters with a master. cores: the parameters S.
    """

    device: torch.device
    owner: str
    capturable: bool = False
    layers: list[int] = field(default_factory=list)
    slots: list[Slot] = field(default_factory=list)
    buffers: list[Tensor] = field(default_factory=list)
    kept: list[Tensor | None] = field(default_factory=list)
    fresh: list[bool] = field(default_factory=list)
    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    cores: list[Tensor] = field(default_factory=list)
    written: list[Tensor] = field(default_factory=list)
    parts = 1

    def __post_init__(self):
        self.backend_asked = ops.current_backend()
        self.backend: str | None = None  # the one that serves, found in the first run
        self.options: list[list] | None = None  # the options of all groups that the table was made from
        self.table: Tensor | None = None
        self.live: list[tuple[Tensor, Tensor, Tensor]] = []  # options that are tensors, see the optimizer's _live
        self._known: list[tuple] = []
        self._parts: list[tuple[Tensor, tuple, Tensor]] = []  # a tensor, which part of it is in use, a copy of that
        self._versions: list[int] = []  # of the cores after the last step
        self._empty: dict[torch.dtype, Tensor] = {}

    @functools.cached_property
    def index(self) -> Tensor:
        """`layers` on the device."""
        return torch.tensor(self.layers, device=self.device)

    @functools.cached_property
    def skipped(self) -> Tensor:
        """Room for the counts of one step."""
        return torch.zeros(len(self.slots) // 4, dtype=torch.int64, device=self.device)

    def empty(self, dtype: torch.dtype) -> Tensor:
        """What stands for a tensor that is not there."""
        if dtype not in self._empty:
            self._empty[dtype] = torch.empty(0, dtype=dtype, device=self.device)
        return self._empty[dtype]

    def slot(self, at: int | None, p: Tensor, whole: Tensor, place: tuple[int, int], part: tuple | None) -> Slot:
        """That of a parameter, of which `whole` is stepped, or the part of it that is in use."""
        return Slot(at, p, self._copy(whole, part), place, whole, part)

    def in_use(self, slot: Slot, tensor: Tensor) -> Tensor:
        """What the op takes of a tensor of the slot's state."""
        return self._copy(tensor, slot.part if tensor.shape == slot.whole.shape else None)

    def _copy(self, whole: Tensor, part: tuple | None) -> Tensor:
        if part is None:
            return whole
        copy = whole[part].clone(memory_format=torch.contiguous_format)
        self._parts.append((whole, part, copy))
        return copy

    def add(self, slot: Slot, kept: dict[str, Tensor], buffer: Tensor | None = None, fresh: bool = False) -> None:
        """One slot. kept: tensors of its state that the call uses."""
        self.slots.append(slot)
        self.buffers.append(self.empty(slot.target.dtype) if buffer is None else self.in_use(slot, buffer))
        self.kept.append(buffer)
        self.fresh.append(fresh)
        if slot.at is None:
            return
        self._known.append((slot.at, slot.p, slot.p.dtype, kept))
        self.written += [slot.whole] if buffer is None else [slot.whole, buffer]
        if slot.whole is not slot.p:
            self.copies.append((slot.p, slot.whole))

    def holds(self, params: list[Tensor], state) -> bool:
        """Whether the next step can use the same arguments, for the same parameters with a gradient.

        A core that someone else has written to may have another number of directions in use.
        """
        return (
            self.backend_asked == ops.current_backend()
            and self._versions == [S._version for S in self.cores]
            and all(
                params[i] is p
                and p.dtype is dtype
                and p.device == self.device
                and p.is_contiguous()
                and all(state[p].get(key) is tensor for key, tensor in kept.items())
                for i, p, dtype, kept in self._known
            )
        )

    def gradient(self, slot: Slot, grads: list[Tensor | None]) -> Tensor:
        """That of the slot as the op takes it, empty if it has none."""
        if slot.at is None:
            return self.empty(slot.target.dtype)
        grad, dtype = grads[slot.at], slot.target.dtype
        grad = grad if slot.part is None else grad[slot.part]
        return grad if grad.dtype is dtype and grad.is_contiguous() else grad.to(dtype).contiguous()

    def directions(self, grads: list[Tensor | None]) -> list[Tensor]:
        """What the op takes for gradients: here the gradients, of all parameters of the optimizer, of the slots."""
        return [self.gradient(slot, grads) for slot in self.slots]

    def run(self, grads: list[Tensor | None], table: Tensor, skipped: Tensor) -> None:
        """Steps the layers; grads of all parameters of the optimizer."""
        for whole, part, copy in self._parts:
            copy.copy_(whole[part])
        targets = [slot.target for slot in self.slots]
        args = (targets, self.directions(grads), self.buffers, table, skipped)
        if self.backend is None:
            self.backend = ops.step.step.choose(*args)
            if self.capturable and (reasons := ops.step.step.unsupported_reasons("triton", *args)):
                raise BackendError(f"{self.owner}: capturable=True needs the Triton step: {'; '.join(reasons)}")
        ops.step.step.run(self.backend, *args)
        for whole, part, copy in self._parts:
            whole[part].copy_(copy)
        # autograd must notice: compiled kernels write through raw pointers
        torch.autograd.graph.increment_version(self.written)
        for p, master in self.copies:
            p.copy_(master)
        self._versions = [S._version for S in self.cores]
