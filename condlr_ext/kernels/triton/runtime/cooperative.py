"""Programs that work on one matrix together within a launch: how many, and how they wait for each other.

Between steps of such work there is no launch, which would cost the host tens of microseconds and the device one or two.
All programs of a team must run at the same time: there are no more of them than multiprocessors, or one a matrix.
Alone, as in Triton's interpreter, where programs run one after another, a member of a team waits for nobody.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .. import INTERPRETED
from .launching import multiprocessors

MAX_SPINS = tl.constexpr(1 << 25)  # looks, of about a microsecond each
TIMED_OUT = tl.constexpr(1 << 48)


def members(device: torch.device, jobs: Sequence[int]) -> list[int]:
    """How many programs for each matrix, where so many could do something at the same time."""
    most, total = multiprocessors(device) - len(jobs), sum(jobs)
    return [1 if INTERPRETED else max(1, min(job, most * job // total)) for job in jobs]


def at_once(programs: int, teams: int, device: torch.device) -> dict:
    """An option for launches: such a one starts with all its programs or not yet, whatever else the device does."""
    return dict(launch_cooperative_grid=teams < programs <= multiprocessors(device))


def of_batch(device: torch.device, teams: int, jobs: int) -> tuple[int, dict]:
    """members of each team where all matrices are of one shape, and the option."""
    each = members(device, [jobs] * teams)[0]
    return each, at_once(teams * each, teams, device)


def counters(teams: int, device: torch.device) -> torch.Tensor:
    return torch.zeros(teams, 2, dtype=torch.int64, device=device)


@triton.jit
def place(members):
    """Which member of which team this program is."""
    return tl.program_id(0) % members, (tl.program_id(0) // members).to(tl.int64)


@triton.jit
def barrier(counter_ptr, members):
    """Goes on when all members have come here; then every one sees what any has stored before.

    counter [2]: of this team. Where somebody does not come, as in teams that are not there at the same time, nobody
    waits any more until all have left: see `timed_out`.
    """
    tl.debug_barrier()
    if members > 1:
        came = tl.atomic_add(counter_ptr, 1)
        everyone = came - came % members + members
        came += 1
        looks = 0
        while (came < everyone) & (came < TIMED_OUT) & (looks < MAX_SPINS):
            came = tl.atomic_add(counter_ptr, 0)
            looks += 1
        if (came < everyone) & (came < TIMED_OUT):
            tl.atomic_add(counter_ptr, TIMED_OUT)
        tl.debug_barrier()


@triton.jit
def timed_out(counter_ptr):
    """Whether a member waited in vain. Who came to every meeting knows."""
    return tl.atomic_add(counter_ptr, 0) >= TIMED_OUT


@triton.jit
def reset(counter_ptr, members):
    """What every member does last in a launch: the counter is 0 again for the next one."""
    if members > 1:
        if tl.atomic_add(counter_ptr + 1, 1) == members - 1:
            tl.store(counter_ptr, 0)
            tl.store(counter_ptr + 1, 0)


@triton.jit
def copy(
    X_ptr, x_row, x_col, out_ptr, o_row, o_col, m, n, scale, member, members, counter_ptr, BLOCK: tl.constexpr
):  # fmt: skip
    """out = X / scale for X [m, n], by a team."""
    for begin in range(member * BLOCK, m * n, members * BLOCK):
        at = begin + tl.arange(0, BLOCK)
        row, col = (at // n).to(tl.int64), (at % n).to(tl.int64)
        x = tl.load(X_ptr + row * x_row + col * x_col, mask=at < m * n, other=0.0).to(tl.float64) / scale
        tl.store(out_ptr + row * o_row + col * o_col, x.to(out_ptr.dtype.element_ty), mask=at < m * n)
    barrier(counter_ptr, members)


@triton.jit
def product(
    X_ptr, Y_ptr, C_ptr, out_ptr, m, n, k, count, alpha, beta, gamma, member, members, counter_ptr,
    TRANSPOSED: tl.constexpr, dtype: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """out [m, n] = alpha X Y + beta C + gamma I by a team, summed in dtype; all contiguous, out is neither X nor Y.

    TRANSPOSED: X [k, m] stands for Xᵀ. With a count of 2 the same for the matrices [n, n] that follow.
    """
    # as a tensor: the function that is called is compiled anew for every constant
    count = tl.cast(count, tl.int32)
    alpha, beta, gamma = tl.cast(alpha, tl.float64), tl.cast(beta, tl.float64), tl.cast(gamma, tl.float64)
    _product(
        X_ptr, Y_ptr, C_ptr, out_ptr, m, n, k, count, alpha, beta, gamma, member, members,
        TRANSPOSED, dtype, TILE, DEPTH,
    )  # fmt: skip
    barrier(counter_ptr, members)


@triton.jit(noinline=True)
def _product(
    X_ptr, Y_ptr, C_ptr, out_ptr, m, n, k, count, alpha, beta, gamma, member, members,
    TRANSPOSED: tl.constexpr, dtype: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    side = tl.cdiv(n, TILE)
    tiles = tl.cdiv(m, TILE) * side
    for job in range(member, count * tiles, members):
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
