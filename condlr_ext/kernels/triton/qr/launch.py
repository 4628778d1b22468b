"""qr and orthonormalize by Triton: what is launched, over which tables, in which memory.

Two passes of Cholesky-QR for every matrix, then Householder's for those a pass was of no use to (rank-deficient, or
of a condition number above about 1e7 in float32, 1e4 in float64), then R = QᵀA. Nothing waits for the device: which
matrix needs what is decided there.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..runtime.launching import (
    capturing,
    offsets,
    on,
    pointer_table_size,
    rows_per_split,
    table,
    tiles,
    write_pointer_table,
)
from . import cholesky_qr as kernels

# how far from I the Gram matrix of the first pass's Q may be, for which the rounding errors of that pass, about
# eps64 kappa², are to blame
_FAR = {torch.float32: 0.1, torch.float64: 1e-8}


def qr(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(Q [*, m, k], R [*, k, n], info int32 [*]) of A [*, m, n], k = min(m, n), float32 or float64; as reference.qr."""
    *batch, m, n = A.shape
    k = min(m, n)
    Q, R = A.new_empty(*batch, m, k), A.new_empty(*batch, k, n)
    info = torch.empty(batch, dtype=torch.int32, device=A.device)
    if A.numel() == 0:
        return Q, R, info.fill_(0)
    plan = _plan(((info.numel(), m, n),), A.device)
    plan.run(A.contiguous(), plan.pointer_table, Q, info, R)
    return Q, R, info


