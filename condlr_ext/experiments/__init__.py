"""Experiments on real data: train several runs from the same weights, attack them, keep every number."""

from .checkpoint import evaluate_checkpoint, inspect_checkpoint
from .config import RunSpec, TrainConfig
from .study import train

__all__ = ["RunSpec", "TrainConfig", "evaluate_checkpoint", "inspect_checkpoint", "train"]
