"""What is wrong with an installation, and what to do about it."""

import functools
import importlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import sys
import warnings
from typing import NamedTuple

import torch

from . import ops
from .kernels.triton import devices

OLDEST_TORCH = (2, 10)
TRITON = ((3, 6), (3, 9))  # oldest and newest version that the kernels are tested with
_REINSTALL = (
    "pip install cmake ninja 'setuptools>=77', then reinstall condlr_ext from its source with pip install"
    " --no-build-isolation --no-cache-dir --force-reinstall --no-deps"
)
_COMPILERS = ("c++", "g++", "clang++")


class Problem(NamedTuple):
    """Something that is wrong, and what to do about it."""

    what: str
    remedy: str


def version(package: str) -> str | None:
    """Return the installed version of a package, None if there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def problems() -> list[Problem]:
    """Return what is wrong with this installation."""
    found = (_torch(), _compiled(), _instruction_set(), _torchvision(), _gpu())
    return [problem for problem in found if problem]


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text)[:2]))


def _torch() -> Problem | None:
    if _numbers(torch.__version__) >= OLDEST_TORCH:
        return None
    oldest = ".".join(map(str, OLDEST_TORCH))
    return Problem(f"torch {torch.__version__} is older than {oldest}", f"pip install 'torch>={oldest}'")


def _compiled() -> Problem | None:
    reason = ops.COMPILED.ops_reason or ops.COMPILED.host_reason
    if not reason:
        return None
    what = f"everything runs in plain PyTorch, slower: {reason}" if ops.COMPILED.ops_reason else reason
    if sys.platform != "linux":
        return Problem(what, f"none: the kernels are built on Linux only, this is {sys.platform}")
    missing = "no compiled" in reason and not any(map(shutil.which, (os.environ.get("CXX", "c++"), *_COMPILERS)))
    return Problem(what, ("install a C++ compiler (such as g++), then " if missing else "") + _REINSTALL)


def _instruction_set() -> Problem | None:
    host = ops.COMPILED.host
    if host is None or len(host.isa_levels()) == len(host.build_info()["isa_levels"]):
        lowered = os.environ.get("CONDLR_EXT_ISA")
        if host and lowered and lowered != host.isa_levels()[-1]:
            return Problem(f"CONDLR_EXT_ISA={lowered} lowers the instruction set", "unset it")
        return None
    if host.isa_levels()[-1] != "baseline":
        return None  # AVX2 without AVX-512 is nothing to complain about
    missing = ", ".join(name for name in ("avx2", "fma") if not host.cpu_features()[name])
    return Problem(
        f"the portable kernels are in use, since this CPU has no {missing}",
        "on a virtual machine, pass the features of the host's CPU through; else none",
    )


@functools.cache  # a failed import leaves parts behind
def _torchvision() -> Problem | None:
    if importlib.util.find_spec("torchvision") is None:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module("torchvision")
    except Exception as error:  # a library for another torch may raise anything
        text = " ".join(str(error).split())
        return Problem(
            f"torchvision {version('torchvision')} cannot be imported beside torch {torch.__version__}: {text}",
            "install the torchvision that belongs to this torch, from the same index, or pip uninstall torchvision:"
            " this package does not need it",
        )
    return None


def _gpu() -> Problem | None:
    if not torch.cuda.is_available():
        if not os.path.exists("/proc/driver/nvidia/version"):
            return None
        return Problem(
            f"there is an NVIDIA driver, but torch {torch.__version__} finds no device",
            "see whether nvidia-smi and CUDA_VISIBLE_DEVICES show one; install a torch built for this driver's CUDA",
        )
    if not devices.INSTALLED:
        return Problem("tensors on the GPU are served by plain PyTorch: Triton is not installed", "pip install triton")
    installed = version("triton")  # None for other distributions of it
    if installed and not TRITON[0] <= _numbers(installed) <= TRITON[1]:
        oldest, newest = (".".join(map(str, v)) for v in TRITON)
        return Problem(
            f"Triton {installed} is not one that the kernels are tested with, {oldest} to {newest}",
            "install a torch that comes with one of these",
        )
    if not any(map(shutil.which, filter(None, (os.environ.get("CC"), "gcc", "clang")))):
        return Problem(
            "Triton compiles its launcher with a C compiler when a kernel is first called, and there is none",
            "install gcc or clang, or set CC",
        )
    return None
