"""Results of a study: one row per run and seed as CSV, settings as TOML, a table over the seeds, figures."""

import csv
import io
import json
import math
import statistics
import sys
from collections import Counter
from pathlib import Path

from .. import _table
from .._extras import require
from .._files import read_text, write_whole
from ..robustness import KNOWN_ATTACKS
from .methods import METHODS

# Okabe and Ito's palette (yellow darkened): told apart with any color vision, and by marker without color
COLORS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#8C8C00")
MARKERS = "osD^vPX*"
LINES = ("-", "--", ":", "-.")
NOT_APPLICABLE = "-"
_ATTACKS = {"fgsm": "FGSM", "pgd-ce": "PGD", "apgd-ce": "APGD", "apgd-t": "APGD-T"}
_TEXT = ("run", "label", "status", "ranks")  # columns that hold no number
_MEASURED = ("max_kappa", "orthonormality", "seconds_per_epoch")  # to seven digits, shares to nine
_GRADIENTS = ("saturated", "zero_gradient", "tiny_gradient", "dead_gradient")
_NOT_SETTINGS = ("runs", "folder", "tensorboard", "out", "overwrite", "jobs")


def write(results: dict, out: Path) -> None:
    """Write results.csv, results.toml (settings, data, versions), table.md and figures to the folder out."""
    rows = [flat(record) for record in results["runs"]]
    write_whole(out / "results.csv", to_csv(rows).encode())
    write_whole(out / "results.toml", to_toml(settings(results)).encode())
    write_whole(out / "table.md", _table.markdown(*table(rows, results["config"])).encode())
    for name, draw in (("results", _results), ("spectra", _spectra), ("parameters", _parameters)):
        write_whole(out / f"{name}.png", _png(draw, results))


def read(path: Path) -> tuple[dict, list[dict]]:
    """Return the settings and rows that write() left in path and its neighbor with the suffix .toml.

    Args:
        path: The CSV file.

    Returns:
        The settings, and the rows as flat() gives them, but for rounding.

    Raises:
        ValueError: A file cannot be read, or is not one of write().
    """
    toml = require("tomllib" if sys.version_info >= (3, 11) else "tomli")
    try:
        file = path
        rows = [_row(row) for row in csv.DictReader(io.StringIO(read_text(file), newline=""))]
        file = path.with_suffix(".toml")
        return toml.loads(read_text(file)), rows
    except (OSError, ValueError, csv.Error, RecursionError) as error:
        raise ValueError(f"report: cannot read {file}: {error}") from None


def _row(row: dict) -> dict:
    if None in row or None in row.values():
        raise ValueError("a row must have as many cells as there are columns")
    return {name: cell if name in _TEXT else float(cell) if cell else None for name, cell in row.items()}


def flat(record: dict) -> dict:
    """Return the numbers of one run and seed by column; accuracy under attack at budget e is in the column "attack@e".

    Columns that begin with best_ are those of the epoch with the highest validation accuracy.
    """
    row = {name: record[name] for name in ("run", "label", "seed", "status")}
    row["ranks"] = "/".join(map(str, record["ranks"].values()))
    row |= {name: record[name] for name in ("kept", "parameters")} | _attacked(record)
    row |= {name: (record.get("robustness") or {}).get(name) for name in _GRADIENTS}
    row |= {name: record[name] for name in ("max_kappa", "orthonormality", "skipped", "seconds_per_epoch")}
    if best := record.get("best"):
        row |= {f"best_{name}": value for name, value in _attacked(best).items()}
        row |= {"best_epoch": best["epoch"], "best_validation": best["validation"]}
    return row


def _attacked(record: dict) -> dict:
    found = record.get("robustness") or {}
    attacks = [name for name in (*KNOWN_ATTACKS, "worst") if name in found]
    row = {"clean": found.get("clean_of_all", found.get("clean"))}
    return row | {f"{name}@{e:g}": v for name in attacks for e, v in zip(found["eps"], found[name], strict=True)}


def to_csv(rows: list[dict]) -> str:
    """Return the rows as CSV, with every column that one of them has."""
    longest = max(rows, key=len)
    columns = dict.fromkeys(name for row in (longest, *rows) for name in row)
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _cell(name, value) for name, value in row.items()})
    return file.getvalue()


def _cell(name: str, value):
    return format(value, ".7g" if name in _MEASURED else ".9g") if isinstance(value, float) else value


def settings(results: dict) -> dict:
    """Return the entries common to all runs: settings, layers with a rank, data and versions."""
    common = {k: v for k, v in results["config"].items() if k not in _NOT_SETTINGS and v is not None}
    common["layers"] = max((list(record["ranks"]) for record in results["runs"]), key=len)
    common |= {"dense_parameters": results["runs"][0]["dense_parameters"]}
    common |= {"backend": results["backend"], "threads": results["threads"]}
    return common | {"samples": results["data"], "versions": results["versions"]}


