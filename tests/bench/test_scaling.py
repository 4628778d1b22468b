"""Cost against size: fitted exponents, what theory says of them, and estimates beyond memory."""

import pytest

from bench import machine, records, runner
from bench.cases import scaling
from bench.registry import Row

(OPERATION,) = scaling.OPERATIONS


def time_record(value: int, seconds: float | None, flops: float, **changes) -> dict:
    (point,) = scaling.sweep("linear", "width", (value,), batch=2, rank=3)
    record = {
        "kind": "time", "op": "scaling", "row": str(point), "shape": vars(point), "dtype": "fp32", "mode": "both",
        "cache": "warm", "threads": 1, "provider": "ours", "role": "ours", "work": [[flops, 0]],
        "seconds": seconds and [seconds] * 3,
    }  # fmt: skip
    return record | changes


def results(*times: dict) -> records.Results:
    ceilings = {"kind": "ceilings", "threads": 1, "copy": [[1e9, 1e10]], "fp32": 1e9}
    return records.Results([{"kind": "run", "format": records.FORMAT}, ceilings, *times])


def test_exponents_are_those_of_the_upper_half():
    values = (2, 4, 8, 16, 32, 64)
    # a constant overhead below, width cubed above; the arithmetic says width squared
    found = scaling.fits(results(*(time_record(v, 1e-3 if v < 16 else 1e-6 * v**3, 5 * v**2) for v in values)))
    (fit,) = found
    assert (fit["subject"], fit["sweep"], fit["provider"], fit["mode"]) == ("linear", "width", "ours", "both")
    assert fit["exponent"] == pytest.approx(3) and fit["theory"] == pytest.approx(2)
    assert [v for v, _ in fit["points"]] == list(values) and fit["estimates"] == []


def test_two_points_fit_nothing():
    (fit,) = scaling.fits(results(*(time_record(v, 1e-3 * v, v) for v in (2, 4))))
    assert fit["exponent"] is None and fit["theory"] is None


def test_beyond_memory_the_theory_goes_on():
    times = [time_record(v, 1e-3 * v, 5 * v**2) for v in (2, 4, 8)]
    reason = {"reason": "MemoryError: needs about 9 GiB", "work": [], "role": None}
    wrong = {"reason": "wrong: Y 1e+00 > 1e-06", "provider": "other"}
    (fit,) = scaling.fits(results(*times, time_record(16, None, 0, **reason), time_record(32, None, 0, **wrong)))
    assert fit["estimates"] == [[16, pytest.approx(8e-3 * 2**2)]]


def test_what_does_not_fit_into_memory_is_not_tried():
    class Small(machine.Cpu):
        def free(self):
            return 1 << 20

    (point,) = scaling.sweep("linear", "width", (1 << 20,), batch=2, rank=3)
    (record,) = runner.measure(Row(OPERATION, point, "fp32"), Small(), runner.Options())
    assert record["seconds"] is None and record["reason"].startswith("MemoryError: needs about 49")


def test_every_subject_is_measured_right():
    points = [
        *scaling.sweep("linear", "batch", (3,), width=8, rank=2),
        *scaling.sweep("clip", "rank", (4,), layers=2),
        *scaling.sweep("step", "layers", (2,), width=8, rank=2),
        *scaling.sweep("iteration", "layers", (2,), batch=3, width=8, rank=2),
    ]
    others = {
        "linear": {"eager folded", "dense"},
        "clip": {"torch.linalg", "torch.linalg, eigh"},
        "step": {"fast PyTorch"},
    }
    others["iteration"] = {"dense", "fast PyTorch"}
    for point in points:
        found = list(runner.measure(Row(OPERATION, point, "fp32"), machine.Cpu(), runner.Options(0.01, 2)))
        assert {r["provider"] for r in found} == {"ours"} | others[point.subject]
        for record in found:
            assert record["seconds"] and record["error"] < 1e-5, record


def test_sweeps_cover_what_users_have():
    points = scaling.shapes("default", machine.Cpu())
    reached = {sweep: [p.value for p in points if p.sweep == sweep] for sweep in ("rank", "width", "layers", "batch")}
    ends = {sweep: (min(values), max(values)) for sweep, values in reached.items()}
    assert ends == {"rank": (8, 512), "width": (256, 16384), "layers": (1, 1000), "batch": (1, 65536)}
    assert len({str(p) for p in points}) == len(points)
