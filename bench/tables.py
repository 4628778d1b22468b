"""Results as tables: in the terminal, and in Markdown files between comments that say which."""

import copy
import fnmatch
import re
import shlex
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from .records import Results, best_dense, best_other, ours, ratio, timed
from .registry import CONTEXT, OURS

STATES = ("dtype", "mode", "cache", "threads")  # beside its name, what a row is


def show(results: Results, detail: bool = False) -> list[str]:
    """The lines that `python -m bench` ends with; `detail`: every provider of every row."""
    lines, cpu = about(results), on_cpu(results)
    for operation in dict.fromkeys(record["op"] for record in results.times):
        rows = list(results.rows(operation))
        lines += ["", heading(operation, rows, cpu), *(providers(rows) if detail else overview(rows))]
        lines += [f"  {line}" for line in (*untimed(rows), *score(rows))]
    every = list(results.rows())
    if len({record["op"] for record in results.times}) > 1 and score(every):
        lines += ["", "all operations", *(f"  {line}" for line in score(every))]
    for kind, records in results.others.items():
        if kind != "ceilings":
            lines += ["", kind, *OTHERS.get(kind, plain)(records)]
    fitted = fits(results)
    return lines + (["", "scaling, fitted", *aligned(*fitted)] if fitted else [])


def about(results: Results) -> list[str]:
    """What was measured, where and with what; the ceilings."""
    lines = [provenance(results)]
    for threads, ceilings in sorted(results.ceilings.items(), key=lambda item: item[0] or 0):
        copies = ", ".join(f"{rate / 1e9:.0f} GB/s up to {memory(size)}" for size, rate in ceilings.copies[:-1])
        rates = ", ".join(f"{name} {flops(rate)}" for name, rate in ceilings.rates.items())
        beyond = f"{ceilings.copies[-1][1] / 1e9:.0f} GB/s beyond"
        where = f", {counted(threads)}" if on_cpu(results) else ""
        lines.append(f"ceilings{where}: copy {f'{copies}, ' if copies else ''}{beyond}; product {rates}")
    launches = {name: [c[name] for c in results.others.get("ceilings", ()) if name in c] for name in LAUNCHES}
    words = [f"{name} {duration(min(times))}" for name, times in launches.items() if times]
    return lines + ([f"          {', '.join(words)}"] if words else [])


LAUNCHES = ("launch", "graph launch")


def on_cpu(results: Results) -> bool:
    return "cores" in results.run["machine"]


def provenance(results: Results) -> str:
    run, machine = results.run, results.run["machine"]
    versions = [f"{name} {run['versions'][name]}" for name in ("torch", "triton") if name in run["versions"]]
    version = f"condlr_ext {run['versions'].get('condlr_ext', '')}".strip()
    parts = [machine["device"], *versions, version + (f" at {run['commit']}" if run["commit"] else "")]
    if "allocator" in machine:
        parts.append(f"{machine['allocator']} allocator")
    return ", ".join([*parts, run["date"]])


def heading(operation: str, rows: list[list[dict]], threads: bool = True) -> str:
    """The operation, and what is the same in all of its rows; `threads`: also their number."""
    return f"{operation} ({', '.join(common(rows, threads))})"


def common(rows: list[list[dict]], threads: bool) -> list[str]:
    names = STATES if threads else STATES[:-1]
    same = [state(name, rows[0][0][name]) for name in names if rows and name not in varying(rows)]
    return [word for word in same if word != "call"]


def varying(rows: list[list[dict]]) -> list[str]:
    return [name for name in STATES if len({row[0][name] for row in rows}) > 1]


def state(name: str, value) -> str:
    return counted(value) if name == "threads" else str(value)


def counted(threads: int | None) -> str:
    return f"{threads} thread{'s' * (threads != 1)}"


def overview(rows: list[list[dict]]) -> list[str]:
    """One line per row, and one more for each related thing that was timed for orientation."""
    header, cells = standard(rows)
    lines = aligned(header, cells)
    for i in reversed(range(len(rows))):
        lines[2 + i : 2 + i] = [
            f"    beside it: {r['provider']} {duration(middle(r))}, {number(ratio(r, ours(rows[i])))} x ours,"
            f" error {error(r)}"
            for r in timed(rows[i], CONTEXT).values()
        ]
    return lines


