"""The GPU benchmark without a GPU: refuses to start, and its parts run on the interpreter with a clock of the CPU."""

import contextlib
import importlib
import inspect
import os
import re
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import cases, cuda, machine, runner
from bench.cases import linear_algebra
from bench.cases.linear_algebra import Batch
from bench.records import Results, key
from bench.registry import Operation, Provider, Row, Selection, TimedCall, Work

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "bench"


@pytest.fixture
def gpu(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("gpu")


class Host(cuda.Cuda):
    """A stand-in for the device: what a replay writes to stays the same, as in a graph."""

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


@pytest.fixture
def start(gpu, monkeypatch, tmp_path):
    """Makes the Run of these arguments."""

    def run(*arguments, seconds=60):
        options = gpu.parse(["--size", "smoke", "--dtypes", "fp32", "--json", str(tmp_path / "run.jsonl"), *arguments])
        return gpu.Run(Host(), options, time.monotonic() + seconds)

    monkeypatch.setattr(Host, "ceilings", lambda self, dtypes, quick: CEILINGS)
    return run


CEILINGS = {
    "copy": [[1 << 16, 2e10], [1 << 24, 1e10]],
    "threads": 1,
    "fp32": 1e10,
    "launch": 2e-6,
    "graph launch": 1e-6,
}


def replaced(run, **problems):
    """The registry of these operations, each with three shapes; problems: by name."""

    def of(name, problem):
        return Operation(name, "", lambda shape, dtype, device: problem(shape), lambda size, device: SHAPES)

    run.operations = {name: of(name, problem) for name, problem in problems.items()}


SHAPES = [Batch(n, n, n) for n in (1, 2, 3)]


def good(shape):
    call = TimedCall(lambda: None, lambda out: {"error": 0.0})
    return SimpleNamespace(
        providers={"ours": lambda: Provider({"call": call}, {"": 1.0}, "ours")}, work={"call": [Work(1, 1)]}
    )


# for a process of its own: Triton decides at import whether it interprets
DRIVER = f"""
import os, sys, time
from pathlib import Path
from types import SimpleNamespace
sys.path[:0] = [{str(ROOT)!r}, {str(BENCH)!r}, {str(ROOT / "tests")!r}]
import torch
torch.set_num_threads(1)
import dataclasses
import gpu
import interpreted
from bench import cuda, linear_algebra, runner
{inspect.getsource(Host)}
gpu.missing = lambda: None
gpu.LIMITS = {{"seconds": 0, "rounds": 1}}
cuda.Cuda = Host
cases.OPERATIONS = [  # an interpreted decomposition takes its time
    dataclasses.replace(operation, shapes=lambda *_: [linear_algebra.Batch(1, 4, 4)])
    if operation in linear_algebra.OPERATIONS
    else operation
    for operation in cases.OPERATIONS
]
sys.exit(gpu.main())
"""


def test_all_parts(gpu, tmp_path):
    """On the interpreter: every operation of the registry by every provider, but for whole networks' steps, which would
    take minutes of it.
    """
    environment = {k: v for k, v in os.environ.items() if k != "CONDLR_EXT_BACKEND"}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    parts = [name for name, part in gpu.PARTS.items() if name == "ceilings" or (part.operations and name != "step")]
    covered = {name for part in parts for name in gpu.PARTS[part].operations}
    arguments = ["--part", ",".join(parts), "--size", "smoke", "--dtypes", "fp32", "--compile", "none"]
    command = [sys.executable, "-c", DRIVER, *arguments, "--json", "run.jsonl"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    results = Results.read(tmp_path / "run.jsonl")
    assert results.run["machine"]["device"] == "Host (CPU)" and results.run["command"] == [*arguments, *command[-2:]]
    (found,) = results.others["ceilings"]
    assert {*machine.DTYPES, "launch", "graph launch"} < set(found)
    (cached, inside), (beyond, outside) = found["copy"]
    assert cached < beyond and min(inside, outside, *(found[name] for name in machine.DTYPES)) > 0
    assert [record["part"] for record in results.others["part"]] == parts
    rows = sum(record.get("rows", 0) for record in results.others["part"])
    assert {record["op"] for record in results.times} == covered
    assert rows == len({key(record)[:3] for record in results.times})
    for record in results.times:
        assert (record["seconds"] is None) == ("reason" in record)
        if record["provider"].startswith("ours") and not record["mode"].endswith(", graph"):
            low, median, high = record["seconds"]
            assert 0 < low <= median <= high and record["roofline"] > 0
        if record["seconds"]:
            assert all(error <= record["limits"][name] for name, error in record["errors"].items())
        assert record["cache"] == "cold"
    replayed = {r["provider"] for r in results.times if r["mode"] == "call, graph" and r["seconds"]}
    assert {"ours", "torch.linalg"} <= replayed
    assert "1 x 4x4" in done.stdout and done.stdout.endswith("run.jsonl\n")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_the_script_ends_with_one_line():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(BENCH / "gpu.py"), "--size", "smoke"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == "" and done.stderr.startswith("bench/gpu.py: no CUDA device (torch ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("package, title", [("torch", "PyTorch"), ("triton", "Triton"), ("numpy", "NumPy")])
def test_a_missing_package_is_named(gpu, monkeypatch, package, title):
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None if name == package else name)
    assert gpu.missing().startswith(f"{title} is not installed")


@pytest.mark.parametrize("package, version", [("torch", "2.9.1+cu128"), ("triton", "3.5.1")])
def test_an_old_package_is_named(gpu, monkeypatch, package, version):
    monkeypatch.setattr(importlib.import_module(package), "__version__", version)
    assert gpu.missing().startswith(f"{package} >= ") and gpu.missing().endswith(f"is needed, got {version}")


def test_the_interpreter_is_refused(gpu, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "interpreted, not measured" in gpu.missing()


def test_an_unknown_part_is_refused(gpu, capsys):
    with pytest.raises(SystemExit):
        gpu.parse(["--part", "layers,nothing"])
    assert "no part nothing; there are build, test" in capsys.readouterr().err


def test_parts_run_in_their_order(gpu):
    assert gpu.parse(["--part", "conv,build"]).part == ["build", "conv"]


def test_every_operation_has_its_part(gpu):
    named = [name for part in gpu.PARTS.values() for name in part.operations]
    assert sorted(named) == sorted(operation.name for operation in cases.OPERATIONS)


def test_what_has_a_target_comes_first(gpu, start):
    run = start("--size", "default")
    run.options.dtypes = []
    run.name, run.found = "", {}
    for part in gpu.PARTS.values():
        rows = [str(row) for row in gpu.selected(run, part)]
        assert [gpu.place(row, part.first) for row in rows[: len(part.first)]] == [*range(len(part.first))]
        chosen = Selection(part.operations).rows(run.operations.values(), run.device) if part.operations else []
        assert sorted(rows) == sorted(map(str, chosen))
        listed = [str(row) for row in chosen if gpu.place(str(row), part.first) == len(part.first)]
        assert len(rows) < 5 or rows[len(part.first) :] != listed  # but shuffled


def test_an_operation_that_is_missing_is_not_good(gpu, start):
    run = start()
    replaced(run, clip=good)
    run.part("clip", 0)
    assert run.failed == ["clip: the registry has no operation 'clip wild'"]
    assert {record["op"] for record in Results.read(run.file).times} == {"clip"}


def test_arithmetic_that_an_operation_lacks(start):
    run = start("--dtypes", "bf16")
    run.part("svd", 0)
    assert not run.failed and Results.read(run.file).others["part"] == [
        {"kind": "part", "part": "svd", "seconds": pytest.approx(0, abs=60), "rows": 0}
    ]


def test_the_deadline(gpu, start):
    run = start()

    def late(shape):
        run.until = 0
        return good(shape)

    replaced(run, polar=late)
    run.part("polar", 0)
    run.stop = 0
    run.part("conv", 0)
    results = Results.read(run.file)
    (measured,) = {record["row"] for record in results.times}
    polar, conv = results.others["part"]
    assert {f"polar {measured} fp32", *polar["left out"]} == {f"polar {shape} fp32" for shape in SHAPES}
    assert polar["rows"] == 1 and len(polar["left out"]) == 2 and conv["left out"] == ["all"]
    assert run.left == {"polar": polar["left out"], "conv": ["all"]} and not run.failed


def test_a_row_that_raises_is_not_good(start):
    """The other rows are measured."""
    run = start()

    class Raises(dict):
        def items(self):
            raise ArithmeticError("no\nproviders")

    def problem(shape):
        return SimpleNamespace(providers=Raises(), work={}) if shape.m == 2 else good(shape)

    replaced(run, polar=problem)
    run.part("polar", 0)
    assert run.failed == ["polar 2 x 2x2 fp32: ArithmeticError: no"]
    (part,) = Results.read(run.file).others["part"]
    assert part["errors"] == run.failed and part["rows"] == 2 and "left out" not in part


def test_a_lost_device_ends_the_part(start, monkeypatch, capsys):
    run = start()
    lost = []

    def synchronize():
        if lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def problem(shape):
        lost.append(shape)
        raise RuntimeError("CUDA error: launch failed")

    monkeypatch.setattr(run.device, "synchronize", synchronize)
    replaced(run, polar=problem, svd=good)
    run.part("polar", 1)
    run.part("svd", 0)
    assert len(lost) == 1
    assert [why.split(" ")[-2:] for why in run.failed[1:]] == [["raised", "RuntimeError"]] * 2
    assert run.failed[0].startswith(f"polar {lost[0]} fp32: RuntimeError: CUDA error")
    polar, svd = Results.read(run.file).others["part"]
    assert "illegal memory" in polar["error"] and len(polar["left out"]) == 2 and "illegal memory" in svd["error"]


def test_choices(start, monkeypatch, tmp_path):
    """Parts tune and table: what is left out is noted; a file is written only if that is asked for."""
    calls = []

    def function(device, dtypes, write, until, quick, **file):
        calls.append((dtypes, quick, file))
        write({"kind": "choice"})
        return ["a row"]

    monkeypatch.setitem(sys.modules, "gpu_choices", SimpleNamespace(tune=function, table=function, MEASURED="measured"))
    run = start("--write")
    run.part("tune", 0)
    run.part("table", 0)
    run.options.write, run.options.dtypes = False, []
    run.part("table", 0)
    assert calls == [(["fp32"], True, {}), (["fp32"], True, {"file": "measured"}), (["bf16", "fp32"], True, {})]
    results = Results.read(run.file)
    assert len(results.others["choice"]) == 3 and results.others["part"][0]["left out"] == ["a row"]
    assert set(run.left) == {"tune", "table"} and not run.failed


def test_ceilings_are_measured_once(start, monkeypatch, capsys):
    run = start()
    replaced(run, polar=good, svd=good)
    for name in ("svd", "ceilings", "polar"):
        run.part(name, 0)
    assert len(Results.read(run.file).others["ceilings"]) == 1
    assert capsys.readouterr().out.count("launch 2 us, graph launch 1 us") == 1


def test_without_ceilings_rows_are_measured(start, monkeypatch):
    def ceilings(self, dtypes, quick):
        raise MemoryError("too large")

    run = start()
    monkeypatch.setattr(Host, "ceilings", ceilings)
    replaced(run, polar=good)
    run.part("ceilings", 0)
    run.part("polar", 0)
    assert run.failed == ["ceilings raised MemoryError"] and len(Results.read(run.file).times) > 0


def test_red_tests_are_reported(gpu, start, monkeypatch, tmp_path, capsys):
    import gpu_setup

    file = tmp_path / "test_red.py"
    file.write_text(
        "import pytest\npytestmark = pytest.mark.gpu\ndef test_good(): pass\ndef test_bad(): assert 1 == 2\n"
    )
    tests = gpu_setup.test
    monkeypatch.setattr(gpu_setup, "test", lambda seconds: tests(seconds, [file]))
    run = start()
    run.part("test", 0)
    (found,) = Results.read(run.file).others["part"]
    assert found["counts"] == {"tests": 2, "failures": 1, "errors": 0, "skipped": 0}
    assert [name.split("::")[1] for name in found["failed"]] == ["test_bad"]
    assert run.failed == ["tests are red: 1 failed, 0 errors, status 1"]
    assert "assert 1 == 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    "status, skipped, why", [(None, 0, "tests: not finished in time"), (0, 3, "tests: none ran"), (0, 2, None)]
)
def test_tests_that_did_not_run_are_not_good(gpu, start, monkeypatch, status, skipped, why):
    import gpu_setup

    counts = {"tests": 3, "failures": 0, "errors": 0, "skipped": skipped}
    monkeypatch.setattr(gpu_setup, "test", lambda seconds: {"counts": counts, "failed": [], "status": status})
    run = start()
    run.part("test", 0)
    assert run.failed == ([why] if why else [])


def test_what_runs_too_long_is_killed_with_its_children(gpu):
    import gpu_setup

    start = time.monotonic()
    assert gpu_setup.execute(["sh", "-c", "echo before; sleep 60 & sleep 60"], 0.5) == (None, "before\n")
    told = "trap 'echo summary; exit 2' INT; echo before; while :; do sleep 0.1; done"
    assert gpu_setup.execute(["sh", "-c", told], 0.5, grace=5) == (None, "before\nsummary\n")
    deaf = "trap '' INT; echo before; sleep 60 & sleep 60"
    assert gpu_setup.execute(["sh", "-c", deaf], 0.5, grace=0.5) == (None, "before\n")
    assert time.monotonic() - start < 30


def test_a_build_that_fails_says_why(gpu, monkeypatch, capsys):
    import gpu_setup

    monkeypatch.setattr(gpu_setup, "execute", lambda command, seconds: (1, "configuring\nsetup.py: no cmake\n"))
    found = gpu_setup.build(60)
    assert found["built"] is False and found["reason"] == "setup.py: no cmake"
    assert capsys.readouterr().out == "without a new _C: setup.py: no cmake\n"


def test_a_whole_run(gpu, monkeypatch, tmp_path, capsys):
    """With the stand-in for the device: one part finds red tests, in one ours is wrong, and both are in the report."""
    import gpu_setup

    def wrong(A):
        return tuple(t * 1.01 for t in torch.linalg.qr(A))

    kind = linear_algebra.Kind(**(vars(linear_algebra.QR) | {"ours": wrong}))
    broken = linear_algebra.operation("qr", "", kind, lambda size, device: [Batch(2, 5, 5)])
    monkeypatch.setitem(gpu.PARTS, "qr", gpu.Part("", 1, ("qr",)))
    monkeypatch.setattr(cases, "OPERATIONS", (broken,))
    monkeypatch.setattr(gpu_setup, "execute", lambda command, seconds, grace=0: (1, "1 failed"))
    monkeypatch.setattr(gpu, "missing", lambda: None)
    monkeypatch.setattr(gpu.gc, "freeze", lambda: None)
    monkeypatch.setattr(cuda, "Cuda", Host)
    monkeypatch.setattr(Host, "ceilings", lambda self, dtypes, quick: CEILINGS)
    arguments = ["--part", "ceilings,qr,test,build", "--size", "smoke", "--json", str(tmp_path / "new.jsonl")]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert gpu.main() == 1
    results = Results.read(tmp_path / "new.jsonl")
    build, tests, *others = results.others["part"]
    assert [record["part"] for record in others] == ["ceilings", "qr"]
    assert (build["part"], build["built"], build["reason"]) == ("build", False, "1 failed")
    assert (tests["part"], tests["status"], tests["counts"]["tests"]) == ("test", 1, 0)
    assert results.run["machine"]["device"] == "Host (CPU)" and results.run["command"] == arguments
    output = capsys.readouterr().out
    assert output.count("tests are red: 0 failed, 0 errors, status 1") == 3  # with each later part, and at the end
    assert "NOT GOOD: qr 2 x 5x5 fp32 call ours: wrong: Q 4e-02 > " in output
    assert output.endswith(f"{tmp_path / 'new.jsonl'}\n")


def test_no_processes_beside_the_rows(start, monkeypatch):
    seen = []
    monkeypatch.setattr(runner, "run", lambda rows, device, options, *rest: seen.append(options) or [])
    start().part("svd", 0)
    assert seen and not any(options.extra for options in seen)


def test_a_lost_device_ends_the_process_and_not_the_run(gpu, monkeypatch, tmp_path):
    class Lost(Host):
        def synchronize(self):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    started = []
    run = SimpleNamespace(run=lambda command: started.append(command) or SimpleNamespace(returncode=0))
    monkeypatch.setattr(gpu, "subprocess", run)
    monkeypatch.setattr(gpu, "missing", lambda: None)
    monkeypatch.setattr(gpu.gc, "freeze", lambda: None)
    monkeypatch.setattr(cuda, "Cuda", Lost)
    arguments = ["--part", "svd,qr,polar", "--seconds", "100", "--dtypes", "fp32", "--json", str(tmp_path / "a.jsonl")]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert gpu.main() == 1
    (command,) = started
    options = gpu.parse(command[2:])
    assert options.part == ["qr", "polar"] and 0 < options.seconds <= 100 and options.dtypes == ["fp32"]
    assert options.json == tmp_path / "a-again.jsonl"
    (part,) = Results.read(tmp_path / "a.jsonl").others["part"]
    assert part["part"] == "svd" and "illegal memory access" in part["error"]


def test_only_what_is_ours_can_be_not_good(gpu):
    def record(provider, reason, mode="call"):
        made = {"op": "svd", "row": "1 x 1x1", "dtype": "fp32", "mode": mode, "provider": provider}
        return made | ({"reason": reason} if reason else {})

    good = [
        record("ours", None), record("torch.linalg", "wrong: A"), record("compiled", "ValueError"),
        record("ours: triton", "BackendError: above 256"), record("ours", "RuntimeError: waits", "call, graph"),
    ]  # fmt: skip
    bad = [record("ours", "MemoryError"), record("ours: triton", "wrong: A"), record("ours", "wrong: U", "call, graph")]
    assert gpu.not_good(SimpleNamespace(times=good)) == []
    assert [why.split(": ")[-1] for why in gpu.not_good(SimpleNamespace(times=good + bad))] == ["MemoryError", "A", "U"]


def test_files_are_named_after_device_and_parts(gpu):
    names = [
        gpu.default_file(gpu.parse(arguments), "nvidia-h100").relative_to(ROOT).as_posix()
        for arguments in ([], ["--part", "svd,qr", "--save"])
    ]
    assert re.fullmatch(r"runs/gpu-\d{4}-\d\d-\d\d-nvidia-h100\.jsonl", names[0])
    assert re.fullmatch(r"bench/results/gpu-\d{4}-\d\d-\d\d-nvidia-h100-svd-qr\.jsonl", names[1])


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
    """What happens in a capture; in its list of modes, how waiting for the device is taken."""
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
    monkeypatch.setattr(importlib.import_module("gc"), "isenabled", lambda: False)
    written = []
    assert runner.run([row, row], Host(), runner.Options(seconds=0, rounds=1), written.append) == []
    assert len(alive) == 2 and len(written) == 4


def broken(out, **changes):
    """The results with some of them changed."""
    return tuple(changes[str(i)](t) if str(i) in changes else t for i, t in enumerate(out))


def turned(t):
    return t.flip(-1)


def other_sign(t):
    return -t


def longer(t):
    return t * (1 + 1e-5)


def lost(t):
    return t * torch.nan


TURN = torch.matrix_exp(1e-3 * (torch.ones(6, 6).triu(1) - torch.ones(6, 6).tril(-1)))
KINDS = {name: getattr(linear_algebra, name) for name in ("SVD", "QR", "POLAR", "CLIP", "BASIS")}


def judged(problem, function):
    """What is found of a function of A in place of a provider."""
    return runner.judge(Host(), *made(problem, function))


def made(problem, function):
    provider = problem._provider(function, "ours")
    return provider, provider.calls["call"]


@pytest.mark.parametrize(
    "name, changes, why",
    [
        ("SVD", {"1": longer}, "A"),
        ("SVD", {"0": turned, "1": turned, "2": turned}, "order"),
        ("SVD", {"0": other_sign, "1": other_sign}, "order"),
        ("SVD", {"0": longer, "1": lambda t: t / (1 + 1e-5)}, "U"),
        ("SVD", {"2": longer, "1": lambda t: t / (1 + 1e-5)}, "V"),
        ("SVD", {"2": lost}, "finite"),
        ("QR", {"1": longer}, "A"),
        ("QR", {"0": longer, "1": lambda t: t / (1 + 1e-5)}, "Q"),
        ("QR", {"0": turned, "1": lambda t: t.flip(-2)}, "R"),
        ("POLAR", {"1": longer}, "A"),
        ("POLAR", {"0": other_sign, "1": other_sign}, "sign"),
        ("POLAR", {"0": lambda t: t @ TURN, "1": lambda t: TURN.mT @ t}, "H"),
        ("CLIP", {"0": longer}, "clipped"),
        ("CLIP", {"0": lost}, "finite"),
        ("CLIP", {"0": lambda t: t + 5e-5 * t[:, :1, :1].sign() * torch.eye(6)}, "clipped"),
        ("BASIS", {"0": longer}, "Q"),
        ("BASIS", {"0": lambda t: TURN @ t}, "span"),
    ],
)
def test_wrong_linear_algebra_gets_no_time(name, changes, why):
    kind = KINDS[name]
    shape = Batch(3, 6, 4) if name == "BASIS" else Batch(3, 6, 6)
    problem = linear_algebra.MatrixProblem(kind, shape, "fp32", Host())
    assert "reason" not in judged(problem, kind.torch)
    found = judged(problem, lambda A: broken(kind.torch(A), **changes))
    assert found["reason"].startswith("wrong: ") and f" {why} " in found["reason"]


def test_kappa_beyond_the_bound_is_wrong():
    """In one matrix that is clipped well but for it."""
    problem = linear_algebra.MatrixProblem(linear_algebra.CLIP, Batch(3, 6, 6), "fp32", Host())
    U, sigma, Vh = torch.linalg.svd(problem._exact[1])
    sigma[0] = 1.1 * (1 + 3e-5) * sigma[-1]
    wrong = problem._exact.clone()
    wrong[1] = (U * sigma) @ Vh
    provider, call = made(problem, lambda A: (wrong,))
    provider.limits = {"clipped": 1e-2, "kappa": 5e-6}
    assert runner.judge(Host(), provider, call)["reason"].startswith("wrong: kappa 3e-05")


def test_copies_of_matrices_are_checked_too():
    problem = linear_algebra.MatrixProblem(linear_algebra.CLIP, Batch(18, 4, 4), "fp32", Host())
    A = problem._A
    assert torch.equal(A[:2], A[16:]) and not torch.equal(A[0], A[1])

    def wrong_at_the_end(A):
        (out,) = linear_algebra.CLIP.torch(A)
        return (torch.cat((out[:17], out[:1])),)

    assert judged(problem, wrong_at_the_end)["reason"].startswith("wrong: clipped")


def test_what_is_judged_is_made_of_the_first_inputs():
    """However often the others of the sets were used before."""
    problem = linear_algebra.MatrixProblem(linear_algebra.QR, Batch(2, 5, 5), "fp32", Host())
    provider, call = made(problem, torch.linalg.qr)
    for _ in range(3):
        assert "reason" not in runner.judge(Host(), provider, call)
    call.run()
    assert "reason" not in runner.judge(Host(), provider, call)
    call.rewind = None
    assert {"reason" in runner.judge(Host(), provider, call) for _ in range(2)} == {False, True}


def test_memory_is_poisoned_between_providers(monkeypatch):
    """NaN of the sizes of a provider's results is written when these are gone: a caching allocator reuses their memory."""
    problem = linear_algebra.MatrixProblem(linear_algebra.QR, Batch(2, 7, 5), "fp32", Host())
    assert problem._limits  # made before what is watched here
    results, poison = [], []

    def provider(A):
        out = torch.linalg.qr(A)
        results.extend(map(weakref.ref, out))
        return out

    full = torch.full

    def recorded(size, value, **options):
        assert all(result() is None for result in results)
        poison.append(full(size, value, **options))
        return poison[-1]

    arguments = made(problem, provider)
    monkeypatch.setattr(torch, "full", recorded)
    assert "reason" not in runner.judge(Host(), *arguments)
    assert [t.shape for t in poison] == [(2, 7, 5), (2, 5, 5)] and all(t.isnan().all() for t in poison)


def test_nobody_waits_for_a_slow_baseline(monkeypatch):
    monkeypatch.setattr(linear_algebra, "PATIENCE", 0)
    problem = linear_algebra.MatrixProblem(linear_algebra.SVD, Batch(2, 5, 5), "fp32", Host())
    found = {r["provider"]: r for r in records(problem, monkeypatch) if r["mode"] == "call"}
    for name in ("torch.linalg", "reference"):
        assert found[name]["reason"] == "TimeoutError: a call would take 0 s"
    assert found["torch.linalg"]["seconds"] is None and found["ours"]["seconds"]
    assert found["ours: triton"]["reason"].startswith("BackendError: ")


@pytest.mark.parametrize("kind", [linear_algebra.SVD, linear_algebra.QR], ids=["svd", "qr"])
def test_cupy_where_it_is_installed(monkeypatch, kind):
    import numpy

    def found():
        problem = linear_algebra.MatrixProblem(kind, Batch(3, 7, 5), "fp32", Host())
        return {r["provider"]: r for r in records(problem, monkeypatch) if r["mode"] == "call"}

    monkeypatch.setattr(linear_algebra.importlib.util, "find_spec", lambda name: None)
    assert found()["CuPy"]["reason"] == "ImportError: cupy is not installed" and "NumPy" not in found()
    monkeypatch.setattr(linear_algebra.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "cupy", numpy)
    assert found()["CuPy"]["seconds"]
    problem = linear_algebra.MatrixProblem(kind, Batch(3, 7, 5), "fp32", Host())
    replayed = {r["provider"] for r in records(problem, monkeypatch) if r["mode"] == "call, graph"}
    assert "torch.linalg" in replayed and "CuPy" not in replayed  # it has streams of its own


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
