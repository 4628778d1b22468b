"""Results as tables in the terminal."""

import re
import statistics
from collections.abc import Callable

from condlr_ext._table import text

from .cells import (
    duration,
    error,
    exponent,
    field,
    flop_rate,
    middle,
    number,
    percent,
    size,
    spread,
    thread_count,
)
from .records import Results, best_dense, best_other, ours, ratio, timed
from .registry import CONTEXT, OURS

STATES = ("dtype", "mode", "cache", "threads")  # identify a row beside its name
LAUNCHES = ("launch", "graph launch")

Table = tuple[list[str], list[list[str]]]  # titles, cells


def show(results: Results, detail: bool = False) -> list[str]:
    """Return the lines printed after a run; `detail`: every provider of every row."""
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
            lines += ["", kind, *OTHERS.get(kind, plain_records)(records, results)]
    titles, cells = scaling_exponents(results)
    return lines + (["", "scaling, fitted", *indented(titles, cells)] if cells else [])


def indented(titles: list[str], cells: list[list[str]]) -> list[str]:
    return [f"  {line}" for line in text(titles, cells).splitlines()]


def about(results: Results) -> list[str]:
    """Return lines on the machine, the versions and the ceilings."""
    lines = [provenance(results)]
    for threads, ceilings in sorted(results.ceilings.items(), key=lambda item: item[0] or 0):
        copies = ", ".join(f"{rate / 1e9:.0f} GB/s up to {size(held)}" for held, rate in ceilings.copies[:-1])
        rates = ", ".join(f"{name} {flop_rate(rate)}" for name, rate in ceilings.rates.items())
        beyond = f"{ceilings.copies[-1][1] / 1e9:.0f} GB/s beyond"
        where = f", {thread_count(threads)}" if on_cpu(results) else ""
        lines.append(f"ceilings{where}: copy {f'{copies}, ' if copies else ''}{beyond}; product {rates}")
    launches = {name: [c[name] for c in results.others.get("ceilings", ()) if name in c] for name in LAUNCHES}
    words = [f"{name} {duration(min(times))}" for name, times in launches.items() if times]
    return lines + ([f"          {', '.join(words)}"] if words else [])


def on_cpu(results: Results) -> bool:
    return "cores" in results.run["machine"]


def provenance(results: Results) -> str:
    """Return device, versions, commit, allocator and date."""
    run, machine = results.run, results.run["machine"]
    versions = [f"{name} {run['versions'][name]}" for name in ("torch", "triton") if name in run["versions"]]
    version = f"condlr_ext {run['versions'].get('condlr_ext', '')}".strip()
    parts = [machine["device"], *versions, version + (f" at {run['commit']}" if run["commit"] else "")]
    if "allocator" in machine:
        parts.append(f"{machine['allocator']} allocator")
    return ", ".join([*parts, run["date"]])


def heading(operation: str, rows: list[list[dict]], threads: bool = True) -> str:
    """Return the operation and what all of its rows have in common."""
    return f"{operation} ({', '.join(common(rows, threads))})"


def common(rows: list[list[dict]], threads: bool) -> list[str]:
    names = STATES if threads else STATES[:-1]
    values = {name: rows[0][0][name] for name in names if rows and name not in varying(rows)}
    words = [thread_count(value) if name == "threads" else str(value) for name, value in values.items()]
    return [word for word in words if word != "call"]


def varying(rows: list[list[dict]]) -> list[str]:
    return [name for name in STATES if len({row[0][name] for row in rows}) > 1]


def overview(rows: list[list[dict]]) -> list[str]:
    """Return one line per row, and one more for each related thing that was timed for orientation."""
    lines = indented(*standard(rows))
    for i in reversed(range(len(rows))):
        lines[1 + i + 1 : 1 + i + 1] = [
            f"    beside it: {r['provider']} {duration(middle(r))}, {number(ratio(r, ours(rows[i])))} x ours,"
            f" error {error(r)}"
            for r in timed(rows[i], CONTEXT).values()
        ]
    return lines


def standard(rows: list[list[dict]], names: bool = False) -> Table:
    """Return one line of cells per row; `names`: with the operation's name."""
    fields = varying(rows)
    backends = {mine["provider"] for row in rows if (mine := ours(row))} - {"ours"}
    dense = any(best_dense(row) for row in rows)
    top = max((mine.get("flop/s", 0) for row in rows if (mine := ours(row))), default=0)
    scale, unit = (1e12, "TFLOP/s") if top >= 1e12 else (1e9, "GFLOP/s")
    titles = ["row", *fields, "time", "spread", *["of"] * bool(backends), "best other", "its time", "x best"]
    titles += [*["x dense"] * dense, "error", "other's", "GB/s", unit, "roofline"]
    cells = []
    for row in rows:
        mine, other = ours(row), best_other(row)
        name = f"{row[0]['op']} {row[0]['row']}" if names else row[0]["row"]
        line = [name, *(str(row[0][state]) for state in fields)]
        line += [duration(middle(mine)), spread(mine)]
        if backends:
            line.append(mine["provider"] if mine and mine["provider"] != "ours" else "-")
        line += [other["provider"] if other else "-", duration(middle(other)), number(ratio(other, mine))]
        if dense:
            line.append(number(ratio(best_dense(row), mine)))
        line += [error(mine), error(other), number(field(mine, "byte/s", 1e9)), number(field(mine, "flop/s", scale))]
        cells.append([*line, percent(field(mine, "roofline"))])
    return titles, cells


