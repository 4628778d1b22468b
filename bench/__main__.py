"""The command line: `python -m bench`, from the root of a checkout."""

import argparse
import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

PROFILED = ("ours", "dense", "fast PyTorch")
REPEATED = ("backend", "only", "size", "dtypes", "device", "threads", "cache", "seconds", "seconds_per_provider",
            "rounds", "compile", "providers", "allocator")  # fmt: skip
TUNED = ("configurations", "routes")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(f"{message} (see {self.prog} --help)")


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0; 1 if something became slower, a test failed, a row raised or a result of ours is wrong; 2 for bad input;
        130 if interrupted.
    """
    start = time.monotonic()
    try:
        options = parse(argv)
        return dispatch(options, start)
    except (ValueError, OSError, ImportError, ArithmeticError) as error:
        print(f"bench: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bench: interrupted", file=sys.stderr)
        return 130


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m bench",
        description="Measure the package's operations against others, checked before they are timed.",
    )
    add = parser.add_argument
    add("operations", nargs="*", metavar="OPERATION", help="what to measure; default: all that --list does not mark")
    add("--backend", help="of ours, by default: auto, reference, cpu or triton")
    add("--only", default="", metavar="PATTERN", help="rows with this in their name (* and ? match), see --list")
    add("--size", choices=("smoke", "default", "full"), default="default", help="how many shapes; smoke: seconds")
    add("--dtypes", nargs="+", default=(), metavar="NAME", help="fp32, tf32, bf16, fp16, fp64; default by operation")
    add("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    add("--threads", type=int, nargs="+", metavar="N", help="of the CPU; default: 1 and 2")
    add("--cache", choices=("warm", "cold"), nargs="+", default=(), help="default: warm on CPUs, cold on GPUs")
    add("--seconds", type=float, help="for the whole run; rows that do not fit are left out, spread over all sizes")
    add("--seconds-per-provider", type=float, metavar="S", help="of a row, in each mode; default: 2, with --seconds "
        "0.5, smoke 0.1")  # fmt: skip
    add("--rounds", type=int, help="samples of each provider, at most; default: 11, with --seconds 5, smoke 3")
    add("--compile", choices=("some", "all", "none"), default="some", help="rows torch.compile is tried in")
    add("--providers", nargs="+", default=(), metavar="NAME", help="only these beside ours")
    add("--allocator", choices=("default", "tuned"), default="default", help="glibc's; tuned: keeps freed memory")
    add("--prepare", action=argparse.BooleanOptionalAction, help="build the compiled part and run the tests marked "
        "gpu first; default: with --seconds on a CUDA device")  # fmt: skip
    add("--json", metavar="FILE", help="results file; default: runs/bench-DATE-DEVICE.jsonl")
    add("--detail", action="store_true", help="print tables of all providers")
    instead = parser.add_argument_group("instead of measuring").add_mutually_exclusive_group()
    add = instead.add_argument
    add("--list", action="store_true", help="list operations and their rows")
    add("--table", metavar="FILE", help="print the tables of a results file")
    add("--markdown", nargs="+", metavar="FILE", help="rewrite the tables in Markdown files from results files")
    add("--compare", nargs=2, metavar=("A", "B"), help="list what became slower between two results files, or two git "
        "revisions (. is the working tree), which are measured; exit code 1 if something did")  # fmt: skip
    add("--plot", nargs="?", const="", metavar="FILE", help="draw a results file; without FILE: measure, then draw")
    add("--tune", nargs="?", const="", metavar="FILE", help="enter a results file's times of `routes` into your table, "
        "by which the package chooses from then on; without FILE: measure them first")  # fmt: skip
    add("--profile", action="store_true", help="break down the time of the rows")
    parser.add_argument("--origin", metavar="NAME", help="with --tune: enter the times into the table that the package "
        "ships, ops/measured.json, as contributed by NAME")  # fmt: skip
    options = parser.parse_args(argv)
    if options.tune == "":
        options.operations = options.operations or list(TUNED if on_cuda(options) else TUNED[-1:])
        options.size = "grid"
        options.seconds_per_provider = options.seconds_per_provider or 0.15
        options.rounds = options.rounds or 15
    return options


def dispatch(options: argparse.Namespace, start: float) -> int:
    if options.threads and min(options.threads) < 1:
        raise ValueError(f"--threads must be >= 1, got {min(options.threads)}")
    for name in ("seconds", "seconds_per_provider", "rounds"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name.replace('_', '-')} must be > 0, got {value:g}")
    if options.list:
        listing(options)
    elif options.table:
        show(Path(options.table), options.detail)
    elif options.markdown:
        markdown(list(map(Path, options.markdown)))
    elif options.compare:
        return comparison(options)
    elif options.plot:
        plot(Path(options.plot))
    elif options.tune:
        tune(Path(options.tune), options.origin)
    elif options.profile:
        profile(options)
    else:
        return measure(options, start)
    return 0


def measure(options: argparse.Namespace, start: float) -> int:
    """Measure the selected rows and print their tables; after a lost device a new process measures the rest.

    A CUDA run builds before it imports condlr_ext.
    """
    from . import prepare

    if options.allocator == "tuned" and prepare.allocator() != "tuned":  # glibc reads it at the start of a process
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | prepare.TUNED)
    cuda = on_cuda(options)
    if options.plot is not None:
        import matplotlib  # noqa: F401  # raises before an hour of measuring
    stop = start + (options.seconds or float("inf"))
    records = []
    if options.prepare if options.prepare is not None else cuda and options.seconds:
        records.append(prepare.build(stop - time.monotonic()))
        records.append(prepare.test(min(600, (stop - time.monotonic()) / 4)))
    from . import machine, runner, session
    from .records import Results, Writer

    device = open_device(options)
    rows = select(options, device)
    write = Writer(options.json or unused(machine.default_file(device)))
    for record in (machine.header(device, repeated(options)), *records):
        write(record)
    limited, smoke = options.seconds is not None, options.size == "smoke"
    how = runner.Options(
        options.seconds_per_provider or (0.1 if smoke else 0.5 if limited else 2.0),
        options.rounds or (3 if smoke else 5 if limited else 11),
        tuple(options.cache), options.compile, tuple(options.providers), extra=not limited,
    )  # fmt: skip
    code = 0
    try:
        with backend(options):
            left = session.Session(device, how, write, stop, quick=smoke).run(rows, thread_numbers(options, device))
        if left:
            code = continued(options, left, write.file, stop)
    except KeyboardInterrupt:
        print("bench: interrupted", file=sys.stderr)
        code = 130
    show(write.file, options.detail)
    results = Results.read(write.file)
    for name in set(options.providers) - {record["provider"] for record in results.times} - {"ours"}:
        print(f"bench: no row has a provider {name!r}", file=sys.stderr)
    defects = session.defects(results)
    print(*(f"NOT GOOD: {defect}" for defect in defects), sep="\n", end="\n" if defects else "")
    if options.plot is not None:
        plot(write.file)
    if options.tune is not None:
        tune(write.file, options.origin)
    print(f"\n{write.file}")
    return code or (1 if defects else 0)


def continued(options: argparse.Namespace, operations: list[str], file: Path, stop: float) -> int:
    """Measure these operations in a new process, since CUDA serves no call of this one after an illegal access."""
    left = max(1.0, stop - time.monotonic())
    changes = {"operations": operations, "seconds": round(left) if options.seconds else None}
    command = [sys.executable, "-m", "bench", *repeated(options, **changes), "--no-prepare"]
    root = str(Path(__file__).resolve().parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    return subprocess.run([*command, "--json", str(file.with_stem(f"{file.stem}-again"))], env=environment).returncode


def repeated(options: argparse.Namespace, **changes) -> list[str]:
    """Return the arguments of the same measurement with some changes."""
    values = vars(options) | changes
    given = list(values["operations"])
    for name in REPEATED:
        value = values[name]
        if value not in (None, "", (), []):
            found = value if isinstance(value, (list, tuple)) else [value]
            given += [f"--{name.replace('_', '-')}", *map(str, found)]
    return given


def on_cuda(options: argparse.Namespace) -> bool:
    """Return whether the run is on a CUDA device.

    Raises:
        ValueError: It is meant to be and cannot be.
    """
    import torch

    if options.device == "cpu" or (options.device is None and not torch.cuda.is_available()):
        if options.prepare:
            raise ValueError("--prepare is for CUDA devices")
        return False
    from . import prepare

    prepare.check()
    if options.threads:
        raise ValueError("--threads is for the CPU")
    return True


def backend(options: argparse.Namespace) -> contextlib.AbstractContextManager:
    import condlr_ext

    return condlr_ext.backend(options.backend) if options.backend else contextlib.nullcontext()


def open_device(options: argparse.Namespace):
    if on_cuda(options):
        from .cuda import Cuda

        return Cuda()
    from .machine import Cpu

    return Cpu()


def select(options: argparse.Namespace, device) -> list:
    from .cases import OPERATIONS
    from .machine import DTYPES
    from .registry import Selection

    for name in options.dtypes:
        if name not in DTYPES:
            raise ValueError(f"no arithmetic {name!r}; there are {', '.join(DTYPES)}")
    chosen = Selection(tuple(options.operations), options.size, tuple(options.dtypes), options.only)
    return chosen.rows(OPERATIONS, device)


def thread_numbers(options: argparse.Namespace, device) -> list[int]:
    import torch

    if device.kind != "cpu":
        return [torch.get_num_threads()]
    several = torch.get_num_threads() if options.tune is not None else min(2, os.cpu_count())
    return list(dict.fromkeys(options.threads or (1, several)))


def unused(file: Path) -> Path:
    """Return the file, numbered if it exists."""
    number, found = 2, file
    while found.exists():
        found, number = file.with_name(f"{file.stem}-{number}{file.suffix}"), number + 1
    return found


def listing(options: argparse.Namespace) -> None:
    from .cases import OPERATIONS

    device, groups = open_device(options), {}
    options.operations = options.operations or [operation.name for operation in OPERATIONS]
    for row in select(options, device):
        groups.setdefault(row.operation.name, []).append(row)
    for name, rows in groups.items():
        operation = rows[0].operation
        named = "" if operation.by_default else " (if named)"
        print(f"{name}{named}: {operation.what}; {', '.join(operation.modes)}; {len(rows)} rows")
        for row in rows:
            print(f"  {row}")


def show(file: Path, detail: bool) -> None:
    from . import tables
    from .records import Results

    print("\n".join(tables.show(Results.read(file), detail)))


def markdown(files: list[Path]) -> None:
    from .markdown import rewrite

    for file in files:
        text = file.read_text(encoding="utf-8")
        made = rewrite(text)
        if made != text:
            file.write_text(made, encoding="utf-8")
        print(f"{file}: {'rewritten' if made != text else 'as it was'}")


def plot(file: Path) -> None:
    from .plot import draw
    from .records import Results

    for drawn in draw(Results.read(file), file.with_suffix("")):
        print(drawn)


def tune(file: Path, origin: str | None) -> None:
    from . import tune
    from .records import Results

    table, count = tune.enter(Results.read(file), origin=origin)
    print(f"{table}: {count} rows of {file}")


def comparison(options: argparse.Namespace) -> int:
    from . import compare
    from .records import Results

    files = [Path(name) for name in options.compare]
    if all(file.is_file() for file in files):
        a, b = map(Results.read, files)
    elif any(file.is_file() for file in files):
        (other,) = (str(file) for file in files if not file.is_file())
        raise ValueError(f"--compare: {other} is no results file; compare two files or two revisions")
    else:
        from . import revisions

        folder = Path("runs") / f"compare-{time.strftime('%Y-%m-%d-%H%M%S')}"
        a, b = revisions.measure(tuple(options.compare), repeated(options), folder)
    found = compare.compare(a, b)
    print("\n".join(compare.show(found, a, b)))
    return 1 if found.regressions else 0


def profile(options: argparse.Namespace) -> None:
    import torch

    from .profiling import breakdown

    device = open_device(options)
    rows = select(options, device)
    for threads in thread_numbers(options, device):
        torch.set_num_threads(threads)
        for row in rows:
            torch.manual_seed(0)
            with backend(options):
                found = breakdown(row, tuple(options.providers) or PROFILED, device)
            print(f"\n{row}, {threads} thread{'s' * (threads != 1)}\n{found}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
