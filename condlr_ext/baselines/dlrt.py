"""DLRT: rank-adaptive dynamical low-rank training of Schotthöfer, Zangrando, Kusch, Ceruti and Tudisco."""

from typing import Any

import torch
from torch import Tensor

from .._types import Closure
from .layerwise import closure_loss, without_autocast
from .rank_adaptive import RankAdaptiveSGD


class DLRT(RankAdaptiveSGD):
    """Dynamical low-rank training: K-, L- and S-step with augmented bases, then truncation by tolerance.

    One step, for every low-rank layer W = U S Vᵀ of the model:

    1. K = U S, L = V Sᵀ; K <- K - lr grad_K loss(K Vᵀ), L <- L - lr grad_L loss(U Lᵀ), both from the old factors;
    2. U1, V1: orthonormal bases of the columns of (U, K) and (V, L), of rank min(2 r, m, n);
    3. S1 = U1ᵀ U S Vᵀ V1 takes a gradient step on the loss of U1 S1 V1ᵀ; so do biases and all other parameters;
    4. S1 = P diag(sigma) Qᵀ is truncated to the least rank >= min_rank whose dropped sigma have a norm below
       tolerance ‖S1‖_F: U <- U1 P, S <- diag(sigma), V <- V1 Q.

    S is never inverted, so small singular values do no harm. step needs a closure that computes loss and gradients on
    one batch (as LBFGS) and calls it three times, for K, L and S: batch norm's running statistics see the batch three
    times, and random masks are drawn anew. Nothing bounds kappa.

    Args:
        model: A module with low-rank layers; their ranks are the initial ones. U, S and V are replaced. The weight of a
            convolution is the flattened one, C_out x (C_in / groups * prod(kernel_size)).
        lr: Step size.
        momentum: Of cores and other parameters, as in torch.optim.SGD (the paper: 0); a core's momentum is rotated
            with the bases.
        weight_decay: Of cores, K, L and other parameters, as in torch.optim.SGD (the paper: 0).
        tolerance: theta in [0, 1), relative to ‖S‖_F; 0 drops only zeros.
        min_rank: Least rank >= 1 (less for layers of smaller full rank).

    Raises:
        ValueError: Options out of range, no trained low-rank layer, or a layer with only some factors frozen or shared.
        NonFiniteError: NaN or Inf in a factor.
        TypeError: model is no module.

    Source: Schotthöfer et al., Low-rank lottery tickets: finding efficient low-rank neural networks via matrix
        differential equations, NeurIPS 2022 (arXiv 2205.13571), algorithm 1.
    """

    @torch.no_grad()
    @without_autocast
    def step(self, closure: Closure) -> Any:
        """Take one step; after an error, also one of the closure, nothing has changed.

        Args:
            closure: Zeroes the gradients, computes the loss of a batch, calls backward, returns the loss. It runs with
                autocast off unless it turns it on itself.

        Returns:
            The loss before the step.

        Raises:
            NonFiniteError: NaN or Inf in a gradient.
            RuntimeError: Sparse gradients.
            TypeError: No closure.
        """
        if closure is None:
            raise TypeError("DLRT.step: a closure that computes loss and gradients is needed, got None")
        start = [(*layer.factors, self._momentum_buffer(layer.factors[1])) for layer in self._layers]
        try:
            loss = self._step_layers(closure, start)
        except BaseException:
            for layer, before in zip(self._layers, start, strict=True):
                self._set_factors(layer, *before)
            raise
        self._step_others()
        return loss

    def _step_layers(self, closure, start):
        for layer, (U, S, V, _) in zip(self._layers, start, strict=True):
            self._set_factors(layer, U @ S, identity_like(S), V)
        loss = self._evaluate(closure)
        gradients_K = [layer.factors[0].grad for layer in self._layers]
        for layer, (U, S, V, _) in zip(self._layers, start, strict=True):
            self._set_factors(layer, U, identity_like(S), V @ S.mT)
        self._evaluate(closure)
        gradients_L = [layer.factors[2].grad for layer in self._layers]
        lr, decay = self._options["lr"], self._options["weight_decay"]
        for layer, before, dK, dL in zip(self._layers, start, gradients_K, gradients_L, strict=True):
            self._set_factors(layer, *before)
            if dK is not None:  # the closure uses this layer
                U, S, V, _ = before
                K, L = U @ S, V @ S.mT
                self._augment(layer, K - lr * (dK + decay * K), L - lr * (dL + decay * L))
        self._evaluate(closure)
        for layer in self._layers:
            S = layer.factors[1]
            if S.grad is not None:
                self._sgd_step(S, S.grad)
                self._truncate(layer)
        return loss

    def _evaluate(self, closure):
        loss = closure_loss(closure)
        self._check_gradients()
        return loss


def identity_like(S: Tensor) -> Tensor:
    return torch.eye(len(S), dtype=S.dtype, device=S.device)
