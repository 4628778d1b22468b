"""Optimizers that keep U and V orthonormal and the condition number of S bounded at every step.

All are plain torch optimizers, or hooks on one. Schedulers, GradScaler, closures, clip_grad_norm_ and accumulation over
micro-batches work as usual: they see the gradients of U, S and V before any projection, and the options of a group (lr,
tau, band, sigma_max) are read at every step.
"""

from .adamw import CondLRAdamW
from .groups import param_groups
from .projector import Projector
from .rank_control import RankController, RankReport, compact
from .sgd import CondLRSGD

__all__ = ["RankReport", "CondLRAdamW", "CondLRSGD", "Projector", "RankController", "compact", "param_groups"]
