"""A CUDA device without one: samples, captures, replays; with one, its clock, graphs and memory."""

import contextlib
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from helpers.bench_devices import Host

from bench import cuda, machine, runner
from bench.cases.linear_algebra import Batch
from bench.registry import Operation, Provider, Row, TimedCall, Work


def good(shape):
    call = TimedCall(lambda: None, lambda out: {"error": 0.0})
    return SimpleNamespace(
        providers={"ours": lambda: Provider({"call": call}, {"": 1.0}, "ours")}, work={"call": [Work(1, 1)]}
    )


def test_arithmetic():
    def state():
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    before = state()
    with machine.arithmetic("tf32") as dtype:
        assert dtype == torch.float32 and state() == ("high", True)
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"  # what the kernels look at
    assert state() == before
    with machine.arithmetic("fp32"):
        assert torch.backends.cuda.matmul.fp32_precision == "ieee" and state() == ("highest", False)
    assert state() == before


class FakeCuda(cuda.Cuda):
    """A device with a clock that stands still but for the calls and what is done for them; it notes what happens."""

    device = torch.device("cpu")

    def __init__(self, monkeypatch):
        self.happened, self.now, self.clock = [], 0.0, 0.0
        self._worked, self._work = 0.0, [torch.ones(1, 1), torch.ones(1, 1)]
        self._driver = SimpleNamespace(get_empty_cache_for_benchmark=lambda: "cache", clear_cache=self._clear)
        device = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.time = device.now
                device.happened.append("event")

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return 1e3 * (end.time - self.time)

        def sleep(cycles):
            self.happened.append("slept")
            self.now += 1.0

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", sleep)
        monkeypatch.setattr(cuda.time, "monotonic", lambda: self.clock)

    def synchronize(self):
        self.happened.append("waited")
        self.clock += 0.02

    def _clear(self, cache):
        assert cache == "cache"
        self.happened.append("evicted")
        self.now += 1.0

    def call(self, seconds, prepared=False):
        seconds = iter(seconds)

        def run():
            self.happened.append("run")
            self.now += next(seconds)

        def prepare():
            self.happened.append("prepared")
            self.now += 1.0

        return TimedCall(run, dict, prepare if prepared else None)


def test_cold_samples(monkeypatch):
    once = ["evicted", "slept", "event", "run", "event"]
    device = FakeCuda(monkeypatch)
    assert device.seconds(device.call([2e-3]), 1, cold=True) == pytest.approx(2e-3)
    assert device.happened == [*once, "waited"]
    device = FakeCuda(monkeypatch)
    assert device.seconds(device.call([2.6e-4] + [2e-4] * 9 + [3e-4] * 10), 1, cold=True) == pytest.approx(3e-4)
    assert device.happened == [*once, "waited", *once * 19, "waited"]
    device = FakeCuda(monkeypatch)
    assert device.seconds(device.call([2e-4] * 5 + [9e-4] + [3e-4] * 5, True), 1, cold=True) == pytest.approx(3e-4)
    assert device.happened == ["prepared", *once, "waited", *["prepared", *once] * 10, "waited"]


def test_warm_samples(monkeypatch):
    device = FakeCuda(monkeypatch)
    assert device.seconds(device.call([1e-3, 2e-3, 9e-3]), 3, cold=False) == pytest.approx(4e-3)
    assert device.happened == ["event", *["run"] * 3, "event"]
    device = FakeCuda(monkeypatch)
    assert device.seconds(device.call([1e-3, 2e-3, 9e-3], True), 3, cold=False) == pytest.approx(2e-3)
    assert device.happened == [*["prepared", "slept", "event", "run", "event"] * 3, "waited"]


def test_the_device_works_before_it_is_timed(monkeypatch):
    """If it had nothing to do for a while: its clocks fall."""
    device = FakeCuda(monkeypatch)
    device.clock = 1.0
    device.seconds(device.call([1e-3]), 1, cold=False)
    assert device.happened == ["waited"] * 3 + ["event", "run", "event"]
    device.happened.clear()
    device.seconds(device.call([1e-3]), 1, cold=False)
    assert device.happened == ["event", "run", "event"]


@pytest.fixture
def capture(monkeypatch):
    """Stand-in for a capture, with the list of modes in which waiting for the device was set."""
    modes, happened = ["default"], []

    @contextlib.contextmanager
    def entered(name):
        happened.append(f"in {name}")
        yield
        happened.append(f"out of {name}")

    stream = SimpleNamespace(wait_stream=lambda other: happened.append("stream waits"), name="side")
    current = SimpleNamespace(wait_stream=lambda other: happened.append("current waits"), name="current")
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: entered(stream.name))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay="replay"))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: entered(f"capture on {stream.name}"))
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    return SimpleNamespace(modes=modes, happened=happened)


