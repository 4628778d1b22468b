"""RankController moves rank to where it is worth most, in parameters of fixed size; compact cuts unused columns."""

import contextlib
import functools
import math
import numbers
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from .. import _table, linalg, reference
from .._modules import check_module, not_plain, unwrapped_optimizer
from .._shards import Group, Team
from ..errors import NonFiniteError, RankError
from ..factorize.budget import stored_parameters
from ..nn.layer import LowRankLayer, low_rank_layers
from ..nn.rank import resolve_rank
from .base import ConstrainedOptimizer, active_factors, active_slice

_LINEAR = ("momentum_buffer", "exp_avg")  # state that turns with the bases
_SQUARED = ("exp_avg_sq", "max_exp_avg_sq")  # for uncorrelated columns g: E[(g P)²] = E[g²] (P ∘ P)
_CORE_STEPS = 10  # of layers without a bound, on augmented bases

_UPDATE = "RankController.update"  # begins the error texts


@dataclass(frozen=True)
class LayerRankChange:
    """The change of one layer, whose weight is an m x n matrix.

    Attributes:
        name: Name of the layer.
        m: Rows of its weight.
        n: Columns of its weight.
        rank_before: Rank before the update.
        rank_after: Rank after it.
        dropped: Number of directions that left.
        added: Number of directions that entered.
        expected: Sum of the measured changes of the loss that each of them makes alone; None for a layer without a
            bound, which is truncated instead.
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
    """The result of RankController.update; printing it shows a table.

    Attributes:
        layers: The change of each layer.
        loss_before: Mean of the loss over the batches before the update.
        loss_after: The same after it.
        budget: Parameters allowed, or None.
    """

    layers: list[LayerRankChange]
    loss_before: float
    loss_after: float
    budget: float | None = None

    @property
    def change(self) -> float:
        """Change of the loss."""
        return self.loss_after - self.loss_before

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of each layer after the update."""
        return {x.name: x.rank_after for x in self.layers}

    @property
    def parameters(self) -> int:
        """Parameters in use after the update."""
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
    """Changes the ranks of a model's low-rank layers during training, at each call of `update`.

    The parameters are allocated for `max_rank` directions and keep their shapes U [m, R], S [R, R], V [n, R]: the first
    layer.active_rank columns (of S also rows) are active, the rest are zeros. So compiled models, checkpoints and
    others that hold the parameters notice nothing; `compact` cuts the zeros at the end. The optimizer steps the active
    part and keeps it on the constraint set. Its state turns with the bases: momentum exactly, second moments as if
    columns were uncorrelated; a direction that enters begins with no momentum and the mean second moment.

    Layers with a bound (tau finite). Singular values do not tell what a direction is worth, and a direction can enter
    only at full size, so the loss is measured:

    1. Candidates to leave are the directions whose removal changes the loss least to first order (by
       sigma_i |dL/dsigma_i|, root mean square over the batches) or lowers it most. Candidates to enter are the leading
       singular pairs of (I - UUᵀ) dL/dW (I - VVᵀ), at the lower edge of the band, with the sign that lowers the loss.
    2. The change of the loss by each candidate alone is measured. One leaves, or enters, if that lowers the loss by
       more than `tolerance` of it.
    3. Over the budget, those leave that cost least per parameter. A candidate that does not fit enters if it is worth
       more than what must leave for it, in whichever layers. Others stay, however little they are worth: an untrained
       network would lose everything.
    4. If all changes together do more harm than alone, half as many are tried.

    Equal singular values have no basis of their own. The directions of S = Z H are H^½ t with t the eigenvectors of the
    mean of K² over the batches, K = sym(H^½ Zᵀ Uᵀ dL/dW V H^½). Taking H^½ t tᵀ H^½ from H interlaces its eigenvalues,
    which keeps the bound.

    Layers without a bound (tau = inf). Each takes 10 gradient steps of its core in the bases [U, dL/dU], [V, dL/dV],
    one batch each, with the core's learning rate, and keeps the smallest rank whose tail has ‖tail‖ <= theta ‖S‖_F.
    Over the budget, directions with the least share of their layer's energy per parameter go.

    Memory during an update: the dense weight of each layer, its gradient and the mean of that. Time: a pass with
    gradients over the batches, a few without, and for each bounded layer up to 3 `moves` more without.

    In several processes losses and gradients are means over the processes, which may have different batches, and all
    change the same; all must call update. They are those of the DistributedDataParallel if the model is one, and all of
    torch.distributed otherwise. A CUDA graph of the step must be captured again after an update that changed a rank.

    Args:
        model: With low-rank layers; frozen ones and all other layers do not change. A DistributedDataParallel if the
            loss is computed through one.
        optimizer: CondLRSGD or CondLRAdamW of this model; tau, band and sigma_max are read from its groups.
        min_rank: Int >= 1; no layer gets below it (or below its rank, if that is less).
        max_rank: Int or fraction of min(m, n), for all layers; None for the present size of S. Where it is larger, the
            layer gets new parameters here, in model and optimizer: make the controller before anything else that
            holds parameters, and before a checkpoint is loaded.
        budget: Share of the m n of these layers that their r (m + n) + r² may take, as in factorize; None for no limit.
        tolerance: For bounded layers, the relative change of the loss that a direction must be worth.
        theta: For layers without a bound, the relative energy that truncation may drop.
        moves: For bounded layers, how many directions of a layer may leave, and enter, in one update.

    Raises:
        ValueError: An option is out of range, or layers share factors.
        TypeError: The optimizer is another one.
        RankError: min_rank or max_rank does not fit a layer.

    Source: Taylor saliency of P. Molchanov et al., ICLR 2017; augmented bases and truncation of S. Schotthöfer et al.,
        DLRT (NeurIPS 2022, arXiv 2205.13571) and RobustDLRT (2025, arXiv 2505.08022).
    """

    model: nn.Module
    optimizer: ConstrainedOptimizer
    min_rank: int
    moves: int
    tolerance: float
    theta: float
    budget: float | None

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
    ):
        for name, value in (("min_rank", min_rank), ("moves", moves)):
            if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
                raise ValueError(f"RankController: {name} must be an int >= 1, got {value!r}")
        for name, value in (("tolerance", tolerance), ("theta", theta)):
            if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 <= value < 1:
                raise ValueError(f"RankController: {name} must be a number in [0, 1), got {value!r}")
        if budget is not None and (isinstance(budget, bool) or not isinstance(budget, numbers.Real) or not budget > 0):
            raise ValueError(f"RankController: budget must be None or a number > 0, got {budget!r}")
        optimizer = unwrapped_optimizer(optimizer)
        if not isinstance(optimizer, ConstrainedOptimizer):
            raise TypeError(
                f"RankController: optimizer must be CondLRSGD or CondLRAdamW, got {type(optimizer).__name__}"
            )
        self.model, self.optimizer = model, optimizer
        self.min_rank, self.moves = int(min_rank), int(moves)
        self.tolerance, self.theta = float(tolerance), float(theta)
        self._wrappers = [module for module in model.modules() if isinstance(module, DistributedDataParallel)]
        self._team = Team()  # the processes that measure together
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

    def update(self, loss: Callable[[Any], Tensor], batches: Iterable[Any]) -> RankReport:
        """Change the ranks; call it between steps, for example after every epoch.

        The model runs in evaluation mode, and eagerly if it is compiled. No `.grad`, buffer or random state of torch
        changes. After an error nothing has changed.

        Args:
            loss: loss(batch) returns the scalar to lower, computed through the model.
            batches: A few representative batches, which count the same; all are kept during the call. As many in every
                process.

        Returns:
            The changes of all layers and of the loss.

        Raises:
            ValueError: There is no batch, or not as many in every process, or the loss is no scalar or does not depend
                on a layer.
            NonFiniteError: The loss, a gradient or a factor is NaN or Inf.
            TypeError: The optimizer has state of an unknown kind.
        """
        batches = list(batches)
        if not batches:
            raise ValueError(f"{_UPDATE}: batches must hold at least one, got none")
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            groups = [wrapper.process_group for wrapper in self._wrappers] or [torch.distributed.group.WORLD]
            self._team = Team(tuple(dict.fromkeys(map(Group.of, groups))))
        count = torch.tensor([len(batches)], dtype=torch.float64, device=next(self.model.parameters()).device)
        if self._team.mean(count * count) != self._team.mean(count) ** 2:
            raise ValueError(f"{_UPDATE}: batches must be as many in every process, got {len(batches)} here")
        _check_state(self._layers, self.optimizer)
        with contextlib.ExitStack() as stack:
            for wrapper in self._wrappers:
                stack.enter_context(wrapper.no_sync())
            stack.enter_context(_evaluating(self.model))
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            before = self._mean(loss, batches)
            if not math.isfinite(before):
                raise NonFiniteError(f"{_UPDATE}: the loss must be finite, got {before}")
            devices = {layer.S.device for layer in self._layers.values() if layer.S.is_cuda}
            with torch.random.fork_rng(list(devices)):  # making dense layers draws their initial weights
                views = [_View(name, layer, self.optimizer) for name, layer in self._layers.items()]
            with _dense_weights(views):
                self._gradients(loss, batches, views)
                with torch.no_grad():
                    self._update_free([v for v in views if math.isinf(v.tau)], views, loss, batches)
                    self._update_bounded([v for v in views if not math.isinf(v.tau)], views, loss, batches)
            with torch.no_grad():
                for view in views:
                    view.write()
            after = self._mean(loss, batches)
        return RankReport([v.report for v in views], before, after, self.budget)

    # -------------------------------------------------------------------------------------- without a bound

    def _update_free(self, views: list["_View"], all_views: list["_View"], loss, batches) -> None:
        """Update layers without a bound: augmented bases, core steps, truncation by energy."""
        if not views:
            return
        for v in views:
            v.augment()
        for step in range(_CORE_STEPS):
            for v, G in zip(views, self._gradient(loss, batches[step % len(batches)], views), strict=True):
                v.core_step(G)
        spectra = []
        for v in views:
            if not torch.isfinite(v.core).all():
                raise NonFiniteError(f"{_UPDATE}: layer {v.name!r}: the core steps diverged, lr is {v.lr}")
            spectra.append(reference.svd(v.core))
        ranks, squares = {}, {}
        for v, (_, sigma, _) in zip(views, spectra, strict=True):
            squares[v] = (sigma / reference.magnitude(sigma, -1)).square()
            tail = squares[v].flip(0).cumsum(0).flip(0).sqrt()  # tail[k]: norm of what rank k drops
            enough = int((tail > self.theta * tail[0]).sum())
            ranks[v] = min(max(enough, self._least(v)), self._limits[v.name])
        shares = {v: square / square.sum() for v, square in squares.items()}
        rest = sum(v.parameters(v.r) for v in all_views if v not in ranks)
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

    # ---------------------------------------------------------------------------- measurements, by all processes

    def _gradients(self, loss, batches, views: list["_View"]) -> None:
        for batch in batches:
            for v, G in zip(views, self._gradient(loss, batch, views), strict=True):
                v.add_gradient(G, 1 / len(batches))

    def _gradient(self, loss, batch, views: list["_View"]) -> list[Tensor]:
        """Return dL/dW [m, n] of each layer."""
        with torch.enable_grad():
            value = _scalar(loss(batch))
            used = value.requires_grad
            grads = torch.autograd.grad(value, [v.dense.weight for v in views], allow_unused=True) if used else [None]
        for v, G in zip(views, grads, strict=False):
            if G is None:
                raise ValueError(f"{_UPDATE}: the loss does not depend on layer {v.name!r}")
        grads = [self._team.mean(G) for G in grads]
        for v, G in zip(views, grads, strict=True):
            if not torch.isfinite(G).all():
                raise NonFiniteError(f"{_UPDATE}: the gradient of layer {v.name!r} must be finite, got NaN or Inf")
        return [v.layer.as_matrix(G) for v, G in zip(views, grads, strict=True)]

    @torch.no_grad()
    def _mean(self, loss, batches) -> float:
        return self._team.mean(torch.stack([_scalar(loss(batch)).double() for batch in batches]).mean()).item()

    def _least(self, v: "_View") -> int:
        return min(self.min_rank, v.r)

    # ----------------------------------------------------------------------------------------- bounded

    def _update_bounded(self, views: list["_View"], all_views: list["_View"], loss, batches) -> None:
        """Update layers with a bound: candidates by first order, decisions by measurement."""
        if not views:
            return
        base = self._mean(loss, batches)
        drops, adds = [], []
        for v in views:
            for move in v.find_moves(self.moves):
                v.weight(v.W + move.sign * torch.outer(move.u, move.v))
                move.change = self._mean(loss, batches) - base
                v.weight(v.W)
                if math.isfinite(move.change):
                    (drops if move.drop else adds).append(move)
        rest = sum(v.parameters(len(v.new[1])) for v in all_views if v not in views)
        most = self.moves
        while True:
            chosen = self._choose(views, drops, adds, rest, base, most)
            for v in views:
                v.weight(v.moved([move for move in chosen if move.view is v]))
            allowed = sum(max(0.0, move.change) for move in chosen if move.drop) + self.tolerance * abs(base)
            if most == 0 or self._mean(loss, batches) <= base + allowed:
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
        """Choose at most `most` moves of a layer each way; for the budget up to `moves` may leave."""
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
    """A direction that may leave, W - u vᵀ, or enter, W + u vᵀ, and the change of the loss if it alone does."""

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
    """One layer during an update: its active factors, dense twin, gradient, and new factors.

    Thin and small matrices are float64; W and G are as large as the dense weight, at least float32.
    X, sigma, Y: W = X diag(sigma) Yᵀ, X = U A, Y = V B with S = A diag(sigma) Bᵀ. new: U, sigma, V of the new layer,
    and P, Q by which the old columns of U and V turn into the new ones.
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
            U, S, V = (X.double() for X in active_factors(*masters))
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
        self.dense.weight.copy_(self.layer._from_matrix(W))

    def parameters(self, rank: int) -> int:
        return stored_parameters(rank, self.m, self.n)

    def price(self, rank: int) -> int:
        """Return the parameters that one direction more than `rank` takes."""
        return self.parameters(rank + 1) - self.parameters(rank)

    def describe(self, dropped: int, added: int, expected: float | None) -> LayerRankChange:
        return LayerRankChange(self.name, self.m, self.n, self.r, len(self.new[1]), dropped, added, expected)

    def within(self, G: Tensor, X: Tensor, Y: Tensor) -> Tensor:
        """Return Xᵀ G Y."""
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
        """Return directions that may leave, columns of H with H Hᵀ = diag(sigma), or enter, with size `entry`."""
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
        """Write the new factors and zeros behind them into the parameters and masters; turn the state."""
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
            master[active_slice(role, r)] = new.to(master.dtype)
            if master is not p:
                p.copy_(master)


def _turn(state: dict, p: Tensor, role: str, r: int, P: Tensor, Q: Tensor, new: int) -> None:
    """Turn the optimizer's state of a factor whose first r columns turn by P (U), Q (V), Pᵀ and Q (S)."""
    for key in (*_LINEAR, *_SQUARED):
        if (X := state.get(key)) is None:
            continue
        squared = key in _SQUARED
        left, right = (P.square(), Q.square()) if squared else (P, Q)
        old = X[active_slice(role, r)].double()
        turned = left.mT @ old @ right if role == "S" else old @ (left if role == "U" else right)
        X.zero_()
        if squared:  # with a second moment of zero, a direction that enters would take too long a step
            fill = old.mean() if role == "S" else old.mean(1, keepdim=True)
            X[active_slice(role, new)] = fill.to(X.dtype)
        X[active_slice(role, turned.shape[1])] = turned.to(X.dtype)


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
        if reason := not_plain(layer.U):
            raise ValueError(f"RankController: U of layer {name!r} {reason}")
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
    """Make the layers use the dense weights of their views, when called or asked for their weight."""
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
            "forward": lambda self, *args, **kwargs: self._dense_twin(*args, **kwargs),
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


