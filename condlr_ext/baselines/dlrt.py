"""DLRT: rank-adaptive dynamical low-rank training of Schotthöfer, Zangrando, Kusch, Ceruti and Tudisco."""

import torch
from torch import Tensor, nn

from .layerwise import outside_autocast
from .rank_adaptive import RankAdaptiveSGD


class DLRT(RankAdaptiveSGD):
    """Dynamical low-rank training: K-, L- and S-step with augmented bases, then truncation by tolerance.

    One step, for every low-rank layer W = U S Vᵀ of the model:

    1. K = U S, L = V Sᵀ; K <- K - lr grad_K loss(K Vᵀ), L <- L - lr grad_L loss(U Lᵀ), side by side;
    2. U1, V1: orthonormal bases of the columns of (U, K) and (V, L), of rank min(2 r, m, n);
    3. S1 = U1ᵀ U S Vᵀ V1 takes the gradient step of the loss of U1 S1 V1ᵀ; so do biases and all other parameters;
    4. S1 = P diag(sigma) Qᵀ; the smallest rank whose dropped sigma have a norm below tolerance ‖S1‖_F, and at least
       min_rank, is kept: U <- U1 P, S <- diag(sigma), V <- V1 Q.

    No inverse of S occurs, so that small singular values do no harm. step needs a closure that computes loss and
    gradients on one batch (as LBFGS); it is called three times: for K, L and S. Batch norm's running
    statistics see the batch three times, random masks are drawn anew. Nothing bounds kappa.

    Args:
        model: a module with low-rank layers, whose rank is where the adaptation starts. Their U, S, V are replaced.
        lr: step size. momentum, weight_decay: of cores and other parameters, as torch.optim.SGD (the paper: 0);
            weight decay also of K and L; a core's momentum is turned with the bases.
        tolerance: theta in [0, 1), relative to ‖S‖_F; 0 drops zeros alone.
        min_rank: least rank (less where a layer has less).

    Raises:
        ValueError: options out of range, no trained low-rank layer, layers of which some factors are frozen or shared.
        NonFiniteError: NaN or Inf in a factor. TypeError: model is no module.

    The weight of a convolution is the flattened one, C_out x (C_in / groups * prod(kernel_size)).

    Source: Schotthöfer et al., Low-rank lottery tickets: finding efficient low-rank neural networks via matrix
        differential equations, NeurIPS 2022 (arXiv 2205.13571), algorithm 1.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        *,
        tolerance: float,
        min_rank: int = 2,
    ):
        super().__init__(model, lr, momentum, weight_decay, tolerance, min_rank)

    @torch.no_grad()
    @outside_autocast
    def step(self, closure):
        """One step; returns the loss at the weights before it.

        Args:
            closure: zeroes the gradients, computes the loss of a batch, calls backward, returns the loss. It runs with
                autocast off unless it turns it on itself.

        Raises:
            NonFiniteError: gradients with NaN or Inf. RuntimeError: sparse gradients. TypeError: no closure. Nothing
            has changed then, nor after any error of the closure.
        """
        if closure is None:
            raise TypeError("DLRT.step: a closure that computes loss and gradients is needed, got None")
        start = [(*layer.factors, self._momentum(layer.factors[1])) for layer in self._layers]
        try:
            loss = self._step_layers(closure, start)
        except BaseException:
            for layer, before in zip(self._layers, start, strict=True):
                self._put(layer, *before)
            raise
        self._step_others()
        return loss

    def _step_layers(self, closure, start):
        for layer, (U, S, V, _) in zip(self._layers, start, strict=True):
            self._put(layer, U @ S, identity_like(S), V)
        loss = self._evaluate(closure)
        gradients_K = [layer.factors[0].grad for layer in self._layers]
        for layer, (U, S, V, _) in zip(self._layers, start, strict=True):
            self._put(layer, U, identity_like(S), V @ S.mT)
        self._evaluate(closure)
        gradients_L = [layer.factors[2].grad for layer in self._layers]
        lr, decay = self._options["lr"], self._options["weight_decay"]
        for layer, before, dK, dL in zip(self._layers, start, gradients_K, gradients_L, strict=True):
            self._put(layer, *before)
            if dK is not None:  # else the closure does not use this layer
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
        with torch.enable_grad():
            loss = closure()
        self._check_gradients()
        return loss


def identity_like(S: Tensor) -> Tensor:
    return torch.eye(len(S), dtype=S.dtype, device=S.device)
