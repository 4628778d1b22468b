"""RankController: moves rank to where it is worth most, in buffers of fixed size; compact cuts what is not in use."""

import contextlib
import functools
import math
import numbers
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import _table, linalg, reference
from ..errors import NonFiniteError, RankError
from ..factorize.budget import stored_parameters
from ..nn.layer import LowRankLayer, low_rank_layers
from ..nn.rank import resolve_rank
from .base import ConstrainedOptimizer, in_use, where_in_use

_LINEAR = ("momentum_buffer", "exp_avg")  # turn with the bases
_SQUARED = ("exp_avg_sq", "max_exp_avg_sq")  # of uncorrelated columns g: E[(g P)²] = E[g²] (P ∘ P)


_UPDATE = "RankController.update"  # begins its error texts


@dataclass(frozen=True)
class LayerAdaptation:
    """What happened to one layer: its weight as an m x n matrix, the rank before and after.

    dropped, added: directions that left and entered. expected: the sum of the changes of the loss that each of them
    makes alone, measured; None for a layer without a bound, which is retrained on augmented bases and truncated.
    """

    name: str
    m: int
    n: int
    rank_before: int
    rank_after: int
    dropped: int
    added: int
    expected: float | None


@dataclass(frozen=True)
class RankReport:
    """What RankController.update did; printing it shows a table.

    loss_before, loss_after: the mean of the loss over the same batches. budget: parameters allowed, or None.
    """

    layers: list[LayerAdaptation]
    loss_before: float
    loss_after: float
    budget: float | None = None

    @property
    def change(self) -> float:
        return self.loss_after - self.loss_before

    @property
    def ranks(self) -> dict[str, int]:
        return {x.name: x.rank_after for x in self.layers}

    @property
    def parameters(self) -> int:
        return sum(stored_parameters(x.rank_after, x.m, x.n) for x in self.layers)

    def __str__(self) -> str:
        rows = [
            (
                x.name, f"{x.m} x {x.n}", f"{x.rank_before} -> {x.rank_after}", str(x.dropped), str(x.added),
                "-" if x.expected is None else f"{x.expected:+.3g}",
            )
            for x in self.layers
        ]  # fmt: skip
        lines = [_table.text(("layer", "weight", "rank", "dropped", "added", "expected"), rows)]
        lines.append(f"loss {self.loss_before:.5g} -> {self.loss_after:.5g}, {self.parameters} parameters in use")
        if self.budget is not None and self.parameters > self.budget:
            lines.append(f"over the budget of {self.budget:.0f} parameters: update again")
        return "\n".join(lines)


