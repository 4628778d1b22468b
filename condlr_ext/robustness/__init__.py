"""How accurate a classifier stays under attack."""

from .evaluation import ATTACKS, evaluate

__all__ = ["ATTACKS", "evaluate"]
