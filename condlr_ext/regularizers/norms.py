"""Penalties on the largest singular value."""

import numbers

import torch
from torch import Tensor

from .. import linalg
from .matrices import Matrices, sum_penalty


def spectral_norm(matrices: Matrices) -> Tensor:
    """Return half the sum of squared spectral norms, ½ Σ σ₁².

    Args:
        matrices: A module (all its nn.Linear, nn.Conv and low-rank layers, see layer_matrices), one tensor [*, m, n],
            or a mapping or list of such.

    Returns:
        A scalar. If σ₁ is repeated, as in a core with τ = 0, the gradient is the mean over the tied singular vectors:
        the subgradient of least norm, whatever basis the SVD finds.

    Raises:
        TypeError: A matrix is no real floating-point tensor.
        ShapeError: A matrix is empty or not [*, m, n].
        ValueError: No matrices.
        NonFiniteError: NaN or Inf in a matrix, by name.

    Notes:
        One batched SVD per shape. σ₁ of a convolution is that of its flattened weight, not of the operator.

    Source: Yoshida and Miyato, Spectral norm regularization (arXiv 1705.10941), eq. 4.
    """
    return sum_penalty("regularizers.spectral_norm", matrices, lambda A: _largest(A) ** 2 / 2)


def lipschitz(matrices: Matrices, bound: float = 1.0) -> Tensor:
    """Return Σ max(0, log(σ₁ / bound)), the logarithm by which spectral norms exceed the bound.

    If it is 0, a network of L linear layers with 1-Lipschitz activations is bound^L-Lipschitz. The norm of a
    zero-padded convolution is up to √(prod(kernel_size)) times that of its flattened weight: see robustness.lipschitz.

    Args:
        matrices: As in spectral_norm.
        bound: > 0; layers with σ₁ <= bound are not penalized.

    Returns:
        A scalar; gradients at repeated σ₁ as in spectral_norm, 0 for layers below the bound.

    Raises:
        TypeError: A matrix is no real floating-point tensor.
        ShapeError: A matrix is empty or not [*, m, n].
        ValueError: No matrices, or bound <= 0.
        NonFiniteError: NaN or Inf in a matrix, by name.
    """
    if not isinstance(bound, numbers.Real) or not bound > 0:
        raise ValueError(f"regularizers.lipschitz: bound must be a number > 0, got {bound!r}")
    return sum_penalty("regularizers.lipschitz", matrices, lambda A: (_largest(A).clamp_min(bound) / bound).log())


def _largest(A: Tensor) -> Tensor:
    """Return σ₁ [*] of A [*, m, n], as the mean of the σ equal to it to rounding."""
    sigma = linalg.svd(A).sigma
    tied = (sigma >= sigma[..., :1] * (1 - 32 * torch.finfo(sigma.dtype).eps)).detach()
    return torch.where(tied, sigma, 0).sum(-1) / tied.sum(-1)
