"""torch.ops.condlr_ext.*: schema, fake, reference and choice of implementation, one module per op family."""

from . import cost_model_cpu, cost_model_gpu, layers, linalg, step
from ._dispatch import (
    BACKENDS,
    COMPILED,
    OPS,
    Op,
    autocast_enabled,
    backend,
    can_check,
    check_environment,
    current_backend,
    is_plain,
    no_autocast,
    transforms_active,
)

__all__ = [
    "BACKENDS",
    "COMPILED",
    "OPS",
    "Op",
    "autocast_enabled",
    "backend",
    "can_check",
    "check_environment",
    "current_backend",
    "cost_model_cpu",
    "cost_model_gpu",
    "is_plain",
    "layers",
    "linalg",
    "no_autocast",
    "step",
    "transforms_active",
]