def to_toml(values: dict) -> str:
    """Return values as TOML; tables, which are last, hold no tables."""
    lines = []
    for key, value in values.items():
        if isinstance(value, dict):
            lines += ["", f"[{key}]", *(f"{k} = {json.dumps(v)}" for k, v in value.items())]
        else:
            lines.append(f"{key} = {json.dumps(value)}")
    return "\n".join(lines) + "\n"


def grouped(records: list[dict]) -> dict[str, list[dict]]:
    """Return the records, or rows, of each run, one for every seed."""
    groups = {}
    for record in records:
        groups.setdefault(record["run"], []).append(record)
    return groups


def summary(results: dict) -> tuple[list[str], list[list[str]]]:
    """Return table() of the results of train."""
    return table([flat(record) for record in results["runs"]], results["config"])


def attack_columns(settings: dict) -> dict[str, str]:
    """Return the columns under attack by title: of the attacks that are named, else of FGSM, and the worst case."""
    named = settings.get("attacks", ["worst"])
    attacks = ["fgsm", "worst"] if list(named) == ["worst"] else [*named, "worst"]
    return {f"{_ATTACKS.get(name, name)}\n{e:g}": f"{name}@{e:g}" for name in attacks for e in settings["eps"]}


def table(rows: list[dict], settings: dict) -> tuple[list[str], list[list[str]]]:
    """Return titles and cells of a table with a line per run: mean ± standard deviation over its seeds.

    Args:
        rows: As flat() gives them.
        settings: With `attacks` and `eps`.
    """
    attacks = attack_columns(settings)
    titles = ["run", "ranks", "kept\n%", "clean\n%", *attacks]
    titles += ["saturated\n%", "max κ", "‖UᵀU−I‖\nmax", "s per\nepoch"]
    lines = []
    for group in grouped(rows).values():
        bounded = METHODS[group[0]["run"].partition(":")[0]].bounds_kappa
        shares = [[row.get(name) for row in group] for name in ("kept", "clean", *attacks.values(), "saturated")]
        line = [label(group), _ranks(group), *map(percent, shares)]
        line += [
            largest([row["max_kappa"] for row in group], ".7g" if bounded else ".3g"),
            largest([row["orthonormality"] for row in group], ".1e"),
            spread([row["seconds_per_epoch"] for row in group], ".3f", deviation=False),
        ]
        lines.append(line)
    return titles, lines


def label(records: list[dict]) -> str:
    """Return the label of a run and how many of its seeds failed."""
    wrong = Counter(record["status"] for record in records if record["status"] != "trained")
    counts = (f"{count} of {len(records)} " if len(records) > 1 else "" for count in wrong.values())
    return records[0]["label"] + "".join(f" ({count}{status})" for count, status in zip(counts, wrong, strict=True))


def _ranks(rows: list[dict]) -> str:
    lists = [row["ranks"].split("/") for row in rows]
    if lists[0] == [""]:
        return "full"
    layers = [sorted(set(map(int, ranks))) for ranks in zip(*lists, strict=True)]
    return ", ".join(f"{r[0]}–{r[-1]}" if len(r) > 1 else str(r[0]) for r in layers)


def number(value: float | None, spec: str) -> str:
    """Return the value as text, "-" for None."""
    return NOT_APPLICABLE if value is None else format(value, spec)


def largest(values: list[float | None], spec: str) -> str:
    """Return the largest value as text, "-" if one is missing."""
    return NOT_APPLICABLE if None in values or not values else format(max(values), spec)


def spread(values: list[float | None], spec: str, deviation: bool = True) -> str:
    """Return the mean and, for several different values, the standard deviation of the sample."""
    values = [value for value in values if value is not None]
    if not values:
        return NOT_APPLICABLE
    mean = format(statistics.fmean(values), spec)
    if not deviation or len(values) == 1 or min(values) == max(values):
        return mean
    return f"{mean} ± {statistics.stdev(values):{spec}}"


def percent(shares: list[float | None]) -> str:
    """Return spread() of the shares in percent."""
    return spread([100 * share for share in shares if share is not None], ".1f")


# --------------------------------------------------------------------------------------------------- figures


def _png(draw, results: dict) -> bytes:
    require("matplotlib")
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    draw(figure, results)
    config = results["config"]
    seeds = ", ".join(map(str, config["seeds"]))
    figure.suptitle(f"{config['data']}, {config['network']}, seed {seeds}, {config['epochs']} epochs")
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    return buffer.getvalue()


