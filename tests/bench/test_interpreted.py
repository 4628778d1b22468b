"""Operations as on a GPU, with Triton's kernels in the interpreter, in a process of its own.

Triton decides at its import whether it interprets.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import cases, machine
from bench.cases import layers
from bench.records import Results, key

ROOT = Path(__file__).parents[2]
COMMON = """
import dataclasses, json, math, sys
import torch, triton
torch.set_num_threads(1)
torch.manual_seed(0)
from helpers import interpreted
from helpers.bench_devices import CpuAsCuda, Host
from bench import cases, cuda, prepare, runner
from bench.__main__ import main
from bench.cases import configurations, layers, linear_algebra, networks, steps
from bench.cases.layers import Conv, LayerProblem, Linear
from bench.machine import DTYPES
from bench.registry import Operation, Row
from bench.runner import Options, measure
from condlr_ext.kernels.triton.linear import configs
prepare.check = lambda: None
cuda.Cuda = Host
"""


def run(code: str, folder: Path, *arguments: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "CONDLR_EXT_BACKEND"}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command = [sys.executable, "-c", COMMON + code, *arguments]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


WHOLE = """
cases.OPERATIONS = [  # an interpreted decomposition takes its time
    dataclasses.replace(operation, shapes=lambda *_: [linear_algebra.Batch(1, 4, 4)])
    if operation in linear_algebra.OPERATIONS
    else operation
    for operation in cases.OPERATIONS
    if not operation.name.startswith("step") and operation.by_default
]
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_every_operation(tmp_path):
    """Every provider runs it; steps of whole networks, minutes in the interpreter, are left out."""
    arguments = "--size smoke --device cuda --dtypes fp32 --seconds 300 --compile none --no-prepare --json run.jsonl"
    output = run(WHOLE, tmp_path, *arguments.split())
    results = Results.read(tmp_path / "run.jsonl")
    assert results.run["machine"]["device"] == "Host (CPU)" and "left out" not in results.others
    (found,) = results.others["ceilings"]
    assert {"fp32", "launch", "graph launch"} < set(found)
    (cached, inside), (beyond, outside) = found["copy"]
    assert cached < beyond and min(inside, outside, found["fp32"]) > 0
    covered = {o.name for o in cases.OPERATIONS if o.by_default and not o.name.startswith("step")}
    assert {record["op"] for record in results.times} == covered
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
    assert "1 x 4x4" in output and output.endswith("run.jsonl\n") and len({key(r)[:3] for r in results.times}) > 10


PARTS = """
found = {"ceilings": Host().ceilings(DTYPES, quick=True), "layers": [], "configurations": [], "step": []}
networks.NETWORKS["tiny"] = networks.Network(lambda: torch.nn.Sequential(torch.nn.Linear(6, 5)), (2, 6))
row = Row(steps.OPERATIONS[0], networks.NetworkRank("tiny", 2), "fp32")
found["step"] += measure(row, CpuAsCuda(), Options(seconds=0.0, rounds=1, providers=("ours: triton",)))

runner.SHORT = math.inf  # all calls are replayed that can be
operation = Operation("layer", "", LayerProblem, lambda size, device: [], layers.MODES)
options = Options(seconds=0.01, rounds=1, compile="none", providers=("ours: triton", "dense"))
for shape in Linear(33, 17, 20, 3), Linear(1, 16, 24, 8), Conv(2, 4, 6, 5, 3, 2, 1, 3), Conv(2, 5, 6, 4, 1, 1, 0, 4):
    found["layers"] += measure(Row(operation, shape, "fp32"), Host(), options)

listed = configs.of
good = triton.Config(dict(BLOCK_B=16, BLOCK_N=16, BLOCK_M=16, CORE=16))
bad = triton.Config(dict(BLOCK_B=16, BLOCK_N=16, BLOCK_M=16, NO_SUCH=16))
configs.of = lambda kernel, *args: listed(kernel, *args)[:1] + ([good, bad] if kernel == "chain" else [])
(operation,) = configurations.OPERATIONS
for shape in operation.shapes("smoke", Host()):
    found["configurations"] += measure(Row(operation, shape, "fp32"), Host(), Options(seconds=0, rounds=1))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return json.loads(run(PARTS, tmp_path_factory.mktemp("parts")))


@pytest.mark.slow
def test_ceilings_in_every_arithmetic(found):
    assert all(found["ceilings"][name] > 0 for name in machine.DTYPES)


@pytest.mark.slow
def test_layers(found):
    records = found["layers"]
    rows = [[r for r in records if r["row"] == row] for row in dict.fromkeys(r["row"] for r in records)]
    assert len(rows) == 4
    for row in rows:
        for mode in layers.MODES:
            providers = {r["provider"]: r for r in row if r["mode"] == mode}
            assert set(providers) == {"ours", "ours: triton", "dense"}
            for r in providers.values():
                assert r["seconds"][1] > 0 and r["error"] < 1e-6 and r["cache"] == "cold"
        for mode in ("forward, graph", "both, graph"):
            replays = {r["provider"]: r for r in row if r["mode"] == mode}
            assert set(replays) == set(providers) and all(r["seconds"] for r in replays.values())
        assert not [r for r in row if r["mode"] == "backward, graph"]


@pytest.mark.slow
def test_configurations(found):
    records = [r for r in found["configurations"] if r["mode"] == "call"]
    assert {r["row"] for r in records} == {f"{kernel} 33 x 17 -> 20, r 3" for kernel in ("chain", "sums")}
    default, other, failing = (r for r in records if r["shape"]["kernel"] == "chain")
    assert default["provider"] == "ours" and default["seconds"] and default["error"] < 1e-6
    assert "BLOCK_N: 16" in other["provider"] and other["seconds"] and other["error"] < 1e-6
    assert failing["seconds"] is None and failing["reason"].startswith("TypeError: ")
    (sums,) = (r for r in records if r["shape"]["kernel"] == "sums")
    assert set(default["errors"]) == {"Y"} and set(sums["errors"]) == {"dU", "dS", "dV", "db"} and sums["seconds"]


@pytest.mark.slow
def test_the_step(found):
    times = {r["provider"]: r for r in found["step"] if r["kind"] == "time" and r["mode"] == "call"}
    assert set(times) == {"ours", "ours: triton"}
    assert all(r["seconds"] and 0 < r["error"] < 1e-5 for r in times.values())


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton interprets")
def test_configurations_are_of_a_gpu():
    (operation,) = cases.configurations.OPERATIONS
    assert operation.shapes("default", machine.Cpu()) == []
