"""setuptools' build backend, which asks for torch and the build tools only where there is a compiler for them.

Environment: CONDLR_EXT_BUILD=auto|none (auto compiles where it can, none makes a pure Python package), CXX.
"""

import os
import shutil
import sys

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  the hooks that stay as they are

TOOLS = ["torch>=2.10", "cmake>=3.26", "ninja", "pybind11>=3.0"]
COMPILERS = ("c++", "g++", "clang++")


def no_build_reason() -> str | None:
    """Return why nothing can be compiled here, or None."""
    choice = os.environ.get("CONDLR_EXT_BUILD", "auto")
    if choice not in ("auto", "none"):
        raise SystemExit(f"condlr_ext: CONDLR_EXT_BUILD must be auto or none, got {choice!r}")
    if choice == "none":
        return "CONDLR_EXT_BUILD=none"
    if sys.platform != "linux":
        return f"the kernels are built on Linux only, this is {sys.platform}"
    if not any(map(shutil.which, (os.environ.get("CXX", "c++"), *COMPILERS))):
        return f"no C++ compiler found (tried CXX, {', '.join(COMPILERS)})"
    return None


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    return build_meta.get_requires_for_build_wheel(config_settings) + ([] if no_build_reason() else TOOLS)


def get_requires_for_build_editable(config_settings=None) -> list[str]:
    return build_meta.get_requires_for_build_editable(config_settings) + ([] if no_build_reason() else TOOLS)