def _scalar(value) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{_UPDATE}: loss(batch) must be a tensor of one element, got {got}")
    return value.reshape(())


# ------------------------------------------------------------------------------------------------ bases


def _augmented(X: Tensor, Z: Tensor, k: int) -> Tensor:
    """Return an orthonormal basis of X and the k leading directions of Z outside of it; X comes first, unchanged."""
    Z = reference.tangent_projection(X, Z.double())
    left, _, _ = reference.svd(Z)
    return linalg.orthonormalize(torch.cat((X, left[:, :k]), 1))


def _leading(A: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k leading left and right singular vectors of A, by subspace iteration from a fixed start.

    Source: N. Halko, P. Martinsson and J. Tropp, Finding structure with randomness, SIAM Review 2011, algorithm 4.4.
    """
    size = min(k + 8, *A.shape)
    fixed = torch.Generator("cpu").manual_seed(0)
    start = torch.randn(A.shape[1], size, dtype=A.dtype, device="cpu", generator=fixed)
    Q = linalg.orthonormalize(A @ start.to(A.device))
    for _ in range(2):
        Q = linalg.orthonormalize(A @ linalg.orthonormalize(A.mT @ Q))
    left, _, right = reference.svd(Q.mT @ A)
    return Q @ left[:, :k], right[:, :k]


# ---------------------------------------------------------------------------------------------- resizing


def compact(model: nn.Module, optimizer: Optimizer | None = None) -> nn.Module:
    """Cut the zero columns that a RankController keeps, in place: the rank of each layer becomes its active_rank.

    The function is the same to rounding. U, S and V are new parameters, without `.grad`. Make anything that holds them
    or depends on their shapes anew (compiled models, DistributedDataParallel, CUDA graphs).

    Args:
        model: The model.
        optimizer: For further training; gets the new parameters, and its state of them is cut too.

    Returns:
        The model.
    """
    check_module("compact", model)
    for layer in low_rank_layers(model).values():
        if (r := layer.active_rank) < layer.rank:
            _resize(layer, r, optimizer)
    return model


@torch.no_grad()
def _resize(layer: LowRankLayer, rank: int, optimizer: Optimizer | None) -> None:
    """Resize a layer and the optimizer's state of it to `rank` directions; new ones are zeros."""
    more = rank - layer.rank
    for role in "USV":
        p = getattr(layer, role)
        pads = (0, more, 0, more) if role == "S" else (0, more)
        new = nn.Parameter(F.pad(p.detach(), pads).contiguous(), p.requires_grad)
        setattr(layer, role, new)  # a new parameter, as autograd graphs that are alive know the shape of p
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
