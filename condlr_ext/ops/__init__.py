"""torch.ops.condlr_ext.*: schema, fake, reference registration and choice of implementation, per op family."""

from . import gpu, layers, linalg, routes, step
from ._dispatch import BACKENDS, COMPILED, OPS, Op, autocast_enabled, backend, can_check, current_backend, no_autocast

__all__ = [
    "BACKENDS",
    "COMPILED",
    "OPS",
    "Op",
    "autocast_enabled",
    "backend",
    "can_check",
    "current_backend",
    "gpu",
    "layers",
    "linalg",
    "no_autocast",
    "routes",
    "step",
]
