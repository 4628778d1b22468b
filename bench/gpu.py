"""GPU benchmark: python bench/gpu.py [--part build,test,...] [--seconds 540] [--quick] [--json FILE | --save]

Runs from the source tree on a machine with a CUDA device, torch >= 2.10, Triton >= 3.6, NumPy and pytest; needs no
network. Everything it finds is in the JSON file after every row, so a run that is cut off keeps what it had.
"""

import argparse
import datetime
import functools
import gc
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Part:
    """`module`.`name of the part`(run); imported when its turn comes, so that what `build` built is loaded."""

    module: str
    what: str
    share: float  # of the seconds, relative to those of the parts after it
    default: bool = True


PARTS = {
    "build": Part("gpu_setup", "builds the compiled CPU part in place, or says why it does without", 2),
    "test": Part("gpu_setup", "pytest -m gpu", 10),
    "ceilings": Part("gpu_setup", "copy bandwidth, product rates and launch times of the device", 0.5),
    "layers": Part("gpu_layers", "low-rank linear layers by all providers", 8),
    "conv": Part("gpu_layers", "low-rank convolutions of VGG16 and ResNet-50", 3),
    "svd": Part("gpu_linalg", "singular value decompositions of batches", 2.5),
    "qr": Part("gpu_linalg", "QR of batches of square and of tall matrices", 2.5),
    "polar": Part("gpu_linalg", "polar decompositions of batches", 1.5),
    "clip": Part("gpu_linalg", "spectra of batches of cores clipped", 2.5),
    "step": Part("gpu_step", "the optimiser step of whole networks", 2.5),
    "tune": Part("gpu_choices", "every launch configuration of the kernels against the default", 4, default=False),
    "table": Part("gpu_choices", "the times the choice between paths is made from (--write)", 8, default=False),
}


class Run:
    """One run: device, options, time left, and the record that is written after every addition."""

    def __init__(self, device, options: argparse.Namespace, file: Path):
        self.device, self.options, self.file = device, options, file
        self.record = {
            "format": 1,
            "date": datetime.datetime.now().isoformat(timespec="seconds"),
            "commit": commit(),
            "command": sys.argv[1:],
            "machine": device.describe(),
            "left out": {},
            "parts": {},
        }
        self.stop = time.monotonic() + options.seconds
        self.failed = []

    def part(self, name: str, later: float) -> None:
        """Runs the part in its share of the time left; `later`: the shares of the parts after it."""
        part, left = PARTS[name], self.stop - time.monotonic()
        if left <= 0:
            self.record["left out"][name] = "all"
            self.write()
            return
        seconds = left * part.share / (part.share + later)
        print(f"\n== {name}: {part.what}; {seconds:.0f} s" + "".join(f"; {why}" for why in self.failed), flush=True)
        self.name, self.until = name, time.monotonic() + seconds
        self.record["parts"][name] = self.found = {}
        try:
            function = getattr(importlib.import_module(part.module), name)
            gc.freeze()  # torch.cuda.graph collects garbage at every capture: not among all that was imported
            function(self)
        except Exception as error:  # the other parts may still tell something
            traceback.print_exc()
            self.fail(f"{name} raised {type(error).__name__}", error=f"{type(error).__name__}: {error}")

    def fail(self, why: str, **entries) -> None:
        """The run goes on, but is not a success."""
        self.failed.append(why)
        self.note(**entries)

    def note(self, **entries) -> None:
        self.found.update(entries)
        self.write()

    def add(self, row: dict) -> dict:
        self.found.setdefault("rows", []).append(row)
        self.write()
        return row

    def within(self, items: list):
        """The items until the part's time is over; the others are left out, and the record says which."""
        for i, item in enumerate(items):
            if time.monotonic() > self.until:
                self.record["left out"][self.name] = [" ".join(map(str, x)) for x in items[i:]]
                self.write()
                return
            if sys.stderr.isatty():
                print(f"{self.name} {i + 1}/{len(items)}", end="\r", file=sys.stderr, flush=True)
            yield item

    @functools.cached_property
    def ceilings(self) -> dict[str, float]:
        self.record["ceilings"] = importlib.import_module("gpu_device").ceilings(self.device)
        self.write()
        return self.record["ceilings"]

    def write(self, indent: int | None = None) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.file.with_suffix(".partial")
        partial.write_text(json.dumps(self.record, indent=indent) + "\n")
        partial.replace(self.file)


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


def commit() -> str | None:
    describe = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(describe, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # a copy without history
        return None


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parts = "\n".join(f"  {name:<9} {p.what}{'' if p.default else ' (only if named)'}" for name, p in PARTS.items())
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=f"parts:\n{parts}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", metavar="A,B", help="which parts, comma-separated")
    parser.add_argument("--seconds", type=float, default=540, help="for everything; what does not fit is left out")
    parser.add_argument("--dtypes", nargs="+", choices=("bf16", "fp32", "tf32"), default=["bf16", "fp32"])
    parser.add_argument("--full", action="store_true", help="torch.compile for every shape, not only a few")
    parser.add_argument("--quick", action="store_true", help="few rows of every part")
    parser.add_argument("--write", action="store_true", help="part table: into condlr_ext/ops/measured.json")
    parser.add_argument("--json", metavar="FILE", type=Path, help="where the record goes; default runs/gpu-...json")
    parser.add_argument("--save", action="store_true", help="the same under bench/results/")
    options = parser.parse_args(arguments)
    options.part = options.part.split(",") if options.part else [name for name, p in PARTS.items() if p.default]
    unknown = set(options.part) - set(PARTS)
    if unknown:
        parser.error(f"--part: no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    options.part.sort(key=list(PARTS).index)
    return options


def default_file(options: argparse.Namespace, device: str) -> Path:
    parts = "" if len(options.part) > 4 else "-" + "-".join(options.part)
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    folder = ROOT / ("bench/results" if options.save else "runs")
    return folder / f"gpu-{datetime.date.today().isoformat()}-{slug}{parts}.json"


def main() -> int:
    options = parse()
    if reason := missing():
        sys.exit(f"bench/gpu.py: {reason}")
    sys.path.insert(0, str(ROOT))
    import torch
    from gpu_device import Cuda

    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True  # what we are compared with at its best
    device = Cuda()
    run = Run(device, options, options.json or default_file(options, device.name))
    print(
        *(f"{key} {value}" for key, value in run.record["machine"].items()), f"commit {run.record['commit']}", sep=", "
    )
    for i, name in enumerate(options.part):
        run.part(name, sum(PARTS[later].share for later in options.part[i + 1 :]))
    run.write(indent=1)
    for name, items in run.record["left out"].items():
        print(f"left out for lack of time: {name}, {items if items == 'all' else f'{len(items)} rows'}")
    for why in run.failed:
        print(f"NOT GOOD: {why}")
    print(run.file)
    return 1 if run.failed else 0


if __name__ == "__main__":
    sys.exit(main())
