"""clip_spectrum of the cores of a whole network, in place: in one launch, or two for float32.

The first launch, in float32, clips the well-conditioned cores, as all are after a step, and marks the others in an
active mask; the second clips those in float64. Up to rank 64 one program clips a core, above it a cooperative group
does: in float32 by matrix products (newton_schulz.py), in float64 by blocks of columns (jacobi.py). Where a network has
both kinds, each has launches of its own, since nothing may keep members of a group from running at the same time.
"""

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import devices
from ..qr.cholesky_qr import ALL_ZERO, NOT_CONVERGED, NOT_FINITE, OK, load_wide
from ..runtime import cooperative
from ..runtime.cooperative import barrier, copy, product, reset, timed_out
from ..runtime.launching import addresses, launch, offsets, on, table, variant
from ..spectral import band, jacobi, newton_schulz
from . import tables as col
from .tables import CoreRow

LARGEST_SINGLE = jacobi.PAIR  # the largest rank that one program serves


class CoreClip:
    """Clips a fixed list of cores by the tau, band and sigma_max in the rows of S of hyper; info is clip_spectrum's.

    A core that has not moved, whose entry of `moved` is 0, stays as it is where it meets the bound: the bands "rms" and
    "mean" shrink a core a little.

    Args:
        cores: The cores, each [r, r], contiguous, of one dtype.
        layers: Their layers, which say where in hyper, moved and info each core's values are.
    """

    def __init__(self, cores: Sequence[Tensor], layers: Sequence[int]):
        self._base = cores[0] if cores else None
        if not cores:
            return
        base, device = self._base, self._base.device
        single = base.dtype == torch.float32
        ranks = [len(S) for S in cores]
        small, large = ([r for r in ranks if (r > LARGEST_SINGLE) == above] for above in (False, True))
        width = triton.next_power_of_2(max([16, *small]))
        widest = triton.next_power_of_2(max(large, default=0))
        jobs = [newton_schulz.jobs(r, r) for r in large]
        sizes = cooperative.group_sizes(device, jobs) if large else []
        size_of = dict(zip(large, sizes, strict=True))
        at = addresses(cores)
        starts = offsets(at[0], at, base.element_size())
        rows, size, wide_size, singles, members = [], 0, 0, [], []
        for i, (start, r, layer) in enumerate(zip(starts, ranks, layers, strict=True)):
            if r <= LARGEST_SINGLE:
                rounds = triton.next_power_of_2(r)
                own = wide = 4 * width**2
                singles.append((-r, i, 0, 1))
            else:
                rounds = triton.next_power_of_2(triton.cdiv(2 * r, jacobi.PAIR))
                own = newton_schulz.workspace_size(r, r)
                wide = 2 * r * r + widest + jacobi.workspace_size(r, r, size_of[r])
                members += [(-r, i, member, size_of[r]) for member in range(size_of[r])]
            rows.append(CoreRow(start, r, layer, rounds, workspace=size, wide_workspace=wide_size))
            size, wide_size = size + own * single, wide_size + wide
        # what each launch does, the longest programs first, and the options of its kernel that depend on the ranks
        self._work = [
            (table([row[1:] for row in sorted(programs)], torch.int32, device), ranks, options)
            for programs, ranks, options in (
                (members, (16, widest), cooperative.grid_options(sizes) if sizes else {}),
                (singles, (width, 0), {}),
            )
            if programs
        ]
        self._cores = table(rows, torch.int64, device)
        self._workspace = torch.empty(size, dtype=base.dtype, device=device)
        self._wide = torch.empty(wide_size, dtype=torch.float64, device=device)
        self._active = torch.zeros(len(cores), jacobi.SWEEPS_OF_BLOCKS, dtype=torch.int32, device=device)
        self._active_mask = torch.zeros(len(cores), dtype=torch.int32, device=device)
        self._counters = cooperative.counters(len(cores), device)

    def __call__(self, hyper: Tensor, moved: Tensor, info: Tensor) -> list[Callable]:
        """Clip the cores; return the launches."""
        if self._base is None:
            return []
        base, launches = self._base, []
        failed, architecture = cooperative.failure_flag(base.device), devices.architecture(base.device)
        with on(base.device):
            for masked in (False, True) if base.dtype == torch.float32 else (False,):
                dtype = torch.float64 if masked else base.dtype
                for work, (width, large), options in self._work:
                    again = launch(
                        clip, (len(work),),
                        self._cores, work, hyper, base, self._workspace, self._wide, self._active, self._active_mask,
                        self._counters, failed, moved, info, MASKED=masked,
                        **config(architecture, dtype, width, large), **options,
                    )  # fmt: skip
                    launches.append(again)
        return launches


