"""Ranks as ints, fractions or shares of the energy."""

import math
import numbers
from typing import TypeAlias

import torch
from torch import Tensor

from ..errors import NonFiniteError, RankError


class Energy:
    """A rank chosen by the weight: the smallest r whose leading singular values hold this share of ‖W‖_F².

    Args:
        share: In (0, 1].

    Raises:
        RankError: share is outside (0, 1].
        TypeError: share is no number.

    Examples:
        >>> report = condlr_ext.factorize(model, rank=condlr_ext.Energy(0.9))
    """

    share: float

    def __init__(self, share: float):
        if isinstance(share, bool) or not isinstance(share, numbers.Real):
            raise TypeError(f"Energy: share must be a number, got {share!r}")
        if not 0 < share <= 1:
            raise RankError(f"Energy: share must be in (0, 1], got {share}")
        self.share = float(share)

    def __repr__(self) -> str:
        return f"Energy({self.share:g})"

    def rank_of(self, W: Tensor, where: str) -> int:
        """Return the rank for the matrix W [m, n]; 1 if it is zero. `where` begins error texts."""
        if W.is_meta:
            raise ValueError(f"{where}: rank={self} needs the values of the weight, which is on the meta device")
        if not torch.isfinite(W).all():
            raise NonFiniteError(f"{where}: the weight must be finite, got NaN or Inf")
        W = W.detach().double()
        W = W / W.abs().max().clamp_min(torch.finfo(torch.float64).tiny)  # keeps squares in range
        gram = W @ W.mT if W.shape[0] < W.shape[1] else W.mT @ W
        held = torch.linalg.eigvalsh(gram).clamp_min(0).flip(0).cumsum(0)
        # values below the rounding of the sum do not count: a matrix of rank r has all its energy in r values
        enough = self.share * held[-1] - held.numel() * torch.finfo(torch.float64).eps * held[-1]
        return int((held < enough).sum()) + 1


Rank: TypeAlias = float | Energy
RankOrRanks: TypeAlias = Rank | dict[str, int] | dict[str, Rank]


def resolve_rank(rank: Rank, m: int, n: int, where: str, weight: Tensor | None = None) -> int:
    """Return the rank that an int, a fraction f in (0, 1] or an Energy stands for; f means ceil(f min(m, n)).

    Args:
        rank: An int, a fraction or an Energy.
        m: Rows of the weight as a matrix.
        n: Its columns.
        where: First words of error texts.
        weight: The matrix [m, n] that an Energy is measured on; without it an Energy is refused.

    Raises:
        RankError: An int outside 1..min(m, n), or a fraction outside (0, 1].
        TypeError: rank is none of these.
    """
    full = min(m, n)
    if isinstance(rank, Energy) and weight is not None:
        return rank.rank_of(weight, where)
    if isinstance(rank, bool) or not isinstance(rank, numbers.Real):
        forms = "an int or a fraction of min(m, n)" + (", or an Energy" if weight is not None else "")
        raise TypeError(f"{where}: rank must be {forms}, got {rank!r}")
    if isinstance(rank, numbers.Integral):
        if not 1 <= rank <= full:
            raise RankError(f"{where}: rank must be in 1..min(m, n) = {full} for a {m} x {n} weight, got {rank}")
        return int(rank)
    if not 0 < rank <= 1:
        raise RankError(f"{where}: rank as a fraction must be in (0, 1], got {rank}")
    return max(1, math.ceil(rank * full - 1e-9))
