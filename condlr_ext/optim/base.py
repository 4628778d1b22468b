"""Base class of the optimizers on the constraint set: layers, masters, calls of the step op, state_dict."""

import itertools
import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import linalg, ops, reference
from .._shards import (
    Rows,
    Team,
    distributed_like,
    is_distributed,
    local,
    local_gradient,
    merged,
    qr,
    written_back,
)
from .._types import Closure, ModelOrGroups, Options
from ..errors import NonFiniteError
from ..nn.layer import active_rank, live_layers
from ..reference import LOW_PRECISION, ORTHONORMAL_INPUT, ROLES
from .divided_step import ACCURACY
from .groups import LayerSlots, link_layers, module_group, refuse_overlaps
from .step_args import Slot, StepCall, skipped_steps


class ConstrainedOptimizer(Optimizer):
    """An optimizer whose step keeps every low-rank layer on the constraint set.

    At construction it finds the layers of its parameters, puts them on the constraint set and creates the state, with
    float32 masters of low-precision layers. It makes the calls of the step op. A subclass adds its directions: it fills
    each call with its state (`_add_layer`) and steps the parameters outside of low-rank layers (`_step_dense`).
    """

    capturable: bool
    check_finite: bool
    _options: tuple[str, ...]  # group options that are columns of the step op's table
    _finite_options: tuple[str, ...]  # those that must be finite numbers >= 0
    _may_be_negative: tuple[str, ...] = ()  # except these
    _tensor_options: tuple[str, ...]  # under capturable tensors only in groups of nothing but low-rank layers
    _buffers: tuple[str, ...]  # state tensors of the shape of their parameter
    _precondition = True  # whether U and V take (S Sᵀ)⁻¹ times their tangent direction
    _call = StepCall
    _takes_sparse = True  # outside of low-rank layers

    def __init__(self, model_or_groups: ModelOrGroups, defaults: Options, capturable: bool, check_finite: bool):
        if capturable and check_finite:
            raise ValueError(f"{self._name}: check_finite=True waits for the device, which capturable=True must not")
        if isinstance(model_or_groups, nn.Module):
            model_or_groups = [module_group(model_or_groups)]
        self.capturable, self.check_finite = capturable, check_finite
        self._skipped: dict[torch.device, Tensor] = {}  # by device: a count for each layer
        self._waiting: set[LayerSlots] = set()  # frozen; put on the constraint set at their first gradient
        self._captured: list[tuple] = []  # keeps alive what captured CUDA graphs read by address
        self._layers: list[LayerSlots] = []
        self._ready = False  # layers are looked for once all groups are there
        super().__init__(model_or_groups, defaults)
        self._take_groups(0)
        self._ready = True
        if not self._layers:  # a stage of a pipeline may have none
            warnings.warn(
                f"{self._name}: there is no low-rank layer among the parameters, so no bound is kept: call factorize"
                " before making the optimizer",
                stacklevel=3,
            )

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _state_signature(self, group: dict):
        """Return the options of a group that determine which buffers there are."""
        raise NotImplementedError

    def _create_state(self, p: Tensor, group: dict) -> None:
        """Create what is missing of the state of a parameter; that of a layer may have its master already."""
        raise NotImplementedError

    def _add_layer(self, call: StepCall, slots: list[Slot]) -> None:
        """Add the slots of one layer, in the order of ROLES, to the call."""
        raise NotImplementedError

    def _step_dense(self, group: dict, params: list[Tensor], grads: list[Tensor]) -> None:
        """Step parameters of a group that belong to no low-rank layer; the gradients are those of the local parts."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------ groups

    def add_param_group(self, param_group: Options) -> None:
        """Add a group, as torch does; it must hold all of U, S, V of every layer that it has one of.

        Parameters without names get some if those of the other groups have names.

        Raises:
            ValueError: An option is out of range, or a layer is incomplete. Nothing has changed then.
        """
        if self._ready and "param_names" in self.param_groups[0]:
            param_group = self._named(param_group)
        super().add_param_group(param_group)
        try:
            self._check_options(self.param_groups[-1])
            if self._ready:
                self._take_groups(len(self.param_groups) - 1)
        except Exception:
            self.param_groups.pop()
            raise

    def _named(self, group: dict) -> dict:
        """Return the group with names for its parameters, which torch wants in all groups or in none."""
        params = group["params"] if isinstance(group["params"], Tensor) else list(group["params"])
        group["params"] = params
        named = isinstance(params, list) and any(isinstance(p, tuple) for p in params)
        if named or "param_names" in group or "roles" in group:  # roles are those of names
            return group
        g, count = len(self.param_groups), 1 if isinstance(params, Tensor) else len(params)
        return group | {"param_names": [f"parameter {i} of group {g}" for i in range(count)]}

    def _take_groups(self, first: int) -> None:
        """Find the layers of the groups from the first on, put them on the constraint set, and create the state."""
        layers = link_layers(self.param_groups, first)
        every = [*self._layers, *layers]
        others = self._other_parameters(every)
        refuse_overlaps(self._name, {layer.name: [self._param_at(at) for at in layer.positions] for layer in every})
        if self.capturable and any(self._team_of(layer) for layer in layers):
            raise ValueError(
                f"{self._name}: capturable=True needs whole parameters, got some that are divided among processes"
            )
        self._start(layers)
        self._create_states(first)
        self._layers = every
        self._plan(others)

    def _other_parameters(self, layers: list[LayerSlots]) -> list[list[int]]:
        """Return the indices of the parameters that belong to no layer, by group."""
        in_layer = {position for layer in layers for position in layer.positions}
        all_others = []
        for g, group in enumerate(self.param_groups):
            others = [i for i in range(len(group["params"])) if (g, i) not in in_layer]
            tensors = [name for name in self._tensor_options if isinstance(group[name], Tensor)]
            if self.capturable and others and tensors:
                raise ValueError(
                    f"{self._name}: {tensors[0]} may be a tensor under capturable=True in groups of low-rank layers"
                    " alone, got it in one with other parameters"
                )
            all_others.append(others)
        return all_others

    @torch.no_grad()
    def _create_states(self, first: int = 0) -> None:
        """Create the state of the parameters that are trained, so that tools which save or load it find all of it."""
        for group in self.param_groups[first:]:
            for p in group["params"]:
                if p.requires_grad and not p.is_meta:
                    self._create_state(p, group)

    def _plan(self, others: list[list[int]]) -> None:
        """Take the parameters outside of layers, and make all calls anew."""
        self._others = others
        self._known = [list(group["params"]) for group in self.param_groups]
        self._calls: list[StepCall] = []
        self._calls_key = None  # the gradients and options that the calls were made for

    def _check_options(self, group: dict) -> None:
        for name in (*self._finite_options, "tau", "sigma_max"):
            value = group[name]
            if isinstance(value, Tensor) and value.numel() != 1:
                got = list(value.shape)
                raise ValueError(f"{self._name}: {name} as a tensor must have one element, got shape {got}")
        for name in self._finite_options:
            value = group[name]
            if not math.isfinite(value) or (float(value) < 0 and name not in self._may_be_negative):
                raise ValueError(f"{self._name}: {name} must be finite and >= 0, got {value}")
        tau, sigma_max = (float(v) if isinstance(v, Tensor) else v for v in (group["tau"], group["sigma_max"]))
        linalg.check_constraint(self._name, tau, group["band"], sigma_max)

    def _team_of(self, layer: LayerSlots) -> Team:
        """Return the processes among which the parameters of a layer are divided."""
        params = [p for p in map(self._param_at, layer.positions) if p is not None]
        return Team.of(f"{self._name}: the parameters of layer {layer.name!r}", params)

    def _name_of(self, g: int, i: int) -> str:
        names = self.param_groups[g].get("param_names")
        return names[i] if names else f"parameter {i} of group {g}"

    def _param_at(self, position: tuple[int, int] | None) -> Tensor | None:
        return None if position is None else self.param_groups[position[0]]["params"][position[1]]

    @torch.no_grad()
    def _start(self, layers) -> None:
        """Put the layers on the constraint set; nothing is written before all of them have been checked."""
        for layer in layers:
            params = [p for p in map(self._param_at, layer.positions) if p is not None]
            kinds = {(p.device, p.dtype) for p in params}
            if len(kinds) > 1:
                got = ", ".join(f"{p.dtype} on {p.device}" for p in params)
                raise ValueError(f"{self._name}: layer {layer.name!r} must have one dtype and device, got {got}")
            team = self._team_of(layer)
            for role, p in zip(ROLES, map(self._param_at, layer.positions), strict=True):
                if p is not None and not p.is_meta and team.any(~torch.isfinite(local(p)).all()):
                    raise NonFiniteError(f"{self._name}: {role} of layer {layer.name!r} must be finite, got NaN or Inf")
            self._check_frozen(layer)
        for layer in layers:
            params = [self._param_at(position) for position in layer.positions]
            if params[0].is_meta:
                continue
            if not any(p.requires_grad for p in params[:3]):
                self._waiting.add(layer)
                continue
            self._waiting.discard(layer)
            masters = [self._master(p) for p in params]
            self._put_on_constraint_set(layer, masters[:3])
            for p, master in zip(params, masters, strict=True):
                if p is not master and p.requires_grad:
                    local(p).copy_(local(master))

    def _put_on_constraint_set(self, layer: LayerSlots, factors: list[Tensor]) -> None:
        """Put U, S, V of a layer, or masters or copies of them, on the constraint set."""
        if team := self._team_of(layer):
            start_divided(team, f"{self._name}: layer {layer.name!r}", factors, *self._constraint(layer))
        else:
            start_on_constraint_set(*active_factors(*map(local, factors)), *self._constraint(layer))

    def _constraint(self, layer: LayerSlots) -> tuple[float, str, float | None]:
        """Return tau, band and sigma_max of a layer."""
        group = self.param_groups[layer.positions[1][0]]
        tau, sigma_max = (v if v is None else float(v) for v in (group["tau"], group["sigma_max"]))
        return tau, group["band"], sigma_max

    def _check_frozen(self, layer: LayerSlots) -> None:
        """Raise ValueError if the start would change a frozen factor by more than its rounding."""
        params = [self._param_at(position) for position in layer.positions[:3]]
        if params[0].is_meta or len({p.requires_grad for p in params}) == 1:
            return
        started = [p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True) for p in params]
        self._put_on_constraint_set(layer, started)
        team = self._team_of(layer)
        for role, p, X in zip(ROLES, params, started, strict=False):
            here, new = local(p), local(X)
            changed = reference.norm(new - here) > 8 * torch.finfo(p.dtype).eps * reference.norm(here)
            if not p.requires_grad and team.any(changed):
                raise ValueError(
                    f"{self._name}: {role} of layer {layer.name!r} is frozen and the layer not on the constraint set;"
                    " put it there first (linalg.orthonormalize, linalg.clip_spectrum) or let all of U, S, V be trained"
                )

    def _master(self, p: Tensor | None) -> Tensor | None:
        """Return the tensor that is stepped: the parameter, or its float32 copy in the state."""
        if p is None or p.dtype not in LOW_PRECISION:
            return p
        state = self.state[p]
        if "master" not in state:
            state["master"] = p.detach().float()
        else:  # keep values written to the parameter since the last step
            master, here = local(state["master"]), local(p)
            master.copy_(torch.where(here == master.to(here.dtype), master, here.float()))
        return state["master"]

    def _follow_replaced(self) -> None:
        """Give the state of parameters that were replaced in the groups, as accelerate does to shard them, to the new.

        Raises:
            ValueError: A new one has another shape.
        """
        for g, (group, known) in enumerate(zip(self.param_groups, self._known, strict=True)):
            for i, (p, old) in enumerate(zip(group["params"], known, strict=True)):
                if p is old:
                    continue
                state = self.state.pop(old, None)
                if state is None or p in self.state:  # there was none, or it was moved already
                    continue
                if p.shape != old.shape:
                    shapes = f"{list(old.shape)}, got {list(p.shape)}"
                    raise ValueError(f"{self._name}: what replaced {self._name_of(g, i)} must have its shape {shapes}")
                self.state[p] = {
                    key: distributed_like(p, value) if isinstance(value, Tensor) and value.shape == p.shape else value
                    for key, value in state.items()
                }
            known[:] = group["params"]

    def _refuse_orphans(self) -> None:
        """Raise RuntimeError if layers have other parameters by now, to which gradients come instead."""
        held = {id(p) for layer in live_layers() for p in vars(layer).get("_parameters", {}).values()}
        for layer in self._layers:
            S = self._param_at(layer.positions[1])
            if layer.from_module and not is_distributed(S) and id(S) not in held:
                raise RuntimeError(
                    f"{self._name}.step: no parameter has a gradient, and those of layer {layer.name!r} are no longer"
                    " its module's: make the optimizer after what replaced them (fully_shard, compact)"
                )

    # -------------------------------------------------------------------------------------------- step

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """Take one step; return the closure's loss if one is given.

        Raises:
            NonFiniteError: check_finite, and a gradient is not finite (nothing has changed then), or layers were left
                unchanged (the others have been stepped).
            RuntimeError: A gradient is sparse where that is not supported; or no parameter has a gradient because the
                model has got others.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._follow_replaced()
        if self.check_finite:
            self._check_gradients()
        params = [p for group in self.param_groups for p in group["params"]]
        grads = [local_gradient(p) for p in params]
        if all(g is None for g in grads):
            self._refuse_orphans()
        if any(g is not None and g.is_sparse for g in grads):
            self._check_sparse()
        self._step_layers(params, grads)
        self._step_others(grads)
        return loss

    @property
    def skipped(self) -> Tensor:
        """Number of times a layer was left unchanged, int64, on the parameters' device."""
        totals = [skipped_steps(counts).sum() for counts in self._skipped.values()]
        return (
            sum((t.to(totals[0].device) for t in totals[1:]), totals[0])
            if totals
            else torch.zeros((), dtype=torch.int64, device="cpu")
        )

    def _step_layers(self, params: list[Tensor], grads: list[Tensor | None]) -> None:
        key = ([g is None for g in grads], [self._state_signature(group) for group in self.param_groups])
        if key != self._calls_key or not all(c.is_valid_for(params, self.state) for c in self._calls):
            if self.capturable and _capturing():
                raise RuntimeError(
                    f"{self._name}.step: take a step with these parameters and buffers, two with dampening,"
                    " before one is captured"
                )
            self._calls = self._make_calls(params, grads)
            self._calls_key = key
        for call in self._calls:
            self._step_device(call, grads)

    def _make_calls(self, params: list[Tensor], grads: list[Tensor | None]) -> list[StepCall]:
        first = [0]  # index of the first parameter of each group among all
        for group in self.param_groups:
            first.append(first[-1] + len(group["params"]))
        calls: dict[tuple[torch.device, Team], StepCall] = {}
        teams = merged([self._team_of(layer) for layer in self._layers])
        for number, layer in enumerate(self._layers):
            indices = [None if position is None else first[position[0]] + position[1] for position in layer.positions]
            if all(i is None or grads[i] is None for i in indices):
                continue
            if layer in self._waiting:
                self._start([layer])
            key = params[indices[1]].device, teams[number]
            if key not in calls:
                calls[key] = self._call(
                    key[0], self._name, self._options, precondition=self._precondition, capturable=self.capturable,
                    team=key[1],
                )  # fmt: skip
            call = calls[key]
            call.add_layer(number, [params[i] for i in indices[:3]])
            masters = [None if i is None else self._master(params[i]) for i in indices]
            r = len(masters[1]) if key[1] else active_rank(*map(local, masters[:3]))
            slots = []
            for i, position, role, master in zip(indices, layer.positions, ROLES, masters, strict=True):
                if i is None:
                    slots.append(call.missing_slot(slots[0].target.dtype, layer.positions[1]))
                else:
                    part = active_slice(role, r) if role != "bias" and r < len(masters[1]) else None
                    slots.append(call.make_slot(None if grads[i] is None else i, params[i], master, position, part))
            self._add_layer(call, slots)
        return list(calls.values())

    def _step_device(self, call: StepCall, grads: list[Tensor | None]) -> None:
        for p, _ in call.masters:
            self._master(p)
        counts = self._counts(call.device)
        waits = call.starts_buffers or self.check_finite
        all_layers = len(call.layers) == len(counts) and not waits
        skipped = counts if all_layers else call.skipped.zero_()
        if frozen := call.run(self.param_groups, grads, skipped, self._check_options, waits):
            names = ", ".join(repr(self._layers[i].name) for i in frozen)
            raise ValueError(
                f"{self._name}.step: U and V of {names} must be orthonormal where one of U, S, V is frozen: something"
                " has written to them since the last step; these layers were left unchanged"
            )
        if self.capturable and _capturing():
            self._captured.append((call, call.table, call.live, counts))
        if all_layers:
            return
        counts.index_add_(0, call.layer_index, skipped)
        if waits:  # for the device, but a buffer starts only once
            self._finish(call, set(skipped.nonzero().flatten().tolist()))

    def _finish(self, call: StepCall, skipped: set[int]) -> None:
        """Complete a step that starts buffers or is checked; skipped: which layers of the call were left unchanged."""
        if skipped and self.check_finite:
            names = (repr(self._layers[call.layers[i]].name) for i in sorted(skipped))
            raise NonFiniteError(
                f"{self._name}.step: left unchanged, because the core is zero or the new value not finite:"
                f" {', '.join(names)}"
            )

    def _counts(self, device: torch.device) -> Tensor:
        """Return the counts of the layers on a device."""
        counts = self._skipped.get(device)
        if counts is None or len(counts) < len(self._layers):
            grown = torch.zeros(len(self._layers), dtype=torch.int64, device=device)
            if counts is not None:
                grown[: len(counts)] = counts
            counts = self._skipped[device] = grown
        return counts

    def _step_others(self, all_grads: list[Tensor | None]) -> None:
        given = iter(all_grads)
        for group, others in zip(self.param_groups, self._others, strict=True):
            of_group = list(itertools.islice(given, len(group["params"])))
            params = [group["params"][i] for i in others if of_group[i] is not None]
            if not params:
                continue
            grads = [of_group[i] for i in others if of_group[i] is not None]
            if self.capturable:  # only torch's fused rule reads lr on the device, and it ignores strides
                grads = [
                    g if g.stride() == p.stride() and g.dtype is p.dtype else torch.empty_like(p).copy_(g)
                    for p, g in zip(map(local, params), grads, strict=True)
                ]
            self._step_dense(group, params, grads)

    def _check_sparse(self) -> None:
        for g, (group, others) in enumerate(zip(self.param_groups, self._others, strict=True)):
            for i, p in enumerate(group["params"]):
                if p.grad is not None and p.grad.is_sparse and not (self._takes_sparse and i in others):
                    where = " for low-rank layers" if self._takes_sparse else ""
                    raise RuntimeError(
                        f"{self._name}.step: takes no sparse gradients{where}, got one for {self._name_of(g, i)}"
                    )

    def _check_gradients(self) -> None:
        bad: dict[Team, list[tuple[str, Tensor]]] = {}
        for g, group in enumerate(self.param_groups):
            for i, p in enumerate(group["params"]):
                if (grad := local_gradient(p)) is not None:
                    values = grad.coalesce().values() if grad.is_sparse else grad
                    flag = torch.isfinite(values).all().logical_not()
                    bad.setdefault(Team.of(self._name_of(g, i), [p]), []).append((self._name_of(g, i), flag))
        for team, flags in bad.items():
            counts = team.sum([flag for _, flag in flags])
            name = next((name for (name, _), count in zip(flags, counts, strict=True) if count > 0), None)
            if name is not None:
                raise NonFiniteError(
                    f"{self._name}.step: the gradient of {name} must be finite, got NaN or Inf; nothing was changed"
                )

    # --------------------------------------------------------------------------------------------- state

    def __getstate__(self) -> Options:
        own = ("capturable", "check_finite", "_skipped", "_waiting", "_layers", "_ready")
        return super().__getstate__() | {name: getattr(self, name) for name in own}

    def __setstate__(self, state: Options) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_captured", [])  # loading a state_dict comes here too
        for group in self.param_groups:
            self._check_options(group)
        self._plan(self._other_parameters(self._layers))

    def state_dict(self) -> Options:
        self._follow_replaced()
        return super().state_dict()

    def load_state_dict(self, state_dict: Options) -> None:
        """Load a state, as torch does; it may be that of torch's own optimizer.

        Options that the state does not have keep their values. float16 and bfloat16 layers take the values of the
        masters in the state.

        Raises:
            ValueError: Parameter names or shapes differ, or an option is out of range. Nothing has changed then.
        """
        self._follow_replaced()
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
            if "master" in saved and p.dtype in LOW_PRECISION:  # undo the projection done at construction
                with torch.no_grad():
                    local(p).copy_(local(self.state[p]["master"]))
        self._create_states()

    def _check_shapes(self, g: int, ids: list, state: dict) -> None:
        """Raise ValueError if the shape of a state tensor is not that of its parameter in group g."""
        for i, (key, p) in enumerate(zip(ids, self.param_groups[g]["params"], strict=False)):
            for name in ("master", *self._buffers):
                value = state.get(key, {}).get(name)
                if isinstance(value, Tensor) and value.shape != p.shape:
                    raise ValueError(
                        f"{self._name}.load_state_dict: {name} of {self._name_of(g, i)} must be"
                        f" {list(p.shape)} as the parameter is, got {list(value.shape)}; the ranks differ?"
                    )


