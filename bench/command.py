"""What `python -m bench` does; the ops and what measures them load only when asked for."""

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from condlr_ext._extras import require

PROFILED = ("ours", "dense", "fast PyTorch")
TEXT = "measure the package's operations against others, checked before they are timed"


def arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("operations", nargs="*", metavar="OPERATION", help="what to measure; default all (--list)")
    add("--only", default="", metavar="PATTERN", help="rows with this in their name (* and ? match), see --list")
    add("--size", choices=("smoke", "default", "full"), default="default", help="how many shapes; smoke: seconds")
    add("--dtypes", nargs="+", default=(), metavar="NAME", help="fp32, tf32, bf16, fp16, fp64; default by operation")
    add("--device", choices=("cpu", "cuda"), help="default cuda where there is one")
    add("--threads", dest="thread_numbers", type=int, nargs="+", metavar="N", help="of the CPU; default 1 and 2")
    add("--cache", choices=("warm", "cold"), nargs="+", default=(), help="default warm on CPUs, cold on GPUs")
    add("--seconds", type=float, help="for each provider of a row; default 2, smoke 0.1")
    add("--rounds", type=int, help="samples of each provider, at most; default 11, smoke 3")
    add("--compile", choices=("some", "all", "none"), default="some", help="rows torch.compile is tried in")
    add("--providers", nargs="+", default=(), metavar="NAME", help="only these beside ours")
    add("--allocator", choices=("default", "tuned"), default="default", help="glibc's; tuned: keeps freed memory")
    add("--json", metavar="FILE", help="where the records go; default runs/bench-DATE-DEVICE.jsonl")
    add("--detail", action="store_true", help="tables of all providers")
    instead = parser.add_argument_group("instead of measuring").add_mutually_exclusive_group()
    add = instead.add_argument
    add("--list", action="store_true", help="show operations and their rows")
    add("--table", metavar="FILE", help="print the tables of a results file")
    add("--markdown", metavar="FILE", help="make the tables of a Markdown file anew from the results files it names")
    add("--compare", nargs=2, metavar=("A", "B"), help="what became slower, of two results files, or of two git "
        "revisions (. is the working tree), which are measured; exit code 1 if something did")  # fmt: skip
    add("--plot", nargs="?", const="", metavar="FILE", help="draw a results file; without FILE: measure, then draw")
    add("--profile", action="store_true", help="show what the time of the rows is made of")


def run(options: argparse.Namespace) -> int:
    """Exit code: 0; 1 when --compare found a regression; 130 when interrupted, after the tables of what there is.
    Bad input raises ValueError or OSError.
    """
    check(options)
    if options.list:
        listing(options)
    elif options.table:
        show(options.table, options.detail)
    elif options.markdown:
        markdown(Path(options.markdown))
    elif options.compare:
        return comparison(options)
    elif options.plot:
        plots(Path(options.plot))
    elif options.profile:
        profiles(options)
    else:
        return measured(options)
    return 0


def check(options: argparse.Namespace) -> None:
    if options.thread_numbers and min(options.thread_numbers) < 1:
        raise ValueError(f"bench: --threads must be >= 1, got {min(options.thread_numbers)}")
    for name in ("seconds", "rounds"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise ValueError(f"bench: --{name} must be > 0, got {value:g}")
    if options.plot is not None:
        require("matplotlib", "python -m bench --plot", "bench")


def device(options: argparse.Namespace):
    import torch

    kind = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cpu":
        from .machine import Cpu

        return Cpu()
    if not torch.cuda.is_available():
        raise ValueError("bench: --device cuda, but torch sees no CUDA device")
    if options.thread_numbers:
        raise ValueError("bench: --threads is for the CPU")
    from .cuda import Cuda

    return Cuda()


def selection(options: argparse.Namespace, on) -> list:
    from .cases import OPERATIONS
    from .machine import DTYPES
    from .registry import Selection

    for name in options.dtypes:
        if name not in DTYPES:
            raise ValueError(f"bench: no arithmetic {name!r}; there are {', '.join(DTYPES)}")
    chosen = Selection(tuple(options.operations), options.size, tuple(options.dtypes), options.only)
    return chosen.rows(OPERATIONS, on)


def listing(options: argparse.Namespace) -> None:
    groups = {}
    for row in selection(options, device(options)):
        groups.setdefault(row.operation.name, []).append(row)
    for name, rows in groups.items():
        print(f"{name}: {rows[0].operation.what}; {', '.join(rows[0].operation.modes)}; {len(rows)} rows")
        for row in rows:
            print(f"  {row}")


def measured(options: argparse.Namespace) -> int:
    from . import machine
    from .records import Writer

    if options.allocator == "tuned" and machine.allocator() != "tuned":  # read by glibc at the start of a process
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | machine.TUNED)
    on = device(options)
    rows = selection(options, on)
    write = Writer(options.json or unused(machine.default_file(on)))
    code, seen = 0, {"ours"}
    try:
        for record in records(rows, on, options):
            seen.add(write(record).get("provider"))
    except KeyboardInterrupt:
        print("bench: interrupted", file=sys.stderr)
        code = 130
    show(write.file, options.detail)
    for name in options.providers:
        if name not in seen:
            print(f"bench: no row has a provider {name!r}", file=sys.stderr)
    if options.plot is not None:
        plots(write.file)
    print(f"\n{write.file}")
    return code


