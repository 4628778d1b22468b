"""What optimizers on the constraint set share: layers, masters, the call of the step op, state_dict."""

import math

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import linalg, ops, reference
from ..errors import NonFiniteError
from ..nn.layer import active_rank
from ..reference import BANDS, HYPER, ROLES
from .groups import LayerSlots, assign_roles, link_layers, module_group
from .step_args import Slot, StepCall

_LOW = (torch.float16, torch.bfloat16)  # layers of these have float32 masters
_ORTHONORMAL = 1e-4  # factors that are off by more are replaced by their Q at the start


class ConstrainedOptimizer(Optimizer):
    """An optimizer whose step leaves every low-rank layer on the constraint set; subclasses say which way it goes.

    Here is what they share: layers found by the names of the parameters and put on the constraint set at the start,
    float32 masters of low-precision layers, the table of options, the count of layers left unchanged, state_dict.

    A subclass names its options in the table of the step op (`_options`), those that must be finite numbers >= 0
    (`_numbers`; `_signed` may be negative), those that under capturable may be tensors in groups of low-rank layers
    alone (`_tensors_alone`), and its state (`_buffers`). It fills the call (`_add_layer`) and steps the other
    parameters (`_step_dense`).
    """

    _options: tuple[str, ...]
    _numbers: tuple[str, ...]
    _signed: tuple[str, ...] = ()
    _tensors_alone: tuple[str, ...]
    _buffers: tuple[str, ...]
    _call = StepCall
    _takes_sparse = True  # outside of low-rank layers

    def __init__(self, model_or_groups, defaults: dict, capturable: bool, check_finite: bool):
        if capturable and check_finite:
            raise ValueError(f"{self._name}: check_finite=True waits for the device, which capturable=True must not")
        if isinstance(model_or_groups, nn.Module):
            model_or_groups = [module_group(model_or_groups)]
        self.capturable, self.check_finite = capturable, check_finite
        self._skipped: dict[torch.device, Tensor] = {}  # per device, counts of the layers in order
        self._waiting: set[str] = set()  # frozen layers, put on the constraint set when they first get a gradient
        self._captured: list[tuple] = []  # what CUDA graphs of a step use, by its address
        self._layers = None  # layers are linked once all groups are there
        super().__init__(model_or_groups, defaults)
        self._link()
        self._start(self._layers)

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _kind(self, group: dict):
        """What of a group's options decides which buffers there are."""
        raise NotImplementedError

    def _add_layer(self, call: StepCall, slots: list[Slot]) -> None:
        """Adds to the call what steps one layer; slots in the order of ROLES."""
        raise NotImplementedError

    def _step_dense(self, group: dict, params: list[Tensor], grads: list[Tensor]) -> None:
        """Steps parameters of a group that belong to no low-rank layer."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------ groups

    def add_param_group(self, param_group: dict) -> None:
        """As torch's; the new group must hold all of U, S, V of any layer it has a part of."""
        super().add_param_group(param_group)
        try:
            self._check_options(self.param_groups[-1])
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
            tensors = [name for name in self._tensors_alone if isinstance(group[name], Tensor)]
            if self.capturable and others and tensors:
                raise ValueError(
                    f"{self._name}: {tensors[0]} may be a tensor under capturable=True in groups of low-rank layers"
                    " alone, got it in one with other parameters"
                )
        self._calls: list[StepCall] = []
        self._calls_key = None  # of what the calls depend on

    def _check_options(self, group: dict) -> None:
        for name in (*self._numbers, "tau", "sigma_max"):
            value = group[name]
            if isinstance(value, Tensor) and value.numel() != 1:
                got = list(value.shape)
                raise ValueError(f"{self._name}: {name} as a tensor must have one element, got shape {got}")
        for name in self._numbers:
            value = group[name]
            if not math.isfinite(value) or (float(value) < 0 and name not in self._signed):
                raise ValueError(f"{self._name}: {name} must be finite and >= 0, got {value}")
        tau, sigma_max = (float(v) if isinstance(v, Tensor) else v for v in (group["tau"], group["sigma_max"]))
        linalg.check_constraint(self._name, tau, group["band"], sigma_max)

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
                raise ValueError(f"{self._name}: layer {layer.name!r} must have one dtype and device, got {got}")
            for role, p in zip(ROLES, map(self._place, layer.places), strict=True):
                if p is not None and not p.is_meta and not torch.isfinite(p).all():
                    raise NonFiniteError(f"{self._name}: {role} of layer {layer.name!r} must be finite, got NaN or Inf")
            self._check_frozen(layer)
        for layer in layers:
            params = [self._place(place) for place in layer.places]
            if params[0].is_meta:
                continue
            if not any(p.requires_grad for p in params[:3]):
                self._waiting.add(layer.name)
                continue
            self._waiting.discard(layer.name)
            masters = [self._master(p) for p in params]
            start_on_constraint_set(*in_use(*masters[:3]), *self._constraint(layer))
            for p, master in zip(params, masters, strict=True):
                if p is not master and p.requires_grad:
                    p.copy_(master)

    def _constraint(self, layer: LayerSlots) -> tuple[float, str, float | None]:
        """tau, band and sigma_max of a layer."""
        group = self.param_groups[layer.places[1][0]]
        tau, sigma_max = (v if v is None else float(v) for v in (group["tau"], group["sigma_max"]))
        return tau, group["band"], sigma_max

    def _check_frozen(self, layer: LayerSlots) -> None:
        """Raises ValueError where some factors are frozen and the start would change one by more than its rounding."""
        params = [self._place(place) for place in layer.places[:3]]
        if params[0].is_meta or len({p.requires_grad for p in params}) == 1:
            return
        started = [p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True) for p in params]
        start_on_constraint_set(*in_use(*started), *self._constraint(layer))
        for role, p, X in zip(ROLES, params, started, strict=False):
            if not p.requires_grad and (X - p).norm() > 8 * torch.finfo(p.dtype).eps * p.norm():
                raise ValueError(
                    f"{self._name}: {role} of layer {layer.name!r} is frozen and the layer not on the constraint set;"
                    " put it there first (linalg.orthonormalize, linalg.clip_spectrum) or let all of U, S, V be trained"
                )

    def _master(self, p: Tensor | None) -> Tensor | None:
        """The tensor that is stepped: the parameter, or its float32 copy in the state."""
        if p is None or p.dtype not in _LOW:
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
        grads = [p.grad for p in params]
        if any(g is not None and g.is_sparse for g in grads):
            self._check_sparse()
        self._step_layers(params, grads)
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
        key = ([g is None for g in grads], [self._kind(group) for group in self.param_groups])
        if key != self._calls_key or not all(call.holds(params, self.state) for call in self._calls):
            if self.capturable and _capturing():
                raise RuntimeError(
                    f"{self._name}.step: take a step with these parameters and buffers, two if momentum starts, before"
                    " one is captured"
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
            if device not in calls:
                calls[device] = self._call(device, self._name, self.capturable)
            call = calls[device]
            call.layers.append(index)
            call.cores.append(params[at[1]])
            masters = [None if i is None else self._master(params[i]) for i in at]
            r = active_rank(*masters[:3])
            slots = []
            for i, place, role, master in zip(at, layer.places, ROLES, masters, strict=True):
                if i is None:
                    slots.append(Slot(None, None, call.empty(slots[0].target.dtype), layer.places[1]))
                else:
                    part = where_in_use(role, r) if role != "bias" and r < len(masters[1]) else None
                    slots.append(call.slot(None if grads[i] is None else i, params[i], master, place, part))
            self._add_layer(call, slots)
        return list(calls.values())

    def _step_device(self, call: StepCall, grads: list[Tensor | None]) -> None:
        for p, _ in call.copies:
            self._master(p)
        counts = self._counts(call.device)
        starts = any(call.fresh)
        whole = call.parts == 1 and len(call.layers) == len(counts) and not starts and not self.check_finite
        skipped = counts if whole else call.skipped.zero_()
        call.run(grads, self._table(call), skipped)
        if self.capturable and _capturing():
            self._captured.append((call, call.table, call.live, counts))
        if whole:
            return
        left = skipped.view(-1, call.parts).amax(1)
        counts.index_add_(0, call.index, left)
        if starts or self.check_finite:  # waits for the device, but a buffer starts only once
            self._finish(call, set(left.nonzero().flatten().tolist()))

    def _finish(self, call: StepCall, left: set[int]) -> None:
        """After a step that starts buffers or is checked; left: the layers of the call that were left unchanged."""
        if left and self.check_finite:
            names = (repr(self._layers[call.layers[i]].name) for i in sorted(left))
            raise NonFiniteError(
                f"{self._name}.step: left unchanged, because the core is zero or the new value not finite:"
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
            [read(v) if isinstance(v := group[k], Tensor) else v for k in self._options] for group in self.param_groups
        ]
        if options != call.options:
            values = []
            for group in self.param_groups:
                self._check_options(group)
                value = {k: group[k] if group[k] is None or k == "band" else float(group[k]) for k in self._options}
                value["band"] = BANDS.index(value["band"])
                value["sigma_max"] = math.inf if value["sigma_max"] is None else value["sigma_max"]
                values.append(value)
            rows = [
                [(values[g] | {"fresh": fresh}).get(name, 0) for name in HYPER]
                for (g, _), fresh in zip((slot.place for slot in call.slots), call.fresh, strict=True)
            ]
            shape = len(call.slots) // len(ROLES), len(ROLES), len(HYPER)
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
            for name in self._options:
                if isinstance(value := group[name], Tensor):
                    if value.device != call.device:
                        raise ValueError(
                            f"{self._name}: {name} as a tensor must be on the layers' device {call.device} under"
                            f" capturable=True, got {value.device}"
                        )
                    mine = torch.tensor([slot.place[0] == g for slot in call.slots], device=call.device)
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
            self._step_dense(group, params, grads)

    def _check_sparse(self) -> None:
        for group, others in zip(self.param_groups, self._others, strict=True):
            for i, p in enumerate(group["params"]):
                if p.grad is not None and p.grad.is_sparse and not (self._takes_sparse and i in others):
                    where = " for low-rank layers" if self._takes_sparse else ""
                    raise RuntimeError(
                        f"{self._name}.step: takes no sparse gradients{where}, got one for {_name_of(group, i)}"
                    )

    def _check_gradients(self) -> None:
        for group in self.param_groups:
            for i, p in enumerate(group["params"]):
                if p.grad is None:
                    continue
                values = p.grad.coalesce().values() if p.grad.is_sparse else p.grad
                if not torch.isfinite(values).all():
                    name = _name_of(group, i)
                    raise NonFiniteError(
                        f"{self._name}.step: the gradient of {name} must be finite, got NaN or Inf; nothing was changed"
                    )

    # --------------------------------------------------------------------------------------------- state

    def __getstate__(self) -> dict:
        own = ("capturable", "check_finite", "_skipped", "_waiting")
        return super().__getstate__() | {name: getattr(self, name) for name in own}

    def __setstate__(self, state) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_captured", [])  # loading a state_dict comes here too
        for group in self.param_groups:
            self._check_options(group)
        self._link()

    def load_state_dict(self, state_dict) -> None:
        """As torch's. Options the state does not have (it may be that of torch's own optimizer) stay as they are here.

        float16 and bfloat16 layers take the values of the masters in the state.

        Raises:
            ValueError: the parameter names or shapes differ, an option is out of range; nothing has changed then.
        """
        saved_groups = [dict(group) for group in state_dict["param_groups"]]
        for g, (mine, saved) in enumerate(zip(self.param_groups, saved_groups, strict=False)):
            names, saved_names = mine.get("param_names"), saved.get("param_names")
            if names and saved_names and names != saved_names:
                here, there = next((a, b) for a, b in zip((*names, None), (*saved_names, None), strict=False) if a != b)
                raise ValueError(
                    f"{self._name}.load_state_dict: group {g} holds parameter {there!r} in the state where the"
                    f" optimizer has {here!r}"
                )
            for key, value in mine.items():
                if key != "params":
                    saved.setdefault(key, value)
            self._check_options(saved)
            self._check_shapes(g, saved["params"], state_dict["state"])
        state_dict = {**state_dict, "param_groups": saved_groups}
        super().load_state_dict(state_dict)
        saved_ids = [i for group in saved_groups for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(saved_ids, params, strict=True):
            saved = state_dict["state"].get(i, {})
            for key in ("master", *self._buffers):
                if "master" in saved and key in saved:  # torch has cast it to the parameter's dtype
                    self.state[p][key] = saved[key].detach().to(p.device, torch.float32, copy=True)
            if (
                "master" in saved and p.dtype in _LOW
            ):  # from which this optimizer may have moved p to the constraint set when it was made
                with torch.no_grad():
                    p.copy_(self.state[p]["master"])

    def _check_shapes(self, g: int, ids: list, state: dict) -> None:
        """Raises ValueError for the state of another shape than that of its parameter in group g."""
        for i, (key, p) in enumerate(zip(ids, self.param_groups[g]["params"], strict=False)):
            for name in ("master", *self._buffers):
                value = state.get(key, {}).get(name)
                if isinstance(value, Tensor) and value.shape != p.shape:
                    raise ValueError(
                        f"{self._name}.load_state_dict: {name} of {_name_of(self.param_groups[g], i)} must be"
                        f" {list(p.shape)} as the parameter is, got {list(value.shape)}; the ranks differ?"
                    )


def where_in_use(role: str, r: int) -> tuple[slice, slice]:
    """Where the r directions in use are in U, S or V (see nn.layer.active_rank)."""
    return (slice(r) if role == "S" else slice(None)), slice(r)


def in_use(U: Tensor, S: Tensor, V: Tensor) -> list[Tensor]:
    """Views of what is in use of the factors."""
    r = active_rank(U, S, V)
    return [X[where_in_use(role, r)] for role, X in zip("USV", (U, S, V), strict=True)]


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


def _name_of(group: dict, i: int) -> str:
    return group["param_names"][i] if "param_names" in group else f"#{i}"


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def fusible(params: list[Tensor], *others: list[Tensor | None]) -> bool:
    """Whether torch's fused rules take these as they should: they walk raw memory, so that strides must agree."""
    return all(
        p.device.type in ("cpu", "cuda")
        and p.is_floating_point()
        and all(
            t is None or (not t.is_sparse and t.dtype is p.dtype and t.device == p.device and t.stride() == p.stride())
            for t in ts
        )
        for p, *ts in zip(params, *others, strict=True)
    )
