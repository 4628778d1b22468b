"""Parts build, test and ceilings of the GPU benchmark: what has to be known before anything is timed."""

import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def build(run) -> None:
    """Every kernel of the GPU is Triton's: without the compiled part only the CPU paths are slower."""
    if importlib.util.find_spec("setuptools") is None:
        run.note(built=False, reason="setuptools is not installed")
    else:
        seconds, start = min(60, run.until - time.monotonic()), time.monotonic()
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        status, output = execute(command, seconds)
        lines = [line for line in output.splitlines() if line.strip()]
        reason = None if status == 0 else f"over {seconds:.0f} s" if status is None else (lines or ["no output"])[-1]
        run.note(built=status == 0, reason=reason, seconds=time.monotonic() - start)
    print("built _C" if run.found["built"] else f"without a new _C: {run.found['reason']}")


def test(run, files: list[Path] | None = None) -> None:
    """The tests marked gpu, of the files that have some: other files may need what is not installed here."""
    if files is None:
        files = [f for f in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in f.read_text()]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rfEs", "--tb=short", f"--junitxml={report}"]
        status, output = execute([*command, *map(str, files)], run.until - time.monotonic())
        counts = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
        failures = []
        if report.exists():
            for suite in ET.parse(report).iter("testsuite"):
                counts = {key: counts[key] + int(suite.get(key, 0)) for key in counts}
            for case in ET.parse(report).iter("testcase"):
                if any(case.find(kind) is not None for kind in ("failure", "error")):
                    failures.append(f"{case.get('classname')}::{case.get('name')}")
    print(output[-6000:])
    run.note(counts=counts, failed=failures, status=status)
    if status is None:
        run.fail("tests: not finished in time")
    elif status != 0:
        run.fail(f"tests are red: {counts['failures']} failed, {counts['errors']} errors, status {status}")
    elif counts["tests"] == counts["skipped"]:
        run.fail("tests: none ran")


def ceilings(run) -> None:
    for name, value in run.ceilings.items():
        unit, scale = {"copy": ("GB/s", 1e-9)}.get(name, ("us", 1e6) if "launch" in name else ("TFLOP/s", 1e-12))
        print(f"{name:<13} {value * scale:>8.4g} {unit}")


def execute(command: list[str], seconds: float) -> tuple[int | None, str]:
    """Status, None where it had to be stopped, and what it printed."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes)
    try:
        output, _ = process.communicate(timeout=max(0, seconds))
        return process.returncode, output
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the compilers it started as well
        return None, process.communicate()[0]
