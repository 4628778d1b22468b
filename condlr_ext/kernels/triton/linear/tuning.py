"""Autotuning: the fastest of a few configurations, timed at the first call with sizes of a kind and cached."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
import triton
from triton.runtime.errors import OutOfResources

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


def fastest(
    device: torch.device, key: tuple, sizes: Sequence[int], configs: Sequence[triton.Config], launch: Callable
) -> triton.Config:
    """Return the configuration with which `launch(config)` is fastest.

    It is the first one, untimed, for CPU tensors, while a CUDA graph is captured, and under
    torch.use_deterministic_algorithms, since configurations round differently.

    Args:
        device: Where the launch goes.
        key: Everything else but the sizes that the result depends on: kernel, dtype and so on.
        sizes: Numbers of rows and columns; those with the same next power of two share a result.
        configs: The candidates.
        launch: Launches the kernel; must be repeatable.
    """
    if _imposed is not None:
        return _imposed.get(key[0], configs[0])
    key = (device, *key, *((s - 1).bit_length() for s in sizes))
    if len(configs) == 1 or device.type != "cuda" or torch.are_deterministic_algorithms_enabled():
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
    """Return the median time in milliseconds; inf if the device lacks the resources."""
    try:
        return triton.testing.do_bench(lambda: launch(config), warmup=5, rep=25, return_mode="median")
    except OutOfResources:
        return float("inf")
