"""Orthonormal factors of a product L C Rᵀ."""

import torch
from torch import Tensor

from . import linalg
from .reference import ORTHONORMAL_STEP, orthonormality_error


def orthonormal_factors(L: Tensor, C: Tensor, R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U [m, r], S [r, r], V [n, r] with U S Vᵀ = L C Rᵀ, U and V orthonormal.

    With L = Q_L R_L and R = Q_R R_R, S = R_L C R_Rᵀ; r <= min(k, l). Columns of L and R that meet only zeros in C are
    dropped first.

    Args:
        L: [m, k]; float16 and bfloat16 are computed and returned in float32.
        C: [k, l].
        R: [n, l].
    """
    dtype = torch.promote_types(C.dtype, torch.float32)
    L, C, R = (t.detach().to(dtype) for t in (L, C, R))
    used_rows, used_columns = (C != 0).any(1), (C != 0).any(0)
    if C.shape[0] == C.shape[1]:  # one index for both sides: a square core stays square
        used_rows = used_columns = used_rows | used_columns
    if used_rows.any():
        L, C, R = L[:, used_rows], C[used_rows][:, used_columns], R[:, used_columns]
    U, C = _absorb(L, C)
    V, Ct = _absorb(R, C.mT)
    C = Ct.mT
    if C.shape[0] > C.shape[1]:  # the columns of C span fewer directions than U has
        Q, T = linalg.qr(C)
        return U @ Q, T, V
    if C.shape[0] < C.shape[1]:
        Q, T = linalg.qr(Ct)
        return U, T.mT.contiguous(), V @ Q
    return U, C.contiguous(), V


def _absorb(L: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Return Q, R C with Q R = L, or L, C where L is orthonormal already."""
    if L.shape[1] <= L.shape[0] and orthonormality_error(L) <= ORTHONORMAL_STEP:
        return L.contiguous(), C
    Q, T = linalg.qr(L)
    return Q, T @ C
