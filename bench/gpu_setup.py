"""Parts build and test of the GPU benchmark: what has to be known before anything is timed."""

import contextlib
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
GRACE = 20  # seconds pytest gets to say what it has found


def build(seconds: float) -> dict:
    """Every kernel of the GPU is Triton's: without the compiled part only the CPU paths are slower."""
    if importlib.util.find_spec("setuptools") is None:
        found = {"built": False, "reason": "setuptools is not installed"}
    else:
        start = time.monotonic()
        status, output = execute([sys.executable, "setup.py", "build_ext", "--inplace"], seconds)
        lines = [line for line in output.splitlines() if line.strip()]
        reason = None if status == 0 else f"over {seconds:.0f} s" if status is None else (lines or ["no output"])[-1]
        found = {"built": status == 0, "reason": reason, "seconds": time.monotonic() - start}
    print("built _C" if found["built"] else f"without a new _C: {found['reason']}")
    return found


def test(seconds: float, files: list[Path] | None = None) -> dict:
    """The tests marked gpu, of the files that have some: other files may need what is not installed here. {"counts",
    "failed": names, "status": None where they had to be stopped}.
    """
    if files is None:
        files = [f for f in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in f.read_text()]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rfEs", "--tb=short", f"--junitxml={report}"]
        if importlib.util.find_spec("xdist"):  # most of the time goes to compilers
            command += ["-n", str(max(1, (os.cpu_count() or 1) - 2)), "--dist", "worksteal"]
        status, output = execute([*command, *map(str, files)], seconds - GRACE, grace=GRACE)
        counts = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
        failures = []
        if report.exists():
            for suite in ET.parse(report).iter("testsuite"):
                counts = {key: counts[key] + int(suite.get(key, 0)) for key in counts}
            for case in ET.parse(report).iter("testcase"):
                if any(case.find(kind) is not None for kind in ("failure", "error")):
                    failures.append(f"{case.get('classname')}::{case.get('name')}")
    print(output[-6000:])
    return {"counts": counts, "failed": failures, "status": status}


def execute(command: list[str], seconds: float, grace: float = 0) -> tuple[int | None, str]:
    """Status, None where it had to be stopped, and what it printed. grace: seconds after an interrupt."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes)
    try:
        output, _ = process.communicate(timeout=max(0, seconds))
        return process.returncode, output
    except subprocess.TimeoutExpired:
        if grace:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                return None, process.communicate(timeout=grace)[0]
        os.killpg(process.pid, signal.SIGKILL)  # the compilers it started as well
        return None, process.communicate()[0]
