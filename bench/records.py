"""Results as JSON lines: a "run" record, "ceilings", and one "time" record per row, mode, cache state and provider."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from .machine import FORMAT, Ceilings
from .registry import DENSE, OURS, SAME, Work


class Writer:
    """Writes each record to a file at once, so that an interrupted run keeps its rows; the first replaces the file."""

    def __init__(self, file: Path | str):
        self.file = Path(file)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self._mode = "w"

    def __call__(self, record: dict) -> None:
        with self.file.open(self._mode, encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._mode = "a"


class Results:
    """The records of a results file.

    Attributes:
        run: The first record.
        times: The "time" records with derived values: "floor" (seconds at the ceilings), "roofline" (floor over time),
            "flop/s" and "byte/s".
        others: Further records by kind.
        ceilings: By number of threads.
    """

    def __init__(self, records: Iterable[dict], name: str = "results"):
        self.name, self.others = name, {}
        self.times = []
        for record in records:
            if record["kind"] == "time":
                self.times.append(dict(record))
            else:
                self.others.setdefault(record["kind"], []).append(record)
        if "run" not in self.others:
            raise ValueError(f"{name} has no run record: not a results file of format {FORMAT}")
        (self.run,) = self.others.pop("run")
        if self.run.get("format") != FORMAT:
            raise ValueError(f"{name} has format {self.run.get('format')}, this version reads {FORMAT}")
        self.ceilings = {
            threads: Ceilings(c for c in self.others.get("ceilings", ()) if c.get("threads") == threads)
            for threads in {c.get("threads") for c in self.others.get("ceilings", ())}
        }
        for record in self.times:
            self._derive(record)

    @classmethod
    def read(cls, file: Path | str) -> "Results":
        """Read a file, of which the last line may have been cut off.

        Raises:
            ValueError: The file is not text, or another line is no record.
        """
        try:
            lines = Path(file).read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            raise ValueError(f"{file} is no results file: it is not text") from None
        records = []
        for i, line in enumerate(lines):
            try:
                record = json.loads(line)
                if not isinstance(record, dict) or "kind" not in record:
                    raise ValueError("no record")
                records.append(record)
            except ValueError:
                if i == len(lines) - 1 and i > 0:
                    break
                raise ValueError(f"{file}, line {i + 1} is no record of a results file") from None
        return cls(records, str(file))

    def rows(self, *operations: str, where: Callable[[dict], bool] = lambda r: True) -> Iterator[list[dict]]:
        """Return the records of each row in each mode and cache state, in the order in which they were measured."""
        groups = {}
        for record in self.times:
            if (not operations or record["op"] in operations) and where(record):
                groups.setdefault(key(record), []).append(record)
        return iter(groups.values())

    def _derive(self, record: dict) -> None:
        works = [Work(*work) for work in record["work"]]
        ceilings = self.ceilings.get(record["threads"])
        if ceilings is None or record["dtype"] not in ceilings.rates:
            return
        record["floor"] = ceilings.floor(works, record["dtype"], record["cache"] == "cold")
        if record["seconds"]:
            seconds = record["seconds"][1]
            record["roofline"] = record["floor"] / seconds
            record["flop/s"] = sum(w.flops for w in works) / seconds
            record["byte/s"] = sum(w.bytes for w in works) / seconds


def key(record: dict) -> tuple:
    """Return the values that two records must share to be compared."""
    return tuple(record[name] for name in ("op", "row", "dtype", "mode", "cache", "threads"))


def timed(row: list[dict], *roles: str) -> dict[str, dict]:
    """Return the providers of a row that have a time, of these roles (none: of all), by name."""
    return {r["provider"]: r for r in row if r["seconds"] and (not roles or r["role"] in roles)}


def ours(row: list[dict]) -> dict | None:
    """Return our default if it has a time; where it was left out, the first of our backends."""
    found = timed(row, OURS)
    if any(r["provider"] == "ours" for r in row):
        return found.get("ours")
    return next(iter(found.values()), None)


def best_other(row: list[dict]) -> dict | None:
    """Return the fastest of the others that compute the same."""
    return min(timed(row, SAME).values(), key=lambda r: r["seconds"][1], default=None)


def best_dense(row: list[dict]) -> dict | None:
    return min(timed(row, DENSE).values(), key=lambda r: r["seconds"][1], default=None)


def ratio(other: dict | None, mine: dict | None) -> float | None:
    """Return the time of the other over ours: above 1 ours is faster."""
    return other["seconds"][1] / mine["seconds"][1] if other and mine else None
