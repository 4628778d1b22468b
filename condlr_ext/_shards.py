"""Parameters whose rows are divided among processes (DTensors): their local rows, and sums over the processes.

Nothing here gathers a factor. The order of rows does not matter to XᵀX, and neither do shards that are uneven, empty,
or wider than long.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

_PASSES = 8  # of Cholesky-QR; a matrix that is singular to rounding takes five


def is_distributed(t: Tensor) -> bool:
    """Return whether a tensor is a DTensor, without importing it."""
    return getattr(t, "placements", None) is not None


def local(t: Tensor) -> Tensor:
    """Return the part of a DTensor that this process holds, the tensor itself of others; what is written there stays.

    Nothing is sent, and no DTensor operation runs.
    """
    return t._local_tensor if is_distributed(t) else t


def local_gradient(p: Tensor) -> Tensor | None:
    """Return the gradient of a parameter where this process holds the parameter."""
    grad = p.grad
    if grad is None or not is_distributed(grad):
        return grad
    if tuple(grad.placements) != tuple(p.placements):  # a sum that is still to be taken
        grad = grad.redistribute(placements=p.placements)
    grad = local(grad)
    return grad.wait() if hasattr(grad, "wait") else grad


@dataclass(frozen=True)
class Group:
    """A process group; those of the same processes are equal, as meshes have that were made one after the other."""

    ranks: tuple[int, ...]
    group: Any = field(compare=False)

    @classmethod
    def of(cls, group) -> "Group":
        return cls(tuple(torch.distributed.get_process_group_ranks(group)), group)

    @property
    def is_first(self) -> bool:
        """Whether this process is its first."""
        return self.group.rank() == 0


def dividing_groups(where: str, p: Tensor) -> tuple[Group, ...]:
    """Return the process groups among which the rows of a parameter are divided, none if each process has all.

    Raises:
        ValueError: It is divided by columns, or a sum that is still to be taken.
    """
    if not is_distributed(p):
        return ()
    groups = []
    for dim, placement in enumerate(p.placements):
        if placement.is_replicate():
            continue
        if placement.is_partial() or placement.dim != 0:  # is_shard() is False of the shards of shards
            raise ValueError(f"{where} must be divided by rows, Shard(0), got placements {tuple(p.placements)}")
        if p.device_mesh.size(dim) > 1:
            groups.append(Group.of(p.device_mesh.get_group(dim)))
    return tuple(groups)


def row_indices(p: Tensor) -> Tensor:
    """Return the indices of the rows of a parameter that this process holds, int64 on its device."""
    from torch.distributed.tensor import distribute_tensor

    rows = torch.arange(len(p), device=local(p).device)
    if not is_distributed(p):
        return rows
    return local(distribute_tensor(rows, p.device_mesh, p.placements, src_data_rank=None))


def distributed_like(p: Tensor, whole: Tensor) -> Tensor:
    """Return a tensor that every process has as a whole, distributed as the parameter is."""
    from torch.distributed.tensor import distribute_tensor

    if not is_distributed(p) or is_distributed(whole):
        return whole
    return distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None)


def written_back(p: Tensor, whole: Tensor) -> None:
    """Write the rows of `whole` that this process holds into the parameter."""
    local(p).copy_(whole[row_indices(p)] if is_distributed(p) else whole)


@dataclass(frozen=True)
class Team:
    """The processes among which parameters are divided: process groups whose product they are, one per mesh dimension.

    Replicas (HSDP) are other teams, which do the same.
    """

    groups: tuple[Group, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.groups)

    @classmethod
    def of(cls, where: str, params: list[Tensor]) -> "Team":
        """Return the smallest team among which these are divided."""
        return cls(tuple(dict.fromkeys(group for p in params for group in dividing_groups(where, p))))

    def counts(self, p: Tensor) -> bool:
        """Return whether the rows of p here enter sums: of equal parts in several processes, those of the first do."""
        mine = dividing_groups("the parameter", p)
        return all(group in mine or group.is_first for group in self.groups)

    def sum(self, parts: list[Tensor]) -> list[Tensor]:
        """Return the sums of tensors over the team in float64, the same bits in all processes; sent as one buffer."""
        if not parts:
            return []
        flat = torch.cat([part.double().reshape(-1) for part in parts])
        for group in self.groups:
            torch.distributed.all_reduce(flat, group=group.group)
        pieces = flat.split([part.numel() for part in parts])
        return [piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True)]

    def mean(self, t: Tensor) -> Tensor:
        """Return the mean of a tensor over the team, in its dtype."""
        return (self.sum([t])[0] / math.prod(len(group.ranks) for group in self.groups)).to(t.dtype) if self else t

    def any(self, flag: Tensor) -> bool:
        """Return whether the flag is set in some process."""
        return bool(self.sum([flag])[0] > 0) if self else bool(flag)

    def wholes(self, params: list[Tensor], values: list[Tensor] | None = None) -> list[Tensor]:
        """Return whole tensors from the rows that the processes hold, exact, by one sum of the whole size in float64.

        Args:
            params: Say which rows are here.
            values: Other rows of the same places; None for those of the parameters.
        """
        values = [local(p) for p in params] if values is None else values
        parts = []
        for p, rows in zip(params, values, strict=True):
            part = torch.zeros(p.shape, dtype=torch.float64, device=rows.device)
            if self.counts(p):
                part[row_indices(p)] = rows.double()
            parts.append(part)
        return [whole.to(rows.dtype) for rows, whole in zip(values, self.sum(parts), strict=True)]


def used_directions(U: Tensor, S: Tensor, V: Tensor) -> Tensor:
    """Return which directions are in use [r], those in which U, S or V has an entry that is not zero."""
    team = Team.of("U, S and V", [U, S, V])
    if not team:
        U, S, V = map(local, (U, S, V))
        return U.any(0) | V.any(0) | S.any(0) | S.any(1)
    rows = torch.zeros(len(S), dtype=torch.float64, device=local(S).device)
    rows[row_indices(S)] = local(S).any(1).to(rows.dtype)
    (count,) = team.sum([rows + sum(local(X).any(0) for X in (U, S, V))])
    return count > 0


def merged(teams: list[Team]) -> list[Team]:
    """Return for each team the largest of them that holds all of its groups, so that few sums serve all."""
    by_size = sorted(dict.fromkeys(teams), key=lambda team: len(team.groups), reverse=True)
    return [next(big for big in by_size if set(team.groups) <= set(big.groups)) for team in teams]


@dataclass
class Rows:
    """The rows [m_i, r] of a factor X [m, r] that this process holds, in float64.

    Attributes:
        values: The rows.
        counted: Whether they enter sums (see Team.counts).
        param: The parameter, which says what rows they are.
    """

    values: Tensor
    counted: bool
    param: Tensor

    @classmethod
    def of(cls, team: Team, p: Tensor, values: Tensor | None = None) -> "Rows":
        return cls((local(p) if values is None else values).double(), team.counts(p), p)

    def product(self, other: Tensor) -> Tensor:
        """Return the part of XᵀZ [r, r] of these rows and those of Z."""
        return self.values.mT @ other if self.counted else other.new_zeros(2 * self.values.shape[1:])


def qr(team: Team, factors: list[Rows], accuracy: float) -> list[Tensor]:
    """Replace the rows of X by those of Q with X = Q R, and return the R [r, r], in float64, equal in all processes.

    Cholesky-QR, repeated with a shift where X is ill-conditioned. Columns that depend on those before them, to
    rounding, become any orthonormal ones: noise of 1e-14 that is the same however the rows are divided. So one sum of
    XᵀX is enough for well-conditioned factors. Factors with NaN or Inf get NaN.

    Args:
        team: The processes.
        factors: The rows of each X; changed.
        accuracy: How orthonormal Q must be, in rounding errors of float64 that the condition number amplifies.

    Source: T. Fukaya et al., Shifted Cholesky QR for computing the QR factorization of ill-conditioned matrices, SIAM
        J. Sci. Comput. 2020.
    """
    eps = torch.finfo(torch.float64).eps
    triangles = [torch.eye(x.values.shape[1], dtype=torch.float64, device=x.values.device) for x in factors]
    pending, noisy = list(range(len(factors))), {}  # the columns of zeros, by factor with noise
    for _ in range(_PASSES):
        again = []
        for i, gram in zip(pending, team.sum([factors[i].product(factors[i].values) for i in pending]), strict=True):
            x, r = factors[i], len(gram)
            if not torch.isfinite(gram).all():
                triangles[i] = torch.full_like(gram, math.nan)
                x.values = torch.full_like(x.values, math.nan)
                continue
            lengths = gram.diagonal().sqrt()
            lengths = torch.where(lengths > 0, lengths, 1)
            gram = gram / torch.outer(lengths, lengths)
            L, info = torch.linalg.cholesky_ex(gram)
            kappa = (
                math.inf if info else float(L.norm() * torch.linalg.solve_triangular(L, _eye(L), upper=False).norm())
            )
            if not kappa < 1e7:
                L = torch.linalg.cholesky_ex(gram + 11 * eps * r * (r + 1) * _eye(gram))[0]
                if i not in noisy:
                    noisy[i] = gram.diagonal() == 0
                    x.values = x.values + 1e-14 * lengths * normal(row_indices(x.param), r)
            x.values = torch.linalg.solve_triangular(L.mT, x.values / lengths, upper=True, left=False)
            triangles[i] = L.mT @ (lengths.unsqueeze(1) * triangles[i])
            if not kappa * kappa * eps <= accuracy:
                again.append(i)
        pending = again
        if not pending:
            break
    for i, empty in noisy.items():
        triangles[i][:, empty] = 0
    return triangles


def draw_orthonormal(p: Tensor) -> None:
    """Make a distributed parameter [m, r] orthonormal, at random: the Q of normal numbers, without gathering it."""
    local(p).copy_(normal(row_indices(p), p.shape[1], _shared_seed(p)))
    make_orthonormal(p)


def make_orthonormal(p: Tensor) -> None:
    """Replace a distributed parameter [m, r] by its Q."""
    team = Team.of("the parameter", [p])
    x = Rows.of(team, p)
    qr(team, [x], 1e-13)
    local(p).copy_(x.values)


def draw_uniform(p: Tensor, bound: float) -> None:
    """Draw the entries of a distributed parameter [m] between -bound and bound."""
    local(p).copy_((2 * _uniform(row_indices(p), _shared_seed(p)) - 1) * bound)


def _shared_seed(p: Tensor) -> int:
    """Return a number of torch's generator in the first process of the parameter's mesh."""
    mesh = p.device_mesh
    everyone = Team(tuple(Group.of(mesh.get_group(dim)) for dim in range(mesh.ndim) if mesh.size(dim) > 1))
    seed = torch.randint(2**31, (1,), device="cpu")
    first = all(group.is_first for group in everyone.groups)
    (shared,) = everyone.sum([(seed * first).to(local(p).device)])
    return int(shared)


def _eye(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)


def normal(rows: Tensor, columns: int, seed: int = 0) -> Tensor:
    """Return standard normal numbers [len(rows), columns], float64, that depend on the row's index and not on the rest.

    Source: G. Steele, D. Lea and C. Flood, Fast splittable pseudorandom number generators, OOPSLA 2014 (SplitMix64);
        Box and Muller 1958.
    """
    counters = 2 * (rows.unsqueeze(1) * columns + torch.arange(columns, device=rows.device))
    one, two = (_uniform(counters + k, seed) for k in (0, 1))
    return (-2 * (1 - one).log()).sqrt() * (2 * math.pi * two).cos()


def _uniform(counters: Tensor, seed: int) -> Tensor:
    x = (counters + 1 + (seed << 32)) * -0x61C8864680B583EB  # wraps around
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return ((x >> 11) & ((1 << 53) - 1)).double() / (1 << 53)
