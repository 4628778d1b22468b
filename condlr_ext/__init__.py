"""Robust low-rank training for PyTorch: layers W = U S Vᵀ with orthonormal U, V and a bounded condition number."""

from importlib.metadata import PackageNotFoundError, version

from . import attacks, baselines, errors, functional, linalg, nn, optim, robustness
from .factorize import condition_numbers, factorize, to_dense
from .nn import LowRankConv1d, LowRankConv2d, LowRankConv3d, LowRankLinear
from .ops import backend

try:
    __version__ = version("condlr_ext")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "LowRankConv1d",
    "LowRankConv2d",
    "LowRankConv3d",
    "LowRankLinear",
    "attacks",
    "backend",
    "baselines",
    "condition_numbers",
    "errors",
    "factorize",
    "functional",
    "linalg",
    "nn",
    "optim",
    "robustness",
    "to_dense",
]
