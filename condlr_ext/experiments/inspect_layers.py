"""The factorized layers of a network: their spectra, orthonormality and sizes."""

import torch
from torch import Tensor, nn

from .._modules import DENSE
from ..baselines import TwoFactorConv, TwoFactorLinear
from ..nn import LowRankLayer
from .networks import HEAD

TWO_FACTOR = (TwoFactorLinear, TwoFactorConv)


def low_rank_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if isinstance(m, (LowRankLayer, *TWO_FACTOR))}


def dense_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that could be low-rank: all dense ones but the classifier and the two of a two-factor layer."""
    inside = {part for m in model.modules() if isinstance(m, TWO_FACTOR) for part in m.children()}
    return {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, DENSE) and m not in inside and name.split(".")[-1] != HEAD
    }


def core(layer: nn.Module) -> Tensor:
    """A float64 matrix with the singular values of the layer's flattened weight, [r, r] if the layer is low-rank.

    Of U S Vᵀ it is S as stored, which has them while U and V are orthonormal; of A B it is R_A R_Bᵀ.
    """
    if isinstance(layer, LowRankLayer):
        return layer.S.detach().double()
    if isinstance(layer, TWO_FACTOR):
        down, up = (part.weight.detach().flatten(1).double() for part in layer)
        return torch.linalg.qr(up, mode="r").R @ torch.linalg.qr(down.mT, mode="r").R.mT
    return layer.weight.detach().flatten(1).double()


def orthonormality_error(layer: LowRankLayer) -> Tensor:
    """The largest entry of |UᵀU - I| and |VᵀV - I|, in float64."""
    errors = []
    for X in (layer.U.detach().double(), layer.V.detach().double()):
        gram = X.mT @ X
        gram.diagonal().sub_(1)
        errors.append(gram.abs().max())
    return torch.stack(errors).max()


def matrix_shape(layer: nn.Module) -> tuple[int, int]:
    """m, n of the flattened weight."""
    if isinstance(layer, LowRankLayer):
        return len(layer.U), len(layer.V)
    return tuple(layer.weight.detach().flatten(1).shape)


def weight_count(layer: nn.Module) -> int:
    """Stored weights without the bias."""
    return sum(p.numel() for name, p in layer.named_parameters() if not name.endswith("bias"))