@triton.jit
def _constraint(hyper_ptr, layer):
    """Return tau, band and sigma_max of a layer."""
    row = hyper_ptr + (layer * col.ROLE_COUNT + col.S_ROLE) * col.HYPER_COLUMNS
    return tl.load(row + col.TAU), tl.load(row + col.BAND), tl.load(row + col.SIGMA_MAX)


@triton.jit
def _clip(
    core, hyper_ptr, base_ptr, U_ptr, active_mask_ptr, moved_ptr, info_ptr,
    MASKED: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, SWEEPS: tl.constexpr,
):  # fmt: skip
    """Clip a core of rank at most LARGEST_SINGLE. core: its row of cores; U: the start of its workspace."""
    dtype = base_ptr.dtype.element_ty
    own = U_ptr.dtype.element_ty
    V_ptr = U_ptr + R * R
    J_ptr = V_ptr + R * R
    sigma_ptr = J_ptr + R * R
    n, rounds = tl.load(core + col.CORE_RANK).to(tl.int32), tl.load(core + col.CORE_ROUNDS).to(tl.int32)
    scale = jacobi.start(base_ptr + tl.load(core + col.CORE_START), n, 1, U_ptr, n, V_ptr, n, R, BLOCK)
    active = n > 1
    sweeps = 0
    while active & (sweeps < SWEEPS):
        active = jacobi.rotate_columns(U_ptr, n, V_ptr, n, 0, 0, J_ptr, rounds, 1, R, BLOCK)
        sweeps += 1
    jacobi.finish(U_ptr, n, V_ptr, n, sigma_ptr, scale, R, BLOCK)
    jacobi.polish(U_ptr, n, n, J_ptr, R, BLOCK)
    jacobi.polish(V_ptr, n, n, J_ptr, R, BLOCK)
    tl.debug_barrier()

    S_ptr, layer = base_ptr + tl.load(core + col.CORE_START), tl.load(core + col.CORE_LAYER)
    i = tl.arange(0, R)
    real = i < n
    largest = tl.load(sigma_ptr).to(tl.float64)
    usable = (scale == scale) & (largest > 0)
    outcome = tl.where(active, NOT_CONVERGED, tl.where(largest == 0, ALL_ZERO, OK))
    outcome = tl.where(scale == scale, outcome, NOT_FINITE)
    largest = tl.where(usable, largest, 1.0)
    x = tl.where(usable, load_wide(sigma_ptr + i, real), 1.0) / largest
    tau, kind, sigma_max = _constraint(hyper_ptr, layer)
    cap = sigma_max / largest
    # sigma is known to a few rounding errors of the largest one
    SLACK: tl.constexpr = 8 * 2.0**-52 if own == tl.float64 else 4 * 2.0**-23
    OUT: tl.constexpr = 2.0**-52 if dtype == tl.float64 else 2.0**-23
    weight, rebuild, in_band, _, _ = band.clip_weights(sigma_ptr, x, real, n, tau, kind, cap, OUT, SLACK, R, BLOCK)
    smallest = tl.min(tl.where(real, x, 1.0), 0)
    in_band |= (tl.load(moved_ptr + layer) == 0) & band.meets_bound(smallest, tau, cap)
    ill_conditioned = 0
    if not MASKED:
        # rounding errors of a large singular value are large for a small one, and for a low band
        spread = 3 * smallest < 1
        ill_conditioned = tl.where((own == tl.float32) & (spread | (rebuild & ~in_band)), 1, 0)
        tl.store(active_mask_ptr, ill_conditioned)
    if ill_conditioned == 0:
        tl.store(info_ptr + layer, outcome)
    if (ill_conditioned == 0) & (outcome == OK):
        if not in_band:
            tl.debug_barrier()
            tl.store(sigma_ptr + i, (weight * largest).to(own), mask=real)
            tl.debug_barrier()
            row, k = tl.arange(0, BLOCK), tl.arange(0, 16)
            for begin in range(0, n, BLOCK):
                rows = begin + row
                at = rows[:, None] * n + i[None, :]
                inside = rows[:, None] < n
                new = tl.where(rebuild, 0.0, load_wide(S_ptr + at, inside & real[None, :]))
                for start in range(0, n, 16):
                    inner = start + k
                    u = load_wide(U_ptr + rows[:, None] * n + inner[None, :], inside & (inner[None, :] < n))
                    u *= load_wide(sigma_ptr + inner, inner < n)[None, :]
                    v = load_wide(V_ptr + i[None, :] * n + inner[:, None], real[None, :] & (inner[:, None] < n))
                    new = tl.dot(u, v, new, input_precision="ieee", out_dtype=tl.float64)
                tl.store(S_ptr + at, new.to(dtype), mask=inside & real[None, :])