def standard(rows: list[list[dict]], names: bool = False) -> tuple[list[str], list[list[str]]]:
    """Header and cells of one line per row; `names`: of the operations too."""
    fields = varying(rows)
    backends = {mine["provider"] for row in rows if (mine := ours(row))} - {"ours"}
    dense = any(best_dense(row) for row in rows)
    top = max((mine.get("flop/s", 0) for row in rows if (mine := ours(row))), default=0)
    scale, unit = (1e12, "TFLOP/s") if top >= 1e12 else (1e9, "GFLOP/s")
    header = ["row", *fields, "time", "spread", *["of"] * bool(backends), "best other", "its time", "x best"]
    header += [*["x dense"] * dense, "error", "other's", "GB/s", unit, "roofline"]
    cells = []
    for row in rows:
        mine, other = ours(row), best_other(row)
        name = f"{row[0]['op']} {row[0]['row']}" if names else row[0]["row"]
        line = [name, *(str(row[0][field]) for field in fields)]
        line += [duration(middle(mine)), spread(mine)]
        if backends:
            line.append(mine["provider"] if mine else "-")
        line += [other["provider"] if other else "-", duration(middle(other)), number(ratio(other, mine))]
        if dense:
            line.append(number(ratio(best_dense(row), mine)))
        line += [error(mine), error(other), number(of(mine, "byte/s", 1e9)), number(of(mine, "flop/s", scale))]
        cells.append([*line, percent(of(mine, "roofline"))])
    return header, cells


def providers(rows: list[list[dict]]) -> list[str]:
    """Every provider of every row."""
    fields = varying(rows)
    header = ["row", "provider", "role", *fields, "time", "spread", "samples", "x ours", "error", "roofline", "memory"]
    cells = []
    for row in rows:
        mine = ours(row)
        for i, r in enumerate(row):
            line = ["" if i else r["row"], r["provider"], r["role"] or "-", *(str(r[field]) for field in fields)]
            line += [duration(middle(r)) if r["seconds"] else "none", spread(r), str(r.get("samples", "-"))]
            line += [number(ratio(r, mine) if r["seconds"] else None), error(r), percent(of(r, "roofline"))]
            cells.append([*line, memory(r.get("memory"))])
    return aligned(header, cells, left=3)


def untimed(rows: list[list[dict]]) -> list[str]:
    """Why providers got no time, and in how many rows."""
    groups: dict[tuple, list[dict]] = {}
    for record in (record for row in rows for record in row if record.get("reason")):
        alike = re.sub(r"\S*\d\S*", "#", record["reason"])
        groups.setdefault((record["provider"], alike), []).append(record)
    lines = []
    for (provider, _), found in groups.items():
        where = f"({len(found)} of {len(rows)} rows)" if len(found) > 1 else f"({found[0]['row']})"
        lines.append(f"no time for {provider}: {found[0]['reason']} {where}")
    return lines


def score(rows: list[list[dict]]) -> list[str]:
    """In how many rows ours is faster, and by how much. A row in which only the others got a time is a lost one."""
    lines = []
    for against, find in (("the best other", best_other), ("dense", best_dense)):
        contested = [
            (find(row), ours(row))
            for row in rows
            if find(row) and any(r["role"] == OURS or r["provider"] == "ours" for r in row)
        ]
        ratios = [ratio(other, mine) for other, mine in contested if mine]
        if ratios:
            least, most = number(min(ratios)), number(max(ratios))
            lines.append(
                f"ours faster than {against} in {sum(r > 1 for r in ratios)} of {len(contested)} rows;"
                f" ratio {least} / {number(statistics.median(ratios))} / {most} (least / median / most)"
            )
    return lines


def memories(records: list[dict]) -> list[str]:
    failed = [f"  no measure of {r['row']}, {r['provider']}: {r['reason']}" for r in records if r.get("reason")]
    return aligned(*memory_cells(records), left=2) + failed


def memory_cells(records: list[dict]) -> tuple[list[str], list[list[str]]]:
    mine = {place(r): r for r in records if r["provider"] == "ours"}
    header = ["row", "provider", "threads", "memory", "x ours", "time", "page faults"]
    cells = []
    for r in records:
        base = mine.get(place(r), {})
        over = number(r["bytes"] / base["bytes"]) if base.get("bytes") and r.get("bytes") else "-"
        faults = "-" if r.get("page_faults") is None else f"{r['page_faults']:.0f}"
        cells.append(
            [f"{r['op']} {r['row']}", r["provider"], str(r["threads"]), memory(r.get("bytes")), over]
            + [duration(r.get("seconds")), faults]  # of processes one after the other: no ratio of these
        )
    return header, cells


def place(record: dict) -> tuple:
    return record["op"], record["row"], record["threads"]


