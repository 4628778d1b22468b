"""Accuracy under attack, adversarial training, and certificates of robustness."""

from .adversarial_training import adversarial_loss, kl_pgd, trades_loss, train_epoch
from .cascade import worst_case
from .certificates import certified_radius, misalignment
from .conv_spectrum import conv_singular_values
from .evaluation import ATTACKS, KNOWN_ATTACKS, Evaluation, evaluate
from .layer_norms import LayerBound, LayerSpectrum, layer_spectra
from .lipschitz_bound import LipschitzReport, lipschitz
from .masking import flags, plateau

__all__ = [
    "ATTACKS",
    "KNOWN_ATTACKS",
    "Evaluation",
    "LayerBound",
    "LayerSpectrum",
    "LipschitzReport",
    "adversarial_loss",
    "certified_radius",
    "conv_singular_values",
    "evaluate",
    "flags",
    "kl_pgd",
    "layer_spectra",
    "lipschitz",
    "misalignment",
    "plateau",
    "trades_loss",
    "train_epoch",
    "worst_case",
]
