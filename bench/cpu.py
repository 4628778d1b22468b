"""CPU benchmark: python bench/cpu.py [--only PATTERN] [--threads 1 2] [--allocator tuned] [--json FILE]

Rows: core linear algebra, the optimiser step of whole networks, whole training iterations, and iterations each in a
process of its own (memory, page faults). The providers of a row are first compared with float64, and one that is wrong
gets no time; then they are timed in turn in this process. "x ours" is a provider's time over ours; "floor" the time of
the row's arithmetic and memory traffic at the rates that this machine reaches in a matrix product or convolution and in
a copy or axpy (the best of the run).
"""

import argparse
import datetime
import fnmatch
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from alone import alone
from iterations import IterationRows
from linear_algebra import linear_algebra_rows
from networks import NETWORKS
from profiling import breakdown
from steps import StepRows
from subjects import FRACTIONS
from targets import outcomes
from timing import Rates, interleave, machine_rates, median

from condlr_ext.info import collect

# glibc then keeps what is freed instead of handing it back to the kernel, which costs a page fault per page when the
# next iteration asks for it again
TUNED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 34), "MALLOC_TOP_PAD_": str(1 << 28)}
ALONE_ROWS = {f"alone VGG16 {fraction:.0%}": ("VGG16", fraction) for fraction in FRACTIONS}

# minutes each, of a block with more parameters than its dense twin, or of little news; measured if --only is the name
NOT_BY_DEFAULT = ("* MLP block 4096 50%", "step still MLP block *")


def main() -> None:
    options = parse()
    if options.allocator == "tuned" and allocator() != "tuned":
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | TUNED)  # read by glibc at the start
    torch.manual_seed(0)
    threads = options.threads or sorted({1, min(2, os.cpu_count())})
    if options.profile:
        profile_rows(options, threads)
        return
    records, rates = [], dict.fromkeys(threads, Rates(0, 0))
    for group in groups(options):
        wanted = selected(group.names, options.only)
        for n in threads if wanted else ():
            print(f"{', '.join(wanted)}; threads: {n}", file=sys.stderr, flush=True)
            torch.set_num_threads(n)
            rates[n] = rates[n].better(machine_rates(options.quick))  # other users of the machine come and go
            records += measure(group, wanted, options)
            rates[n] = rates[n].better(machine_rates(options.quick))
    add_floors(records, rates)
    if not options.quick:
        records += alone_records(selected(ALONE_ROWS, options.only))
    targets = outcomes(records)
    show(records)
    show_targets(targets)
    print(f"\nallocator {allocator()}")
    for n, r in rates.items():
        if r.flops == 0:  # no row needed it
            continue
        print(f"machine, {n} threads: {r.flops / 1e9:.0f} Gflop/s, {r.bytes / 1e9:.0f} GB/s")
    write(options.json, records, targets, rates)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="PATTERN", default="", help="rows whose name contains this (* and ? match)")
    parser.add_argument("--threads", type=int, nargs="+", help="numbers of torch threads to measure with")
    parser.add_argument("--allocator", choices=("default", "tuned"), default="default", help="glibc's, see README")
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each provider of a row")
    parser.add_argument("--rounds", type=int, default=11, help="samples of each provider, at most")
    parser.add_argument("--compile", action="store_true", help="also torch.compile of the dense and of our network")
    parser.add_argument("--profile", metavar="ROW", help="instead of timing, what the time of these rows is made of")
    parser.add_argument("--quick", action="store_true", help="few and small rows, few samples: a smoke test")
    parser.add_argument("--json", metavar="FILE", help="where the records go; default runs/cpu-DATE-ALLOCATOR.json")
    options = parser.parse_args()
    if options.quick:
        options.seconds, options.rounds = 0.1, 3
    return options


def allocator() -> str:
    return "tuned" if all(os.environ.get(name) == value for name, value in TUNED.items()) else "default"


def groups(options) -> list:
    networks = [net for net in NETWORKS if net.quick or not options.quick]
    return [
        *linear_algebra_rows(options.quick),
        *(StepRows(net) for net in networks),
        *(IterationRows(net, options.compile) for net in networks),
    ]


def selected(names, pattern: str) -> list[str]:
    hidden = {name for name in names if any(fnmatch.fnmatch(name, p) for p in NOT_BY_DEFAULT)}
    return [name for name in names if name == pattern or (name not in hidden and fnmatch.fnmatch(name, f"*{pattern}*"))]