def active_slice(role: str, rank: int) -> tuple[slice, slice]:
    """Return the slice of U, S or V that holds the first `rank` directions (see nn.layer.active_rank)."""
    return (slice(rank) if role == "S" else slice(None)), slice(rank)


def active_factors(U: Tensor, S: Tensor, V: Tensor) -> list[Tensor]:
    """Return views of the active slices of the factors."""
    rank = active_rank(U, S, V)
    return [X[active_slice(role, rank)] for role, X in zip("USV", (U, S, V), strict=True)]


def start_on_constraint_set(U: Tensor, S: Tensor, V: Tensor, tau: float, band: str, sigma_max: float | None) -> None:
    """Put a layer on the constraint set, in place.

    U and V that are not orthonormal to ORTHONORMAL_INPUT become their Q, with S <- R_U S R_Vᵀ; S is clipped if it is
    outside the bound.
    """
    with ops.no_autocast(U.device.type):
        for X, transpose in ((U, False), (V, True)):
            if reference.orthonormality_error(X) > ORTHONORMAL_INPUT:
                Q, R = linalg.qr(X)
                X.copy_(Q)
                S.copy_(S @ R.mT if transpose else R @ S)
    # a core inside, as one that is resumed, keeps its bits
    if not reference.meets_bound(linalg.svd(S.double()).sigma, tau, sigma_max):
        S.copy_(linalg.clip_spectrum(S, tau, band, sigma_max))


