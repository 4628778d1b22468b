"""CondLRSGD: SGD whose step keeps every low-rank layer on the constraint set."""

import math

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.sgd import sgd

from .. import linalg, ops, reference
from ..errors import BackendError, NonFiniteError
from ..reference import BANDS, HYPER, ROLES
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
        capturable: not available in this version.
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
        if capturable:
            raise BackendError("CondLRSGD: capturable=True needs the Triton step, which this version does not have")
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
        self.check_finite = check_finite
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
        self._in_layer = {place for layer in self._layers for place in layer.places if place}
        self._table_key = None

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
            start_on_constraint_set(*masters[:3], group["tau"], group["band"], group["sigma_max"])
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
        self._step_layers()
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

    def _step_layers(self) -> None:
        by_device: dict[torch.device, list] = {}
        for index, layer in enumerate(self._layers):
            params = [self._place(place) for place in layer.places]
            if any(p is not None and p.grad is not None for p in params):
                if layer.name in self._waiting:
                    self._start([layer])
                by_device.setdefault(params[0].device, []).append((index, layer, params))
        for device, entries in by_device.items():
            self._step_device(device, entries)

    def _step_device(self, device: torch.device, entries: list) -> None:
        params, grads, buffers, fresh, copies, started = [], [], [], [], [], []
        for index, layer, layer_params in entries:
            masters = [self._master(p) for p in layer_params]
            empty = masters[0].new_empty(0)
            for place, p, master in zip(layer.places, layer_params, masters, strict=True):
                has_grad = p is not None and p.grad is not None
                params.append(empty if p is None else master)
                grads.append(_dense_gradient(p, master.dtype) if has_grad else empty)
                buffer = empty
                is_fresh = False
                if has_grad and self.param_groups[place[0]]["momentum"]:
                    buffer = self.state[p].get("momentum_buffer")
                    is_fresh = buffer is None
                    if is_fresh:
                        buffer = torch.zeros_like(master)
                    elif buffer.dtype != master.dtype:  # the model's dtype has changed
                        buffer = self.state[p]["momentum_buffer"] = buffer.to(master.dtype)
                    if is_fresh:
                        started.append((index, p, buffer))
                buffers.append(buffer)
                fresh.append(is_fresh)
                if has_grad and master is not p:
                    copies.append((p, master))
        table = self._table([layer for _, layer, _ in entries], fresh)
        skipped = torch.zeros(len(entries), dtype=torch.int64, device=device)
        ops.step.step(params, grads, buffers, table, skipped)
        # autograd must notice: compiled kernels write through raw pointers
        torch.autograd.graph.increment_version([t for t in (*params, *buffers) if t.numel()])
        for p, master in copies:
            p.copy_(master)
        self._count(device, [index for index, _, _ in entries], skipped)
        if started or self.check_finite:  # waits for the device, but a buffer starts only once
            left = {entries[i][0] for i in skipped.nonzero().flatten().tolist()}
            for index, p, buffer in started:
                if index not in left:  # a layer left unchanged has not started its buffers
                    self.state[p]["momentum_buffer"] = buffer
            if left and self.check_finite:
                raise NonFiniteError(
                    "CondLRSGD.step: left unchanged, because the core is zero or the new value not finite:"
                    f" {', '.join(repr(self._layers[index].name) for index in sorted(left))}"
                )

    def _count(self, device: torch.device, index: list[int], skipped: Tensor) -> None:
        counts = self._skipped.get(device)
        if counts is None or len(counts) < len(self._layers):
            grown = torch.zeros(len(self._layers), dtype=torch.int64, device=device)
            if counts is not None:
                grown[: len(counts)] = counts
            counts = self._skipped[device] = grown
        if index == list(range(len(counts))):
            counts += skipped
        else:
            counts[index] += skipped

    def _table(self, layers, fresh: list[bool]) -> Tensor:
        """The step op's hyper-parameters [L, 4, 10] (HYPER), built again only when something changed."""
        options = [tuple(float(g[k]) if k in _NUMBERS else g[k] for k in _OPTIONS) for g in self.param_groups]
        key = (options, fresh, [layer.name for layer in layers])
        if key != self._table_key:
            values = []
            for g, group in enumerate(self.param_groups):
                _check_options(group)
                value = dict(zip(_OPTIONS, options[g], strict=True))
                value["band"] = BANDS.index(value["band"])
                value["sigma_max"] = math.inf if value["sigma_max"] is None else value["sigma_max"]
                values.append(value)
            places = [place or layer.places[1] for layer in layers for place in layer.places]
            rows = [
                [(values[g] | {"fresh": new})[name] for name in HYPER]
                for (g, _), new in zip(places, fresh, strict=True)
            ]
            self._table_key = key
            self._table_value = torch.tensor(rows, dtype=torch.float64).reshape(len(layers), len(ROLES), len(HYPER))
        return self._table_value

    def _step_others(self) -> None:
        for g, group in enumerate(self.param_groups):
            params = [p for i, p in enumerate(group["params"]) if p.grad is not None and (g, i) not in self._in_layer]
            if not params:
                continue
            buffers = [self.state[p].get("momentum_buffer") for p in params] if group["momentum"] else []
            sgd(
                params,
                [p.grad for p in params],
                buffers if group["momentum"] else [None] * len(params),
                has_sparse_grad=any(p.grad.is_sparse for p in params),
                lr=group["lr"],
                **{k: group[k] for k in ("momentum", "dampening", "weight_decay", "nesterov", "maximize")},
            )
            for p, buffer in zip(params, buffers, strict=False):
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
        own = ("check_finite", "_skipped", "_waiting")
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
    for name in _NUMBERS:
        value = group[name]
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"CondLRSGD: {name} as a tensor must have one element, got shape {list(value.shape)}")
        if not math.isfinite(value) or (float(value) < 0 and name != "dampening"):
            raise ValueError(f"CondLRSGD: {name} must be finite and >= 0, got {value}")
    if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
        got = f"momentum {group['momentum']}, dampening {group['dampening']}"
        raise ValueError(f"CondLRSGD: nesterov needs momentum > 0 and dampening 0, got {got}")
    linalg.check_constraint("CondLRSGD", group["tau"], group["band"], group["sigma_max"])


def _dense_gradient(p: Tensor, dtype: torch.dtype) -> Tensor:
    if p.grad.is_sparse:
        raise RuntimeError("CondLRSGD does not take sparse gradients for low-rank layers")
    return p.grad.to(dtype).contiguous()
