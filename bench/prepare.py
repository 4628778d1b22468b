"""Before a run: the allocator; on a CUDA device versions, the build of the compiled part, the tests marked gpu.

Imports nothing of condlr_ext, so that a process loads what it has just built.
"""

import contextlib
import functools
import importlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LEAST = {"torch": (2, 10), "triton": (3, 6), "numpy": (0, 0)}  # versions
BUILD = 60  # seconds at most
GRACE = 20  # seconds for pytest to report after an interrupt
# glibc then keeps freed memory; handing it back to the kernel costs a page fault per page in the next iteration
TUNED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 34), "MALLOC_TOP_PAD_": str(1 << 28)}


def allocator() -> str:
    """Return "tuned" if this process's glibc keeps freed memory, else "default"."""
    return "tuned" if all(os.environ.get(name) == value for name, value in TUNED.items()) else "default"


def check() -> None:
    """Raise ValueError if this process cannot measure on a CUDA device."""
    for package, least in LEAST.items():
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"{package} is not installed for {sys.executable}")
        version = importlib.import_module(package).__version__
        if tuple(map(int, re.findall(r"\d+", version)[:2])) < least:
            raise ValueError(f"{package} >= {least[0]}.{least[1]} is needed, got {version}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError("TRITON_INTERPRET=1 is set: kernels would be interpreted, not measured")
    import torch

    if not torch.cuda.is_available():
        raise ValueError(
            f"--device cuda, but torch sees no CUDA device (torch {torch.__version__}, built for CUDA"
            f" {torch.version.cuda})"
        )


def build(seconds: float) -> dict:
    """Build the compiled part in place.

    Without it only the CPU paths are slower: all kernels of the GPU are Triton's.

    Returns:
        A record: "built", "reason", "seconds".
    """
    start, seconds = time.monotonic(), min(BUILD, seconds)
    if importlib.util.find_spec("setuptools") is None:
        status, output = 1, "setuptools is not installed"
    else:
        status, output = execute([sys.executable, "setup.py", "build_ext", "--inplace"], seconds)
    lines = [line for line in output.splitlines() if line.strip()]
    reason = None if status == 0 else f"over {seconds:.0f} s" if status is None else (lines or ["no output"])[-1]
    print("built _C" if status == 0 else f"without a new _C: {reason}", flush=True)
    return {"kind": "build", "built": status == 0, "reason": reason, "seconds": time.monotonic() - start}


def test(seconds: float, files: list[Path] | None = None) -> dict:
    """Run the tests marked gpu, by default of all files that have some: others may need what is not installed.

    Returns:
        A record: counts of "tests", "failures", "errors" and "skipped", names of "failed" tests, and the "status" of
        pytest, None if it was stopped after `seconds`.
    """
    if files is None:
        files = [f for f in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in f.read_text(encoding="utf-8")]
    start, counts, failed = time.monotonic(), dict.fromkeys(("tests", "failures", "errors", "skipped"), 0), []
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rfEs", "--tb=short", f"--junitxml={report}"]
        if importlib.util.find_spec("xdist"):  # most of the time goes to compilers
            command += ["-n", str(max(1, (os.cpu_count() or 1) - 2)), "--dist", "worksteal"]
        status, output = execute([*command, *map(str, files)], seconds - GRACE, grace=GRACE)
        if report.exists():
            for suite in ET.parse(report).iter("testsuite"):
                counts = {key: counts[key] + int(suite.get(key, 0)) for key in counts}
            for case in ET.parse(report).iter("testcase"):
                if any(case.find(kind) is not None for kind in ("failure", "error")):
                    failed.append(f"{case.get('classname')}::{case.get('name')}")
    print(output[-6000:], flush=True)
    return {"kind": "tests", "status": status, **counts, "seconds": time.monotonic() - start, "failed": failed}


def execute(command: list[str], seconds: float, grace: float = 0) -> tuple[int | None, str]:
    """Run a command in the checkout.

    Args:
        command: The command.
        seconds: After which it is killed with its children.
        grace: Seconds that it has left after an interrupt, before it is killed.

    Returns:
        The status, None if it was stopped, and the output.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    # what a shell starts in the background ignores interrupts, and so would its children
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, preexec_fn=heed, **pipes)
    try:
        output, _ = process.communicate(timeout=max(0, seconds))
        return process.returncode, output
    except subprocess.TimeoutExpired:
        if grace:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                return None, process.communicate(timeout=grace)[0]
        os.killpg(process.pid, signal.SIGKILL)
        return None, process.communicate()[0]
