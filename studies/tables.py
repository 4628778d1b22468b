"""Writes the tables of studies in both READMEs anew from results/: python studies/tables.py

`<!-- study NAME -->` stands before some rows and columns of results/NAME/table.md, `<!-- sizes NAME -->` before the
worst case at the largest eps with a column per size. Which rows and columns: those whose titles are there.
"""

import json
import re
from collections import Counter
from pathlib import Path

from condlr_ext.experiments import RunSpec
from condlr_ext.experiments.report import NOT_APPLICABLE, grouped, markdown, percent

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "studies" / "results"
PAGES = ROOT / "README.md", ROOT / "studies" / "README.md"


def rewrite(text: str) -> str:
    """text with every marked table filled anew."""
    for kind, fill in (("study", study), ("sizes", sizes)):
        pattern = re.compile(rf"(<!-- {kind} ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
        text = pattern.sub(lambda found, fill=fill: found[1] + fill(found[2], *asked(found[3])) + found[4], text)
    return text


def asked(table: str) -> tuple[list[str], list[str]]:
    """The titles of the columns and the labels of the rows."""
    titles, _, *rows = map(cells, table.strip().splitlines())
    return titles, [row[0] for row in rows]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def study(name: str, titles: list[str], labels: list[str]) -> str:
    known, _, *rows = map(cells, (RESULTS / name / "table.md").read_text().splitlines())
    rows = {row[0]: dict(zip(known, row, strict=True)) for row in rows}
    return markdown(titles, [[rows[label][title] for title in titles] for label in labels])


def sizes(name: str, titles: list[str], labels: list[str]) -> str:
    results = json.loads((RESULTS / name / "summary.json").read_text())
    worst = {}
    for run, records in grouped(results).items():
        spec = RunSpec.parse(run)
        given = spec.given
        rank, budget = given.pop("rank", None), given.pop("budget", None)
        size = f"rank {rank}" if rank is not None else f"budget {given.pop('keep', budget)}"
        label = type(spec)(**given).label
        attacked = [r["robustness"]["worst"][-1] for r in records if r.get("robustness")]
        failed = Counter(r["status"] for r in records if r["status"] != "trained")
        left = "".join(f" ({count} of {len(records)} {status})" for status, count in failed.items())
        worst[label, size] = percent(attacked) + left
    return markdown(titles, [[label, *(worst.get((label, t), NOT_APPLICABLE) for t in titles[1:])] for label in labels])


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(rewrite(page.read_text()))
