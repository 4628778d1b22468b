"""The arguments of one call of the step op, kept between steps while the parameters stay what they are."""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from .._shards import Team, is_distributed, local
from ..errors import BackendError
from ..reference import BANDS, HYPER, NOT_ORTHONORMAL, ROLES
from .basis import absorb_triangles, in_new_basis
from .divided_step import DividedStep


@dataclass(frozen=True)
class Slot:
    """U, S, V or bias of a layer, as one entry of the op's lists.

    Attributes:
        index: Index among all parameters of the optimizer; None if the parameter has no gradient.
        param: The parameter; None for a missing bias.
        target: Tensor that the op steps: `storage`, or a contiguous copy of its active slice; empty for a missing bias.
        position: (group, index in group) of the parameter; that of S for a missing bias.
        storage: The parameter or its float32 master; of a DTensor the part that this process holds, as the target.
        active_slice: The part of storage that is in use (see nn.layer.active_rank); None if all of it is.
    """

    index: int | None
    param: Tensor | None
    target: Tensor
    position: tuple[int, int]
    storage: Tensor | None = None
    active_slice: tuple[slice, slice] | None = None


class StepCall:
    """One call of the step op: the layers of one device that have a gradient, their table of options, their buffers.

    Args:
        device: Device of the layers.
        owner: Name of the optimizer, for error texts.
        options: The group options that are columns of the op's table.
        precondition: Whether U and V take (S Sᵀ)⁻¹ and (Sᵀ S)⁻¹ times their tangent direction.
        capturable: Keep the table on the device, and read tensors among the options there at every step.
        team: The processes among which rows of the layers are divided, if they are.

    Attributes:
        layers: Indices of the layers in the optimizer.
        slots: Four for each layer, in the order of ROLES.
        masters: (parameter, float32 master) of low-precision slots; the master as it is here.
        table: The op's hyper-parameters [L, 4, len(HYPER)], float64.
        live: For options that are tensors: a column of the table, the mask of its group's rows, and the tensor.
        starts_buffers: Whether some momentum buffer starts in this call.
    """

    def __init__(
        self, device: torch.device, owner: str, options: tuple[str, ...], *, precondition: bool, capturable: bool,
        team: Team,
    ):  # fmt: skip
        self.device, self.owner, self.options, self.team = device, owner, options, team
        self.precondition, self.capturable = precondition, capturable
        self.layers: list[int] = []
        self.slots: list[Slot] = []
        self.masters: list[tuple[Tensor, Tensor]] = []
        self.table: Tensor | None = None
        self.live: list[tuple[Tensor, Tensor, Tensor]] = []
        self.starts_buffers = False
        self._fresh: list[bool] = []  # by slot: whether its momentum buffer starts
        self._buffers: list[Tensor] = []  # by slot: the momentum buffer for the op, empty if none
        self._factors: list[Tensor] = []  # the parameters U, S and V
        self._table_options: list[list] | None = None  # the options that the table was made from
        self._option_tensors: list[Tensor] = []  # those among them, kept so that no other tensor gets their id
        self._asked_backend = ops.current_backend()
        self._backend: str | None = None  # the one that serves, chosen in the first run
        self._used: list[tuple] = []  # (index, parameter, its part here, dtype, state tensors) of slots with a gradient
        self._copies: list[tuple[Tensor, tuple, Tensor]] = []  # (storage, active slice, contiguous copy)
        self._written: list[Tensor] = []
        self._versions: list[int] = []  # of the factors after the last step
        # None: looking at the counts waits for nothing
        self._marks = _Marks() if device.type == "cuda" and not team else None
        self._empty: dict[torch.dtype, Tensor] = {}

    # -------------------------------------------------------------------------------------------- layers

    def add_layer(self, index: int, factors: list[Tensor]) -> None:
        """Begin a layer, of the parameters U, S and V, whose four slots are added next."""
        self.layers.append(index)
        # both a DTensor and its part here count the writes to them
        self._factors += factors + [local(X) for X in factors if is_distributed(X)]

    def make_slot(
        self, index: int | None, param: Tensor, storage: Tensor, position: tuple[int, int], active_slice: tuple | None
    ) -> Slot:
        """Return the slot of a parameter; see Slot."""
        storage = local(storage)
        return Slot(index, param, self._contiguous(storage, active_slice), position, storage, active_slice)

    def missing_slot(self, dtype: torch.dtype, position: tuple[int, int]) -> Slot:
        """Return the slot of a bias that the layer does not have."""
        return Slot(None, None, self.empty(dtype), position)

    def add(self, slot: Slot, state: dict[str, Tensor], buffer: Tensor | None = None, fresh: bool = False) -> None:
        """Add a slot to the current layer.

        Args:
            slot: The slot.
            state: Tensors of the parameter's state that the call uses.
            buffer: Its momentum buffer, if it has one.
            fresh: Whether the buffer starts in this call.
        """
        self.slots.append(slot)
        self._buffers.append(self.empty(slot.target.dtype) if buffer is None else self.active_part(slot, buffer))
        self._fresh.append(fresh)
        self.starts_buffers |= fresh
        if slot.index is None:
            return
        here = local(slot.param)
        self._used.append((slot.index, slot.param, here, here.dtype, state))
        self._written += [slot.storage] if buffer is None else [slot.storage, buffer]
        if slot.storage is not here:
            self.masters.append((slot.param, slot.storage))

    def empty(self, dtype: torch.dtype) -> Tensor:
        """Return the placeholder for a missing tensor."""
        if dtype not in self._empty:
            self._empty[dtype] = torch.empty(0, dtype=dtype, device=self.device)
        return self._empty[dtype]

    def active_part(self, slot: Slot, tensor: Tensor) -> Tensor:
        """Return the active part of a tensor of the slot's state."""
        return self._contiguous(tensor, slot.active_slice if tensor.shape == slot.storage.shape else None)

    def _contiguous(self, storage: Tensor, active_slice: tuple | None) -> Tensor:
        if active_slice is None:
            return storage
        copy = storage[active_slice].clone(memory_format=torch.contiguous_format)
        self._copies.append((storage, active_slice, copy))
        return copy

    @functools.cached_property
    def layer_index(self) -> Tensor:
        """`layers` on the device."""
        return torch.tensor(self.layers, dtype=torch.int64, device=self.device)

    @functools.cached_property
    def skipped(self) -> Tensor:
        """A counter for the layers of this call."""
        return torch.zeros(len(self.layers), dtype=torch.int64, device=self.device)

    def started(self, skipped: set[int]) -> Iterator[Tensor]:
        """Yield the parameters whose momentum buffers started, except in the layers skipped."""
        for i, (slot, fresh) in enumerate(zip(self.slots, self._fresh, strict=True)):
            if fresh and i // len(ROLES) not in skipped:
                yield slot.param

    # ------------------------------------------------------------------------------------------ validity

    def is_valid_for(self, params: list[Tensor], state) -> bool:
        """Return whether the next step can use the same arguments, given the same parameters have gradients.

        Factors that were written to since the last step may have another number of active directions, or not be
        orthonormal, for which the first run of other arguments looks.
        """
        return (
            self._asked_backend == ops.current_backend()
            and self._versions == [X._version for X in self._factors]
            and all(
                params[i] is p
                and local(p) is here
                and here.dtype is dtype
                and here.device == self.device
                and here.is_contiguous()
                and all(state[p].get(key) is tensor for key, tensor in used.items())
                for i, p, here, dtype, used in self._used
            )
        )

    @functools.cached_property
    def _divided(self) -> DividedStep | None:
        """The step of layers that are divided among processes."""
        if not self.team:
            return None
        if self._asked_backend in ("cpu", "triton"):
            raise BackendError(
                f"{self.owner}: backend {self._asked_backend!r} has no step for parameters that are divided among"
                " processes; PyTorch serves them under 'auto' and 'reference'"
            )
        return self._divided_step(self.slots)

    def _divided_step(self, slots: list[Slot]) -> DividedStep:
        return DividedStep(self.team, [slot.param for slot in slots], [slot.index is not None for slot in slots])

    def _take_back(self, layers: list[int]) -> None:
        """Undo what `directions` has done in layers of the call that have bad gradients in another process."""

    # ----------------------------------------------------------------------------------------- the table

    def _update_table(self, groups: list[dict], check: Callable[[dict], None]) -> Tensor:
        """Return the table, made again only if an option has changed; `check` raises for bad options of a group."""
        read = id if self.capturable else float
        options = [[read(v) if isinstance(v := group[k], Tensor) else v for k in self.options] for group in groups]
        if options != self._table_options:
            for group in groups:
                check(group)
            table = self._make_table(groups)
            if self.capturable:
                table = table.to(self.device)
                self.live = self._live_columns(groups, table)
            self._table_options, self.table = options, table
            self._option_tensors = [v for group in groups for k in self.options if isinstance(v := group[k], Tensor)]
        for column, mask, value in self.live:
            column.copy_(torch.where(mask, value.to(column.dtype), column))
        return self.table

    def _make_table(self, groups: list[dict]) -> Tensor:
        values = []
        for group in groups:
            value = {k: group[k] if group[k] is None or k == "band" else float(group[k]) for k in self.options}
            value["band"] = BANDS.index(value["band"])
            value["sigma_max"] = math.inf if value["sigma_max"] is None else value["sigma_max"]
            values.append(value | {"precondition": self.precondition})
        rows = [
            [(values[slot.position[0]] | {"fresh": fresh}).get(name, 0) for name in HYPER]
            for slot, fresh in zip(self.slots, self._fresh, strict=True)
        ]
        return torch.tensor(rows, dtype=torch.float64, device="cpu").reshape(len(self.layers), len(ROLES), len(HYPER))

    def _live_columns(self, groups: list[dict], table: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        live = []
        for g, group in enumerate(groups):
            for name in self.options:
                if isinstance(value := group[name], Tensor):
                    if value.device != self.device:
                        raise ValueError(
                            f"{self.owner}: {name} as a tensor must be on the layers' device {self.device} under"
                            f" capturable=True, got {value.device}"
                        )
                    in_group = [slot.position[0] == g for slot in self.slots]
                    mask = torch.tensor(in_group, dtype=torch.bool, device=self.device)
                    column = table[..., HYPER.index(name)]
                    live.append((column, mask.view(column.shape), value.detach().view(())))
        return live

    # ----------------------------------------------------------------------------------------------- run

    def gradient(self, slot: Slot, grads: list[Tensor | None]) -> Tensor:
        """Return the gradient of a slot as the op takes it, empty if there is none."""
        if slot.index is None:
            return self.empty(slot.target.dtype)
        grad, dtype = grads[slot.index], slot.target.dtype
        grad = grad if slot.active_slice is None else grad[slot.active_slice]
        return grad if grad.dtype is dtype and grad.is_contiguous() else grad.to(dtype).contiguous()

    def directions(self, groups: list[dict], grads: list[Tensor | None]) -> list[Tensor]:
        """Return the tensors that the op takes for gradients, one per slot."""
        return [self.gradient(slot, grads) for slot in self.slots]

    def run(
        self,
        groups: list[dict],
        grads: list[Tensor | None],
        skipped: Tensor,
        check: Callable[[dict], None],
        waits: bool = False,
    ) -> list[int]:
        """Step the layers. Where something has written to U or V since the last step, they are made orthonormal first.

        On a GPU the host looks for that in the first run of the arguments. It learns of later writes, which no version
        counter shows, as those through `.data`, without waiting for the device: the layer is left unchanged until its
        mark has come to the host, a step or two later. Under a captured graph it stays so until a step outside.

        Args:
            groups: The optimizer's parameter groups.
            grads: Gradients of all parameters of the optimizer, in order.
            skipped: Counts the layers that were left unchanged, int64, one for each layer of the call; see
                `skipped_steps`.
            check: Raises for bad options of a group; called when options have changed.
            waits: Whether the caller waits for the device anyway.

        Returns:
            Layers of the optimizer that were left unchanged because that would change a frozen factor.

        Raises:
            BackendError: capturable, and the Triton step cannot serve these layers.
        """
        table = self._update_table(groups, check)
        for storage, active_slice, copy in self._copies:
            copy.copy_(storage[active_slice])
        args = ([slot.target for slot in self.slots], self.directions(groups, grads), self._buffers, table, skipped)
        looks = self._marks is None or waits or self._backend is None or self._marks.have_come()
        if looks and self._marks:
            skipped.copy_(skipped_steps(skipped))  # so that it gets only the marks of this step
        if self._backend is None and not self.team:
            named = ops.step.step.choose(*args)
            self._backend = ops.step.step.automatic(*args) if named == "auto" else named
            if self.capturable and (reasons := ops.step.step.unsupported_reasons("triton", *args)):
                raise BackendError(f"{self.owner}: capturable=True needs the Triton step: {'; '.join(reasons)}")
        if self._divided:
            self._take_back(self._divided(*args))
        else:
            ops.step.step.run(self._backend, *args)
        frozen = self._step_again(*args) if looks and has_marks(skipped) else []
        if self._marks:
            self._marks.ask(skipped)
        for storage, active_slice, copy in self._copies:
            storage[active_slice].copy_(copy)
        # compiled kernels write through raw pointers, of which autograd must be told
        torch.autograd.graph.increment_version(self._written)
        for p, master in self.masters:
            local(p).copy_(master)
        self._versions = [X._version for X in self._factors]
        return frozen

    def _step_again(
        self, params: list[Tensor], grads: list[Tensor], buffers: list[Tensor], table: Tensor, skipped: Tensor
    ) -> list[int]:
        """Step the layers that `skipped` marks as not orthonormal, after absorbing the triangles of U and V in S.

        Return those that cannot be changed because a factor is frozen. The weight does not change by this; gradients
        and buffers become those of the new factors.
        """
        frozen = []
        for layer in (skipped >= NOT_ORTHONORMAL).nonzero().flatten().tolist():
            skipped[layer] -= NOT_ORTHONORMAL
            at = slice(len(ROLES) * layer, len(ROLES) * (layer + 1))
            U, S, V, _ = params[at]
            if any(slot.index is None for slot in self.slots[at][:3]):
                skipped[layer] += 1
                frozen.append(self.layers[layer])
                continue
            given = [t.clone() for t in (U, S, V, *buffers[at])]
            if self.team:
                step = self._divided_step(self.slots[at])
                absorb, rebase = step.absorb_triangles, step.in_new_basis
            else:
                step = functools.partial(ops.step.step.run, self._backend)
                absorb, rebase = absorb_triangles, in_new_basis
            R_U, R_V = absorb(U, S, V)
            of_new_factors = [rebase(g, R_U, R_V) for g in (grads[at], buffers[at])]
            for buffer, new in zip(buffers[at], of_new_factors[1], strict=True):
                buffer.copy_(new)
            count = torch.zeros(1, dtype=skipped.dtype, device=skipped.device)
            one = table[layer : layer + 1]
            step(params[at], of_new_factors[0], buffers[at], one, count)
            if count:  # left unchanged, so what was written stays too
                skipped[layer] += 1
                for t, before in zip((U, S, V, *buffers[at]), given, strict=True):
                    t.copy_(before)
        return frozen


class _Marks:
    """Looks for marks in the counts on a GPU without waiting for it: in a copy, once that has come to the host."""

    def __init__(self):
        self._copy: Tensor | None = None
        self._event: torch.cuda.Event | None = None

    def ask(self, skipped: Tensor) -> None:
        """Ask for a copy of the counts, unless one is on its way or a graph is being captured."""
        if self._copy is None and not torch.cuda.is_current_stream_capturing():
            self._copy = skipped.to("cpu", non_blocking=True)
            self._event = torch.cuda.current_stream(skipped.device).record_event()

    def have_come(self) -> bool:
        """Return whether a copy has come that shows a mark."""
        if self._copy is None or torch.cuda.is_current_stream_capturing() or not self._event.query():
            return False
        copy, self._copy = self._copy, None
        return has_marks(copy)


def has_marks(skipped: Tensor) -> bool:
    """Return whether the op has marked a layer as not orthonormal; this waits for the device."""
    return bool(skipped.cpu().numpy().max() >= NOT_ORTHONORMAL)


def skipped_steps(skipped: Tensor) -> Tensor:
    """Return the steps that left each layer unchanged; those that marked it count too."""
    return skipped // NOT_ORTHONORMAL + skipped % NOT_ORTHONORMAL
