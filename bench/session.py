"""One run: operations in turn within a time limit, each record in the results file as soon as it is measured."""

import contextlib
import gc
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import runner
from .records import Results
from .registry import Row


@dataclass
class Session:
    """A run on a device.

    Attributes:
        device: machine.Cpu or cuda.Cuda.
        options: How rows are measured.
        write: Takes each record.
        stop: Value of time.monotonic() at which the run ends; infinite for a run without a limit.
        quick: Whether the ceilings are measured in brief.
    """

    device: object
    options: runner.Options
    write: Callable[[dict], object]
    stop: float = float("inf")
    quick: bool = False

    def run(self, rows: list[Row], threads: list[int]) -> list[str]:
        """Measure the rows with each number of threads, between two measurements of the ceilings.

        A run with a limit gives each operation its share of the time left, takes headlines first and the other rows
        in random order, so that the rows left out for lack of time are of all sizes, and measures the ceilings once.

        Returns:
            The operations after the one in which the device was lost.
        """
        operations: dict[str, list[Row]] = {}
        for row in rows:
            operations.setdefault(row.operation.name, []).append(row)
        self._count, self._total, self._start = 0, len(rows) * len(threads), time.monotonic()
        shares = len(threads) * sum(found[0].operation.share for found in operations.values())
        before = torch.get_num_threads()
        gc.collect()
        gc.freeze()  # imported objects; every row collects what the last one left
        try:
            for number in threads:
                torch.set_num_threads(number)
                limit_blas(number)
                self._ceilings(rows)
                for i, found in enumerate(operations.values()):
                    now, share = time.monotonic(), found[0].operation.share
                    if self._operation(found, now + (self.stop - now) * share / shares):
                        return list(operations)[i + 1 :]
                    shares -= share
                if not self._limited:  # once more: others may have used the machine before
                    self._ceilings(rows)
        finally:
            gc.unfreeze()
            torch.set_num_threads(before)
        return []

    @property
    def _limited(self) -> bool:
        return self.stop < float("inf")

    def _ceilings(self, rows: list[Row]) -> None:
        failed = {"kind": "failed", "op": "ceilings", "row": ""}
        dtypes = list(dict.fromkeys(row.dtype for row in rows))
        with contextlib.suppress(Exception):  # a lost device shows in the first row
            found = runner.attempt(
                self.device, lambda: self.device.ceilings(dtypes, quick=self.quick), failed, "reason"
            )
            if found:
                self.write({"kind": "ceilings"} | found | {"threads": torch.get_num_threads()})
        if "reason" in failed:
            self.write(failed)

    def _operation(self, rows: list[Row], until: float) -> bool:
        """Measure the rows of one operation and return whether the device was lost."""
        left, lost = list(rows), False
        if self._limited:
            random.Random(0).shuffle(left)
            left.sort(key=lambda row: not row.operation.headline(row.shape))
        while left and not lost and time.monotonic() < until:
            row = left.pop(0)
            self._count += 1
            n = torch.get_num_threads()
            where = f", {n} thread{'s' * (n != 1)}" if self.device.kind == "cpu" else ""
            passed = f"{time.monotonic() - self._start:.0f} s"
            print(f"[{self._count}/{self._total}, {passed}] {row}{where}", file=sys.stderr, flush=True)
            try:
                torch.manual_seed(0)  # the same inputs whatever else is measured
                for record in runner.measure(row, self.device, self.options):
                    self.write(record)
            except Exception as error:
                record = {"kind": "failed", "op": row.operation.name, "row": str(row.shape), "dtype": row.dtype}
                self.write(record | {"reason": runner.one_line(error)})
                try:
                    self.device.synchronize()
                except Exception:
                    lost = True
        self._count += len(left)
        if left:
            record = {"kind": "left out", "op": rows[0].operation.name, "count": len(left), "of": len(rows)}
            reason = "the device failed" if lost else "--seconds were over"
            self.write(record | {"reason": reason, "rows": list(map(str, left))})
        return lost


def limit_blas(threads: int) -> None:
    """Limit NumPy and SciPy, which do not follow torch's number of threads, if threadpoolctl is installed."""
    with contextlib.suppress(ImportError):
        import threadpoolctl

        threadpoolctl.threadpool_limits(threads, user_api="blas")


def defects(results: Results) -> list[str]:
    """Return why a run was no success: red tests, failed rows, rows in which ours is wrong or has no time.

    A scaling row beyond memory is no defect, nor is a call of ours that no CUDA graph can capture.
    """
    found = []
    for record in results.others.get("tests", ()):
        if record["status"] is None:
            found.append("tests: not finished in time")
        elif record["status"] != 0:
            counts = f"{record['failures']} failed, {record['errors']} errors"
            found.append(f"tests are red: {counts}, status {record['status']}")
        elif record["tests"] == record["skipped"]:
            found.append("tests: none ran")
    found += [f"{r['op']} {r['row']}: {r['reason']}" for r in results.others.get("failed", ())]
    for record in results.times:
        reason = record.get("reason", "")
        wrong = record["provider"].startswith("ours") and reason.startswith("wrong")
        missing = record["provider"] == "ours" and reason and "graph" not in record["mode"]
        if (wrong or missing) and not (record["op"] == "scaling" and reason.startswith("MemoryError")):
            row = " ".join(record[name] for name in ("op", "row", "dtype", "mode", "provider"))
            found.append(f"{row}: {reason}")
    return found
