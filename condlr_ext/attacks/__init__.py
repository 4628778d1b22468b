"""Adversarial attacks on classifiers of inputs in [0, 1]."""

from .auto_pgd import apgd
from .external import autoattack, from_foolbox, from_torchattacks
from .gradient import fgsm, pgd
from .low_rank import low_rank_pgd, perturbation_report

__all__ = [
    "apgd",
    "autoattack",
    "fgsm",
    "from_foolbox",
    "from_torchattacks",
    "low_rank_pgd",
    "perturbation_report",
    "pgd",
]
