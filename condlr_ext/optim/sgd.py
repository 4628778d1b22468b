"""CondLRSGD: SGD whose step keeps every low-rank layer W = U S Vᵀ on the constraint set.

For the gradient G of a parameter p, with the options of its group (maximize: of -G):

    g = G + weight_decay p                            no decay of U and V
    B = momentum B + (1 - dampening) g                B = g in the first step
    D = B, with nesterov g + momentum B               D = g without momentum

    U = qf(U - lr (I - U Uᵀ) D_U (S Sᵀ)⁻¹)            qf(A): the Q of A = Q R with diag(R) >= 0
    V = qf(V - lr (I - V Vᵀ) D_V (Sᵀ S)⁻¹)            both with the old S
    S = clip_spectrum(S - lr D_S, tau, band, sigma_max)
    b = b - lr D_b

`reference.layer_step` is the same in PyTorch. Parameters outside of low-rank layers follow torch.optim.SGD.
"""

import warnings

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from .._shards import Team, is_distributed, local
from .._types import ModelOrGroups
from ..reference import LOW_PRECISION
from .base import ConstrainedOptimizer, fusible
from .step_args import Slot, StepCall


class CondLRSGD(ConstrainedOptimizer):
    """Stochastic gradient descent on W = U S Vᵀ with UᵀU = VᵀV = I and kappa(S) <= 1 + tau after every step.

    Momentum lives in ambient space as in torch.optim.SGD. The factors take the tangent part of its direction,
    preconditioned, and return by QR; the core takes SGD's step and is clipped. The module's docstring has the update
    rule. One call steps all layers of a device.

    At construction, and in add_param_group, factors that are not orthonormal to 1e-4 are replaced by their Q with R
    absorbed in S, and a core outside the bound is clipped, so the bound holds from the start.

    A layer with a non-finite gradient, or an all-zero core, is left unchanged with its bias and buffers, and counted in
    `skipped`. float16 and bfloat16 layers are stepped on float32 masters kept in the state; the bound holds for the
    masters.

    Args:
        model_or_groups: A module, its parameters or named_parameters(), or parameter groups (see param_groups). Layers
            are known by their parameters, whatever the names. A group's `roles` ("U", "S", "V" or "other" for each
            parameter) makes factors of parameters prefix.U, prefix.S, prefix.V of a module of one's own.
        lr: As in torch.optim.SGD.
        momentum: As in torch.optim.SGD.
        dampening: As in torch.optim.SGD.
        weight_decay: As in torch.optim.SGD, for cores, biases and dense weights. U and V do not decay: a tangent step
            would cancel it.
        nesterov: As in torch.optim.SGD.
        tau: Slack >= 0 of the condition number; Inf for no bound (the preconditioner is then damped by
            (1e-6 sigma_1)²).
        band: As in linalg.clip_spectrum.
        sigma_max: As in linalg.clip_spectrum.
        maximize: As in torch.optim.SGD.
        capturable: Never wait for the device or allocate after the first step (the second with dampening), so that a
            CUDA graph can capture the step after a few warm-up steps, as torch asks; needs the Triton step. lr, tau and
            sigma_max, and momentum, dampening and weight_decay in groups of nothing but low-rank layers, may then be
            tensors of one element on the device and are read at every step; plain numbers are captured.
        check_finite: Raise, with the layer's name, for gradients that are not finite (before anything changes) and
            for layers that were left unchanged. Waits for the device at every step.
        foreach: Taken so that scripts for torch's optimizer run, without effect: the fastest rule that steps a
            parameter rightly is chosen here.
        fused: As foreach.

    Raises:
        ValueError: Hyper-parameters out of range, a layer without all factors, or factors that share memory.
        NonFiniteError: NaN or Inf in a factor, with the layer's name.

    Source: Savostianova et al., Robust low-rank training via approximate orthonormal constraints, NeurIPS 2023;
        momentum in ambient space as in Zangrando et al., Stiefel-AdamW (2026).
    """

    def __init__(
        self,
        model_or_groups: ModelOrGroups,
        lr: float | Tensor,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        tau: float,
        band: str = "rms",
        sigma_max: float | None = None,
        maximize: bool = False,
        capturable: bool = False,
        check_finite: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ):
        defaults = dict(
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            tau=tau,
            band=band,
            sigma_max=sigma_max,
            maximize=maximize,
        )
        super().__init__(model_or_groups, defaults, capturable, check_finite)

    _options = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize", "tau", "band", "sigma_max")
    _finite_options = ("lr", "momentum", "dampening", "weight_decay")
    _may_be_negative = ("dampening",)
    _tensor_options = ("momentum", "dampening", "weight_decay")
    _buffers = ("momentum_buffer",)

    def _check_options(self, group: dict) -> None:
        super()._check_options(group)
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            got = f"momentum {group['momentum']}, dampening {group['dampening']}"
            raise ValueError(f"CondLRSGD: nesterov needs momentum > 0 and dampening 0, got {got}")

    def _state_signature(self, group: dict) -> bool:
        return bool(group["momentum"])

    def _start(self, layers) -> None:
        super()._start(layers)
        for layer in layers:
            S = self._param_at(layer.positions[1])
            if not S.is_meta and not self._team_of(layer).any(local(S).any()):
                warnings.warn(
                    f"CondLRSGD: the core of layer {layer.name!r} is zero, which its preconditioner (S Sᵀ)⁻¹ cannot"
                    " move: the layer will be left as it is; start it elsewhere (reset_parameters), or use CondLRAdamW",
                    stacklevel=4,
                )

    def _create_state(self, p: Tensor, group: dict) -> None:
        state = self.state[p]
        if not group["momentum"]:
            return
        if state.get("momentum_buffer") is None:
            state["momentum_buffer"] = torch.zeros_like(state.get("master", p))
        if group["dampening"] and "started" not in state:  # without it a buffer of zeros starts itself
            state["started"] = Team.of("the parameter", [p]).any(local(state["momentum_buffer"]).any())

    def _add_layer(self, call: StepCall, slots: list[Slot]) -> None:
        for slot in slots:
            group = self.param_groups[slot.position[0]]
            if slot.index is None or not group["momentum"]:
                call.add(slot, {})
                continue
            self._create_state(slot.param, group)
            state = self.state[slot.param]
            buffer = state["momentum_buffer"]
            if buffer.dtype != slot.target.dtype or not buffer.is_contiguous():  # as after model.double()
                buffer = state["momentum_buffer"] = buffer.to(slot.target.dtype).contiguous()
            call.add(slot, {"momentum_buffer": buffer}, local(buffer), fresh=not state.get("started", True))

    def _finish(self, call: StepCall, skipped: set[int]) -> None:
        """Note which momentum buffers have started, as those of the layers skipped did not."""
        for p in call.started(skipped):
            self.state[p]["started"] = True
        if call.starts_buffers:
            self._calls_key = None
        super()._finish(call, skipped)

    def _step_dense(self, group: dict, params: list[Tensor], grads: list[Tensor]) -> None:
        momentum = bool(group["momentum"])
        buffers: list[Tensor | None] = []
        for p in params:
            self._create_state(p, group)
            state = self.state[p]
            buffers.append(local(state["momentum_buffer"]) if momentum and state.get("started", True) else None)
        here = [local(p) for p in params]
        started = {b is not None for b in buffers}
        fused = (
            (self.capturable or not isinstance(group["lr"], Tensor))
            and len(started) == 1
            # the fused rule leaves these unstepped on CPUs and spoils their momentum: pytorch#191763
            and not any(p.device.type == "cpu" and p.dtype in LOW_PRECISION for p in here)
            and fusible(here, grads, buffers)
        )
        sgd(
            here,
            grads,
            buffers,
            has_sparse_grad=any(g.is_sparse for g in grads),
            fused=True if fused else None,
            lr=group["lr"],
            **{k: group[k] for k in ("momentum", "dampening", "weight_decay", "nesterov", "maximize")},
        )
        if momentum:
            for p, buffer in zip(params, buffers, strict=True):
                if is_distributed(p):
                    local(self.state[p]["momentum_buffer"]).copy_(buffer)
                else:
                    self.state[p]["momentum_buffer"] = buffer
                if "started" in self.state[p]:
                    self.state[p]["started"] = True