class RankController:
    """Changes the ranks of a model's low-rank layers while it is trained, when `update` is called.

    The parameters have room for `max_rank` directions and keep their size: of U [m, R], S [R, R], V [n, R] the first
    layer.active_rank columns (rows of S) are in use, the rest are zeros. So compiled models, checkpoints and whoever
    holds the parameters see nothing of it; `compact` makes the network really smaller at the end. The optimizer
    steps, and keeps on the constraint set, what is in use. Its state turns with the bases: momentum exactly, second
    moments as those of uncorrelated columns; directions that enter begin with none, and with the mean second moment.

    Where kappa is bounded (tau finite) singular values say nothing of what a direction is worth, and a direction can
    only enter at full size. So the loss is asked. Of each layer the directions are candidates to leave whose removal
    changes the loss least to first order, sigma_i |dL/dsigma_i| as its root mean square over the batches, or lowers
    it most; to enter, the leading singular pairs of the gradient (I - UUᵀ) dL/dW (I - VVᵀ), at the lower edge of the
    band with the sign that lowers the loss. What each would change alone is measured. A direction leaves if without
    it the loss falls by more than `tolerance` of itself, and enters if with it; over the budget those leave that cost
    least per parameter; a direction that finds no room enters if it is worth more than what has to make room for it,
    in whichever layers. If together they do more harm than alone, half as many are tried. What is neither harmful
    nor worth much stays, unless a budget asks for its room: an untrained network would lose everything. Equal
    singular values have no basis of their own: the directions of S = Z H are those H^½ t with t the eigenvectors of
    the mean of K² over the batches, K = sym(H^½ Zᵀ Uᵀ dL/dW V H^½). Taking H^½ t tᵀ H^½ from H interlaces its
    eigenvalues, which keeps the bound.

    Where it is not (tau = inf) each layer takes `core_steps` gradient steps of its core in the bases [U, dL/dU],
    [V, dL/dV], one batch each with the core's learning rate, and keeps the smallest rank whose tail has
    ‖tail‖ <= theta ‖S‖_F. Over the budget, directions of the least share of their layer's energy per parameter go.

    Args:
        model: with low-rank layers; frozen ones are left alone. Its other layers are not touched.
        optimizer: CondLRSGD or CondLRAdamW of this model; tau, band and sigma_max are read from its groups.
        min_rank: int >= 1, no layer gets below (or below what it has).
        max_rank: int or fraction of min(m, n), for all layers; None: what S has room for. Where that is more, the
            layer gets new parameters here, in model and optimizer, so make the controller before anything else that
            holds parameters, and before a checkpoint is loaded.
        budget: share of the m n of these layers that their r (m + n) + r² may take, as in factorize. None: no limit.
        tolerance: of bounded layers: the change of the loss, relative to it, that a direction must be worth.
        theta: of layers without a bound: relative energy that truncation may drop.
        moves: of bounded layers: at most so many directions of a layer leave, and enter, in one adaptation.
        core_steps: of layers without a bound.

    Memory: while adapting, the dense weight of each layer, its gradient and their mean. Time: a pass with gradients
    over the batches, a few without them, and for each bounded layer up to 3 `moves` more without them.

    Raises:
        ValueError, TypeError, RankError: options out of range, another optimizer, layers that share factors.

    Under DistributedDataParallel give every process the same batches. A CUDA graph of the step has to be captured
    anew after an adaptation that changed a rank.

    Source: Taylor saliency of P. Molchanov et al., ICLR 2017; augmented bases and truncation of S. Schotthöfer et al.,
        DLRT (NeurIPS 2022, arXiv 2205.13571) and RobustDLRT (2025, arXiv 2505.08022).
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        min_rank: int = 1,
        max_rank: int | float | None = None,
        budget: float | None = None,
        tolerance: float = 0.01,
        theta: float = 0.1,
        moves: int = 4,
        core_steps: int = 10,
    ):
        for name, value in (("min_rank", min_rank), ("moves", moves), ("core_steps", core_steps)):
            if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
                raise ValueError(f"RankController: {name} must be an int >= 1, got {value!r}")
        for name, value in (("tolerance", tolerance), ("theta", theta)):
            if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 <= value < 1:
                raise ValueError(f"RankController: {name} must be a number in [0, 1), got {value!r}")
        if budget is not None and (isinstance(budget, bool) or not isinstance(budget, numbers.Real) or not budget > 0):
            raise ValueError(f"RankController: budget must be None or a number > 0, got {budget!r}")
        if not isinstance(optimizer, ConstrainedOptimizer):
            raise TypeError(
                f"RankController: optimizer must be CondLRSGD or CondLRAdamW, got {type(optimizer).__name__}"
            )
        self.model, self.optimizer = model, optimizer
        self.min_rank, self.moves, self.core_steps = int(min_rank), int(moves), int(core_steps)
        self.tolerance, self.theta = float(tolerance), float(theta)
        self._layers = _trained_layers(model, optimizer)
        self._limits = {}
        for name, layer in self._layers.items():
            m, n = layer.U.shape[0], layer.V.shape[0]
            where = f"RankController: layer {name}"
            limit = layer.rank if max_rank is None else resolve_rank(max_rank, m, n, where)
            if limit < (r := layer.active_rank):
                raise RankError(f"{where}: max_rank must be at least its {r} directions in use, got {limit}")
            if self.min_rank > limit:
                raise RankError(f"{where}: min_rank must be at most its largest rank {limit}, got {self.min_rank}")
            self._limits[name] = limit
        self.budget = None
        if budget is not None:
            self.budget = budget * sum(layer.U.shape[0] * layer.V.shape[0] for layer in self._layers.values())
        for name, layer in self._layers.items():
            if self._limits[name] > layer.rank:
                _resize(layer, self._limits[name], optimizer)

    def update(self, loss, batches) -> RankReport:
        """Changes the ranks; call it between steps, say after every epoch.

        Args:
            loss: loss(batch) -> the scalar to be lowered, through the model.
            batches: a few representative ones, as an iterable; each counts the same. All are kept for the call.

        The model is put into evaluation mode meanwhile, and runs eagerly where it is compiled. No `.grad`, no buffer
        and no random state of torch is touched.

        Raises:
            ValueError: no batch, a loss that is no scalar or does not depend on a layer. NonFiniteError: a NaN or Inf
                loss, gradient or factor. TypeError: optimizer state of an unknown kind. Nothing has changed then.
        """
        batches = list(batches)
        if not batches:
            raise ValueError(f"{_UPDATE}: batches must hold at least one, got none")
        _check_state(self._layers, self.optimizer)
        with _evaluating(self.model), torch.compiler.set_stance("force_eager"):
            before = _mean(loss, batches)
            if not math.isfinite(before):
                raise NonFiniteError(f"{_UPDATE}: the loss must be finite, got {before}")
            devices = {layer.S.device for layer in self._layers.values() if layer.S.is_cuda}
            with torch.random.fork_rng(list(devices)):  # making dense layers draws their initial weights
                views = [_View(name, layer, self.optimizer) for name, layer in self._layers.items()]
            with _dense_weights(views):
                _gradients(loss, batches, views)
                with torch.no_grad():
                    self._adapt_free([v for v in views if math.isinf(v.tau)], views, loss, batches)
                    self._adapt_bounded([v for v in views if not math.isinf(v.tau)], views, loss, batches)
            with torch.no_grad():
                for view in views:
                    view.write()
            after = _mean(loss, batches)
        return RankReport([v.report for v in views], before, after, self.budget)

    # -------------------------------------------------------------------------------------- without a bound

    def _adapt_free(self, views: list["_View"], everyone: list["_View"], loss, batches) -> None:
        """Augmented bases, core steps, truncation by energy."""
        if not views:
            return
        for v in views:
            v.augment()
        for step in range(self.core_steps):
            for v, G in zip(views, _gradient(loss, batches[step % len(batches)], views), strict=True):
                v.core_step(G)
        spectra = []
        for v in views:
            if not torch.isfinite(v.core).all():
                raise NonFiniteError(f"{_UPDATE}: layer {v.name!r}: the core steps diverged, lr is {v.lr}")
            spectra.append(reference.svd(v.core))
        ranks = {}
        for v, (_, sigma, _) in zip(views, spectra, strict=True):
            tail = sigma.square().flip(0).cumsum(0).flip(0).sqrt()  # tail[k]: of what is dropped at rank k
            enough = int((tail > self.theta * tail[0]).sum())
            ranks[v] = min(max(enough, self._least(v)), self._limits[v.name])
        shares = {v: sigma.square() / sigma.square().sum() for v, (_, sigma, _) in zip(views, spectra, strict=True)}
        rest = sum(v.parameters(v.r) for v in everyone if v not in ranks)
        while self.budget is not None and rest + sum(v.parameters(r) for v, r in ranks.items()) > self.budget:
            able = [v for v in views if ranks[v] > self._least(v)]
            if not able:
                break
            ranks[min(able, key=lambda v: float(shares[v][ranks[v] - 1]) / v.price(ranks[v] - 1))] -= 1
        for v, (P, sigma, Q) in zip(views, spectra, strict=True):
            k = ranks[v]
            v.become(
                v.left @ P[:, :k], sigma[:k].clamp_max(v.sigma_max), v.right @ Q[:, :k], P[: v.r, :k], Q[: v.r, :k]
            )
            v.report = v.describe(max(0, v.r - k), max(0, k - v.r), None)

    def _least(self, v: "_View") -> int:
        return min(self.min_rank, v.r)

    # ----------------------------------------------------------------------------------------- bounded

    def _adapt_bounded(self, views: list["_View"], everyone: list["_View"], loss, batches) -> None:
        """Candidates by first order, decisions by measurement."""
        if not views:
            return
        base = _mean(loss, batches)
        drops, adds = [], []
        for v in views:
            for move in v.find_moves(self.moves):
                v.weight(v.W + move.sign * torch.outer(move.u, move.v))
                move.change = _mean(loss, batches) - base
                v.weight(v.W)
                if math.isfinite(move.change):
                    (drops if move.drop else adds).append(move)
        rest = sum(v.parameters(len(v.new[1])) for v in everyone if v not in views)
        most = self.moves
        while True:
            chosen = self._choose(views, drops, adds, rest, base, most)
            for v in views:
                v.weight(v.moved([move for move in chosen if move.view is v]))
            allowed = sum(max(0.0, move.change) for move in chosen if move.drop) + self.tolerance * abs(base)
            if most == 0 or _mean(loss, batches) <= base + allowed:
                break
            most //= 2
        for v in views:
            mine = [move for move in chosen if move.view is v]
            if not mine:
                continue
            v.take(mine)
            dropped = sum(move.drop for move in mine)
            v.report = v.describe(dropped, len(mine) - dropped, sum((move.change for move in mine), 0.0))

    def _choose(self, views, drops, adds, rest: int, base: float, most: int) -> list["_Move"]:
        """At most `most` directions of a layer each way, but as many as the budget asks for leave."""
        ranks = {v: v.r for v in views}
        chosen: list[_Move] = []
        worth = self.tolerance * abs(base)

        def over(ranks) -> bool:
            return self.budget is not None and rest + sum(v.parameters(r) for v, r in ranks.items()) > self.budget

        def cheapest(taken, ranks, only=None):
            able = [
                d
                for d in drops
                if d not in taken
                and (only is None or d.view is only)
                and ranks[d.view] > self._least(d.view)
                and count(taken, d.view, True) < self.moves
            ]
            return min(able, key=lambda d: d.change / d.view.price(ranks[d.view] - 1), default=None)

        def count(moves, view, drop: bool) -> int:
            return sum(move.view is view and move.drop is drop for move in moves)

        for d in sorted(drops, key=lambda d: d.change):
            if d.change < -worth and ranks[d.view] > self._least(d.view) and count(chosen, d.view, True) < most:
                chosen.append(d)
                ranks[d.view] -= 1
        while over(ranks) and (d := cheapest(chosen, ranks)) is not None:
            chosen.append(d)
            ranks[d.view] -= 1
        for a in sorted(adds, key=lambda a: a.change / a.view.price(a.view.r)):
            if -a.change <= worth or count(chosen, a.view, False) >= most:
                continue
            trial, then, paid = [a], {**ranks, a.view: ranks[a.view] + 1}, 0.0
            while (full := then[a.view] > self._limits[a.view.name]) or over(then):
                d = cheapest(chosen + trial, then, a.view if full else None)
                if d is None or (paid := paid + d.change) + worth > -a.change:
                    break
                trial.append(d)
                then[d.view] -= 1
            else:
                chosen, ranks = chosen + trial, then
        return chosen


@dataclass(eq=False)
class _Move:
    """A direction that may leave, W - u vᵀ, or enter, W + u vᵀ; `change` of the loss if it does so alone."""

    view: "_View"
    drop: bool
    index: int
    u: Tensor
    v: Tensor
    change: float = math.nan

    @property
    def sign(self) -> int:
        return -1 if self.drop else 1


class _View:
    """One layer during an adaptation: what is in use of it, its dense twin, its gradient, what it becomes.

    Thin and small matrices are float64; W and G are as large as the dense weight, of at least float32.
    X, sigma, Y: W = X diag(sigma) Yᵀ, X = U A, Y = V B with S = A diag(sigma) Bᵀ. new: U, sigma, V of the new layer and
    P, Q by which the old columns of U and V turn into the new ones.
    """

    def __init__(self, name: str, layer: LowRankLayer, optimizer):
        self.name, self.layer, self.optimizer = name, layer, optimizer
        group = next(g for g in optimizer.param_groups if any(p is layer.S for p in g["params"]))
        self.tau, self.lr, self.band = float(group["tau"]), float(group["lr"]), group["band"]
        self.sigma_max = math.inf if group["sigma_max"] is None else float(group["sigma_max"])
        with torch.no_grad():
            masters = [optimizer._master(p) for p in (layer.U, layer.S, layer.V)]
            for role, X in zip("USV", masters, strict=True):
                if not torch.isfinite(X).all():
                    raise NonFiniteError(f"{_UPDATE}: {role} of layer {name!r} must be finite, got NaN or Inf")
            U, S, V = (X.double() for X in in_use(*masters))
            self.r = len(S)
            self.A, self.sigma, self.B = reference.svd(S)
            self.X, self.Y = U @ self.A, V @ self.B
            self.W = ((self.X * self.sigma) @ self.Y.mT).to(masters[0].dtype)
            self.dense = layer.to_dense()
        self.dense.weight.requires_grad_(True)
        self.m, self.n = self.W.shape
        self.G = torch.zeros_like(self.W)  # mean of dL/dW
        self.K = torch.zeros_like(S)  # mean of sym(√sigma Xᵀ dL/dW Y √sigma), and of its square
        self.K2 = torch.zeros_like(S)
        self.new, self.changed = (self.X, self.sigma, self.Y, self.A, self.B), False
        self.report = self.describe(0, 0, 0.0)

    def weight(self, W: Tensor) -> None:
        self.dense.weight.copy_(W.reshape(self.dense.weight.shape))

    def parameters(self, rank: int) -> int:
        return stored_parameters(rank, self.m, self.n)

    def price(self, rank: int) -> int:
        """Parameters of one direction more than `rank`."""
        return self.parameters(rank + 1) - self.parameters(rank)

    def describe(self, dropped: int, added: int, expected: float | None) -> LayerAdaptation:
        return LayerAdaptation(self.name, self.m, self.n, self.r, len(self.new[1]), dropped, added, expected)

    def within(self, G: Tensor, X: Tensor, Y: Tensor) -> Tensor:
        """Xᵀ G Y, small."""
        return (X.to(G.dtype).mT @ G @ Y.to(G.dtype)).double()

    def add_gradient(self, G: Tensor, share: float) -> None:
        G = G.to(self.G.dtype)
        root = self.sigma.sqrt()
        K = root.unsqueeze(1) * self.within(G, self.X, self.Y) * root
        K = (K + K.mT) / 2
        self.G += share * G
        self.K += share * K
        self.K2 += share * (K @ K)

    def become(self, U, sigma, V, P, Q) -> None:
        self.new, self.changed = (U, sigma, V, P, Q), True
        self.weight((U * sigma) @ V.mT)

    # augmented bases ----------------------------------------------------------------------------------

    def augment(self) -> None:
        k = min(self.r, self.m - self.r, self.n - self.r)
        self.left = _augmented(self.X, self.G @ self.Y.to(self.G.dtype), k)
        self.right = _augmented(self.Y, self.G.mT @ self.X.to(self.G.dtype), k)
        self.core = torch.diag(F.pad(self.sigma, (0, k)))

    def core_step(self, G: Tensor) -> None:
        self.core = self.core - self.lr * self.within(G.to(self.G.dtype), self.left, self.right)
        self.weight(self.left @ self.core @ self.right.mT)

    # single directions --------------------------------------------------------------------------------

    def find_moves(self, count: int) -> list[_Move]:
        """Directions that may leave, columns of H with H Hᵀ = diag(sigma), and that may enter, with size `entry`."""
        if not self.sigma[0] > 0:
            return []
        _, T = torch.linalg.eigh(self.K2)  # ascending: the least salient first
        self.H = self.sigma.sqrt().unsqueeze(1) * T
        predicted = -(T * (self.K @ T)).sum(0)
        lowering = [i for i in predicted.argsort().tolist()[:count] if predicted[i] < 0]
        leave = list(dict.fromkeys([*range(min(count, self.r)), *lowering]))
        moves = [self._move(True, i, self.X @ self.H[:, i], self.Y @ self.H[:, i]) for i in leave]
        lower, _ = reference.band_edges(self.sigma, self.tau, self.band, self.sigma_max)
        self.entry = torch.maximum(lower, self.sigma[0] / (1 + self.tau))
        outside = reference.tangent_projection(self.X.to(self.G.dtype), self.G)
        outside = reference.tangent_projection(self.Y.to(self.G.dtype), outside.mT).mT
        u, v = _leading(outside, min(count, self.m - self.r, self.n - self.r))
        self.entering = (-u.double(), v.double())
        enter = range(u.shape[1])
        return moves + [
            self._move(False, j, self.entry * self.entering[0][:, j], self.entering[1][:, j]) for j in enter
        ]

    def _move(self, drop: bool, index: int, u: Tensor, v: Tensor) -> _Move:
        return _Move(self, drop, index, u.to(self.W.dtype), v.to(self.W.dtype))

    def moved(self, moves: list[_Move]) -> Tensor:
        return sum((move.sign * torch.outer(move.u, move.v) for move in moves), self.W)

    def take(self, moves: list[_Move]) -> None:
        gone = {move.index for move in moves if move.drop}
        new = [move.index for move in moves if not move.drop]
        E, root, _ = reference.svd(self.H[:, [i for i in range(self.r) if i not in gone]])
        U, V = (torch.cat((Z @ E, z[:, new]), 1) for Z, z in zip((self.X, self.Y), self.entering, strict=True))
        sigma = torch.cat((root.square(), self.entry.expand(len(new))))
        if sigma.max() > (1 + self.tau) * sigma.min():  # rounding, or tau has just become smaller
            lo, hi = reference.clip_edges(sigma, self.tau, self.band, self.sigma_max)
            sigma = sigma.clamp(lo, hi)
        self.become(linalg.orthonormalize(U), sigma, linalg.orthonormalize(V), self.A @ E, self.B @ E)

    # writing ------------------------------------------------------------------------------------------

    def write(self) -> None:
        """The new factors into the parameters, their masters and their state; zeros into the room that is left."""
        if not self.changed:
            return
        U, sigma, V, P, Q = self.new
        r = len(sigma)
        for role, p, new in zip(
            "USV", (self.layer.U, self.layer.S, self.layer.V), (U, torch.diag(sigma), V), strict=True
        ):
            _turn(self.optimizer.state.get(p, {}), p, role, self.r, P, Q, r)
            master = self.optimizer._master(p)
            master.zero_()
            master[where_in_use(role, r)] = new.to(master.dtype)
            if master is not p:
                p.copy_(master)


def _turn(state: dict, p: Tensor, role: str, r: int, P: Tensor, Q: Tensor, new: int) -> None:
    """The optimizer's state of a factor whose first r columns turn by P (U), Q (V), Pᵀ and Q (S)."""
    for key in (*_LINEAR, *_SQUARED):
        if (X := state.get(key)) is None:
            continue
        squared = key in _SQUARED
        left, right = (P.square(), Q.square()) if squared else (P, Q)
        old = X[where_in_use(role, r)].double()
        turned = left.mT @ old @ right if role == "S" else old @ (left if role == "U" else right)
        X.zero_()
        if squared:  # a direction that enters steps as the others do: a second moment of zero would make it leap
            fill = old.mean() if role == "S" else old.mean(1, keepdim=True)
            X[where_in_use(role, new)] = fill.to(X.dtype)
        X[where_in_use(role, turned.shape[1])] = turned.to(X.dtype)


