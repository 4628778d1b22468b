"""Truncated-SVD pruning: replace each weight of a trained dense network by its best low-rank approximation."""

import bisect
import copy
import dataclasses
import math
import numbers

from torch import Tensor, nn

from .. import reference
from .._modules import check_module
from .._types import Layers
from ..factorize import FactorizeReport, factorize
from ..factorize.budget import stored_parameters
from ..linalg import svd
from ..nn.rank import RankOrRanks
from .rank_adaptive import kept_rank


def svd_prune(
    model: nn.Module,
    *,
    rank: RankOrRanks | None = None,
    tolerance: float | None = None,
    budget: float | None = None,
    include: Layers | None = None,
    exclude: Layers | None = None,
) -> FactorizeReport:
    """Prune the singular values of a dense network's weights, in place: its layers become low-rank layers.

    Give exactly one of rank, tolerance and budget. Fine-tune afterwards with any optimizer.

    Args:
        model: Changed in place; unchanged after an error.
        rank: The ranks, as in factorize.
        tolerance: In [0, 1); each layer gets the least rank whose dropped singular values have a norm below
            tolerance ‖W‖_F.
        budget: Share of the layers' weights to keep, in (0, inf), counted as stored r (m + n) + r²; the least tolerance
            that meets it, the same for all layers, is used. (factorize's own budget is spent evenly instead.)
        include: As in factorize.
        exclude: As in factorize.

    Returns:
        The report of factorize.

    Raises:
        ValueError: Not exactly one of rank, tolerance and budget, one out of range, or as in factorize.

    Source: Eckart and Young (1936); pruning by the singular values' energy as in Yang et al., Learning low-rank deep
        neural networks, CVPR Workshops 2020, without its training for sparse singular values.
    """
    check_module("svd_prune", model)
    given = {"rank": rank, "tolerance": tolerance, "budget": budget}
    if sum(value is not None for value in given.values()) != 1:
        raise ValueError(f"svd_prune: give one of rank, tolerance and budget, got {given}")
    if rank is not None:
        return factorize(model, rank=rank, include=include, exclude=exclude)
    name, value = ("tolerance", tolerance) if budget is None else ("budget", budget)
    upper = 1 if budget is None else math.inf
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 <= value < upper or value == budget == 0:
        raise ValueError(f"svd_prune: {name} must be in {'[0, 1)' if budget is None else '(0, inf)'}, got {value!r}")
    # the cores of a copy at full rank have the spectra of the weights
    full = copy.deepcopy(model)
    layers = factorize(full, rank=1.0, include=include, exclude=exclude).layers
    spectra = {x.name: svd(full.get_submodule(x.name).S.detach()).sigma for x in layers}
    if budget is not None:
        tolerance = _least_tolerance(budget, spectra, {x.name: (x.m, x.n) for x in layers if not x.tied_to})
    report = factorize(model, rank=_ranks(spectra, tolerance), include=include, exclude=exclude)
    return report if budget is None else dataclasses.replace(report, budget=budget)


def _ranks(spectra: dict[str, Tensor], tolerance: float) -> dict[str, int]:
    return {name: kept_rank(sigma, tolerance) for name, sigma in spectra.items()}


def _least_tolerance(budget: float, spectra: dict[str, Tensor], shapes: dict[str, tuple[int, int]]) -> float:
    """Return the least tolerance whose ranks cost at most budget * Σ m n; if none does, one that gives rank 1."""
    dense = sum(m * n for m, n in shapes.values())

    def affordable(tolerance: float) -> bool:
        ranks = _ranks(spectra, tolerance)
        return sum(stored_parameters(ranks[name], *shape) for name, shape in shapes.items()) <= budget * dense

    tails = []  # relative norms dropped by each rank of each layer; between them no rank changes
    for sigma in spectra.values():
        squares = (sigma.double() / reference.magnitude(sigma, -1)).square()
        if squares.any():
            tails += (squares.flip(0).cumsum(0).flip(0)[1:] / squares.sum()).sqrt().tolist()
    candidates = sorted({0.0} | {tail * (1 + 1e-9) for tail in tails})
    return candidates[min(bisect.bisect_left(candidates, True, key=affordable), len(candidates) - 1)]