@triton.jit
def _clip_by_products(
    core, hyper_ptr, base_ptr, workspace_ptr, wide_ptr, active_mask_ptr, moved_ptr, info_ptr, member, group_size,
    counter_ptr,
    POLAR: tl.constexpr, SIGN: tl.constexpr, TILE: tl.constexpr, WIDE_TILE: tl.constexpr, DEPTH: tl.constexpr,
    FLAT: tl.constexpr,
):  # fmt: skip
    """Clip a larger well-conditioned core in float32, or leave it to the second launch."""
    S_ptr, layer = base_ptr + tl.load(core + col.CORE_START), tl.load(core + col.CORE_LAYER)
    n = tl.load(core + col.CORE_RANK).to(tl.int32)
    tau, kind, sigma_max = _constraint(hyper_ptr, layer)
    good = tl.load(moved_ptr + layer) != 0  # the singular values tell whether a core that has not moved can stay
    if good:
        good = newton_schulz.clip_by_group(
            S_ptr, n, 1, n, n, tau, kind, sigma_max, workspace_ptr, wide_ptr, S_ptr, n, 1, POLAR, SIGN, member,
            group_size, counter_ptr, TILE, WIDE_TILE, DEPTH, FLAT,
        )  # fmt: skip
    if member == 0:
        failed = timed_out(counter_ptr)  # then S may be anything
        tl.store(active_mask_ptr, tl.where(good | failed, 0, 1))
        if good | failed:
            tl.store(info_ptr + layer, tl.where(failed, NOT_CONVERGED, OK))


@triton.jit
def _clip_by_blocks(
    core, hyper_ptr, base_ptr, U_ptr, active_ptr, moved_ptr, info_ptr, member, group_size, counter_ptr,
    PAIR: tl.constexpr, LARGE: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, SWEEPS_OF_BLOCKS: tl.constexpr,
):  # fmt: skip
    """Clip a larger core in float64 by its singular value decomposition."""
    dtype = base_ptr.dtype.element_ty
    S_ptr, layer = base_ptr + tl.load(core + col.CORE_START), tl.load(core + col.CORE_LAYER)
    n, blocks = tl.load(core + col.CORE_RANK).to(tl.int32), tl.load(core + col.CORE_ROUNDS).to(tl.int32)
    V_ptr = U_ptr + n * n
    sigma_ptr = V_ptr + n * n
    T_ptr = sigma_ptr + LARGE
    other_ptr = T_ptr + n * n
    info_ptr += layer
    jacobi.svd_by_group(
        S_ptr, n, 1, U_ptr, n, sigma_ptr, V_ptr, n, T_ptr, active_ptr, info_ptr, blocks, member, group_size,
        counter_ptr,
        PAIR, LARGE, BLOCK, TILE, SWEEPS_OF_BLOCKS,
    )  # fmt: skip
    outcome = tl.load(info_ptr)
    largest = tl.load(sigma_ptr)
    if (outcome == OK) & (largest > 0):
        i = tl.arange(0, LARGE)
        real = i < n
        x = load_wide(sigma_ptr + i, real) / largest
        tau, kind, sigma_max = _constraint(hyper_ptr, layer)
        cap = sigma_max / largest
        OUT: tl.constexpr = 2.0**-52 if dtype == tl.float64 else 2.0**-23
        weight, rebuild, in_band, _, _ = band.clip_weights(
            sigma_ptr, x, real, n, tau, kind, cap, OUT, 8 * 2.0**-52, LARGE, BLOCK
        )
        smallest = tl.min(tl.where(real, x, 1.0), 0)
        in_band |= (tl.load(moved_ptr + layer) == 0) & band.meets_bound(smallest, tau, cap)
        barrier(counter_ptr, group_size)  # all have read sigma
        if not in_band:
            if member == 0:
                tl.store(sigma_ptr + i, weight * largest, mask=real)
            copy(V_ptr, 1, n, T_ptr, n, 1, n, n, 1.0, member, group_size, counter_ptr, TILE * BLOCK)
            for row in range(member, n, group_size):
                moved = load_wide(U_ptr + row * n + i, real) * load_wide(sigma_ptr + i, real)
                tl.store(other_ptr + row * n + i, moved, mask=real)
            barrier(counter_ptr, group_size)
            product(
                other_ptr, T_ptr, S_ptr, S_ptr, n, n, n, 1, 1.0, tl.where(rebuild, 0.0, 1.0), 0.0, member, group_size,
                counter_ptr, False, tl.float64, TILE, 16,
            )  # fmt: skip
    elif outcome == OK:
        barrier(counter_ptr, group_size)  # all have read info
        if member == 0:
            tl.store(info_ptr, ALL_ZERO)


