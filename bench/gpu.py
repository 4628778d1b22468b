"""GPU benchmark: python bench/gpu.py [--part build,test,...] [--seconds 540] [--size default] [--json FILE | --save]

Every benchmark of `python -m bench` in parts, and what has to be known before: the build, the tests marked gpu, the
ceilings of the device. Runs from the source tree on a machine with a CUDA device, torch >= 2.10, Triton >= 3.6, NumPy
and pytest; needs no network. Everything it finds is in a results file after every row, so a run that is cut off keeps
what it had; `python -m bench --compare` and `--plot` read these files.
"""

import argparse
import datetime
import gc
import importlib
import importlib.util
import itertools
import os
import random
import re
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import gpu_setup

ROOT = Path(__file__).resolve().parents[1]
LIMITS = {"seconds": 0.5, "rounds": 5}  # of each provider of a row in each mode; a sample is itself the median of many


@dataclass(frozen=True)
class Part:
    """share: of the seconds, relative to those of the parts after it. operations: of the registry. first: patterns of
    the rows that the project has targets for.
    """

    what: str
    share: float
    operations: tuple[str, ...] = ()
    first: tuple[str, ...] = ()
    default: bool = True


PARTS = {
    "build": Part("builds the compiled CPU part in place, or says why it does without", 2),
    "test": Part("pytest -m gpu", 10),
    "ceilings": Part("copy bandwidth, product rates and launch times of the device", 0.5),
    "layers": Part(
        "low-rank linear layers", 8, ("linear",),
        tuple(f"linear 8192 x 4096 -> 4096, r {r} bf16" for r in (64, 128, 256)),
    ),
    "conv": Part("low-rank convolutions", 3, ("conv",)),
    "svd": Part(
        "singular value decompositions of batches", 2.5, ("svd",),
        tuple(f"svd 64 x {r}x{r} fp32" for r in (64, 128, 33)),
    ),
    "qr": Part("thin QR of batches, orthonormal bases", 2.5, ("qr", "orthonormalize"), ("qr 64 x 4096x64 fp32",)),
    "polar": Part("polar decompositions of batches", 1.5, ("polar",)),
    "clip": Part(
        "spectra of batches of cores clipped", 2.5, ("clip", "clip wild"),
        ("clip 16 x 64x64 fp32", "clip 16 x 128x128 fp32"),
    ),
    "step": Part(
        "the optimizer step of whole networks", 2.5, ("step", "step still"),
        ("step VGG16 20% fp32", "step VGG16 50% fp32"),
    ),
    "train": Part("training and inference of whole networks", 5, ("train", "inference")),
    "scaling": Part("how cost grows with batch, rank, width and layers", 4, ("scaling",)),
    "tune": Part("every launch configuration of the kernels against the default", 4, default=False),
    "table": Part("the times the choice between paths is made from (--write)", 8, default=False),
}  # fmt: skip


class Run:
    """One run: device, options, time left, and the file every record goes to at once."""

    def __init__(self, device, options: argparse.Namespace, stop: float):
        from bench import cases, machine, records

        self.device, self.options, self.stop = device, options, stop
        self.operations = {operation.name: operation for operation in cases.OPERATIONS}
        self.file = options.json or default_file(options, device.slug)
        self.write = records.Writer(self.file)
        self.write(machine.header(device, sys.argv[1:]))
        self.lost = False  # the device, for this process
        self.left: dict[str, list[str]] = {}
        self.failed: list[str] = []
        self._ceilings = False

    def part(self, name: str, later: float) -> None:
        """Runs the part in its share of the time left; `later`: the shares of the parts after it."""
        part, left, start = PARTS[name], self.stop - time.monotonic(), time.monotonic()
        self.name, self.found = name, {}
        if left <= 0:
            self.leave(["all"])
        else:
            seconds = left * part.share / (part.share + later)
            self.until = start + seconds
            print(
                f"\n== {name}: {part.what}; {seconds:.0f} s" + "".join(f"; {why}" for why in self.failed[:3]),
                flush=True,
            )
            try:
                self.device.synchronize()  # raises where the device was lost
                {"test": test, "ceilings": ceilings, "tune": choices, "table": choices}.get(name, rows)(self)
            except Exception as error:  # the other parts may still tell something
                traceback.print_exc()
                self.fail(f"{name} raised {type(error).__name__}", error=line(error))
                try:
                    self.device.synchronize()
                except Exception:
                    self.lost = True
        self.write({"kind": "part", "part": name, "seconds": time.monotonic() - start} | self.found)

    def note(self, **entries) -> None:
        """For the record of the part."""
        self.found |= entries

    def fail(self, why: str, **entries) -> None:
        """The run goes on, but is not a success."""
        self.failed.append(why)
        self.note(**entries)

    def leave(self, rows: list) -> None:
        """For lack of time, or of a device."""
        if rows:
            self.left[self.name] = self.left.get(self.name, []) + [str(row) for row in rows]
            self.note(**{"left out": self.left[self.name]})

    def measure_ceilings(self) -> None:
        """Once in a run; if that fails, the parts after it do without."""
        from bench.machine import DTYPES

        if not self._ceilings:
            self._ceilings = True
            found = self.device.ceilings(DTYPES, quick=self.options.size == "smoke")
            self.write({"kind": "ceilings"} | found)
            print(*(f"{name} {found[name] * 1e6:.3g} us" for name in ("launch", "graph launch")), sep=", ")


