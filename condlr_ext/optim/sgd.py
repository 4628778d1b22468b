"""CondLRSGD: SGD whose step keeps every low-rank layer on the constraint set."""

import math

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.sgd import sgd

from .. import linalg, ops, reference
from ..errors import NonFiniteError
from ..reference import BANDS, HYPER, ROLES
from .call import StepCall
from .groups import assign_roles, link_layers, module_group

_ORTHONORMAL = 1e-4  # factors that are off by more are replaced by their Q at the start


class CondLRSGD(Optimizer):
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
        if capturable and check_finite:
            raise ValueError("CondLRSGD: check_finite=True waits for the device, which capturable=True must not")
        if isinstance(model_or_groups, nn.Module):
            model_or_groups = [module_group(model_or_groups)]
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
        self.capturable, self.check_finite = capturable, check_finite
        self._skipped: dict[torch.device, Tensor] = {}  # per device, counts of the layers in order
        self._waiting: set[str] = set()  # frozen layers, put on the constraint set when they first get a gradient
        self._layers = None  # layers are linked once all groups are there
        super().__init__(model_or_groups, defaults)
        self._link()
        self._start(self._layers)

    # ------------------------------------------------------------------------------------------ groups

    def add_param_group(self, param_group: dict) -> None:
        """As torch's; the new group must hold all of U, S, V of any layer it has a part of."""
        super().add_param_group(param_group)
        try:
            _check_options(self.param_groups[-1])
            if self._layers is not None:
                known = len(self._layers)
                self._link()
                self._start(self._layers[known:])
        except Exception:
            self.param_groups.pop()
            if self._layers is not None:
                self._link()
            raise

    def _link(self) -> None:
        assign_roles(self.param_groups)
        self._layers = link_layers(self.param_groups)
        in_layer = {place for layer in self._layers for place in layer.places}
        self._others = [
            [i for i in range(len(group["params"])) if (g, i) not in in_layer]
            for g, group in enumerate(self.param_groups)
        ]
        for group, others in zip(self.param_groups, self._others, strict=True):
            tensors = [name for name in _NUMBERS[1:] if isinstance(group[name], Tensor)]
            if self.capturable and others and tensors:
                raise ValueError(
                    f"CondLRSGD: {tensors[0]} may be a tensor under capturable=True in groups of low-rank layers alone,"
                    " got it in one with other parameters"
                )
        self._calls: list[StepCall] = []
        self._calls_key = None  # of what the calls depend on

    def _place(self, place) -> Tensor | None:
        return None if place is None else self.param_groups[place[0]]["params"][place[1]]

    @torch.no_grad()
    def _start(self, layers) -> None:
        """Puts the layers on the constraint set; nothing is written before all of them have been checked."""
        for layer in layers:
            params = [p for p in map(self._place, layer.places) if p is not None]
            kinds = {(p.device, p.dtype) for p in params}
            if len(kinds) > 1:
                got = ", ".join(f"{p.dtype} on {p.device}" for p in params)
                raise ValueError(f"CondLRSGD: layer {layer.name!r} must have one dtype and device, got {got}")
            for role, p in zip(ROLES, map(self._place, layer.places), strict=True):
                if p is not None and not p.is_meta and not torch.isfinite(p).all():
                    raise NonFiniteError(f"CondLRSGD: {role} of layer {layer.name!r} must be finite, got NaN or Inf")
        for layer in layers:
            params = [self._place(place) for place in layer.places]
            if params[0].is_meta:
                continue
            if not any(p.requires_grad for p in params[:3]):
                self._waiting.add(layer.name)
                continue
            self._waiting.discard(layer.name)
            group = self.param_groups[layer.places[1][0]]
            masters = [self._master(p) for p in params]
            tau, sigma_max = (v if v is None else float(v) for v in (group["tau"], group["sigma_max"]))
            start_on_constraint_set(*masters[:3], tau, group["band"], sigma_max)
            for p, master in zip(params, masters, strict=True):
                if p is not master:
                    p.copy_(master)

    def _master(self, p: Tensor | None) -> Tensor | None:
        """The tensor that is stepped: the parameter, or its float32 copy in the state."""
        if p is None or p.dtype not in (torch.float16, torch.bfloat16):
            return p
        state = self.state[p]
        if "master" not in state:
            state["master"] = p.detach().float()
        else:  # whoever wrote to the parameter since the last step meant it
            master = state["master"]
            master.copy_(torch.where(p == master.to(p.dtype), master, p.float()))
        return state["master"]

    # -------------------------------------------------------------------------------------------- step

    @torch.no_grad()
    def step(self, closure=None):
        """One step; returns the closure's loss if one is given.

        Raises:
            NonFiniteError: with check_finite, for a non-finite gradient (nothing has changed then), or after the
                step for layers that were left unchanged. RuntimeError: sparse gradients.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.check_finite:
            self._check_gradients()
        params = [p for group in self.param_groups for p in group["params"]]
        self._step_layers(params, [p.grad for p in params])
        self._step_others()
        return loss

    @property
    def skipped(self) -> Tensor:
        """How often a layer was left unchanged, int64, on the parameters' device."""
        totals = [counts.sum() for counts in self._skipped.values()]
        return (
            sum((t.to(totals[0].device) for t in totals[1:]), totals[0])
            if totals
            else torch.zeros((), dtype=torch.int64)
        )

    def _step_layers(self, params: list[Tensor], grads: list[Tensor | None]) -> None:
        key = ([g is None for g in grads], [bool(group["momentum"]) for group in self.param_groups])
        if key != self._calls_key or not all(call.holds(params, self.state) for call in self._calls):
            if self.capturable and _capturing():
                raise RuntimeError(
                    "CondLRSGD.step: take a step with these parameters and momentum buffers, two if momentum starts,"
                    " before one is captured"
                )
            self._calls = self._make_calls(params, grads)
            self._calls_key = key
        for call in self._calls:
            self._step_device(call, grads)

    def _make_calls(self, params: list[Tensor], grads: list[Tensor | None]) -> list[StepCall]:
        begin = [0]
        for group in self.param_groups:
            begin.append(begin[-1] + len(group["params"]))
        calls: dict[torch.device, StepCall] = {}
        for index, layer in enumerate(self._layers):
            at = [None if place is None else begin[place[0]] + place[1] for place in layer.places]
            if all(i is None or grads[i] is None for i in at):
                continue
            if layer.name in self._waiting:
                self._start([layer])
            device = params[at[0]].device
            call = calls.setdefault(device, StepCall(device, self.capturable))
            call.layers.append(index)
            empty = self._master(params[at[0]]).new_empty(0)
            for i, place in zip(at, layer.places, strict=True):
                p = None if i is None else params[i]
                has_grad = p is not None and grads[i] is not None
                master = empty if p is None else self._master(p)
                buffer, fresh = empty, False
                if has_grad and self.param_groups[place[0]]["momentum"]:
                    buffer, fresh = self._buffer(p, master)
                call.add(i if has_grad else None, p, master, buffer, fresh, place or layer.places[1])
        return list(calls.values())

    def _buffer(self, p: Tensor, master: Tensor) -> tuple[Tensor, bool]:
        """The momentum buffer of p, and whether it starts with this step."""
        buffer = self.state[p].get("momentum_buffer")
        if buffer is None:
            return torch.zeros_like(master), True
        if buffer.dtype != master.dtype or not buffer.is_contiguous():  # the model's dtype has changed, say
            buffer = self.state[p]["momentum_buffer"] = buffer.to(master.dtype).contiguous()
        return buffer, False

    def _step_device(self, call: StepCall, grads: list[Tensor | None]) -> None:
        for p, _ in call.copies:
            self._master(p)
        counts = self._counts(call.device)
        starts = any(call.fresh)
        whole = len(call.layers) == len(counts) and not starts and not self.check_finite
        skipped = counts if whole else torch.zeros(len(call.layers), dtype=torch.int64, device=call.device)
        call.run(grads, self._table(call), skipped)
        if whole:
            return
        counts.index_add_(0, call.index, skipped)
        if starts or self.check_finite:  # waits for the device, but a buffer starts only once
            self._finish_start(call, set(skipped.nonzero().flatten().tolist()))

    def _finish_start(self, call: StepCall, left: set[int]) -> None:
        """Keeps the buffers that have started; left: the layers of the call that were left unchanged."""
        for slot, (i, fresh) in enumerate(zip(call.at, call.fresh, strict=True)):
            if i is not None and fresh and slot // len(ROLES) not in left:  # else its buffers have not started
                self.state[self._place(call.places[slot])]["momentum_buffer"] = call.buffers[slot]
        if any(call.fresh):
            self._calls_key = None
        if left and self.check_finite:
            names = (repr(self._layers[call.layers[i]].name) for i in sorted(left))
            raise NonFiniteError(
                "CondLRSGD.step: left unchanged, because the core is zero or the new value not finite:"
                f" {', '.join(names)}"
            )

    def _counts(self, device: torch.device) -> Tensor:
        """The counter of steps that left a layer unchanged, by layer."""
        counts = self._skipped.get(device)
        if counts is None or len(counts) < len(self._layers):
            grown = torch.zeros(len(self._layers), dtype=torch.int64, device=device)
            if counts is not None:
                grown[: len(counts)] = counts
            counts = self._skipped[device] = grown
        return counts

    def _table(self, call: StepCall) -> Tensor:
        """The step op's hyper-parameters [L, 4, 10] (HYPER), built again only when something changed.

        Capturable, it is on the device, where tensors among the options write their values anew.
        """
        read = id if self.capturable else float
        options = [
            [read(v) if isinstance(v := group[k], Tensor) else v for k in _OPTIONS] for group in self.param_groups
        ]
        if options != call.options:
            values = []
            for group in self.param_groups:
                _check_options(group)
                value = {k: group[k] if group[k] is None or k == "band" else float(group[k]) for k in _OPTIONS}
                value["band"] = BANDS.index(value["band"])
                value["sigma_max"] = math.inf if value["sigma_max"] is None else value["sigma_max"]
                values.append(value)
            rows = [
                [(values[g] | {"fresh": fresh})[name] for name in HYPER]
                for (g, _), fresh in zip(call.places, call.fresh, strict=True)
            ]
            shape = len(call.layers), len(ROLES), len(HYPER)
            call.options, call.table = options, torch.tensor(rows, dtype=torch.float64).reshape(shape)
            if self.capturable:
                call.table = call.table.to(call.device)
                call.live = self._live(call)
        for column, mine, value in call.live:
            column.copy_(torch.where(mine, value.to(column.dtype), column))
        return call.table

    def _live(self, call: StepCall) -> list[tuple[Tensor, Tensor, Tensor]]:
        """For options that are tensors: the table's column, the entries of their group in it, and the tensor."""
        live = []
        for g, group in enumerate(self.param_groups):
            for name in _OPTIONS:
                if isinstance(value := group[name], Tensor):
                    if value.device != call.device:
                        raise ValueError(
                            f"CondLRSGD: {name} as a tensor must be on the layers' device {call.device} under"
                            f" capturable=True, got {value.device}"
                        )
                    mine = torch.tensor([place[0] == g for place in call.places], device=call.device)
                    column = call.table[..., HYPER.index(name)]
                    live.append((column, mine.view(column.shape), value.detach().view(())))
        return live

    def _step_others(self) -> None:
        for group, others in zip(self.param_groups, self._others, strict=True):
            params = [p for i in others if (p := group["params"][i]).grad is not None]
            if not params:
                continue
            grads = [p.grad for p in params]
            if self.capturable:  # only the fused rule reads lr on the device, and it walks raw memory
                grads = [
                    g if g.stride() == p.stride() and g.dtype is p.dtype else torch.empty_like(p).copy_(g)
                    for p, g in zip(params, grads, strict=True)
                ]
            momentum = bool(group["momentum"])
            buffers = [self.state[p].get("momentum_buffer") if momentum else None for p in params]
            sgd(
                params,
                grads,
                buffers,
                has_sparse_grad=any(g.is_sparse for g in grads),
                fused=True if _fusible(params, grads, buffers, group["lr"], self.capturable) else None,
                lr=group["lr"],
                **{k: group[k] for k in ("momentum", "dampening", "weight_decay", "nesterov", "maximize")},
            )
            if momentum:
                for p, buffer in zip(params, buffers, strict=True):
                    self.state[p]["momentum_buffer"] = buffer

    def _check_gradients(self) -> None:
        for group in self.param_groups:
            for i, p in enumerate(group["params"]):
                if p.grad is None:
                    continue
                values = p.grad.coalesce().values() if p.grad.is_sparse else p.grad
                if not torch.isfinite(values).all():
                    name = group["param_names"][i] if "param_names" in group else f"#{i}"
                    raise NonFiniteError(
                        f"CondLRSGD.step: the gradient of {name} must be finite, got NaN or Inf; nothing was changed"
                    )

    # --------------------------------------------------------------------------------------------- state

    def __getstate__(self) -> dict:
        own = ("capturable", "check_finite", "_skipped", "_waiting")
        return super().__getstate__() | {name: getattr(self, name) for name in own}

    def __setstate__(self, state) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            _check_options(group)
        self._link()

    def load_state_dict(self, state_dict) -> None:
        """As torch's. Options the state does not have (it may be torch.optim.SGD's) stay as they are here.

        Raises:
            ValueError: the parameter names differ, an option is out of range; nothing has changed then.
        """
        saved_groups = [dict(group) for group in state_dict["param_groups"]]
        for g, (mine, saved) in enumerate(zip(self.param_groups, saved_groups, strict=False)):
            names, saved_names = mine.get("param_names"), saved.get("param_names")
            if names and saved_names and names != saved_names:
                here, there = next((a, b) for a, b in zip((*names, None), (*saved_names, None), strict=False) if a != b)
                raise ValueError(
                    f"CondLRSGD.load_state_dict: group {g} holds parameter {there!r} in the state where the optimizer"
                    f" has {here!r}"
                )
            for key, value in mine.items():
                if key != "params":
                    saved.setdefault(key, value)
            _check_options(saved)
        state_dict = {**state_dict, "param_groups": saved_groups}
        super().load_state_dict(state_dict)
        saved_ids = [i for group in saved_groups for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(saved_ids, params, strict=True):
            saved = state_dict["state"].get(i, {})
            for key in ("master", "momentum_buffer"):
                if "master" in saved and key in saved:  # torch has cast it to the parameter's dtype
                    self.state[p][key] = saved[key].detach().to(p.device, torch.float32, copy=True)


_OPTIONS = (
    "lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize", "tau", "band", "sigma_max",
)  # fmt: skip


_NUMBERS = ("lr", "momentum", "dampening", "weight_decay")


def start_on_constraint_set(U: Tensor, S: Tensor, V: Tensor, tau: float, band: str, sigma_max: float | None) -> None:
    """In place: U, V <- their Q if not orthonormal to 1e-4, with S <- R_U S R_Vᵀ; S clipped if outside the bound."""
    with ops.no_autocast(U.device.type):
        for X, transpose in ((U, False), (V, True)):
            gram = X.mT @ X
            if (gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).abs().max() > _ORTHONORMAL:
                Q, R = linalg.qr(X)
                X.copy_(Q)
                S.copy_(S @ R.mT if transpose else R @ S)
    sigma = linalg.svd(S.double()).sigma
    outside = reference.cond_from_sigma(sigma) > (1 + tau) * (1 + 1e-5)
    above = sigma[0] > (math.inf if sigma_max is None else sigma_max * (1 + 1e-5))
    if outside or above:  # inside, a resumed core stays bit for bit
        S.copy_(linalg.clip_spectrum(S, tau, band, sigma_max))


def _check_options(group: dict) -> None:
    for name in (*_NUMBERS, "tau", "sigma_max"):
        value = group[name]
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"CondLRSGD: {name} as a tensor must have one element, got shape {list(value.shape)}")
    for name in _NUMBERS:
        value = group[name]
        if not math.isfinite(value) or (float(value) < 0 and name != "dampening"):
            raise ValueError(f"CondLRSGD: {name} must be finite and >= 0, got {value}")
    if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
        got = f"momentum {group['momentum']}, dampening {group['dampening']}"
        raise ValueError(f"CondLRSGD: nesterov needs momentum > 0 and dampening 0, got {got}")
    tau, sigma_max = (float(v) if isinstance(v, Tensor) else v for v in (group["tau"], group["sigma_max"]))
    linalg.check_constraint("CondLRSGD", tau, group["band"], sigma_max)


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _fusible(params, grads, buffers, lr, capturable) -> bool:
    """Whether torch's fused SGD takes these as it should: it walks raw memory, so that strides must agree."""
    if isinstance(lr, Tensor) and not capturable:
        return False
    if any(b is None for b in buffers) != all(b is None for b in buffers):
        return False
    return all(
        p.device.type in ("cpu", "cuda")
        and p.is_floating_point()
        and all(
            t is None or (not t.is_sparse and t.dtype is p.dtype and t.device == p.device and t.stride() == p.stride())
            for t in (g, b)
        )
        for p, g, b in zip(params, grads, buffers, strict=True)
    )