@triton.jit
def clip(
    cores_ptr, work_ptr, hyper_ptr, base_ptr, workspace_ptr, wide_ptr, active_ptr, active_mask_ptr, counter_ptr,
    failed_ptr, moved_ptr, info_ptr,
    MASKED: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, SWEEPS: tl.constexpr, LARGE: tl.constexpr,
    PAIR: tl.constexpr, SWEEPS_OF_BLOCKS: tl.constexpr, POLAR: tl.constexpr, SIGN: tl.constexpr, TILE: tl.constexpr,
    WIDE_TILE: tl.constexpr, DEPTH: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """Set every core S [n, n] to S + U diag(weight) Vᵀ or U diag(weight) Vᵀ; n <= R, or 64 < n <= LARGE if LARGE > 0.

    work, a row per program: core, member, size of its group. MASKED: clip the cores of the active mask, in float64.
    Otherwise clip all, in the dtype of base, and put those into the mask for which float32 is not enough.
    """
    work = work_ptr + tl.program_id(0).to(tl.int64) * 3
    index, member, group_size = tl.load(work).to(tl.int64), tl.load(work + 1), tl.load(work + 2)
    core = cores_ptr + index * col.CORE_COLUMNS
    active_mask_ptr += index
    counter_ptr += 2 * index
    active = True
    if MASKED:
        active = tl.load(active_mask_ptr) != 0
    if active:
        single: tl.constexpr = (base_ptr.dtype.element_ty == tl.float32) and not MASKED
        workspace_ptr += tl.load(core + col.CORE_WORKSPACE)
        wide_ptr += tl.load(core + col.CORE_WIDE_WORKSPACE)
        own_ptr = workspace_ptr if single else wide_ptr
        if LARGE == 0:
            _clip(core, hyper_ptr, base_ptr, own_ptr, active_mask_ptr, moved_ptr, info_ptr, MASKED, R, BLOCK, SWEEPS)
        elif single:
            _clip_by_products(
                core, hyper_ptr, base_ptr, workspace_ptr, wide_ptr, active_mask_ptr, moved_ptr, info_ptr, member,
                group_size, counter_ptr, POLAR, SIGN, TILE, WIDE_TILE, DEPTH, FLAT,
            )  # fmt: skip
        else:
            _clip_by_blocks(
                core, hyper_ptr, base_ptr, wide_ptr, active_ptr + index * SWEEPS_OF_BLOCKS, moved_ptr, info_ptr, member,
                group_size, counter_ptr, PAIR, LARGE, BLOCK, WIDE_TILE, SWEEPS_OF_BLOCKS,
            )  # fmt: skip
        reset(counter_ptr, group_size, failed_ptr)


def config(architecture: str, dtype: torch.dtype, width: int, large: int) -> dict:
    """Return the constexprs and options of `clip` for ranks up to width or, if large is not 0, from 65 to large."""
    name = "fp64" if dtype == torch.float64 else "fp32"
    options = dict(R=width, SWEEPS=jacobi.SWEEPS, LARGE=large, PAIR=jacobi.PAIR)
    options |= dict(SWEEPS_OF_BLOCKS=jacobi.SWEEPS_OF_BLOCKS, POLAR=newton_schulz.POLAR, SIGN=newton_schulz.SIGN)
    products = newton_schulz.config(architecture)
    options |= dict(FLAT=products.pop("BLOCK")) | products
    return options | jacobi.config(architecture, name, jacobi.PAIR if large else width)


def variants(architecture: str):
    """Yield what to compile ahead of time: (kernel, signature types, constexprs, options, is a default)."""
    types = dict(cores_ptr="*i64", work_ptr="*i32", hyper_ptr="*fp64", wide_ptr="*fp64", counter_ptr="*i64")
    types |= dict.fromkeys(("active_ptr", "active_mask_ptr", "failed_ptr", "moved_ptr", "info_ptr"), "*i32")
    for base, dtype, masked in (
        ("fp32", torch.float32, False),
        ("fp32", torch.float64, True),
        ("fp64", torch.float64, False),
    ):
        types |= dict.fromkeys(("base_ptr", "workspace_ptr"), f"*{base}")
        for width, large in ((16, 0), (32, 0), (64, 0), (16, 512)):
            options = dict(MASKED=masked) | config(architecture, dtype, width, large)
            # in float64 a few registers spill
            yield variant(clip, types, options)[:-1] + (dtype == torch.float32,)