def _check_state(layers: dict[str, LowRankLayer], optimizer) -> None:
    known = {*_LINEAR, *_SQUARED, "master"}
    for name, layer in layers.items():
        for role in "USV":
            p = getattr(layer, role)
            for key, value in optimizer.state.get(p, {}).items():
                if key not in known and isinstance(value, Tensor) and value.shape == p.shape:
                    raise TypeError(
                        f"{_UPDATE}: cannot turn the state {key!r} of {role} of layer {name!r} with its basis;"
                        f" known are {', '.join(sorted(known))}"
                    )


def _trained_layers(model: nn.Module, optimizer) -> dict[str, LowRankLayer]:
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    layers, seen = {}, {}
    for name, layer in low_rank_layers(model).items():
        if not all(getattr(layer, role).requires_grad for role in "USV"):
            continue
        if id(layer.S) not in stepped:
            raise ValueError(f"RankController: layer {name!r} is none of the optimizer's")
        for role in "USV":
            other = seen.setdefault(id(getattr(layer, role)), name)
            if other != name:
                raise ValueError(
                    f"RankController: layers {other!r} and {name!r} share {role}; share the whole layer instead"
                )
        layers[name] = layer
    if not layers:
        raise ValueError("RankController: model must have low-rank layers that are trained, found none")
    return layers


