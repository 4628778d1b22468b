"""Growth of cost with rank, width, batch and number of layers, measured and by the arithmetic."""

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
from torch import Tensor, nn

from ..records import Results
from ..registry import Operation, Problem
from .layers import LayerProblem, Linear
from .linear_algebra import CLIP, Batch, MatrixProblem
from .networks import NETWORKS, Network, NetworkRank
from .steps import MOVING, StepProblem
from .training import TrainProblem

LEAST = 3  # points of a fit


@dataclass(frozen=True)
class Point:
    """One subject at one size.

    Attributes:
        subject: "linear": a layer forward and backward; "clip": the spectra of `layers` cores; "step": the optimizer
            step of `layers` layers of width x width; "iteration": a training iteration of these side by side.
        sweep: The size that is varied, whose value is `value`.
    """

    subject: str
    sweep: str
    value: int
    batch: int
    width: int
    rank: int
    layers: int

    def __str__(self) -> str:
        return f"{self.subject}, {self.sweep} {self.value}"

    def bytes(self) -> int:
        """Estimate the memory of its problem, with copies in float64; a step builds the dense network."""
        weights, inputs = self.layers * self.width**2, self.batch * self.width
        copies = {"linear": 12, "clip": 0, "step": 3, "iteration": 15}[self.subject]
        return 4 * (copies * weights + 12 * inputs + 20 * self.layers * self.rank * (2 * self.width + self.rank))


class Sum(nn.Module):
    """Layers side by side, scaled so that neither values nor gradients vanish with their number."""

    def __init__(self, layers: int, width: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        return sum(layer(x) for layer in self.layers) / len(self.layers) ** 0.5


class Restricted:
    """A problem with one of its modes and some of its providers."""

    def __init__(self, problem: Problem, mode: str, names: tuple[str, ...]):
        self.work = {mode: problem.work[mode]}
        self.providers = {name: problem.providers[name] for name in names if name in problem.providers}


def problem(point: Point, dtype: str, device) -> Restricted:
    need, free = point.bytes(), device.free()
    if need > free:
        raise MemoryError(f"needs about {need / 2**30:.1f} GiB of memory, {free / 2**30:.1f} may be taken")
    if point.subject == "linear":
        layer = LayerProblem(Linear(point.batch, point.width, point.width, point.rank), dtype, device)
        return Restricted(layer, "both", ("ours", "eager folded", "dense"))
    if point.subject == "clip":
        cores = MatrixProblem(CLIP, Batch(point.layers, point.rank, point.rank), dtype, device)
        return Restricted(cores, "call", ("ours", "torch.linalg", "torch.linalg, eigh"))
    name = f"{point.layers} layers of width {point.width}, batch {point.batch}"
    NETWORKS[name] = Network(partial(Sum, point.layers, point.width), (point.batch, point.width))
    shape = NetworkRank(name, point.rank)
    if point.subject == "step":
        return Restricted(StepProblem(MOVING, shape, dtype, device), "call", ("ours", "fast PyTorch"))
    return Restricted(TrainProblem(shape, dtype, device), "iteration", ("ours", "dense", "fast PyTorch"))


def shapes(size: str, device) -> list[Point]:
    if size == "smoke":
        return sweep("linear", "rank", (2, 4, 8), batch=4, width=16) + sweep(
            "step", "layers", (1, 2, 4), width=8, rank=2
        )
    ranks = (8, 16, 32, 64, 128, 256, 512)
    widths = (256, 512, 1024, 2048, 4096, 8192, 16384)
    batches = tuple(4**k for k in range(9))
    counts = (1, 3, 10, 32, 100, 316, 1000)
    batch, width = (8192, 4096) if device.kind == "cuda" else (128, 1024)
    return [
        *sweep("linear", "rank", ranks, batch=batch, width=width),
        *sweep("linear", "width", widths, batch=batch, rank=64),
        *sweep("linear", "batch", batches, width=width // 2, rank=64),
        *sweep("clip", "rank", ranks[:-1], rank=8, layers=16),
        *sweep("clip", "layers", counts, rank=32),
        *sweep("step", "rank", ranks, width=1024),
        *sweep("step", "width", widths, rank=64),
        *sweep("step", "layers", counts, width=128, rank=16),
        *sweep("iteration", "layers", counts, batch=32, width=128, rank=16),
    ]


def sweep(subject: str, name: str, values: tuple[int, ...], **fixed: int) -> list[Point]:
    sizes = dict.fromkeys(("batch", "width", "rank", "layers"), 1) | fixed
    return [Point(subject, name, value, **(sizes | {name: value})) for value in values]


def fits(results: Results) -> list[dict]:
    """Fit the time of each provider in each sweep.

    Returns:
        For each "subject", "sweep", "provider", "mode", "dtype", "cache" and "threads": "points" [[value, seconds],
        ...]; the "exponent" of the power law through their upper half, None for fewer than three; "theory", that of
        the floors; "estimates" [[value, seconds], ...] beyond memory, not measured but extrapolated from the last
        point by the theory.
    """
    series, beyond = {}, {}
    for record in results.times:
        if record["op"] != "scaling":
            continue
        shape = record["shape"]
        sweep = shape["subject"], shape["sweep"], record["dtype"], record["threads"], record["cache"]
        if record["seconds"]:
            points = series.setdefault((*sweep, record["provider"], record["mode"]), [])
            points.append((shape["value"], record["seconds"][1], record.get("floor")))
        elif record.get("reason", "").startswith("MemoryError"):
            beyond.setdefault(sweep, set()).add(shape["value"])
    found = []
    for (subject, sweep, dtype, threads, cache, provider, mode), points in series.items():
        points.sort()
        values, seconds, floors = map(list, zip(*points, strict=True))
        exponent, theory = slope(values, seconds), slope(values, floors)
        larger = [v for v in sorted(beyond.get((subject, sweep, dtype, threads, cache), ())) if v > values[-1]]
        estimates = [[v, seconds[-1] * (v / values[-1]) ** theory] for v in larger if theory is not None]
        found.append(
            {"subject": subject, "sweep": sweep, "provider": provider, "mode": mode, "dtype": dtype, "cache": cache}
            | {"threads": threads, "points": [[v, t] for v, t, _ in points], "estimates": estimates}
            | {"exponent": exponent, "theory": theory}
        )
    return found


def slope(values: list[float], heights: list[float | None]) -> float | None:
    """Return the exponent of the power law through the last half of the points, by least squares of logarithms."""
    count = max(LEAST, math.ceil(len(values) / 2))
    points = [(v, h) for v, h in zip(values[-count:], heights[-count:], strict=True) if h]
    if len(points) < LEAST:
        return None
    x, y = np.log(np.array(points)).T
    return float(np.polyfit(x, y, 1)[0])


OPERATIONS = (
    Operation(
        "scaling", "cost against rank, width, batch and number of layers", problem, shapes,
        modes=("both", "call", "iteration"), supported=("fp32",), share=4.0,
    ),
)  # fmt: skip
