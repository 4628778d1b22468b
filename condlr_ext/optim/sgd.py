"""CondLRSGD: SGD whose step keeps every low-rank layer on the constraint set."""

import warnings

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from .base import ConstrainedOptimizer, fusible
from .step_args import Slot, StepCall

# torch's fused SGD on CPUs, in versions in use, leaves these unstepped and spoils their momentum: pytorch#191763
_LOW = (torch.float16, torch.bfloat16)


class CondLRSGD(ConstrainedOptimizer):
    """Stochastic gradient descent on W = U S Vᵀ with UᵀU = VᵀV = I and kappa(S) <= 1 + tau after every step.

    Momentum lives in ambient space as in torch.optim.SGD; of its direction D the factors take the tangent part,
    preconditioned, and return by QR: U <- qf(U - lr (I - UUᵀ) D_U (SSᵀ)⁻¹), V alike with (SᵀS)⁻¹; the core is
    clipped: S <- clip_spectrum(S - lr D_S, tau, band, sigma_max). All other parameters follow plain SGD. One call
    moves the whole network.

    At construction (and in add_param_group) factors that are not orthonormal to 1e-4 are replaced by their Q with
    R absorbed in S, and a core outside the bound is clipped, so the bound holds from the start.

    Args:
        model_or_groups: a module, its named_parameters(), or parameter groups (see param_groups); layers are
            found by their parameter names prefix.U, prefix.S, prefix.V.
        lr, momentum, dampening, weight_decay, nesterov, maximize: as torch.optim.SGD. Weight decay acts on
            cores, biases and dense weights, not on U and V, where a tangent step would cancel it.
        tau: slack >= 0 of the condition number; Inf for no bound (the preconditioner is then damped by
            (1e-6 sigma_1)²).
        band, sigma_max: as linalg.clip_spectrum.
        capturable: the step waits for nothing and allocates nothing once every momentum buffer has started, so that
            a CUDA graph can capture it after a few warm-up steps, as torch asks. Options that are tensors of one
            element on the device are then read at every step, plain numbers are part of what is captured: lr, tau and
            sigma_max, in groups of low-rank layers alone also momentum, dampening and weight_decay. Needs the Triton
            step.
        check_finite: raise, naming the layer, for non-finite gradients (before anything has changed) and for
            layers that had to be left unchanged. Costs a wait for the device per step.

    A layer with a non-finite gradient, or an all-zero core, is left unchanged with its bias and buffers, and
    counted in `skipped`. float16 and bfloat16 layers are stepped on float32 master copies kept in the state; the
    bound holds for the masters.

    Raises:
        ValueError: hyper-parameters out of range, bare parameters of low-rank layers, a layer with a factor
            missing. NonFiniteError: NaN or Inf in a factor, with the layer's name.

    Source: Savostianova et al., Robust low-rank training via approximate orthonormal constraints, NeurIPS 2023;
        momentum in ambient space as in Zangrando et al., Stiefel-AdamW (2026).
    """

    def __init__(
        self,
        model_or_groups,
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
    _numbers = ("lr", "momentum", "dampening", "weight_decay")
    _signed = ("dampening",)
    _tensors_alone = ("momentum", "dampening", "weight_decay")
    _buffers = ("momentum_buffer",)

    def _check_options(self, group: dict) -> None:
        super()._check_options(group)
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            got = f"momentum {group['momentum']}, dampening {group['dampening']}"
            raise ValueError(f"CondLRSGD: nesterov needs momentum > 0 and dampening 0, got {got}")

    def _kind(self, group: dict) -> bool:
        return bool(group["momentum"])

    def _start(self, layers) -> None:
        super()._start(layers)
        for layer in layers:
            S = self._place(layer.places[1])
            if not S.is_meta and not S.any():
                warnings.warn(
                    f"CondLRSGD: the core of layer {layer.name!r} is zero, which its preconditioner (S Sᵀ)⁻¹ cannot"
                    " move: the layer will be left as it is; start it elsewhere (reset_parameters), or use CondLRAdamW",
                    stacklevel=4,
                )

    def _add_layer(self, call: StepCall, slots: list[Slot]) -> None:
        for slot in slots:
            if slot.at is None or not self.param_groups[slot.place[0]]["momentum"]:
                call.add(slot, {})
                continue
            state = self.state[slot.p]
            buffer = state.get("momentum_buffer")
            if buffer is None:
                call.add(slot, {}, torch.zeros_like(slot.whole), fresh=True)
                continue
            if buffer.dtype != slot.target.dtype or not buffer.is_contiguous():  # the model's dtype has changed, say
                buffer = state["momentum_buffer"] = buffer.to(slot.target.dtype).contiguous()
            call.add(slot, {"momentum_buffer": buffer}, buffer)

    def _finish(self, call: StepCall, left: set[int]) -> None:
        """Keeps the buffers that have started."""
        for i, (slot, fresh) in enumerate(zip(call.slots, call.fresh, strict=True)):
            if fresh and i // 4 not in left:  # else its buffers have not started
                self.state[slot.p]["momentum_buffer"] = call.kept[i]
        if any(call.fresh):
            self._calls_key = None
        super()._finish(call, left)

    def _step_dense(self, group: dict, params: list[Tensor], grads: list[Tensor]) -> None:
        momentum = bool(group["momentum"])
        buffers = [self.state[p].get("momentum_buffer") if momentum else None for p in params]
        started = {b is not None for b in buffers}
        fused = (
            (self.capturable or not isinstance(group["lr"], Tensor))
            and len(started) == 1
            and not any(p.device.type == "cpu" and p.dtype in _LOW for p in params)
            and fusible(params, grads, buffers)
        )
        sgd(
            params,
            grads,
            buffers,
            has_sparse_grad=any(g.is_sparse for g in grads),
            fused=True if fused else None,
            lr=group["lr"],
            **{k: group[k] for k in ("momentum", "dampening", "weight_decay", "nesterov", "maximize")},
        )
        if momentum:
            for p, buffer in zip(params, buffers, strict=True):
                self.state[p]["momentum_buffer"] = buffer
