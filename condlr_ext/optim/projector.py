"""Projector: puts low-rank layers back on the constraint set after every step of any torch optimizer."""

import weakref
from collections.abc import ItemsView, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from .. import linalg, ops, reference
from .._modules import check_module, unwrapped_optimizer
from .._shards import Rows, Team, local, local_gradient, merged, qr, row_indices
from ..errors import NonFiniteError
from ..nn.layer import LowRankLayer, low_rank_layers
from .base import ConstrainedOptimizer, start_divided, start_on_constraint_set
from .divided_step import ACCURACY
from .groups import refuse_computed, refuse_overlaps


class Projector:
    """Keeps U, V orthonormal and kappa(S) <= 1 + tau under any torch optimizer.

    After each step U, R_U = qr(U), V, R_V = qr(V), S <- clip_spectrum(R_U S R_Vᵀ, tau, band, sigma_max), batched over
    factors and over cores of equal shape. Layers without a gradient do not change, and none changes when a GradScaler
    makes a fused optimizer skip its step. The optimizer's state (momentum, moments) does not change.

        Projector(model, tau=0.1).attach(optimizer)

    Parameters are stepped in their own dtype, so for float16 and bfloat16 the bound holds to their rounding;
    CondLRSGD and CondLRAdamW have float32 masters.

    Args:
        model: A module with low-rank layers. They are looked up at every step: layers that are replaced or added later
            are projected from the first step of an optimizer that has them; if none has, the step raises.
        tau: As in linalg.clip_spectrum. An entry "tau" of the parameter group of S takes precedence and, like this one,
            is read at every step; so are "band" and "sigma_max".
        band: As in linalg.clip_spectrum.
        sigma_max: As in linalg.clip_spectrum.
        tangent: Also remove from the gradients of U and V, in place and before the step, the part that only turns
            their columns, G <- G - U UᵀG, which S can do as well. Works with step(closure).

    Raises:
        ValueError: tau, band or sigma_max is out of range, or the model has no low-rank layers.

    Source: projection after a step of an arbitrary optimizer, as StelLA (Li et al., NeurIPS 2025) retracts after one.
    """

    model: nn.Module
    tau: float
    band: str
    sigma_max: float | None
    tangent: bool

    def __init__(
        self,
        model: nn.Module,
        tau: float,
        *,
        band: str = "rms",
        sigma_max: float | None = None,
        tangent: bool = False,
    ):
        check_module("Projector", model)
        self.model, self.tau, self.band, self.sigma_max, self.tangent = model, tau, band, sigma_max, tangent
        linalg.check_constraint("Projector", tau, band, sigma_max)
        if not any(self._low_rank()):
            raise ValueError("Projector: model must have low-rank layers, got none; see condlr_ext.factorize")
        self._attached: weakref.WeakKeyDictionary[Optimizer, Attachment] = weakref.WeakKeyDictionary()
        self._seen = WeakIdKeyDictionary()  # U of known layers: whether it is orthonormal yet

    def attach(self, optimizer: Optimizer) -> "Attachment":
        """Project after every step of the optimizer from now on.

        The layers that the optimizer trains are put on the constraint set at once: attach before a forward that is to
        be differentiated. accelerate's and Lightning's wrappers may be given too. Several optimizers may share the
        model. Copies and pickles of an optimizer come without its hooks: attach again.

        Returns:
            A handle; its remove() ends the projection.

        Raises:
            TypeError: It is no torch optimizer, or calls no step hooks.
            ValueError: It keeps the constraint itself, puts other weights in place by train() and eval(), steps
                outside of step() as SAM does, is attached already, or has no parameter of a low-rank layer.
            NonFiniteError: NaN or Inf in a layer, with its name.
        """
        optimizer = unwrapped_optimizer(optimizer)
        name = type(optimizer).__name__
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"Projector.attach: optimizer must be a torch.optim.Optimizer, got {name}")
        if not hasattr(optimizer, "_optimizer_step_pre_hooks"):
            raise TypeError(
                f"Projector.attach: optimizer must call torch's step hooks, got {name}, which does not; attach to the"
                " optimizer inside of it if nothing else writes to the weights"
            )
        if isinstance(optimizer, ConstrainedOptimizer):
            raise ValueError(f"Projector.attach: {name} keeps the constraint itself, it needs no projector")
        if callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None)):
            raise ValueError(
                f"Projector.attach: optimizer must write to the weights in step() alone, got {name}, whose eval() puts"
                " averages in their place, for which no bound holds"
            )
        if callable(getattr(optimizer, "second_step", None)):
            raise ValueError(
                f"Projector.attach: optimizer must write to the weights in step() alone, got {name}, whose"
                " second_step() runs no hooks; attach to its base_optimizer"
            )
        if optimizer in self._attached:
            raise ValueError(f"Projector.attach: this {name} is attached already")
        layers = self._layers(optimizer)
        if not layers:
            raise ValueError(
                f"Projector.attach: optimizer must have a parameter of the model's low-rank layers, got {name} without"
            )
        for layer in layers:
            layer.check()
        refuse_overlaps("Projector", {layer.name: layer.parameters() for layer in layers})
        for _, module in self._low_rank():
            self._seen.setdefault(module.U, False)
        for layer in layers:
            self._seen[layer.module.U] = layer.start()
        self._attached[optimizer] = attachment = Attachment(self, optimizer)
        return attachment

    def _layers(self, optimizer: Optimizer) -> list["ProjectedLayer"]:
        """Return the layers with a factor in the optimizer, with their present options."""
        mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
        # the group of S may belong to another optimizer
        groups = [group for o in (*self._attached, optimizer) for group in o.param_groups]
        group_of = {id(p): group for group in groups for p in group["params"]}
        layers = []
        for name, module in self._low_rank():
            factors = [id(p) for p in (module.S, module.U, module.V)]
            if any(i in mine for i in factors):
                group = next(group_of[i] for i in factors if i in group_of)
                options = {key: group.get(key, getattr(self, key)) for key in ("tau", "band", "sigma_max")}
                layers.append(ProjectedLayer(name, module, **options))
        return layers

    def _low_rank(self) -> ItemsView[str, LowRankLayer]:
        return low_rank_layers(self.model).items()

    def _before(self, layers: list["ProjectedLayer"]) -> None:
        """Check the layers that have gradients, and take the tangent part of these if asked to."""
        for layer in layers:
            layer.constraint()
        for name, module in self._low_rank():
            if module.U not in self._seen and _has_gradient(module):
                trained = (layer.module for optimizer in self._attached for layer in self._layers(optimizer))
                if module not in trained:
                    raise ValueError(
                        f"Projector: layer {name!r} is newer than attach() and has gradients, but no optimizer that the"
                        " projector is attached to has its U, S, V; give it to one with add_param_group"
                    )
        if self.tangent:
            # a new or unfrozen layer may not be orthonormal yet
            for team, known in _by_team([layer for layer in layers if self._seen.get(layer.module.U)]):
                _take_tangent_part(team, [X for layer in known for X in (layer.module.U, layer.module.V)])

    def _after(self, layers: list["ProjectedLayer"], skip: Tensor | None, step: str) -> None:
        """Project the layers, unless `skip` is set, which is read on the device."""
        failed = []
        for team, members in _by_team(layers):
            trials = _trial_points(team, members)
            if skip is not None:
                (skip,) = team.sum([skip])
            for batch in _alike((x.layer.constraint(), x.S.shape, x.S.dtype, x.S.device, x) for x in trials):
                cores, info = ops.linalg.clip_spectrum(torch.stack([x.S for x in batch]), *batch[0].layer.constraint())
                for x, core, bad in zip(batch, cores, _has_failed(info), strict=True):
                    keep = x.failed | bad
                    if keep.device.type == "cpu" and keep:
                        failed.append(repr(x.layer.name))
                    if skip is not None:
                        keep = keep | (skip.to(keep.device) > 0).view(())
                    module = x.layer.module
                    core = core[row_indices(module.S)] if team else core
                    for p, new in ((module.U, x.U), (module.S, core), (module.V, x.V)):
                        here = local(p)
                        here.copy_(torch.where(keep, here, new.to(here.dtype)))
                    self._seen[module.U] = True
        if failed:
            raise NonFiniteError(
                f"Projector: after {step} these layers must be finite, got NaN or Inf in them; they were left as the"
                f" step made them: {', '.join(failed)}"
            )


