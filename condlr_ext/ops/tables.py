"""Measured times of layers by device: tables in the package, contributed with their origin, and the user's own.

`python -m bench --tune` writes the user's into `folder()`, where files from elsewhere may lie too; what is there takes
precedence over measured.json beside this file. A file says which device and how many threads a table is for. It decides
between implementations of one result, and nothing else. One that is broken or something else is refused by a warning
with its name, and plain PyTorch serves what it might have been about.
"""

import functools
import json
import math
import os
import re
import stat
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import _cpu
from .._version import __version__
from ._dispatch import COMPILED

FORMAT = 2
COLUMNS = (
    "direction", "layer", "precision", "rows", "n", "m", "r",
    "kernels", "products", "merged", "dense",  # microseconds, None for what cannot serve
)  # fmt: skip
_DIRECTIONS, _LAYERS = ("forward", "backward", "both"), ("linear", "conv")
_PRECISIONS = ("float16", "bfloat16", "tf32", "float32", "float64")
_TEXTS = ("device", "torch", "triton", "date", "commit", "origin")
_LARGEST_FILE, _LARGEST_SIZE, _LONGEST = 2**24, 2**40, 1e12  # bytes, numbers, microseconds


class Costs(NamedTuple):
    """Microseconds of one direction by own kernels, by thin products, merged and dense, and their source."""

    kernels: float
    products: float
    merged: float
    dense: float
    source: str


class Table:
    """The times measured on one device.

    Attributes:
        source: What they are, for people.
        refused: Whether a file that might have been about the device was refused, so that plain PyTorch serves it.
    """

    def __init__(self, source: str, rows: list[list], refused: bool = False):
        self.source, self.refused = source, refused
        self._rows: dict[tuple, list] = {}
        for *key, n_rows, n, m, r, kernels, products, merged, dense in rows:
            self._rows.setdefault(tuple(key), []).append((n_rows, n, m, r, kernels, products, merged, dense))
        self.find = functools.lru_cache(maxsize=4096)(self._find)

    def _find(self, direction: str, layer: str, precision: str, *size: int) -> Costs | None:
        """Return the costs at the nearest size (rows, n, m, r), which may differ by a factor of 2 in each number."""
        if self.refused:
            return Costs(math.inf, 1.0, math.inf, 1.0, self.source)
        best, least = None, math.inf
        for row in self._rows.get((direction, layer, precision), ()):
            distances = [abs(math.log2(max(a, 1) / max(b, 1))) for a, b in zip(row, size, strict=False)]
            if max(distances) <= 1 and sum(distances) < least:
                best, least = row, sum(distances)
        if best is None:
            return None
        rows, n, m, r, *times = best
        where = f"{self.source}, at {rows} rows, n {n}, m {m}, rank {r}"
        return Costs(*(math.inf if t is None else t for t in times), where)


def folder() -> Path | None:
    """Return the folder of the user's tables: CONDLR_EXT_TABLES (empty: none), or the cache of this version."""
    if (chosen := os.environ.get("CONDLR_EXT_TABLES")) is not None:
        return Path(chosen) if chosen else None
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "condlr_ext" / __version__


@functools.cache
def of(device: str, threads: int | None = None) -> Table | None:
    """Return the table for a device and, on CPUs, a number of threads; None if nothing was measured there."""
    entries, refused = _entries()
    for entry in entries:
        if entry["device"] == device and entry.get("threads") == threads:
            return Table(f"measured on {device}, {entry['date']}, in {entry['file']}", entry["rows"])
    return Table(f"plain PyTorch, since {refused[0]} was refused", [], refused=True) if refused else None


def reload() -> None:
    """Forget what was read, after a file has changed; layers keep what they have chosen already."""
    _entries.cache_clear()
    of.cache_clear()