def plain(records: list[dict]) -> list[str]:
    """Whatever plain values the records have."""
    names = dict.fromkeys(k for r in records for k, v in r.items() if k != "kind" and not isinstance(v, (list, dict)))
    return aligned([*names], [[cell(name, r.get(name)) for name in names] for r in records], left=2)


def cell(name: str, value) -> str:
    if isinstance(value, float):
        return duration(value) if name == "seconds" else f"{value:.4g}"
    return "-" if value is None else str(value)


OTHERS: dict[str, Callable[[list[dict]], list[str]]] = {"memory": memories}  # tables of records by kind; else `plain`


def fits(results: Results) -> tuple[list[str], list[list[str]]] | None:
    """Header and cells of the exponents with which cost grows, where that was measured."""
    if not any(record["op"] == "scaling" for record in results.times):
        return None
    from .cases import scaling

    found = scaling.fits(results)
    fields = [name for name in ("dtype", "cache", "threads") if len({fit[name] for fit in found}) > 1]
    beyond = any(fit["estimates"] for fit in found)
    header = ["of", "over", "mode", "provider", *fields, "from", "to", "time there", "exponent", "theory"]
    cells = []
    for fit in found:
        (first, _), (last, seconds) = fit["points"][0], fit["points"][-1]
        line = [fit["subject"], fit["sweep"], fit["mode"], fit["provider"], *(str(fit[name]) for name in fields)]
        line += [str(first), str(last), duration(seconds), *map(rounded, (fit["exponent"], fit["theory"]))]
        if beyond:
            line.append(", ".join(f"{value}: {duration(time)}" for value, time in fit["estimates"]) or "-")
        cells.append(line)
    return [*header, *["beyond memory, estimated"] * beyond], cells


def rounded(exponent: float | None) -> str:
    return "-" if exponent is None else f"{round(exponent, 2) + 0:.2f}"


# Markdown


@dataclass(frozen=True)
class Column:
    """Of a table of networks: how many times as long as ours the fastest of `providers` took in that operation and
    mode; or "roofline": ours in percent of it; "time" of ours; "rate": how many a second.
    """

    title: str
    operation: str
    mode: str
    providers: tuple[str, ...]


Made = tuple[list[str], list[list[str]], list[list[dict]]]  # header, cells, the rows they were made of


def pivot(columns: Iterable[Column]) -> Callable[[Results, Callable], Made]:
    columns, fields = list(columns), ("row", "dtype", "cache", "threads")

    def cells(results: Results, where: Callable[[dict], bool]) -> Made:
        rows: dict[tuple, dict[int, list[dict]]] = {}
        for row in results.rows(where=where):
            for i, column in enumerate(columns):
                if (row[0]["op"], row[0]["mode"]) == (column.operation, column.mode):
                    label = tuple(row[0][name] for name in fields)
                    if rows.setdefault(label, {}).setdefault(i, row) is not row:
                        raise ValueError(f"bench: two rows {label} in {results.name}")
        extra = [i for i in range(1, 4) if len({label[i] for label in rows}) > 1]
        header = ["network, rank", *(fields[i] for i in extra), *(column.title for column in columns)]
        lines = []
        for label, found in rows.items():
            values = [against(found[i], c.providers) if i in found else "-" for i, c in enumerate(columns)]
            lines.append([label[0], *(str(label[i]) for i in extra), *values])
        return header, lines, [row for found in rows.values() for row in found.values()]

    return cells


def against(row: list[dict], names: tuple[str, ...]) -> str:
    if names == ("roofline",):
        return percent(of(ours(row), "roofline"))
    if names == ("time",):
        return duration(middle(ours(row)))
    if names == ("rate",):
        return number(1 / middle(ours(row)) if ours(row) else None)
    found = [r for name, r in timed(row).items() if name in names]
    return number(ratio(min(found, key=middle, default=None), ours(row)))


def rows_cells(results: Results, where: Callable[[dict], bool]) -> Made:
    rows = list(results.rows(where=where))
    return *standard(rows, names=True), rows


def memory_rows(results: Results, where: Callable[[dict], bool]) -> Made:
    return *memory_cells([r for r in results.others.get("memory", ()) if where(r)]), []


def scaling_rows(results: Results, where: Callable[[dict], bool]) -> Made:
    chosen = copy.copy(results)
    chosen.times = [record for record in results.times if where(record)]
    return *(fits(chosen) or ([], [])), list(chosen.rows("scaling"))


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
    "rows": rows_cells,
    "networks": pivot(NETWORKS),
    "inference": pivot(INFERENCE),
    "memory": memory_rows,
    "scaling": scaling_rows,
}

