"""Adversarial attacks on classifiers of inputs in [0, 1]."""

from .gradient import fgsm, pgd

__all__ = ["fgsm", "pgd"]
