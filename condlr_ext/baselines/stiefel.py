"""Momentum SGD on the Stiefel manifold, the base of CayleySGD and ProjectedSGD."""

import math

import torch
from torch import Tensor, nn

from .. import linalg
from .._types import ModelOrGroups, Options, Patterns
from ..reference import ORTHONORMAL_INPUT, orthonormality_error
from .layerwise import LayerSGD, check_factor


class StiefelSGD(LayerSGD):
    """SGD whose U and V, and chosen dense weights, stay on the Stiefel manifold {X : XᵀX = I}.

    With B the buffer of X: D = P_X(momentum B + grad), P_X(Z) = Z - X (XᵀZ + ZᵀX) / 2 the orthogonal projection onto
    the tangent space; X <- retract(X, -lr D); B <- D. The projection of the next step, at the new X, transports the
    momentum. All else follows torch.optim.SGD; weight decay of X is normal to the manifold and has no effect.

    At construction U and V that are not orthonormal to 1e-4 are replaced by their Q and R is absorbed by S, cores
    outside the bound are clipped, and dense weights are replaced by their polar factors, the nearest orthonormal
    matrices.
    """

    tau: float
    weights: list[str]

    def __init__(
        self,
        model: ModelOrGroups,
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        *,
        tau: float = math.inf,
        weights: Patterns = (),
    ):
        where = type(self).__name__
        linalg.check_constraint(where, tau, "rms", None)
        self.tau, self.weights = float(tau), [weights] if isinstance(weights, str) else list(weights)
        super().__init__(model, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        if not self._constrained:
            raise ValueError(f"{where}: model must have low-rank layers, or weights name dense ones, got neither")
        with torch.no_grad():
            for _, U, S, V in self._layers:
                put_on_manifold(U, S, V, self.tau)
            for name in self.weights:
                W = self._weight(name)
                W.copy_(linalg.polar(W.flatten(1)).Q.reshape(W.shape))

    def _link(self) -> None:
        super()._link()
        self._constrained = {X for _, U, _, V in self._layers for X in (U, V)}
        for name in self.weights:
            W = self._weight(name)
            check_factor(type(self).__name__, f"the weight of {name!r}", W)
            self._constrained.add(W)

    def _weight(self, name: str) -> Tensor:
        for p, found in self._names.items():
            if found == f"{name}.weight" and p.dim() >= 2:
                return p
        raise ValueError(
            f"{type(self).__name__}: weights must be names of modules whose weight has two or more dimensions and is a"
            f" parameter of the optimizer, got {name!r}"
        )

    def __getstate__(self) -> Options:
        return super().__getstate__() | {"tau": self.tau, "weights": self.weights}

    def _direction(self, p: Tensor, direction: Tensor) -> Tensor:
        if p not in self._constrained:
            return direction
        return in_shape_of(p, tangent_projection(as_columns(p), as_columns(direction)))

    def _move(self, p: Tensor, direction: Tensor, lr) -> Tensor:
        if p not in self._constrained:
            return super()._move(p, direction, lr)
        return in_shape_of(p, self.retract(as_columns(p), -lr * as_columns(direction)))

    def _constrain(self, new: dict[Tensor, Tensor]) -> None:
        if self.tau < math.inf:
            for _, _, S, _ in self._layers:
                if S in new:
                    new[S] = linalg.clip_spectrum(new[S], self.tau)

    @staticmethod
    def retract(X: Tensor, xi: Tensor) -> Tensor:
        """Return the point that the tangent step xi [n, p] reaches from X [n, p]."""
        raise NotImplementedError


def tangent_projection(X: Tensor, Z: Tensor) -> Tensor:
    """Return Z - X (XᵀZ + ZᵀX) / 2, the tangent vector at X nearest to Z in the Euclidean metric."""
    XtZ = X.mT @ Z
    return Z - X @ ((XtZ + XtZ.mT) / 2)


def as_columns(W: Tensor) -> Tensor:
    """View W as [n, p] with n >= p: flattened to a matrix, transposed if it is wide."""
    W = W.flatten(1)
    return W.mT if W.shape[0] < W.shape[1] else W


def in_shape_of(p: Tensor, X: Tensor) -> Tensor:
    """Undo as_columns."""
    return (X.mT if p.shape[0] < p[0].numel() else X).reshape(p.shape)


def put_on_manifold(U: nn.Parameter, S: nn.Parameter, V: nn.Parameter, tau: float) -> None:
    """Orthonormalize U and V in place, keeping the product U S Vᵀ; then clip S if it is outside the bound."""
    for X, right in ((U, False), (V, True)):
        if orthonormality_error(X) > ORTHONORMAL_INPUT:
            Q, R = linalg.qr(X)
            X.copy_(Q)
            S.copy_(S @ R.mT if right else R @ S)
    if linalg.cond(S.double()) > (1 + tau) * (1 + 1e-5):  # a resumed core inside it keeps its bits
        S.copy_(linalg.clip_spectrum(S, tau))
