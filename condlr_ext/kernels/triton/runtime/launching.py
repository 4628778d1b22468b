"""What launches over many matrices share: tables on the device, the split of long sums, pointer tables."""

import functools
from collections.abc import Iterable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import INTERPRETED

_POINTERS_PER_LAUNCH = 32


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return 4 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


def on(device: torch.device):
    """Launches go to the current device: make it the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else torch.device(device)


def capturing(device: torch.device) -> bool:
    """Whether what is launched now goes into a CUDA graph, which will use the addresses that it sees."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def table(rows: Iterable[Sequence[int]], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Integers on the device; waits for it, so only where a plan is made."""
    return torch.tensor([list(row) for row in rows], dtype=dtype, device=device)


def tiles(n: int, size: int) -> range:
    return range(-(-n // size))


def rows_per_split(lengths: Sequence[tuple[int, int]], block: int, device: torch.device) -> int:
    """How many rows one program sums, a multiple of the block, so that the work is even and there is enough of it.

    lengths: for each sum its number of rows and how many tiles it has. A device gets two programs for each
    multiprocessor, none of them less than eight blocks.
    """
    work = sum(rows * count for rows, count in lengths)
    return max(8, -(-work // (2 * multiprocessors(device) * block))) * block


def offsets(base: Tensor, tensors: Iterable[Tensor]) -> tuple[int, ...]:
    """How many elements after `base` each tensor of its dtype starts; 0 for empty ones."""
    start, size = base.data_ptr(), base.element_size()
    return tuple((t.data_ptr() - start) // size if t.numel() else 0 for t in tensors)


def write_pointer_table(pointer_table: Tensor, values: Sequence[int]) -> None:
    """pointer_table[i] = values[i] by launches: these can be captured, copies from the host cannot.

    pointer_table must have room for a multiple of 32 (see pointer_table_size).
    """
    for begin in range(0, len(values), _POINTERS_PER_LAUNCH):
        chunk = values[begin : begin + _POINTERS_PER_LAUNCH]
        _write[(1,)](pointer_table[begin:], *chunk, *[0] * (_POINTERS_PER_LAUNCH - len(chunk)), num_warps=1)


def pointer_table_size(count: int) -> int:
    return -(-count // _POINTERS_PER_LAUNCH) * _POINTERS_PER_LAUNCH


@triton.jit(do_not_specialize=list(range(1, 1 + _POINTERS_PER_LAUNCH)))
def _write(
    out_ptr,
    a0: tl.int64, a1: tl.int64, a2: tl.int64, a3: tl.int64, a4: tl.int64, a5: tl.int64, a6: tl.int64, a7: tl.int64,
    b0: tl.int64, b1: tl.int64, b2: tl.int64, b3: tl.int64, b4: tl.int64, b5: tl.int64, b6: tl.int64, b7: tl.int64,
    c0: tl.int64, c1: tl.int64, c2: tl.int64, c3: tl.int64, c4: tl.int64, c5: tl.int64, c6: tl.int64, c7: tl.int64,
    d0: tl.int64, d1: tl.int64, d2: tl.int64, d3: tl.int64, d4: tl.int64, d5: tl.int64, d6: tl.int64, d7: tl.int64,
):  # fmt: skip
    _write8(out_ptr, a0, a1, a2, a3, a4, a5, a6, a7)
    _write8(out_ptr + 8, b0, b1, b2, b3, b4, b5, b6, b7)
    _write8(out_ptr + 16, c0, c1, c2, c3, c4, c5, c6, c7)
    _write8(out_ptr + 24, d0, d1, d2, d3, d4, d5, d6, d7)


@triton.jit
def _write8(out_ptr, a0, a1, a2, a3, a4, a5, a6, a7):
    tl.store(out_ptr, a0)
    tl.store(out_ptr + 1, a1)
    tl.store(out_ptr + 2, a2)
    tl.store(out_ptr + 3, a3)
    tl.store(out_ptr + 4, a4)
    tl.store(out_ptr + 5, a5)
    tl.store(out_ptr + 6, a6)
    tl.store(out_ptr + 7, a7)


def variant(kernel, types: dict, options: dict):
    """One line of `variants` for a launch with these keyword arguments."""
    constexprs = {name: value for name, value in options.items() if name in kernel.arg_names}
    signature = {name: types[name] for name in kernel.arg_names if name not in constexprs}
    return kernel, signature, constexprs, {k: v for k, v in options.items() if k not in constexprs}, True


def variants(architecture: str):
    """What to compile ahead of time: (kernel, signature types, constexprs, options, whether it is a default)."""
    types = dict.fromkeys(_write.arg_names, "i64") | {"out_ptr": "*i64"}
    yield _write, types, {}, dict(num_warps=1), True
