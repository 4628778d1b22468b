"""What a Lipschitz bound proves about single samples, and what a bound on kappa leaves open: measured on data."""

import math
import numbers

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import linalg
from ..attacks.checks import check_batch, check_logits, frozen
from ..nn import LowRankLayer
from .layer_norms import CONV, LINEAR, flat_padding, is_plain
from .lipschitz_bound import LipschitzReport, lipschitz


def certified_radius(model: nn.Module, x: Tensor, y: Tensor, bound: float | LipschitzReport | None = None) -> Tensor:
    """The l2 radius around each sample within which no input changes the class, margin / (√2 bound).

    The margin is z_y − max z_j, j ≠ y; a difference of two logits is √2 bound-Lipschitz. 0 where the sample is
    misclassified. The share of samples with radius > eps is the certified accuracy at eps.

    Args:
        model: classifier returning logits [B, C >= 2]; in eval mode, its state is restored.
        x (Tensor): inputs in [0, 1], [B, ...]. y (Tensor): labels [B], integer.
        bound: of the logits in l2, > 0; default lipschitz(model, x).

    Returns:
        Tensor: [B], float64, in the units of x.

    Raises:
        ValueError, TypeError, ShapeError, NonFiniteError: bad argument, the model's output, or from lipschitz.

    Notes: a proof in real arithmetic; the rounding of the logits, relative 1e-6 or so in float32, is not in it.
    Source: Tsuzuku, Sato, Sugiyama, Lipschitz-margin training (arXiv 1802.04034), proposition 1.
    """
    check_batch("certified_radius", x, y)
    if bound is None:
        bound = lipschitz(model, x)
    if isinstance(bound, LipschitzReport):
        bound = bound.bound
    if not isinstance(bound, numbers.Real) or not bound >= 0:
        raise ValueError(f"certified_radius: bound must be >= 0, got {bound!r}")
    with frozen(model), torch.no_grad():
        logits = model(x)
    check_logits("certified_radius", logits, y)
    if logits.shape[1] < 2:
        raise ValueError(f"certified_radius: the model must have at least 2 classes, got {logits.shape[1]}")
    logits, own = logits.double(), F.one_hot(y.long(), logits.shape[1]).bool()
    margin = logits[own] - logits.masked_fill(own, -math.inf).amax(1)
    return torch.where(margin > 0, margin / (math.sqrt(2) * bound), 0)


def misalignment(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """How far each layer's inputs are from the layer's row space: |z| / |Vᵀ z|, by layer name and sample.

    The condition number of a layer at z is |W| |z| / |W z| <= kappa |z| / |Vᵀ z|: bounding kappa bounds the first
    factor only. The second is 1 where z lies in the row space, infinite where the layer does not see z at all.

    Args:
        model: any module with nn.Linear, nn.Conv or low-rank layers; run in eval mode, its state is restored.
        x: inputs [B, ...] of the model.

    Returns:
        {name: Tensor}, float64 [B'] per layer, B' the first dimension of the layer's inputs over all its calls. z is
        all of a sample that goes into the layer: for a sequence the tokens together, for a convolution the patches
        (its norm over |Vᵀ patches|; the patches' own norm is between |x| and √(prod(kernel_size)) |x| at stride 1).
        Of a zero input 1. Layers that are not called are missing.

    Raises:
        ValueError: no such layer was called. TypeError: no module.

    Source: the factor left out where kappa stands for the relative sensitivity of a layer, as in Savostianova et al.,
        NeurIPS 2023, section 2; for fat and low-rank weights it is not 1.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"misalignment: model must be a torch.nn.Module, got {type(model).__name__}")
    found: dict[str, list[Tensor]] = {}
    handles = []
    for name, module in model.named_modules():
        if is_plain(module, (*LINEAR, *CONV)):
            hook = _hook(found.setdefault(name, []))
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        with frozen(model), torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    ratios = {name: torch.cat(parts) for name, parts in found.items() if parts}
    if not ratios:
        raise ValueError(f"misalignment: the model must call nn.Linear, nn.Conv or low-rank layers, got {model}")
    return ratios


def _hook(ratios: list[Tensor]):
    def measure(module: nn.Module, args, kwargs) -> None:
        z = args[0] if args else kwargs["input"]
        ratios.append(_ratio(module, z.detach().double()))

    return measure


def _ratio(module: nn.Module, z: Tensor) -> Tensor:
    V = _row_basis(module)
    if is_plain(module, LINEAR):
        z = z.reshape(-1, z.shape[-1]) if z.ndim == 1 else z
        whole, seen = z.square(), (z @ V).square()
    else:
        kernel, groups = module.kernel_size, module.groups
        z = z[None] if z.ndim == len(kernel) + 1 else z
        z = F.pad(z, flat_padding(module), mode="constant" if module.padding_mode == "zeros" else module.padding_mode)
        conv = (F.conv1d, F.conv2d, F.conv3d)[len(kernel) - 1]
        geometry = {"stride": module.stride, "dilation": module.dilation, "groups": groups}
        repeat = (groups, *[1] * (1 + len(kernel)))
        filters = V.mT.reshape(-1, z.shape[1] // groups, *kernel)
        whole = conv(z.square(), torch.ones_like(filters[:1]).repeat(repeat), **geometry)
        seen = conv(z, filters.repeat(repeat), **geometry).square()
    whole, seen = (t.flatten(1).sum(1) for t in (whole, seen))
    ratio = (whole / torch.where(seen > 0, seen, 1)).sqrt().clamp_min(1)
    return torch.where(seen > 0, ratio, torch.where(whole > 0, torch.inf, 1.0))


def _row_basis(module: nn.Module) -> Tensor:
    """[n, k] in float64: an orthonormal basis of the row space of the flattened weight, and zero columns."""
    if isinstance(module, LowRankLayer):
        return linalg.orthonormalize(module.V.detach()[:, : module.active_rank].double())
    _, sigma, V = linalg.svd(module.weight.detach().flatten(1).double())
    return V * (sigma > sigma[0] * len(V) * torch.finfo(torch.float64).eps)
