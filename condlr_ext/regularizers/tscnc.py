"""TSCNC's two penalties: transformed-l1 sparsity of channels (TSC) and the condition-number constraint (CNC).

The paper is arXiv 2503.20454 (Feng, Lin, Gao, Wei). form="released" repeats its public code, which has two slips;
form="corrected", the default, computes what the names say.
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
from .matrices import Matrices, sum_penalty

FORMS = ("corrected", "released")


def transformed_l1(t: Tensor, a: float) -> Tensor:
    """Return (a + 1) |t| / (a + |t|), entry by entry: for a → 0 whether t is non-zero, for a → ∞ |t|.

    Args:
        t: Any shape.
        a: > 0.

    Raises:
        ValueError: a is not a finite number > 0.

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
    """Return the sum over output channels of the transformed l1 of t = p (prior_precision ‖w‖² / 2 + cost n).

    w [n] is the channel's row of the flattened weight and p the probability that its gate is open
    (pruning.add_gates; 1 without gates), so that t is the expected l0 and l2 cost of the channel. The released code
    multiplies the sum by λ / N, λ = 1 or 10, N training samples; here the caller does.

    Args:
        model: All its nn.Linear, nn.Conv (gated or not) and low-rank layers count. w of a low-rank layer is the row of
            U S, which has the norm of that of W = U S Vᵀ for orthonormal V; W is never formed. w of a gated layer is
            the weight before gates and masks.
        exclude: Layer names or fnmatch patterns to leave out; the released code leaves out the first convolution
            and the classifier.
        a: > 0, the t from which on the penalty saturates.
        prior_precision: >= 0, N times the weight decay.
        cost: >= 0, cost of each weight.
        form: "corrected": (a + 1) t / (a + t). "released": (a + 1) t / (a − t), a slip of sign: steeper for larger t,
            infinite at t = a and negative above.

    Returns:
        A scalar.

    Raises:
        TypeError: model is no module.
        ValueError: An argument out of range, or no layer left.
        NonFiniteError: A penalty is not finite; names the layer on CPUs.

    Source: public code of arXiv 2503.20454; t is eq. 9 of Louizos, Welling, Kingma (arXiv 1712.01312) with its prior.
    """
    caller = "regularizers.tsc"
    _check_form(caller, form)
    _check_positive(caller, "a", a)
    for name, value in (("prior_precision", prior_precision), ("cost", cost)):
        if not isinstance(value, numbers.Real) or not 0 <= value < math.inf:
            raise ValueError(f"{caller}: {name} must be a finite number >= 0, got {value!r}")
    sums = []
    for name, layer in select_layers(caller, model, (LowRankLayer, *DENSE), exclude).items():
        with no_autocast(next(layer.parameters()).device.type):
            energy, n, p = _channels(layer)
            t = p * (prior_precision / 2 * energy + cost * n)
            values = transformed_l1(t, a) if form == "corrected" else (a + 1) * t / (a - t)
        if can_check(values) and not torch.isfinite(values).all():
            raise NonFiniteError(f"{caller}: the penalty of {name} is not finite")
        sums.append(values.sum())
    return torch.stack([s.to(sums[0]) for s in sums]).sum()


def cnc(matrices: Matrices, *, floor: float = 1e-3, form: str = "corrected") -> Tensor:
    """Return Σ (log K)², K = mean(σ²)^r / Π σ² as in log_volume: 0 iff all singular values are equal.

    Args:
        matrices: As in log_volume; TSCNC takes the classifier only, {"head": model.head.weight}.
        floor: As in log_volume; "released" does not use it.
        form: "corrected". "released": Σ log(1e-5 + det(W Wᵀ / m))² of W [m, n] (out, in), which measures the volume,
            not the condition number: it is 0 where the sum in brackets is 1, depends on the scale of W, and is
            constant for m > n. Computed by logarithms, so the determinant cannot overflow.

    Returns:
        A scalar.

    Raises:
        TypeError: A matrix is no real floating-point tensor.
        ShapeError: A matrix is empty or not [*, m, n].
        ValueError: No matrices, or an argument out of range.
        NonFiniteError: NaN or Inf in a matrix, by name.

    Source: public code of arXiv 2503.20454.
    """
    caller = "regularizers.cnc"
    _check_form(caller, form)
    if form == "corrected":
        check_floor(caller, floor)
        return sum_penalty(caller, matrices, lambda A: log_volumes(A, floor) ** 2)
    return sum_penalty(caller, matrices, _released_cnc, transposable=False)


def _released_cnc(W: Tensor) -> Tensor:
    m, n = W.shape[-2:]
    offset = W.new_tensor(math.log(1e-5))
    sigma = linalg.svd(W).sigma
    singular = (sigma == 0).any(-1) | (m > n)  # the determinant and its gradient are 0
    log_det = 2 * torch.where(singular[..., None], 1, sigma).log().sum(-1) - m * math.log(m)
    return torch.where(singular, offset, torch.logaddexp(offset, log_det)) ** 2


def _channels(layer: nn.Module) -> tuple[Tensor, int, Tensor | float]:
    """Return ‖w‖² [m] of the output channels, n, and the probability [m] that their gates are open (1.0: no gates)."""
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


def _check_form(caller: str, form) -> None:
    if form not in FORMS:
        raise ValueError(f"{caller}: form must be one of {', '.join(FORMS)}, got {form!r}")


def _check_positive(caller: str, name: str, value) -> None:
    if not isinstance(value, numbers.Real) or not 0 < value < math.inf:
        raise ValueError(f"{caller}: {name} must be a finite number > 0, got {value!r}")
