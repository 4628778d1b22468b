"""CondLRAdamW: AdamW whose step keeps every low-rank layer on the constraint set."""

import functools
import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ..reference import ROLES
from .base import ConstrainedOptimizer, fusible
from .step_args import Slot, StepCall


@dataclass
class AdamCall(StepCall):
    """The step op takes Adam's directions for gradients, without momentum.

    A layer is two entries of the op. One moves U, V and the bias beside the identity for a core, so that the op's
    preconditioner (SSᵀ)⁻¹ is the identity; one moves S. moments: exp_avg, exp_avg_sq, step and, with amsgrad,
    max_exp_avg_sq of each slot; moves: the directions. groups: those of the optimizer.
    """

    moments: list[dict[str, Tensor]] = field(default_factory=list)
    moves: list[Tensor] = field(default_factory=list)
    groups: list[dict] = field(default_factory=list)
    parts = 2

    def add(self, slot: Slot, kept: dict[str, Tensor]) -> None:
        super().add(slot, kept)
        self.moments.append({key: self.in_use(slot, tensor) for key, tensor in kept.items()})
        self.moves.append(self.empty(slot.target.dtype) if slot.at is None else _contiguous_like(slot.target))

    @functools.cached_property
    def _moving(self) -> list[int]:
        return [i for i, slot in enumerate(self.slots) if slot.at is not None]

    @functools.cached_property
    def _layer_of(self) -> Tensor:
        """Of each moving slot."""
        return torch.tensor([i // self._width for i in self._moving], device=self.device)

    @property
    def _width(self) -> int:
        return self.parts * len(ROLES)

    @functools.cached_property
    def _jobs(self) -> dict[tuple[int, int], list[int]]:
        """The moving slots by (layer, group)."""
        jobs = {}
        for i in self._moving:
            jobs.setdefault((i // self._width, self.slots[i].place[0]), []).append(i)
        return jobs

    @functools.cached_property
    def _heads(self) -> list[tuple[int, int]]:
        """The first moving slot of each entry of the op, with its layer."""
        first = {}
        for i in self._moving:
            first.setdefault(i // len(ROLES), i)
        return [(i, entry // self.parts) for entry, i in first.items()]

    def directions(self, grads: list[Tensor | None]) -> list[Tensor]:
        """m̂ / (√v̂ + eps) by torch's fused rule, which steps a parameter that is 0 with lr = -1 and no decay.

        A layer with a gradient that is not finite, or whose squares are not, keeps its moments and its step count,
        and its directions are NaN, at which the op leaves it alone. Nothing waits for the device.
        """
        given = {i: self.gradient(self.slots[i], grads) for i in self._moving}
        if self.device.type == "cpu":
            norms = [torch.dot(g.view(-1), g.view(-1)) for g in given.values()]
        else:
            norms = list(torch._foreach_norm(list(given.values())))
        lost = torch.stack(norms).isfinite().logical_not()
        lost = torch.zeros(len(self.layers), device=self.device).index_add_(0, self._layer_of, lost.float()) > 0
        flags, starts = lost.float().unbind(), torch.where(lost, math.nan, 0.0).unbind()
        counted = lost.logical_not().float().unbind()

        torch._foreach_zero_([self.moves[i] for i in self._moving])
        for i, layer in self._heads:
            self.moves[i].copy_(starts[layer])
        torch._foreach_add_(
            [self.moments[i]["step"] for i in self._moving], [counted[i // self._width] for i in self._moving]
        )
        for (layer, g), at in self._jobs.items():
            group, moments = self.groups[g], [self.moments[i] for i in at]
            torch._fused_adamw_(
                [self.moves[i] for i in at],
                [given[i] for i in at],
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
                found_inf=flags[layer],
            )
        return self.moves


class CondLRAdamW(ConstrainedOptimizer):
    """AdamW on W = U S Vᵀ with UᵀU = VᵀV = I and kappa(S) <= 1 + tau after every step.

    The moments live in ambient space, un-projected, as those of torch.optim.AdamW. Of Adam's direction
    D = m̂ / (√v̂ + eps) the factors take the tangent part and return by QR: U <- qf(U - lr (I - UUᵀ) D_U), V alike;
    the core takes AdamW's step with decoupled weight decay and is clipped:
    S <- clip_spectrum((1 - lr weight_decay) S - lr D_S, tau, band, sigma_max). All other parameters follow
    torch.optim.AdamW.

    The preconditioner (SSᵀ)⁻¹ of CondLRSGD is left out: it takes the scale of S out of ∂L/∂U = ∂L/∂W V Sᵀ, and D,
    which does not change when a gradient is scaled, has lost that scale already.

    At construction (and in add_param_group) factors that are not orthonormal to 1e-4 are replaced by their Q with
    R absorbed in S, and a core outside the bound is clipped, so the bound holds from the start.

    Args:
        model_or_groups: a module, its named_parameters(), or parameter groups (see param_groups); layers are
            found by their parameter names prefix.U, prefix.S, prefix.V.
        lr, betas, eps, weight_decay, amsgrad, maximize: as torch.optim.AdamW. Weight decay acts on cores, biases and
            dense weights, not on U and V, whose columns keep length 1.
        tau: slack >= 0 of the condition number; Inf for no bound.
        band, sigma_max: as linalg.clip_spectrum.
        capturable: the step waits for nothing, so that a CUDA graph can capture it after a warm-up step. Options that
            are tensors of one element on the device are then read at every step, plain numbers are part of what is
            captured: lr, tau and sigma_max, in groups of low-rank layers alone also weight_decay. Needs the Triton
            step.
        check_finite: raise, naming the layer, for non-finite gradients (before anything has changed) and for
            layers that had to be left unchanged. Costs a wait for the device per step.

    A layer with a gradient whose squares are not finite is left unchanged with its bias, moments and step counts, and
    counted in `skipped`. float16 and bfloat16 layers are stepped on float32 master copies kept in the state, with
    float32 moments; the bound holds for the masters. Beside the state the optimizer holds one direction per
    parameter of a low-rank layer.

    It does not promise steps that are the same in every basis: the square roots are taken entry by entry, in the
    basis that U and V happen to have.

    Raises:
        ValueError: hyper-parameters out of range, bare parameters of low-rank layers, a layer with a factor
            missing. NonFiniteError: NaN or Inf in a factor, with the layer's name.

    Source: Loshchilov & Hutter, Decoupled weight decay regularization, ICLR 2019 (arXiv 1711.05101); moments in
        ambient space, and a direction that is projected and retracted, as in Zangrando, Sutti & Tudisco,
        Stiefel-AdamW (2026). Becigneul & Ganea, Riemannian adaptive optimization methods, ICLR 2019 (arXiv
        1810.00760), scale each manifold of a product by one number; their proofs do not cover steps scaled by entry.
    """

    def __init__(
        self,
        model_or_groups,
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
    _numbers = ("lr", "eps", "weight_decay")
    _tensors_alone = ("weight_decay",)
    _buffers = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    _call = AdamCall
    _takes_sparse = False

    def _check_options(self, group: dict) -> None:
        super()._check_options(group)
        if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
            raise ValueError(f"{self._name}: betas must be two numbers in [0, 1), got {group['betas']}")

    def _kind(self, group: dict) -> bool:
        return bool(group["amsgrad"])

    def _moments(self, p: Tensor, target: Tensor, amsgrad: bool) -> dict[str, Tensor]:
        """The state of p, which is stepped as `target`; started where it is not there."""
        state = self.state[p]
        for key in self._buffers[: 3 if amsgrad else 2]:
            if key not in state:
                state[key] = torch.zeros_like(target)
            elif state[key].dtype != target.dtype or state[key].stride() != target.stride():
                # the model's dtype has changed, say
                state[key] = torch.empty_like(target).copy_(state[key])
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        return {key: state[key] for key in (*self._buffers, "step") if key in state}

    def _add_layer(self, call: AdamCall, slots: list[Slot]) -> None:
        call.groups = self.param_groups
        U, S, V, bias = slots
        eye = torch.eye(len(S.target), dtype=S.target.dtype, device=call.device)
        identity = Slot(None, None, eye, S.place)
        nothing = Slot(None, None, call.empty(S.target.dtype), S.place)
        for slot in (U, identity, V, bias, replace(U, at=None), S, replace(V, at=None), nothing):
            moving = slot.at is not None
            amsgrad = self.param_groups[slot.place[0]]["amsgrad"]
            call.add(slot, self._moments(slot.p, _contiguous_like(slot.whole), amsgrad) if moving else {})

    def _step_dense(self, group: dict, params: list[Tensor], grads: list[Tensor]) -> None:
        moments = [self._moments(p, p, group["amsgrad"]) for p in params]
        averages = [[m[key] for m in moments] for key in self._buffers[: 3 if group["amsgrad"] else 2]]
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

    def load_state_dict(self, state_dict) -> None:
        super().load_state_dict(state_dict)
        for p, state in self.state.items():
            if "step" in state:  # torch keeps some on the CPU, and some are numbers
                state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=p.device)


def _contiguous_like(t: Tensor) -> Tensor:
    """Room for what torch's fused rule works on, which walks raw memory, beside gradients that are contiguous."""
    return torch.empty_like(t, memory_format=torch.contiguous_format)
