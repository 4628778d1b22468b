"""RobustDLRT: rank-adaptive low-rank training with a penalty on the core's spectrum, Schotthöfer, Yang and Schnake."""

import math
import numbers
from typing import Any

import torch
from torch import Tensor, nn

from .. import reference
from .._types import Closure
from .layerwise import closure_loss, without_autocast
from .rank_adaptive import RankAdaptiveSGD


class RobustDLRT(RankAdaptiveSGD):
    """Dynamical low-rank training whose core steps also descend beta R(S), R(S) = ‖SᵀS - a² I‖_F, a² = ‖S‖_F² / r.

    R measures how unequal the squared singular values are; kappa(S) <= exp(R(S) / (√2 sigma_r²)). As a penalty it
    lowers kappa without bounding it and shrinks S at the same time, since R(c S) = c² R(S); too large a beta makes the
    weights vanish.

    Each step takes one forward and backward pass, as with any torch optimizer; steps form cycles of 1 + core_steps:

    1. the first step adds the gradients of U and V to the bases, U1 = orth(U, grad_U), V1 = orth(V, grad_V), of rank
       min(2 r, m, n), S1 = U1ᵀ U S Vᵀ V1; the function stays, and no parameter is trained;
    2. core_steps steps train S1, with the gradient of loss + beta R, biases and all other parameters, but not U1, V1;
    3. after the last one S1 = P diag(sigma) Qᵀ is truncated to the least rank >= min_rank whose dropped sigma have a
       norm below tolerance ‖S1‖_F: U <- U1 P, S <- diag(sigma), V <- V1 Q.

    Within a cycle the model has the larger bases; call truncate() before evaluating or saving it there. With beta = 0
    this is the DLRT of the same paper's tables.

    Args:
        model: A module with low-rank layers; their ranks are the initial ones. U, S and V are replaced. The weight of a
            convolution is the flattened one, C_out x (C_in / groups * prod(kernel_size)); the paper factorizes it by
            Tucker in the two channel modes.
        lr: Step size. (The paper's runs use AdamW.)
        momentum: Of cores and other parameters, as in torch.optim.SGD; a core's momentum is rotated with the bases.
        weight_decay: Of cores and other parameters, as in torch.optim.SGD.
        beta: Weight of the penalty of every layer, >= 0; the paper uses 0.01 to 0.15.
        tolerance: In [0, 1), relative to ‖S‖_F; the paper uses 0.013 to 0.1.
        core_steps: Number >= 1 of core steps per cycle; the paper uses 10 and 75.
        min_rank: Least rank >= 1 (less for layers of smaller full rank).

    Raises:
        ValueError: Options out of range, no trained low-rank layer, or a layer with only some factors frozen or shared.
        NonFiniteError: NaN or Inf in a factor.
        TypeError: model is no module.

    Source: Schotthöfer, Yang and Schnake, RobustDLRT, NeurIPS 2025 (arXiv 2505.08022).
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        *,
        beta: float,
        tolerance: float,
        core_steps: int = 10,
        min_rank: int = 2,
    ):
        if not isinstance(beta, numbers.Real) or not 0 <= beta < math.inf:
            raise ValueError(f"RobustDLRT: beta must be a finite number >= 0, got {beta!r}")
        if isinstance(core_steps, bool) or not isinstance(core_steps, numbers.Integral) or core_steps < 1:
            raise ValueError(f"RobustDLRT: core_steps must be an int >= 1, got {core_steps!r}")
        super().__init__(model, lr, momentum, weight_decay, tolerance=tolerance, min_rank=min_rank)
        # in the group, and so in the state_dict; core_steps_left counts down to the truncation
        self._options.update(beta=beta, core_steps=core_steps, core_steps_left=0)

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """Take one step.

        Args:
            closure: Optional; computes loss and gradients.

        Returns:
            The closure's loss, None without one.

        Raises:
            NonFiniteError: NaN or Inf in a gradient; nothing has changed then.
            RuntimeError: Sparse gradients.
        """
        loss = closure_loss(closure)
        self._step()
        return loss

    @without_autocast
    def _step(self) -> None:
        self._check_gradients()
        if self._options["core_steps_left"] == 0:
            for layer in self._layers:
                U, _, V = layer.factors
                if U.grad is not None:
                    self._augment(layer, U.grad, V.grad)
            self._options["core_steps_left"] = self._options["core_steps"]
            return
        for layer in self._layers:
            S = layer.factors[1]
            if S.grad is not None:
                self._sgd_step(S, S.grad + self._options["beta"] * penalty_gradient(S))
        self._step_others()
        self._options["core_steps_left"] -= 1
        if self._options["core_steps_left"] == 0:
            self.truncate()

    @torch.no_grad()
    @without_autocast
    def truncate(self) -> None:
        """Truncate every layer by the tolerance; the next step begins a new cycle."""
        for layer in self._layers:
            self._truncate(layer)
        self._options["core_steps_left"] = 0


def penalty_gradient(S: Tensor) -> Tensor:
    """Return the gradient of R(S) = ‖SᵀS - a² I‖_F, 2 S (SᵀS - a² I) / R with a² = ‖S‖_F² / r; 0 if R is rounding."""
    scale = reference.magnitude(S)
    S = S / scale  # R is of degree 2, its gradient of degree 1
    mean = S.square().sum() / len(S)
    excess = S.mT @ S - mean * torch.eye(len(S), dtype=S.dtype, device=S.device)
    norm = torch.linalg.matrix_norm(excess)
    least = torch.finfo(S.dtype).eps * len(S) * mean
    return torch.where(norm > least, 2 * S @ excess / norm, 0) * scale
