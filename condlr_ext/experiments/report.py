"""Results as a table (terminal, Markdown), a figure and JSON."""

import io
import json
from pathlib import Path

from .extras import require
from .files import write_whole

# Okabe and Ito's palette (yellow darkened): told apart with any colour vision, and by marker without colour
COLORS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#8C8C00")
MARKERS = "osD^vPX*"
NOT_APPLICABLE = "-"


def write(results: dict, out: Path) -> None:
    """results.json, results.png and table.md in the folder out."""
    write_whole(out / "results.json", json.dumps(results, allow_nan=False).encode())
    write_whole(out / "table.md", markdown(*summary(results)).encode())
    write_whole(out / "results.png", figure(results))


def summary(results: dict) -> tuple[list[str], list[list[str]]]:
    """Header and one row per run."""
    eps = results["config"]["eps"]
    header = ["run", "ranks", "kept\n%", "clean\n%"]
    header += [f"{attack}\n{e:g}" for attack in ("FGSM", "PGD") for e in eps]
    header += ["satu-\nrated %", "max κ", "‖UᵀU−I‖\nmax", "s per\nepoch"]
    rows = []
    for run in results["runs"]:
        ranks = ", ".join(str(rank) for rank in run["ranks"].values()) or "full"
        row = [_label(run), ranks, f"{100 * run['kept']:.1f}"]
        attack = run.get("robustness")
        if attack:
            shares = (attack["clean"], *attack["fgsm"], *attack["worst"], attack["saturated"])
            row += [f"{100 * share:.1f}" for share in shares]
        else:
            row += [NOT_APPLICABLE] * (2 * len(eps) + 2)
        row += [
            number(run["max_kappa"], ".7g" if run["method"] == "condlr" else ".3g"),
            number(run["orthonormality"], ".1e"),
            number(run["seconds_per_epoch"], ".3f"),
        ]
        rows.append(row)
    return header, rows


def _label(run: dict) -> str:
    return run["label"] if run["status"] == "trained" else f"{run['label']} ({run['status']})"


def number(value: float | None, spec: str) -> str:
    return NOT_APPLICABLE if value is None else format(value, spec)


def markdown(header: list[str], rows: list[list[str]]) -> str:
    titles = [name.replace("-\n", "").replace("\n", " ") for name in header]
    lines = [titles, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


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


def figure(results: dict) -> bytes:
    """PNG: accuracy against budget under each attack, and kappa - 1 of every low-rank layer against step."""
    require("matplotlib")
    from matplotlib.figure import Figure

    fig = Figure(figsize=(16, 5.6), layout="constrained")
    *accuracy, kappa_axes = fig.subplots(1, 3)
    for i, run in enumerate(results["runs"]):
        style = {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)], "label": _label(run)}
        style |= {"lw": max(1, 3.2 - 0.35 * i), "ms": max(4, 9 - 0.7 * i)}  # coincident runs stay visible
        attack = run.get("robustness")
        for axes, name in zip(accuracy, ("fgsm", "worst"), strict=True):
            eps = [0.0, *attack["eps"]] if attack else []
            axes.plot(eps, [100 * a for a in (attack["clean"], *attack[name])] if attack else [], **style)
        for line, kappa in zip(("-", "--", ":", "-."), run["kappa"].values(), strict=False):
            # kappa = 1 to the last bit has no logarithm; nothing below float32 rounding means anything
            excess = [max(k - 1, 1e-8) if k is not None else float("nan") for k in kappa]
            kappa_axes.plot(excess, color=style["color"], ls=line, lw=style["lw"] / 1.5)
    pgd = "PGD-CE" if results["data"]["classes"] < 3 else "Worst of PGD-CE and PGD-DLR"
    for axes, title in zip(accuracy, ("FGSM", pgd), strict=True):
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
    config = results["config"]
    fig.suptitle(f"{config['data']}, seed {config['seed']}, {config['epochs']} epochs")
    buffer = io.BytesIO()
    fig.savefig(buffer, dpi=110, format="png")
    return buffer.getvalue()
