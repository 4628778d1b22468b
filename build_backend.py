"""setuptools' build backend, which asks for torch and the build tools only where there is a compiler for them.

Environment: CONDLR_EXT_BUILD=auto|none (auto compiles where it can, none makes a pure Python package), CXX.
"""

import gzip
import io
import os
import shutil
import sys
import tarfile
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  the hooks that stay as they are

TOOLS = ["torch>=2.10", "cmake>=3.26", "ninja"]
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


def build_sdist(sdist_directory, config_settings=None) -> str:
    """Build the source distribution; with SOURCE_DATE_EPOCH set, the same bytes every time."""
    name = build_meta.build_sdist(sdist_directory, config_settings)
    if epoch := os.environ.get("SOURCE_DATE_EPOCH"):
        _normalize(Path(sdist_directory) / name, int(epoch))
    return name


def _normalize(archive: Path, epoch: int) -> None:
    """Rewrite a .tar.gz with this time and one owner for all files, which setuptools takes from the file system."""
    with tarfile.open(archive) as file:
        members = [(m, file.extractfile(m).read()) for m in file.getmembers() if m.isfile()]
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT) as file:
        for member, content in sorted(members, key=lambda item: item[0].name):
            info = tarfile.TarInfo(member.name)
            info.size, info.mtime, info.mode = len(content), epoch, 0o755 if member.mode & 0o100 else 0o644
            file.addfile(info, io.BytesIO(content))
    archive.write_bytes(gzip.compress(raw.getvalue(), mtime=epoch))
