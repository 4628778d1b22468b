"""ReleasedCondLR: the optimizer of the code released with the CondLR paper, with its quirks."""

import math
import numbers

import torch
from torch import Tensor

from .. import reference
from .._types import ModelOrGroups
from .layerwise import LayerSGD


class ReleasedCondLR(LayerSGD):
    """The step of CondLR's released research code, to repeat published runs.

    It is a baseline: optim.CondLRSGD does what the paper says. In one step, with k = 1 + tau:

    1. every parameter: g <- grad + weight_decay * p; with momentum, g <- momentum * buffer + g (in the first step g);
    2. U and V: g <- c (I - U Uᵀ) g, with the n x n projector formed. tau > 0: c = 1 in the first step, then
       (sigma_r / sigma_1)² of the last clamped core. tau = 0: always c = 1 / a, a the mean singular value of the core
       at construction;
    3. buffer <- g, after projection and scaling, so that the momentum of U and V is momentum * c, and that of
       directions which become normal to the manifold is lost; p <- p - lr g;
    4. U, V <- Q of their QR, columns times sign(diag R) (0 leaves a zero column), R dropped; 4 and 5 also for layers
       without gradients;
    5. tau > 0: the singular values of S are clamped, one by one, to mean ± mean (k - 1) / (k + 1) with their arithmetic
       mean; c is computed anew. tau = 0: S <- sqrt(a) Q, a = tr(S Sᵀ) / r, Q the sign-fixed QR factor of S, which is
       not the nearest orthogonal matrix.

    Nothing is projected or clamped at construction: the bound holds from the first step on.

    Two things differ on purpose: NaN and Inf raise, where the released code goes on or fails inside the SVD, and if
    LAPACK's SVD fails in float32 it is computed in float64.

    Args:
        model: A module with low-rank layers, or parameter groups from optim.param_groups.
        lr: Step size.
        momentum: As in torch.optim.SGD.
        weight_decay: As in torch.optim.SGD, of every parameter.
        tau: Finite slack >= 0; the released code's option `eps` is 1 + tau.

    Raises:
        ValueError: Options out of range, a model without low-rank layers, factors neither float32 nor float64.
        NonFiniteError: NaN or Inf in a factor.

    Source: a description of the released code of Savostianova et al., Robust low-rank training via approximate
        orthonormal constraints, NeurIPS 2023; written anew from it, without copying a line.
    """

    def __init__(
        self, model: ModelOrGroups, lr: float, momentum: float = 0.0, weight_decay: float = 0.0, *, tau: float
    ):
        super().__init__(model, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, tau=tau))
        if not self._layers:
            raise ValueError("ReleasedCondLR: model must have low-rank layers (see condlr_ext.factorize), got none")
        for group in self.param_groups:
            value = group["tau"]
            if not isinstance(value, numbers.Real) or not 0 <= value < math.inf:
                raise ValueError(f"ReleasedCondLR: tau must be a finite number >= 0 (kappa <= 1 + tau), got {value!r}")
        for name, _, S, _ in self._layers:
            scale = torch.ones((), dtype=S.dtype, device=S.device)
            if self._group_of[S]["tau"] == 0:
                mean = svd(S.detach())[1].mean()
                if mean == 0:
                    raise ValueError(f"ReleasedCondLR: S of layer {name!r} must not be zero where tau = 0")
                scale = 1 / mean
            self.state[S]["scale"] = scale

    def _link(self) -> None:
        super()._link()
        self._core_of = {X: S for _, U, S, V in self._layers for X in (U, V)}

    def _direction(self, p: Tensor, direction: Tensor) -> Tensor:
        core = self._core_of.get(p)
        return direction if core is None else self.tangent(p, direction) * self.state[core]["scale"]

    @staticmethod
    def tangent(X: Tensor, direction: Tensor) -> Tensor:
        """Return (I - X Xᵀ) direction as released: the n x n matrix is formed, most of the step's time."""
        return (torch.eye(len(X), dtype=X.dtype, device=X.device) - X @ X.mT) @ direction

    def _constrain(self, new: dict[Tensor, Tensor]) -> None:
        for _, U, S, V in self._layers:
            for X in (U, V):
                new[X] = sign_fixed_q(new.get(X, X))
            core, tau = new.get(S, S), self._group_of[S]["tau"]
            if tau > 0:
                new[S], new[self.state[S]["scale"]] = clamp_spectrum(core, tau)
            else:
                new[S] = reference.norm(core) / len(core) ** 0.5 * sign_fixed_q(core)


def clamp_spectrum(S: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """Return S with its singular values clamped to the band around their mean, and (sigma_r / sigma_1)² of it."""
    P, sigma, Qh = svd(S)
    mean = sigma.mean()
    half = mean * tau / (2 + tau)
    for i in range(len(sigma)):  # one by one as released: benchmarks time this step
        sigma[i] = torch.clamp(sigma[i], mean - half, mean + half)
    return (P * sigma) @ Qh, (sigma[-1] / sigma[0]).square()


def sign_fixed_q(X: Tensor) -> Tensor:
    Q, R = torch.linalg.qr(X)
    return Q * R.diagonal().sign()


def svd(A: Tensor):
    """Return torch.linalg.svd(A), in float64 if LAPACK raises or returns NaN, as it does on some clamped cores."""
    try:
        result = torch.linalg.svd(A)
        if all(torch.isfinite(t).all() for t in result):
            return result
    except torch.linalg.LinAlgError:
        pass
    return tuple(t.to(A.dtype) for t in torch.linalg.svd(A.double()))
