"""Builds the compiled part with CMake and ninja; everything else about the package is in pyproject.toml.

Environment: CONDLR_EXT_BUILD and CXX as in build_backend.py, CONDLR_EXT_CXX_FLAGS (extra compiler flags), MAX_JOBS.
"""

import importlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

import build_backend

ROOT = Path(__file__).resolve().parent


def torch_reason() -> str | None:
    """Return the reason why no build against torch is possible, or None."""
    try:
        version = importlib.import_module("torch").__version__
    except ImportError as error:
        return f"torch >= 2.10 must be installed for a build without isolation ({error})"
    if tuple(int(part) for part in version.split("+")[0].split(".")[:2]) < (2, 10):
        return f"torch >= 2.10 is needed, got {version}"
    return None


def extensions() -> list[Extension]:
    """Return the modules to compile; print the reason if there are none."""
    reason = build_backend.no_build_reason() or torch_reason()
    if reason is None:
        return [Extension(f"condlr_ext.{name}", []) for name in ("_C", "_core")]
    line = "*" * 80
    print(f"{line}\ncondlr_ext: no compiled kernels, pure Python only: {reason}\n{line}", file=sys.stderr)
    return []


def tool(package: str, directory: str) -> str:
    """Return the path of a build tool, from its PyPI package or from PATH."""
    try:
        path = shutil.which(package, path=getattr(importlib.import_module(package), directory))
    except ImportError:
        path = None
    path = path or shutil.which(package)
    if path is None:
        raise SystemExit(f"setup.py: no {package}: pip install 'cmake>=3.26' ninja, or set CONDLR_EXT_BUILD=none")
    return path


class CMakeBuild(build_ext):
    """Run CMake once for all extensions, in build/cmake-<platform>; a second build is incremental."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"  # they link no Python: no version of it in their names

    def build_extensions(self) -> None:
        import torch

        build = ROOT / "build" / f"cmake-{sysconfig.get_platform()}"
        output = build / "lib"
        cmake = tool("cmake", "CMAKE_BIN_DIR")
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": tool("ninja", "BIN_DIR"),
            "CMAKE_CXX_FLAGS": os.environ.get("CONDLR_EXT_CXX_FLAGS", ""),
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": output,
            "CONDLR_TORCH_INCLUDE_DIR": Path(torch.__file__).parent / "include",
            "CONDLR_TORCH_VERSION": torch.__version__,
        }
        machine = sysconfig.get_platform().rpartition("-")[2]
        if machine != platform.machine():  # cross-compiled: _PYTHON_HOST_PLATFORM names the target, CXX its compiler
            options |= {"CMAKE_SYSTEM_NAME": "Linux", "CMAKE_SYSTEM_PROCESSOR": machine}
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        definitions = [f"-D{name}={value}" for name, value in options.items()]
        # the cache may contain paths of an earlier environment; the object files stay valid
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        subprocess.run([cmake, "-S", ROOT, "-B", build, "-G", "Ninja", *definitions], check=True)
        subprocess.run([cmake, "--build", build, "--parallel", jobs], check=True)
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(output / Path(self.get_ext_filename(extension.name)).name, target)


class Wheel(bdist_wheel):
    """Tag the wheel for every Python 3: neither library links Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(ext_modules=extensions(), cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel})
