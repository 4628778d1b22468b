"""Audits a wheel, and tries it on each PYTHON: python tests/packaging/check.py WHEEL [PYTHON...]

A PYTHON gets a fresh environment without a compiler, which is removed afterwards. TORCH (environment) is the requirement
to install beside the wheel.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
FLOOR = (2, 10)
RUNTIME = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 25), "CXXABI": (1, 3, 11), "GCC": (8,)}  # of manylinux_2_28
MACHINES = {"x86_64": "Advanced Micro Devices X86-64", "aarch64": "AArch64"}
_INSTALL = ("-m", "pip", "install", "-q", "--no-cache-dir", "--disable-pip-version-check")


def audit(wheel: Path, folder: Path) -> None:
    """The libraries are for the machine in the tag, link no Python and no CUDA, and load with torch 2.10, glibc 2.28."""
    python, abi, platform = wheel.stem.split("-")[-3:]
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(folder)
    assert not [n for n in names if n.startswith(("tests/", "csrc/", "bench/", "studies/"))], names
    assert {"condlr_ext/py.typed", "condlr_ext/ops/measured.json"} <= set(names)
    assert (python, abi) == ("py3", "none"), f"{wheel.name}: nothing in it depends on a version of Python"
    libraries = sorted((folder / "condlr_ext").glob("*.so"))
    if platform == "any":
        assert not libraries, libraries
        return print(f"audit: {wheel.name}: pure Python")
    assert [p.name for p in libraries] == ["_C.so", "_core.so"], libraries
    machine = next(name for name in MACHINES if platform.endswith(name))
    for library in libraries:
        header, dynamic = run("readelf", "-h", str(library)), run("readelf", "-d", str(library))
        assert MACHINES[machine] in header, f"{library.name} is not for {machine}"
        assert "RPATH" not in dynamic and "RUNPATH" not in dynamic, f"{library.name} has a run path"
        assert "libpython" not in dynamic and "libcud" not in dynamic, f"{library.name} links Python or CUDA"
        assert ("libtorch" in dynamic) == (library.name == "_C.so"), f"{library.name} and torch"
        symbols = run("readelf", "-W", "--dyn-syms", str(library))
        assert not re.search(r" UND _?Py", symbols), f"{library.name} uses Python symbols"
        for name, version in set(re.findall(r"@([A-Z]+)_([\d.]+)", symbols)):
            number = tuple(map(int, version.split(".")))
            assert number <= RUNTIME[name], f"{library.name} needs {name}_{version}"
    run(sys.executable, *_INSTALL, "torch-abi-audit")
    auditor = Path(sys.executable).parent / "torch-abi-audit"
    report = run(str(auditor), "--json", "--check", "torch", str(libraries[0]))
    floor = find(json.loads(report), "min_torch")
    assert floor is not None and tuple(map(int, floor.split(".")[:2])) <= FLOOR, f"_C needs torch {floor}"
    print(f"audit: {wheel.name}: {machine}, stable ABI, torch >= {floor}")


def find(node, key: str):
    """The first string under a key that starts with `key`, anywhere in a JSON document."""
    pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for name, value in pairs:
        if isinstance(name, str) and name.startswith(key) and isinstance(value, str):
            return value
        found = find(value, key)
        if found is not None:
            return found
    return None


def run(*command: str, cwd=None, env=None) -> str:
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def attempt(wheel: Path, interpreter: str, torch: str) -> None:
    """Install the wheel into a new environment, and use it outside the repository."""
    serves = "reference" if wheel.stem.endswith("-any") else "cpu"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(interpreter, "-m", "venv", str(folder / "env"))
        python, condlr = (str(folder / "env" / "bin" / program) for program in ("python", "condlr"))
        no_compiler = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
            "CC": "/bin/false",
            "CXX": "/bin/false",
        }
        run(python, *_INSTALL, torch, str(wheel), env=no_compiler)
        work = folder / "elsewhere"
        work.mkdir()
        print(run(condlr, "info", cwd=work, env=no_compiler))
        print(run(python, str(HERE / "smoke.py"), serves, cwd=work, env=no_compiler))
        package = Path(run(python, "-c", "import condlr_ext; print(condlr_ext.__path__[0])", cwd=work).splitlines()[-1])
        if serves == "cpu":
            for library in package.glob("*.so"):
                library.unlink()
            print(run(python, str(HERE / "smoke.py"), "reference", cwd=work, env=no_compiler))
        print(f"wheel: {wheel.name} works with {torch} on {run(interpreter, '--version').strip()}")


def main(wheel: Path, *interpreters: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        audit(wheel, Path(folder))
    for interpreter in interpreters:
        attempt(wheel, interpreter, os.environ.get("TORCH", "torch"))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]).resolve(), *sys.argv[2:])