@functools.cache
def _entries() -> tuple[list[dict], list[str]]:
    """Return the tables, the user's first, and the names of the user's files that were refused."""
    entries, refused = [], []
    try:
        mine = folder()
        files = sorted(mine.glob("*.json")) if mine else []
    except (OSError, RuntimeError):  # there is no home
        files = []
    for file in files:
        try:
            entries += read(file)
        except ValueError as error:
            refused.append(str(file))
            warnings.warn(
                f"condlr_ext: {error}; plain PyTorch serves the layers. Delete the file, or measure again"
                " (python -m bench --tune)",
                RuntimeWarning,
                stacklevel=2,
            )
    return entries + read(Path(__file__).with_name("measured.json")), refused


def read(file: Path) -> list[dict[str, Any]]:
    """Return the tables in a file, each with its name as "file".

    Raises:
        ValueError: The file is no regular file of at most 16 MiB, or anything in it is not as `bench --tune` writes it.
    """
    try:
        with open(file, "rb", opener=lambda path, flags: os.open(path, flags | getattr(os, "O_NONBLOCK", 0))) as opened:
            status = os.fstat(opened.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_size > _LARGEST_FILE:
                raise ValueError(f"it must be a regular file of at most {_LARGEST_FILE} bytes")
            content = json.loads(opened.read(_LARGEST_FILE + 1), parse_constant=_refuse_constant)
        _check(isinstance(content, dict) and set(content) == {"format", "tables"}, "format and tables")
        _check(content["format"] == FORMAT, f"format {FORMAT}")
        _check(isinstance(content["tables"], list), "a list of tables")
        for entry in content["tables"]:
            _check_entry(entry)
    except (ValueError, OSError, RecursionError, OverflowError) as error:
        raise ValueError(f"{file} is no table of measured times: {error}") from None
    return [entry | {"file": file.name} for entry in content["tables"]]


def _refuse_constant(name: str):
    raise ValueError(f"{name} is no number")


def _check(fits: bool, what: str) -> None:
    if not fits:
        raise ValueError(f"it must have {what}")


def _check_entry(entry) -> None:
    known = {*_TEXTS, "capability", "threads", "columns", "rows"}
    _check(isinstance(entry, dict) and set(entry) <= known, f"tables of {', '.join(sorted(known))} alone")
    for name in _TEXTS:
        value = entry.get(name)
        needed = name in ("device", "date")
        fits = isinstance(value, str) and 0 < len(value) <= 200 and value.isprintable()
        _check(fits or (value is None and not needed), f"{name} as a short text")
    _check(re.match(r"\d{4}-\d\d-\d\d", entry["date"]) is not None, "a date")
    threads = entry.get("threads")
    _check(threads is None or _is_size(threads), "threads as a number")
    _check(entry.get("columns") == list(COLUMNS), f"columns {', '.join(COLUMNS)}")
    _check(isinstance(entry.get("rows"), list), "rows")
    for row in entry["rows"]:
        _check(isinstance(row, list) and len(row) == len(COLUMNS), "rows with an entry for each column")
        direction, layer, precision, rows, n, m, r, *times = row
        _check(direction in _DIRECTIONS and layer in _LAYERS and precision in _PRECISIONS, "known kinds of layers")
        _check(all(map(_is_size, (rows, n, m, r))), "sizes >= 1")
        _check(all(t is None or (type(t) in (int, float) and 0 < t < _LONGEST) for t in times), "times > 0")
        _check(times[1] is not None, "a time of plain PyTorch in every row")


def _is_size(value) -> bool:
    return type(value) is int and 1 <= value < _LARGEST_SIZE


@functools.cache
def cpu() -> str:
    """Return the name of this CPU with the instruction set that the kernels use, as tables name it."""
    return f"{_cpu.model()}, {COMPILED.host.isa() if COMPILED.host else 'no kernels'}"


def on_cpu(direction: str, layer: str, dtype: torch.dtype, threads: int, *size: int) -> Costs | None:
    """Return the costs measured on this CPU with this number of threads at the nearest size (rows, n, m, r)."""
    table = of(cpu(), threads)
    return table and table.find(direction, layer, str(dtype).removeprefix("torch."), *size)
