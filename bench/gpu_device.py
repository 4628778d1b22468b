"""The GPU as the benchmark uses it: clock, cold caches, graphs, arithmetic of float32 products, and its ceilings."""

import contextlib
import platform
import subprocess
from collections.abc import Callable

import torch
import triton
from timing import Case

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "tf32": torch.float32}


class Cuda:
    """The current CUDA device. Whatever measures is handed one of these."""

    def __init__(self):
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._properties = torch.cuda.get_device_properties(self.device)
        self.name = self._properties.name
        self._cold = torch.ones(self._properties.L2_cache_size, device=self.device)  # four times the cache

    def describe(self) -> dict:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", f"--id={self.device.index}"]
        try:
            driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            driver = None
        return {
            "device": self.name,
            "capability": [self._properties.major, self._properties.minor],
            "driver": driver,
            "cuda": torch.version.cuda or torch.version.hip,
            "torch": torch.__version__,
            "triton": triton.__version__,
            "python": platform.python_version(),
        }

    def synchronise(self) -> None:
        torch.cuda.synchronize(self.device)

    def sample(self, case: Case, number: int) -> float:
        """Mean seconds of `number` calls, each with nothing of its own in the cache."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        total = 0.0
        for _ in range(number):
            case.prepare()
            self._cold.sum()  # read, not written: dirty lines would be written back at the expense of the call
            start.record()
            case.call()
            end.record()
            end.synchronize()
            total += start.elapsed_time(end) * 1e-3
        return total / number

    def graph(self, call: Callable) -> Callable:
        """The call, which must have run before, captured: what it returns replays it."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay


@contextlib.contextmanager
def arithmetic(name: str):
    """The torch.dtype of that name; inside, products and convolutions of float32 are IEEE unless the name is tf32."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    # not by the newer fp32_precision: torch.compile of torch 2.10 raises once that has been set
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = name == "tf32"
    try:
        yield DTYPES[name]
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


@triton.jit
def _nothing():
    pass


def ceilings(device, width: int = 8192, numel: int = 1 << 28) -> dict[str, float]:
    """What this device reaches, the best of ten: "copy" in byte/s (read + written), a product of random width x width
    matrices in flop/s per arithmetic, and seconds per launch of an empty kernel, back to back and in a graph.
    """

    def best(call: Callable) -> float:
        call()
        return min(device.sample(Case(call, float, 0), 1) for _ in range(10))

    a, b = (torch.randn(numel, device=device.device) for _ in range(2))
    found = {"copy": 2 * 4 * numel / best(lambda: a.copy_(b))}
    for name in DTYPES:
        with arithmetic(name) as dtype:
            A, B = (torch.randn(width, width, device=device.device).to(dtype) for _ in range(2))
            found[name] = 2 * width**3 / best(lambda A=A, B=B: A @ B)

    def launches() -> None:
        for _ in range(100):
            _nothing[(1,)]()

    found["launch"] = best(launches) / 100
    found["graph launch"] = best(device.graph(launches)) / 100
    return found
