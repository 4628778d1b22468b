"""The step of layers whose rows are divided among processes; it sends sums of r x r matrices, and never a factor.

For a factor X [m, r] and its direction d, all that depends on all rows is K = [X d]ᵀ [X d]: with A = XᵀX, O = Xᵀd and
M = dᵀd the trial point is Y = X (I + O F) - d F, F = lr (S Sᵀ)⁻¹, and YᵀY follows from A, O and M. So one sum of the
lower halves of K, 2 r² + r numbers per factor, with the rows of S and flags for all decisions, in float64, serves the
whole network. In steps so long that YᵀY would lose digits it is summed too. Every process takes its decisions from
these sums, so that all take the same.
"""

import functools

import torch
from torch import Tensor

from .. import ops, reference
from .._shards import Rows, Team, qr, row_indices
from ..reference import BANDS, HYPER, NOT_ORTHONORMAL, ORTHONORMAL_INPUT, ROLES
from . import basis

_U, _S, _V, _BIAS = range(len(ROLES))
# The longest step, ‖F‖ ‖d‖, for which YᵀY from A, O and M is accurate enough: its error is that times itself in
# roundings of float64. And the accuracy of longer ones, in the same unit, to which they are orthonormalized.
_LONGEST = {torch.float32: 1e3, torch.float64: 2.0}
ACCURACY = {torch.float32: 1e-9, torch.float64: 1e-13}


class _Layer:
    """A layer in one step: tensors by role, with the rows that this process holds.

    Attributes:
        options: The options of each role.
        params: U, S, V and bias.
        directions: Of the roles with a gradient.
        buffers: New momentum buffers.
        values: New values of the parameters, of S the whole core; those of roles that do not change are missing.
        transforms: [2 r, r] of U and V whose new rows are [X d] times it.
        core: The whole S.
        core_direction: Its whole direction.
        moves: Whether the direction of U, and of V, is not zero somewhere.
        count: What to count if the layer must be left unchanged.
    """

    def __init__(
        self, index: int, options: list[dict], params: list[Tensor], grads: list[Tensor], buffers, has_gradient
    ):
        self.index, self.options, self.params = index, options, params
        self.directions: dict[int, Tensor] = {}
        self.buffers: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.transforms: dict[int, Tensor] = {}
        self.core, self.core_direction, self.moves, self.count = params[_S], None, {}, 0
        for role, own in enumerate(options):
            if not has_gradient[role]:
                continue
            decay = 0.0 if role in (_U, _V) else own["weight_decay"]
            d, buffer = reference.sgd_direction(params[role], grads[role], buffers[role], own, decay)
            self.directions[role] = d
            if buffer is not None:
                self.buffers[role] = buffer
            if role == _BIAS:
                self.values[role] = params[role] - own["lr"] * d
        self.core_direction = self.directions.get(_S)
        self._bad_gradient = _not_finite(grads)
        self._bad_result = _not_finite([*params[:_BIAS], *self.buffers.values(), *self.values.values()])

    @property
    def constraint(self) -> tuple[float, str, float]:
        own = self.options[_S]
        return own["tau"], BANDS[int(own["band"])], own["sigma_max"]

    def lr(self, role: int) -> float:
        return self.options[role]["lr"]

    def flags(self) -> Tensor:
        """Return what decisions need of every process: bad gradients, bad values, whether U moves, whether V does."""
        no = self._bad_gradient.new_zeros(())
        moves = [self.directions[role].any() if role in self.directions else no for role in (_U, _V)]
        return torch.stack([self._bad_gradient, self._bad_result, *moves]).double()

    def rows(self, role: int) -> Tensor:
        """Return [X d], float64."""
        return torch.cat((self.params[role], self.directions[role]), 1).double()