# ---------------------------------------------------------------------------------------- dense weights


@contextlib.contextmanager
def _dense_weights(views: list[_View]):
    """Meanwhile the layers, called or asked for their weight, use the dense one of their view."""
    classes = [type(v.layer) for v in views]
    for v, cls in zip(views, classes, strict=True):
        v.layer.__dict__["_dense_twin"] = v.dense
        v.layer.__class__ = _with_dense_weight(cls)
    try:
        yield
    finally:
        for v, cls in zip(views, classes, strict=True):
            v.layer.__class__ = cls
            del v.layer.__dict__["_dense_twin"]


@functools.cache
def _with_dense_weight(cls: type) -> type:
    return type(
        cls.__name__,
        (cls,),
        {
            "weight": property(lambda self: self._dense_twin.weight),
            "forward": lambda self, input: self._dense_twin(input),
            "apply_rows": lambda self, input, rows, bias: F.linear(input, self._dense_twin.weight[rows], bias),
        },
    )


@contextlib.contextmanager
def _evaluating(model: nn.Module):
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _gradients(loss, batches, views: list[_View]) -> None:
    for batch in batches:
        for v, G in zip(views, _gradient(loss, batch, views), strict=True):
            v.add_gradient(G, 1 / len(batches))


def _gradient(loss, batch, views: list[_View]) -> list[Tensor]:
    """dL/dW [m, n] of each layer."""
    with torch.enable_grad():
        value = _scalar(loss(batch))
        used = value.requires_grad
        grads = torch.autograd.grad(value, [v.dense.weight for v in views], allow_unused=True) if used else [None]
    for v, G in zip(views, grads, strict=False):
        if G is None:
            raise ValueError(f"{_UPDATE}: the loss does not depend on layer {v.name!r}")
        if not torch.isfinite(G).all():
            raise NonFiniteError(f"{_UPDATE}: the gradient of layer {v.name!r} must be finite, got NaN or Inf")
    return [G.flatten(1) for G in grads]


