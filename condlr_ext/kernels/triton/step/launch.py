"""The step op by Triton: what is launched for a whole network, over which tables, in which memory.

Eight launches, whatever the number of layers, and with momentum or without: see network_step.py. Nothing waits for the
device, and after the first step with the same parameters nothing is allocated. Where gradients have moved, as they may
from step to step, a launch for every eight layers tells the device so; a captured graph tells it where everything is.
"""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..qr import cholesky_qr
from ..runtime.launching import (
    capturing,
    offsets,
    on,
    pointer_table_size,
    rows_per_split,
    table,
    tiles,
    write_pointer_table,
)
from . import network_step
from .core_clip import CoreClip

# Up to here ‖YᵀY - I‖_F costs one pass of Cholesky-QR in float64 no digits that the parameters hold
_FAR = {torch.float32: 1e7, torch.float64: 1.0}


class StepPlan:
    """Tables and memory for steps of a network of one device and dtype, for as long as its tensors keep their shapes.

    Args:
        params, grads: as the step op takes them, 4 L tensors, all contiguous, float32 or float64. Which of them are
            empty must not change.

    Building it waits for the device, running it never does. A captured graph uses the memory of the plan, which must
    outlive it; hyper and skipped must be on the device.

    Attributes:
        captured: whether a run of it has been.
    """

    captured = False

    def __init__(self, params: Sequence[Tensor], grads: Sequence[Tensor]):
        self.device, self.dtype = params[0].device, params[0].dtype
        self.layout = layout(params, grads)
        count = len(params) // 4
        ranks = [params[4 * layer].shape[1] for layer in range(count)]
        self._tile = cholesky_qr.width(max(ranks))
        block = cholesky_qr.product_options(self._tile)["BLOCK"]
        rows = cholesky_qr.solve_options()["ROWS"]

        # factor 2 l is U of layer l, factor 2 l + 1 its V
        factors = {
            2 * layer + i: (4 * layer + role, params[4 * layer + role].shape[0], ranks[layer])
            for layer in range(count)
            for i, role in enumerate((0, 2))
            if grads[4 * layer + role].numel()
        }
        sides = {f: tiles(r, self._tile) for f, (_, _, r) in factors.items()}
        square = {f: [(i, j) for i in side for j in side] for f, side in sides.items()}
        lower = {f: [(i, j) for i, j in square[f] if j <= i] for f in factors}
        per_overlap, per_gram = (
            rows_per_split([(m, len(t[f])) for f, (_, m, _) in factors.items()], block, self.device)
            for t in (square, lower)
        )

        section = pointer_table_size(4 * count)
        pointer_table = [0] * 3 * section
        wide = _Room()
        trial_points, trial_cores = _Room(), _Room()
        factor_rows = [[0] * len(network_step.FACTOR) for _ in range(2 * count)]
        layer_rows = [[0] * len(network_step.LAYER) for _ in range(count)]
        firsts, grams = [], []  # jobs of `products`
        first_work, gram_work, prepare_work, trial_work, factor_work, finish_work = [], [], [], [], [], []
        # long programs first
        prepare_work += [(network_step.PRECONDITION.value, f, 0) for f in factors]
        for f, (slot, m, r) in factors.items():
            S = f // 2 * 4 + 1
            overlaps, splits = len(tiles(m, per_overlap)), len(tiles(m, per_gram))
            y = len(pointer_table)
            pointer_table.append(trial_points.take(m * r))
            parts, overlap, core, core_L, gram, L = (wide.take(n * r * r) for n in (overlaps, 1, 1, 1, splits, 1))
            factor_rows[f] = [
                slot, section + slot, 2 * section + slot, y, m, r, slot, parts, overlaps, overlap, core, core_L, gram,
                splits, L,
            ]  # fmt: skip
            g, b = section + slot, 2 * section + slot
            transposed = (1, r) if f % 2 == 0 else (r, 1)
            firsts.append((slot, r, 1, g, r, 1, b, m, r, r, per_overlap, parts, slot))
            firsts.append((S, *transposed, S, *transposed, S, r, r, r, r, core, -1))
            grams.append((y, r, 1, y, r, 1, y, m, r, r, per_gram, gram, -1))
            first_work += [(len(firsts) - 2, i, j, s) for i, j in square[f] for s in range(overlaps)]
            first_work += [(len(firsts) - 1, i, j, 0) for i, j in square[f]]
            gram_work += [(len(grams) - 1, i, j, s) for i, j in lower[f] for s in range(splits)]
            prepare_work += [(network_step.OVERLAP.value, f, i) for i in tiles(r * r, network_step.BLOCK)]
            trial_work += [(f, i) for i in tiles(m, rows)]
            factor_work.append((f,))
            finish_work += [(network_step.ROWS_OF_FACTOR.value, f, i) for i in tiles(m, rows)]
        finish_work = [(network_step.WHOLE_FACTOR.value, f, 0) for f in factors] + finish_work  # the longest first
        cores = {}
        # by rank: the longest first, and cores of one rank at equal distances
        for layer, r in sorted(enumerate(ranks), key=lambda pair: -pair[1]):
            at = 4 * layer
            if not any(g.numel() for g in grads[at : at + 4]):
                continue
            row = layer_rows[layer]
            finish_work.append((network_step.REST_OF_LAYER.value, layer, 0))
            if grads[at + 1].numel():
                cores[layer] = trial_cores.take(r * r)
                row[:5] = [at + 1, section + at + 1, 2 * section + at + 1, r, cores[layer]]
                prepare_work += [(network_step.CORE.value, layer, i) for i in tiles(r * r, network_step.BLOCK)]
            if grads[at + 3].numel():
                row[5:] = [at + 3, section + at + 3, 2 * section + at + 3, params[at + 3].numel()]
                prepare_work.append((network_step.BIAS.value, layer, 0))

        int32 = functools.partial(table, dtype=torch.int32, device=self.device)
        int64 = functools.partial(table, dtype=torch.int64, device=self.device)
        self._section, self._known = section, [None] * 3
        self._pointer_table = int64([pointer_table])[0]
        self._factors, self._layers, self._firsts, self._grams = map(int64, (factor_rows, layer_rows, firsts, grams))
        self._first_work, self._gram_work, self._prepare_work = map(int32, (first_work, gram_work, prepare_work))
        self._trial_work, self._factor_work, self._finish_work = map(int32, (trial_work, factor_work, finish_work))
        self._wide = torch.empty(wide.size, dtype=torch.float64, device=self.device)
        self._Y = params[0].new_empty(trial_points.size)
        self._trial = params[0].new_empty(trial_cores.size)
        blocks = [self._trial[at : at + ranks[i] ** 2].view(ranks[i], ranks[i]) for i, at in cores.items()]
        self._clip = CoreClip(blocks, list(cores))
        self._state = torch.zeros(2 * count, dtype=torch.int32, device=self.device)
        self._bias_state = torch.zeros(count, dtype=torch.int32, device=self.device)
        self._info = torch.zeros(count, dtype=torch.int32, device=self.device)

    def run(
        self, params: Sequence[Tensor], grads: Sequence[Tensor], buffers: Sequence[Tensor], hyper: Tensor,
        skipped: Tensor,
    ) -> None:  # fmt: skip
        """One step, as the step op."""
        base, wide = params[0], self._wide
        products = cholesky_qr.product_options(self._tile)
        with on(self.device):
            pointer_table = self._find(base, params, grads, buffers)
            _launch(cholesky_qr.products, self._first_work)(
                pointer_table, self._firsts, self._first_work, hyper, base, base, wide, **products
            )
            _launch(network_step.prepare, self._prepare_work)(
                pointer_table, self._factors, self._layers, self._prepare_work, hyper, base, wide, self._trial,
                self._state, self._bias_state, **network_step.prepare_options(),
            )  # fmt: skip
            _launch(network_step.trial, self._trial_work)(
                pointer_table,
                self._factors,
                self._trial_work,
                hyper,
                base,
                wide,
                self._Y,
                **cholesky_qr.solve_options(),
            )
            _launch(cholesky_qr.products, self._gram_work)(
                pointer_table, self._grams, self._gram_work, hyper, self._Y, self._Y, wide, **products
            )
            _launch(network_step.decide, self._factor_work)(
                self._factors, self._factor_work, wide, self._state, _FAR[self.dtype],
                **cholesky_qr.factor_options(),
            )  # fmt: skip
            self._clip(hyper, self._info)
            _launch(network_step.finish, self._finish_work)(
                pointer_table, self._factors, self._layers, self._finish_work, hyper, base, wide, self._Y, self._trial,
                self._state, self._bias_state, self._info, skipped, **network_step.finish_options(),
            )  # fmt: skip

    def _find(self, base: Tensor, *sections: Sequence[Tensor]) -> Tensor:
        """Where everything lies, written anew as far as it has moved.

        A captured graph has a table of its own, in which it writes all three sections in every replay: what steps
        beside it wrote into the plan's is not where its tensors are.
        """
        captured = capturing(self.device)
        self.captured |= captured
        pointer_table = self._pointer_table.clone() if captured else self._pointer_table
        for i, tensors in enumerate(sections):
            now = offsets(base, tensors)
            if captured or now != self._known[i]:
                write_pointer_table(pointer_table[i * self._section :], now)
                if not captured:
                    self._known[i] = now
        return pointer_table


