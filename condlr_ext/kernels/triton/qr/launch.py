"""qr by Triton: what is launched, over which tables, in which memory.

Every matrix takes two passes of Cholesky-QR, then Householder QR where a pass failed (rank-deficient matrices, or
condition numbers above about 1e7 in float32, 1e4 in float64), then R = QᵀA. The device decides which matrix takes what,
so the host never waits for it.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from ..runtime.launching import capturing, launch, on, rows_per_split, table, tiles
from . import cholesky_qr
from .cholesky_qr import FactorJob, ProductJob, UpperJob

# largest ‖QᵀQ - I‖ after the first pass, whose rounding errors are about eps64 kappa²
_FAR = {torch.float32: 0.1, torch.float64: 1e-8}


def qr(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return Q [*, m, k], R [*, k, n], info int32 [*] of A [*, m, n], k = min(m, n), float32 or float64."""
    *batch, m, n = A.shape
    k = min(m, n)
    Q, R = A.new_empty(*batch, m, k), A.new_empty(*batch, k, n)
    info = torch.empty(batch, dtype=torch.int32, device=A.device)
    if A.numel() == 0:
        return Q, R, info.zero_()
    _plan(info.numel(), m, n, A.device).run(A.contiguous(), Q, R, info)
    return Q, R, info


@dataclass
class _Plan:
    """Tables for a batch of matrices of one shape, and the memory that their factorization needs, in elements."""

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
    size_of_grams: int
    size_of_L: int
    size_of_parts: int

    def run(self, A: Tensor, Q: Tensor, R: Tensor, info: Tensor) -> None:
        if capturing(A.device):
            _captured[id(self)] = self
        wide = functools.partial(torch.empty, dtype=torch.float64, device=A.device)
        gram, L, parts = wide(self.size_of_grams), wide(self.size_of_L), wide(self.size_of_parts)
        reflectors = torch.empty_like(A)
        options = cholesky_qr.product_options(self.tile)
        with on(A.device):
            for first in (True, False):
                X = A if first else Q
                launch(
                    cholesky_qr.products,
                    (len(self.gram_work),),
                    self.pointer_table,
                    self.grams[not first],
                    self.gram_work,
                    gram,
                    X,
                    X,
                    gram,
                    **options,
                )
                launch(
                    cholesky_qr.cholesky,
                    (self.count,),
                    self.factors,
                    gram,
                    L,
                    info,
                    _FAR[A.dtype],
                    FIRST=first,
                    **cholesky_qr.factor_options(),
                )
                launch(
                    cholesky_qr.solve, (len(self.row_work),),
                    self.pointer_table, self.factors, self.row_work, X, Q, L, info,
                    IN_PLACE=not first, **cholesky_qr.solve_options(),
                )  # fmt: skip
            launch(
                cholesky_qr.rescue,
                (self.count,),
                self.pointer_table,
                self.factors,
                A,
                Q,
                reflectors,
                L,
                info,
                **cholesky_qr.rescue_options(),
            )
            launch(
                cholesky_qr.products,
                (len(self.overlap_work),),
                self.pointer_table,
                self.overlaps,
                self.overlap_work,
                parts,
                Q,
                A,
                parts,
                **options,
            )
            launch(
                cholesky_qr.upper_factor,
                (len(self.upper_work),),
                self.uppers,
                self.upper_work,
                parts,
                info,
                R,
                **cholesky_qr.upper_options(),
            )


_captured: dict[int, _Plan] = {}  # graphs use their tables


@functools.lru_cache(maxsize=256)
def _plan(count: int, m: int, n: int, device: torch.device) -> _Plan:
    """Return the plan for a contiguous batch of `count` matrices [m, n]."""
    k = min(m, n)
    tile = cholesky_qr.width(k)
    block = cholesky_qr.product_options(tile)["BLOCK"]
    corner = cholesky_qr.upper_options()["TILE"]
    lower = [(i, j) for i in tiles(k, tile) for j in range(i + 1)]
    upper = [(i, j) for i in tiles(k, tile) for j in tiles(n, tile) if i <= j]
    per_split = rows_per_split([(m, len(lower))] * count, block, device)
    per_part = rows_per_split([(m, len(upper))] * count, block, device)
    splits, parts = len(tiles(m, per_split)), len(tiles(m, per_part))

    grams, overlaps, factors, uppers = ([], []), [], [], []
    for i in range(count):
        a, q, gram, part = i, count + i, i * splits * k * k, i * parts * k * n
        for jobs, x, row in ((grams[0], a, n), (grams[1], q, k)):
            jobs.append(ProductJob(x, row, 1, x, row, 1, x, rows=m, p=k, q=k, per_split=per_split, out=gram))
        overlaps.append(ProductJob(q, k, 1, a, n, 1, a, rows=m, p=k, q=n, per_split=per_part, out=part))
        factors.append(FactorJob(a, n, q, k, m, k, gram=gram, splits=splits, L=i * k * k, reflectors=i * m * n))
        uppers.append(UpperJob(k, n, splits=parts, parts=part, out=i * k * n))
    matrices = range(count)
    int32 = functools.partial(table, dtype=torch.int32, device=device)
    int64 = functools.partial(table, dtype=torch.int64, device=device)
    return _Plan(
        count=count,
        tile=tile,
        pointer_table=int64([[i * m * n for i in matrices] + [i * m * k for i in matrices]])[0],
        grams=(int64(grams[0]), int64(grams[1])),
        gram_work=int32((i, *at, s) for i in matrices for at in lower for s in range(splits)),
        overlaps=int64(overlaps),
        overlap_work=int32((i, *at, s) for i in matrices for at in upper for s in range(parts)),
        factors=int64(factors),
        row_work=int32((i, row) for i in matrices for row in tiles(m, cholesky_qr.solve_options()["ROWS"])),
        uppers=int64(uppers),
        upper_work=int32((i, row, col) for i in matrices for row in tiles(k, corner) for col in tiles(n, corner)),
        size_of_grams=count * splits * k * k,
        size_of_L=count * k * k,
        size_of_parts=count * parts * k * n,
    )
