"""`make sanitize`: build the compiled part under clang's sanitizers, and run the tests that reach it.

address: AddressSanitizer and UndefinedBehaviorSanitizer. Scratch memory is guarded too (CONDLR_GUARD_SCRATCH).
thread: ThreadSanitizer. GCC's libgomp, with which torch comes, is invisible to it: every hand-over between threads looks
like a race. clang's libomp takes its place, and tells ThreadSanitizer of its barriers through Archer.

Each works on a copy of the sources in build/sanitize/, so that no compiled file of the checkout is touched. Exit status
1 after a report or a failed test.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = (
    "csrc",
    "condlr_ext",
    "tests",
    "setup.py",
    "build_backend.py",
    "CMakeLists.txt",
    "pyproject.toml",
    "README.md",
    "LICENSE",
)
ONCE = "not slow and not interpreter and not aot and not aot_all"
REPORTED = 66  # the exit status of a process with a report

KINDS = {
    "address": dict(
        flags="-fsanitize=address,undefined -fno-sanitize-recover=undefined -DCONDLR_GUARD_SCRATCH",
        runtime="asan",
        libraries=("libstdc++.so.6",),  # AddressSanitizer looks for its __cxa_throw when Python starts
        faults=("heap_overflow", "scratch_overflow", "scratch_after_release", "signed_overflow", "misaligned_load"),
        tests=(
            "tests/csrc",
            "tests/linalg",
            "tests/ops/test_registration.py",
            "tests/ops/test_step.py",
            "tests/optim/test_extreme_steps.py",
            "tests/optim/test_sgd.py",
            "tests/nn/test_linear.py",
        ),
        select=("-m", ONCE),
    ),
    "thread": dict(
        flags="-fsanitize=thread",
        runtime="tsan",
        libraries=("libomp.so",),
        faults=("data_race", "data_race_in_a_team"),
        tests=("tests/csrc/test_threads.py", "tests/linalg/test_linalg.py", "tests/ops"),
        select=("-m", ONCE, "-k", "thread"),
    ),
}


def find_clang() -> str:
    """Return the newest clang++ of PATH."""
    names = {
        p.name
        for d in os.get_exec_path()
        for p in Path(d).glob("clang++*")
        if re.fullmatch(r"clang\+\+(-\d+)?", p.name)
    }
    if not names:
        missing("clang++")
    return max(names, key=lambda name: int(name.partition("-")[2] or 0))


def missing(what: str):
    raise SystemExit(
        f"make sanitize: {what} not found. It needs clang, its sanitizers and its OpenMP, on Debian and Ubuntu\n"
        "    apt-get install clang-19 libclang-rt-19-dev libomp-19-dev\n"
        "(tried with 19; all must be of one version)."
    )


def library(clang: str, *names: str) -> str:
    """Return the path of the first of these libraries that comes with this clang."""
    for name in names:
        path = subprocess.run(
            [clang, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        if os.path.isabs(path):
            return path
    missing(f"{names[0]} of {clang}")


def copy_sources(tree: Path) -> None:
    """Copy what is built and tested; the times stay, so that a second build is incremental."""
    tree.mkdir(parents=True, exist_ok=True)
    for name in SOURCES:
        source, target = ROOT / name, tree / name
        if source.is_dir():
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy2(source, target)


def environment(kind: dict, clang: str, reports: Path) -> dict:
    """Return the environment in which Python runs under the sanitizer."""
    machine = os.uname().machine
    runtime = library(clang, f"libclang_rt.{kind['runtime']}-{machine}.so", f"libclang_rt.{kind['runtime']}.so")
    preload = [runtime, *(library(clang, name) for name in kind["libraries"])]
    options = f"exitcode={REPORTED}:log_path={reports / 'report'}:print_stacktrace=1"
    env = os.environ | {
        "LD_PRELOAD": " ".join(preload),
        "ASAN_OPTIONS": options + ":detect_leaks=0",  # Python frees little when it ends
        "UBSAN_OPTIONS": options,
        "TSAN_OPTIONS": options + ":ignore_noninstrumented_modules=1",  # as Archer asks: libomp itself, torch, Python
    }
    if kind["runtime"] == "tsan":
        env["OMP_TOOL_LIBRARIES"] = library(clang, "libarcher.so")
    return env


def check_faults(kind: dict, clang: str, tree: Path, env: dict, reports: Path) -> None:
    """See that each fault is reported, and that what is none is not."""
    source, built = tree / "tests/csrc/faults.cpp", tree / "build/faults.so"
    flags = [*kind["flags"].split(), "-std=c++17", "-O1", "-g", "-fPIC", "-shared", "-fopenmp", "-I", tree / "csrc"]
    subprocess.run([clang, *flags, source, tree / "csrc/workspace.cpp", "-o", built], check=True)
    for name in (*kind["faults"], "no_fault"):
        code = f"import ctypes; ctypes.CDLL({str(built)!r}).{name}()"
        status = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True).returncode
        found = list(reports.glob("report*"))
        if (status == REPORTED and found != []) != (name != "no_fault"):
            raise SystemExit(f"make sanitize: {name} in {source} ended with status {status} and reports {found}")
        print(f"{name}: {'reported' if found else 'not reported'}, as it should be", flush=True)
        for report in found:
            report.unlink()


def run(name: str, clang: str) -> bool:
    """Build, check the faults, run the tests; return whether all passed without a report."""
    kind, tree = KINDS[name], ROOT / "build/sanitize" / name
    reports = tree / "reports"
    print(f"==== {name}: {kind['flags']}, in {tree}", flush=True)
    copy_sources(tree)
    shutil.rmtree(reports, ignore_errors=True)
    reports.mkdir()
    env = environment(kind, clang, reports)
    build = os.environ | {"CXX": clang, "CONDLR_EXT_CXX_FLAGS": f"{kind['flags']} -g -fno-omit-frame-pointer -w"}
    subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=tree, env=build, check=True)
    check_faults(kind, clang, tree, env, reports)
    tests = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--durations=5", *kind["select"], *kind["tests"]]
    status = subprocess.run(tests, cwd=tree, env=env).returncode
    found = sorted(reports.glob("report*"))
    for report in found:
        print(report.read_text(errors="replace"))
    print(f"==== {name}: {len(found)} processes with reports, pytest ended with status {status}", flush=True)
    return status == 0 and found == []


def main() -> None:
    parser = argparse.ArgumentParser(prog="sanitize.py", description=__doc__.splitlines()[0])
    parser.add_argument("kind", nargs="?", choices=list(KINDS), help="default: both")
    kind = parser.parse_args().kind
    clang = find_clang()
    print(subprocess.run([clang, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0])
    sys.exit(not all([run(name, clang) for name in ([kind] if kind else KINDS)]))


if __name__ == "__main__":
    main()
