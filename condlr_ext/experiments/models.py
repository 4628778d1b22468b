"""The networks of the experiments and the spectra of their layers."""

import copy
from collections import OrderedDict

import torch
from torch import Tensor, nn

import condlr_ext

from ..baselines import TwoFactorLinear, vanilla_low_rank
from ..nn import LowRankLinear

HIDDEN = 256
HEAD = "head"


def mlp(features: int, classes: int) -> nn.Sequential:
    """features - 256 - 256 - classes with ReLU; the classifier is named "head" and always left dense."""
    return nn.Sequential(
        OrderedDict(
            fc1=nn.Linear(features, HIDDEN),
            relu1=nn.ReLU(),
            fc2=nn.Linear(HIDDEN, HIDDEN),
            relu2=nn.ReLU(),
            head=nn.Linear(HIDDEN, classes),
        )
    )


def compress(model: nn.Module, method: str, **sizing) -> dict[str, int]:
    """Give the model its low-rank layers, in place; sizing as for factorize. Returns {layer: rank}."""
    if method == "dense":
        return {}
    if method == "condlr":
        return _ranks(condlr_ext.factorize(model, exclude=HEAD, **sizing))
    ranks = _ranks(condlr_ext.factorize(copy.deepcopy(model), exclude=HEAD, **sizing))
    vanilla_low_rank(model, ranks)
    return ranks


def _ranks(report) -> dict[str, int]:
    return {layer.name: layer.rank for layer in report.layers}


def core(layer: nn.Module) -> Tensor:
    """A float64 matrix with the singular values of the layer's weight, [r, r] if the layer is low-rank.

    Of U S Vᵀ it is S as stored, which has them while U and V are orthonormal; of A B it is R_A R_Bᵀ.
    """
    if isinstance(layer, LowRankLinear):
        return layer.S.detach().double()
    if isinstance(layer, TwoFactorLinear):
        down, up = (part.weight.detach().double() for part in layer)
        return torch.linalg.qr(up, mode="r").R @ torch.linalg.qr(down.mT, mode="r").R.mT
    return layer.weight.detach().double()


def orthonormality_error(layer: LowRankLinear) -> Tensor:
    """The largest entry of |UᵀU - I| and |VᵀV - I|, in float64."""
    errors = []
    for X in (layer.U.detach().double(), layer.V.detach().double()):
        gram = X.mT @ X
        gram.diagonal().sub_(1)
        errors.append(gram.abs().max())
    return torch.stack(errors).max()


def weight_count(layer: nn.Module) -> int:
    """Stored weights without the bias."""
    return sum(p.numel() for name, p in layer.named_parameters() if not name.endswith("bias"))
