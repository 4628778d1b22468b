"""TSCNC's two penalties: transformed-l1 sparsity of channels (TSC) and the condition-number constraint (CNC).

The paper is arXiv 2503.20454 (Feng, Lin, Gao, Wei). form="released" is what its public code computes, of which two
things are not what the names say; form="corrected", the default, is what they say.
"""

import math
import numbers
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .. import linalg
from .._modules import DENSE, select_layers
from ..errors import NonFiniteError
from ..nn import LowRankLayer
from ..ops import can_check, no_autocast
from ..pruning.gates import HardConcreteGate
from .condition import check_floor, log_volumes
from .matrices import Matrices, total

FORMS = ("corrected", "released")


def transformed_l1(t: Tensor, a: float) -> Tensor:
    """(a + 1) |t| / (a + |t|), entry by entry: the count of non-zeros for a → 0, |t| for a → ∞.

    Args:
        t: any shape. a: > 0.

    Source: Zhang and Xin (arXiv 1411.5735), eq. 2.1.
    """
    _check_positive("regularizers.transformed_l1", "a", a)
    return (a + 1) * t.abs() / (a + t.abs())


def tsc(
    model: nn.Module,
    *,
    exclude: str | Iterable[str] = (),
    a: float = 100.0,
    prior_precision: float = 25.0,
    cost: float = 1e-3,
    form: str = "corrected",
) -> Tensor:
    """Σ over output channels of the transformed l1 of t = p (prior_precision ‖w‖² / 2 + cost n).

    w [n] is the channel's row of the flattened weight and p the probability that its gate is open
    (pruning.add_gates; 1 without gates), so that t is the expected l0 and l2 cost of the channel. The released code
    multiplies the sum by λ / N, λ = 1 or 10 and N training samples: so does the caller.

    Args:
        model: all its nn.Linear, nn.Conv (gated or not) and low-rank layers. Of the latter the rows of U S, whose
            norms are those of W = U S Vᵀ while V is orthonormal; W is never formed. Of a gated layer the weight
            before gates and masks.
        exclude: layer names or fnmatch patterns to leave out; the released code leaves out the first convolution
            and the classifier.
        a: > 0, where the penalty bends. prior_precision: >= 0, N times the weight decay. cost: >= 0, of each weight.
        form: "corrected": (a + 1) t / (a + t). "released": (a + 1) t / (a − t), as a slip of sign has it: steeper the
            larger t, infinite at t = a and negative above.

    Returns:
        A scalar.

    Raises:
        TypeError, ValueError: bad argument. NonFiniteError: a penalty that is not finite, by layer on CPUs.

    Source: public code of arXiv 2503.20454; t is eq. 9 of Louizos, Welling, Kingma (arXiv 1712.01312) with its prior.
    """
    where = "regularizers.tsc"
    _check_form(where, form)
    _check_positive(where, "a", a)
    for name, value in (("prior_precision", prior_precision), ("cost", cost)):
        if not isinstance(value, numbers.Real) or not 0 <= value < math.inf:
            raise ValueError(f"{where}: {name} must be a finite number >= 0, got {value!r}")
    sums = []
    for name, layer in select_layers(where, model, (LowRankLayer, *DENSE), exclude).items():
        with no_autocast(next(layer.parameters()).device.type):
            energy, n, p = _channels(layer)
            t = p * (prior_precision / 2 * energy + cost * n)
            values = transformed_l1(t, a) if form == "corrected" else (a + 1) * t / (a - t)
        if can_check(values) and not torch.isfinite(values).all():
            raise NonFiniteError(f"{where}: the penalty of {name} is not finite")
        sums.append(values.sum())
    return torch.stack([s.to(sums[0]) for s in sums]).sum()


def cnc(matrices: Matrices, *, floor: float = 1e-3, form: str = "corrected") -> Tensor:
    """Σ (log K)² with K = mean(σ²)^r / Π σ², as in log_volume: 0 iff all singular values are equal.

    Args:
        matrices: as in log_volume; TSCNC takes the classifier only, {"head": model.head.weight}.
        floor: as in log_volume; "released" has its own.
        form: "corrected". "released": Σ log(1e-5 + det(W Wᵀ / m))² of W [m, n] (out, in), which measures the volume,
            not the condition: it is 0 where the bracket is 1, moves with the scale of W, and is constant where
            m > n. Computed by logarithms, so the determinant cannot overflow.

    Returns:
        A scalar.

    Raises:
        TypeError, ShapeError, ValueError: bad argument. NonFiniteError: NaN or Inf in a matrix, by name.

    Source: public code of arXiv 2503.20454.
    """
    where = "regularizers.cnc"
    _check_form(where, form)
    if form == "corrected":
        check_floor(where, floor)
        return total(where, matrices, lambda A: log_volumes(A, floor) ** 2)
    return total(where, matrices, _released_cnc, transposed=False)


def _released_cnc(W: Tensor) -> Tensor:
    m, n = W.shape[-2:]
    offset = W.new_tensor(math.log(1e-5))
    sigma = linalg.svd(W).sigma
    singular = (sigma == 0).any(-1) | (m > n)  # the determinant and its gradient are 0
    log_det = 2 * torch.where(singular[..., None], 1, sigma).log().sum(-1) - m * math.log(m)
    return torch.where(singular, offset, torch.logaddexp(offset, log_det)) ** 2


def _channels(layer: nn.Module) -> tuple[Tensor, int, Tensor | float]:
    """‖w‖² [m] of the output channels, n, and the probability [m] that their gates are open."""
    if isinstance(layer, LowRankLayer):
        U, S = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (layer.U, layer.S))
        return (U @ S).square().sum(1), layer.V.shape[0], 1.0
    W, p = layer.weight, 1.0
    if parametrize.is_parametrized(layer, "weight"):
        chain = layer.parametrizations.weight
        gates = [module for module in chain if isinstance(module, HardConcreteGate)]
        if gates:
            W, p = chain.original, gates[0].open_probability()
    W = W.flatten(1).to(torch.promote_types(W.dtype, torch.float32))
    return W.square().sum(1), W.shape[1], p


def _check_form(where: str, form) -> None:
    if form not in FORMS:
        raise ValueError(f"{where}: form must be one of {', '.join(FORMS)}, got {form!r}")


def _check_positive(where: str, name: str, value) -> None:
    if not isinstance(value, numbers.Real) or not 0 < value < math.inf:
        raise ValueError(f"{where}: {name} must be a finite number > 0, got {value!r}")
