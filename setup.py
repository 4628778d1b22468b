"""Builds the compiled part with CMake and ninja; everything else about the package is in pyproject.toml.

Environment: CONDLR_EXT_BUILD and CXX as in build_backend.py, CONDLR_EXT_CXX_FLAGS (extra compiler flags), MAX_JOBS.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
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
        host = [Extension("condlr_ext._host", [])] if importlib.util.find_spec("pybind11") else []
        if not host:
            print("condlr_ext: no pybind11, so _C alone, without _host", file=sys.stderr)
        return [Extension("condlr_ext._C", []), *host]
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
        raise SystemExit(
            f"setup.py: no {package}: pip install 'cmake>=3.26' ninja pybind11, or set CONDLR_EXT_BUILD=none"
        )
    return path


class CMakeBuild(build_ext):
    """Run CMake once for all extensions, in build/cmake-<platform>; a second build is incremental."""

    def get_ext_filename(self, fullname: str) -> str:
        # _C links no Python: its name carries no Python version
        *package, name = fullname.split(".")
        return os.path.join(*package, "_C.so") if name == "_C" else super().get_ext_filename(fullname)

    def build_extensions(self) -> None:
        import torch

        host = any(extension.name.endswith("_host") for extension in self.extensions)
        build = ROOT / "build" / f"cmake-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        output = build / "lib"
        torch_root = Path(torch.__file__).parent
        cmake = tool("cmake", "CMAKE_BIN_DIR")
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": tool("ninja", "BIN_DIR"),
            "CMAKE_CXX_FLAGS": os.environ.get("CONDLR_EXT_CXX_FLAGS", ""),
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": output,
            "CONDLR_TORCH_INCLUDE_DIR": torch_root / "include",
            "CONDLR_TORCH_LIB_DIR": torch_root / "lib",
            "CONDLR_TORCH_VERSION": torch.__version__,
            "Python_EXECUTABLE": sys.executable,
            "CONDLR_HOST": "ON" if host else "OFF",
        }
        if host:
            options["pybind11_DIR"] = importlib.import_module("pybind11").get_cmake_dir()
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


setup(ext_modules=extensions(), cmdclass={"build_ext": CMakeBuild})
