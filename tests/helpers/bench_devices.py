"""Devices that stand in for a GPU in tests of the benchmarks."""

import time
from types import SimpleNamespace

import torch

from bench import cuda, runner
from bench.machine import Cpu

CEILINGS = {
    "copy": [[1 << 16, 2e10], [1 << 24, 1e10]],
    "threads": 1,
    "fp32": 1e10,
    "launch": 2e-6,
    "graph launch": 1e-6,
}


class Host(cuda.Cuda):
    """The CPU as a CUDA device; a replay writes to the results of the capture, as in a graph."""

    device, name, slug = torch.device("cpu"), "Host (CPU)", "host"

    def __init__(self):
        self._properties = SimpleNamespace(L2_cache_size=1 << 16)

    def describe(self):
        return {"device": self.name, "capability": [0, 0], "build": {}}

    def synchronize(self):
        pass

    def seconds(self, call, number, cold):
        total = 0.0
        for _ in range(number):
            if call.prepare:
                call.prepare()
            start = time.perf_counter()
            call.run()
            total += time.perf_counter() - start
        return total / number

    def graph(self, call):
        if call.rewind:
            call.rewind()
        out = call.run()

        def replay():
            for static, fresh in zip(runner._floating(out), runner._floating(call.run()), strict=True):
                static.detach().copy_(fresh.detach())

        return replay, out

    def memory(self, call):
        return 0

    def free(self):
        return 1 << 28


class CpuAsCuda(Cpu):
    """The CPU with its own clock under the name of a CUDA device."""

    kind = "cuda"

    def graph(self, call):
        return call.run, None
