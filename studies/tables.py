"""The marked tables of README.md and docs/, filled from results/*.csv.

A table between `<!-- KIND NAME -->` and `<!-- end -->` is of the study NAME. Its titles and its first cells say which
columns and rows it has; the other cells are generated. Each is a mean ± standard deviation over the seeds. Kinds:

study: A line per run.
sizes: The worst case at the largest budget of attack, with a column per size of the network.
gaps: A line per pair of runs: how many points the first is above the second, seed by seed.
"""

import re
from functools import cache
from pathlib import Path

from condlr_ext import _table
from condlr_ext.experiments import report

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "studies" / "results"
_MARK = re.compile(r"(<!-- (study|sizes|gaps) ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
_SIZE = re.compile(r" (budget|rank|keep) [\d./]+")


def pages() -> list[Path]:
    """Return the files that may hold marked tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]


def rewrite(text: str) -> str:
    """Return text with every marked table filled anew.

    Raises:
        ValueError: A mark is faulty, or there is no such study, run or column.
    """
    text, count = _MARK.subn(lambda found: found[1] + _filled(*found.group(2, 3, 4)) + found[5], text)
    if count != len(re.findall(r"<!-- (?:study|sizes|gaps)\b", text)):
        raise ValueError("needed: <!-- study NAME -->, a table, <!-- end -->; likewise sizes and gaps")
    return text


def _filled(kind: str, name: str, table: str) -> str:
    lines = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in table.splitlines()]
    if len(lines) < 3 or "<!--" in table:
        raise ValueError(f"{kind} {name}: no table, or no <!-- end --> after it")
    titles, _, *rows = lines
    try:
        return _table.markdown(titles, {"study": study, "sizes": sizes, "gaps": gaps}[kind](name, titles, rows))
    except KeyError as error:
        raise ValueError(f"{kind} {name}: no run or column {error}") from None


def study(name: str, titles: list[str], rows: list[list[str]]) -> list[list[str]]:
    settings, records = results(name)
    known, lines = report.table(records, settings)
    known = [title.replace("\n", " ") for title in known]
    lines = {_plain(line[0]): dict(zip(known, line, strict=True)) for line in lines}
    return [[lines[_plain(row[0])][title] for title in titles] for row in rows]


def sizes(name: str, titles: list[str], rows: list[list[str]]) -> list[list[str]]:
    settings, records = results(name)
    column, cells = f"worst@{settings['eps'][-1]:g}", {}
    for run, group in report.grouped(records).items():
        options = dict(option.split("=") for option in run.partition(":")[2].split(",") if option)
        size = next((f"{k} {options[k]}" for k in ("rank", "keep", "budget") if k in options), "budget 0.27")
        label = group[0]["label"]
        failed = report.label(group).removeprefix(label)
        key = _SIZE.sub("", label), size.replace("keep", "budget")
        cells[key] = report.percent([row[column] for row in group]) + failed
    for unknown in {row[0] for row in rows} - {run for run, _ in cells} | set(titles[1:]) - {size for _, size in cells}:
        raise KeyError(unknown)
    return [[row[0], *(cells.get((row[0], title), report.NOT_APPLICABLE) for title in titles[1:])] for row in rows]


def gaps(name: str, titles: list[str], rows: list[list[str]]) -> list[list[str]]:
    columns = [_columns(name)[title] for title in titles[2:]]
    return [[a, b, *(points(gap(name, a, b, column)) for column in columns)] for a, b, *_ in rows]


def gap(name: str, first: str, second: str, column: str) -> list[float]:
    """Return by how many percentage points the run labeled first is above the other, for each seed that both have."""
    runs = by_label(name)
    below = {row["seed"]: row[column] for row in runs[second]}
    pairs = [(row[column], below[row["seed"]]) for row in runs[first]]
    return [100 * (a - b) for a, b in pairs if None not in (a, b)]


def points(values: list[float]) -> str:
    """Return mean and standard deviation with the sign."""
    if not values:
        return report.NOT_APPLICABLE
    mean, *deviation = report.spread(values, "+.1f").replace("-", "−").split(" ± +")
    return " ± ".join(["0.0" if float(mean[1:]) == 0 else mean, *deviation])


def by_label(name: str) -> dict[str, list[dict]]:
    """Return the rows of each run by its label."""
    return {rows[0]["label"]: rows for rows in report.grouped(results(name)[1]).values()}


@cache
def results(name: str) -> tuple[dict, list[dict]]:
    path = RESULTS / f"{name}.csv"
    if not path.is_file():
        raise ValueError(f"there is no study {name} in {RESULTS}")
    return report.read(path)


def _columns(name: str) -> dict[str, str]:
    attacks = report.attack_columns(results(name)[0])
    return {"clean %": "clean"} | {title.replace("\n", " "): column for title, column in attacks.items()}


def _plain(label: str) -> str:
    """Return the label without the note on runs that failed."""
    return label.partition(" (")[0]
