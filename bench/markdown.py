"""Tables in Markdown files, between comments that name the results file and the rows."""

import copy
import fnmatch
import re
import shlex
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from condlr_ext._table import markdown

from .cells import duration, field, middle, number, percent
from .records import Results, ours, ratio, timed
from .tables import common, contests, memory_cells, on_cpu, provenance, scaling_exponents, standard

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"(<!-- python -m bench ([\w-]+): (\S+)([^\n]*?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
OPTIONS = ("op", "row", "dtype", "mode", "cache", "threads")

Made = tuple[list[str], list[list[str]], list[list[dict]]]  # titles, cells, the rows they were made of
Filter = Callable[[dict], bool]


def replace_block(file: str, module: str, made: str) -> None:
    """Replace what a file has between `<!-- python -m MODULE -->` and `<!-- end -->`; exit unless it is there once."""
    block = re.compile(rf"(<!-- python -m {re.escape(module)} -->\n).*?(<!-- end -->)", re.DOTALL)
    text, count = block.subn(lambda found: found[1] + made + found[2], Path(file).read_text(encoding="utf-8"))
    if count != 1:
        raise SystemExit(f"{file}: needed: <!-- python -m {module} --> ... <!-- end -->, once")
    Path(file).write_text(text, encoding="utf-8")


def rewrite(text: str, root: Path = ROOT) -> str:
    """Rewrite the tables between `<!-- python -m bench NAME: FILE OPTION=VALUE,... -->` and `<!-- end -->`.

    Args:
        text: Of a Markdown file.
        root: The folder to which the names of results files are relative; by default the checkout.

    Raises:
        ValueError: A comment is faulty.
    """

    def table(found: re.Match) -> str:
        start, name, file, options, body, end = found.groups()
        if "<!-- python -m bench" in body:
            raise ValueError(f"no <!-- end --> after {start.strip()}")
        if name not in TABLES:
            raise ValueError(f"no table {name!r} in {start.strip()}; there are {', '.join(TABLES)}")
        results = Results.read(root / file)
        titles, cells, rows = TABLES[name](results, record_filter(options, start.strip()))
        if not cells:
            raise ValueError(f"nothing in {file} for {start.strip()}")
        about = [*common(rows, on_cpu(results)), provenance(results)]
        return f"{start}{markdown(titles, cells)}\n`{file}`: {', '.join(about)}\n{end}"

    made, count = BLOCK.subn(table, text)
    if count != text.count("<!-- python -m bench "):
        raise ValueError("needed: <!-- python -m bench NAME: FILE OPTION=VALUE --> ... <!-- end -->")
    return made


def record_filter(options: str, comment: str) -> Filter:
    """Return whether a record's fields match the options, each a field and patterns of which one has to match."""
    patterns = {}
    for option in shlex.split(options):
        name, _, values = option.partition("=")
        if name not in OPTIONS or not values:
            raise ValueError(f"option {option!r} in {comment}; there are {'=, '.join(OPTIONS)}=")
        patterns[name] = values.split(",")
    return lambda record: all(
        any(fnmatch.fnmatchcase(str(record.get(name)), pattern) for pattern in several)
        for name, several in patterns.items()
    )


@dataclass(frozen=True)
class Column:
    """A column of a table of networks, from one operation and mode.

    Attributes:
        title: Its title.
        operation: Its operation.
        mode: Its mode.
        providers: The fastest of these over ours; or of ours alone "roofline", "time" or "rate", a second.
    """

    title: str
    operation: str
    mode: str
    providers: tuple[str, ...]

    def cell(self, row: list[dict]) -> str:
        mine = ours(row)
        if self.providers == ("roofline",):
            return percent(field(mine, "roofline"))
        if self.providers == ("time",):
            return duration(middle(mine))
        if self.providers == ("rate",):
            return number(1 / middle(mine) if mine else None)
        found = [r for name, r in timed(row).items() if name in self.providers]
        return number(ratio(min(found, key=middle, default=None), mine))


def pivot(columns: Iterable[Column]) -> Callable[[Results, Filter], Made]:
    """Return a function that makes a table with one line per network."""
    columns, fields = list(columns), ("row", "dtype", "cache", "threads")

    def table(results: Results, where: Filter) -> Made:
        rows: dict[tuple, dict[int, list[dict]]] = {}
        for row in results.rows(where=where):
            for i, column in enumerate(columns):
                if (row[0]["op"], row[0]["mode"]) == (column.operation, column.mode):
                    label = tuple(row[0][name] for name in fields)
                    if rows.setdefault(label, {}).setdefault(i, row) is not row:
                        raise ValueError(f"two rows {label} in {results.name}")
        extra = [i for i in range(1, 4) if len({label[i] for label in rows}) > 1]
        titles = ["network, rank", *(fields[i] for i in extra), *(column.title for column in columns)]
        cells = []
        for label, found in rows.items():
            values = [column.cell(found[i]) if i in found else "-" for i, column in enumerate(columns)]
            cells.append([label[0], *(str(label[i]) for i in extra), *values])
        return titles, cells, [row for found in rows.values() for row in found.values()]

    return table


def rows_table(results: Results, where: Filter) -> Made:
    rows = list(results.rows(where=where))
    return *standard(rows, names=True), rows


def score_table(results: Results, where: Filter) -> Made:
    """Count the rows of each operation in which ours is faster."""
    rows, cells = list(results.rows(where=where)), []
    for operation in dict.fromkeys(row[0]["op"] for row in rows):
        for against, ratios, count in contests([row for row in rows if row[0]["op"] == operation]):
            numbers = map(number, (min(ratios), statistics.median(ratios), max(ratios)))
            cells.append([operation, against, f"{sum(r > 1 for r in ratios)} of {count} rows", *numbers])
    return ["operation", "against", "ours faster in", "least ratio", "median", "largest"], cells, rows


def memory_table(results: Results, where: Filter) -> Made:
    return *memory_cells([r for r in results.others.get("memory", ()) if where(r)]), []


def scaling_table(results: Results, where: Filter) -> Made:
    chosen = copy.copy(results)
    chosen.times = [record for record in results.times if where(record)]
    return *scaling_exponents(chosen), list(chosen.rows("scaling"))


NETWORKS = (
    Column("iterations / s", "train", "iteration", ("rate",)),
    Column("iteration: dense", "train", "iteration", ("dense", "dense compiled")),
    Column("iteration: fast PyTorch", "train", "iteration", ("fast PyTorch",)),
    Column("step: fast PyTorch", "step", "call", ("fast PyTorch",)),
    Column("step: released", "step", "call", ("released",)),
    Column("step: dense SGD", "step", "call", ("dense SGD", "dense SGD fused")),
    Column("step: of the roofline", "step", "call", ("roofline",)),
)
INFERENCE = (
    Column("time", "inference", "call", ("time",)),
    Column("U S folded", "inference", "call", ("folded", "folded compiled")),
    Column("merged", "inference", "call", ("merged", "merged compiled")),
    Column("of the roofline", "inference", "call", ("roofline",)),
)
TABLES = {
    "rows": rows_table,
    "score": score_table,
    "networks": pivot(NETWORKS),
    "inference": pivot(INFERENCE),
    "memory": memory_table,
    "scaling": scaling_table,
}
