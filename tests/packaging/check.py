"""Audits a wheel and tries it in a fresh environment without a compiler: python tests/packaging/check.py dist/*.whl

TORCH (environment) is the requirement to install beside it. The environment is temporary and removed.
"""

import json
import os
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
FLOOR = (2, 10)
_INSTALL = ("-m", "pip", "install", "-q", "--no-cache-dir", "--disable-pip-version-check")


def audit(wheel: Path, folder: Path) -> None:
    """_C is stable-ABI with floor 2.10, links no Python, has no run path; the tag is that of this Python."""
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert f"-{tag}-{tag}-" in wheel.name, f"{wheel.name}: the wheel holds _host, so its tag must be {tag}-{tag}"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(folder)
    assert not [n for n in names if n.startswith(("tests/", "csrc/", "bench/", "studies/"))], names
    libraries = sorted((folder / "condlr_ext").glob("*.so"))
    assert [p.name.split(".")[0] for p in libraries] == ["_C", "_host"], libraries
    for library in libraries:
        dynamic = run("readelf", "-d", str(library))
        assert "RPATH" not in dynamic and "RUNPATH" not in dynamic, f"{library.name} has a run path"
        assert "libpython" not in dynamic and "libcud" not in dynamic, f"{library.name} links Python or CUDA"
    undefined = run("nm", "-D", "--undefined-only", str(libraries[0]))
    assert " Py" not in undefined, "_C uses Python symbols"
    run(sys.executable, *_INSTALL, "torch-abi-audit")
    auditor = Path(sys.executable).parent / "torch-abi-audit"
    report = run(str(auditor), "--json", "--check", "torch", str(libraries[0]))
    floor = find(json.loads(report), "min_torch")
    assert floor is not None and tuple(map(int, floor.split(".")[:2])) <= FLOOR, f"_C needs torch {floor}"
    print(f"audit: {wheel.name}: stable ABI, torch >= {floor}")


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


def main(wheel: Path) -> None:
    torch = os.environ.get("TORCH", "torch")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        audit(wheel, folder / "unpacked")
        venv.create(folder / "env", with_pip=True)
        python = str(folder / "env" / "bin" / "python")
        no_compiler = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
            "CC": "/bin/false",
            "CXX": "/bin/false",
        }
        run(python, *_INSTALL, torch, str(wheel), env=no_compiler)
        work = folder / "elsewhere"
        work.mkdir()
        condlr = str(folder / "env" / "bin" / "condlr")
        print(run(condlr, "info", cwd=work, env=no_compiler))
        print(run(python, str(HERE / "smoke.py"), "cpu", cwd=work, env=no_compiler))
        package = Path(run(python, "-c", "import condlr_ext; print(condlr_ext.__path__[0])", cwd=work).strip())
        for library in package.glob("*.so"):
            library.unlink()
        print(run(python, str(HERE / "smoke.py"), "reference", cwd=work, env=no_compiler))
    print(f"wheel: {wheel.name} works with {torch}, compiled and without its compiled files")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]).resolve())
