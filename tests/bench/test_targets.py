"""What was reached of the project's targets on CPUs, from a results file."""

import importlib
from pathlib import Path

import pytest

from bench import records

ROOT = Path(__file__).parents[2]


@pytest.fixture
def targets(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module("targets")


def time_record(op: str, row: str, mode: str, provider: str, seconds: float | None, cache: str = "warm") -> dict:
    record = {"kind": "time", "op": op, "row": row, "shape": {}, "dtype": "fp32", "mode": mode, "cache": cache}
    record |= {
        "threads": 2,
        "provider": provider,
        "role": "ours" if provider.startswith("ours") else "same",
        "work": [],
    }
    return record | {"seconds": seconds and [seconds] * 3}


def test_outcomes(targets):
    times = [
        time_record("train", "VGG16 20%", "iteration", "ours", 2.0),
        time_record("train", "VGG16 20%", "iteration", "ours compiled", 1.0),
        time_record("train", "VGG16 20%", "iteration", "dense", 4.0),
        time_record("train", "VGG16 20%", "iteration", "dense compiled", 2.5),
        time_record("train", "VGG16 20%", "iteration", "fast PyTorch", 0.1),
        time_record("train", "VGG16 20%", "forward", "dense", 9.0),
        time_record("step", "VGG16 20%", "call", "ours", 1.0),
        time_record("step", "VGG16 20%", "call", "released", None),
        time_record("clip", "16 x 16x16", "call", "ours", 1.0, cache="cold"),
        time_record("clip", "16 x 16x16", "call", "torch.linalg", 5.0, cache="cold"),
    ]
    found = targets.outcomes(records.Results([{"kind": "run", "format": records.FORMAT}, *times]))
    assert found == [("train", "VGG16 20%", 2, "dense compiled", 2.5, 3.0)]


def test_committed_results_have_every_target(targets):
    found = set()
    for file in (ROOT / "bench" / "results").glob("cpu-*.jsonl"):
        found |= {(op, row) for op, row, *_ in targets.outcomes(records.Results.read(file))}
    assert found == {(op, row) for op, row, *_ in targets.TARGETS}
