"""Cost of a model's layers on an example input: FLOPs, or time measured on this machine."""

import bisect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from ..nn import LowRankLayer
from ..ops.cost_model_cpu import Plan
from .budget import Cost
from .example import run_example
from .selection import Target

TIMED = 0.05  # seconds to time a layer at one rank, up to ten times that on a busy machine


@dataclass(frozen=True)
class LayerCall:
    """One use of a layer.

    Attributes:
        shape: Shape of the input.
        requires_grad: Whether the input needs a gradient.
        rows: Rows of the input that W multiplies; for a convolution, the pixels of the output.
        part: Share of W's rows that are used, less than 1 where queries, keys and values differ.
        memory_format: Memory format of the input.
    """

    shape: tuple[int, ...]
    requires_grad: bool
    rows: int
    part: float = 1.0
    memory_format: torch.memory_format = torch.contiguous_format


def record_calls(model: nn.Module, targets: list[Target], example_input) -> dict[str, list[LayerCall]]:
    """Return the calls of each target and twin in one forward on the example; raises as run_example."""
    calls: dict[str, list[LayerCall]] = {t.name: [] for target in targets for t in (target, *target.twins)}

    def on_layer(target: Target, x: Tensor, output: Tensor) -> None:
        last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
        if last is None or x.is_contiguous() or not x.is_contiguous(memory_format=last):
            last = torch.contiguous_format
        rows = target.cls.rows(target.module, x, output)
        calls[target.name].append(LayerCall(tuple(x.shape), x.requires_grad, rows, memory_format=last))

    def on_attention(projections: dict[str, Target], attention: nn.MultiheadAttention, inputs) -> None:
        for child, record in _attention_calls(attention, *inputs).items():
            if child in projections:
                calls[projections[child].name] += record

    with torch.enable_grad():  # a call knows whether its input needs a gradient
        run_example(model, targets, example_input, on_layer, on_attention)
    return calls


def _attention_calls(attention: nn.MultiheadAttention, q: Tensor, k: Tensor, v: Tensor) -> dict[str, list[LayerCall]]:
    """Return the calls of an attention's projections."""

    def call(x: Tensor, part: float = 1.0) -> LayerCall:
        rows = x.numel() // x.shape[-1]
        return LayerCall((rows, x.shape[-1]), x.requires_grad, rows, part)

    rows = q.numel() // q.shape[-1]
    uses = {"q_proj": [call(q)], "k_proj": [call(k)], "v_proj": [call(v)]}
    uses["out_proj"] = [LayerCall((rows, attention.embed_dim), True, rows)]
    if q is k and k is v:
        uses["in_proj"] = [call(q)]
    elif k is v:
        uses["in_proj"] = [call(q, 1 / 3), call(k, 2 / 3)]
    else:
        uses["in_proj"] = [call(x, 1 / 3) for x in (q, k, v)]
    return uses


def dense_flops(target: Target, calls: list[LayerCall]) -> int:
    """Return the dense layer's FLOPs of one forward."""
    m, n = target.shape
    return sum(target.cls.flops(target.module, c.rows, round(c.part * m), n) for c in calls)


def low_rank_flops(target: Target, calls: list[LayerCall], rank: int) -> int:
    """Return the factorized layer's FLOPs of one forward."""
    m, n = target.shape
    return sum(target.cls.flops(target.module, c.rows, round(c.part * m), n, rank) for c in calls)


def flops_cost(target: Target, calls: dict[str, list[LayerCall]]) -> Cost:
    """Return the FLOPs of the target and its twins together."""
    uses = [(t, calls[t.name]) for t in (target, *target.twins)]
    return Cost(
        sum(dense_flops(t, c) for t, c in uses),
        lambda rank: sum(low_rank_flops(t, c, rank) for t, c in uses),
        min(target.shape),
    )


class Clock:
    """Timer of layers on this machine: forward and backward in training mode, else forward; each kind and size once."""

    def __init__(self, training: bool):
        self._training = training
        self._known: dict[tuple, float] = {}

    def cost(self, target: Target, calls: dict[str, list[LayerCall]]) -> Cost:
        """Return the seconds of the target and its twins together, interpolated linearly between the ranks timed."""
        full = min(target.shape)
        ranks = sorted({max(1, full * k // 16) for k in (1, 2, 4, 8, 12, 16)} | {1})
        uses = [(t, c) for t in (target, *target.twins) for c in calls[t.name]]
        times = [sum(self.seconds(t, c, rank) for t, c in uses) for rank in ranks]
        times = [max(times[: i + 1]) for i in range(len(times))]  # noise can make a higher rank look faster
        return Cost(sum(self.seconds(t, c) for t, c in uses), _interpolate(ranks, times), full)

    def seconds(self, target: Target, call: LayerCall, rank: int | None = None) -> float:
        """Time one call at this rank, or of the dense layer for None; a part of W takes that part of the time."""
        W = target.weight
        arguments = target.cls._dense_arguments(target.module)
        key = target.cls, arguments, W.dtype, W.device, W.requires_grad, call, rank
        if key not in self._known:
            with torch.random.fork_rng([W.device] if W.is_cuda else []):
                layer = target.module
                if rank is not None:
                    layer = target.cls(*arguments, device=W.device, dtype=W.dtype, rank=rank).copy_flags_from(
                        target.module
                    )
                self._known[key] = call.part * self._time(layer, call, W)
        return self._known[key]

    def _time(self, layer: nn.Module, call: LayerCall, W: Tensor) -> float:
        x = torch.randn(call.shape, dtype=W.dtype, device=W.device)
        x = x.contiguous(memory_format=call.memory_format).requires_grad_(call.requires_grad)
        inputs = [p for p in (x, *layer.parameters()) if p.requires_grad]

        def forward():  # without the layer's hooks
            with torch.no_grad():
                return layer.forward(x)

        def both():
            y = layer.forward(x)
            torch.autograd.grad(y, inputs, torch.ones_like(y))

        run = both if self._training and inputs else forward
        timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
        # runs longer while the times disagree; what exceeds the minimum is the machine's other load
        return min(timer.adaptive_autorange(min_run_time=TIMED, max_run_time=10 * TIMED).times)


def _interpolate(ranks: list[int], times: list[float]) -> Callable[[int], float]:
    def at(rank: int) -> float:
        i = bisect.bisect_left(ranks, rank)
        if ranks[i] == rank:
            return times[i]
        part = (rank - ranks[i - 1]) / (ranks[i] - ranks[i - 1])
        return times[i - 1] + part * (times[i] - times[i - 1])

    return at


def predict(layer: LowRankLayer, calls: list[LayerCall], training: bool) -> Plan | None:
    """Return the cost model's plan for the layer's calls together, None if there are none."""
    total = [0.0, 0.0, 0.0]
    for call in calls:
        x = torch.empty(call.shape, dtype=layer.U.dtype, device=layer.U.device, requires_grad=call.requires_grad)
        with torch.set_grad_enabled(training):
            plan = layer.plan(x)
        total = [t + call.part * cost for t, cost in zip(total, plan[:3], strict=True)]
    return Plan(*total) if calls else None