def _style(i: int) -> dict:
    return {"color": COLORS[i % len(COLORS)], "marker": MARKERS[(i // len(COLORS) + i) % len(MARKERS)]}


def _means(records: list[dict], values) -> tuple[list[float], list[float]]:
    """Return means and standard deviations, over the attacked records, of the list that values() returns for each."""
    columns = list(zip(*(values(r["robustness"]) for r in records if r.get("robustness")), strict=True))
    return [statistics.fmean(c) for c in columns], [statistics.stdev(c) if len(c) > 1 else 0.0 for c in columns]


def _results(fig, results: dict) -> None:
    """Draw accuracy against budget, and kappa - 1 of the first seed's low-rank layers against step."""
    fig.set_size_inches(16, 5.6)
    *accuracy, kappa_axes = fig.subplots(1, 3)
    for i, records in enumerate(grouped(results["runs"]).values()):
        style = _style(i) | {"label": label(records)}
        style |= {"lw": max(1, 3.2 - 0.35 * i), "ms": max(4, 9 - 0.7 * i)}  # coincident runs stay visible
        eps = [0.0, *results["config"]["eps"]]
        for axes, name in zip(accuracy, ("fgsm", "worst"), strict=True):
            means, deviations = _means(
                records, lambda a, name=name: [100 * v for v in (a["clean"], *a[name])] if name in a else []
            )
            axes.plot(eps[: len(means)], means, **style)
            if any(deviations):
                low, high = zip(*((m - d, m + d) for m, d in zip(means, deviations, strict=True)), strict=True)
                axes.fill_between(eps, low, high, color=style["color"], alpha=0.12, lw=0)
        for j, kappa in enumerate(records[0]["kappa"].values()):
            # log of 0 where kappa = 1 exactly; below float32 rounding nothing is significant
            excess = [max(k - 1, 1e-8) if k is not None else float("nan") for k in kappa]
            kappa_axes.plot(excess, color=style["color"], ls=LINES[j % len(LINES)], lw=style["lw"] / 1.5)
    for axes, title in zip(accuracy, ("FGSM", "Worst of the attacks, per sample"), strict=True):
        axes.set(xlabel="ℓ∞ budget (inputs in [0, 1])", ylabel="test accuracy (%)", ylim=(0, 101), title=title)
    kappa_axes.set(xlabel="step", ylabel="κ − 1 (log scale)", yscale="log", ylim=(5e-9, 1e3))  # cuts diverging runs off
    kappa_axes.set_title("Condition number of each layer (gray: the bound)")
    for tau in sorted({run["tau"] for run in results["runs"] if run["tau"]}):
        kappa_axes.axhline(tau, color="0.5", lw=0.8, ls=(0, (6, 3)))
        kappa_axes.annotate(
            f"κ = {1 + tau:g}", (0.99, tau), xycoords=("axes fraction", "data"),
            xytext=(0, 2), textcoords="offset points", ha="right", size=8,
        )  # fmt: skip
    for axes in (*accuracy, kappa_axes):
        axes.grid(alpha=0.25)
    fig.legend(*accuracy[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)


def _spectra(fig, results: dict) -> None:
    """Draw the final singular values of every hidden layer, first seed."""
    groups = list(grouped(results["runs"]).values())
    names = list(dict.fromkeys(name for records in groups for name in records[0]["spectra"]))
    columns = min(4, max(1, len(names)))
    rows = max(1, math.ceil(len(names) / columns))
    fig.set_size_inches(4 * columns + 1, 3.2 * rows + 1.4)
    panels = fig.subplots(rows, columns, squeeze=False).flatten()
    for axes, name in zip(panels, names, strict=False):
        for i, records in enumerate(groups):
            sigma = records[0]["spectra"].get(name)
            if sigma:
                style = _style(i) | {"label": label(records)}
                axes.plot(range(1, len(sigma) + 1), sigma, ms=3, lw=1, **style)
        axes.set(title=name, xlabel="index", ylabel="singular value", yscale="log")
        axes.grid(alpha=0.25)
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    handles = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    fig.legend(handles.values(), handles, loc="outside lower center", ncols=4, frameon=False)


def _parameters(fig, results: dict) -> None:
    """Draw clean and worst-case accuracy at every budget against the number of parameters."""
    eps = results["config"]["eps"]
    fig.set_size_inches(4 * (len(eps) + 1), 5)
    panels = fig.subplots(1, len(eps) + 1, sharex=True, squeeze=False).flatten()
    for i, records in enumerate(grouped(results["runs"]).values()):
        means, deviations = _means(records, lambda a: [100 * v for v in (a["clean"], *a.get("worst", []))])
        share = 100 * statistics.fmean(r["parameters"] / r["dense_parameters"] for r in records)
        for axes, mean, deviation in zip(panels, means, deviations, strict=False):
            axes.errorbar(share, mean, deviation or None, ls="", capsize=3, label=label(records), **_style(i))
    for axes, title in zip(panels, ("clean", *(f"worst case, ε = {e:g}" for e in eps)), strict=True):
        axes.set(xlabel="parameters (% of the dense network's)", ylabel="test accuracy (%)", title=title)
        axes.grid(alpha=0.25)
    fig.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
