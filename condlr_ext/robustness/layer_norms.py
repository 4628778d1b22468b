"""Operator norms of single layers: linear, convolution, low-rank or dense, with a BatchNorm folded in."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .. import linalg
from .._modules import select_layers
from ..attacks.checks import frozen
from ..errors import NonFiniteError
from ..functional import same_padding
from ..nn import LowRankConv1d, LowRankConv2d, LowRankConv3d, LowRankLayer, LowRankLinear
from ..reference import cond_from_sigma
from .conv_spectrum import circulant_norm, largest_singular_value, ring

LINEAR = (nn.Linear, LowRankLinear)
CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d, LowRankConv1d, LowRankConv2d, LowRankConv3d)
BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class LayerSpectrum(NamedTuple):
    """Of the flattened weight: the largest singular value, and its ratio to the smallest."""

    sigma_max: float
    kappa: float


@dataclass(frozen=True)
class LayerBound:
    """One layer: singular values of its flattened weight, and a bound on its norm as a linear map.

    sigma_max, kappa: of the weight as a matrix, [C_out, C_in / groups * kernel] for a convolution, without BatchNorm.
    bound: the layer is bound-Lipschitz in l2. how: where that comes from, "matrix" (exact), "circulant" (Fourier
        transform), "patches" (sigma_max times the root of how many patches a pixel is in), with the BatchNorm folded
        into it, if any, after a "+".
    """

    name: str
    kind: str
    sigma_max: float
    kappa: float
    bound: float
    how: str


def is_plain(module: nn.Module, kinds: tuple[type, ...]) -> bool:
    """Whether the module is of one of these classes, not a user's subclass, which may compute something else."""
    cls = parametrize.type_before_parametrizations(module)
    return cls in kinds or (issubclass(cls, kinds) and cls.__module__.startswith(("torch.nn.", "condlr_ext.")))


def layer_spectra(model: nn.Module) -> dict[str, LayerSpectrum]:
    """sigma_max and kappa of every nn.Linear, nn.Conv and low-rank layer, in any model, also one without a bound.

    As eval mode has them, where that makes a difference (gates). Of a low-rank layer that keeps room for a larger
    rank, the directions in use.

    Raises:
        TypeError, ValueError: no module, or none with such layers. NonFiniteError: NaN or Inf in a layer, by name.
    """
    layers = select_layers("layer_spectra", model, (*LINEAR, *CONV))
    for name, layer in layers.items():
        check_layer("layer_spectra", name, layer)
    with frozen(model):
        return {name: LayerSpectrum(*matrix_spectrum(layer)) for name, layer in layers.items()}


def check_layer(where: str, name: str, module: nn.Module) -> None:
    """Raises NonFiniteError where the layer holds NaN or Inf."""
    for key, t in (*module.named_parameters(), *module.named_buffers()):
        if not torch.isfinite(t).all():
            raise NonFiniteError(f"{where}: {key} of {name} must be finite, got NaN or Inf")


def matrix_spectrum(module: nn.Module) -> tuple[float, float]:
    """sigma_max and kappa of the flattened weight in float64, of a low-rank layer those of U S Vᵀ as stored."""
    if isinstance(module, LowRankLayer):
        r = module.active_rank
        U, S, V = (x.detach().double() for x in (module.U[:, :r], module.S[:r, :r], module.V[:, :r]))
        W = linalg.qr(U).R @ S @ linalg.qr(V).R.mT  # U and V orthonormal to rounding: S to rounding
    else:
        W = module.weight.detach().flatten(1).double()
        W = linalg.qr(W if W.shape[0] >= W.shape[1] else W.mT).R  # the singular values of far fewer entries
    sigma = linalg.svd(W).sigma
    return sigma[0].item(), cond_from_sigma(sigma).item()


def linear_bound(module: nn.Module, scale: Tensor | None = None) -> float:
    """The norm of diag(scale) W."""
    return largest_singular_value(_grouped_weight(module, 1, scale)[0])


def conv_bound(module: nn.Module, size, scale: Tensor | None = None, circulant: bool = True) -> tuple[float, str]:
    """A bound on the norm of the convolution, rows scaled by scale, on images of this size, and where it is from."""
    kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
    flat = flat_padding(module)
    pads = [tuple(flat[i : i + 2]) for i in range(len(flat) - 2, -1, -2)]
    outputs = [
        n + left + right - dl * (k - 1) for n, k, dl, (left, right) in zip(size, kernel, dilation, pads, strict=True)
    ]
    weight = _grouped_weight(module, module.groups, scale).unflatten(-1, (-1, *kernel))

    copies, rings = 1.0, ring(size, kernel, stride, dilation, pads)
    on_ring = all(out <= n and n % s == 0 for out, n, s in zip(outputs, size, stride, strict=True))
    if module.padding_mode == "circular" and on_ring:
        rings = list(size)  # circulant on the image itself; fewer outputs than pixels are a restriction
    elif module.padding_mode != "zeros" and any(flat):
        padded = [n + left + right for n, (left, right) in zip(size, pads, strict=True)]
        rings = ring(padded, kernel, stride, dilation, [(0, 0)] * len(pads))
        copies = _most_copies(size, flat, module.padding_mode)
    patches = math.prod(map(overlap, kernel, stride, dilation))
    bounds = {"patches": math.sqrt(copies * patches) * largest_singular_value(weight.flatten(2))}
    if circulant:
        bounds["circulant"] = math.sqrt(copies) * circulant_norm(weight, rings, stride, dilation)
    how = min(bounds, key=bounds.get)
    return bounds[how], how


def flat_padding(module: nn.Module) -> list[int]:
    """The padding of a convolution as F.pad takes it: left and right, last dimension first."""
    if module.padding == "same":
        return same_padding(module.kernel_size, module.dilation)
    if module.padding == "valid":
        return [0] * 2 * len(module.kernel_size)
    return [p for p in reversed(module.padding) for _ in range(2)]


def overlap(kernel: int, stride: int, dilation: int) -> int:
    """How many windows of a sliding kernel an element is in, at most (one dimension)."""
    return math.ceil(kernel * math.gcd(stride, dilation) / stride)


def batch_norm_scale(module: nn.Module) -> Tensor:
    """What each channel is multiplied by in eval mode with running statistics, [C] in float64."""
    scale = (module.running_var.double() + module.eps).rsqrt()
    return scale if module.weight is None else scale * module.weight.detach().double()


def _grouped_weight(module: nn.Module, groups: int, scale: Tensor | None) -> Tensor:
    """[groups, rows, n] in float64: per group a matrix with the norm of diag(scale) W, R S Vᵀ of U = Q R if shorter."""
    if isinstance(module, LowRankLayer):
        U, S, V = (x.detach().double() for x in (module.U, module.S, module.V))
        U = (U if scale is None else U * scale[:, None]).unflatten(0, (groups, -1))
        return (linalg.qr(U).R if U.shape[1] > U.shape[2] else U) @ S @ V.mT
    W = module.weight.detach().flatten(1).double()
    return (W if scale is None else W * scale[:, None]).unflatten(0, (groups, -1))


def _most_copies(size, flat, mode: str) -> float:
    """How often the padding repeats a pixel, at most: its square root is the padding's norm."""
    image = torch.ones(1, 1, *size, dtype=torch.float64, requires_grad=True)
    with torch.enable_grad():
        (copies,) = torch.autograd.grad(F.pad(image, flat, mode=mode).sum(), image)
    return copies.amax().item()
