"""Dense layers of any model made low-rank, in place, and back."""

from .convert import condition_numbers, factorize, fold, to_dense
from .report import FactorizeReport, LayerReport

__all__ = ["FactorizeReport", "LayerReport", "condition_numbers", "factorize", "fold", "to_dense"]