@torch.no_grad()
def _mean(loss, batches) -> float:
    return torch.stack([_scalar(loss(batch)).double() for batch in batches]).mean().item()


def _scalar(value) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{_UPDATE}: loss(batch) must be a tensor of one element, got {got}")
    return value.reshape(())


# ------------------------------------------------------------------------------------------------ bases


def _augmented(X: Tensor, Z: Tensor, k: int) -> Tensor:
    """An orthonormal basis of X and the k leading directions of Z outside of it; X comes first, as it is."""
    Z = reference.tangent_projection(X, Z.double())
    left, _, _ = reference.svd(Z / Z.norm().clamp_min(torch.finfo(Z.dtype).tiny))
    return linalg.orthonormalize(torch.cat((X, left[:, :k]), 1))


def _leading(A: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k leading left and right singular vectors of A by subspace iteration from a fixed start.

    Source: N. Halko, P. Martinsson and J. Tropp, Finding structure with randomness, SIAM Review 2011, algorithm 4.4.
    """
    size = min(k + 8, *A.shape)
    start = torch.randn(A.shape[1], size, dtype=A.dtype, generator=torch.Generator().manual_seed(0))
    Q = linalg.orthonormalize(A @ start.to(A.device))
    for _ in range(2):
        Q = linalg.orthonormalize(A @ linalg.orthonormalize(A.mT @ Q))
    left, _, right = reference.svd(Q.mT @ A)
    return Q @ left[:, :k], right[:, :k]


# ------------------------------------------------------------------------------------------------- room


def compact(model: nn.Module, optimizer: Optimizer | None = None) -> nn.Module:
    """Cuts the room that rank adaptation keeps: layers of rank active_rank, in place; returns the model.

    The function is the same to rounding. U, S and V are new parameters, without `.grad`; whoever else holds them or
    has looked at their shapes (compiled models, DistributedDataParallel, CUDA graphs) has to look again.

    Args:
        optimizer: if training goes on: gets the new parameters, and its state of them is cut likewise.
    """
    for layer in low_rank_layers(model).values():
        if (r := layer.active_rank) < layer.rank:
            _resize(layer, r, optimizer)
    return model


@torch.no_grad()
def _resize(layer: LowRankLayer, rank: int, optimizer: Optimizer | None) -> None:
    """Room for `rank` directions in a layer, zeros where it is new, and in the optimizer's state of it."""
    more = rank - layer.rank
    for role in "USV":
        p = getattr(layer, role)
        pads = (0, more, 0, more) if role == "S" else (0, more)
        new = nn.Parameter(F.pad(p.detach(), pads).contiguous(), p.requires_grad)
        setattr(layer, role, new)  # new data in p would not do: graphs that are still alive know its shape
        if optimizer is None:
            continue
        for group in optimizer.param_groups:
            group["params"] = [new if q is p else q for q in group["params"]]
        state = optimizer.state.pop(p, None)
        if state is not None:
            optimizer.state[new] = {
                key: F.pad(value, pads).contiguous() if isinstance(value, Tensor) and value.shape == p.shape else value
                for key, value in state.items()
            }
    layer.rank = rank
