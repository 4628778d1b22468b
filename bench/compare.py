"""Two results, A and B, of the same machine: which of our providers became slower, or wrong, from A to B.

- Slowdown: time in B over time in A of one of our providers in one row, over the drift.
- Drift: the median of the same ratio of the row's baselines (plain PyTorch, torch.linalg, dense and so on, not our
  reference path), whose code did not change; in a row without baselines, that of all rows.
- Bound: a slowdown beyond it is a regression. It is 5 %, twice the noise or five times the scatter, whichever is most.
- Noise: sqrt(a² + b² + d²) in logarithms; a and b are half the distance between the quantiles (20 and 80 %) of the two
  times, d is the median of the same of the baselines, or half the distance between the quantiles of their drifts,
  whichever is more. The median of eleven samples of one process has a standard error of 0.45 a. One or two samples do
  not show their noise: it counts as at least 10 %.
- Scatter: half the distance between the quantiles of the logarithms of the ratios of all baselines in all rows. It
  shows differences between processes (memory layout, other users), which no quantiles within a process show. It is
  0.84 standard deviations of such a ratio, so five times it are three of a slowdown.
"""

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from condlr_ext._table import text

from .cells import digits, duration, thread_count
from .records import Results, key, timed
from .registry import DENSE, OURS, SAME
from .tables import STATES, provenance
from .timing import QUANTILES

LEAST, NOISES, SCATTERS = 0.05, 2.0, 5.0
FEW, UNKNOWN = 3, 0.1  # below so many samples, the least noise
VERDICTS = ("slower", "lost", "faster", "gained", "as before")


@dataclass(frozen=True)
class Change:
    """One of our providers in one row; slowdown, drift and bound are ratios, None where there is no time."""

    key: tuple
    provider: str
    before: float | None
    after: float | None
    drift: float | None = None
    slowdown: float | None = None
    bound: float | None = None
    reason: str = ""

    @property
    def verdict(self) -> str:
        if self.slowdown is None:
            return "lost" if self.before else "gained"
        if self.slowdown > self.bound:
            return "slower"
        return "faster" if self.slowdown < 1 / self.bound else "as before"

    @property
    def regression(self) -> bool:
        return self.verdict in ("slower", "lost")


@dataclass(frozen=True)
class Comparison:
    """The changes, the worst first; names that only A and only B has; baselines without a time in B, and why."""

    changes: list[Change]
    only: tuple[list[str], list[str]]
    missed: list[str]

    @property
    def regressions(self) -> list[Change]:
        return [change for change in self.changes if change.regression]


def compare(a: Results, b: Results) -> Comparison:
    """Compare two results.

    Raises:
        ValueError: They are of different devices, allocators or numbers of threads, or have no row in common.
    """
    for what, find in (
        ("devices", lambda r: r.run["machine"]["device"]),
        ("allocators", lambda r: r.run["machine"].get("allocator")),
        ("numbers of threads", lambda r: sorted({record["threads"] for record in r.times})),
    ):
        if find(a) != find(b):
            raise ValueError(f"--compare: different {what}: {a.name} {find(a)}, {b.name} {find(b)}")
    rows = {key(row[0]): ({r["provider"]: r for r in row}, {}) for row in a.rows()}
    for row in b.rows():
        rows.setdefault(key(row[0]), ({}, {}))[1].update({r["provider"]: r for r in row})
    common = {k: row for k, row in rows.items() if all(row)}
    if not common:
        raise ValueError(f"--compare: {a.name} and {b.name} have no row in common")
    baselines = {k: found for k, row in common.items() if (found := _baselines(*row))}
    ratios = [pair for found in baselines.values() for pair in found]
    overall, scatter = _drift(ratios) if ratios else (1.0, 0.0), _half([math.log(ratio) for ratio, _ in ratios])
    changes, only, missed = [], ([], []), []
    for k, row in rows.items():
        if k not in common:
            only[0 if row[0] else 1].append(name(k))
            continue
        for provider in dict.fromkeys([*row[0], *row[1]]):
            before, after = (side.get(provider) for side in row)
            if not (before and after):
                only[0 if before else 1].append(f"{name(k)}: {provider}")
            elif provider == "ours" or OURS in (before["role"], after["role"]):
                drift = _drift(baselines[k]) if k in baselines else overall
                changes.append(_change(k, provider, before, after, drift, scatter))
            elif before["seconds"] and not after["seconds"]:
                missed.append(f"{name(k)}: {provider}: {after['reason']}")
    changes = [change for change in changes if change.before or change.after]
    order = {"lost": 0, "gained": 2}
    changes.sort(key=lambda c: (order.get(c.verdict, 1), -(c.slowdown or 0) / (c.bound or 1)))
    return Comparison(changes, only, missed)


