"""A driver that does nothing: Triton compiles for an architecture and launches go nowhere, on any machine."""

import contextlib
from collections.abc import Iterator
from unittest import mock

from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver

from condlr_ext.kernels.triton import devices
from condlr_ext.kernels.triton.runtime import launching


class _Driver:
    """What Triton asks of a driver before a launch."""

    def __init__(self, capability: int):
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> str:
        return f"idle sm_{self._target.arch}"  # kernels are cached by device

    def get_current_stream(self, device) -> int:
        return 0


def _load_nothing(kernel: CompiledKernel) -> None:
    kernel.module = kernel.function = None
    kernel._run = lambda *args: None


@contextlib.contextmanager
def driver_of(capability: int = 90) -> Iterator[None]:
    """Let launches on CPU tensors be compiled for this compute capability (90 for 9.0), prepared and dropped."""
    launching._kept.clear()
    with (
        mock.patch.object(driver, "_active", _Driver(capability)),
        mock.patch.object(CompiledKernel, "_init_handles", _load_nothing),
        mock.patch.object(devices, "serves", lambda tensor: True),
        mock.patch.object(devices, "architecture", lambda device: f"sm_{capability}"),
        mock.patch.object(devices, "multiprocessors", lambda device: 132),
    ):
        try:
            yield
        finally:
            launching._kept.clear()
