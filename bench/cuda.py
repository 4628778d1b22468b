"""A CUDA device as a benchmark device: clock, cold caches, graphs, memory, ceilings. Not yet run on a GPU."""

import contextlib
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable

import torch
import triton

from condlr_ext.info import collect

from .machine import arithmetic, slug
from .registry import TimedCall

BRIEF = 1e-3  # seconds below which a single run is too little for a sample
SLEEP = 2_000_000  # cycles, about a millisecond, in which the host prepares the launches of a run
REST = 0.05  # seconds without work after which the clocks may have fallen
RAMP = 0.05  # seconds of work that raise them


class Cuda:
    """The current CUDA device, with the methods of machine.Cpu and CUDA graphs."""

    kind, default_cache = "cuda", "cold"

    def __init__(self):
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._properties = torch.cuda.get_device_properties(self.device)
        self.name = self._properties.name
        self.slug = slug(self.name)
        self._driver = triton.runtime.driver.active
        self._worked = -REST
        torch.backends.cudnn.benchmark = True  # others at their best

    def describe(self) -> dict:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
        except (OSError, subprocess.CalledProcessError, IndexError):
            driver = None
        return {
            "device": self.name,
            "capability": [self._properties.major, self._properties.minor],
            "multiprocessors": self._properties.multi_processor_count,
            "memory": self._properties.total_memory,
            "cache": self._properties.L2_cache_size,
            "driver": driver,
            "cuda": torch.version.cuda or torch.version.hip,
            "build": collect()["build"],
        }

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def seconds(self, call: TimedCall, number: int, cold: bool) -> float:
        """Return the seconds of a run.

        Runs that need no preparation and have warm caches are timed back to back, and their mean is that of the slower
        of host and device. Other runs are timed apart, after a wait of the device in which the host prepares the
        launches: their median is the time of the device. Of a single brief run, more than one is timed.
        """
        self._wake()
        if not cold and not call.prepare:
            seconds = self._together(call, number)
        else:
            seconds = self._apart(call, number, cold)
            if number == 1 and seconds < BRIEF:
                seconds = self._apart(call, 10 if call.prepare else max(10, min(100, int(5e-3 / seconds))), cold)
        self._worked = time.monotonic()
        return seconds

    def _together(self, call: TimedCall, number: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(number):
            call.run()
        end.record()
        end.synchronize()
        return 1e-3 * start.elapsed_time(end) / number

    def _apart(self, call: TimedCall, number: int, cold: bool) -> float:
        events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(number)]
        for start, end in events:
            if call.prepare:
                call.prepare()
            if cold:
                self._evict()
            torch.cuda._sleep(SLEEP)
            start.record()
            call.run()
            end.record()
        self.synchronize()
        return 1e-3 * statistics.median(start.elapsed_time(end) for start, end in events)

    def _evict(self) -> None:
        """Overwrite the driver's buffer, as triton.testing.do_bench does."""
        if not hasattr(self, "_cold"):
            self._cold = self._driver.get_empty_cache_for_benchmark()
        self._driver.clear_cache(self._cold)

    def _wake(self) -> None:
        """Raise the clocks, which fall while the device waits for the host, as during the check of results."""
        if not hasattr(self, "_work"):
            self._work = [torch.ones(2048, 2048, device=self.device) for _ in range(2)]
        start = time.monotonic()
        while start - self._worked > REST and time.monotonic() < start + RAMP:
            torch.mm(self._work[0], self._work[0], out=self._work[1])
            self.synchronize()

    def graph(self, call: TimedCall) -> tuple[Callable, object]:
        """Capture the call in a CUDA graph, after one more run.

        Returns:
            A function that replays the call, and the results that each replay writes to.

        Raises:
            RuntimeError: The call waits for the device.
        """
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), _waits_refused():
            call.run()
        torch.cuda.current_stream().wait_stream(stream)
        if call.rewind:
            call.rewind()  # results are judged as those of the first inputs
        graph = torch.cuda.CUDAGraph()
        # the outer context: torch.cuda.graph leaves its stream the current one where a capture fails
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, stream=stream):
            out = call.run()
        return graph.replay, out

    def memory(self, call: TimedCall) -> int:
        """Return the bytes that a run and its preparation allocate at their peak."""
        before = torch.cuda.memory_allocated(self.device)
        if call.prepare:
            call.prepare()
        torch.cuda.reset_peak_memory_stats(self.device)
        call.run()
        return torch.cuda.max_memory_allocated(self.device) - before

    def free(self) -> int:
        """Return the bytes of memory that a problem may take."""
        kept = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return int(0.8 * (torch.cuda.mem_get_info(self.device)[0] + kept))

    def ceilings(self, dtypes: Iterable[str], quick: bool = False) -> dict:
        """Measure the rates that this device reaches, the best of many runs.

        Returns:
            "copy": [[bytes, byte/s], ...] of a copy within the L2 cache and one beyond, read and written bytes; flop/s
            of a product of random matrices per arithmetic; "launch" and "graph launch": seconds per launch of an empty
            kernel, back to back and in a graph; "threads".
        """

        def best(run: Callable) -> float:
            run()
            found, end = [], time.monotonic() + (0 if quick else 0.2)
            while len(found) < 10 or time.monotonic() < end:
                found.append(self.seconds(TimedCall(run, dict), 1, cold=False))
            return min(found)

        def repeated(run: Callable) -> Callable:
            def repeat() -> None:
                for _ in range(100):
                    run()

            return repeat

        def replayed(run: Callable) -> float:
            """Time one of a hundred in a graph, since a launch alone would take longer than what is launched."""
            replay, _ = self.graph(TimedCall(repeated(run), dict))
            return best(replay) / 100

        copies = []
        for size, time_of in ((self._properties.L2_cache_size // 2, replayed), (1 << (24 if quick else 31), best)):
            a, b = (torch.randn(size // 8, device=self.device) for _ in range(2))
            copies.append([size, size / time_of(lambda a=a, b=b: a.copy_(b))])
        found = {"copy": copies, "threads": torch.get_num_threads()}
        for name in dtypes:
            width = (4096 if name == "fp64" else 8192) // (32 if quick else 1)
            with arithmetic(name) as dtype:
                A, B = (torch.randn(width, width, device=self.device).to(dtype) for _ in range(2))
                found[name] = 2 * width**3 / best(lambda A=A, B=B: A @ B)

        def launch() -> None:
            _nothing[(1,)]()

        launch()
        return found | {"launch": best(repeated(launch)) / 100, "graph launch": replayed(launch)}


@contextlib.contextmanager
def _waits_refused():
    """Let waits for the device raise; in a capture they would leave PyTorch's allocator and generators capturing."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@triton.jit
def _nothing():
    pass