BLOCK = re.compile(r"(<!-- python -m bench ([\w-]+): (\S+)([^\n]*?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
OPTIONS = ("op", "row", "dtype", "mode", "cache", "threads")


def rewrite(text: str, folder: Path) -> str:
    """The Markdown text with tables between `<!-- python -m bench NAME: FILE OPTION=VALUE,... -->` and `<!-- end -->`
    made anew from the results files, whose names are relative to `folder`. A faulty comment raises ValueError.
    """

    def table(found: re.Match) -> str:
        start, name, file, options, body, end = found.groups()
        if "<!-- python -m bench" in body:
            raise ValueError(f"bench: no <!-- end --> after {start.strip()}")
        if name not in TABLES:
            raise ValueError(f"bench: no table {name!r} in {start.strip()}; there are {', '.join(TABLES)}")
        results = Results.read(folder / file)
        header, cells, rows = TABLES[name](results, wanted(options, start.strip()))
        if not cells:
            raise ValueError(f"bench: nothing in {file} for {start.strip()}")
        about = [*common(rows, on_cpu(results)), provenance(results)]
        return f"{start}{markdown(header, cells)}\n\n`{file}`: {', '.join(about)}\n{end}"

    made, count = BLOCK.subn(table, text)
    if count != text.count("<!-- python -m bench "):
        raise ValueError("bench: needed: <!-- python -m bench NAME: FILE OPTION=VALUE --> ... <!-- end -->")
    return made


def wanted(options: str, comment: str) -> Callable[[dict], bool]:
    """Of records: every option names a field and the patterns of which one has to match it."""
    patterns = {}
    for option in shlex.split(options):
        name, _, values = option.partition("=")
        if name not in OPTIONS or not values:
            raise ValueError(f"bench: option {option!r} in {comment}; there are {'=, '.join(OPTIONS)}=")
        patterns[name] = values.split(",")
    return lambda record: all(
        any(fnmatch.fnmatchcase(str(record.get(name)), pattern) for pattern in several)
        for name, several in patterns.items()
    )


def markdown(header: list[str], cells: list[list[str]]) -> str:
    """Words to the left, numbers to the right."""
    columns = list(zip(*cells, strict=True))
    rule = ["---:" if any(re.match(r"[\d.]", value) for value in c) and i else "---" for i, c in enumerate(columns)]
    lines = [f"| {' | '.join(line)} |" for line in (header, *cells)]
    return "\n".join([lines[0], f"|{'|'.join(rule)}|", *lines[1:]])


# Cells


def aligned(header: list[str], cells: list[list[str]], left: int = 1) -> list[str]:
    """Lines with the columns under each other, the first `left` of them aligned to the left."""
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    lines = []
    for line in (header, *cells):
        padded = [v.ljust(w) if i < left else v.rjust(w) for i, (v, w) in enumerate(zip(line, widths, strict=True))]
        lines.append(("  " + "  ".join(padded)).rstrip())
    return lines


def middle(record: dict | None) -> float | None:
    return record["seconds"][1] if record and record["seconds"] else None


def of(record: dict | None, name: str, scale: float = 1) -> float | None:
    return record[name] / scale if record and name in record else None


def spread(record: dict | None) -> str:
    """From the lower to the upper quantile, over the median."""
    if not record or not record["seconds"] or record["samples"] == 1:
        return "-"
    low, median, high = record["seconds"]
    return percent((high - low) / median)


def error(record: dict | None) -> str:
    return f"{record['error']:.0e}" if record and record.get("error") is not None else "-"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    for scale, unit in ((1, "s"), (1e3, "ms"), (1e6, "us")):
        if seconds * scale >= 0.9995:
            return f"{digits(seconds * scale)} {unit}"
    return f"{digits(seconds * 1e9)} ns"


def number(value: float | None) -> str:
    return "-" if value is None else digits(value)


def digits(value: float) -> str:
    """Three, never as a power of ten from 0.01 on."""
    if abs(value) < 9.995:
        return f"{value:.2f}" if abs(value) >= 0.01 or value == 0 else f"{value:.1e}"
    return f"{value:.1f}" if abs(value) < 99.95 else f"{value:.0f}"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.{0 if share >= 0.0995 else 1 if share >= 0.00995 else 2}f} %"


def flops(rate: float) -> str:
    return f"{digits(rate / 1e12)} TFLOP/s" if rate >= 1e12 else f"{digits(rate / 1e9)} GFLOP/s"


def memory(size: float | None) -> str:
    if size is None:
        return "-"
    for scale, unit in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if abs(size) >= scale:
            return f"{digits(size / scale)} {unit}"
    return f"{size:.0f} B"
