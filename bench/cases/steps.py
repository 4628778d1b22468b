"""The optimizer step of whole networks, batch norms, biases and classifier included, with prescribed gradients.

A step is right if it changes the parameters as a step in float64 does.
"""

import math
from collections.abc import Callable
from functools import cache, partial
from itertools import cycle

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ..inputs import MOVE
from ..registry import CONTEXT, DENSE, OURS, SAME, Operation, Provider, Row, TimedCall, Work
from ..roofline import STEP_NUMBERS
from ..runner import attempt
from .network_setup import (
    STILL,
    Start,
    capturable,
    dense_adamw,
    dense_sgd,
    fast_pytorch,
    fused_adamw,
    fused_sgd,
    kernels_on,
    on,
    ours,
    relative_error,
    released,
    released_by_formula,
    setup,
)
from .networks import BLOCKS, CLASSIC, MLP_BLOCKS, SMALL, NetworkRank, at

LIMIT = 1e-5  # relative error of the new parameters: float32 gives about 1e-6, a wrong formula about MOVE
MUON_LIMIT = 0.1  # relative error of the movement: torch orthogonalizes in bfloat16
MAX_FLOPS = 1e11  # of a step of Muon on a CPU
COEFFICIENTS, MUON_STEPS = (3.4445, -4.775, 2.0315), 5  # torch's


class StepProblem:
    """The step of one network, with learning rates of "factors", "cores" and "other" parameters."""

    def __init__(self, lr: dict[str, float], shape: NetworkRank, dtype: str, device):
        self._setup, self._rank, self._device, self._lr = setup(shape.network), shape.rank, device, lr
        self._sets = cache(self._on_device)
        self.work = {"call": self._setup.step_work(shape.rank)}
        kernels, chosen = kernels_on(device), self._setup.chosen(shape.rank, device)
        mine = self._setup.ours(shape.rank, device)
        self.providers = {"ours": partial(self._low_rank, mine, ours, OURS)}
        if chosen != kernels:
            strict = capturable if kernels == "triton" else ours
            self.providers[f"ours: {kernels}"] = partial(self._low_rank, strict, ours, OURS, kernels)
        self.providers["fast PyTorch"] = partial(self._low_rank, fast_pytorch, ours, SAME)
        if lr == STANDING:
            return
        if chosen != "reference":
            self.providers["reference"] = partial(self._low_rank, ours, ours, SAME, "reference", share=0.4)
        self.providers["released"] = partial(self._low_rank, released, released_by_formula, CONTEXT, share=0.4)
        self.providers["dense SGD"] = partial(self._dense, dense_sgd, dense_sgd, "SGD")
        self.providers["dense SGD fused"] = partial(self._dense, fused_sgd, dense_sgd, "SGD")
        adamw = partial(fused_adamw, capturable=device.kind == "cuda")
        self.providers["dense AdamW fused"] = partial(self._dense, adamw, dense_adamw, "AdamW")
        self.providers["torch Muon"] = self._muon

    def _on_device(self, rank: float | None) -> list[dict[str, Tensor]]:
        sets = self._setup.gradients(rank)
        # a CUDA graph keeps the gradients with which it was captured
        sets = sets[:1] if self._device.kind == "cuda" else sets
        return [{name: g.to(self._device.device) for name, g in gradients.items()} for gradients in sets]

    def _low_rank(self, make: Callable, exact: Callable, role: str, name: str | None = None, share: float = 1.0):
        return self._provider(self._rank, make, exact, role, name, share)

    def _dense(self, make: Callable, exact: Callable, numbers: str) -> Provider:
        work = {"call": self._setup.step_work(None, STEP_NUMBERS[numbers])}
        return self._provider(None, make, exact, DENSE, None, 1.0, work)

    def _provider(self, rank, make, exact, role, name, share, work=None) -> Provider:
        """Return the provider of an optimizer, which `make` makes, and `exact` in float64; name: of our backend."""
        model = self._setup.model(rank).to(self._device.device)
        optimizer = make(model, self._lr)

        def errors(_) -> dict[str, float]:
            right = self._setup.exact_step(rank, exact, tuple(self._lr.items()))
            return {"parameters": relative_error(dict(model.named_parameters()), right)}

        call = stepping(model, optimizer, self._sets(rank), errors)
        if name:
            call.run = on(name, call.run)
        return Provider({"call": call}, {"parameters": LIMIT}, role, work, share)

    def _muon(self) -> Provider:
        """Return the provider of Muon on the dense network's weights, as matrices, alone."""
        model = self._setup.model(None).to(self._device.device)
        names = [name for name, p in model.named_parameters() if p.dim() > 1]
        matrices = nn.ParameterList(model.get_parameter(name).detach().flatten(1).clone() for name in names)
        shapes = [p.shape for p in matrices]
        flops = sum(newton_schulz_flops(*shape) for shape in shapes)
        if self._device.kind == "cpu" and flops > MAX_FLOPS:
            raise TimeoutError(f"a step of {flops:.0e} flops in bfloat16 takes a CPU too long")
        sets = [{str(i): g[n].flatten(1) for i, n in enumerate(names)} for g in self._sets(None)]
        start = {name: p.detach().double().cpu() for name, p in matrices.named_parameters()}

        def errors(_) -> dict[str, float]:
            moved = {name: p.detach().double().cpu() - start[name] for name, p in matrices.named_parameters()}
            right = {name: -MOVE * muon_direction(g.double().cpu()) for name, g in sets[0].items()}
            return {"movement": relative_error(moved, right)}

        optimizer = torch.optim.Muon(
            matrices.parameters(), lr=MOVE, weight_decay=0, ns_coefficients=COEFFICIENTS, ns_steps=MUON_STEPS
        )
        call = stepping(matrices, optimizer, sets, errors)
        work = {"call": [Work(flops, 5 * 4 * sum(map(math.prod, shapes)))]}
        return Provider({"call": call}, {"movement": MUON_LIMIT}, CONTEXT, work, share=0.4)


