"""CondLRAdamW: AdamW whose step keeps every low-rank layer W = U S Vᵀ on the constraint set.

For the gradient G of a parameter, with the options of its group (maximize: of -G) and t the number of its steps:

    m = β₁ m + (1 - β₁) G                            v = β₂ v + (1 - β₂) G²
    D = (m / (1 - β₁ᵗ)) / (√(v / (1 - β₂ᵗ)) + eps)   with amsgrad the largest v so far

    U = qf(U - lr (I - U Uᵀ) D_U)                    qf(A): the Q of A = Q R with diag(R) >= 0
    V = qf(V - lr (I - V Vᵀ) D_V)
    S = clip_spectrum((1 - lr weight_decay) S - lr D_S, tau, band, sigma_max)
    b = (1 - lr weight_decay) b - lr D_b

m, v and D are those of torch.optim.AdamW; the rest is `reference.layer_step` with D for the gradient, without momentum
and with precondition = 0. Parameters outside of low-rank layers follow torch.optim.AdamW.
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from .._shards import local
from .._types import ModelOrGroups, Options
from .base import ConstrainedOptimizer, fusible
from .step_args import Slot, StepCall


@dataclass(frozen=True)
class _Moving:
    """A slot with a gradient: which layer of the call it is in, its moments as the rule takes them, its direction."""

    slot: Slot
    layer: int
    moments: dict[str, Tensor]  # exp_avg, exp_avg_sq, step and, with amsgrad, max_exp_avg_sq
    direction: Tensor


class AdamCall(StepCall):
    """A StepCall that gives the op Adam's directions for gradients."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._moving: list[_Moving] = []
        self._before: list[dict[str, Tensor]] = []  # the moments before this step, if other processes have a say in it
        self._directions: list[Tensor] = []  # of all slots, empty where there is no gradient
        self._first: dict[int, Tensor] = {}  # the first direction of each layer
        self._jobs: dict[tuple[int, int], list[int]] = {}  # which moving slots have this (layer, group)

    def add(self, slot: Slot, state: dict[str, Tensor]) -> None:
        super().add(slot, state)
        if slot.index is None:
            self._directions.append(self.empty(slot.target.dtype))
            return
        layer = len(self.layers) - 1
        moments = {key: self.active_part(slot, local(tensor)) for key, tensor in state.items()}
        direction = _contiguous_like(slot.target)
        self._directions.append(direction)
        if direction.numel():
            self._first.setdefault(layer, direction)
        self._jobs.setdefault((layer, slot.position[0]), []).append(len(self._moving))
        self._moving.append(_Moving(slot, layer, moments, direction))

    @functools.cached_property
    def _layer_of(self) -> Tensor:
        """The layer of each moving slot, on the device."""
        return torch.tensor([m.layer for m in self._moving], dtype=torch.int64, device=self.device)

    def directions(self, groups: list[dict], grads: list[Tensor | None]) -> list[Tensor]:
        """Compute D by torch's fused rule, which steps a parameter that is 0 with lr = -1 and without decay.

        A layer with a gradient that is not finite, or whose squares are not, keeps its moments and its step count, and
        one of its directions becomes NaN, so that the op skips it. Nothing waits for the device.
        """
        given = [self.gradient(m.slot, grads) for m in self._moving]
        if self.device.type == "cpu":
            norms = [torch.dot(g.view(-1), g.view(-1)) for g in given]
        else:
            norms = list(torch._foreach_norm(given))
        bad = torch.stack(norms).isfinite().logical_not()
        none = torch.zeros(len(self.layers), dtype=torch.int64, device=self.device)
        bad = none.index_add_(0, self._layer_of, bad.long()) > 0
        if self.team:
            self._before = [{key: tensor.clone() for key, tensor in m.moments.items()} for m in self._moving]
        found_inf, nan_if_bad = bad.float().unbind(), torch.where(bad, math.nan, 0.0).float().unbind()
        counted = bad.logical_not().float().unbind()

        torch._foreach_zero_([m.direction for m in self._moving])
        for layer, direction in self._first.items():
            direction.copy_(nan_if_bad[layer])
        torch._foreach_add_([m.moments["step"] for m in self._moving], [counted[m.layer] for m in self._moving])
        for (layer, g), job in self._jobs.items():
            group, moments = groups[g], [self._moving[i].moments for i in job]
            torch._fused_adamw_(
                [self._moving[i].direction for i in job],
                [given[i] for i in job],
                [m["exp_avg"] for m in moments],
                [m["exp_avg_sq"] for m in moments],
                [m["max_exp_avg_sq"] for m in moments] if group["amsgrad"] else [],
                [m["step"] for m in moments],
                lr=-1.0,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=0.0,
                eps=group["eps"],
                amsgrad=group["amsgrad"],
                maximize=group["maximize"],
                found_inf=found_inf[layer],
            )
        return self._directions

    def _take_back(self, layers: list[int]) -> None:
        for moving, before in zip(self._moving, self._before, strict=True):
            if moving.layer in layers:
                for key, tensor in before.items():
                    moving.moments[key].copy_(tensor)
        self._before = []


