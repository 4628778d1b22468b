"""Turns the dense layers of any module into low-rank ones, in place, and back."""

from .convert import condition_numbers, factorize, fold, to_dense
from .report import FactorizeReport, LayerReport

__all__ = ["FactorizeReport", "LayerReport", "condition_numbers", "factorize", "fold", "to_dense"]
