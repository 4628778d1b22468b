"""Any product L C Rᵀ as U S Vᵀ with orthonormal U and V."""

import torch
from torch import Tensor

from . import linalg
from .reference import ORTHONORMAL_STEP, orthonormality_error


def orthonormal_factors(L: Tensor, C: Tensor, R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U [m, r], S [r, r], V [n, r] with U S Vᵀ = L C Rᵀ, U and V orthonormal.

    L = Q_L R_L and R = Q_R R_R, and S = R_L C R_Rᵀ absorbs the triangles; r is the smaller of the two sides. Columns
    of L and R that C does not touch are left out first.

    Args:
        L: [m, k]. C: [k, l]. R: [n, l]. float16 and bfloat16 are computed in float32 and returned so.
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
    if C.shape[0] > C.shape[1]:  # the left side has directions that the core does not reach
        Q, T = linalg.qr(C)
        return U @ Q, T, V
    if C.shape[0] < C.shape[1]:
        Q, T = linalg.qr(Ct)
        return U, T.mT.contiguous(), V @ Q
    return U, C.contiguous(), V


def _absorb(L: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Q, R C with Q R = L, or L, C where L is orthonormal already."""
    if L.shape[1] <= L.shape[0] and orthonormality_error(L) <= ORTHONORMAL_STEP:
        return L.contiguous(), C
    Q, T = linalg.qr(L)
    return Q, T @ C