def providers(rows: list[list[dict]]) -> list[str]:
    """Return one line per provider of each row."""
    fields = varying(rows)
    titles = ["row", "provider", "role", *fields, "time", "spread", "samples", "x ours", "error", "roofline", "memory"]
    cells = []
    for row in rows:
        mine = ours(row)
        for i, r in enumerate(row):
            line = ["" if i else r["row"], r["provider"], r["role"] or "-", *(str(r[state]) for state in fields)]
            line += [duration(middle(r)) if r["seconds"] else "none", spread(r), str(r.get("samples", "-"))]
            line += [number(ratio(r, mine) if r["seconds"] else None), error(r), percent(field(r, "roofline"))]
            cells.append([*line, size(r.get("memory"))])
    return indented(titles, cells)


def untimed(rows: list[list[dict]]) -> list[str]:
    """Return why providers got no time, and in how many rows."""
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
    """Return in how many rows ours is faster, and by how much."""
    return [
        f"ours faster than {against} in {sum(r > 1 for r in ratios)} of {count} rows;"
        f" ratio {' / '.join(map(number, (min(ratios), statistics.median(ratios), max(ratios))))}"
        " (least / median / most)"
        for against, ratios, count in contests(rows)
    ]


def contests(rows: list[list[dict]]) -> list[tuple[str, list[float], int]]:
    """Return against whom, their times over ours, and the number of rows, of which those without our time are lost."""
    found = []
    for against, find in (("the best other", best_other), ("dense", best_dense)):
        pairs = [
            (find(row), ours(row))
            for row in rows
            if find(row) and any(r["role"] == OURS or r["provider"] == "ours" for r in row)
        ]
        ratios = [ratio(other, mine) for other, mine in pairs if mine]
        if ratios:
            found.append((against, ratios, len(pairs)))
    return found


def memory_lines(records: list[dict], results: Results) -> list[str]:
    failed = [f"  no measure of {r['row']}, {r['provider']}: {r['reason']}" for r in records if r.get("reason")]
    return indented(*memory_cells(records)) + failed


def memory_cells(records: list[dict]) -> Table:
    def process(record: dict) -> tuple:
        return record["op"], record["row"], record["threads"]

    mine = {process(r): r for r in records if r["provider"] == "ours"}
    titles = ["row", "provider", "threads", "memory", "x ours", "time", "page faults"]
    cells = []
    for r in records:
        base = mine.get(process(r), {})
        over = number(r["bytes"] / base["bytes"]) if base.get("bytes") and r.get("bytes") else "-"
        faults = "-" if r.get("page_faults") is None else f"{r['page_faults']:.0f}"
        cells.append(
            [f"{r['op']} {r['row']}", r["provider"], str(r["threads"]), size(r.get("bytes")), over]
            + [duration(r.get("seconds")), faults]  # of processes one after the other: no ratio of these
        )
    return titles, cells


def plan_lines(records: list[dict], results: Results) -> list[str]:
    """Return the chosen routes of layers, their times and the regret, where all routes were timed."""
    from .cases import routes

    found = routes.regrets(results)
    if not found:
        return plain_records(records, results)
    titles = ["row", "dtype", "threads", *routes.ROUTES, "dense", "chosen", "regret", "gain", "predicted"]
    cells = [
        [f"{r['op']} {r['row']}", r["dtype"], str(r["threads"]), *map(duration, r["seconds"].values()), r["route"]]
        + [percent(r["regret"]), number(r["measured gain"]), number(r["gain"])]
        for r in found
    ]
    regrets = [r["regret"] for r in found]
    right = sum(regret <= 0 for regret in regrets)
    summary = f"{percent(right / len(found))} of {len(found)} choices are the faster route; regret: worst"
    summary += f" {percent(max(regrets))}, mean {percent(sum(regrets) / len(found))}; gain: dense time over ours"
    return [*indented(titles, cells), f"  {summary}"]


def plain_records(records: list[dict], results: Results) -> list[str]:
    """Return a table of the plain values that records have."""

    def cell(name: str, value) -> str:
        if isinstance(value, float):
            return duration(value) if name == "seconds" else f"{value:.4g}"
        return "-" if value is None else str(value)

    names = dict.fromkeys(k for r in records for k, v in r.items() if k != "kind" and not isinstance(v, (list, dict)))
    return indented([*names], [[cell(name, r.get(name)) for name in names] for r in records])


# by kind of records; plain_records for other kinds
OTHERS: dict[str, Callable[[list[dict], Results], list[str]]] = {"memory": memory_lines, "plan": plan_lines}


def scaling_exponents(results: Results) -> Table:
    """Return the exponents with which cost grows; no cells where that was not measured."""
    if not any(record["op"] == "scaling" for record in results.times):
        return [], []
    from .cases import scaling

    found = scaling.fits(results)
    fields = [name for name in ("dtype", "cache", "threads") if len({fit[name] for fit in found}) > 1]
    beyond = any(fit["estimates"] for fit in found)
    titles = ["of", "over", "mode", "provider", *fields, "from", "to", "time there", "exponent", "theory"]
    cells = []
    for fit in found:
        (first, _), (last, seconds) = fit["points"][0], fit["points"][-1]
        line = [fit["subject"], fit["sweep"], fit["mode"], fit["provider"], *(str(fit[name]) for name in fields)]
        line += [str(first), str(last), duration(seconds), *map(exponent, (fit["exponent"], fit["theory"]))]
        if beyond:
            line.append(", ".join(f"{value}: {duration(time)}" for value, time in fit["estimates"]) or "-")
        cells.append(line)
    return [*titles, *["beyond memory, estimated"] * beyond], cells
