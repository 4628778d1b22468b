"""Factorized or merged: the choice of the cost model against the clock."""

import dataclasses
from functools import partial

from condlr_ext import ops

from ..records import Results, timed
from ..registry import Operation, Provider, Row
from .layers import CONVS, LINEARS, Conv, LayerProblem, Linear, dtypes, plan_record, rank

ROUTES = ("factorized", "merged")
# by the columns of the tables of ops.tables
PATHS = {
    "cpu": {"kernels": "ours: kernels", "products": "reference", "merged": "ours: merged", "dense": "dense"},
    "cuda": {"kernels": "ours: triton", "products": "reference", "merged": "ours: merged", "dense": "dense"},
}
PLANNED = {"cpu": ("ours: cpu",), "cuda": ()}  # what the plan is compared with
MODES = {"cpu": ("forward", "both"), "cuda": ("forward", "backward")}
RANKS = (0.05, 0.2, 0.5, 1.0)


@dataclasses.dataclass(frozen=True)
class NetworkLayer:
    """A layer of a network, the first one without an input gradient."""

    network: str
    layer: Linear | Conv
    input_gradient: bool = True

    def __str__(self) -> str:
        return f"{self.network} {self.layer}"


class RouteProblem:
    """A layer by each of its routes."""

    def __init__(self, shape: NetworkLayer, dtype: str, device):
        problem = LayerProblem(shape.layer, dtype, device, shape.input_gradient)
        self.modes = MODES[device.kind]
        self.work = {mode: problem.work[mode] for mode in self.modes}
        made = dict(problem.providers)
        if isinstance(shape.layer, Linear) and device.kind == "cpu" and not ops.COMPILED.ops_reason:
            made["ours: kernels"] = problem.kernels
        names = *PLANNED[device.kind], *PATHS[device.kind].values()
        self.providers = {name: partial(self._provider, made[name]) for name in names if name in made}
        self.plan = problem.plan

    def _provider(self, make) -> Provider:
        provider = make()
        calls = {mode: provider.calls[mode] for mode in self.modes}
        return dataclasses.replace(provider, calls=calls, captured=False)


def network_shapes(batches: tuple[int, ...], ranks: tuple[float, ...], networks: list[str]) -> list[NetworkLayer]:
    found = []
    for network in networks:
        for i, layer in enumerate(CONVS.get(network, ())):
            c, m, _, k, _, _ = layer
            for batch in batches:
                found += [NetworkLayer(network, Conv(batch, *layer, rank(f, m, c * k * k)), i > 0) for f in ranks]
        for i, (n, m, rows) in enumerate(LINEARS.get(network, ())):
            for batch in batches:
                shapes = [Linear(batch * rows, n, m, rank(f, m, n)) for f in ranks]
                found += [NetworkLayer(network, shape, i > 0 or network != "MLP") for shape in shapes]
    return list(dict.fromkeys(found))  # two fractions may be the same rank


def grid(device) -> list[NetworkLayer]:
    """Return the sizes of a table: linear layers and 3 x 3 convolutions."""
    if device.kind == "cpu":
        sides = (64, 256, 1024)
        sizes = [(n, m, r) for n in sides for m in sides for r in (8, 32, 128) if r <= min(n, m)]
        shapes = [Linear(rows, *size) for size in sizes for rows in (1, 16, 128, 1024)]
        sizes = [(c, m, r) for c in (16, 64) for m in (16, 64, 256) for r in (8, 32) if r <= m]
        shapes += [Conv(images, c, m, 16, 3, 1, 1, r) for c, m, r in sizes for images in (1, 32)]
        return [NetworkLayer("grid", shape) for shape in shapes]
    sizes = [(n, m, r) for n in (256, 1024, 4096) for m in (256, 1024, 4096) for r in (8, 32, 128, 512)]
    shapes = [Linear(rows, *size) for size in sizes if size[2] <= min(size) for rows in (1, 16, 256, 4096, 32768)]
    sizes = [(c, m, r) for c in (64, 256) for m in (64, 256, 512) for r in (13, 32, 128) if r <= m]
    shapes += [Conv(images, c, m, 16, 3, 1, 1, r) for c, m, r in sizes for images in (1, 16, 128)]
    return [NetworkLayer("grid", shape) for shape in shapes]


def shapes(size: str, device) -> list[NetworkLayer]:
    if size == "smoke":
        return network_shapes((1,), (0.2, 0.19, 1.0), ["LeNet5"])
    if device.kind == "cuda" or size == "grid":
        return grid(device)
    return network_shapes((1, 32, 128) if size == "full" else (32,), RANKS, list(CONVS | LINEARS))


def plans(row: Row, device) -> list[dict]:
    return [plan_record(row, RouteProblem(row.shape, row.dtype, device))]


def regrets(results: Results) -> list[dict]:
    """Compare the plans of a results file with the times of forward and backward.

    Returns:
        Plan records with "seconds" by route, the "regret", which is how much longer the chosen route takes than the
        faster one, and the "measured gain": dense time over that of the chosen route. Layers of which a route has no
        time are left out.
    """
    times = {}
    for row in results.rows(where=lambda r: r["mode"] == "both"):
        found = {name: r["seconds"][1] for name, r in timed(row).items()}
        factorized = found.get("ours: factorized", found.get("ours: cpu"))
        key = tuple(row[0][name] for name in ("op", "row", "dtype", "threads"))
        times[key] = dict(
            zip((*ROUTES, "dense"), (factorized, found.get("ours: merged"), found.get("dense")), strict=True)
        )
    compared = []
    for plan in results.others.get("plan", ()):
        seconds = times.get(tuple(plan.get(name) for name in ("op", "row", "dtype", "threads")), {})
        if seconds and all(seconds.values()):
            chosen, best = seconds[plan["route"]], min(seconds[route] for route in ROUTES)
            compared.append(
                plan | {"seconds": seconds, "regret": chosen / best - 1, "measured gain": seconds["dense"] / chosen}
            )
    return compared


OPERATIONS = (
    Operation(
        "routes", "factorized, merged and dense layers: is the cost model's choice the faster one?", RouteProblem,
        shapes, ("forward", "backward", "both"), dtypes, ("fp32", "tf32", "bf16", "fp16"), extra=plans, share=8.0,
        by_default=False,
    ),
)  # fmt: skip
