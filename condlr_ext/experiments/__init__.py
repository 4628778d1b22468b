"""Experiments on real data: train several runs from the same weights, attack them, keep every number."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .checkpoint import evaluate_checkpoint, inspect_checkpoint
    from .config import TrainConfig
    from .methods import Method as RunSpec
    from .study import train

__all__ = ["RunSpec", "TrainConfig", "evaluate_checkpoint", "inspect_checkpoint", "train"]

_HOMES = {
    "RunSpec": "methods.Method",
    "TrainConfig": "config.TrainConfig",
    "evaluate_checkpoint": "checkpoint.evaluate_checkpoint",
    "inspect_checkpoint": "checkpoint.inspect_checkpoint",
    "train": "study.train",
}


def __getattr__(name: str):
    """Load a public name when first used: the benchmarks take networks from here and need no extra packages for it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(".")
    return getattr(importlib.import_module(f".{module}", __name__), attribute)
