"""Layers whose U and V are not orthonormal: their triangles go into the core, gradients into the new basis."""

import torch
from torch import Tensor

from .. import linalg


def absorb_triangles(U: Tensor, S: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """Replace U and V by their Q and S by R_U S R_Vᵀ, in place: the weight stays. Return R_U and R_V in float64."""
    (Q_U, R_U), (Q_V, R_V) = (linalg.qr(X.double()) for X in (U, V))
    S.copy_(R_U @ S.double() @ R_V.mT)
    U.copy_(Q_U)
    V.copy_(Q_V)
    return R_U, R_V


def in_new_basis(grads: list[Tensor], R_U: Tensor, R_V: Tensor) -> list[Tensor]:
    """Return gradients with respect to U, S, V, bias as those with respect to Q_U, R_U S R_Vᵀ, Q_V, bias.

    With W = U S Vᵀ: dQ_U = dU R_Uᵀ, dQ_V = dV R_Vᵀ and dS' = R_U⁻ᵀ dS R_V⁻¹, 0 where a triangle is singular. Empty
    tensors stay empty.
    """
    dU, dS, dV, bias = grads
    new = [dU, dS, dV]
    if dU.numel():
        new[0] = dU.double() @ R_U.mT
    if dS.numel():
        left, right = (torch.linalg.inv_ex(R).inverse for R in (R_U, R_V))
        regular = all(R.norm() * inverse.norm() < 1e8 for R, inverse in ((R_U, left), (R_V, right)))  # NaN fails
        new[1] = left.mT @ dS.double() @ right if regular else torch.zeros_like(dS)
    if dV.numel():
        new[2] = dV.double() @ R_V.mT
    return [*(x.to(g.dtype) for x, g in zip(new, grads[:3], strict=True)), bias]