def orthonormalize_grouped(matrices: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """The Q of qr of each of these matrices [m, n], of any shapes but one dtype and device, and info int32.

    As many launches as for one matrix, and those that tell the device where the matrices lie.
    """
    device = matrices[0].device if matrices else None
    info = torch.zeros(len(matrices), dtype=torch.int32, device=device)
    if not any(A.numel() for A in matrices):
        return [A.new_empty(A.shape[0], min(A.shape)) for A in matrices], info
    matrices = [A.contiguous() for A in matrices]
    plan = _plan(tuple((1, *A.shape) for A in matrices), device)
    Q = torch.empty(plan.size_of_Q, dtype=matrices[0].dtype, device=device)
    pointer_table = plan.pointer_table.clone()
    write_pointer_table(pointer_table, offsets(matrices[0], matrices))
    plan.run(matrices[0], pointer_table, Q, info)
    shapes = [(A.shape[0], min(A.shape)) for A in matrices]
    parts = Q.split([_aligned(m * k) for m, k in shapes])
    return [part[: m * k].view(m, k) for part, (m, k) in zip(parts, shapes, strict=True)], info


def _aligned(size: int) -> int:
    """Where the next matrix in shared memory starts, so that whole vectors can be loaded."""
    return -(-size // 32) * 32


@dataclass
class _Plan:
    """Tables for matrices of given shapes, and how much memory their factorization needs (in elements)."""

    count: int
    tile: int
    pointer_table: Tensor  # of the matrices, then of their Q
    grams: tuple[Tensor, Tensor]  # jobs of AᵀA, of QᵀQ
    gram_work: Tensor
    overlaps: Tensor  # jobs of QᵀA
    overlap_work: Tensor
    factors: Tensor
    row_work: Tensor
    uppers: Tensor
    upper_work: Tensor
    size_of_Q: int
    size_of_grams: int
    size_of_L: int
    size_of_parts: int
    size_of_A: int

    def run(self, A: Tensor, pointer_table: Tensor, Q: Tensor, info: Tensor, R: Tensor | None = None) -> None:
        if capturing(A.device):
            _captured[id(self)] = self
        wide = functools.partial(torch.empty, dtype=torch.float64, device=A.device)
        gram, L, reflectors = wide(self.size_of_grams), wide(self.size_of_L), A.new_empty(self.size_of_A)
        with on(A.device):
            for first in (True, False):
                X = A if first else Q
                kernels.products[(len(self.gram_work),)](
                    pointer_table,
                    self.grams[not first],
                    self.gram_work,
                    gram,
                    X,
                    X,
                    gram,
                    **kernels.product_options(self.tile),
                )
                kernels.cholesky[(self.count,)](
                    self.factors, gram, L, info, _FAR[A.dtype], FIRST=first, **kernels.factor_options()
                )
                kernels.solve[(len(self.row_work),)](
                    pointer_table,
                    self.factors,
                    self.row_work,
                    X,
                    Q,
                    L,
                    info,
                    IN_PLACE=not first,
                    **kernels.solve_options(),
                )
            kernels.rescue[(self.count,)](
                pointer_table, self.factors, A, Q, reflectors, L, info, **kernels.rescue_options()
            )
            if R is not None:
                parts = wide(self.size_of_parts)
                kernels.products[(len(self.overlap_work),)](
                    pointer_table,
                    self.overlaps,
                    self.overlap_work,
                    parts,
                    Q,
                    A,
                    parts,
                    **kernels.product_options(self.tile),
                )
                kernels.upper_factor[(len(self.upper_work),)](
                    self.uppers, self.upper_work, parts, info, R, **kernels.upper_options()
                )


_captured: dict[int, _Plan] = {}  # graphs use their tables


@functools.lru_cache(maxsize=256)
def _plan(shapes: tuple[tuple[int, int, int], ...], device: torch.device) -> _Plan:
    """For (count, m, n) of each kind of matrix, which lie one after the other; Q and R alike."""
    matrices = [(m, n, min(m, n)) for count, m, n in shapes for _ in range(count)]
    align = int if len(shapes) == 1 else _aligned
    count, largest = len(matrices), max(k for *_, k in matrices)
    tile = kernels.width(largest)
    block = kernels.product_options(tile)["BLOCK"]
    corner = kernels.upper_options()["TILE"]
    rows = kernels.solve_options()["ROWS"]

    lower = [[(i, j) for i in tiles(k, tile) for j in range(i + 1)] for *_, k in matrices]
    upper = [[(i, j) for i in tiles(k, tile) for j in tiles(n, tile) if i <= j] for _, n, k in matrices]
    per_split = rows_per_split([(m, len(t)) for (m, *_), t in zip(matrices, lower, strict=True)], block, device)
    per_part = rows_per_split([(m, len(t)) for (m, *_), t in zip(matrices, upper, strict=True)], block, device)

    room = pointer_table_size(count)  # what tells the device where the matrices lie writes as much
    pointer_table = [0] * (room + count)
    grams, overlaps, factors, uppers = ([], []), [], [], []
    gram_work, overlap_work, row_work, upper_work = [], [], [], []
    at_A = at_Q = at_R = at_gram = at_L = at_parts = 0
    for index, (m, n, k) in enumerate(matrices):
        splits, parts = len(tiles(m, per_split)), len(tiles(m, per_part))
        q = room + index
        pointer_table[index], pointer_table[q] = at_A, at_Q
        grams[0].append((index, n, 1, index, n, 1, index, m, k, k, per_split, at_gram, -1))
        grams[1].append((q, k, 1, q, k, 1, q, m, k, k, per_split, at_gram, -1))
        overlaps.append((q, k, 1, index, n, 1, index, m, k, n, per_part, at_parts, -1))
        factors.append((index, n, q, k, m, k, at_gram, splits, at_L, at_A))
        uppers.append((k, n, parts, at_parts, at_R))
        gram_work += [(index, i, j, s) for i, j in lower[index] for s in range(splits)]
        overlap_work += [(index, i, j, s) for i, j in upper[index] for s in range(parts)]
        row_work += [(index, i) for i in tiles(m, rows)]
        upper_work += [(index, i, j) for i in tiles(k, corner) for j in tiles(n, corner)]
        at_A += m * n
        at_Q += align(m * k)
        at_R += k * n
        at_gram += splits * k * k
        at_L += k * k
        at_parts += parts * k * n
    int32 = functools.partial(table, dtype=torch.int32, device=device)
    int64 = functools.partial(table, dtype=torch.int64, device=device)
    return _Plan(
        count, tile, int64([pointer_table])[0], (int64(grams[0]), int64(grams[1])), int32(gram_work), int64(overlaps),
        int32(overlap_work), int64(factors), int32(row_work), int64(uppers), int32(upper_work),
        at_Q, at_gram, at_L, at_parts, at_A,
    )  # fmt: skip
