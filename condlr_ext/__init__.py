"""Robust low-rank training for PyTorch: layers W = U S Vᵀ with orthonormal U, V and a bounded condition number."""

from . import (
    attacks,
    baselines,
    errors,
    functional,
    importers,
    linalg,
    nn,
    optim,
    pruning,
    regularizers,
    robustness,
)
from ._version import __version__ as __version__
from .adapters import adapt, merge_adapters
from .checkpoint import load, save
from .factorize import condition_numbers, factorize, fold, to_dense
from .lora import load_lora, save_lora
from .nn import Energy, LowRankAdapter, LowRankConv1d, LowRankConv2d, LowRankConv3d, LowRankLinear
from .ops import backend
from .optim import compact

__all__ = [
    "Energy",
    "LowRankAdapter",
    "LowRankConv1d",
    "LowRankConv2d",
    "LowRankConv3d",
    "LowRankLinear",
    "adapt",
    "attacks",
    "backend",
    "baselines",
    "compact",
    "condition_numbers",
    "errors",
    "factorize",
    "fold",
    "functional",
    "importers",
    "linalg",
    "load",
    "load_lora",
    "merge_adapters",
    "nn",
    "optim",
    "pruning",
    "regularizers",
    "robustness",
    "save",
    "save_lora",
    "to_dense",
]
