"""Layers of a network by name, their spectra, orthonormality and sizes."""

import torch
from torch import Tensor, nn

from .._modules import DENSE
from ..baselines import TwoFactorConv, TwoFactorLinear
from ..nn import LowRankLayer
from .networks import HEAD

TWO_FACTOR = (TwoFactorLinear, TwoFactorConv)


def low_rank_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the low-rank and two-factor layers by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, (LowRankLayer, *TWO_FACTOR))}


def dense_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that could be low-rank, by name: all dense ones but the classifier and the parts of others."""
    inside = {part for m in model.modules() if isinstance(m, TWO_FACTOR) for part in m.children()}
    return {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, DENSE) and m not in inside and name.split(".")[-1] != HEAD
    }


def core(layer: nn.Module) -> Tensor:
    """Return a float64 matrix with the singular values of the layer's flattened weight, [r, r] if it is low-rank.

    For U S Vᵀ this is S as stored, right while U and V are orthonormal; for A B it is R_A R_Bᵀ.
    """
    if isinstance(layer, LowRankLayer):
        return layer.S.detach().double()
    if isinstance(layer, TWO_FACTOR):
        down, up = (part.weight.detach().flatten(1).double() for part in layer)
        return torch.linalg.qr(up, mode="r").R @ torch.linalg.qr(down.mT, mode="r").R.mT
    return layer.weight.detach().flatten(1).double()


def orthonormality_error(layer: LowRankLayer) -> Tensor:
    """Return the largest entry of |UᵀU - I| and |VᵀV - I|, in float64."""
    errors = []
    for X in (layer.U.detach().double(), layer.V.detach().double()):
        gram = X.mT @ X
        gram.diagonal().sub_(1)
        errors.append(gram.abs().max())
    return torch.stack(errors).max()


def matrix_shape(layer: nn.Module) -> tuple[int, int]:
    """Return m, n of the flattened weight."""
    if isinstance(layer, LowRankLayer):
        return len(layer.U), len(layer.V)
    return tuple(layer.weight.detach().flatten(1).shape)


def weight_count(layer: nn.Module) -> int:
    """Return the number of stored weights, without the bias."""
    return sum(p.numel() for name, p in layer.named_parameters() if not name.endswith("bias"))


def sizes(model: nn.Module, initial: nn.Module, ranks: dict[str, int], pruned: int) -> dict:
    """Return the parameters of a trained network and of the dense one, and the share of the hidden weights kept.

    Args:
        model: The trained network.
        initial: The dense network.
        ranks: {low-rank layer: rank} of the trained one.
        pruned: Zeros among its weights that need not be stored.
    """
    hidden = sum(weight_count(layer) for layer in dense_layers(initial).values())
    stored, dense = (sum(weight_count(m.get_submodule(name)) for name in ranks) for m in (model, initial))
    return {
        "parameters": sum(p.numel() for p in model.parameters()) - pruned,
        "dense_parameters": sum(p.numel() for p in initial.parameters()),
        "kept": stored / dense if ranks else 1 - pruned / hidden,
    }
