"""Singular values of convolutions as operators on images, by FFT: exact with circular padding, a bound with zeros."""

import math

import torch
from torch import Tensor

from .. import linalg, reference
from .._types import Ints
from ..errors import NonFiniteError, ShapeError
from ..functional import as_ints


@torch.no_grad()
def conv_singular_values(
    weight: Tensor, size: Ints, *, stride: Ints = 1, dilation: Ints = 1, groups: int = 1
) -> Tensor:
    """Return all singular values of a circularly padded convolution as a linear map from images to images.

    For stride 1 the map is block-circulant: on an N x N image its singular values are those of N² matrices
    [C_out, C_in], the Fourier transform of the kernel at each frequency. With a stride s, which must divide the size,
    the matrices of the s² frequencies that subsampling aliases are concatenated and divided by s.

    A zero-padded convolution is this map on a torus so large that nothing wraps around, between an embedding and a
    restriction, both of norm 1: the largest value for size = image + padding bounds its norm; the others bound
    nothing. On the image's own size the circular norm is near the zero-padded one, but may be below it.

    Args:
        weight: [C_out, C_in / groups, *kernel_size], of a convolution in 1 to 3 dimensions.
        size: Size of the image, an int or one per dimension, each a multiple of the stride.
        stride: An int or one per dimension.
        dilation: An int or one per dimension.
        groups: As in torch.

    Returns:
        min(C_out / groups, C_in / groups · prod(stride)) · groups · prod(size / stride) values, float64, descending.

    Raises:
        ShapeError: weight has no 1 to 3 dimensions of a kernel.
        ValueError: Sizes that do not fit.
        NonFiniteError: NaN or Inf in weight.

    Source: Sedghi, Gupta, Long, The singular values of convolutional layers (arXiv 1805.10408), theorem 6.
    """
    name = "conv_singular_values"
    d = weight.dim() - 2
    if not 1 <= d <= 3:
        raise ShapeError(f"{name}: weight must be [C_out, C_in / groups, *kernel], 1 to 3 of these, got {weight.shape}")
    if weight.numel() == 0 or not isinstance(groups, int) or groups < 1 or len(weight) % groups:
        raise ValueError(f"{name}: groups must divide C_out = {len(weight)}, which must not be 0, got {groups!r}")
    if not torch.isfinite(weight).all():
        raise NonFiniteError(f"{name}: weight must be finite, got NaN or Inf")
    size, stride, dilation = (
        as_ints(name, what, value, d, 1) for what, value in (("size", size), ("stride", stride), ("dilation", dilation))
    )
    if any(n % s for n, s in zip(size, stride, strict=True)):
        raise ValueError(f"{name}: size must be a multiple of stride {tuple(stride)}, got {tuple(size)}")
    blocks = frequency_blocks(weight.double().unflatten(0, (groups, -1)), size, stride, dilation)
    # [[Re, -Im], [Im, Re]] has the singular values of the complex matrix, each twice
    real = torch.cat((torch.cat((blocks.real, -blocks.imag), -1), torch.cat((blocks.imag, blocks.real), -1)), -2)
    return linalg.svd(real).sigma[..., ::2].flatten().sort(descending=True).values


def circulant_norm(weight: Tensor, size, stride, dilation) -> float:
    """Return the largest of conv_singular_values; weight [groups, C_out / groups, C_in / groups, *kernel], float64."""
    return largest_singular_value(frequency_blocks(weight, size, stride, dilation, half=True))


def largest_singular_value(A: Tensor) -> float:
    """Return the largest singular value of all matrices A [*, m, n], real or complex, to the rounding of float64.

    It comes from the Gram matrix, whose largest eigenvalue loses nothing by the squaring.
    """
    scale = reference.magnitude(A, tuple(range(A.dim())))
    A = A / scale
    gram = A @ A.mH if A.shape[-2] <= A.shape[-1] else A.mH @ A
    return torch.linalg.eigvalsh(gram).amax().clamp_min(0).sqrt().item() * scale.item()


def equivalent_torus(size, kernel_size, stride, dilation, pads) -> list[int]:
    """Return the size on which circular padding acts on an image of this size as zero padding does.

    pads are (left, right) pairs, one per dimension.
    """
    torus = []
    for n, k, s, dl, (left, right) in zip(size, kernel_size, stride, dilation, pads, strict=True):
        least = max(n + max(left, right), n + left + right - dl * (k - 1))
        torus.append(math.ceil(least / s) * s)
    return torus


def frequency_blocks(weight: Tensor, size, stride, dilation, half: bool = False) -> Tensor:
    """Return the blocks [groups, frequencies, C_out / groups, C_in / groups · prod(stride)], complex.

    half: Leave out blocks that are complex conjugates of others, whose singular values are the same.
    """
    groups, m, c, *kernel_size = weight.shape
    d = len(kernel_size)
    taps = weight
    for i, (n, k, dl) in enumerate(zip(size, kernel_size, dilation, strict=True)):
        dim = 3 + i
        shape = [*taps.shape[:dim], n, *taps.shape[dim + 1 :]]
        at = torch.arange(k, device=weight.device) * dl % n  # a kernel wider than the image wraps around
        taps = taps.new_zeros(shape).index_add(dim, at, taps)
    transfer = torch.fft.fftn(taps, dim=tuple(range(3, 3 + d)))
    # frequency f = a N / s + f': the aliases a become columns
    coarse = [n // s for n, s in zip(size, stride, strict=True)]
    split = transfer.reshape(groups, m, c, *(x for pair in zip(stride, coarse, strict=True) for x in pair))
    aliases, frequencies = [3 + 2 * i for i in range(d)], [4 + 2 * i for i in range(d)]
    if half:
        split = split.narrow(frequencies[-1], 0, coarse[-1] // 2 + 1)
    blocks = split.permute(0, *frequencies, 1, 2, *aliases)
    return blocks.reshape(groups, -1, m, c * math.prod(stride)) / math.sqrt(math.prod(stride))