def test(run: Run) -> None:
    found = gpu_setup.test(run.until - time.monotonic())
    run.note(**found)
    counts = found["counts"]
    if found["status"] is None:
        run.fail("tests: not finished in time")
    elif found["status"] != 0:
        run.fail(f"tests are red: {counts['failures']} failed, {counts['errors']} errors, status {found['status']}")
    elif counts["tests"] == counts["skipped"]:
        run.fail("tests: none ran")


def ceilings(run: Run) -> None:
    run.measure_ceilings()


def rows(run: Run) -> None:
    """Measures what the project has targets for first, the other rows shuffled, so that what is left out for lack of
    time is spread over all sizes.
    """
    from bench import runner

    part, options = PARTS[run.name], run.options
    limits = runner.Options(**LIMITS, compile=options.compile, extra=False)  # which would take minutes a row
    chosen = selected(run, part)
    if chosen:
        run.measure_ceilings()
    done = 0
    for i, row in enumerate(chosen):
        if sys.stderr.isatty():
            print(f"{run.name} {i + 1}/{len(chosen)} {row}\033[K", end="\r", file=sys.stderr, flush=True)
        try:
            left = runner.run([row], run.device, limits, run.write, run.until)
        except Exception as error:
            run.fail(f"{row}: {line(error)}", errors=[*run.found.get("errors", ()), f"{row}: {line(error)}"])
            try:
                run.device.synchronize()
            except Exception:  # it is lost, and with it the part
                run.leave(chosen[i + 1 :])
                raise
            continue
        run.leave(left)
        done += not left
    run.note(rows=done)
    print(f"{done} of {len(chosen)} rows")


def selected(run: Run, part: Part) -> list:
    from bench.registry import Selection

    found = []
    for name in part.operations:
        if name not in run.operations:
            run.fail(f"{run.name}: the registry has no operation {name!r}")
            continue
        operation = run.operations[name]
        wanted = tuple(run.options.dtypes)
        if not wanted or set(wanted) & set(operation.supported):
            found += Selection((name,), run.options.size, wanted).rows([operation], run.device)
    random.Random(0).shuffle(found)
    return sorted(found, key=lambda row: place(str(row), part.first))


def place(row: str, patterns: tuple[str, ...]) -> int:
    return next((i for i, pattern in enumerate(patterns) if fnmatch(row, pattern)), len(patterns))


def choices(run: Run) -> None:
    """Parts tune and table."""
    module, options = importlib.import_module("gpu_choices"), run.options
    file = {"file": module.MEASURED} if run.name == "table" and options.write else {}
    dtypes = options.dtypes or ["bf16", "fp32"]
    function = getattr(module, run.name)
    run.leave(function(run.device, dtypes, run.write, run.until, quick=options.size == "smoke", **file))


def again(options: argparse.Namespace, parts: list[str], seconds: float, file: Path) -> list[str]:
    """The parts that are left, in a new process: after an illegal access CUDA serves none of this one's calls. Why it
    was no success.
    """
    file = file.with_stem(f"{file.stem}-again")
    arguments = ["--part", ",".join(parts), "--seconds", f"{seconds:.0f}", "--size", options.size, "--json", str(file)]
    arguments += ["--compile", options.compile, *(["--write"] if options.write else [])]
    arguments += ["--dtypes", *options.dtypes] if options.dtypes else []
    status = subprocess.run([sys.executable, __file__, *arguments]).returncode
    return [f"{', '.join(parts)}: in a new process, {file}"] if status else []


