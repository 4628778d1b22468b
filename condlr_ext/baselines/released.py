"""ReleasedCondLR: the optimizer of the code released with the CondLR paper, quirk by quirk."""

import math
import numbers

import torch
from torch import Tensor

from .layerwise import LayerSGD


class ReleasedCondLR(LayerSGD):
    """What the released research code of CondLR does in a step, so that published runs can be repeated.

    It is a baseline: optim.CondLRSGD does what the paper says. In one step, with k = 1 + tau:

    1. every parameter: g <- grad + weight_decay * p; with momentum, g <- momentum * buffer + g (g at first);
    2. U and V: g <- c (I - U Uᵀ) g, with the n x n projector formed. tau > 0: c = 1 in the first step, then
       (sigma_r / sigma_1)² of the core as it was clamped last. tau = 0: c = 1 / a, with a the mean singular value
       of the core at construction, for ever;
    3. buffer <- g, after projection and scaling, so that the momentum of U and V is momentum * c, and that of
       directions which turn normal is lost; p <- p - lr g;
    4. U, V <- Q of their QR, its columns times sign(diag R) (a zero there leaves a zero column), R is dropped; this
       and 5. for every layer, also one without gradients;
    5. tau > 0: the singular values of S are clamped, one by one, to mean ± mean (k - 1) / (k + 1), mean the
       arithmetic one; c is renewed. tau = 0: S <- sqrt(a) Q, a = tr(S Sᵀ) / r, Q the sign-fixed QR factor of S, which
       is not the nearest orthogonal matrix.

    Nothing is projected or clamped at construction, so that the bound holds after the first step.

    Two things differ on purpose: NaN and Inf raise, where the released code goes on or fails inside the SVD, and an
    SVD that LAPACK fails on in float32 is taken in float64.

    Args:
        model: a module with low-rank layers, or parameter groups from optim.param_groups.
        lr, momentum, weight_decay: as torch.optim.SGD; weight decay acts on every parameter.
        tau: finite slack >= 0; the released code's option `eps` is 1 + tau.

    Raises:
        ValueError: options out of range, a model without low-rank layers, factors that are not float32 or float64.
        NonFiniteError: NaN or Inf in a factor.

    Source: described from the released code of Savostianova et al., Robust low-rank training via approximate
        orthonormal constraints, NeurIPS 2023; written anew, no line of it.
    """

    def __init__(self, model, lr: float, momentum: float = 0.0, weight_decay: float = 0.0, *, tau: float):
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
        """(I - X Xᵀ) direction as it is released: the n x n matrix is formed, which is most of the step's time."""
        return (torch.eye(len(X), dtype=X.dtype, device=X.device) - X @ X.mT) @ direction

    def _constrain(self, new: dict[Tensor, Tensor]) -> None:
        for _, U, S, V in self._layers:
            for X in (U, V):
                new[X] = sign_fixed_q(new.get(X, X))
            core, tau = new.get(S, S), self._group_of[S]["tau"]
            if tau > 0:
                new[S], new[self.state[S]["scale"]] = clamped(core, tau)
            else:
                new[S] = (core.square().sum() / len(core)).sqrt() * sign_fixed_q(core)


def clamped(S: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """S with its singular values in the band around their mean, and (sigma_r / sigma_1)² of the result."""
    P, sigma, Qh = svd(S)
    mean = sigma.mean()
    half = mean * tau / (2 + tau)
    for i in range(len(sigma)):  # one clamp for each, as it is released: benchmarks time this step
        sigma[i] = torch.clamp(sigma[i], mean - half, mean + half)
    return (P * sigma) @ Qh, (sigma[-1] / sigma[0]).square()


def sign_fixed_q(X: Tensor) -> Tensor:
    Q, R = torch.linalg.qr(X)
    return Q * R.diagonal().sign()


def svd(A: Tensor):
    """torch.linalg.svd; in float64 where LAPACK raises or returns NaN in float32, as it does on some clamped cores."""
    try:
        result = torch.linalg.svd(A)
        if all(torch.isfinite(t).all() for t in result):
            return result
    except torch.linalg.LinAlgError:
        pass
    return tuple(t.to(A.dtype) for t in torch.linalg.svd(A.double()))
