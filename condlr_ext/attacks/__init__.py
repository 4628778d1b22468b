"""Adversarial attacks on classifiers of inputs in [0, 1]."""

from .auto_pgd import apgd
from .boundary import fab
from .external import autoattack, from_foolbox, from_torchattacks
from .gradient import fgsm, pgd
from .low_rank import low_rank_pgd, perturbation_report
from .random_search import square

__all__ = [
    "apgd",
    "autoattack",
    "fab",
    "fgsm",
    "from_foolbox",
    "from_torchattacks",
    "low_rank_pgd",
    "perturbation_report",
    "pgd",
    "square",
]
