"""The fastest of a handful of configurations, found at the first call of each kind of size and remembered."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
import triton
from triton.runtime.errors import OutOfResources

from .. import INTERPRETED

_chosen: dict[tuple, triton.Config] = {}
_imposed: dict[str, triton.Config] | None = None


@contextlib.contextmanager
def impose(kernel: str, config: triton.Config) -> Iterator[None]:
    """Launch this kernel with this configuration and all others with their first, without trials, as benchmarks do."""
    global _imposed
    _imposed = {kernel: config}
    try:
        yield
    finally:
        _imposed = None


def fastest(key: tuple, sizes: Sequence[int], configs: Sequence[triton.Config], launch: Callable) -> triton.Config:
    """The configuration with which `launch(config)`, which must bear repetition, takes the least time.

    The first one, without a trial, where timing is impossible or unwanted: in the interpreter, while a CUDA graph is
    captured, under torch.use_deterministic_algorithms (configurations round differently), or where there is no other.

    Args:
        key: what the answer depends on besides the sizes: kernel, device, dtype and the like.
        sizes: numbers of rows and columns, of which only the power of two above matters.
    """
    if _imposed is not None:
        return _imposed.get(key[0], configs[0])
    key = (*key, *((s - 1).bit_length() for s in sizes))
    if len(configs) == 1 or INTERPRETED or torch.are_deterministic_algorithms_enabled():
        return configs[0]
    config = _chosen.get(key)
    if config is not None:
        return config
    if torch.cuda.is_current_stream_capturing():
        return configs[0]
    times = [_time(launch, config) for config in configs]
    _chosen[key] = configs[min(range(len(configs)), key=times.__getitem__)]
    return _chosen[key]


def _time(launch: Callable, config: triton.Config) -> float:
    """Median milliseconds; Inf where the device lacks the resources."""
    try:
        return triton.testing.do_bench(lambda: launch(config), warmup=5, rep=25, return_mode="median")
    except OutOfResources:
        return float("inf")
