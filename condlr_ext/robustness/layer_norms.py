"""Operator norms of single layers, linear or convolution, dense or low-rank, with a BatchNorm folded in."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .. import linalg
from .._modules import frozen, select_layers
from ..errors import NonFiniteError
from ..functional import same_padding
from ..nn import LowRankConv1d, LowRankConv2d, LowRankConv3d, LowRankLayer, LowRankLinear
from ..reference import cond_from_sigma
from .conv_spectrum import circulant_norm, equivalent_torus, largest_singular_value

LINEAR = (nn.Linear, LowRankLinear)
CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d, LowRankConv1d, LowRankConv2d, LowRankConv3d)
BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class LayerSpectrum(NamedTuple):
    """Spectrum of a layer's flattened weight.

    Attributes:
        sigma_max: Largest singular value.
        kappa: Ratio of sigma_max to the smallest singular value.
    """

    sigma_max: float
    kappa: float


@dataclass(frozen=True)
class LayerBound:
    """Spectrum of a layer's flattened weight, and a bound on the layer's norm as a linear map.

    Attributes:
        name: Name of the module.
        kind: Name of its class.
        sigma_max: Largest singular value of the weight as a matrix, [C_out, C_in / groups * kernel] for a convolution,
            without BatchNorm.
        kappa: Ratio of sigma_max to the smallest singular value.
        bound: The layer is bound-Lipschitz in l2.
        how: Method of the bound: "matrix" (exact), "circulant" (Fourier transform) or "patches" (sigma_max times the
            root of the number of patches that share a pixel); after a "+" the BatchNorm folded into the layer.
    """

    name: str
    kind: str
    sigma_max: float
    kappa: float
    bound: float
    how: str


def is_plain(module: nn.Module, kinds: tuple[type, ...]) -> bool:
    """Return whether the module is of one of these classes and not of a user's subclass with another forward."""
    cls = parametrize.type_before_parametrizations(module)
    return cls in kinds or (issubclass(cls, kinds) and cls.__module__.startswith(("torch.nn.", "condlr_ext.")))


def layer_spectra(model: nn.Module) -> dict[str, LayerSpectrum]:
    """Return sigma_max and kappa of every nn.Linear, nn.Conv and low-rank layer of any model.

    The weights are those of eval mode (pruning gates differ in train mode); of a low-rank layer whose RankController
    reserves space for a larger rank, only the active directions count.

    Args:
        model: Any module; unlike lipschitz, this needs no graph.

    Returns:
        {layer name: LayerSpectrum}.

    Raises:
        TypeError: model is no module.
        ValueError: The model has no such layer.
        NonFiniteError: NaN or Inf in a layer, by name.
    """
    layers = select_layers("layer_spectra", model, (*LINEAR, *CONV))
    for name, layer in layers.items():
        check_layer("layer_spectra", name, layer)
    with frozen(model):
        return {name: LayerSpectrum(*matrix_spectrum(layer)) for name, layer in layers.items()}


def check_layer(caller: str, name: str, module: nn.Module) -> None:
    """Raise NonFiniteError if the layer holds NaN or Inf."""
    for key, t in (*module.named_parameters(), *module.named_buffers()):
        if not torch.isfinite(t).all():
            raise NonFiniteError(f"{caller}: {key} of {name} must be finite, got NaN or Inf")


def matrix_spectrum(module: nn.Module) -> tuple[float, float]:
    """Return sigma_max and kappa of the flattened weight in float64; of a low-rank layer those of U S Vᵀ as stored."""
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
    """Return the norm of diag(scale) W."""
    return largest_singular_value(_grouped_weight(module, 1, scale)[0])


def conv_bound(module: nn.Module, size, scale: Tensor | None = None, circulant: bool = True) -> tuple[float, str]:
    """Return a bound on the norm of the convolution, rows scaled by scale, on images of this size, and its method."""
    kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
    flat = flat_padding(module)
    pads = [tuple(flat[i : i + 2]) for i in range(len(flat) - 2, -1, -2)]
    outputs = [
        n + left + right - dl * (k - 1) for n, k, dl, (left, right) in zip(size, kernel, dilation, pads, strict=True)
    ]
    weight = _grouped_weight(module, module.groups, scale).unflatten(-1, (-1, *kernel))

    copies, torus = 1.0, equivalent_torus(size, kernel, stride, dilation, pads)
    fits = all(out <= n and n % s == 0 for out, n, s in zip(outputs, size, stride, strict=True))
    if module.padding_mode == "circular" and fits:
        torus = list(size)  # circulant on the image itself; fewer outputs than pixels are a restriction
    elif module.padding_mode != "zeros" and any(flat):
        padded = [n + left + right for n, (left, right) in zip(size, pads, strict=True)]
        torus = equivalent_torus(padded, kernel, stride, dilation, [(0, 0)] * len(pads))
        copies = _max_pixel_copies(size, flat, module.padding_mode)
    patches = math.prod(map(windows_per_element, kernel, stride, dilation))
    bounds = {"patches": math.sqrt(copies * patches) * largest_singular_value(weight.flatten(2))}
    if circulant:
        bounds["circulant"] = math.sqrt(copies) * circulant_norm(weight, torus, stride, dilation)
    how = min(bounds, key=bounds.get)
    return bounds[how], how


def flat_padding(module: nn.Module) -> list[int]:
    """Return the padding of a convolution as F.pad takes it: left and right, last dimension first."""
    if module.padding == "same":
        return same_padding(module.kernel_size, module.dilation)
    if module.padding == "valid":
        return [0] * 2 * len(module.kernel_size)
    return [p for p in reversed(module.padding) for _ in range(2)]


def windows_per_element(kernel: int, stride: int, dilation: int) -> int:
    """Return the largest number of windows of a sliding kernel that share an element, in one dimension."""
    return math.ceil(kernel * math.gcd(stride, dilation) / stride)


def batch_norm_scale(module: nn.Module) -> Tensor:
    """Return the factor of each channel in eval mode with running statistics, [C] in float64."""
    scale = (module.running_var.double() + module.eps).rsqrt()
    return scale if module.weight is None else scale * module.weight.detach().double()


def _grouped_weight(module: nn.Module, groups: int, scale: Tensor | None) -> Tensor:
    """Return [groups, rows, n] in float64 with the norms of each group's diag(scale) W: R S Vᵀ, U = Q R, if smaller."""
    if isinstance(module, LowRankLayer):
        U, S, V = (x.detach().double() for x in (module.U, module.S, module.V))
        U = (U if scale is None else U * scale[:, None]).unflatten(0, (groups, -1))
        return (linalg.qr(U).R if U.shape[1] > U.shape[2] else U) @ S @ V.mT
    W = module.weight.detach().flatten(1).double()
    return (W if scale is None else W * scale[:, None]).unflatten(0, (groups, -1))


def _max_pixel_copies(size, flat, mode: str) -> float:
    """Return how often the padding repeats a pixel at most; its square root is the padding's norm."""
    image = torch.ones(1, 1, *size, dtype=torch.float64, device="cpu", requires_grad=True)
    with torch.enable_grad():
        (copies,) = torch.autograd.grad(F.pad(image, flat, mode=mode).sum(), image)
    return copies.amax().item()
