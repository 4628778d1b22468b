"""Runs cases in processes of their own and watches them, so that a crash or a hang is a fault with a number too."""

import multiprocessing
import os
import resource
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import wait

import torch

from .case import Case

LONGEST = 120.0  # seconds without a word from a case: it hangs
MEMORY = 2**30  # bytes that a case may allocate, whatever it is given

_fork = multiprocessing.get_context("fork")  # what is imported is there at once


@dataclass
class Totals:
    """What the cases of one kind came to.

    Attributes:
        cases: How many ran.
        counts: What they tried.
        worst: Largest share of its limit that each check has taken.
    """

    cases: int = 0
    counts: Counter = field(default_factory=Counter)
    worst: dict[str, float] = field(default_factory=dict)

    def add(self, counts: Counter, worst: dict[str, float]) -> None:
        self.cases += 1
        self.counts.update(counts)
        for what, share in worst.items():
            self.worst[what] = max(share, self.worst.get(what, 0.0))


class Worker:
    """A process that runs the cases first, first + 1, ... of one kind, until it is stopped."""

    def __init__(self, kind: str, run: Callable[[Case], None], seed: int, first: int):
        self.kind, self.ended = kind, False
        self._number, self._heard = first, time.monotonic()
        self.connection, theirs = _fork.Pipe(duplex=False)
        self._process = _fork.Process(target=_work, args=(kind, run, seed, first, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def result(self) -> tuple[int, Counter, dict, list[str]] | None:
        """Return number, counts, worst and faults of the case that has ended, if one has.

        The end of the process, and a silence of LONGEST seconds, are faults of the case that ran; `ended` is set.
        """
        if self.connection.poll():
            try:
                found = self.connection.recv()
            except (EOFError, OSError):
                self._process.join(5)
                code = self._process.exitcode
                return self._fault(f"the process ended with {signal.Signals(-code).name if (code or 0) < 0 else code}")
            self._number, self._heard = found[0] + 1, time.monotonic()
            return found
        if time.monotonic() - self._heard > LONGEST:
            return self._fault(f"did not end within {LONGEST:.0f} s")
        return None

    def stop(self) -> None:
        self._process.kill()
        self._process.join()
        self.connection.close()

    def _fault(self, text: str) -> tuple[int, Counter, dict, list[str]]:
        self.ended = True
        self.stop()
        return self._number, Counter(), {}, [text]


def _work(kind: str, run: Callable[[Case], None], seed: int, first: int, connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops this process
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if sys.platform == "linux":
        with open("/proc/self/statm") as file:
            limit = int(file.read().split()[0]) * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    number = first
    while True:
        case = run_case(kind, run, seed, number)
        try:
            connection.send((number, case.counts, case.worst, case.faults))
        except OSError:
            os._exit(0)
        number += 1


def run_case(kind: str, run: Callable[[Case], None], seed: int, number: int) -> Case:
    """Run one case; an exception is a fault."""
    case = Case(kind, seed, number)
    try:
        run(case)
    except BaseException as error:
        trace = traceback.extract_tb(error.__traceback__)[-1]
        text = " ".join(str(error).split())[:500]
        case.faults.append(f"raised {type(error).__name__}: {text} ({trace.filename}:{trace.lineno})")
    return case


def run_for(seconds: float, kinds: dict[str, Callable[[Case], None]], seed: int, first: int = 0) -> Iterator[tuple]:
    """Run cases of all kinds at once; yield (kind, its totals so far, number, faults) of each case that has ended.

    After a case that ended its process, or hung, the next ones run in a new process.
    """
    totals = {kind: Totals() for kind in kinds}
    workers = [Worker(kind, run, seed, first) for kind, run in kinds.items()]
    end = time.monotonic() + seconds
    try:
        while (left := end - time.monotonic()) > 0:
            wait([worker.connection for worker in workers], timeout=min(left, 1.0))
            for i, worker in enumerate(workers):
                if (result := worker.result()) is None:
                    continue
                number, counts, worst, faults = result
                if worker.ended:
                    workers[i] = Worker(worker.kind, kinds[worker.kind], seed, number + 1)
                totals[worker.kind].add(counts, worst)
                yield worker.kind, totals[worker.kind], number, faults
    finally:
        for worker in workers:
            worker.stop()