class DividedStep:
    """The step op for layers that are divided among a team of processes.

    Args:
        team: The processes.
        params: As the step op takes them, but the parameters themselves, None for a missing bias.
        has_gradient: Which of them have one.
    """

    def __init__(self, team: Team, params: list[Tensor | None], has_gradient: list[bool]):
        self.team, self.params, self.has_gradient = team, params, has_gradient
        self._counts = [p is not None and team.counts(p) for p in params]
        cores = params[_S :: len(ROLES)]
        self._core_rows = [row_indices(S) if Team.of("S", [S]) else None for S in cores]  # of divided cores

    def __call__(self, params, grads, buffers, hyper: Tensor, skipped: Tensor) -> list[int]:
        """Step as reference.step does, in place; the tensors are the rows that this process holds.

        Returns:
            The layers with a gradient that is not finite in some process.
        """
        layers = []
        for index, rows in enumerate(hyper.tolist()):
            at = slice(len(ROLES) * index, len(ROLES) * (index + 1))
            options = [dict(zip(HYPER, row, strict=True)) for row in rows]
            layers.append(_Layer(index, options, params[at], grads[at], buffers[at], self.has_gradient[at]))
        bad_gradients = self._share(layers)
        self._step_cores([layer for layer in layers if _S in layer.directions and not layer.count])
        self._orthonormalize([layer for layer in layers if not layer.count])
        for layer in layers:
            if not layer.count:
                self._write(layer, buffers[len(ROLES) * layer.index :])
        skipped += torch.tensor([layer.count for layer in layers], dtype=skipped.dtype, device=skipped.device)
        return bad_gradients

    def _share(self, layers: list[_Layer]) -> list[int]:
        """Sum over the team; decide and find the transforms of factors. Return the layers with bad gradients."""
        factors = [(layer, role) for layer in layers for role in (_U, _V) if role in layer.directions]
        cores = [layer for layer in layers if self._core_rows[layer.index] is not None]
        sums = self.team.sum(
            [
                *(layer.flags() for layer in layers),
                *(self._products(layer, role) for layer, role in factors),
                *(self._core_part(layer.index, layer.core) for layer in cores),
                *(self._core_part(layer.index, layer.directions[_S]) for layer in cores if _S in layer.directions),
            ]
        )
        flags = torch.stack(sums[: len(layers)]).gt(0).tolist()
        rest = iter(sums[len(layers) :])
        products = [next(rest) for _ in factors]
        for layer in cores:
            layer.core = next(rest).to(layer.core.dtype)
        for layer in cores:
            if _S in layer.directions:
                layer.core_direction = next(rest).to(layer.core.dtype)
        for layer, (bad_gradient, bad_value, U_moves, V_moves) in zip(layers, flags, strict=True):
            layer.count = int(bad_gradient or bad_value)
            layer.moves = {_U: U_moves, _V: V_moves}
        batches: dict[tuple, list] = {}
        for (layer, role), K in zip(factors, products, strict=True):
            if not layer.count:
                core, own = layer.core if role == _U else layer.core.mT, layer.options[role]
                key = len(core), core.dtype, bool(own["precondition"]), layer.constraint
                batches.setdefault(key, []).append((layer, role, K, core))
        for key, batch in batches.items():
            self._find_transforms(*key, batch)
        return [layer.index for layer, (bad_gradient, *_) in zip(layers, flags, strict=True) if bad_gradient]

    def _products(self, layer: _Layer, role: int) -> Tensor:
        """Return the lower half of K of the rows here."""
        row, column = self._half(layer.params[role])
        if not self._counts[len(ROLES) * layer.index + role]:
            return torch.zeros(len(row), dtype=torch.float64, device=row.device)
        Z = layer.rows(role)
        return (Z.mT @ Z)[row, column]

    @staticmethod
    def _half(X: Tensor) -> Tensor:
        return torch.tril_indices(2 * X.shape[1], 2 * X.shape[1], device=X.device)

    def _find_transforms(self, r: int, dtype, precondition: bool, constraint: tuple, batch: list[tuple]) -> None:
        """Find the transforms of factors (layer, role, K, S or Sᵀ) of equal rank and constraint.

        Where a step is too long, the value becomes the trial point, as nearly orthonormal as the transform makes it.
        """
        row, column = self._half(batch[0][0].params[_S])
        K = torch.zeros(len(batch), 2 * r, 2 * r, dtype=torch.float64, device=row.device)
        K[:, row, column] = K[:, column, row] = torch.stack([half for _, _, half, _ in batch])
        A, XtD, M = K[:, :r, :r], K[:, :r, r:], K[:, r:, r:]
        eye = torch.eye(r, dtype=torch.float64, device=K.device)
        inverse, exists = eye.to(dtype), torch.ones(len(batch), dtype=torch.bool, device=K.device)
        if precondition:
            inverse, exists = reference.gram_inverse(torch.stack([core for *_, core in batch]), *constraint)
        lr = torch.tensor([layer.lr(role) for layer, role, *_ in batch], dtype=torch.float64, device=K.device)
        F = lr.view(-1, 1, 1) * inverse.double()
        N = XtD @ F
        drift = A - eye
        drift_N = drift @ N
        # YᵀY without the terms that cancel
        gram = A + drift_N + drift_N.mT + N.mT @ drift_N + F.mT @ (M - XtD.mT @ XtD) @ F
        L, info = torch.linalg.cholesky_ex(gram)
        back = torch.linalg.solve_triangular(
            torch.where((info == 0).view(-1, 1, 1), L, eye).mT, eye.expand_as(L), upper=True
        )
        transform = torch.cat(((eye + N) @ back, -F @ back), 1)
        length = torch.linalg.matrix_norm(F) * M.diagonal(dim1=1, dim2=2).sum(1).sqrt()
        found = zip(*(t.tolist() for t in (drift.abs().amax((1, 2)), exists, length, info)), strict=True)
        for i, ((layer, role, *_), (error, has_inverse, size, failed)) in enumerate(zip(batch, found, strict=True)):
            if not error <= ORTHONORMAL_INPUT:
                layer.count = NOT_ORTHONORMAL
            elif not (layer.moves[role] and layer.lr(role)) and error <= reference.orthonormal_enough(dtype):
                continue  # a step that moves nothing is the identity
            elif not has_inverse:
                layer.count = layer.count or 1
            elif failed or not size <= _LONGEST[dtype]:
                to_trial = torch.cat((eye + N[i], -F[i])) if failed else transform[i]
                layer.values[role] = layer.rows(role) @ to_trial
            else:
                layer.transforms[role] = transform[i]

    def _orthonormalize(self, layers: list[_Layer]) -> None:
        """Replace the trial points of long steps by their Q."""
        long = [(layer, role) for layer in layers for role in (_U, _V) if role in layer.values]
        at = [len(ROLES) * layer.index + role for layer, role in long]
        rows = [
            Rows(layer.values[role], self._counts[i], self.params[i]) for i, (layer, role) in zip(at, long, strict=True)
        ]
        accuracy = min((ACCURACY[layer.core.dtype] for layer, _ in long), default=0.0)
        for (layer, role), x, R in zip(long, rows, qr(self.team, rows, accuracy), strict=True):
            layer.values[role] = x.values
            if not torch.isfinite(R).all():
                layer.count = 1

    def _step_cores(self, layers: list[_Layer]) -> None:
        """Step the cores, in batches of equal shape and constraint."""
        batches: dict[tuple, list[_Layer]] = {}
        for layer in layers:
            batches.setdefault((layer.core.shape, layer.core.dtype, layer.constraint), []).append(layer)
        for (_, dtype, (tau, band, cap)), batch in batches.items():
            S, d = (torch.stack([getattr(x, name) for x in batch]) for name in ("core", "core_direction"))
            lr = torch.tensor([layer.lr(_S) for layer in batch], dtype=dtype, device=S.device).view(-1, 1, 1)
            clip = functools.partial(_clip, tau=tau, band=band, cap=cap)
            new, fits = reference.core_step(S, d, lr, tau, band, cap, clip)
            for layer, layer.values[_S], fit in zip(batch, new, fits.tolist(), strict=True):
                layer.count = int(not fit)

    def _write(self, layer: _Layer, buffers: list[Tensor]) -> None:
        for role, transform in layer.transforms.items():
            layer.params[role].copy_(layer.rows(role) @ transform)
        for role, value in layer.values.items():
            layer.params[role].copy_(self._rows_of_core(layer.index, value) if role == _S else value)
        for role, value in layer.buffers.items():
            buffers[role].copy_(value)

    # ---------------------------------------------------------------------------------------------- cores

    def _core_part(self, index: int, rows: Tensor) -> Tensor | None:
        """Return what is sent of a matrix of the shape of S, None if it is here as a whole."""
        if self._core_rows[index] is None:
            return None
        part = rows.new_zeros(2 * rows.shape[1:], dtype=torch.float64)
        if self._counts[len(ROLES) * index + _S]:
            part[self._core_rows[index]] = rows.double()
        return part

    def _rows_of_core(self, index: int, whole: Tensor) -> Tensor:
        rows = self._core_rows[index]
        return whole if rows is None else whole[rows]

    # ------------------------------------------------------------------------------- of a step of one layer

    def absorb_triangles(self, U: Tensor, S: Tensor, V: Tensor) -> list[Tensor]:
        """As basis.absorb_triangles, with the rows here of U, S and V."""
        factors = [Rows.of(self.team, self.params[role], X) for role, X in ((_U, U), (_V, V))]
        R_U, R_V = qr(self.team, factors, ACCURACY[torch.float64])
        S.copy_(self._rows_of_core(0, R_U @ self._whole_core(S).double() @ R_V.mT))
        for X, factor in zip((U, V), factors, strict=True):
            X.copy_(factor.values)
        return [R_U, R_V]

    def in_new_basis(self, grads: list[Tensor], R_U: Tensor, R_V: Tensor) -> list[Tensor]:
        """As basis.in_new_basis, with the rows here."""
        dU, dS, dV, bias = grads
        if dS.dim() < 2:  # there is none
            return basis.in_new_basis(grads, R_U, R_V)
        new = basis.in_new_basis([dU, self._whole_core(dS), dV, bias], R_U, R_V)
        return [new[0], self._rows_of_core(0, new[1]), *new[2:]]

    def _whole_core(self, rows: Tensor) -> Tensor:
        part = self._core_part(0, rows)
        return rows if part is None else self.team.sum([part])[0].to(rows.dtype)


def _clip(cores: Tensor, tau: float, band: str, cap: float) -> Tensor:
    return ops.linalg.clip_spectrum(cores, tau, BANDS.index(band), cap)[0]


def _not_finite(tensors: list[Tensor]) -> Tensor:
    """Return whether some entry of some tensor is not finite."""
    return torch.stack([torch.isfinite(t).all() for t in tensors]).all().logical_not()
