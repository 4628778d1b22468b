"""The figure of the README: worst-case accuracy against the budget of the attack, from one of the studies."""

import io
import statistics

from . import tables

PATH = tables.ROOT / "docs" / "images" / "accuracy-vs-budget.svg"
STUDY = "digits-mlp-budgets"
BUDGETS = (0.025, 0.05, 0.075, 0.1, 0.125, 0.15)  # beyond, nothing is robust
# label in the study, text in the figure, color that can be read on white and on black, style
LINES = (
    ("CondLR τ=0.1 PCA init lr 0.5", "κ ≤ 1.1, principal directions (27 %)", "#0a84d6", "-"),
    ("dense σ≤1 clip lr 0.2", "dense, σ ≤ 1 (100 %)", "#b06fc4", "--"),
    ("CondLR τ=0.1 lr 0.5", "κ ≤ 1.1 (27 %)", "#12a37a", "-"),
    ("dense lr 0.5", "dense (100 %)", "#8a8a8a", "--"),
    ("vanilla UVᵀ lr 0.2", "two plain factors (25 %)", "#e0701a", "-"),
)
_TEXT = "#808080"


def data() -> dict[str, list[tuple[float, float, float]]]:
    """Return (budget, mean, standard deviation over the seeds) of every line by its label, accuracy in percent."""
    runs = tables.by_label(STUDY)
    columns = {0.0: "clean"} | {e: f"worst@{e:g}" for e in BUDGETS}
    found = {}
    for label, *_ in LINES:
        shares = {e: [100 * row[name] for row in runs[label]] for e, name in columns.items()}
        found[label] = [(e, statistics.fmean(s), statistics.stdev(s)) for e, s in shares.items()]
    return found


def description() -> str:
    """Return data() as text, which the figure carries."""
    lines = (
        f"{text}: " + ", ".join(f"{e:g}: {mean:.1f} ± {deviation:.1f}" for e, mean, deviation in points)
        for (_, text, *_), points in zip(LINES, data().values(), strict=True)
    )
    return f"Worst-case accuracy in percent by budget, {STUDY}. " + "; ".join(lines)


def draw() -> bytes:
    """Return the figure as SVG, the same bytes for the same data and matplotlib."""
    import matplotlib
    from matplotlib.figure import Figure

    style = {"svg.fonttype": "none", "svg.hashsalt": "condlr_ext", "font.family": "sans-serif", "font.size": 11}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(7.2, 4.2), layout="constrained")
        axes = figure.subplots()
        for (_, text, color, dashes), points in zip(LINES, data().values(), strict=True):
            eps, mean, deviation = zip(*points, strict=True)
            low, high = zip(*((m - d, m + d) for m, d in zip(mean, deviation, strict=True)), strict=True)
            axes.fill_between(eps, low, high, color=color, alpha=0.18, lw=0)
            axes.plot(eps, mean, color=color, ls=dashes, lw=2, marker="o", ms=4, label=text)
        axes.set(
            xlim=(0, BUDGETS[-1]), ylim=(0, 100), xlabel="ℓ∞ budget of the attack", ylabel="worst-case accuracy (%)"
        )
        axes.set_xticks((0, 0.05, 0.1, 0.15))
        legend = axes.legend(loc="lower left", frameon=False, labelcolor=_TEXT, title="digits, hidden weights kept")
        legend.get_title().set_color(_TEXT)
        legend.set_alignment("left")
        axes.grid(color=_TEXT, alpha=0.25, lw=0.8)
        axes.tick_params(colors=_TEXT)
        for part in (axes.xaxis.label, axes.yaxis.label):
            part.set_color(_TEXT)
        for name, spine in axes.spines.items():
            spine.set(color=_TEXT, visible=name in ("left", "bottom"))
        buffer = io.BytesIO()
        metadata = {"Date": None, "Creator": None, "Description": description()}
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    return buffer.getvalue()


def write() -> None:
    PATH.parent.mkdir(parents=True, exist_ok=True)
    PATH.write_bytes(draw())