def _change(k: tuple, provider: str, a: dict, b: dict, drift: tuple[float, float], scatter: float) -> Change:
    before, after = (r["seconds"] and r["seconds"][1] for r in (a, b))
    if not (before and after):
        return Change(k, provider, before, after, reason=(a if after else b).get("reason", "no time"))
    noise = math.hypot(_noise(a), _noise(b), drift[1])
    bound = max(1 + LEAST, math.exp(max(NOISES * noise, SCATTERS * scatter)))
    return Change(k, provider, before, after, drift[0], after / before / drift[0], bound)


def _baselines(a: dict[str, dict], b: dict[str, dict]) -> list[tuple[float, float]]:
    """Return the time in B over that in A, and its noise, of each baseline of a row."""
    before, after = (timed(list(side.values()), SAME, DENSE) for side in (a, b))
    return [
        (after[n]["seconds"][1] / before[n]["seconds"][1], math.hypot(_noise(before[n]), _noise(after[n])))
        for n in before
        if n in after and n != "reference"
    ]


def _drift(baselines: list[tuple[float, float]]) -> tuple[float, float]:
    """Return the median of several (ratio, noise), and its noise."""
    ratios, noises = zip(*baselines, strict=True)
    return statistics.median(ratios), max(statistics.median(noises), _half([math.log(ratio) for ratio in ratios]))


def _half(logarithms: list[float]) -> float:
    """Return half the distance between the quantiles."""
    low, _, high = np.quantile(logarithms or [0.0], QUANTILES)
    return (high - low) / 2


def _noise(record: dict) -> float:
    low, _, high = record["seconds"]
    noise = math.log(high / low) / 2
    return noise if record["samples"] >= FEW else max(noise, UNKNOWN)


def name(k: tuple) -> str:
    operation, row, *states, threads = k
    return f"{operation} {row} ({', '.join(states)}, {thread_count(threads)})"


def show(comparison: Comparison, a: Results, b: Results) -> list[str]:
    """Return the lines that report a comparison."""
    lines = [f"A  {a.name}: {provenance(a)}", f"B  {b.name}: {provenance(b)}"]
    versions = [
        f"{package} {a.run['versions'].get(package)} and {b.run['versions'].get(package)}"
        for package in ("torch", "triton", "numpy")
        if a.run["versions"].get(package) != b.run["versions"].get(package)
    ]
    if versions:
        lines.append(f"   other versions of {', '.join(versions)}: the baselines changed too")
    titles = ["row", "provider", *STATES, "A", "B", "B / A", "drift", "slowdown", "bound", "verdict"]
    cells = []
    for c in comparison.changes:
        operation, row, *states = c.key
        ratios = [c.after / c.before, c.drift, c.slowdown, c.bound] if c.slowdown else []
        line = [f"{operation} {row}", c.provider, *map(str, states), duration(c.before), duration(c.after)]
        line += [digits(ratio) for ratio in ratios] or ["-"] * 4
        cells.append([*line, c.verdict.upper() if c.regression else c.verdict])
    lines += ["", text(titles, cells)]
    lines += [f"  {c.verdict}: {name(c.key)}: {c.provider}: {c.reason}" for c in comparison.changes if c.reason]
    for side, names in zip("AB", comparison.only, strict=True):
        lines += [f"  only in {side}: {entry}" for entry in names]
    lines += [f"  no time in B for the baseline of {entry}" for entry in comparison.missed]
    counts = {verdict: sum(c.verdict == verdict for c in comparison.changes) for verdict in VERDICTS}
    found = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    bounds = [c.bound for c in comparison.changes if c.bound]
    seen = f"; half of the bounds are below {digits(statistics.median(bounds))}" if bounds else ""
    return [*lines, "", f"{found}: {'a regression' if comparison.regressions else 'no regression'}{seen}"]


def merge(rounds: Iterable[Results], label: str) -> Results:
    """Merge several runs of the same rows.

    The merged time is the median of the medians, between the lowest and the highest of the quantiles. A provider that
    had no time in one run has none.
    """
    rounds = list(rounds)
    records = [{"kind": "run", **rounds[0].run}]
    records += [ceilings for r in rounds for ceilings in r.others.get("ceilings", ())]
    groups: dict[tuple, list[dict]] = {}
    for record in (record for r in rounds for record in r.times):
        groups.setdefault((key(record), record["provider"]), []).append(record)
    for same in groups.values():
        failed = next((r for r in same if not r["seconds"]), None)
        if not failed:
            low, middle, high = zip(*(r["seconds"] for r in same), strict=True)
            seconds = [min(low), statistics.median(middle), max(high)]
        merged = failed or same[0] | {"seconds": seconds, "samples": sum(r["samples"] for r in same)}
        records.append(merged)
    return Results(records, label)