def not_good(results) -> list[str]:
    """Rows in which ours is wrong, or users would get nothing."""
    found = []
    for record in results.times:
        reason = record.get("reason", "")
        wrong = record["provider"].startswith("ours") and reason.startswith("wrong")
        nothing = record["provider"] == "ours" and reason and "graph" not in record["mode"]
        if wrong or nothing:
            row = " ".join(record[key] for key in ("op", "row", "dtype", "mode", "provider"))
            found.append(f"{row}: {reason}")
    return found


def missing() -> str | None:
    """What this machine lacks, or None."""
    for package, title in (("torch", "PyTorch"), ("triton", "Triton"), ("numpy", "NumPy")):
        if importlib.util.find_spec(package) is None:
            return f"{title} is not installed for {sys.executable}"
    for package, least in (("torch", (2, 10)), ("triton", (3, 6))):
        version = importlib.import_module(package).__version__
        if tuple(map(int, re.findall(r"\d+", version)[:2])) < least:
            return f"{package} >= {least[0]}.{least[1]} is needed, got {version}"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1 is set: kernels would be interpreted, not measured"
    import torch

    if not torch.cuda.is_available():
        return f"no CUDA device (torch {torch.__version__}, built for CUDA {torch.version.cuda})"
    return None


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parts = "\n".join(f"  {name:<9} {p.what}{'' if p.default else ' (only if named)'}" for name, p in PARTS.items())
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=f"parts:\n{parts}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", metavar="A,B", help="which parts, comma-separated")
    parser.add_argument("--seconds", type=float, default=540, help="for everything; what does not fit is left out")
    parser.add_argument("--size", choices=("smoke", "default", "full"), default="default", help="how many shapes")
    parser.add_argument(
        "--dtypes", nargs="+", choices=("bf16", "fp16", "fp32", "tf32", "fp64"), default=[],
        help="arithmetic, for the operations that have it; default: each operation's own, bf16 and fp32 for layers",
    )  # fmt: skip
    parser.add_argument(
        "--compile", choices=("some", "all", "none"), default="some", help="shapes torch.compile is tried for"
    )
    parser.add_argument("--write", action="store_true", help="part table: into condlr_ext/ops/measured.json")
    parser.add_argument("--json", metavar="FILE", type=Path, help="the results file; default runs/gpu-...jsonl")
    parser.add_argument("--save", action="store_true", help="the same under bench/results/")
    options = parser.parse_args(arguments)
    options.part = options.part.split(",") if options.part else [name for name, p in PARTS.items() if p.default]
    unknown = set(options.part) - set(PARTS)
    if unknown:
        parser.error(f"--part: no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    options.part.sort(key=list(PARTS).index)
    return options


def default_file(options: argparse.Namespace, slug: str) -> Path:
    parts = "" if len(options.part) > 4 else "-" + "-".join(options.part)
    folder = ROOT / ("bench/results" if options.save else "runs")
    return folder / f"gpu-{datetime.date.today().isoformat()}-{slug}{parts}.jsonl"


def line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def main() -> int:
    sys.stdout.reconfigure(line_buffering=True)  # what is printed before a run is cut off is not lost
    options = parse()
    stop = time.monotonic() + options.seconds
    if reason := missing():
        sys.exit(f"bench/gpu.py: {reason}")
    # before the package is imported, so that what it built is loaded
    built = gpu_setup.build(min(60, options.seconds)) if "build" in options.part else None
    sys.path.insert(0, str(ROOT))
    import torch

    from bench import cuda, tables
    from bench.records import Results

    torch.manual_seed(0)
    run = Run(cuda.Cuda(), options, stop)
    if built:
        run.write({"kind": "part", "part": "build"} | built)
    gc.collect()
    gc.freeze()  # what was imported; every row collects what the last one left
    parts = [name for name in options.part if name != "build"]
    for name, later in zip(parts, itertools.count(1)):
        run.part(name, sum(PARTS[other].share for other in parts[later:]))
        if run.lost and parts[later:]:
            run.failed += again(options, parts[later:], stop - time.monotonic(), run.file)
            break
    results = Results.read(run.file)
    print("", *tables.show(results), sep="\n")
    for name, left in run.left.items():
        print(f"left out: {name}, {'all' if left == ['all'] else f'{len(left)} rows'}")
    for why in (bad := run.failed + not_good(results)):
        print(f"NOT GOOD: {why}")
    print(run.file)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
