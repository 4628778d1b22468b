"""Launches by Triton, executed here: a driver of Triton without a device.

    with executing(sm=90) as run:
        Q, R, info = qr(A)  # CPU tensors

The package is told that kernels serve CPU tensors, of which architecture they are, and the addresses of tensors.
"""

import contextlib
import random
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from triton.backends import Backend, backends
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver

from condlr_ext.kernels.triton import devices
from condlr_ext.kernels.triton.runtime import launching

from .count import Counts
from .memory import Global, Report, SanitizerError
from .parse import parse
from .run import Launch
from .translate import Module

MULTIPROCESSORS = 4
SHARED = {80: 101376, 90: 232448}  # bytes a block may have; sm_80 stands for GPUs with 99 KiB too
# reports that are no errors: (file, kernel, kind): why
ALLOWED: dict[tuple[str, str, str], str] = {}
_current: "Run | None" = None


class Launched(NamedTuple):
    """A launch that was executed: instructions are those of blocks; counts are there if they were asked for."""

    kernel: str
    grid: tuple[int, int, int]
    instructions: int
    counts: Counts | None


class Run:
    """What kernels do, and what was found.

    Args:
        sm: The architecture, 80 or 90.
        noise: A seed by which approximate instructions are off by what they may be; None: they are exact.
        schedule: A seed by which blocks take turns in another order; None: as they are numbered.
        faults: A function of the name and the PTX of a kernel that returns what to execute instead; reports are then
            collected and not raised.
        counts: Whether to count what every launch asks of a device.

    Attributes:
        reports: What the checks found.
        launches: What was executed, a `Launched` each.
    """

    def __init__(self, sm: int, noise: int | None = None, schedule: int | None = None, faults=None, counts=False):
        self.sm, self.noise, self.faults, self.counts = sm, noise, faults, counts
        self.schedule = None if schedule is None else random.Random(schedule)
        self.forget()

    def forget(self) -> None:
        """Let go of tensors and reports, as between tests."""
        self.memory, self.reports, self.launches = Global(), [], []

    @property
    def instructions(self) -> int:
        return sum(launched.instructions for launched in self.launches)

    def launch(self, kernel: "Kernel", grid, arguments) -> None:
        """Execute a kernel; raise SanitizerError where a check finds something that is not allowed."""
        parameters = {
            name: self._bits(argument, ptx, label)
            for (name, ptx), (label, argument) in zip(kernel.parameters, arguments, strict=True)
        }
        counts = Counts() if self.counts else None
        launch = Launch(kernel.module(self.faults), self.memory, grid, parameters, self.noise, self.schedule, counts)
        launch.run()
        self.launches.append(Launched(kernel.name, grid, launch.instructions, counts))
        found = [report for report in launch.reports.values() if _key(report) not in ALLOWED]
        self.reports += found
        if found and self.faults is None:
            raise SanitizerError("\n".join(map(str, found)))

    def _bits(self, argument, ptx: str, name: str):
        """Return an argument as a NumPy number of the type of a parameter."""
        if isinstance(argument, torch.Tensor):
            return np.uint64(self.memory.address(argument, name))
        if ptx[0] == "f":
            return np.dtype(f"f{int(ptx[1:]) // 8}").type(argument)
        return np.array(argument or 0, f"i{int(ptx[1:]) // 8}").view(f"u{int(ptx[1:]) // 8}")[()]


def _key(report: Report) -> tuple[str, str, str]:
    return report.instruction.source.partition(":")[0], report.kernel, report.kind


class Kernel:
    """A compiled kernel: its PTX, and its translations."""

    def __init__(self, name: str, ptx: str, shared: int):
        self.name, self.ptx, self.shared = name, ptx, shared
        self._modules = {}
        self.parameters = self.module().functions[name].parameters

    def module(self, faults=None) -> Module:
        ptx = self.ptx if faults is None else faults(self.name, self.ptx)
        if ptx not in self._modules:
            self._modules[ptx] = Module(parse(ptx), self.name, self.shared)
        return self._modules[ptx]


class PTXBackend(CUDABackend):
    """Triton's compiler for NVIDIA GPUs up to PTX."""

    def __init__(self, target):
        super().__init__(target)
        self.binary_ext = "ptx"

    def add_stages(self, stages, options, language):
        super().add_stages(stages, options, language)
        del stages["cubin"]

    def hash(self):
        return f"ptx-{self.target.arch}"  # without asking for the version of ptxas


class Launcher:
    """What Triton calls for a launch."""

    def __init__(self, source, metadata):
        if metadata.global_scratch_size or metadata.profile_scratch_size:
            raise NotImplementedError("a kernel with scratch memory")
        names = source.fn.arg_names
        fixed = {path[0] for path in source.constants if len(path) == 1}
        self.taken = [k for k, name in enumerate(names) if k not in fixed and source.signature[name] != "constexpr"]
        self.names = names

    def __call__(self, x, y, z, stream, kernel, packed, metadata, enter, leave, *arguments):
        taken = [(self.names[k], arguments[k]) for k in self.taken]
        scratch = [("scratch", 0)] * (len(kernel.parameters) - len(taken))  # Triton adds two parameters
        _current.launch(kernel, (x, y, z), taken + scratch)


class Driver:
    """What Triton asks of a device. Its number is that of the architecture, by which Triton keeps compiled kernels."""

    launcher_cls = Launcher

    def __init__(self, sm: int):
        self.sm, self.utils = sm, self

    def get_current_target(self):
        return GPUTarget("cuda", self.sm, 32)

    def get_current_device(self):
        return self.sm

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_device_properties(self, device):
        return {"max_shared_mem": SHARED[device]}

    def load_binary(self, name, ptx, shared, device):
        kernel = Kernel(name, ptx.decode(), shared)
        return kernel, kernel, 0, 0, 1024  # module, function, registers, spilled registers, most threads


@contextlib.contextmanager
def executing(sm: int, noise: int | None = None, schedule: int | None = None, faults=None, counts=False):
    """Execute the Triton kernels of the package on CPU tensors. Yield the `Run`, whose arguments these are."""
    global _current
    before = _current
    _current = run = Run(sm, noise, schedule, faults, counts)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(backends, nvidia=Backend(PTXBackend, backends["nvidia"].driver)))
        stack.enter_context(mock.patch.dict(launching._kept, clear=True))
        stack.enter_context(mock.patch.object(driver, "_active", Driver(sm)))
        seams = dict(
            serves=lambda tensor: tensor.device.type == "cpu",
            architecture=lambda device: f"sm_{sm}",
            multiprocessors=lambda device: MULTIPROCESSORS,
            address=lambda tensor: run.memory.address(tensor) if tensor.numel() else 0,
        )
        stack.enter_context(mock.patch.multiple(devices, **seams))
        try:
            yield run
        finally:
            _current = before