def measure(group, wanted: list[str], options) -> list[dict]:
    """Records of the group's wanted rows with the present number of threads."""
    rows = group.rows(wanted)
    cases = list({id(case): case for row in rows.values() for case in row.values()}.values())
    errors = {id(case): case.error() for case in cases}
    right = [case for case in cases if errors[id(case)] <= case.limit]
    samples = interleave(right, options.seconds, options.rounds)
    times = {id(case): s for case, s in zip(right, samples, strict=True)}
    records = []
    for name, row in rows.items():
        mine = times.get(id(row["ours"]))
        for provider, case in row.items():
            its = times.get(id(case))
            seconds = median(its) if its else None
            records.append(
                {
                    "row": name,
                    "provider": provider,
                    "threads": torch.get_num_threads(),
                    "seconds": seconds,
                    "samples": its and len(its),
                    "ratio": seconds / median(mine) if its and mine else None,
                    "error": errors[id(case)],
                    "work": case.work,
                }
            )
    return records


def add_floors(records: list[dict], rates: dict[int, Rates]) -> None:
    for r in records:
        r["floor"] = rates[r["threads"]].floor(r.pop("work"))
        r["over_floor"] = r["seconds"] / r["floor"] if r["seconds"] else None


def alone_records(wanted: list[str]) -> list[dict]:
    records = []
    for name in wanted:
        network, fraction = ALONE_ROWS[name]
        print(f"{name}; threads: {torch.get_num_threads()}", file=sys.stderr, flush=True)
        measures = {provider: alone(network, provider, fraction) for provider in ("ours", "dense", "fast PyTorch")}
        for provider, found in measures.items():
            ratios = {
                "ratio": found["seconds"] / measures["ours"]["seconds"],
                "bytes_ratio": found["bytes"] / measures["ours"]["bytes"],
            }
            records.append({"row": name, "provider": provider, "threads": torch.get_num_threads()} | found | ratios)
    return records


def show(records: list[dict]) -> None:
    print(
        f"{'row':<27} {'threads':>7} {'provider':<15} {'time':>11} {'samples':>7} {'x ours':>7}"
        f" {'floor':>11} {'x floor':>8} {'error':>8}"
    )
    order = {name: i for i, name in enumerate(dict.fromkeys(r["row"] for r in records))}
    for r in sorted(records, key=lambda r: order[r["row"]]):
        start = f"{r['row']:<27} {r['threads']:>7} {r['provider']:<15}"
        time = duration(r["seconds"]) if r["seconds"] else "wrong"
        ratio = f"{r['ratio']:.2f}" if r["ratio"] else "-"
        if "bytes" in r:
            memory = f"{r['bytes'] / 2**20:.0f} MiB, {r['bytes_ratio']:.2f} x ours, {r['page_faults']:.0f} page faults"
            print(f"{start} {time:>11} {'':>7} {ratio:>7}  {memory}")
            continue
        over = f"{r['over_floor']:.2f}" if r["over_floor"] else "-"
        print(
            f"{start} {time:>11} {r['samples'] or 0:>7} {ratio:>7} {duration(r['floor']):>11} {over:>8}"
            f" {r['error']:>8.0e}"
        )


def duration(seconds: float) -> str:
    return f"{1e3 * seconds:.2f} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.1f} us"


def show_targets(targets: list[dict]) -> None:
    print("\ntargets")
    for t in targets:
        print(
            f"{t['row']:<27} {t['threads']:>7} {t['against']:<15} {t['ratio']:>7.2f} of {t['target']:<6g}"
            f" {'reached' if t['reached'] else 'not reached'}"
        )


def profile_rows(options, threads: list[int]) -> None:
    for group in groups(options):
        wanted = selected(group.names, options.profile)
        for n in threads if wanted else ():
            torch.set_num_threads(n)
            for name, row in group.rows(wanted).items():
                for provider in ("ours", "dense", "fast PyTorch"):
                    if provider in row:
                        print(f"\n{name}, {provider}, {n} threads: {breakdown(row[provider])}", flush=True)


def write(path: str | None, records: list[dict], targets: list[dict], rates: dict[int, Rates]) -> None:
    today = datetime.date.today().isoformat()
    file = Path(path or f"runs/cpu-{today}-{allocator()}.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    described = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    cpu = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    data = collect()
    record = {
        "date": today,
        "commit": described.stdout.strip(),
        "command": sys.argv[1:],
        "cpu": cpu and cpu[1],
        "allocator": allocator(),
        "machine": {key: data[key] for key in ("versions", "build", "isa", "cpu_features")},
        "rates": {n: {"flops": r.flops, "bytes": r.bytes} for n, r in rates.items()},
        "rows": records,
        "targets": targets,
    }
    file.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\n{file}")


if __name__ == "__main__":
    main()
