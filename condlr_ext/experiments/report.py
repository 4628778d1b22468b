"""Results as tables (terminal, Markdown, LaTeX), figures and JSON; over several seeds mean ± standard deviation."""

import io
import json
import math
import statistics
from pathlib import Path

from .._extras import require
from .._files import write_whole

# Okabe and Ito's palette (yellow darkened): told apart with any color vision, and by marker without color
COLORS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#8C8C00")
MARKERS = "osD^vPX*"
LINES = ("-", "--", ":", "-.")
NOT_APPLICABLE = "-"
_ATTACKS = {"fgsm": "FGSM", "pgd-ce": "PGD", "apgd-ce": "APGD", "apgd-t": "APGD-T"}


HISTORIES = ("loss", "step_loss", "validation", "kappa", "dense_kappa", "spectra", "settings")


def write(results: dict, out: Path) -> None:
    """results.json, summary.json (the same without HISTORIES), table.md, table.tex and figures in the folder out."""
    write_whole(out / "results.json", json.dumps(results, allow_nan=False).encode())
    runs = [{key: value for key, value in run.items() if key not in HISTORIES} for run in results["runs"]]
    write_whole(out / "summary.json", json.dumps(results | {"runs": runs}, allow_nan=False, indent=1).encode())
    write_whole(out / "table.md", markdown(*summary(results)).encode())
    write_whole(out / "table.tex", latex(*summary(results)).encode())
    for name, draw in (("results", _results), ("spectra", _spectra), ("parameters", _parameters)):
        write_whole(out / f"{name}.png", _png(draw, results))


def grouped(results: dict) -> dict[str, list[dict]]:
    """The records of each run, one for every seed."""
    groups = {}
    for record in results["runs"]:
        groups.setdefault(record["run"], []).append(record)
    return groups


def summary(results: dict) -> tuple[list[str], list[list[str]]]:
    """Header and one row per run: of the attacks those that the settings name, or FGSM, and the worst case of all."""
    eps = results["config"]["eps"]
    attacks = [*(results["config"]["attacks"] or ("fgsm",)), "worst"]
    header = ["run", "ranks", "kept\n%", "clean\n%"]
    header += [f"{_ATTACKS.get(attack, attack)}\n{e:g}" for attack in attacks for e in eps]
    header += ["satu-\nrated %", "max κ", "‖UᵀU−I‖\nmax", "s per\nepoch"]
    rows = []
    for records in grouped(results).values():
        first, attacked = records[0], [r["robustness"] for r in records if r.get("robustness")]
        row = [_label(records), _ranks(records), spread([100 * r["kept"] for r in records], ".1f")]
        row.append(percent([a["clean"] for a in attacked]))
        for attack in attacks:
            row += [percent([a[attack][i] for a in attacked if attack in a]) for i in range(len(eps))]
        row.append(percent([a["saturated"] for a in attacked]))
        row += [
            largest([r["max_kappa"] for r in records], ".7g" if first["method"] == "condlr" else ".3g"),
            largest([r["orthonormality"] for r in records], ".1e"),
            spread([r["seconds_per_epoch"] for r in records], ".3f", deviation=False),
        ]
        rows.append(row)
    return header, rows


def _label(records: list[dict]) -> str:
    """The label, and how many seeds went wrong."""
    label, wrong = records[0]["label"], {}
    for record in records:
        if record["status"] != "trained":
            wrong[record["status"]] = wrong.get(record["status"], 0) + 1
    if len(records) == 1:
        return f"{label} ({', '.join(wrong)})" if wrong else label
    return label + "".join(f" ({count} of {len(records)} {status})" for status, count in wrong.items())


def _ranks(records: list[dict]) -> str:
    lists = [list(record["ranks"].values()) for record in records]
    if not any(lists):
        return "full"
    if all(ranks == lists[0] for ranks in lists):
        texts = [str(rank) for rank in lists[0]]
    else:  # methods that choose ranks themselves
        texts = [f"{min(r)}–{max(r)}" if min(r) < max(r) else str(r[0]) for r in zip(*lists, strict=True)]
    return ", ".join(texts)


def number(value: float | None, spec: str) -> str:
    return NOT_APPLICABLE if value is None else format(value, spec)


def largest(values: list[float | None], spec: str) -> str:
    return NOT_APPLICABLE if None in values or not values else format(max(values), spec)


def spread(values: list[float | None], spec: str, deviation: bool = True) -> str:
    """The mean and, of several, the standard deviation of the sample."""
    values = [value for value in values if value is not None]
    if not values:
        return NOT_APPLICABLE
    mean = format(statistics.fmean(values), spec)
    if not deviation or len(values) == 1 or min(values) == max(values):
        return mean
    return f"{mean} ± {statistics.stdev(values):{spec}}"


def percent(shares: list[float]) -> str:
    return spread([100 * share for share in shares], ".1f")


