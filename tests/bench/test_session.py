"""Runs with a time limit, rows that raise, a lost device, and the reasons why a run was no success."""

import sys
import time
from types import SimpleNamespace

import pytest
import torch
from helpers.bench_devices import CEILINGS, Host

from bench import __main__ as cli
from bench import cases, cuda, prepare, runner
from bench.cases import linear_algebra
from bench.cases.linear_algebra import Batch
from bench.records import Results, Writer
from bench.registry import Operation, Provider, Row, TimedCall, Work
from bench.session import Session, defects

SHAPES = [Batch(n, n, n) for n in (1, 2, 3)]
LOST = "CUDA error: an illegal memory access was encountered"


def good(shape):
    call = TimedCall(lambda: None, lambda out: {"error": 0.0})
    return SimpleNamespace(
        providers={"ours": lambda: Provider({"call": call}, {"": 1.0}, "ours")}, work={"call": [Work(1, 1)]}
    )


def rows(shapes=SHAPES, headline=lambda shape: False, **problems):
    """Rows of an operation with each problem, by name."""
    found = []
    for name, problem in problems.items():
        operation = Operation(name, "", lambda s, dtype, device, p=problem: p(s), lambda *_: shapes, headline=headline)
        found += [Row(operation, shape, "fp32") for shape in shapes]
    return found


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run rows in a session with a limit and return (remaining operations, results)."""
    monkeypatch.setattr(Host, "ceilings", lambda self, dtypes, quick: CEILINGS)

    def run(rows, seconds=60.0, device=None):
        write = Writer(tmp_path / "run.jsonl")
        write({"kind": "run", "format": 2})
        options = runner.Options(seconds=0, rounds=1)
        left = Session(device or Host(), options, write, time.monotonic() + seconds).run(rows, [1])
        return left, Results.read(write.file)

    return run


def test_rows_left_out_for_lack_of_time(run, monkeypatch):
    now, done = [0.0], []
    monkeypatch.setattr("bench.session.time", SimpleNamespace(monotonic=lambda: now[0]))

    def slow(shape):
        done.append(shape)
        now[0] += 25.0
        return good(shape)

    measured = rows(svd=slow, polar=slow)
    write = []
    Session(Host(), runner.Options(seconds=0, rounds=1), write.append, 100.0).run(measured, [1])
    left = [record for record in write if record["kind"] == "left out"]
    # half of 100 s for the first operation, the rest for the second
    assert [(r["op"], r["count"], r["of"]) for r in left] == [("svd", 1, 3), ("polar", 1, 3)] and len(done) == 4
    assert all(set(r["rows"]) < {f"{r['op']} {shape} fp32" for shape in SHAPES} for r in left)


def test_no_time_at_all(run):
    left, results = run(rows(svd=good), seconds=-1)
    (record,) = results.others["left out"]
    assert left == [] and record["count"] == 3 and record["reason"] == "--seconds were over"
    assert not results.times and defects(results) == []


def test_shares_of_operations(monkeypatch):
    until = []
    monkeypatch.setattr(Session, "_operation", lambda self, rows, at: until.append(at))
    monkeypatch.setattr(Session, "_ceilings", lambda self, rows: None)
    operations = [Operation(name, "", good, lambda *_: [], share=share) for name, share in (("a", 1.0), ("b", 3.0))]
    monkeypatch.setattr("bench.session.time", SimpleNamespace(monotonic=lambda: 0.0))
    session = Session(Host(), runner.Options(), print, 100.0)
    session.run([Row(operation, SHAPES[0], "fp32") for operation in operations], [1])
    assert until == [25, 100]


def test_headlines_come_first_and_others_at_random(run):
    shapes = [Batch(1, n, n) for n in range(1, 13)]
    _, results = run(rows(shapes, lambda shape: shape.n in (7, 9), svd=good))
    order = [r["shape"]["n"] for r in results.times if r["mode"] == "call"]
    assert order[:2] == [7, 9] or order[:2] == [9, 7]
    assert sorted(order) == list(range(1, 13)) and order[2:] != sorted(order[2:])


def test_without_a_limit_rows_keep_their_order_and_ceilings_are_measured_twice(monkeypatch):
    monkeypatch.setattr(Host, "ceilings", lambda self, dtypes, quick: CEILINGS)
    written = []
    Session(Host(), runner.Options(seconds=0, rounds=1), written.append).run(rows(svd=good), [1])
    kinds = [record["kind"] for record in written]
    assert kinds[0] == kinds[-1] == "ceilings" and kinds.count("ceilings") == 2
    assert [r["shape"]["n"] for r in written if r.get("mode") == "call"] == [1, 2, 3]


def test_ceilings_of_a_limited_run_are_measured_once(run):
    assert len(run(rows(svd=good, polar=good))[1].others["ceilings"]) == 1


def test_without_ceilings_rows_are_measured(run, monkeypatch):
    def ceilings(self, dtypes, quick):
        raise MemoryError("too large")

    measured = rows(polar=good)
    monkeypatch.setattr(Host, "ceilings", ceilings)
    _, results = run(measured)
    assert len(results.times) == 6 and defects(results) == ["ceilings : MemoryError: too large"]


def test_a_row_that_raises_is_a_defect(run):
    """The other rows are measured."""

    class Raises(dict):
        def items(self):
            raise ArithmeticError("no\nproviders")

    def problem(shape):
        return SimpleNamespace(providers=Raises(), work={}) if shape.m == 2 else good(shape)

    left, results = run(rows(polar=problem))
    assert left == [] and defects(results) == ["polar 2 x 2x2: ArithmeticError: no"]
    assert {r["row"] for r in results.times} == {"1 x 1x1", "3 x 3x3"} and "left out" not in results.others


class Lost(Host):
    """Lost as soon as a row has been made."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def synchronize(self):
        if self.rows:
            raise RuntimeError(LOST)


