"""Entry of measured routes of layers into the table by which the package chooses a route on GPUs."""

import json
import re
from pathlib import Path

from .cases.layers import Conv, Linear
from .cases.routes import PATHS
from .records import Results

MEASURED = Path(__file__).resolve().parents[1] / "condlr_ext" / "ops" / "measured.json"
COLUMNS = ("direction", "layer", "precision", "rows", "n", "m", "r", *PATHS)
PRECISIONS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "tf32": "tf32"}


def rows(results: Results) -> list[list]:
    """Return COLUMNS of each direction of each layer; microseconds, None for a path that cannot serve or is wrong."""
    found = []
    for row in results.rows(
        "routes", where=lambda r: r["mode"] in ("forward", "backward") and r["dtype"] in PRECISIONS
    ):
        times, first = {r["provider"]: r["seconds"] for r in row}, row[0]
        numbers = first["shape"]["layer"]
        layer = (Conv if "kernel" in numbers else Linear)(**numbers)
        micros = [round(1e6 * times[name][1], 2) if times.get(name) else None for name in PATHS.values()]
        size = [layer.rows, layer.n, layer.m, layer.r]
        kind = "conv" if isinstance(layer, Conv) else "linear"
        found.append([first["mode"], kind, PRECISIONS[first["dtype"]], *size, *micros])
    return sorted(found, key=lambda row: row[:7])


def enter(results: Results, file: Path | None = None) -> int:
    """Replace the table of the device of the results in the file, by default the package's.

    Each row has a line of its own, so that differences between two versions of the file can be read.

    Returns:
        The number of rows.

    Raises:
        ValueError: The results have no times of `routes` on a GPU.
    """
    file, run = file or MEASURED, results.run
    measured = rows(results) if "capability" in run["machine"] else []
    if not measured:
        raise ValueError(f"{results.name} has no times of routes on a GPU")
    entry = {name: run["machine"][name] for name in ("device", "capability")}
    entry |= {name: run["versions"].get(name) for name in ("torch", "triton")}
    entry |= {"date": run["date"][:10], "commit": run["commit"], "columns": COLUMNS, "rows": measured}
    tables = json.loads(file.read_text(encoding="utf-8"))["tables"] if file.exists() else []
    tables = [table for table in tables if table["device"] != entry["device"]] + [entry]
    text = json.dumps({"format": 1, "tables": tables}, indent=1)
    text = re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text)
    file.write_text(text + "\n", encoding="utf-8")
    return len(measured)
