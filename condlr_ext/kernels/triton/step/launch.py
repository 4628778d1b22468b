"""The step op by Triton: tables, workspace and launches for a whole network.

Eight launches, whatever the number of layers, and with momentum or without: see network_step.py; two more where some
ranks are above 64 and some not. Nothing waits for the device, and after the first step with the same parameters nothing
is allocated. Where tensors have moved, as gradients may at every step, one copy updates the pointer table; a captured
graph writes it by launches.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ....reference import ROLES
from .. import devices
from ..qr import cholesky_qr
from ..runtime import cooperative
from ..runtime.launching import (
    addresses,
    capturing,
    launch,
    offsets,
    on,
    pointer_table_size,
    rows_per_split,
    table,
    tiles,
    upload,
    write_pointer_table,
)
from . import network_step
from .core_clip import CoreClip
from .tables import FactorRow, LayerRow

# Up to here ‖YᵀY - I‖_F costs one pass of Cholesky-QR in float64 no digits that the parameters hold
_FAR = {torch.float32: 1e7, torch.float64: 1.0}
_U, _S, _V, _BIAS = range(len(ROLES))


class _Factor(NamedTuple):
    """U or V of a layer, with a gradient."""

    index: int  # 2 layer for U, 2 layer + 1 for V
    slot: int  # where it is in params
    S: int  # where its core is
    rows: int
    rank: int


class _Allocator:
    """Offsets into memory that is allocated later, in one piece."""

    def __init__(self):
        self.size = 0

    def take(self, size: int) -> int:
        """Return the offset of the next `size` elements; it is aligned for vector loads."""
        start = self.size
        self.size += math.ceil(size / 32) * 32
        return start


@dataclass
class _Tables:
    """The uploads of a plan: rows of the tables, jobs of `products`, and the work lists of the kernels."""

    section: int  # length of each of the sections params, grads, buffers of the pointer table
    factors: list[FactorRow]
    layers: list[LayerRow]
    trial_points: list[int] = field(default_factory=list)  # behind them
    first_jobs: list[cholesky_qr.ProductJob] = field(default_factory=list)
    first_work: list[tuple] = field(default_factory=list)
    prepare_work: list[tuple] = field(default_factory=list)
    trial_work: list[tuple] = field(default_factory=list)
    gram_jobs: list[cholesky_qr.ProductJob] = field(default_factory=list)
    gram_work: list[tuple] = field(default_factory=list)
    decide_work: list[tuple] = field(default_factory=list)
    finish_work: list[tuple] = field(default_factory=list)
    wide: _Allocator = field(default_factory=_Allocator)
    Y: _Allocator = field(default_factory=_Allocator)
    trial_cores: _Allocator = field(default_factory=_Allocator)

    @property
    def pointers(self) -> int:
        """Where the trial points begin in the pointer table."""
        return pointer_table_size(3 * self.section)

    def entries(self, slot: int) -> tuple[int, int, int]:
        """Return the entries of a parameter, its gradient and its buffer in the pointer table."""
        return slot, self.section + slot, 2 * self.section + slot


class StepPlan:
    """Tables and workspace for steps of a network of one device and dtype, while its tensors keep their shapes.

    Building it waits for the device, running it never does. A captured graph uses the memory of the plan, which must
    outlive it; hyper and skipped must be on the device.

    Args:
        params: As the step op takes them, 4 L tensors, all contiguous, float32 or float64.
        grads: Their gradients. Which of them are empty must not change.

    Attributes:
        captured: Whether a run of it has been captured.
    """

    captured = False

    def __init__(self, params: Sequence[Tensor], grads: Sequence[Tensor]):
        self.device, self.dtype = params[0].device, params[0].dtype
        self.layout = layout(params, grads)
        self._known: tuple[int, ...] = (0,)  # addresses of all tensors as the pointer table has them
        self._last: tuple = (None, None, [])  # hyper, skipped and launches of the last run
        self._hyper: tuple = (None, 0, None)  # one on another device, its version, and its copy
        layers = len(params) // len(ROLES)
        ranks = [S.shape[0] for S in params[_S :: len(ROLES)]]
        self._tile = cholesky_qr.width(max(ranks))
        tables = _Tables(len(params), [FactorRow()] * (2 * layers), [LayerRow()] * layers)
        self._factor_tables(tables, params, grads)
        cores = self._core_tables(tables, params, grads)
        self._upload(tables, params[0])
        blocks = [self._trial[at : at + ranks[i] ** 2].view(ranks[i], ranks[i]) for i, at in cores.items()]
        self._clip = CoreClip(blocks, list(cores))
        zeros = functools.partial(torch.zeros, dtype=torch.int32, device=self.device)
        self._state, self._need = zeros(2 * layers), zeros(2 * layers)
        self._bias_state, self._moved, self._info = zeros(layers), zeros(layers), zeros(layers)

    def _factor_tables(self, tables: _Tables, params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        """Add the rows, jobs and work of every U and V with a gradient."""
        block = cholesky_qr.product_options(self._tile)["BLOCK"]
        rows_per_program = cholesky_qr.solve_options()["ROWS"]
        factors = [
            _Factor(2 * (at // len(ROLES)) + side, at + role, at + _S, *params[at + role].shape)
            for at in range(0, len(params), len(ROLES))
            for side, role in enumerate((_U, _V))
            if grads[at + role].numel()
        ]
        sides = {f: tiles(f.rank, self._tile) for f in factors}
        square = {f: [(i, j) for i in side for j in side] for f, side in sides.items()}
        lower = {f: [(i, j) for i, j in square[f] if j <= i] for f in factors}
        first_lengths = [(f.rows, len(square[f]) + len(lower[f])) for f in factors]  # of O and XᵀX
        per_overlap = rows_per_split(first_lengths, block, self.device)
        per_gram = rows_per_split([(f.rows, len(lower[f])) for f in factors], block, self.device)
        # the longest programs come first
        tables.prepare_work += [(network_step.MAKE_PRECONDITIONER.value, f.index, 0) for f in factors]
        tables.finish_work += [(network_step.RESCUE_FACTOR.value, f.index, 0) for f in factors]
        for f in factors:
            m, r = f.rows, f.rank
            x, grad, buffer = tables.entries(f.slot)
            trial = tables.pointers + len(tables.trial_points)
            tables.trial_points.append(tables.Y.take(m * r))
            overlap_splits, gram_splits = len(tiles(m, per_overlap)), len(tiles(m, per_gram))
            row = FactorRow(
                x=x,
                grad=grad,
                buffer=buffer,
                trial=trial,
                rows=m,
                rank=r,
                hyper=f.slot,
                overlap_parts=tables.wide.take(overlap_splits * r * r),
                overlap_splits=overlap_splits,
                overlap=tables.wide.take(r * r),
                core=tables.wide.take(r * r),
                core_L=tables.wide.take(r * r),
                gram=tables.wide.take(max(overlap_splits, gram_splits) * r * r),
                gram_splits=gram_splits,
                L=tables.wide.take(r * r),
            )
            tables.factors[f.index] = row
            core_row, core_col = (1, r) if f.slot % len(ROLES) == _U else (r, 1)
            tables.first_jobs += [
                cholesky_qr.ProductJob(
                    a=x, a_row=r, a_col=1, b=grad, b_row=r, b_col=1, h=buffer, rows=m, p=r, q=r,
                    per_split=per_overlap, out=row.overlap_parts, hyper=f.slot,
                ),
                cholesky_qr.ProductJob(
                    a=x, a_row=r, a_col=1, b=x, b_row=r, b_col=1, h=x, rows=m, p=r, q=r,
                    per_split=per_overlap, out=row.gram, hyper=-1,
                ),
                cholesky_qr.ProductJob(
                    a=f.S, a_row=core_row, a_col=core_col, b=f.S, b_row=core_row, b_col=core_col, h=f.S, rows=r, p=r,
                    q=r, per_split=r, out=row.core, hyper=-1,
                ),
            ]  # fmt: skip
            tables.gram_jobs.append(
                cholesky_qr.ProductJob(
                    a=trial, a_row=r, a_col=1, b=trial, b_row=r, b_col=1, h=trial, rows=m, p=r, q=r,
                    per_split=per_gram, out=row.gram, hyper=-1,
                )
            )  # fmt: skip
            overlap_job, input_job, core_job = (len(tables.first_jobs) - i for i in (3, 2, 1))
            tables.first_work += [(overlap_job, i, j, split) for i, j in square[f] for split in range(overlap_splits)]
            tables.first_work += [(input_job, i, j, split) for i, j in lower[f] for split in range(overlap_splits)]
            tables.first_work += [(core_job, i, j, 0) for i, j in square[f]]
            gram_job = len(tables.gram_jobs) - 1
            tables.gram_work += [(gram_job, i, j, split) for i, j in lower[f] for split in range(gram_splits)]
            blocks = tiles(r * r, network_step.BLOCK)
            tables.prepare_work += [(network_step.SUM_PRODUCTS.value, f.index, i) for i in blocks]
            tables.trial_work += [(f.index, i) for i in tiles(m, rows_per_program)]
            tables.decide_work.append((f.index,))
            tables.finish_work += [(network_step.MOVE_ROWS.value, f.index, i) for i in tiles(m, rows_per_program)]

    def _core_tables(self, tables: _Tables, params: Sequence[Tensor], grads: Sequence[Tensor]) -> dict[int, int]:
        """Add the rows and work of cores and biases; return where the trial core of each layer starts."""
        cores = {}
        ranks = [S.shape[0] for S in params[_S :: len(ROLES)]]
        # by rank: the longest programs come first, and cores of one rank are at equal distances
        for layer, r in sorted(enumerate(ranks), key=lambda pair: -pair[1]):
            at = len(ROLES) * layer
            if not any(g.numel() for g in grads[at : at + len(ROLES)]):
                continue
            row = {}
            if grads[at + _S].numel():
                cores[layer] = tables.trial_cores.take(r * r)
                row |= dict(zip(("S", "S_grad", "S_buffer"), tables.entries(at + _S), strict=True))
                row |= dict(rank=r, trial=cores[layer])
                blocks = tiles(r * r, network_step.BLOCK)
                tables.prepare_work += [(network_step.TRY_CORE.value, layer, i) for i in blocks]
            if grads[at + _BIAS].numel():
                row |= dict(zip(("bias", "bias_grad", "bias_buffer"), tables.entries(at + _BIAS), strict=True))
                row |= dict(bias_length=params[at + _BIAS].numel())
                tables.prepare_work.append((network_step.CHECK_BIAS.value, layer, 0))
            tables.layers[layer] = LayerRow(**row)
            tables.finish_work.append((network_step.REST_OF_LAYER.value, layer, 0))
        return cores

    def _upload(self, tables: _Tables, base: Tensor) -> None:
        """Copy the tables to the device and allocate the workspace."""
        int32 = functools.partial(table, dtype=torch.int32, device=self.device)
        int64 = functools.partial(table, dtype=torch.int64, device=self.device)
        self._pointer_table = int64([[0] * tables.pointers + tables.trial_points])[0]
        self._factors, self._layers = int64(tables.factors), int64(tables.layers)
        self._first_jobs, self._gram_jobs = int64(tables.first_jobs), int64(tables.gram_jobs)
        self._first_work, self._prepare_work = int32(tables.first_work), int32(tables.prepare_work)
        self._trial_work, self._gram_work = int32(tables.trial_work), int32(tables.gram_work)
        self._decide_work, self._finish_work = int32(tables.decide_work), int32(tables.finish_work)
        self._wide = torch.empty(tables.wide.size, dtype=torch.float64, device=self.device)
        self._Y = base.new_empty(tables.Y.size)
        self._trial = base.new_empty(tables.trial_cores.size)

    def run(
        self, params: Sequence[Tensor], grads: Sequence[Tensor], buffers: Sequence[Tensor], hyper: Tensor,
        skipped: Tensor,
    ) -> None:  # fmt: skip
        """Take one step, as the step op does."""
        cooperative.failure_flag(self.device)  # raises
        with on(self.device):
            now = addresses(itertools.chain(params, grads, buffers))
            if capturing(self.device):
                self.captured = True
                # a table of its own, written in every replay, since other steps overwrite that of the plan
                pointer_table = self._pointer_table.clone()
                write_pointer_table(pointer_table, offsets(now[0], now, self.dtype.itemsize))
                self._launch(pointer_table, params[0], hyper, skipped)
                return
            if now != self._known:
                upload(self._pointer_table, offsets(now[0], now, self.dtype.itemsize))
            last_hyper, last_skipped, launches = self._last
            if hyper is last_hyper and skipped is last_skipped and now[0] == self._known[0]:
                for again in launches:
                    again()
            else:
                base = params[0].detach()  # the plan must not keep the parameter alive, on which its own life depends
                self._last = hyper, skipped, self._launch(self._pointer_table, base, hyper, skipped)
            self._known = now

    def _launch(self, pointer_table: Tensor, base: Tensor, hyper: Tensor, skipped: Tensor) -> list[Callable]:
        """Launch all kernels of a step; return the launches."""
        wide = self._wide
        products, prepare = cholesky_qr.product_options(self._tile), network_step.prepare_options()
        solve, factor = cholesky_qr.solve_options(), cholesky_qr.factor_options()
        finish = network_step.finish_options(devices.architecture(self.device))
        return [
            *_over(
                self._first_work, cholesky_qr.products,
                pointer_table, self._first_jobs, self._first_work, hyper, base, base, wide, **products,
            ),
            *_over(
                self._prepare_work, network_step.prepare,
                pointer_table, self._factors, self._layers, self._prepare_work, hyper, base, wide, self._trial,
                self._state, self._bias_state, self._need, self._moved, **prepare,
            ),
            *_over(
                self._trial_work, network_step.trial,
                pointer_table, self._factors, self._trial_work, hyper, base, wide, self._Y, self._need,
                **solve,
            ),
            *_over(
                self._gram_work, cholesky_qr.products,
                pointer_table, self._gram_jobs, self._gram_work, hyper, self._Y, self._Y, wide, **products,
            ),
            *_over(
                self._decide_work, network_step.decide,
                self._factors, self._decide_work, wide, self._state, self._need, _FAR[self.dtype], **factor,
            ),
            *self._clip(hyper, self._moved, self._info),
            *_over(
                self._finish_work, network_step.finish,
                pointer_table, self._factors, self._layers, self._finish_work, hyper, base, wide, self._Y, self._trial,
                self._state, self._bias_state, self._moved, self._info, skipped, **finish,
            ),
        ]  # fmt: skip

    def hyper_here(self, hyper: Tensor) -> Tensor:
        """Return hyper on the device of the plan, copied only if it is another or has changed."""
        if hyper.device == self.device:
            return hyper
        known, version, copy = self._hyper
        if hyper is not known or hyper._version != version:
            copy = hyper.to(self.device)
            self._hyper = hyper, hyper._version, copy
        return copy


def layout(params: Sequence[Tensor], grads: Sequence[Tensor]) -> tuple:
    """Return what a plan depends on; the numbers of elements say the shapes of U [m, r], S [r, r], V [n, r]."""
    return params[0].device, params[0].dtype, (*map(Tensor.numel, params),), (*map(bool, map(Tensor.numel, grads)),)


_plans = WeakIdKeyDictionary()  # by the first parameter
_captured = WeakIdKeyDictionary()  # earlier plans, whose memory captured graphs use


def step(params, grads, momentum_buffers, hyper: Tensor, skipped: Tensor) -> None:
    """Run the step op with the plan that is cached for the first parameter."""
    if not params:
        return
    plan = _plans.get(params[0])
    if plan is None or plan.layout != layout(params, grads):
        if plan is not None and plan.captured:
            _captured.setdefault(params[0], []).append(plan)
        plan = _plans[params[0]] = StepPlan(params, grads)
    plan.run(params, grads, momentum_buffers, plan.hyper_here(hyper), skipped)


def _over(work: Tensor, kernel, *args, **options) -> list[Callable]:
    """Launch one program for each row of work; return the launch if there is any."""
    return [launch(kernel, (len(work),), *args, **options)] if len(work) else []
