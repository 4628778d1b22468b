"""The CPU as a benchmark device (clock, cold caches, ceilings), names of arithmetic, the header of a results file."""

import contextlib
import datetime
import gc
import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils import benchmark

from condlr_ext.info import collect

from .prepare import allocator
from .registry import TimedCall, Work

FORMAT = 2  # of results files

DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}  # fmt: skip


class Cpu:
    """The CPU with the present number of torch threads."""

    kind, device, default_cache = "cpu", torch.device("cpu"), "warm"

    def __init__(self):
        cpu = re.search(r"model name\s*:\s*(.*)", _read("/proc/cpuinfo"))
        self.name = cpu[1] if cpu else platform.processor() or platform.machine()
        sizes = {level: _cache_bytes(level) for level in (2, 3)}
        self.caches = [sizes[2] or 1 << 20, sizes[3] or 32 << 20]
        self.slug = slug(self.name)

    def describe(self) -> dict:
        data = collect()
        return {"device": self.name, "cores": os.cpu_count(), "isa": data["isa"], "allocator": allocator()} | {
            key: data[key] for key in ("build", "cpu_features")
        }

    def synchronize(self) -> None:
        pass

    def seconds(self, call: TimedCall, number: int, cold: bool) -> float:
        """Return the mean seconds of `number` runs, each with empty caches if `cold`."""
        if number > 1 and not call.prepare and not cold:
            timer = benchmark.Timer("run()", globals={"run": call.run}, num_threads=torch.get_num_threads())
            return timer.timeit(number).mean
        total, collecting = 0.0, gc.isenabled()
        gc.disable()  # as Timer does
        try:
            for _ in range(number):
                if call.prepare:
                    call.prepare()
                if cold:
                    self._evict()
                start = benchmark.timer()
                call.run()
                total += benchmark.timer() - start
        finally:
            if collecting:
                gc.enable()
        return total / number

    def memory(self, call: TimedCall) -> None:
        """Return None: the memory of a single call is unknown, so networks run in processes of their own."""

    def free(self) -> int:
        """Return the bytes of memory that a problem may take."""
        return int(0.6 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))

    def _evict(self) -> None:
        if not hasattr(self, "_cold"):
            self._cold = torch.ones(2 * self.caches[-1] // 4)
        self._cold.sum()  # read, not written: dirty lines would be written back at the expense of the call

    def ceilings(self, dtypes: Iterable[str], quick: bool = False) -> dict:
        """Measure the rates that this machine reaches, the best of a few runs.

        Returns:
            "copy": [[bytes, byte/s], ...] of copies, and of sums in place, which need not fetch what they overwrite,
            within each cache and beyond, read and written bytes; flop/s per arithmetic, of a matrix product, in float32
            also of a convolution; "threads".
        """

        def best(run: Callable, number: int = 1) -> float:
            return min(self.seconds(TimedCall(run, dict), number, cold=False) for _ in range(4))

        copies, beyond = [], 4 * self.caches[-1]
        for size in [cache // 2 for cache in self.caches] + [beyond // 4 if quick else beyond]:
            a, b = (torch.ones(size // 8) for _ in range(2))
            number = max(1, (1 << 26) // size)
            copied = size / best(lambda a=a, b=b: a.copy_(b), number)
            added = 1.5 * size / best(lambda a=a, b=b: a.add_(b), number)
            copies.append([size, max(copied, added)])
        found = {"copy": copies, "threads": torch.get_num_threads()}
        n, channels = (512, 64) if quick else (1024, 256)
        for name in dtypes:
            with arithmetic(name) as dtype, torch.no_grad():
                A, B, C = (torch.ones(n, n, dtype=dtype) for _ in range(3))
                found[name] = 2 * n**3 / best(lambda A=A, B=B, C=C: torch.mm(A, B, out=C))
                if name == "fp32":  # oneDNN's convolutions outrun MKL's products on some CPUs
                    x = torch.ones(32, channels, 16, 16).contiguous(memory_format=torch.channels_last)
                    W = torch.ones(channels, channels, 3, 3).contiguous(memory_format=torch.channels_last)
                    flops = 2 * 32 * 16 * 16 * channels**2 * 9
                    found[name] = max(found[name], flops / best(lambda x=x, W=W: F.conv2d(x, W, padding=1)))
        return found


class Ceilings:
    """The best of several measurements of a device's ceilings."""

    def __init__(self, measured: Iterable[dict]):
        self.rates, copies = {}, {}
        for found in measured:
            for size, rate in found["copy"]:
                copies[size] = max(rate, copies.get(size, 0))
            for name in DTYPES:
                if name in found:
                    self.rates[name] = max(found[name], self.rates.get(name, 0))
        self.copies = sorted(copies.items())

    def bandwidth(self, size: float, cold: bool) -> float:
        """Return the byte/s of the smallest cache that holds this many bytes, of memory if `cold`."""
        fitting = [rate for held, rate in self.copies if held >= size and not cold]
        return fitting[0] if fitting else self.copies[-1][1]

    def floor(self, works: Iterable[Work], dtype: str, cold: bool) -> float:
        """Return the least seconds of parts that follow each other, each bound by arithmetic or by memory."""
        works = list(works)
        bandwidth = self.bandwidth(sum(w.bytes for w in works), cold)
        return sum(max(w.flops / self.rates[dtype], w.bytes / bandwidth) for w in works)


@contextlib.contextmanager
def arithmetic(name: str):
    """Yield the torch.dtype of that name; inside, float32 products are IEEE unless the name is tf32."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    # not by the newer fp32_precision: torch.compile of torch 2.10 raises once that has been set
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = name == "tf32"
    try:
        yield DTYPES[name]
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def header(device, command: list[str]) -> dict:
    """Return the first record of a run."""
    return {
        "kind": "run",
        "format": FORMAT,
        "date": datetime.datetime.now().isoformat(timespec="seconds"),
        "commit": commit(),
        "command": command,
        "machine": device.describe(),
        "versions": {name: version for name, version in collect()["versions"].items() if version},
    }


def commit() -> str | None:
    """Return the commit of the checkout, or None without git."""
    describe = ["git", "describe", "--always", "--dirty"]
    root = Path(__file__).resolve().parents[1]
    try:
        return subprocess.run(describe, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def default_file(device) -> Path:
    return Path("runs") / f"bench-{datetime.date.today().isoformat()}-{device.slug}.jsonl"


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _read(file: str) -> str:
    try:
        return Path(file).read_text()
    except OSError:
        return ""


def _cache_bytes(level: int) -> int | None:
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        size = re.match(r"(\d+)K", _read(str(index / "size")))
        if _read(str(index / "level")).strip() == str(level) and size:
            return int(size[1]) << 10
    return None
