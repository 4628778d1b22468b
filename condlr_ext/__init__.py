"""Robust low-rank training for PyTorch: layers W = U S Vᵀ with orthonormal U, V and a bounded condition number."""

from . import attacks, baselines, errors, functional, linalg, nn, optim, pruning, regularizers, robustness
from ._version import __version__ as __version__
from .adapters import add_adapters, merge_adapters
from .factorize import condition_numbers, factorize, fold, layer_metrics, to_dense
from .io import importers
from .io.checkpoint import load, save
from .io.lora import load_lora, save_lora
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
    "add_adapters",
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
    "layer_metrics",
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
