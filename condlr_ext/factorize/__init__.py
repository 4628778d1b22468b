"""Dense layers of any model made low-rank, in place, and back."""

from .convert import factorize, fold, to_dense
from .metrics import condition_numbers, layer_metrics
from .report import FactorizeReport, LayerReport

__all__ = ["FactorizeReport", "LayerReport", "condition_numbers", "factorize", "fold", "layer_metrics", "to_dense"]
