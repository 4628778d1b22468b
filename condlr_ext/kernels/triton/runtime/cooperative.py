"""Cooperative groups: several programs of one launch work on one matrix and wait for each other at barriers.

A launch for every stage of such work would cost the host tens of microseconds and the device one or two. All programs
of a group must run at the same time, since they wait for each other. So a grid with larger groups than of one program
has at most as many programs as the device has multiprocessors, and is launched cooperatively: the driver starts all of
them together, or refuses. A group of one program never waits; Triton's interpreter, which runs programs one after
another, uses only those. Should a program be missing all the same, the others stop waiting after about two seconds and
set a flag in the memory of the host, and the next launch raises.
"""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import devices
from ..devices import INTERPRETED

# reads of the counter, of about a microsecond each; by a clock, time in which the device does other work would count
MAX_SPINS = tl.constexpr(1 << 21)
TIMED_OUT = tl.constexpr(1 << 48)


def group_sizes(device: torch.device, jobs: Sequence[int]) -> list[int]:
    """Return the number of programs for each matrix, given how many jobs of a matrix can run in parallel.

    All together are at most as many as multiprocessors, or one for each matrix.
    """
    most, total = devices.multiprocessors(device) - len(jobs), sum(jobs)
    return [1 if INTERPRETED else max(1, min(job, most * job // total)) for job in jobs]


def grid_options(sizes: Sequence[int]) -> dict:
    """Return the launch option by which the groups of a grid start together, or wait until they can."""
    return dict(launch_cooperative_grid=max(sizes) > 1)


def batch_groups(device: torch.device, groups: int, jobs: int) -> tuple[int, dict]:
    """Return the size of each group and the launch option where all matrices have one shape."""
    size = group_sizes(device, [jobs] * groups)[0]
    return size, grid_options([size])


def failure_flag(device: torch.device) -> Tensor:
    """Return what kernels set to 1 when a barrier times out: memory of the host, which learns of it without waiting.

    Raises:
        RuntimeError: A barrier of an earlier launch has timed out.
    """
    flag = _failure_flag(device.type == "cuda")
    if flag.item():
        raise RuntimeError(
            "condlr_ext: programs of a Triton launch have waited in vain for others of their group, so the results of"
            " earlier calls are wrong: they must run at the same time. Does the device have fewer multiprocessors than"
            " it reports, as under MPS or in a green context?"
        )
    return flag


@functools.cache
def _failure_flag(pinned: bool) -> Tensor:
    return torch.zeros(1, device="cpu", dtype=torch.int32, pin_memory=pinned)


def counters(groups: int, device: torch.device) -> Tensor:
    return torch.zeros(groups, 2, dtype=torch.int64, device=device)


@triton.jit
def split_program_id(count):
    """Return program id % count and program id // count; a second grid dimension would end at 65535."""
    return tl.program_id(0) % count, (tl.program_id(0) // count).to(tl.int64)


@triton.jit
def barrier(counter_ptr, group_size):
    """Wait until all members of the group are here; each then sees what the others have stored.

    counter [2] belongs to the group. If a member does not arrive, as when the group does not run at the same time, the
    barrier times out, and no later one waits until the counter is reset.
    """
    tl.debug_barrier()
    if group_size > 1:
        count = tl.atomic_add(counter_ptr, 1)
        target = count - count % group_size + group_size
        count += 1
        spins = 0
        while (count < target) & (count < TIMED_OUT) & (spins < MAX_SPINS):
            count = tl.atomic_add(counter_ptr, 0)
            spins += 1
        if (count < target) & (count < TIMED_OUT):
            tl.atomic_add(counter_ptr, TIMED_OUT)
        tl.debug_barrier()


@triton.jit
def timed_out(counter_ptr):
    """Return whether a barrier timed out. A member that was at every barrier knows."""
    return tl.atomic_add(counter_ptr, 0) >= TIMED_OUT


@triton.jit
def reset(counter_ptr, group_size, failed_ptr):
    """Set the counter to 0 for the next launch, and failed to 1 if a barrier timed out; every member's last call."""
    if group_size > 1:
        if timed_out(counter_ptr):
            tl.store(failed_ptr, 1)
        if tl.atomic_add(counter_ptr + 1, 1) == group_size - 1:
            tl.store(counter_ptr, 0)
            tl.store(counter_ptr + 1, 0)


@triton.jit
def copy(
    X_ptr, x_row, x_col, out_ptr, o_row, o_col, m, n, scale, member, group_size, counter_ptr, BLOCK: tl.constexpr
):  # fmt: skip
    """Set out = X / scale for X [m, n], by a group."""
    for begin in range(member * BLOCK, m * n, group_size * BLOCK):
        at = begin + tl.arange(0, BLOCK)
        row, col = (at // n).to(tl.int64), (at % n).to(tl.int64)
        x = tl.load(X_ptr + row * x_row + col * x_col, mask=at < m * n, other=0.0).to(tl.float64) / scale
        tl.store(out_ptr + row * o_row + col * o_col, x.to(out_ptr.dtype.element_ty), mask=at < m * n)
    barrier(counter_ptr, group_size)


@triton.jit
def product(
    X_ptr, Y_ptr, C_ptr, out_ptr, m, n, k, count, alpha, beta, gamma, member, group_size, counter_ptr,
    TRANSPOSED: tl.constexpr, dtype: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Set out [m, n] = alpha X Y + beta C + gamma I by a group, summed in dtype; all contiguous, out not X or Y.

    TRANSPOSED: X [k, m] stands for Xᵀ. With a count of 2 the same for the matrices [n, n] that follow.
    """
    # as a tensor: the function that is called is compiled anew for every constant
    count = tl.cast(count, tl.int32)
    alpha, beta, gamma = tl.cast(alpha, tl.float64), tl.cast(beta, tl.float64), tl.cast(gamma, tl.float64)
    _product(
        X_ptr, Y_ptr, C_ptr, out_ptr, m, n, k, count, alpha, beta, gamma, member, group_size,
        TRANSPOSED, dtype, TILE, DEPTH,
    )  # fmt: skip
    barrier(counter_ptr, group_size)


@triton.jit(noinline=True)
def _product(
    X_ptr, Y_ptr, C_ptr, out_ptr, m, n, k, count, alpha, beta, gamma, member, group_size,
    TRANSPOSED: tl.constexpr, dtype: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    side = tl.cdiv(n, TILE)
    tiles = tl.cdiv(m, TILE) * side
    for job in range(member, count * tiles, group_size):
        tile = job % tiles
        at = job // tiles * n * n
        row = tile // side * TILE + tl.arange(0, TILE)
        col = tile % side * TILE + tl.arange(0, TILE)
        acc = tl.zeros([TILE, TILE], dtype)
        for begin in range(0, k, DEPTH):
            inner = begin + tl.arange(0, DEPTH)
            if TRANSPOSED:
                x_ptrs = X_ptr + at + inner[None, :] * m + row[:, None]
            else:
                x_ptrs = X_ptr + at + row[:, None] * k + inner[None, :]
            x = tl.load(x_ptrs, mask=(row < m)[:, None] & (inner < k)[None, :], other=0.0)
            y_ptrs = Y_ptr + at + inner[:, None] * n + col[None, :]
            y = tl.load(y_ptrs, mask=(inner < k)[:, None] & (col < n)[None, :], other=0.0)
            acc = tl.dot(x.to(dtype), y.to(dtype), acc, input_precision="ieee", out_dtype=dtype)
        acc = alpha.to(dtype) * acc + tl.where(row[:, None] == col[None, :], gamma.to(dtype), 0.0)
        entries = at + row[:, None] * n + col[None, :]
        inside = (row < m)[:, None] & (col < n)[None, :]
        if beta != 0:
            acc += beta.to(dtype) * tl.load(C_ptr + entries, mask=inside, other=0.0).to(dtype)
        tl.store(out_ptr + entries, acc.to(out_ptr.dtype.element_ty), mask=inside)