def start_divided(
    team: Team, where: str, factors: list[Tensor], tau: float, band: str, sigma_max: float | None
) -> None:
    """Do what start_on_constraint_set does to U, S, V whose rows are divided among a team.

    Raises:
        ValueError: Some of the directions are not in use.
    """
    U, S, V = factors
    if active_rank(U, S, V) < len(S):
        raise ValueError(f"{where} must use all of its columns when its rows are divided; see condlr_ext.compact")
    rows = [Rows.of(team, X) for X in (U, V)]
    eye = torch.eye(len(S), dtype=torch.float64, device=local(S).device)
    (core,) = team.wholes([S])
    for X, x, gram in zip((U, V), rows, team.sum([x.product(x.values) for x in rows]), strict=True):
        if (gram - eye).abs().max() > ORTHONORMAL_INPUT:
            (R,) = qr(team, [x], ACCURACY[torch.float64])
            local(X).copy_(x.values)
            core = (R @ core.double() if X is U else core.double() @ R.mT).to(core.dtype)
    if not reference.meets_bound(linalg.svd(core.double()).sigma, tau, sigma_max):
        core = linalg.clip_spectrum(core, tau, band, sigma_max)
    written_back(S, core)


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def fusible(params: list[Tensor], *others: list[Tensor | None]) -> bool:
    """Return whether torch's fused rules step these correctly; they ignore strides, so that all must be equal."""
    return all(
        p.device.type in ("cpu", "cuda")
        and p.is_floating_point()
        and all(
            t is None or (not t.is_sparse and t.dtype is p.dtype and t.device == p.device and t.stride() == p.stride())
            for t in ts
        )
        for p, *ts in zip(params, *others, strict=True)
    )
