"""Pruning of dense layers in place, by channel gates and top-k weight masks; make_permanent ends it."""

from .gates import HardConcreteGate, add_gates
from .masks import TopKMask, add_masks, freeze_masks, kept_shares, make_permanent, top_k_mask

__all__ = [
    "HardConcreteGate",
    "TopKMask",
    "add_gates",
    "add_masks",
    "freeze_masks",
    "kept_shares",
    "make_permanent",
    "top_k_mask",
]
