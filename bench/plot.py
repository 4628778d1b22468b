"""Figures of results: roofline, speed-up against shape, growth of cost."""

import math
import statistics
from collections.abc import Callable
from pathlib import Path

from condlr_ext._extras import require

from .cells import exponent, flop_rate, size, thread_count
from .records import Results, best_dense, best_other, ours, ratio, timed

# Okabe and Ito's palette (yellow darkened): told apart with any color vision, and by marker without color
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C8C00", "#000000")
MARKERS = "osD^vPX*"
ACROSS = 3  # panels in a line


def draw(results: Results, stem: Path) -> list[Path]:
    """Draw STEM-roofline.png, STEM-speedup.png and STEM-scaling.png, as far as there are times for them.

    Returns:
        The paths of the files.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: There is nothing to draw.
    """
    require("matplotlib", "python -m bench --plot", "bench")
    files = []
    for name, panels in (("roofline", rooflines), ("speedup", speedups), ("scaling", growth)):
        found = panels(results)
        if found:
            files.append(stem.with_name(f"{stem.name}-{name}.png"))
            figure(found, results).savefig(files[-1], dpi=130)
    if not files:
        raise ValueError(f"python -m bench --plot: {results.name} has no times to draw")
    return files


def figure(panels: list[tuple[float, Callable]], results: Results):
    """Return a figure of panels, each (height in inches, function that draws on its axes)."""
    from matplotlib.figure import Figure

    across = min(ACROSS, len(panels))
    lines = [panels[i : i + across] for i in range(0, len(panels), across)]
    heights = [max(height for height, _ in line) for line in lines]
    made = Figure(figsize=(max(7.0, 5.2 * across), sum(heights) + 0.5), layout="constrained")
    grid = made.add_gridspec(len(lines), across, height_ratios=heights)
    for i, (_, paint) in enumerate(panels):
        paint(made.add_subplot(grid[i // across, i % across]))
    made.suptitle(f"{results.run['machine']['device']}, torch {results.run['versions']['torch']}", fontsize=11)
    return made


def color(names: list[str], name: str) -> dict:
    i = names.index(name)
    return {"color": COLORS[i % len(COLORS)], "marker": MARKERS[(i + i // len(COLORS)) % len(MARKERS)]}


# Roofline


def rooflines(results: Results) -> list[tuple[float, Callable]]:
    """Return a panel per arithmetic and number of threads: flop/s over flop/byte, under the ceilings."""
    operations = list(dict.fromkeys(r["op"] for r in results.times))
    panels = []
    for dtype, threads in dict.fromkeys((r["dtype"], r["threads"]) for r in results.times if r.get("flop/s")):
        rows = list(results.rows(where=lambda r, at=(dtype, threads): (r["dtype"], r["threads"]) == at))
        points = [(row[0]["op"], *mark) for row in rows for mark in roofline_marks(row)]
        if points:
            panels.append((5.2, _roofline(results, dtype, threads, points, operations)))
    return panels


def roofline_marks(row: list[dict]) -> list[tuple[bool, float, float]]:
    """Return (whether it is ours, flop/byte, flop/s) of ours and of the best other."""
    marks = []
    for r in (ours(row), best_other(row)):
        if r and r.get("flop/s") and r.get("byte/s"):
            marks.append((r is ours(row), r["flop/s"] / r["byte/s"], r["flop/s"]))
    return marks


def _roofline(results: Results, dtype: str, threads: int, points: list, operations: list[str]) -> Callable:
    def paint(axes) -> None:
        ceilings = results.ceilings[threads]
        intensities = [x for _, _, x, _ in points]
        peak = ceilings.rates[dtype]
        left, right = min(intensities) / 2, max(max(intensities), peak / ceilings.copies[-1][1]) * 3
        grid = [left * (right / left) ** (i / 200) for i in range(201)]
        lines = ["-"] if len(ceilings.copies) == 1 else [":", "-.", "--", "-"]
        for i, (_, rate) in enumerate(ceilings.copies):
            last = i == len(ceilings.copies) - 1
            name = f"{'beyond' if last and i else 'within'} {size(ceilings.copies[i - last if i else i][0])}"
            style = lines[-1] if last else lines[i % 3]
            label = f"{rate / 1e9:.0f} GB/s {name}" if len(ceilings.copies) > 1 else f"{rate / 1e9:.0f} GB/s"
            axes.plot(grid, [min(peak, rate * x) for x in grid], style, color="#555555", linewidth=1.2, label=label)
        for operation in dict.fromkeys(name for name, *_ in points):
            style = color(operations, operation)
            for mine in (False, True):
                chosen = [(x, y) for name, is_ours, x, y in points if name == operation and is_ours == mine]
                if chosen:
                    fill = style["color"] if mine else "none"
                    axes.plot(*zip(*chosen, strict=True), linestyle="", markersize=5, markerfacecolor=fill, alpha=0.85,
                              label=operation if mine else None, **style)  # fmt: skip
        axes.set(xscale="log", yscale="log", xlim=(left, right), xlabel="flop / byte", ylabel="flop/s")
        kind = f", {thread_count(threads)}" if results.run["machine"].get("cores") else ""
        axes.set_title(f"{dtype}{kind}: {flop_rate(peak)}; filled: ours, open: the best other", fontsize=9)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3, frameon=False)

    return paint


# Speed-up against shape


def speedups(results: Results) -> list[tuple[float, Callable]]:
    """Return a panel per operation, mode and arithmetic, at the largest number of threads.

    It has the time of the best other and of dense over ours, a dot per row, over rank or size, with lines through the
    medians; for networks, one line per row.
    """
    threads = max((r["threads"] for r in results.times), default=None)
    groups = {}
    for row in results.rows(where=lambda r: r["threads"] == threads and r["op"] != "scaling"):
        if any(ratio(find(row), ours(row)) for find in (best_other, best_dense)):
            groups.setdefault(tuple(row[0][name] for name in ("op", "mode", "dtype", "cache")), []).append(row)
    caches = len({cache for *_, cache in groups}) > 1
    panels = []
    for (operation, mode, dtype, cache), rows in groups.items():
        words = [operation, "" if mode == "call" else mode, dtype, cache if caches else ""]
        title = ", ".join(word for word in words if word)
        field = abscissa([row[0]["shape"] for row in rows])
        if field:
            panels.append((3.6, _over(field, title, rows)))
        else:
            panels.append((1.4 + 0.2 * len(rows), _named(title, rows)))
    return panels


def abscissa(shapes: list[dict]) -> str | None:
    """Return the field for the horizontal axis.

    Of the fields with at least three different numbers it is the rank "r", else the one with the most of them, the last
    of equals; None if there is no such field or shapes have names.
    """
    values = {field: [shape.get(field) for shape in shapes] for field in shapes[0]}
    if any(isinstance(value, (str, dict)) for value in shapes[0].values()):
        return None
    fields = [field for field, found in values.items() if all(found) and len(set(found)) >= 3]
    return max(reversed(fields), key=lambda field: (field == "r", len(set(values[field]))), default=None)


def _ratios(rows: list[list[dict]]) -> list[tuple[str, dict, list[float | None]]]:
    """Return (label, style, ratios) of the best other and of dense."""
    series = []
    for label, find, tint, marker in (
        ("best other / ours", best_other, COLORS[0], "o"),
        ("dense / ours", best_dense, COLORS[1], "s"),
    ):
        values = [ratio(find(row), ours(row)) for row in rows]
        if any(values):
            series.append((label, {"color": tint, "marker": marker}, values))
    return series


def _over(field: str, title: str, rows: list[list[dict]]) -> Callable:
    def paint(axes) -> None:
        positions = [row[0]["shape"][field] for row in rows]
        for label, style, values in _ratios(rows):
            dots = [(x, y) for x, y in zip(positions, values, strict=True) if y]
            axes.plot(*zip(*dots, strict=True), linestyle="", markersize=4, alpha=0.5, **style)
            medians = [(p, statistics.median(y for x, y in dots if x == p)) for p in sorted({x for x, _ in dots})]
            axes.plot(*zip(*medians, strict=True), color=style["color"], linewidth=1.5, label=label)
        axes.axhline(1, color="#888888", linewidth=1, linestyle="--")
        axes.set(xscale="log", yscale="log", xlabel=field)
        ticks = _apart(sorted(set(positions)))
        axes.set_xticks(ticks, labels=[f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        _plain(axes.yaxis)
        axes.set_title(title, fontsize=9)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=7)

    return paint


def _apart(ticks: list[float]) -> list[float]:
    """Return the ticks whose labels do not touch on a logarithmic axis."""
    gap = math.log(ticks[-1] / ticks[0]) / 12
    kept = [ticks[0]]
    for tick in ticks[1:]:
        if math.log(tick / kept[-1]) >= gap:
            kept.append(tick)
    return kept


def _named(title: str, rows: list[list[dict]]) -> Callable:
    def paint(axes) -> None:
        for label, style, values in _ratios(rows):
            dots = [(y, i) for i, y in enumerate(values) if y]
            axes.plot(*zip(*dots, strict=True), linestyle="", markersize=5, label=label, **style)
        axes.axvline(1, color="#888888", linewidth=1, linestyle="--")
        axes.set(xscale="log", ylim=(len(rows) - 0.5, -0.5))
        axes.set_yticks(range(len(rows)), labels=[row[0]["row"] for row in rows], fontsize=7)
        _plain(axes.xaxis)
        axes.set_title(title, fontsize=9)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=7)

    return paint


def _plain(axis) -> None:
    """Label ratios as 0.5 and 20, not as powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    low, high = axis.get_view_interval()
    decades = math.log10(high / low)
    every = (1, 2, 3, 5, 7) if decades < 0.7 else (1, 2, 5) if decades < 2.2 else (1,)
    axis.set_major_locator(LogLocator(subs=every))
    axis.set_minor_locator(LogLocator(subs=(1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(FuncFormatter(lambda value, _: ""))


# Growth of cost


def growth(results: Results) -> list[tuple[float, Callable]]:
    """Return a panel per subject, sweep and mode, at the largest number of threads.

    It has the seconds by provider with the fitted exponents; estimates beyond memory are dotted.
    """
    if not any(timed([record]) for record in results.times if record["op"] == "scaling"):
        return []
    from .cases import scaling

    fits, groups = scaling.fits(results), {}
    threads = max(fit["threads"] for fit in fits)
    for fit in fits:
        if fit["threads"] == threads:
            groups.setdefault((fit["subject"], fit["sweep"], fit["mode"]), []).append(fit)
    return [(4.0, _growth(*group, fits)) for group, fits in groups.items()]


def _growth(subject: str, sweep: str, mode: str, fits: list[dict]) -> Callable:
    providers = [fit["provider"] for fit in fits]

    def paint(axes) -> None:
        for fit in fits:
            growth = "" if fit["exponent"] is None else f": {sweep}^{exponent(fit['exponent'])}"
            theory = "" if fit["theory"] is None else f" (theory {exponent(fit['theory'])})"
            style = color(providers, fit["provider"])
            axes.plot(*zip(*fit["points"], strict=True), markersize=4, linewidth=1.2,
                      label=f"{fit['provider']}{growth}{theory}", **style)  # fmt: skip
            if fit["estimates"]:
                beyond = [fit["points"][-1], *fit["estimates"]]
                axes.plot(*zip(*beyond, strict=True), ":", markersize=4, markerfacecolor="none", **style)
        axes.set(xscale="log", yscale="log", xlabel=sweep, ylabel="seconds")
        axes.set_title(f"{subject}, {mode}" if mode not in ("call", subject) else subject, fontsize=9)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=7)

    return paint
