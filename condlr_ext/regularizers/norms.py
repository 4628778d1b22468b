"""Penalties on the largest singular value: spectral norm and Lipschitz bound."""

import numbers

import torch
from torch import Tensor

from .. import linalg
from .matrices import Matrices, total


def spectral_norm(matrices: Matrices) -> Tensor:
    """Half the sum of squared spectral norms, ½ Σ σ₁².

    Args:
        matrices: a module (all its nn.Linear, nn.Conv and low-rank layers, see layer_matrices), one tensor [*, m, n],
            or a mapping or list of such.

    Returns:
        A scalar. Where σ₁ is repeated, as in a core with τ = 0, the gradient is the mean over the tied singular
        vectors, the subgradient of least norm, which does not depend on the basis found for them.

    Raises:
        TypeError, ShapeError, ValueError: no matrices. NonFiniteError: NaN or Inf in a matrix, by name.

    Notes: one batched SVD per shape; of a convolution the flattened weight is meant, not the operator.
    Source: Yoshida and Miyato, Spectral norm regularization (arXiv 1705.10941), eq. 4.
    """
    return total("regularizers.spectral_norm", matrices, lambda A: _largest(A) ** 2 / 2)


def lipschitz(matrices: Matrices, bound: float = 1.0) -> Tensor:
    """Σ max(0, log(σ₁ / bound)): the logarithm of how far the product of spectral norms exceeds bound per layer.

    With 1-Lipschitz activations, a network of linear layers is bound^L-Lipschitz where this is 0. A zero-padded
    convolution is up to √(prod(kernel_size)) times its flattened weight's norm: see robustness.lipschitz.

    Args:
        matrices: as in spectral_norm.
        bound: > 0, what each layer may have for free.

    Returns:
        A scalar; gradients at repeated σ₁ as in spectral_norm, 0 for layers below the bound.

    Raises:
        As spectral_norm, and ValueError: bound <= 0.
    """
    if not isinstance(bound, numbers.Real) or not bound > 0:
        raise ValueError(f"regularizers.lipschitz: bound must be a number > 0, got {bound!r}")
    return total("regularizers.lipschitz", matrices, lambda A: (_largest(A).clamp_min(bound) / bound).log())


def _largest(A: Tensor) -> Tensor:
    """σ₁ [*] of A [*, m, n], the mean of those equal to it to rounding."""
    sigma = linalg.svd(A).sigma
    tied = (sigma >= sigma[..., :1] * (1 - 32 * torch.finfo(sigma.dtype).eps)).detach()
    return torch.where(tied, sigma, 0).sum(-1) / tied.sum(-1)
