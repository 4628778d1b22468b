"""Entry of measured routes of layers into the tables by which the package chooses."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from condlr_ext._files import write_whole
from condlr_ext.ops import tables

from .cases.layers import Conv, Linear
from .cases.routes import MODES, PATHS
from .machine import slug
from .records import Results

SHIPPED = Path(tables.__file__).with_name("measured.json")
PRECISIONS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "tf32": "tf32", "fp64": "float64"}


def rows(results: Results, threads: int | None = None) -> list[list]:
    """Return the rows of a table, with None for a path that cannot serve or is wrong; threads: those of a CPU."""
    kind, found = _kind(results), []
    for row in results.rows("routes", where=lambda r: r["mode"] in MODES[kind] and r["dtype"] in PRECISIONS):
        times, first = {r["provider"]: r["seconds"] for r in row}, row[0]
        if threads not in (None, first["threads"]) or not times.get(PATHS[kind]["products"]):
            continue
        numbers = first["shape"]["layer"]
        layer = (Conv if "kernel" in numbers else Linear)(**numbers)
        micros = [round(1e6 * times[name][1], 2) if times.get(name) else None for name in PATHS[kind].values()]
        size = [layer.rows, layer.n, layer.m, layer.r]
        name = "conv" if isinstance(layer, Conv) else "linear"
        found.append([first["mode"], name, PRECISIONS[first["dtype"]], *size, *micros])
    return sorted(found, key=lambda row: row[:7])


def enter(results: Results, file: Path | None = None, origin: str | None = None) -> tuple[Path, int]:
    """Replace the tables of the device of the results in a file.

    Each row has a line of its own, so that differences between two versions of the file can be read.

    Args:
        results: With times of `routes`.
        file: By default the user's file for this device or, with an origin, that of the package.
        origin: Who contributes the times.

    Returns:
        The file and its new number of rows.

    Raises:
        ValueError: The results have no times of `routes`, or what is in the file is no table.
    """
    made = list(_tables(results, origin))
    if not made:
        raise ValueError(f"{results.name} has no times of routes")
    folder = SHIPPED.parent if origin else tables.folder()
    if file is None and folder is None:
        raise ValueError("CONDLR_EXT_TABLES is empty: there is no folder for the table")
    file = file or (SHIPPED if origin else folder / f"{slug(made[0]['device'])}.json")
    others = tables.read(file) if file.exists() else []
    mine = {(table["device"], table.get("threads")) for table in made}
    kept = [table for table in others if (table["device"], table.get("threads")) not in mine]
    for table in kept:
        del table["file"]
    text = json.dumps({"format": tables.FORMAT, "tables": kept + made}, indent=1)
    text = re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, (text + "\n").encode())
    tables.reload()
    return file, sum(len(table["rows"]) for table in made)


def _kind(results: Results) -> str:
    return "cuda" if "capability" in results.run["machine"] else "cpu"


def _tables(results: Results, origin: str | None) -> Iterator[dict]:
    """Yield a table for the GPU, or for each number of threads of the CPU."""
    run, machine = results.run, results.run["machine"]
    facts = {name: run["versions"].get(name) for name in ("torch", "triton")}
    facts |= {"date": run["date"][:10], "commit": run["commit"], "origin": origin, "columns": list(tables.COLUMNS)}
    if _kind(results) == "cuda":
        tables_of = [({"device": machine["device"], "capability": machine["capability"]}, None)]
    else:
        threads = sorted({record["threads"] for record in results.times})
        tables_of = [({"device": f"{machine['device']}, {machine['isa']}", "threads": n}, n) for n in threads]
    for which, threads in tables_of:
        if measured := rows(results, threads):
            yield which | facts | {"rows": measured}
