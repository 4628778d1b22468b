"""Weight pruning by a learned mask: each layer keeps the k weights with the largest scores."""

import math
import numbers

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .._modules import DENSE, check_module, frozen, select_layers
from .._types import Patterns
from .gates import HardConcreteGate, check_weight, original_weight


def top_k_mask(scores: Tensor, k: int) -> Tensor:
    """Return ones at the k largest entries of scores and zeros elsewhere; backward is the identity (straight-through).

    Args:
        scores: Any shape.
        k: 0 <= k <= scores.numel(); ties are broken arbitrarily.

    Returns:
        A tensor like scores with exactly k ones.

    Raises:
        ValueError: k is out of range.

    Source: Ramanujan et al., What's hidden in a randomly weighted neural network (arXiv 1911.13299), section 3.
    """
    if not isinstance(k, int) or not 0 <= k <= scores.numel():
        raise ValueError(f"top_k_mask: k must be in 0..{scores.numel()}, got {k!r}")
    return _TopK.apply(scores, k)


class _TopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores, k):
        mask = torch.zeros_like(scores, memory_format=torch.contiguous_format).view(-1)
        mask[scores.flatten().topk(k, sorted=False).indices] = 1
        return mask.view(scores.shape)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class TopKMask(nn.Module):
    """Keeps the share `keep` of a weight with the largest |scores|, a parametrization of torch.nn.utils.

    Args:
        weight: The weight to mask. Scores start at √(6 / fan_in) weight / max |weight|, so that the first mask is
            that of magnitude pruning.
        keep: Share in (0, 1]; ceil(keep * numel) weights are kept.

    Source: HYDRA's initial scores (Sehwag et al., arXiv 2002.10509, section 4).
    """

    k: int
    trained: bool
    scores: nn.Parameter

    def __init__(self, weight: Tensor, keep: float):
        super().__init__()
        self.k = math.ceil(keep * weight.numel() - 1e-9)
        self.trained = weight.requires_grad  # restored by freeze_masks and make_permanent
        weight = weight.detach()
        peak = weight.abs().amax()
        scale = math.sqrt(6 / weight[0].numel()) / torch.where(peak > 0, peak, 1)
        self.scores = nn.Parameter(weight * scale)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * top_k_mask(self.scores.abs(), self.k)


def add_masks(model: nn.Module, keep: float, *, exclude: Patterns = ()) -> list[str]:
    """Put a TopKMask on the weight of every nn.Linear and nn.Conv1d/2d/3d, in place, and freeze these weights.

    Trained from now on are the scores `<layer>.parametrizations.weight.<i>.scores` and all that is not masked: make
    the optimizer after this call. Then freeze_masks, fine-tune, make_permanent. Layers may have gates. Low-rank layers
    are left alone: zeros would destroy the orthonormality of their factors, and their pruning is the rank.

    Args:
        model: Changed in place; unchanged after an error.
        keep: Share of each layer's weights to keep, in (0, 1].
        exclude: Layer names or fnmatch patterns to leave alone.

    Returns:
        The names of the masked layers.

    Raises:
        TypeError: model is no module.
        ValueError: keep is out of range, no layer is left, a layer already has a mask, or a weight is shared or kept in
            several tensors (weight_norm).
    """
    if not isinstance(keep, numbers.Real) or not 0 < keep <= 1:
        raise ValueError(f"add_masks: keep must be a number in (0, 1], got {keep!r}")
    layers = select_layers("add_masks", model, DENSE, exclude)
    for name, layer in layers.items():
        if _mask(layer) is not None:
            raise ValueError(f"add_masks: {name} has a mask already; make_permanent first")
        check_weight("add_masks", model, name, layer)
    for layer in layers.values():
        mask = TopKMask(original_weight(layer), keep).train(layer.training)
        parametrize.register_parametrization(layer, "weight", mask)
        original_weight(layer).requires_grad_(False)
    return list(layers)


def freeze_masks(model: nn.Module) -> None:
    """End the search for masks: freeze the scores and train the masked weights again.

    Args:
        model: Changed in place.

    Raises:
        ValueError: The model has no masks.
    """
    check_module("freeze_masks", model)
    layers = [layer for layer in model.modules() if _mask(layer) is not None]
    if not layers:
        raise ValueError("freeze_masks: the model must have masks (add_masks), got none")
    for layer in layers:
        _mask(layer).scores.requires_grad_(False)
        original_weight(layer).requires_grad_(_mask(layer).trained)


def make_permanent(model: nn.Module) -> list[str]:
    """Remove masks and gates and leave the weights as eval mode has them, zeros included.

    Args:
        model: Changed in place.

    Returns:
        The names of the changed layers.

    Raises:
        ValueError: The model has neither masks nor gates.
    """
    check_module("make_permanent", model)
    layers = {name: layer for name, layer in model.named_modules() if _has_mask_or_gate(layer)}
    if not layers:
        raise ValueError("make_permanent: the model must have masks or gates, got none")
    for layer in layers.values():
        layer.parametrizations.weight.eval()
        # removal edits the class torch made for the layer, which a deep copy of the layer shares
        shared = type(layer)
        members = {key: value for key, value in vars(shared).items() if key not in ("__dict__", "__weakref__")}
        layer.__class__ = type(shared.__name__, shared.__bases__, members)
        mask = _mask(layer)
        trained = original_weight(layer).requires_grad if mask is None else mask.trained
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
        layer.weight.requires_grad_(trained)
    return list(layers)


@torch.no_grad()
def kept_shares(model: nn.Module, *, exclude: Patterns = ()) -> dict[str, float]:
    """Return the share of non-zero weights of every nn.Linear and nn.Conv1d/2d/3d, as eval mode has them.

    Args:
        model: Any module; its state is restored.
        exclude: Layer names or fnmatch patterns to leave out.

    Returns:
        {layer name: share in [0, 1]}.

    Raises:
        TypeError: model is no module.
        ValueError: A pattern matches no layer, or no layer is left.
    """
    layers = select_layers("kept_shares", model, DENSE, exclude)
    with frozen(model):
        return {name: (layer.weight != 0).double().mean().item() for name, layer in layers.items()}


def _has_mask_or_gate(layer: nn.Module) -> bool:
    return parametrize.is_parametrized(layer, "weight") and any(
        isinstance(module, (TopKMask, HardConcreteGate)) for module in layer.parametrizations.weight
    )


def _mask(layer: nn.Module) -> TopKMask | None:
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    return next((module for module in layer.parametrizations.weight if isinstance(module, TopKMask)), None)
