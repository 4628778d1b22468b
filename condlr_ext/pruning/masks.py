"""Weight pruning with a learned mask: the k weights of each layer with the largest scores, straight-through."""

import math
import numbers

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .._modules import DENSE, select_layers
from .gates import HardConcreteGate, check_weight, original


def top_k_mask(scores: Tensor, k: int) -> Tensor:
    """Ones at the k largest entries of scores and zeros elsewhere; its gradient is passed on to scores unchanged.

    Args:
        scores: any shape. k: 0 <= k <= scores.numel(); of equal scores, as many as are needed are taken.

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
    """Keeps of a weight the share `keep` with the largest |scores|: a parametrization of torch.nn.utils.

    Args:
        weight: the weight to be masked. scores start at √(6 / fan_in) weight / max |weight|, so that the first mask is
            that of magnitude pruning.
        keep: share in (0, 1]; ceil(keep * numel) weights are kept.

    Source: the start of the scores is HYDRA's (Sehwag et al., arXiv 2002.10509, section 4).
    """

    def __init__(self, weight: Tensor, keep: float):
        super().__init__()
        self.k = math.ceil(keep * weight.numel() - 1e-9)
        self.trained = weight.requires_grad  # what freeze_masks and make_permanent give it back
        weight = weight.detach()
        peak = weight.abs().amax()
        scale = math.sqrt(6 / weight[0].numel()) / torch.where(peak > 0, peak, 1)
        self.scores = nn.Parameter(weight * scale)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * top_k_mask(self.scores.abs(), self.k)


def add_masks(model: nn.Module, keep: float, *, exclude=()) -> list[str]:
    """Puts a TopKMask on the weight of every nn.Linear and nn.Conv1d/2d/3d, in place, and freezes these weights.

    What trains now are the scores `<layer>.parametrizations.weight.<i>.scores` (and whatever is not masked): make the
    optimizer after this call. Then freeze_masks, fine-tune, make_permanent. Gates may be there already. Low-rank
    layers are left alone: zeros in a factor would end its orthonormality; their pruning is the rank.

    Args:
        model: changed in place.
        keep: share of each layer's weights to keep, in (0, 1].
        exclude: layer names or fnmatch patterns to leave alone.

    Returns:
        The names of the masked layers.

    Raises:
        TypeError, ValueError: bad argument, no layer, a layer masked already, or a weight that two layers share or
            that torch.nn.utils keeps in several tensors (weight_norm). The model is then unchanged.
    """
    if not isinstance(keep, numbers.Real) or not 0 < keep <= 1:
        raise ValueError(f"add_masks: keep must be a number in (0, 1], got {keep!r}")
    layers = select_layers("add_masks", model, DENSE, exclude)
    for name, layer in layers.items():
        if _mask(layer) is not None:
            raise ValueError(f"add_masks: {name} has a mask already; make_permanent first")
        check_weight("add_masks", model, name, layer)
    for layer in layers.values():
        mask = TopKMask(original(layer), keep).train(layer.training)
        parametrize.register_parametrization(layer, "weight", mask)
        original(layer).requires_grad_(False)
    return list(layers)


def freeze_masks(model: nn.Module) -> None:
    """Ends the search for masks: the scores stay as they are, the masked weights train again.

    Raises:
        ValueError: a model without masks.
    """
    layers = [layer for layer in model.modules() if _mask(layer) is not None]
    if not layers:
        raise ValueError("freeze_masks: the model must have masks (add_masks), got none")
    for layer in layers:
        _mask(layer).scores.requires_grad_(False)
        original(layer).requires_grad_(_mask(layer).trained)


def make_permanent(model: nn.Module) -> list[str]:
    """Takes masks and gates off again: the weights become what eval mode makes of them, zeros included.

    Returns:
        The names of the layers changed.

    Raises:
        ValueError: a model without masks and gates.
    """
    layers = {name: layer for name, layer in model.named_modules() if _pruned(layer)}
    if not layers:
        raise ValueError("make_permanent: the model must have masks or gates, got none")
    for layer in layers.values():
        layer.parametrizations.weight.eval()
        # removal edits the class torch made for the layer, which a deep copy of the layer shares
        shared = type(layer)
        members = {key: value for key, value in vars(shared).items() if key not in ("__dict__", "__weakref__")}
        layer.__class__ = type(shared.__name__, shared.__bases__, members)
        mask = _mask(layer)
        trained = original(layer).requires_grad if mask is None else mask.trained
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
        layer.weight.requires_grad_(trained)
    return list(layers)


@torch.no_grad()
def kept_shares(model: nn.Module, *, exclude=()) -> dict[str, float]:
    """{layer: share of its weights that are not zero} of every nn.Linear and nn.Conv1d/2d/3d, as eval mode has them."""
    shares = {}
    for name, layer in select_layers("kept_shares", model, DENSE, exclude).items():
        if parametrize.is_parametrized(layer, "weight"):
            modes = [(module, module.training) for module in layer.parametrizations.weight.modules()]
            layer.parametrizations.weight.eval()
            weight = layer.weight
            for module, training in modes:
                module.training = training
        else:
            weight = layer.weight
        shares[name] = (weight != 0).double().mean().item()
    return shares


def _pruned(layer: nn.Module) -> bool:
    return parametrize.is_parametrized(layer, "weight") and any(
        isinstance(module, (TopKMask, HardConcreteGate)) for module in layer.parametrizations.weight
    )


def _mask(layer: nn.Module) -> TopKMask | None:
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    return next((module for module in layer.parametrizations.weight if isinstance(module, TopKMask)), None)