class CondLRAdamW(ConstrainedOptimizer):
    """AdamW on W = U S Vᵀ with UᵀU = VᵀV = I and kappa(S) <= 1 + tau after every step.

    The moments live in ambient space, like those of torch.optim.AdamW. The factors take the tangent part of Adam's
    direction and return by QR; the core takes AdamW's step and is clipped. The module's docstring has the update rule.
    There is no preconditioner (SSᵀ)⁻¹ as in CondLRSGD: that removes the scale of S from ∂L/∂U = ∂L/∂W V Sᵀ, and Adam's
    direction does not depend on the scale of the gradient.

    At construction, and in add_param_group, factors that are not orthonormal to 1e-4 are replaced by their Q with R
    absorbed in S, and a core outside the bound is clipped, so the bound holds from the start.

    A layer with a gradient whose squares are not finite is left unchanged with its bias, moments and step counts, and
    counted in `skipped`. float16 and bfloat16 layers are stepped on float32 masters kept in the state, with float32
    moments; the bound holds for the masters. Besides its state the optimizer holds one direction per parameter of a
    low-rank layer.

    Steps depend on the basis of U and V, because the square roots are taken entry by entry.

    Args:
        model_or_groups: A module, its parameters or named_parameters(), or parameter groups (see param_groups). Layers
            are known by their parameters, whatever the names. A group's `roles` ("U", "S", "V" or "other" for each
            parameter) makes factors of parameters prefix.U, prefix.S, prefix.V of a module of one's own.
        lr: As in torch.optim.AdamW.
        betas: As in torch.optim.AdamW.
        eps: As in torch.optim.AdamW.
        weight_decay: As in torch.optim.AdamW, for cores, biases and dense weights. U and V do not decay: their columns
            keep length 1.
        amsgrad: As in torch.optim.AdamW.
        tau: Slack >= 0 of the condition number; Inf for no bound.
        band: As in linalg.clip_spectrum.
        sigma_max: As in linalg.clip_spectrum.
        maximize: As in torch.optim.AdamW.
        capturable: Never wait for the device, so that a CUDA graph can capture the step after one warm-up step; needs
            the Triton step. lr, tau and sigma_max, and weight_decay in groups of nothing but low-rank layers, may then
            be tensors of one element on the device and are read at every step; plain numbers are captured.
        check_finite: Raise, with the layer's name, for gradients that are not finite (before anything changes) and
            for layers that were left unchanged. Waits for the device at every step.
        foreach: Taken so that scripts for torch's optimizer run, without effect: the fastest rule that steps a
            parameter rightly is chosen here.
        fused: As foreach.

    Raises:
        ValueError: Hyper-parameters out of range, a layer without all factors, or factors that share memory.
        NonFiniteError: NaN or Inf in a factor, with the layer's name.

    Source: Loshchilov & Hutter, Decoupled weight decay regularization, ICLR 2019 (arXiv 1711.05101); moments in
        ambient space, and a direction that is projected and retracted, as in Zangrando, Sutti & Tudisco,
        Stiefel-AdamW (2026). Becigneul & Ganea, Riemannian adaptive optimization methods, ICLR 2019 (arXiv
        1810.00760), scale each manifold of a product by one number; their proofs do not cover steps scaled by entry.
    """

    def __init__(
        self,
        model_or_groups: ModelOrGroups,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
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
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            tau=tau,
            band=band,
            sigma_max=sigma_max,
            maximize=maximize,
        )
        super().__init__(model_or_groups, defaults, capturable, check_finite)

    _options = ("lr", "weight_decay", "tau", "band", "sigma_max")
    _finite_options = ("lr", "eps", "weight_decay")
    _tensor_options = ("weight_decay",)
    _buffers = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    _precondition = False
    _call = AdamCall
    _takes_sparse = False

    def _check_options(self, group: dict) -> None:
        super()._check_options(group)
        if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
            raise ValueError(f"{self._name}: betas must be two numbers in [0, 1), got {group['betas']}")

    def _state_signature(self, group: dict) -> bool:
        return bool(group["amsgrad"])

    def _moments(self, p: Tensor, target: Tensor, amsgrad: bool) -> dict[str, Tensor]:
        """Return the state of p, which is stepped as `target`; missing tensors start at 0."""
        state = self.state[p]
        for key in self._buffers[: 3 if amsgrad else 2]:
            if key not in state:
                state[key] = torch.zeros_like(target)
            elif state[key].dtype != target.dtype or state[key].stride() != target.stride():  # as after model.double()
                state[key] = torch.empty_like(target).copy_(state[key])
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        return {key: state[key] for key in (*self._buffers, "step") if key in state}

    def _create_state(self, p: Tensor, group: dict) -> None:
        self._moments(p, self.state[p].get("master", p), group["amsgrad"])

    def _add_layer(self, call: AdamCall, slots: list[Slot]) -> None:
        for slot in slots:
            amsgrad = self.param_groups[slot.position[0]]["amsgrad"]
            if slot.index is None:
                call.add(slot, {})
                continue
            like = _contiguous_like(self.state[slot.param].get("master", slot.param))
            call.add(slot, self._moments(slot.param, like, amsgrad))

    def _step_dense(self, group: dict, params: list[Tensor], grads: list[Tensor]) -> None:
        moments = [self._moments(p, p, group["amsgrad"]) for p in params]
        params = [local(p) for p in params]
        averages = [[local(m[key]) for m in moments] for key in self._buffers[: 3 if group["amsgrad"] else 2]]
        adamw(
            params,
            grads,
            *averages,
            *([] if group["amsgrad"] else [[]]),
            [m["step"] for m in moments],
            fused=True if fusible(params, grads, *averages) else None,
            capturable=self.capturable,
            has_complex=any(p.is_complex() for p in params),
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            **{k: group[k] for k in ("lr", "weight_decay", "eps", "amsgrad", "maximize")},
        )

    def load_state_dict(self, state_dict: Options) -> None:
        super().load_state_dict(state_dict)
        for p, state in self.state.items():
            if "step" in state:  # torch keeps it on the CPU, old checkpoints as a number
                state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=p.device)


def _contiguous_like(t: Tensor) -> Tensor:
    """Return a contiguous tensor of t's shape: torch's fused rule ignores strides, and the gradients are contiguous."""
    return torch.empty_like(t, memory_format=torch.contiguous_format)
