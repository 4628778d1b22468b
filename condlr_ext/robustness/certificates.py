"""Certified radii of samples, and the factor of a layer's condition number that kappa does not bound."""

import math
import numbers

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import linalg, reference
from .._checks import check_batch, check_logits
from .._modules import check_module, frozen
from ..nn import LowRankLayer
from .layer_norms import CONV, LINEAR, flat_padding, is_plain
from .lipschitz_bound import LipschitzReport, lipschitz


def certified_radius(model: nn.Module, x: Tensor, y: Tensor, bound: float | LipschitzReport | None = None) -> Tensor:
    """Return the l2 radius around each sample within which no input changes the class, margin / (√2 bound).

    The margin is z_y − max z_j, j ≠ y; a difference of two logits is √2 bound-Lipschitz. The share of samples with
    radius > eps is the certified accuracy at eps.

    Args:
        model: Classifier returning logits [B, C >= 2]; run in eval mode, its state is restored.
        x: Inputs in [0, 1], [B, ...], floating point.
        y: Labels [B], integer.
        bound: Lipschitz constant of the logits in l2, >= 0, or the report of lipschitz; default lipschitz(model, x).

    Returns:
        Radii [B], float64, in the units of x; 0 for misclassified samples.

    Raises:
        ValueError: An argument out of range, or one class only; without bound, a model that lipschitz cannot bound.
        TypeError: An argument of the wrong type.
        ShapeError: Shapes of the arguments or of the logits.
        NonFiniteError: NaN or Inf in the logits or, without bound, in a layer.

    Notes:
        The proof is in real arithmetic: it leaves out the rounding of the logits, about 1e-6 relative in float32.

    Source: Tsuzuku, Sato, Sugiyama, Lipschitz-margin training (arXiv 1802.04034), proposition 1.
    """
    y = check_batch("certified_radius", x, y)
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
    logits, own = logits.double(), F.one_hot(y, logits.shape[1]).bool()
    margin = logits[own] - logits.masked_fill(own, -math.inf).amax(1)
    return torch.where(margin > 0, margin / (math.sqrt(2) * bound), 0)


def misalignment(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Measure how far each layer's inputs z are from the layer's row space: |z| / |Vᵀ z|, by layer name and sample.

    The condition number of a layer at z is |W| |z| / |W z| <= kappa |z| / |Vᵀ z|: bounding kappa bounds the first
    factor only. The second is 1 for z in the row space and infinite for z orthogonal to it.

    Args:
        model: Any module with nn.Linear, nn.Conv or low-rank layers; run in eval mode, its state is restored.
        x: Inputs [B, ...] of the model.

    Returns:
        {name: ratios [B'], float64}, B' the first dimension of the layer's inputs over all its calls. z is a sample's
        whole input of the layer: of a sequence all tokens, of a convolution all patches (whose norm is between |x| and
        √(prod(kernel_size)) |x| at stride 1). A zero input has ratio 1. Layers that are not called are missing.

    Raises:
        ValueError: No such layer was called.
        TypeError: model is no module.

    Source: Savostianova et al., NeurIPS 2023, section 2, takes kappa for the relative sensitivity of a layer, which
        leaves this factor out; for wide and low-rank weights it is not 1.
    """
    check_module("misalignment", model)
    found: dict[str, list[Tensor]] = {}
    handles = []
    for name, module in model.named_modules():
        if is_plain(module, (*LINEAR, *CONV)):
            hook = _ratio_hook(found.setdefault(name, []))
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


def _ratio_hook(ratios: list[Tensor]):
    """Return a forward pre-hook that appends the ratios of the layer's input."""

    def append_ratio(module: nn.Module, args, kwargs) -> None:
        z = args[0] if args else kwargs["input"]
        ratios.append(_ratio(module, z.detach().double()))

    return append_ratio


def _ratio(module: nn.Module, z: Tensor) -> Tensor:
    """Return |z| / |Vᵀ z| per sample, z the layer's input in float64."""
    V = _row_basis(module)
    if is_plain(module, LINEAR):
        z = z.reshape(-1, z.shape[-1]) if z.ndim == 1 else z
        z = z / reference.magnitude(z, tuple(range(1, z.ndim)))  # squares stay in range
        total, projected = z.square(), (z @ V).square()
    else:
        kernel, groups = module.kernel_size, module.groups
        z = z[None] if z.ndim == len(kernel) + 1 else z
        z = z / reference.magnitude(z, tuple(range(1, z.ndim)))
        z = F.pad(z, flat_padding(module), mode="constant" if module.padding_mode == "zeros" else module.padding_mode)
        conv = (F.conv1d, F.conv2d, F.conv3d)[len(kernel) - 1]
        geometry = {"stride": module.stride, "dilation": module.dilation, "groups": groups}
        repeat = (groups, *[1] * (1 + len(kernel)))
        filters = V.mT.reshape(-1, z.shape[1] // groups, *kernel)
        total = conv(z.square(), torch.ones_like(filters[:1]).repeat(repeat), **geometry)
        projected = conv(z, filters.repeat(repeat), **geometry).square()
    total, projected = (t.flatten(1).sum(1) for t in (total, projected))
    ratio = (total / torch.where(projected > 0, projected, 1)).sqrt().clamp_min(1)
    return torch.where(projected > 0, ratio, torch.where(total > 0, torch.inf, 1.0).to(ratio.dtype))


def _row_basis(module: nn.Module) -> Tensor:
    """Return an orthonormal basis [n, k] of the row space of the flattened weight in float64, with zero columns."""
    if isinstance(module, LowRankLayer):
        return linalg.orthonormalize(module.V.detach()[:, : module.active_rank].double())
    _, sigma, V = linalg.svd(module.weight.detach().flatten(1).double())
    return V * (sigma > sigma[0] * len(V) * torch.finfo(torch.float64).eps)
