"""clip_spectrum of the cores of a whole network, in place: all in one launch, or two for float32.

The first is in float32 and serves the cores that are near their band, as all are after a step; the second, in float64,
serves the others, which the first has noted. Up to rank 64 one program takes a core, beyond a team of programs does: in
float32 by matrix products (newton_schulz.py), in float64 by blocks of columns (jacobi.py).
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import architecture
from ..qr.cholesky_qr import ALL_ZERO, NOT_CONVERGED, NOT_FINITE, OK, load_wide
from ..runtime import cooperative
from ..runtime.cooperative import barrier, copy, product, reset, timed_out
from ..runtime.launching import offsets, on, table, variant
from ..spectral import band, jacobi, newton_schulz

LARGEST_SINGLE = tl.constexpr(jacobi.PAIR)  # columns that one program turns
# start from the first core, n, layer; the power of two from n on, beyond LARGEST_SINGLE that of the blocks; room
CORE = ("at", "n", "layer", "rounds", "room", "wide_room")
_COLUMNS = tl.constexpr(len(CORE))


class CoreClip:
    """Clips the cores it was made for as the row of S in hyper says; info as clip_spectrum's.

    Args:
        cores: of each of these layers [r, r], contiguous, of one dtype; those that will be clipped.
        layers: which row of hyper and which entry of info is theirs.
    """

    def __init__(self, cores: Sequence[Tensor], layers: Sequence[int]):
        self._base = cores[0] if cores else None
        if not cores:
            return
        base, device = self._base, self._base.device
        single = base.dtype == torch.float32
        ranks = [len(S) for S in cores]
        small = [r for r in ranks if r <= LARGEST_SINGLE.value]
        large = [r for r in ranks if r > LARGEST_SINGLE.value]
        self._width = triton.next_power_of_2(max([16, *small]))
        self._large = triton.next_power_of_2(max(large, default=0))
        jobs = [newton_schulz.jobs(r, r) for r in large]
        teams_of = dict(zip(large, cooperative.group_sizes(device, jobs), strict=True)) if large else {}
        rows, sizes, wide_sizes, programs = [], 0, 0, []
        for i, (start, r, layer) in enumerate(zip(offsets(base, cores), ranks, layers, strict=True)):
            if r <= LARGEST_SINGLE.value:
                rounds, members = triton.next_power_of_2(r), 1
                size = wide_size = 4 * self._width**2
            else:
                rounds = triton.next_power_of_2(triton.cdiv(2 * r, jacobi.PAIR))
                members = teams_of[r]
                size = newton_schulz.workspace_size(r, r)
                wide_size = 2 * r * r + self._large + jacobi.workspace_size(r, r, members)
            rows.append((start, r, layer, rounds, sizes, wide_sizes))
            sizes, wide_sizes = sizes + size * single, wide_sizes + wide_size
            programs += [(-r, i, member, members) for member in range(members)]
        self._cores = table(rows, torch.int64, device)
        # teams first: all of them run when others still wait for room
        self._work = table([row[1:] for row in sorted(programs)], torch.int32, device)
        self._room = torch.empty(sizes, dtype=base.dtype, device=device)
        self._wide = torch.empty(wide_sizes, dtype=torch.float64, device=device)
        self._active = torch.zeros(len(cores), jacobi.SWEEPS_OF_BLOCKS, dtype=torch.int32, device=device)
        self._wanted = torch.zeros(len(cores), dtype=torch.int32, device=device)
        self._counters = cooperative.counters(len(cores), device)
        self._together = cooperative.grid_options(len(programs), len(cores), device)

    def __call__(self, hyper: Tensor, info: Tensor) -> None:
        if self._base is None:
            return
        base = self._base
        with on(base.device):
            for some in (False, True) if base.dtype == torch.float32 else (False,):
                dtype = torch.float64 if some else base.dtype
                options = config(architecture(base.device), dtype, self._width, self._large) | self._together
                clip[(len(self._work),)](
                    self._cores, self._work, hyper, base, self._room, self._wide, self._active, self._wanted,
                    self._counters, info, SOME=some, **options,
                )  # fmt: skip


@triton.jit
def _clip(
    core, hyper_ptr, base_ptr, U_ptr, wanted_ptr, info_ptr,
    SOME: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, SWEEPS: tl.constexpr,
):  # fmt: skip
    """`clip` of one core up to LARGEST_SINGLE, whose row of cores is at `core` and whose room starts at U."""
    dtype = base_ptr.dtype.element_ty
    own = U_ptr.dtype.element_ty
    V_ptr = U_ptr + R * R
    J_ptr = V_ptr + R * R
    sigma_ptr = J_ptr + R * R
    n, rounds = tl.load(core + 1).to(tl.int32), tl.load(core + 3).to(tl.int32)
    scale = jacobi.start(base_ptr + tl.load(core), n, 1, U_ptr, n, V_ptr, n, R, BLOCK)
    active = n > 1
    sweeps = 0
    while active & (sweeps < SWEEPS):
        active = jacobi.rotate_columns(U_ptr, n, V_ptr, n, 0, 0, J_ptr, rounds, 1, R, BLOCK)
        sweeps += 1
    jacobi.finish(U_ptr, n, V_ptr, n, sigma_ptr, scale, R, BLOCK)
    jacobi.polish(U_ptr, n, n, J_ptr, R, BLOCK)
    jacobi.polish(V_ptr, n, n, J_ptr, R, BLOCK)
    tl.debug_barrier()

    S_ptr, layer = base_ptr + tl.load(core), tl.load(core + 2)
    i = tl.arange(0, R)
    real = i < n
    largest = tl.load(sigma_ptr).to(tl.float64)
    usable = (scale == scale) & (largest > 0)
    outcome = tl.where(active, NOT_CONVERGED, tl.where(largest == 0, ALL_ZERO, OK))
    outcome = tl.where(scale == scale, outcome, NOT_FINITE)
    largest = tl.where(usable, largest, 1.0)
    x = tl.where(usable, load_wide(sigma_ptr + i, real), 1.0) / largest
    wild = 0
    if not SOME:
        # rounding errors of a large singular value are large to a small one
        wild = tl.where((own == tl.float32) & (3 * tl.min(tl.where(real, x, 1.0), 0) < 1), 1, 0)
        tl.store(wanted_ptr, wild)
    if wild == 0:
        tl.store(info_ptr + layer, outcome)
    if (wild == 0) & (outcome == OK):
        constraint = hyper_ptr + (layer * 4 + 1) * 10
        tau, kind, cap = tl.load(constraint + 7), tl.load(constraint + 8), tl.load(constraint + 9) / largest
        # sigma is known to a few rounding errors of the largest one
        SLACK: tl.constexpr = 8 * 2.0**-52 if own == tl.float64 else 4 * 2.0**-23
        OUT: tl.constexpr = 2.0**-52 if dtype == tl.float64 else 2.0**-23
        shift, in_band, _, _ = band.band_shifts(sigma_ptr, x, real, n, tau, kind, cap, OUT, SLACK, R, BLOCK)
        if not in_band:
            shift *= largest
            tl.debug_barrier()
            tl.store(sigma_ptr + i, shift.to(own), mask=real)
            tl.debug_barrier()
            row, k = tl.arange(0, BLOCK), tl.arange(0, 16)
            for begin in range(0, n, BLOCK):
                rows = begin + row
                at = rows[:, None] * n + i[None, :]
                inside = rows[:, None] < n
                new = load_wide(S_ptr + at, inside & real[None, :])
                for start in range(0, n, 16):
                    inner = start + k
                    u = load_wide(U_ptr + rows[:, None] * n + inner[None, :], inside & (inner[None, :] < n))
                    u *= load_wide(sigma_ptr + inner, inner < n)[None, :]
                    v = load_wide(V_ptr + i[None, :] * n + inner[:, None], real[None, :] & (inner[:, None] < n))
                    new = tl.dot(u, v, new, input_precision="ieee", out_dtype=tl.float64)
                tl.store(S_ptr + at, new.to(dtype), mask=inside & real[None, :])


@triton.jit
def _clip_by_products(
    core, hyper_ptr, base_ptr, room_ptr, wide_ptr, wanted_ptr, info_ptr, member, members, counter_ptr,
    POLAR: tl.constexpr, SIGN: tl.constexpr, TILE: tl.constexpr, WIDE_TILE: tl.constexpr, DEPTH: tl.constexpr,
    FLAT: tl.constexpr,
):  # fmt: skip
    S_ptr, n, layer = base_ptr + tl.load(core), tl.load(core + 1).to(tl.int32), tl.load(core + 2)
    constraint = hyper_ptr + (layer * 4 + 1) * 10
    tau, kind, sigma_max = tl.load(constraint + 7), tl.load(constraint + 8), tl.load(constraint + 9)
    good = newton_schulz.clip_by_group(
        S_ptr, n, 1, n, n, tau, kind, sigma_max, room_ptr, wide_ptr, S_ptr, n, 1, POLAR, SIGN, member, members,
        counter_ptr, TILE, WIDE_TILE, DEPTH, FLAT,
    )  # fmt: skip
    if member == 0:
        is_lost = timed_out(counter_ptr)  # then S may be anything
        tl.store(wanted_ptr, tl.where(good | is_lost, 0, 1))
        if good | is_lost:
            tl.store(info_ptr + layer, tl.where(is_lost, NOT_CONVERGED, OK))


@triton.jit
def _clip_by_blocks(
    core, hyper_ptr, base_ptr, U_ptr, active_ptr, info_ptr, member, members, counter_ptr,
    PAIR: tl.constexpr, LARGE: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, SWEEPS_OF_BLOCKS: tl.constexpr,
):  # fmt: skip
    dtype = base_ptr.dtype.element_ty
    S_ptr, n, layer = base_ptr + tl.load(core), tl.load(core + 1).to(tl.int32), tl.load(core + 2)
    blocks = tl.load(core + 3).to(tl.int32)
    V_ptr = U_ptr + n * n
    sigma_ptr = V_ptr + n * n
    T_ptr = sigma_ptr + LARGE
    other_ptr = T_ptr + n * n
    info_ptr += layer
    jacobi.svd_by_group(
        S_ptr, n, 1, U_ptr, n, sigma_ptr, V_ptr, n, T_ptr, active_ptr, info_ptr, blocks, member, members, counter_ptr,
        PAIR, LARGE, BLOCK, TILE, SWEEPS_OF_BLOCKS,
    )  # fmt: skip
    outcome = tl.load(info_ptr)
    largest = tl.load(sigma_ptr)
    if (outcome == OK) & (largest > 0):
        i = tl.arange(0, LARGE)
        real = i < n
        x = load_wide(sigma_ptr + i, real) / largest
        constraint = hyper_ptr + (layer * 4 + 1) * 10
        tau, kind, cap = tl.load(constraint + 7), tl.load(constraint + 8), tl.load(constraint + 9) / largest
        OUT: tl.constexpr = 2.0**-52 if dtype == tl.float64 else 2.0**-23
        shift, in_band, _, _ = band.band_shifts(sigma_ptr, x, real, n, tau, kind, cap, OUT, 8 * 2.0**-52, LARGE, BLOCK)
        barrier(counter_ptr, members)  # all have read sigma
        if not in_band:
            if member == 0:
                tl.store(sigma_ptr + i, shift * largest, mask=real)
            copy(V_ptr, 1, n, T_ptr, n, 1, n, n, 1.0, member, members, counter_ptr, TILE * BLOCK)
            for row in range(member, n, members):
                moved = load_wide(U_ptr + row * n + i, real) * load_wide(sigma_ptr + i, real)
                tl.store(other_ptr + row * n + i, moved, mask=real)
            barrier(counter_ptr, members)
            product(
                other_ptr, T_ptr, S_ptr, S_ptr, n, n, n, 1, 1.0, 1.0, 0.0, member, members, counter_ptr,
                False, tl.float64, TILE, 16,
            )  # fmt: skip
    elif (outcome == OK) & (member == 0):
        tl.store(info_ptr, ALL_ZERO)


@triton.jit
def clip(
    cores_ptr, work_ptr, hyper_ptr, base_ptr, room_ptr, wide_ptr, active_ptr, wanted_ptr, counter_ptr, info_ptr,
    SOME: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, SWEEPS: tl.constexpr, LARGE: tl.constexpr,
    PAIR: tl.constexpr, SWEEPS_OF_BLOCKS: tl.constexpr, POLAR: tl.constexpr, SIGN: tl.constexpr, TILE: tl.constexpr,
    WIDE_TILE: tl.constexpr, DEPTH: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """S + U diag(shift) Vᵀ for every core S [n, n], n <= R, or n <= LARGE where there are such.

    work: core, member and members of a team; one program for each row. SOME: only the cores that are wanted, in
    float64. Else what float32 is not enough for comes to be so, and is left as it is.
    """
    work = work_ptr + tl.program_id(0).to(tl.int64) * 3
    index, member, members = tl.load(work).to(tl.int64), tl.load(work + 1), tl.load(work + 2)
    core = cores_ptr + index * _COLUMNS
    wanted_ptr += index
    counter_ptr += 2 * index
    wanted = True
    if SOME:
        wanted = tl.load(wanted_ptr) != 0
    if wanted:
        single: tl.constexpr = (base_ptr.dtype.element_ty == tl.float32) and not SOME
        room_ptr += tl.load(core + 4)
        wide_ptr += tl.load(core + 5)
        own_ptr = room_ptr if single else wide_ptr
        if LARGE == 0:
            _clip(core, hyper_ptr, base_ptr, own_ptr, wanted_ptr, info_ptr, SOME, R, BLOCK, SWEEPS)
        elif tl.load(core + 1) <= LARGEST_SINGLE:
            _clip(core, hyper_ptr, base_ptr, own_ptr, wanted_ptr, info_ptr, SOME, R, BLOCK, SWEEPS)
        elif single:
            _clip_by_products(
                core, hyper_ptr, base_ptr, room_ptr, wide_ptr, wanted_ptr, info_ptr, member, members,
                counter_ptr, POLAR, SIGN, TILE, WIDE_TILE, DEPTH, FLAT,
            )  # fmt: skip
        else:
            _clip_by_blocks(
                core, hyper_ptr, base_ptr, wide_ptr, active_ptr + index * SWEEPS_OF_BLOCKS, info_ptr, member, members,
                counter_ptr, PAIR, LARGE, BLOCK, WIDE_TILE, SWEEPS_OF_BLOCKS,
            )  # fmt: skip
        reset(counter_ptr, members)


def config(architecture: str, dtype: torch.dtype, width: int, large: int) -> dict:
    name = "fp64" if dtype == torch.float64 else "fp32"
    options = dict(R=width, SWEEPS=jacobi.SWEEPS, LARGE=large, PAIR=jacobi.PAIR)
    options |= dict(SWEEPS_OF_BLOCKS=jacobi.SWEEPS_OF_BLOCKS, POLAR=newton_schulz.POLAR, SIGN=newton_schulz.SIGN)
    products = newton_schulz.config(architecture)
    options |= dict(FLAT=products.pop("BLOCK")) | products
    # as many warps as the larger kind of work takes
    return options | jacobi.config(architecture, name, jacobi.PAIR if large else width)


def variants(architecture: str):
    """What to compile ahead of time: (kernel, signature types, constexprs, options, whether it is a default)."""
    types = dict(cores_ptr="*i64", work_ptr="*i32", hyper_ptr="*fp64", wide_ptr="*fp64", counter_ptr="*i64")
    types |= dict.fromkeys(("active_ptr", "wanted_ptr", "info_ptr"), "*i32")
    for base, dtype, some in (
        ("fp32", torch.float32, False),
        ("fp32", torch.float64, True),
        ("fp64", torch.float64, False),
    ):
        types |= dict.fromkeys(("base_ptr", "room_ptr"), f"*{base}")
        for width, large in ((16, 0), (32, 0), (64, 0), (16, 512), (32, 512), (64, 512)):
            options = dict(SOME=some) | config(architecture, dtype, width, large)
            # in double, and where both kinds of work are at their widest, the registers are missed by a little
            default = dtype == torch.float32 and (width == 32 or not large)
            yield variant(clip, types, options)[:-1] + (default,)
