"""The cost model's choice of routes against the clock, and the table of routes on GPUs."""

import json
import os

import pytest
import torch
from helpers.bench_devices import Host
from helpers.bench_records import RUN, results, time_record

import condlr_ext
from bench import tables, tune
from bench.__main__ import main
from bench.cases import routes
from bench.cases.layers import Conv, Linear
from bench.cases.routes import NetworkLayer
from bench.machine import Cpu
from bench.records import Results
from bench.registry import Row
from bench.runner import Options, measure
from condlr_ext import ops

(OPERATION,) = routes.OPERATIONS
FACTS = {"date": "2026-01-02", "columns": list(ops.tables.COLUMNS)}
OTHERS = [{"device": name, "rows": []} | FACTS for name in ("another", "Host (CPU)")]


def test_routes(tmp_path, capsys):
    file = tmp_path / "routes.jsonl"
    arguments = "routes --size smoke --device cpu --threads 1 --seconds-per-provider 0.01 --json".split()
    assert main([*arguments, str(file)]) == 0
    found = Results.read(file)
    plans = found.others["plan"]
    assert [plan["row"] for plan in plans[:2]] == [
        "LeNet5 1 x 1 -> 20 5x5/1 @28, r 4",
        "LeNet5 1 x 1 -> 20 5x5/1 @28, r 20",
    ]
    assert len(plans) == 2 + 2 + 3  # 0.19 of 20 is rank 4 too, of 50 rank 10
    rows = list(found.rows())
    kernels = [] if ops.COMPILED.ops_reason else ["ours: kernels"]
    for row in rows:
        own = kernels if "kernel" not in row[0]["shape"]["layer"] else []
        assert [r["provider"] for r in row] == ["ours: cpu", *own, "reference", "ours: merged", "dense"]
    both = [row for row in rows if row[0]["mode"] == "both"]
    assert ["dX" in row[0]["errors"] for row in both] == [False] * 2 + [True] * 5
    output = capsys.readouterr().out
    assert all(plan["row"] in output for plan in plans) and "7 choices are the faster route" in output


def test_regret():
    def records(row, route, *seconds):
        costs = dict(zip((*routes.ROUTES, "dense"), (1.0, 2.0, 3.0), strict=True))
        plan = {"kind": "plan", "op": "routes", "row": row, "dtype": "fp32", "threads": 1, "route": route}
        times = zip(("ours: cpu", "ours: merged", "dense"), seconds, strict=True)
        made = [
            time_record(p, "ours", t or 1, op="routes", row=row, mode="both", reason=None if t else "no")
            for p, t in times
        ]
        return made, plan | {"gain": 3.0, "costs": costs}

    made = [
        records("a", "factorized", 2.0, 1.0, 4.0),
        records("b", "merged", 2.0, 1.0, 4.0),
        records("c", "merged", 2.0, None, 4.0),
    ]
    found = results(*(r for times, _ in made for r in times), others=[plan for _, plan in made])
    rows = routes.regrets(found)
    assert [(r["row"], r["regret"], r["measured gain"]) for r in rows] == [("a", 1.0, 2.0), ("b", 0.0, 4.0)]
    lines = tables.plan_lines(found.others["plan"], found)
    assert lines[-1].startswith("  50 % of 2 choices are the faster route; regret: worst 100 %, mean 50 %")
    assert lines[1].split()[-4:] == ["100", "%", "2.00", "3.00"]


def test_plans_without_times_are_listed():
    plan = {"kind": "plan", "op": "linear", "row": "a", "dtype": "fp32", "route": "merged", "gain": 3.0}
    assert "merged" in tables.plan_lines([plan], results(others=[plan]))[1]


@pytest.mark.parametrize("size", ["smoke", "default", "full"])
def test_shapes(size):
    for device in (Cpu(), Host()):
        names = list(map(str, routes.shapes(size, device)))
        assert len(set(names)) == len(names) > 5


def gpu_records(shape: NetworkLayer) -> list[dict]:
    return list(measure(Row(OPERATION, shape, "fp32"), Host(), Options(seconds=0.0, rounds=1, extra=False)))


def test_the_table_of_a_gpu(tmp_path):
    shapes = [
        NetworkLayer("grid", layer)
        for layer in (Linear(33, 17, 20, 3), Linear(4, 17, 20, 3), Conv(2, 5, 6, 4, 3, 1, 1, 2))
    ]
    run = RUN | {"machine": Host().describe(), "versions": {"torch": torch.__version__}}
    file = tmp_path / "measured.json"
    file.write_text(json.dumps({"format": ops.tables.FORMAT, "tables": OTHERS}))
    found = Results([run, *(record for shape in shapes for record in gpu_records(shape))])
    assert tune.enter(found, file, "somebody") == (file, 6)
    data = json.loads(file.read_text())
    another, mine = data["tables"]
    assert data["format"] == ops.tables.FORMAT and another == OTHERS[0]
    assert mine["device"] == "Host (CPU)" and mine["capability"] == [0, 0] and mine["torch"] == torch.__version__
    assert set(mine) == {"device", "capability", "torch", "triton", "date", "commit", "origin", "columns", "rows"}
    assert mine["columns"] == "direction layer precision rows n m r kernels products merged dense".split()
    assert mine["origin"] == "somebody" and ops.tables.read(file)[1]["rows"] == mine["rows"]
    sizes = [
        ["conv", "float32", 32, 45, 6, 2],
        ["linear", "float32", 4, 17, 20, 3],
        ["linear", "float32", 33, 17, 20, 3],
    ]
    assert [row[:7] for row in mine["rows"]] == [[way, *size] for way in ("backward", "forward") for size in sizes]
    for row in mine["rows"]:
        assert all(1 < microseconds < 1e6 for microseconds in row[8:])
        assert json.dumps(row) in file.read_text()  # in a line of its own


def test_a_path_that_cannot_serve_is_null():
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("Triton interprets")
    found = gpu_records(NetworkLayer("grid", Linear(33, 17, 20, 3)))
    rows = tune.rows(Results([RUN | {"machine": Host().describe()}, *found]))
    assert [row[0] for row in rows] == ["backward", "forward"] and all(row[7] is None and row[10] > 0 for row in rows)


def test_results_without_times_of_routes(tmp_path):
    run = RUN | {"machine": Host().describe()}
    with pytest.raises(ValueError, match="no times of routes"):
        tune.enter(Results([run]), tmp_path / "measured.json")
    assert not list(tmp_path.iterdir())


def test_no_folder_for_the_table(tmp_path):
    run = RUN | {"machine": Host().describe()}
    found = gpu_records(NetworkLayer("grid", Linear(4, 17, 20, 3)))
    with pytest.raises(ValueError, match="CONDLR_EXT_TABLES is empty"):
        tune.enter(Results([run, *found]))


def test_tune_measures_and_the_package_chooses_by_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CONDLR_EXT_TABLES", str(tmp_path / "tables"))
    only = ["--only", "grid 16 x 64 -> 64, r 8", "--threads", "1", "--json", str(tmp_path / "run.jsonl")]
    try:
        assert main(["--tune", "--device", "cpu", "--rounds", "1", "--seconds-per-provider", "0.01", *only]) == 0
        (file,) = (tmp_path / "tables").iterdir()
        assert f"{file}: 2 rows" in capsys.readouterr().out
        layer = condlr_ext.LowRankLinear(64, 64, rank=8)
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        plan = layer.plan(torch.zeros(16, 64))
        torch.set_num_threads(before)
        assert plan.source.startswith("measured on ") and file.name in plan.source
    finally:
        ops.tables.reload()
