"""Optimisers that keep U and V orthonormal and the condition number of S bounded at every step."""

from .groups import param_groups
from .sgd import CondLRSGD

__all__ = ["CondLRSGD", "param_groups"]
