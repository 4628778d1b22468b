"""Loading of the compiled libraries; a library that does not load leaves a reason, never an ImportError."""

import importlib
import warnings
from pathlib import Path

import torch

_HERE = Path(__file__).resolve().parent


def _load_ops() -> str | None:
    path = _HERE / "_C.so"
    if not path.exists():
        return f"no compiled op library _C in {_HERE}"
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return f"{path} does not load: {error}"
    return None


def _load_native():
    try:
        return importlib.import_module("condlr_ext._native"), None
    except (OSError, AttributeError) as error:  # the latter: one of another version
        if (_HERE / "_core.so").exists():
            return None, f"{_HERE / '_core.so'} does not load: {error}"
        return None, f"no compiled library _core in {_HERE}"


class Compiled:
    """The compiled libraries of this process.

    Attributes:
        ops_path: Path of _C, None if it is not loaded.
        ops_reason: Why it is not, else None.
        host: The module _native, None if its library _core is not loaded.
        host_reason: Why it is not, else None.
    """

    def __init__(self):
        self.ops_reason = _load_ops()
        self.host, self.host_reason = _load_native()

    @property
    def ops_path(self) -> str | None:
        return None if self.ops_reason else str(_HERE / "_C.so")


def load() -> Compiled:
    compiled = Compiled()
    if compiled.ops_reason:
        warnings.warn(
            f"condlr_ext: compiled kernels are not in use ({compiled.ops_reason}); everything runs on the slower "
            "PyTorch reference path.",
            RuntimeWarning,
            stacklevel=3,
        )
    return compiled
