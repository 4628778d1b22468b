"""The host side of launches: kept compiled kernels, tables on the device, variants to compile."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler import CompiledKernel

from .. import devices

_POINTERS_PER_LAUNCH = 32


_kept: dict[tuple, tuple[CompiledKernel, tuple]] = {}  # with the values of the constexprs


def launch(kernel, grid: Sequence[int], *args, **options) -> Callable[[], None]:
    """Launch kernel[grid](*args, **options); a kernel that was compiled for such arguments is kept and costs less.

    Triton specializes on the dtype of tensors, their alignment to 16 bytes, and integers that are 1, multiples of 16 or
    beyond 32 bits.

    Args:
        kernel: A triton.jit function whose constexprs follow all other parameters.
        grid: Numbers of programs.
        args: The other arguments, of which the first is a tensor.
        options: Constexprs and launch options, in the same order at every call.

    Returns:
        The same launch again, at the least cost, as long as the tensors stay where they are.
    """
    key = (kernel.fn, args[0].device, *map(_kind, args), *options, *options.values())
    kept = _kept.get(key)
    if kept is None:
        run = kernel[tuple(grid)]
        compiled = run(*args, **options)
        # the interpreter returns nothing; AMD's kernels are specialized on the sizes of tensors too
        if not isinstance(compiled, CompiledKernel) or compiled.metadata.target.backend != "cuda":
            return functools.partial(run, *args, **options)
        kept = _kept[key] = compiled, tuple(options[name] for name in kernel.arg_names[len(args) :])
        return functools.partial(compiled[(*grid, 1, 1)], *args, *kept[1])
    compiled, constants = kept
    again = functools.partial(compiled[(*grid, 1, 1)], *args, *constants)
    again()
    return again


def _kind(x) -> tuple | int | type:
    """Return what Triton may specialize on, or something finer."""
    if isinstance(x, Tensor):
        return x.dtype, x.data_ptr() & 15 > 0
    if isinstance(x, float):
        return float
    return x if x < 2 else (x & 15 > 0, x > 0x7FFFFFFF)


def on(device: torch.device):
    """Return a context in which launches go to this device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def capturing(device: torch.device) -> bool:
    """Return whether a CUDA graph is being captured, which keeps the addresses that it sees."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def table(rows: Iterable[Sequence[int]], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copy rows of integers to the device; it waits for the device, so only plans are made with it."""
    return torch.tensor([list(row) for row in rows], dtype=dtype, device=device)


def columns(fields: Sequence[str], names: str) -> list[tl.constexpr]:
    """Return the positions of these names among the fields of a table's rows."""
    return [tl.constexpr(fields.index(name)) for name in names.split()]


def tiles(n: int, size: int) -> range:
    return range(-(-n // size))


def rows_per_split(lengths: Sequence[tuple[int, int]], block: int, device: torch.device) -> int:
    """Return how many rows one program sums, a multiple of the block.

    Each multiprocessor gets about two programs, and no program fewer than eight blocks.

    Args:
        lengths: Number of rows and number of tiles of each sum.
        block: Rows that a program loads at a time.
        device: Where the kernels will run.
    """
    work = sum(rows * count for rows, count in lengths)
    return max(8, -(-work // (2 * devices.multiprocessors(device) * block))) * block


def addresses(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    """Return the address of each tensor, 0 for empty ones."""
    return tuple(map(devices.address, tensors))


def offsets(base: int, addresses: Iterable[int], size: int) -> list[int]:
    """Return the offset of each address from that of the base, in elements of this size in bytes; 0 for address 0."""
    return [(address - base) // size if address else 0 for address in addresses]


def write_pointer_table(pointer_table: Tensor, values: Sequence[int]) -> None:
    """Set pointer_table[i] = values[i] by launches, whose arguments a captured graph keeps.

    pointer_table must have pointer_table_size(len(values)) elements.
    """
    for begin in range(0, len(values), _POINTERS_PER_LAUNCH):
        chunk = values[begin : begin + _POINTERS_PER_LAUNCH]
        launch(_write, (1,), pointer_table[begin:], *chunk, *[0] * (_POINTERS_PER_LAUNCH - len(chunk)), num_warps=1)


def upload(out: Tensor, values: Sequence[int]) -> None:
    """Copy integers to the start of a vector; the host does not wait. A captured graph would read freed memory."""
    held = torch.tensor(values, device="cpu", dtype=out.dtype, pin_memory=out.is_cuda)
    out[: len(values)].copy_(held, non_blocking=True)


def pointer_table_size(count: int) -> int:
    """Return count, rounded up to whole launches of `write_pointer_table`."""
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
    """Return the item of `variants` for a launch with these keyword arguments."""
    constexprs = {name: value for name, value in options.items() if name in kernel.arg_names}
    signature = {name: types[name] for name in kernel.arg_names if name not in constexprs}
    return kernel, signature, constexprs, {k: v for k, v in options.items() if k not in constexprs}, True


def variants(architecture: str):
    """Yield what to compile ahead of time: (kernel, signature types, constexprs, options, is a default)."""
    types = dict.fromkeys(_write.arg_names, "i64") | {"out_ptr": "*i64"}
    yield _write, types, {}, dict(num_warps=1), True