def test_a_capture(capture, monkeypatch):
    def run():
        capture.happened.append(f"run, waiting: {capture.modes[-1]}")
        return "out"

    call = TimedCall(run, dict, rewind=lambda: capture.happened.append("rewound"))
    assert FakeCuda(monkeypatch).graph(call) == ("replay", "out")
    assert capture.happened == [
        "stream waits", "in side", "run, waiting: error", "out of side", "current waits", "rewound",
        "in current", "in capture on side", "run, waiting: default", "out of capture on side", "out of current",
    ]  # fmt: skip


def test_what_waits_for_the_device_is_not_captured(capture, monkeypatch):
    def run():
        if capture.modes[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    with pytest.raises(RuntimeError, match="synchronizing"):
        FakeCuda(monkeypatch).graph(TimedCall(run, dict))
    assert capture.modes == ["default", "error", "default"] and "in capture on side" not in capture.happened


def records(problem, monkeypatch, device=None):
    operation = Operation("op", "", lambda *_: problem, lambda *_: [])
    limits = runner.Options(seconds=0, rounds=1)
    return list(runner.measure(Row(operation, Batch(1, 2, 2), "fp32"), device or Host(), limits))


def test_a_replay_that_does_nothing_gets_no_time(monkeypatch):
    """Nor what a capture left in the results for it."""
    call = TimedCall(lambda: torch.ones(3), lambda out: {"error": (out - 1).abs().max().item()})
    problem = SimpleNamespace(
        providers={"ours": lambda: Provider({"call": call}, {"": 1.0}, "ours")}, work={"call": [Work(1, 1)]}
    )
    direct, replayed = records(problem, monkeypatch)
    assert direct["seconds"] and replayed["mode"] == "call, graph" and replayed["seconds"]
    monkeypatch.setattr(Host, "graph", lambda self, call: (lambda: None, call.run()))
    direct, replayed = records(problem, monkeypatch)
    assert direct["seconds"] and replayed["seconds"] is None and replayed["reason"].startswith("wrong: error inf")


def test_what_cannot_be_captured_says_why(monkeypatch):
    def refused(self, call):
        raise RuntimeError("called a synchronizing CUDA operation")

    monkeypatch.setattr(Host, "graph", refused)
    direct, replayed = records(good(Batch(1, 2, 2)), monkeypatch)
    assert direct["seconds"] and replayed["seconds"] is None and replayed["error"] is None
    assert replayed["reason"] == "RuntimeError: called a synchronizing CUDA operation"


def test_problems_are_freed_before_the_next(monkeypatch):
    """They refer to themselves."""
    alive = []

    def problem(*_):
        assert all(tensor() is None for tensor in alive)
        found = good(None)
        found.A = torch.ones(3)
        found.itself = found
        alive.append(weakref.ref(found.A))
        return found

    row = Row(Operation("op", "", problem, lambda *_: []), Batch(1, 2, 2), "fp32")
    monkeypatch.setattr(gc, "isenabled", lambda: False)
    written = []
    for _ in range(2):
        written += runner.measure(row, Host(), runner.Options(seconds=0, rounds=1))
    assert len(alive) == 2 and len(written) == 4


@pytest.fixture
def device(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)  # as it is again afterwards
    return cuda.Cuda()


@pytest.mark.gpu
def test_a_graph_on_the_device(device):
    inputs = [torch.randn(64, 64, device=device.device) for _ in range(2)]
    turn = [0]

    def run():
        turn[0] += 1
        return inputs[turn[0] % 2] + 1

    replay, out = device.graph(TimedCall(run, dict, rewind=lambda: turn.__setitem__(0, -1)))
    out.fill_(torch.nan)
    replay()
    device.synchronize()
    assert torch.equal(out, inputs[0] + 1)


@pytest.mark.gpu
def test_what_waits_leaves_the_device_usable(device):
    x = torch.randn(64, device=device.device)
    stream = torch.cuda.current_stream()
    with pytest.raises(RuntimeError, match="synchronizing"):
        device.graph(TimedCall(lambda: x.sum().item(), dict))
    assert torch.cuda.current_stream() == stream
    torch.randn(64, device=device.device).sum().item()
    device.graph(TimedCall(lambda: x + 1, dict))


@pytest.mark.gpu
@pytest.mark.parametrize("cold", [False, True])
def test_seconds_on_the_device(device, cold):
    A = torch.randn(2048, 2048, device=device.device)
    one, ten = (TimedCall(lambda n=n: [A @ A for _ in range(n)], dict) for n in (1, 10))
    assert 0 < 3 * device.seconds(one, 1, cold) < device.seconds(ten, 1, cold)


@pytest.mark.gpu
def test_memory_on_the_device(device):
    kept = torch.empty(1 << 20, device=device.device)
    assert device.memory(TimedCall(lambda: kept + 1, dict)) == kept.numel() * 4
    assert 0 < device.free() < torch.cuda.get_device_properties(device.device).total_memory