def markdown(header: list[str], rows: list[list[str]]) -> str:
    titles = [_one_line(name) for name in header]
    lines = [titles, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def latex(header: list[str], rows: list[list[str]]) -> str:
    """A tabular of the booktabs package, for LuaLaTeX, XeLaTeX or pdfLaTeX."""
    lines = [rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}", r"\toprule"]
    lines += [" & ".join(_tex(_one_line(name)) for name in header) + r" \\", r"\midrule"]
    lines += [" & ".join(map(_tex, row)) + r" \\" for row in rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


_TEX = {
    "\\": r"\textbackslash{}", "%": r"\%", "&": r"\&", "#": r"\#", "_": r"\_", "$": r"\$", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "τ": r"$\tau$", "σ": r"$\sigma$",
    "κ": r"$\kappa$", "ϑ": r"$\vartheta$", "β": r"$\beta$", "μ": r"$\mu$", "≤": r"$\le$", "‖": r"$\|$", "−": "$-$",
    "ᵀ": r"$^\top$", "–": "--", "ℓ": r"$\ell$", "∞": r"$\infty$", "ε": r"$\varepsilon$",
}  # fmt: skip


def _tex(text: str) -> str:
    return "".join(_TEX.get(character, character) for character in text)


def _one_line(name: str) -> str:
    return name.replace("-\n", "").replace("\n", " ")


def show(header: list[str], rows: list[list[str]]) -> None:
    """Print a table; a pipe or a file gets it in full width."""
    console = require("rich.console").Console()
    table = require("rich.table").Table(box=require("rich.box").SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    if not console.is_terminal:
        columns = zip(header, *rows, strict=True)
        console.width = sum(3 + max(len(line) for cell in column for line in cell.split("\n")) for column in columns)
    console.print(table)


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
    """Of what values() gives for each record under attack: means and standard deviations."""
    columns = list(zip(*(values(r["robustness"]) for r in records if r.get("robustness")), strict=True))
    return [statistics.fmean(c) for c in columns], [statistics.stdev(c) if len(c) > 1 else 0.0 for c in columns]


def _results(fig, results: dict) -> None:
    """Accuracy against budget under each attack, and kappa - 1 of the first seed's low-rank layers against step."""
    fig.set_size_inches(16, 5.6)
    *accuracy, kappa_axes = fig.subplots(1, 3)
    for i, records in enumerate(grouped(results).values()):
        style = _style(i) | {"label": _label(records)}
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
            # kappa = 1 to the last bit has no logarithm; nothing below float32 rounding means anything
            excess = [max(k - 1, 1e-8) if k is not None else float("nan") for k in kappa]
            kappa_axes.plot(excess, color=style["color"], ls=LINES[j % len(LINES)], lw=style["lw"] / 1.5)
    for axes, title in zip(accuracy, ("FGSM", "Worst of the attacks, per sample"), strict=True):
        axes.set(xlabel="ℓ∞ budget (inputs in [0, 1])", ylabel="test accuracy (%)", ylim=(0, 101), title=title)
    # a diverging run leaves by the top
    kappa_axes.set(xlabel="step", ylabel="κ − 1 (log scale)", yscale="log", ylim=(5e-9, 1e3))
    kappa_axes.set_title("Condition number of each layer (grey: the bound)")
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
    """Singular values of every hidden layer at the end, of the first seed."""
    groups = list(grouped(results).values())
    names = list(dict.fromkeys(name for records in groups for name in records[0]["spectra"]))
    columns = min(4, max(1, len(names)))
    rows = max(1, math.ceil(len(names) / columns))
    fig.set_size_inches(4 * columns + 1, 3.2 * rows + 1.4)
    panels = fig.subplots(rows, columns, squeeze=False).flatten()
    for axes, name in zip(panels, names, strict=False):
        for i, records in enumerate(groups):
            sigma = records[0]["spectra"].get(name)
            if sigma:
                style = _style(i) | {"label": _label(records)}
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
    """Accuracy, clean and in the worst case at every budget, against the number of parameters."""
    eps = results["config"]["eps"]
    fig.set_size_inches(4 * (len(eps) + 1), 5)
    panels = fig.subplots(1, len(eps) + 1, sharex=True, squeeze=False).flatten()
    for i, records in enumerate(grouped(results).values()):
        means, deviations = _means(records, lambda a: [100 * v for v in (a["clean"], *a.get("worst", []))])
        share = 100 * statistics.fmean(r["parameters"] / r["dense_parameters"] for r in records)
        for axes, mean, deviation in zip(panels, means, deviations, strict=False):
            axes.errorbar(share, mean, deviation or None, ls="", capsize=3, label=_label(records), **_style(i))
    for axes, title in zip(panels, ("clean", *(f"worst case, ε = {e:g}" for e in eps)), strict=True):
        axes.set(xlabel="parameters (% of the dense network's)", ylabel="test accuracy (%)", title=title)
        axes.grid(alpha=0.25)
    fig.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