def records(rows: list, on, options: argparse.Namespace) -> Iterator[dict]:
    """All records of a run, with a line on stderr before each row."""
    import torch

    from . import machine, runner

    smoke = options.size == "smoke"
    how = runner.Options(
        options.seconds or (0.1 if smoke else 2.0), options.rounds or (3 if smoke else 11),
        tuple(options.cache), options.compile, tuple(options.providers),
    )  # fmt: skip
    yield machine.header(on, again(options))
    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    before, start, done = torch.get_num_threads(), time.monotonic(), 0
    numbers = thread_numbers(options, on)
    try:
        for threads in numbers:
            torch.set_num_threads(threads)
            limit_blas(threads)
            yield {"kind": "ceilings"} | on.ceilings(dtypes, quick=smoke) | {"threads": threads}
            for row in rows:
                done += 1
                passed = time.monotonic() - start
                where = f", {threads} thread{'s' * (threads != 1)}" if on.kind == "cpu" else ""
                print(f"[{done}/{len(rows) * len(numbers)}, {passed:.0f} s] {row}{where}", file=sys.stderr, flush=True)
                torch.manual_seed(0)  # the same inputs whatever else is measured
                yield from runner.measure(row, on, how)
            # once more: others may have used the machine before
            yield {"kind": "ceilings"} | on.ceilings(dtypes, quick=smoke) | {"threads": threads}
    finally:
        torch.set_num_threads(before)


def limit_blas(threads: int) -> None:
    """Of NumPy and SciPy, where threadpoolctl is there to do it: they do not follow torch's number of threads."""
    with contextlib.suppress(ImportError):
        import threadpoolctl

        threadpoolctl.threadpool_limits(threads, user_api="blas")


def thread_numbers(options: argparse.Namespace, on) -> list[int]:
    import torch

    if on.kind != "cpu":
        return [torch.get_num_threads()]
    return list(dict.fromkeys(options.thread_numbers or (1, min(2, os.cpu_count()))))


def unused(file: Path) -> Path:
    """The file, numbered where it exists."""
    number, found = 2, file
    while found.exists():
        found, number = file.with_name(f"{file.stem}-{number}{file.suffix}"), number + 1
    return found


def show(file: Path | str, detail: bool) -> None:
    from . import tables
    from .records import Results

    print("\n".join(tables.show(Results.read(file), detail)))


def markdown(file: Path) -> None:
    from .tables import rewrite

    text = file.read_text()
    made = rewrite(text, file.parent)
    if made != text:
        file.write_text(made)
    print(f"{file}: {'rewritten' if made != text else 'as it was'}")


def plots(file: Path) -> None:
    from .plot import draw
    from .records import Results

    for drawn in draw(Results.read(file), file.with_suffix("")):
        print(drawn)


def comparison(options: argparse.Namespace) -> int:
    from . import compare
    from .records import Results

    files = [Path(name) for name in options.compare]
    if all(file.is_file() for file in files):
        a, b = map(Results.read, files)
    elif any(file.is_file() for file in files):
        (other,) = (str(file) for file in files if not file.is_file())
        raise ValueError(f"python -m bench --compare: {other} is no results file; compare two files or two revisions")
    else:
        from . import revisions

        folder = Path("runs") / f"compare-{time.strftime('%Y-%m-%d-%H%M%S')}"
        a, b = revisions.measure(tuple(options.compare), again(options), folder)
    found = compare.compare(a, b)
    print("\n".join(compare.show(found, a, b)))
    return 1 if found.regressions else 0


def again(options: argparse.Namespace) -> list[str]:
    """The arguments that measure the same."""
    given = list(options.operations)
    names = {"thread_numbers": "threads"}
    for name in ("only", "size", "dtypes", "device", "thread_numbers", "cache", "seconds", "rounds", "compile",
                 "providers", "allocator"):  # fmt: skip
        value = getattr(options, name)
        if value not in (None, "", (), []):
            values = value if isinstance(value, (list, tuple)) else [value]
            given += [f"--{names.get(name, name)}", *map(str, values)]
    return given


def profiles(options: argparse.Namespace) -> None:
    import torch

    from .profiling import breakdown

    on = device(options)
    rows = selection(options, on)
    for threads in thread_numbers(options, on):
        torch.set_num_threads(threads)
        for row in rows:
            torch.manual_seed(0)
            found = breakdown(row=row, names=tuple(options.providers) or PROFILED, device=on)
            print(f"\n{row}, {threads} thread{'s' * (threads != 1)}\n{found}", flush=True)