def stepping(model: nn.Module, optimizer, sets: list[dict[str, Tensor]], errors: Callable) -> TimedCall:
    """Return the optimizer's step with these sets of gradients in turn; a single set stays in place."""
    start, parameters, turn = Start(model, optimizer), dict(model.named_parameters()), cycle(sets)

    def prepare() -> None:
        for name, gradient in next(turn).items():
            parameters[name].grad = gradient

    def rewind() -> None:
        nonlocal turn
        start.restore()
        turn = cycle(sets)

    if len(sets) > 1:
        return TimedCall(optimizer.step, errors, prepare, rewind)
    prepare()
    return TimedCall(optimizer.step, errors, rewind=start.restore)


def newton_schulz_flops(m: int, n: int) -> float:
    k = min(m, n)
    return MUON_STEPS * (4 * m * n * k + 2 * k**3)


def muon_direction(G: Tensor) -> Tensor:
    """Return Muon's first direction by its formula.

    It is the quintic Newton-Schulz iteration on G / ‖G‖, by way of its Gram matrix, times sqrt(max(1, m / n)).
    """
    m, n = G.shape
    X = (G.mT if m > n else G) / G.norm()
    gram, identity = X @ X.mT, torch.eye(min(m, n), dtype=G.dtype)
    Q = identity
    a, b, c = COEFFICIENTS
    for _ in range(MUON_STEPS):
        A = Q @ gram @ Q
        Q = (a * identity + b * A + c * A @ A) @ Q
    X = math.sqrt(max(1, m / n)) * Q @ X
    return X.mT if m > n else X


def launches(device, call: Callable) -> int | None:
    """Count the kernels, copies and fills that a call sends to the device; None if the profiler sees none."""
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        call()
        device.synchronize()
    events = (e for e in found.key_averages() if e.device_type == DeviceType.CUDA and not e.is_user_annotation)
    return sum(e.count for e in events) or None


def launch_records(row: Row, device) -> list[dict]:
    """Return records of the "launches" of ours and of torch's fused steps, on CUDA devices."""
    if device.kind != "cuda":
        return []
    providers = row.operation.problem(row.shape, row.dtype, device).providers
    records = []
    for name in ("ours", "dense SGD fused", "dense AdamW fused"):
        if name in providers:
            record = {"kind": "launches", "op": row.operation.name, "row": str(row.shape), "provider": name}
            record["launches"] = attempt(device, partial(count, device, providers[name]), record, "reason")
            records.append(record)
    return records


def count(device, make: Callable[[], Provider]) -> int | None:
    step = make().calls["call"].run
    for _ in range(2):  # the first makes the momentum
        step()
    return launches(device, step)


MOVING = dict.fromkeys(("factors", "cores", "other"), MOVE)
STANDING = dict.fromkeys(("factors", "cores", "other"), STILL)


def shapes(size: str, device) -> list[NetworkRank]:
    if size == "smoke":
        return SMALL
    found = at(("digits MLP", *CLASSIC))
    if size == "full" or device.kind == "cuda":
        return found + at(BLOCKS + MLP_BLOCKS) + [NetworkRank("transformer", 64)]
    return found + at(BLOCKS, (0.2,))


def is_headline(shape: NetworkRank) -> bool:
    return shape.network == "VGG16"


def still_shapes(size: str, device) -> list[NetworkRank]:
    return SMALL[:1] if size == "smoke" else at(CLASSIC)


OPERATIONS = (
    Operation(
        "step", "the optimizer step of a whole network, every factor, core and weight moving by 0.3 %",
        partial(StepProblem, MOVING), shapes, supported=("fp32",), headline=is_headline, extra=launch_records,
    ),
    Operation(
        "step still", "the same step with learning rates of 1e-6, where the clip finds its cores as it left them",
        partial(StepProblem, STANDING), still_shapes, supported=("fp32",), headline=is_headline,
        extra=launch_records,
    ),
)  # fmt: skip