class Attachment:
    """The hooks of a Projector on an optimizer; remove() takes them off."""

    def __init__(self, projector: Projector, optimizer: Optimizer):
        self._projector, self._stepped = projector, WeakIdKeyDictionary()
        self._optimizer = weakref.ref(optimizer)
        self._hooks = [
            optimizer.register_step_pre_hook(self._pre_hook),
            optimizer.register_step_post_hook(self._post_hook),
        ]

    def remove(self) -> None:
        """Remove the hooks; a second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        if (optimizer := self._optimizer()) is not None:
            self._projector._attached.pop(optimizer, None)

    def _pre_hook(self, optimizer: Optimizer, args: tuple, kwargs: dict):
        self._stepped.clear()
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not callable(closure):
            self._prepare(optimizer)
            return None

        def prepared():  # gradients exist only after the closure
            loss = closure()
            self._prepare(optimizer)
            return loss

        if "closure" in kwargs:
            return args, kwargs | {"closure": prepared}
        return (args[0], prepared, *args[2:]), kwargs

    @torch.no_grad()
    def _prepare(self, optimizer: Optimizer) -> None:
        layers = self._projector._layers(optimizer)
        self._projector._before(layers)
        self._note(layers)

    def _note(self, layers: list["ProjectedLayer"]) -> None:
        """Note which layers have a gradient now, as some optimizers drop it in their step."""
        for layer in layers:
            if _has_gradient(layer.module):
                self._stepped[layer.module.U] = True

    @torch.no_grad()
    def _post_hook(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        layers = self._projector._layers(optimizer)
        self._note(layers)
        layers = [layer for layer in layers if layer.module.U in self._stepped]
        if layers:
            step = f"{type(optimizer).__name__}.step"
            self._projector._after(layers, getattr(optimizer, "found_inf", None), step)


@dataclass
class ProjectedLayer:
    """A layer to project, with its options."""

    name: str
    module: LowRankLayer
    tau: float
    band: str
    sigma_max: float | None

    def constraint(self) -> tuple[float, int, float]:
        tau, sigma_max = (float(v) if isinstance(v, Tensor) else v for v in (self.tau, self.sigma_max))
        return linalg.check_constraint(f"Projector: layer {self.name!r}", tau, self.band, sigma_max)

    def check(self) -> None:
        self.constraint()
        refuse_computed(self.name, self.module)
        for role in "USV":
            X = getattr(self.module, role)
            if not X.is_meta and self.team().any(~torch.isfinite(local(X)).all()):
                raise NonFiniteError(f"Projector: {role} of layer {self.name!r} must be finite, got NaN or Inf")
        r = self.module.active_rank
        if r < self.module.rank:
            raise ValueError(
                f"Projector: layer {self.name!r} must use all of its columns, got {r} of {self.module.rank} directions"
                " in use; see condlr_ext.compact"
            )

    def team(self) -> Team:
        """Return the processes among which the factors are divided."""
        return Team.of(f"Projector: U, S and V of layer {self.name!r}", [getattr(self.module, role) for role in "USV"])

    def parameters(self) -> list[Tensor | None]:
        """U, S, V and the bias."""
        return [getattr(self.module, role) for role in reference.ROLES]

    @torch.no_grad()
    def start(self) -> bool:
        """Put the layer on the constraint set unless it is frozen; return whether that was done."""
        factors = (self.module.U, self.module.S, self.module.V)
        if factors[0].is_meta or not any(X.requires_grad for X in factors):
            return False
        wide = [_wide(X) for X in factors]
        tau, band, sigma_max = self.constraint()
        constraint = tau, reference.BANDS[band], sigma_max
        if team := self.team():
            start_divided(team, f"Projector: layer {self.name!r}", wide, *constraint)
        else:
            start_on_constraint_set(*map(local, wide), *constraint)
        for X, Y in zip(factors, wide, strict=True):
            if X is not Y:
                local(X).copy_(local(Y))
        return True


@dataclass
class TrialPoint:
    """Q_U, R_U S R_Vᵀ and Q_V of a layer, of Q the rows that this process holds, and whether one of them failed."""

    layer: ProjectedLayer
    U: Tensor
    S: Tensor
    V: Tensor
    failed: Tensor


def _by_team(layers: list[ProjectedLayer]) -> list[tuple[Team, list[ProjectedLayer]]]:
    """Return the layers by the processes among which they are divided."""
    members: dict[Team, list[ProjectedLayer]] = {}
    for layer, team in zip(layers, merged([layer.team() for layer in layers]), strict=True):
        members.setdefault(team, []).append(layer)
    return list(members.items())


def _trial_points(team: Team, layers: list[ProjectedLayer]) -> list[TrialPoint]:
    found = {}  # by layer and role: Q, R and whether that failed
    factors = [(i, role, getattr(layer.module, role)) for i, layer in enumerate(layers) for role in "UV"]
    cores = [_wide(local(layer.module.S)) for layer in layers]
    if team:
        rows = [Rows.of(team, X) for *_, X in factors]
        accuracy = min(ACCURACY[core.dtype] for core in cores)
        cores = team.wholes([layer.module.S for layer in layers], cores)
        for (i, role, _), x, R in zip(factors, rows, qr(team, rows, accuracy), strict=True):
            found[i, role] = x.values, R.to(cores[i].dtype), ~torch.isfinite(R).all()
    else:
        for batch in _alike((X.shape, X.dtype, X.device, (i, role, X)) for i, role, X in factors):
            Q, R, info = ops.linalg.qr(torch.stack([_wide(local(X)) for *_, X in batch]))
            for (i, role, _), *result in zip(batch, Q, R, _has_failed(info), strict=True):
                found[i, role] = result
    points = []
    for i, (layer, S) in enumerate(zip(layers, cores, strict=True)):
        (U, R_U, no_U), (V, R_V, no_V) = found[i, "U"], found[i, "V"]
        with ops.no_autocast(S.device.type):
            points.append(TrialPoint(layer, U, R_U @ S @ R_V.mT, V, no_U | no_V))
    return points


def _take_tangent_part(team: Team, factors: list[Tensor]) -> None:
    """Remove X XᵀG from the gradients G of factors X that have one."""
    factors = [X for X in factors if X.grad is not None]
    for X in factors:
        if 0 in X.grad.stride():  # an expanded tensor takes no values
            X.grad = X.grad.contiguous()
    grads = [local_gradient(X) for X in factors]
    if team:
        rows = [Rows.of(team, X) for X in factors]
        products = team.sum([x.product(G.double()) for x, G in zip(rows, grads, strict=True)])
        for x, G, XtG in zip(rows, grads, products, strict=True):
            G.copy_(G.double() - x.values @ XtG)
        return
    for X, G in zip(factors, grads, strict=True):
        G.copy_(reference.tangent_projection(_wide(local(X)), _wide(G)))


def _has_gradient(module: LowRankLayer) -> bool:
    return any(p.grad is not None for p in (module.U, module.S, module.V))


def _wide(X: Tensor) -> Tensor:
    """Return X in the dtype that factorizations run in."""
    return X.float() if X.dtype in reference.LOW_PRECISION else X


def _has_failed(info: Tensor) -> Tensor:
    return (info == ops.linalg.NOT_CONVERGED) | (info == ops.linalg.NOT_FINITE)


def _alike(entries: Iterable[tuple]) -> list[list[tuple]]:
    """Return the last items of the entries, batched by equal other items."""
    batches: dict[tuple, list[tuple]] = {}
    for *key, entry in entries:
        batches.setdefault(tuple(key), []).append(entry)
    return list(batches.values())
