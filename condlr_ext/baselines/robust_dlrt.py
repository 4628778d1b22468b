"""RobustDLRT: rank-adaptive low-rank training with a penalty on the core's spectrum, Schotthöfer, Yang and Schnake."""

import math
import numbers

import torch
from torch import Tensor, nn

from .layerwise import outside_autocast
from .rank_adaptive import RankAdaptiveSGD


class RobustDLRT(RankAdaptiveSGD):
    """Dynamical low-rank training whose core steps also descend beta R(S), R(S) = ‖SᵀS - a² I‖_F, a² = ‖S‖_F² / r.

    R is the distance of the squared singular values from being equal; kappa(S) <= exp(R(S) / (√2 sigma_r²)). It is
    a penalty: kappa is pulled down, not bounded, and S is made smaller at the same time, since R(c S) = c² R(S); a
    beta that is too large lets the weights vanish.

    An ordinary optimizer, one forward and backward pass per step; the steps go in cycles of 1 + core_steps:

    1. the first step takes the gradients of U and V into the bases, U1 = orth(U, grad_U), V1 = orth(V, grad_V), of
       rank min(2 r, m, n), S1 = U1ᵀ U S Vᵀ V1; the function stays, and no parameter is trained;
    2. core_steps steps of S1, with the gradient of loss + beta R, and of biases and all other parameters; U1 and V1
       rest;
    3. with the last of them S1 = P diag(sigma) Qᵀ is truncated to the smallest rank whose dropped sigma have a norm
       below tolerance ‖S1‖_F, and at least min_rank: U <- U1 P, S <- diag(sigma), V <- V1 Q.

    Within a cycle the model has the larger bases; call truncate() before it is evaluated or saved there. With beta = 0
    this is the DLRT of the same paper's tables.

    Args:
        model: a module with low-rank layers, whose rank is where the adaptation starts. Their U, S, V are replaced.
        lr: step size. momentum, weight_decay: of cores and other parameters, as torch.optim.SGD; a core's momentum
            is turned with the bases. (The paper's runs take AdamW.)
        beta: weight of the penalty of every layer, >= 0; the paper uses 0.01 to 0.15.
        tolerance: in [0, 1), relative to ‖S‖_F; the paper uses 0.013 to 0.1.
        core_steps: length of the second part, >= 1; the paper uses 10 and 75.
        min_rank: least rank (less where a layer has less).

    Raises:
        ValueError: options out of range, no trained low-rank layer, layers of which some factors are frozen or shared.
        NonFiniteError: NaN or Inf in a factor. TypeError: model is no module.

    The weight of a convolution is the flattened one, C_out x (C_in / groups * prod(kernel_size)); the paper factorizes
    it by Tucker in the two channel modes.

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
        super().__init__(model, lr, momentum, weight_decay, tolerance, min_rank)
        # in the group, and so in the state_dict; left counts the core steps until the truncation
        self._options.update(beta=beta, core_steps=core_steps, core_steps_left=0)

    @torch.no_grad()
    def step(self, closure=None):
        """One step; returns the closure's loss if one is given.

        Raises:
            NonFiniteError: gradients with NaN or Inf; nothing has changed then. RuntimeError: sparse gradients.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step()
        return loss

    @outside_autocast
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
    @outside_autocast
    def truncate(self) -> None:
        """Truncates every layer by the tolerance; the next step begins a new cycle."""
        for layer in self._layers:
            self._truncate(layer)
        self._options["core_steps_left"] = 0


def penalty_gradient(S: Tensor) -> Tensor:
    """The gradient 2 S (SᵀS - a² I) / R of R(S) = ‖SᵀS - a² I‖_F, a² = ‖S‖_F² / r; zero where R is, to rounding."""
    mean = S.square().sum() / len(S)
    excess = S.mT @ S - mean * torch.eye(len(S), dtype=S.dtype, device=S.device)
    norm = torch.linalg.matrix_norm(excess)
    least = torch.finfo(S.dtype).eps * len(S) * mean
    return torch.where(norm > least, 2 * S @ excess / norm, 0)