def test_a_lost_device_ends_the_session(run):
    device = Lost()

    def problem(shape):
        device.rows.append(shape)
        raise RuntimeError("CUDA error: launch failed")

    left, results = run(rows(polar=problem, svd=good, qr=good), device=device)
    assert left == ["svd", "qr"] and len(device.rows) == 1 and not results.times
    assert defects(results) == [f"polar {device.rows[0]}: RuntimeError: {LOST}"]
    assert (
        results.others["left out"][0]["count"] == 2 and results.others["left out"][0]["reason"] == "the device failed"
    )


@pytest.fixture
def as_gpu(monkeypatch):
    """`python -m bench --device cuda` on the stand-in."""
    monkeypatch.setattr(prepare, "check", lambda: None)
    monkeypatch.setattr(cuda, "Cuda", Host)
    monkeypatch.setattr(Host, "ceilings", lambda self, dtypes, quick: CEILINGS)


def test_after_a_lost_device_the_run_goes_on_in_a_new_process(as_gpu, monkeypatch, tmp_path):
    started = []
    run = SimpleNamespace(run=lambda command, env: started.append(command) or SimpleNamespace(returncode=0))
    monkeypatch.setattr(cli, "subprocess", run)
    monkeypatch.setattr(Session, "run", lambda self, rows, threads: ["qr", "polar"])
    arguments = ["svd", "qr", "polar", "--seconds", "100", "--dtypes", "fp32", "--device", "cuda", "--no-prepare"]
    cli.main([*arguments, "--json", str(tmp_path / "a.jsonl")])
    (command,) = started
    assert command[:3] == [sys.executable, "-m", "bench"]
    options = cli.parse(command[3:])
    assert options.operations == ["qr", "polar"] and 0 < options.seconds <= 100 and options.dtypes == ["fp32"]
    assert options.device == "cuda" and options.prepare is False and options.json == str(tmp_path / "a-again.jsonl")


def test_a_whole_run_on_a_gpu(as_gpu, monkeypatch, tmp_path, capsys):
    """On the stand-in the tests are red, a result of ours is wrong, and the report has both."""

    def wrong(A):
        return tuple(t * 1.01 for t in torch.linalg.qr(A))

    kind = linear_algebra.Kind(**(vars(linear_algebra.QR) | {"ours": wrong}))
    broken = linear_algebra.operation("qr", "", kind, lambda size, device: [Batch(2, 5, 5)])
    monkeypatch.setattr(cases, "OPERATIONS", (broken,))
    monkeypatch.setattr(prepare, "execute", lambda command, seconds, grace=0: (1, "1 failed"))
    file = tmp_path / "new.jsonl"
    assert cli.main(["--device", "cuda", "--seconds", "60", "--size", "smoke", "--json", str(file)]) == 1
    results = Results.read(file)
    (build,), (tests,) = results.others["build"], results.others["tests"]
    assert build["built"] is False and build["reason"] == "1 failed" and tests["status"] == 1 and tests["tests"] == 0
    assert results.run["machine"]["device"] == "Host (CPU)"
    assert (
        results.run["command"] == "--size smoke --device cuda --seconds 60.0 --compile some --allocator default".split()
    )
    output = capsys.readouterr().out
    assert "NOT GOOD: tests are red: 0 failed, 0 errors, status 1\n" in output
    assert "NOT GOOD: qr 2 x 5x5 fp32 call ours: wrong: Q 4e-02 > " in output and output.endswith(f"{file}\n")


def test_a_limited_run_has_no_further_records(as_gpu, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(runner, "measure", lambda row, device, options: seen.append(options) or [])
    for limit in ([], ["--seconds", "60"]):
        cli.main(["svd", "--size", "smoke", "--device", "cpu", *limit, "--json", str(tmp_path / "a.jsonl")])
    assert {options.extra for options in seen[:1]} == {True} and {options.extra for options in seen[-1:]} == {False}
    assert seen[0].seconds == seen[-1].seconds == 0.1


def record(provider, reason, mode="call", op="svd"):
    made = {"op": op, "row": "1 x 1x1", "dtype": "fp32", "mode": mode, "provider": provider}
    return made | ({"reason": reason} if reason else {})


def test_defects_are_ours():
    good = [
        record("ours", None), record("torch.linalg", "wrong: A"), record("compiled", "ValueError"),
        record("ours: triton", "BackendError: above 256"), record("ours", "RuntimeError: waits", "call, graph"),
        record("ours", "MemoryError: needs 99 GiB", op="scaling"),
    ]  # fmt: skip
    bad = [record("ours", "MemoryError"), record("ours: triton", "wrong: A"), record("ours", "wrong: U", "call, graph")]
    assert defects(SimpleNamespace(times=good, others={})) == []
    found = defects(SimpleNamespace(times=good + bad, others={}))
    assert [why.split(": ")[-1] for why in found] == ["MemoryError", "A", "U"]


@pytest.mark.parametrize(
    "status, skipped, why",
    [
        (None, 0, "tests: not finished in time"),
        (1, 0, "tests are red: 1 failed, 0 errors, status 1"),
        (0, 3, "tests: none ran"),
        (0, 2, None),
    ],
)
def test_tests_that_did_not_pass_are_defects(status, skipped, why):
    tests = {"status": status, "tests": 3, "failures": 1, "errors": 0, "skipped": skipped}
    assert defects(SimpleNamespace(times=[], others={"tests": [tests]})) == ([why] if why else [])