def layout(params: Sequence[Tensor], grads: Sequence[Tensor]) -> tuple:
    """What a plan depends on."""
    shapes = tuple((p.shape, g.numel() > 0) for p, g in zip(params, grads, strict=True))
    return params[0].device, params[0].dtype, shapes


_plans = WeakIdKeyDictionary()  # by the first parameter
_captured = WeakIdKeyDictionary()  # earlier plans, whose memory graphs use


def step(params, grads, momentum_buffers, hyper: Tensor, skipped: Tensor) -> None:
    """The op, by the plan that is kept with its first parameter."""
    if not params:
        return
    plan = _plans.get(params[0])
    if plan is None or plan.layout != layout(params, grads):
        if plan is not None and plan.captured:
            _captured.setdefault(params[0], []).append(plan)
        plan = _plans[params[0]] = StepPlan(params, grads)
    plan.run(params, grads, momentum_buffers, hyper.to(plan.device), skipped)


def _launch(kernel, work: Tensor):
    """A program for each row of work, none where there is no row."""
    return kernel[(len(work),)] if len(work) else lambda *args, **options: None


class _Room:
    """Memory laid out before it is there."""

    def __init__(self):
        self.size = 0

    def take(self, size: int) -> int:
        """Where the next `size` elements start; whole vectors can be loaded from there."""
        start = self.size
        self.size += math.ceil(size / 32) * 32
        return start
