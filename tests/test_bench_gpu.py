"""The GPU benchmark without a GPU: refuses to start, and its parts run on the interpreter with a clock of the CPU."""

import ast
import importlib
import inspect
import json
import os
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "bench"


@pytest.fixture
def gpu(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("gpu")


class Host:
    """A stand-in for the device."""

    device, name = torch.device("cpu"), "Host (CPU)"

    def describe(self):
        return {"device": self.name, "capability": [0, 0], "torch": torch.__version__, "triton": "interpreted"}

    def synchronise(self):
        pass

    def graph(self, call):
        return call

    def sample(self, case, number):
        case.prepare()
        start = time.perf_counter()
        case.call()
        return time.perf_counter() - start


CEILINGS = {"copy": 1e10, "fp32": 1e10, "launch": 1e-6}


@pytest.fixture
def run(gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu.Run, "ceilings", CEILINGS)
    return gpu.Run(Host(), gpu.parse(["--dtypes", "fp32"]), tmp_path / "record.json")


def part(run, function, *arguments) -> dict:
    """What one part finds, with a minute for it."""
    run.name, run.until, run.found = function.__name__, time.monotonic() + 60, {}
    run.record["parts"][run.name] = run.found
    function(run, *arguments)
    run.write()
    return json.loads(run.file.read_text())["parts"][run.name]


# for a process of its own: Triton decides at import whether it interprets
DRIVER = f"""
import json, pathlib, sys, time
sys.path[:0] = [{str(ROOT)!r}, {str(BENCH)!r}]
import torch
torch.set_num_threads(1)
torch.manual_seed(0)
import gpu, gpu_choices, gpu_device, gpu_layers, gpu_linalg, gpu_step
from gpu_layers import Conv, Linear
from gpu_linalg import Batch
from networks import Network
{inspect.getsource(Host)}
{inspect.getsource(part)}
gpu.Run.ceilings = {CEILINGS}
run = gpu.Run(Host(), gpu.parse(["--dtypes", "fp32"]), pathlib.Path("record.json"))
"""


def drive(folder: Path, code: str) -> tuple[dict, str]:
    """The record and the output of a driver that ends with this code; its kernels are interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "CONDLR_EXT_BACKEND"}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", DRIVER + code]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "record.json").read_text()), done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_the_script_ends_with_one_line():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(BENCH / "gpu.py"), "--quick"]
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


def test_layers_and_convolutions(tmp_path):
    record, output = drive(
        tmp_path,
        """
part(run, gpu_layers.layers, [Linear(33, 17, 20, 3), Linear(1, 16, 24, 8)])
part(run, gpu_layers.conv, [Conv(2, 4, 6, 5, 3, 2, 1, 3), Conv(2, 5, 6, 4, 1, 1, 0, 4)])
""",
    )
    for part in ("layers", "conv"):
        assert len(record["parts"][part]["rows"]) == 2
        for row in record["parts"][part]["rows"]:
            assert set(row["providers"]) == {"triton", "auto", "merged", "eager", "eager folded", "dense"}
            for found in row["providers"].values():
                assert found["error"] < 1e-6
                for mode in ("forward", "backward", "both"):
                    low, median, high = found[mode]
                    assert 0 < low <= median <= high
            assert row["ours"] == "triton"
            for mode in ("forward", "backward", "both"):
                assert row["modes"][mode]["ratio"] > 0 and row["modes"][mode]["over floor"] > 0
            assert row["row"] in output
    assert "ours wins" in output


def test_what_is_wrong_or_fails_gets_no_time(run, monkeypatch, capsys):
    import gpu_layers

    class Linear(gpu_layers.Linear):
        def folded(self, x, U, S, V, bias):
            return super().folded(x, U, S, V, bias * (1 + 1e-4))

        def ours(self, x, U, S, V, bias, route="auto"):
            return super().three_products(x, U, S, V, bias) * torch.nan

        def dense(self, *tensors):
            raise ArithmeticError("no dense layer")

    (row,) = part(run, gpu_layers.layers, [Linear(33, 17, 20, 3)])["rows"]
    found = row["providers"]
    assert found["eager"]["both"] and "reason" not in found["eager"]
    assert found["eager folded"]["reason"].startswith("wrong: ") and 1e-5 < found["eager folded"]["error"] < 1e-3
    assert found["merged"]["reason"].startswith("wrong: ") and found["merged"]["error"] is None
    assert found["dense"] == {"reason": "ArithmeticError: no dense layer"}
    assert row["ours"] is None and not any("both" in f or "graph" in f for name, f in found.items() if name != "eager")
    assert "no time in 1 rows: dense: ArithmeticError: no dense layer" in capsys.readouterr().out


def test_memory_is_poisoned_between_providers(run, monkeypatch):
    """NaN of the sizes of a provider's results is written when these are gone: a caching allocator reuses their memory."""
    import gpu_layers

    problem = gpu_layers.Problem(gpu_layers.Linear(64, 32, 16, 4), "fp32", Host())
    exact, results, poison = {"Y": torch.randn(7, 5)}, [], []

    def provider():
        out = exact["Y"].clone()
        results.append(weakref.ref(out))
        return {"Y": out}

    full = torch.full

    def recorded(size, value, **options):
        assert results[0]() is None
        poison.append(full(size, value, **options))
        return poison[-1]

    monkeypatch.setattr(torch, "full", recorded)
    assert problem.judge(provider, lambda: exact) == {"error": 0.0}
    (nan,) = poison
    assert nan.shape == (7, 5) and nan.dtype == torch.float32 and nan.isnan().all()


def test_the_deadline(run, monkeypatch):
    import gpu_layers

    def measure(run, shape, name, names):
        run.until = 0
        return {"row": str(shape), "dtype": name, "ours": None, "providers": {}}

    monkeypatch.setattr(gpu_layers, "measure", measure)
    (row,) = part(run, gpu_layers.layers, [gpu_layers.Linear(33, 17, 20, r) for r in (1, 2, 3)])["rows"]
    run.stop = 0
    run.part("conv", 0)
    left = json.loads(run.file.read_text())["left out"]
    assert {row["row"] + " fp32", *left["layers"]} == {f"33 x 17 -> 20, r {r} fp32" for r in (1, 2, 3)}
    assert len(left["layers"]) == 2 and left["conv"] == "all"


def test_red_tests_are_reported(run, tmp_path, capsys):
    import gpu_setup

    file = tmp_path / "test_red.py"
    file.write_text(
        "import pytest\npytestmark = pytest.mark.gpu\ndef test_good(): pass\ndef test_bad(): assert 1 == 2\n"
    )
    found = part(run, gpu_setup.test, [file])
    assert found["counts"] == {"tests": 2, "failures": 1, "errors": 0, "skipped": 0}
    assert [name.split("::")[1] for name in found["failed"]] == ["test_bad"]
    assert run.failed == ["tests are red: 1 failed, 0 errors, status 1"]
    assert "assert 1 == 2" in capsys.readouterr().out


def test_what_runs_too_long_is_killed_with_its_children(gpu):
    import gpu_setup

    start = time.monotonic()
    assert gpu_setup.execute(["sh", "-c", "echo before; sleep 60 & sleep 60"], 0.5) == (None, "before\n")
    assert time.monotonic() - start < 30


def test_a_build_that_fails_says_why(run, monkeypatch):
    import gpu_setup

    monkeypatch.setattr(gpu_setup, "execute", lambda command, seconds: (1, "configuring\nsetup.py: no cmake\n"))
    found = part(run, gpu_setup.build)
    assert found["built"] is False and found["reason"] == "setup.py: no cmake" and not run.failed


def test_tune(tmp_path):
    record, output = drive(
        tmp_path,
        """
import triton
from condlr_ext.kernels.triton import configs
listed = configs.of
good = triton.Config(dict(BLOCK_B=16, BLOCK_N=16, BLOCK_M=16, CORE=16))
bad = triton.Config(dict(BLOCK_B=16, BLOCK_N=16, BLOCK_M=16, NO_SUCH=16))
configs.of = lambda kernel, *args: listed(kernel, *args)[:1] + ([good, bad] if kernel == "chain" else [])
part(run, gpu_choices.tune, [Linear(33, 17, 20, 3)])
""",
    )
    rows = record["parts"]["tune"]["rows"]
    assert [row["kernel"] for row in rows] == ["chain", "sums", "combine"]
    default, other, failing = rows[0]["configs"]
    assert default["seconds"] and other["seconds"] and default["error"] < 1e-6 and other["error"] < 1e-6
    assert "seconds" not in failing and failing["reason"].startswith("TypeError: ")
    assert all(row["configs"][0]["seconds"] for row in rows)
    assert output.count("33 x 17 -> 20, r 3") == 3


def test_table(tmp_path):
    measured = tmp_path / "measured.json"
    others = [
        {"device": "another", "rows": []},
        {"device": "Host (CPU)", "rows": [["old"]]},
    ]
    measured.write_text(json.dumps({"format": 1, "tables": others}))
    drive(
        tmp_path,
        """
run.options.write = True
shapes = [Linear(33, 17, 20, 3), Linear(4, 17, 20, 3), Conv(2, 5, 6, 4, 3, 1, 1, 2)]
part(run, gpu_choices.table, shapes, pathlib.Path("measured.json"))
""",
    )
    found = json.loads(measured.read_text())
    assert found["format"] == 1
    another, mine = found["tables"]
    assert another == others[0]
    assert mine["device"] == "Host (CPU)" and mine["capability"] == [0, 0] and mine["torch"] == torch.__version__
    assert mine["columns"] == "direction layer precision rows n m r triton products merged dense".split()
    sizes = [
        ["conv", "float32", 32, 45, 6, 2],
        ["linear", "float32", 4, 17, 20, 3],
        ["linear", "float32", 33, 17, 20, 3],
    ]
    assert [row[:7] for row in mine["rows"]] == [[way, *size] for way in ("backward", "forward") for size in sizes]
    for row in mine["rows"]:
        assert all(microseconds > 1 for microseconds in row[7:])


def test_a_whole_run(gpu, run, monkeypatch, tmp_path, capsys):
    """With the stand-in for the device: one part finds red tests, one raises, and both are in the end's report."""
    import gpu_device
    import gpu_layers
    import gpu_setup

    def broken(run):
        raise ArithmeticError("lost")

    monkeypatch.setattr(gpu_layers, "layers", broken)
    monkeypatch.setattr(gpu_setup, "execute", lambda command, seconds: (1, "1 failed"))
    monkeypatch.setattr(gpu, "missing", lambda: None)
    monkeypatch.setattr(gpu_device, "Cuda", Host)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--part", "ceilings,layers,test", "--json", str(tmp_path / "new.json")])
    assert gpu.main() == 1
    record = json.loads((tmp_path / "new.json").read_text())
    assert list(record["parts"]) == ["test", "ceilings", "layers"]
    assert record["parts"]["layers"]["error"] == "ArithmeticError: lost" and record["parts"]["test"]["status"] == 1
    assert record["machine"]["device"] == "Host (CPU)" and record["format"] == 1 and record["date"]
    output = capsys.readouterr().out
    assert output.count("tests are red: 0 failed, 0 errors, status 1") == 3  # with each later part, and at the end
    assert "NOT GOOD: layers raised ArithmeticError" in output and "10 GB/s" in output


def test_ceilings(tmp_path):
    _, output = drive(tmp_path, "print(*gpu_device.ceilings(Host(), 32, 1 << 10).items(), sep='\\n'); run.write()")
    found = dict(map(ast.literal_eval, output.splitlines()))
    assert set(found) == {"copy", "bf16", "fp32", "tf32", "launch", "graph launch"} and min(found.values()) > 0


def test_arithmetic(gpu):
    import gpu_device

    def state():
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    before = state()
    with gpu_device.arithmetic("tf32") as dtype:
        assert dtype == torch.float32 and state() == ("high", True)
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"  # what the kernels look at
    assert state() == before
    with gpu_device.arithmetic("fp32"):
        assert torch.backends.cuda.matmul.fp32_precision == "ieee" and state() == ("highest", False)
    assert state() == before


def test_comparison_and_floors(gpu):
    import gpu_layers
    from timing import Rates

    works = gpu_layers.work(gpu_layers.Linear(rows=2, n=3, m=5, r=1), 4)
    factors, x, y = 1 * (3 + 1 + 5) + 5, 6, 10
    assert works["forward"].bytes == 4 * (x + y + factors) and works["backward"].bytes == 4 * (2 * x + y + 2 * factors)
    # X V, P Sᵀ, T Uᵀ; Q, dX, dU, dV, and the core twice
    assert works["forward"].flops == 12 + 4 + 20 and works["backward"].flops == 2 * (12 + 20) + 8
    conv = gpu_layers.Conv(batch=2, channels=3, m=5, side=8, kernel=3, stride=2, padding=1, r=1)
    assert (conv.rows, conv.n) == (2 * 16, 27)
    assert gpu_layers.work(conv, 1)["forward"].bytes == 2 * 3 * 64 + 32 * 5 + (27 + 5 + 1) + 5

    seconds = {"triton": 2.0, "auto": 1.0, "eager": 6.0, "eager folded": 4.0, "dense": 8.0}
    found = {name: {"both": [0, t, 9]} for name, t in seconds.items()} | {"compiled": {"reason": "slow"}}
    result = gpu_layers.compare(found, works, Rates(flops=1e9, bytes=1.0))
    assert result["ours"] == "triton" and set(result["modes"]) == {"both"}
    both, moved = result["modes"]["both"], works["forward"].bytes + works["backward"].bytes
    assert (both["best"], both["ratio"], both["dense ratio"]) == ("eager folded", 2.0, 4.0)
    assert (both["floor"], both["over floor"], both["bytes per second"]) == (moved, 2 / moved, moved / 2)
    del found["triton"]["both"]
    assert gpu_layers.compare(found, works, Rates(1e9, 1.0))["ours"] == "auto"


def test_linear_algebra(tmp_path):
    record, output = drive(
        tmp_path,
        """
part(run, gpu_linalg.svd, [Batch(2, 5, 5), Batch(17, 3, 3)])
part(run, gpu_linalg.qr, [Batch(2, 5, 5), Batch(1, 40, 5)])
part(run, gpu_linalg.polar, [Batch(2, 5, 5)])
part(run, gpu_linalg.clip, [Batch(2, 5, 5)])
""",
    )
    rows = {name: record["parts"][name]["rows"] for name in ("svd", "qr", "polar", "clip")}
    assert {name: len(found) for name, found in rows.items()} == {"svd": 2, "qr": 2, "polar": 1, "clip": 2}
    assert {row["operation"] for row in rows["clip"]} == {"clip", "clip wild"}
    for row in sum(rows.values(), []):
        found = row["providers"]
        assert set(found) == {"triton", "auto", "torch.linalg"} and row["ours"] == "triton"
        for provider in found.values():
            low, median, high = provider["seconds"]
            assert 0 < low <= median <= high
            assert all(error <= row["limits"][key] < 1e-5 for key, error in provider["errors"].items())
        assert found["triton"]["graph"] and row["ratios"]["graph"]["torch.linalg"] > 0 and row["over floor"] > 0
        assert row["row"] in output
    assert output.count("ours wins 0 of") == 4


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


@pytest.mark.parametrize(
    "name, changes, why",
    [
        ("svd", {"1": longer}, "A"),
        ("svd", {"0": turned, "1": turned, "2": turned}, "order"),
        ("svd", {"0": other_sign, "1": other_sign}, "order"),
        ("svd", {"0": longer, "1": lambda t: t / (1 + 1e-5)}, "U"),
        ("svd", {"2": longer, "1": lambda t: t / (1 + 1e-5)}, "V"),
        ("svd", {"2": lost}, "A"),
        ("qr", {"1": longer}, "A"),
        ("qr", {"0": longer, "1": lambda t: t / (1 + 1e-5)}, "Q"),
        ("qr", {"0": turned, "1": lambda t: t.flip(-2)}, "R"),
        ("polar", {"1": longer}, "A"),
        ("polar", {"0": other_sign, "1": other_sign}, "sign"),
        ("polar", {"0": lambda t: t @ TURN, "1": lambda t: TURN.mT @ t}, "H"),
        ("clip", {"0": longer}, "clipped"),
        ("clip", {"0": lost}, "clipped"),
        ("clip", {"0": lambda t: t + 5e-5 * t[:, :1, :1].sign() * torch.eye(6)}, "clipped"),
    ],
)
def test_wrong_linear_algebra_gets_no_time(gpu, name, changes, why):
    import gpu_linalg

    operation = gpu_linalg.OPERATIONS[name]
    A = operation.matrices(gpu_linalg.Batch(3, 6, 6))
    exact = operation.exact(A)
    limits, _ = gpu_linalg.limits_by_torch(Host(), operation, A, exact)
    arguments = A, exact, limits
    assert "reason" not in gpu_linalg.judge(Host(), operation, operation.torch, *arguments)
    found = gpu_linalg.judge(Host(), operation, lambda A: broken(operation.torch(A), **changes), *arguments)
    assert found["reason"].startswith("wrong: ") and f" {why} " in found["reason"]


def test_kappa_beyond_the_bound_is_wrong(gpu):
    """In one matrix that is clipped well but for it."""
    import gpu_linalg

    operation = gpu_linalg.OPERATIONS["clip"]
    A = operation.matrices(gpu_linalg.Batch(3, 6, 6))
    exact = operation.exact(A)
    U, sigma, Vh = torch.linalg.svd(exact[1])
    sigma[0] = 1.1 * (1 + 3e-5) * sigma[-1]
    wrong = exact.clone()
    wrong[1] = (U * sigma) @ Vh
    found = gpu_linalg.judge(Host(), operation, lambda A: (wrong,), A, exact, {"clipped": 1e-2, "kappa": 5e-6})
    assert found["reason"].startswith("wrong: kappa 3e-05")


def test_copies_of_matrices_are_checked_too(gpu):
    import gpu_linalg

    operation = gpu_linalg.OPERATIONS["clip"]
    A = operation.matrices(gpu_linalg.Batch(18, 4, 4))
    assert torch.equal(A[:2], A[16:]) and not torch.equal(A[0], A[1])

    def wrong_at_the_end(A):
        (out,) = operation.torch(A)
        return (torch.cat((out[:17], out[:1])),)

    found = gpu_linalg.judge(Host(), operation, wrong_at_the_end, A, operation.exact(A[:16]), {})
    assert found["reason"].startswith("wrong: clipped")


def test_memory_is_poisoned_between_providers_of_linear_algebra(gpu, monkeypatch):
    import gpu_linalg

    operation = gpu_linalg.OPERATIONS["qr"]
    A, results, poison = operation.matrices(gpu_linalg.Batch(2, 7, 5)), [], []

    def provider(A):
        out = torch.linalg.qr(A)
        results.extend(map(weakref.ref, out))
        return out

    full = torch.full

    def recorded(size, value, **options):
        assert all(result() is None for result in results)
        poison.append(full(size, value, **options))
        return poison[-1]

    monkeypatch.setattr(torch, "full", recorded)
    assert "reason" not in gpu_linalg.judge(Host(), operation, provider, A, None, {})
    assert [t.shape for t in poison] == [(2, 7, 5), (2, 5, 5)] and all(t.isnan().all() for t in poison)


def test_nobody_waits_for_a_slow_baseline(run, monkeypatch):
    import gpu_linalg

    monkeypatch.setattr(gpu_linalg, "PATIENCE", 0)
    (row,) = part(run, gpu_linalg.svd, [gpu_linalg.Batch(2, 5, 5)])["rows"]
    assert row["providers"]["torch.linalg"] == {"reason": "a call would take 0 s"}
    assert row["ours"] == "auto" and row["ratios"] == {"seconds": {}}
    assert row["providers"]["triton"]["reason"].startswith("BackendError: ")


def test_cupy_where_it_is_installed(run, monkeypatch):
    import gpu_linalg
    import numpy

    monkeypatch.setattr(gpu_linalg.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "cupy", numpy)
    for function in (gpu_linalg.svd, gpu_linalg.qr):
        (row,) = part(run, function, [gpu_linalg.Batch(3, 7, 5)])["rows"]
        assert row["providers"]["CuPy"]["seconds"] and row["ratios"]["seconds"]["CuPy"] > 0


def test_steps(tmp_path):
    record, output = drive(
        tmp_path,
        """
from torch import nn
layers = lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 5))
net = Network("tiny", layers, (2, 1, 5, 5), head=None)
part(run, gpu_step.step, [(net, 0.5), (net, 3)])
""",
    )
    rows = record["parts"]["step"]["rows"]
    assert [row["row"] for row in rows] == ["tiny 50%", "tiny r 3"]
    for row in rows:
        assert set(row["providers"]) == {"triton", "loop", "SGD", "AdamW"}
        for name, found in row["providers"].items():
            assert found["seconds"] and 0 < found["error"] < 1e-5
            assert ("graph" in found) == (name != "loop")
            assert name == "loop" or 0 < found["graph error"] < 1e-5
        assert set(row["ratios"]) == {"loop", "SGD", "AdamW"} and row["over floor"] > 0
        assert row["row"] in output


@pytest.fixture
def tiny(gpu):
    from networks import Network

    def layers():
        return torch.nn.Sequential(torch.nn.Linear(9, 7), torch.nn.Linear(7, 5))

    return Network("tiny", layers, (2, 9), classes=None, head=None)


@pytest.mark.filterwarnings("ignore:CUDA is not available")  # by the profiler
def test_wrong_steps_get_no_time(run, monkeypatch, tiny, capsys):
    import gpu_step

    def shorter(model, lr):
        return gpu_step.CondLRSGD(model, lr=0.9 * lr["factors"], momentum=0.45, tau=0.1)

    monkeypatch.setattr(gpu_step, "fast_pytorch", shorter)
    (row,) = part(run, gpu_step.step, [(tiny, 3)])["rows"]
    loop, found = row["providers"]["loop"], row["providers"]["triton"]
    assert loop["reason"].startswith("wrong: ") and 1e-4 < loop["error"] < 1e-2 and "seconds" not in loop
    assert found["reason"].startswith("BackendError: ") and "seconds" not in found
    assert row["providers"]["SGD"]["graph"] and row["ratios"] == {}
    assert "no time in 1 rows: loop: wrong" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_wrong_replays_get_no_time(run, monkeypatch, tiny):
    """A replay that does nothing is not taken for the step."""
    import gpu_step

    monkeypatch.setattr(Host, "graph", lambda self, call: lambda: None)
    monkeypatch.setattr(gpu_step, "learning_rates", lambda kind: dict.fromkeys(("factors", "cores", "other"), 1e-2))
    (row,) = part(run, gpu_step.step, [(tiny, 3)])["rows"]
    for name in ("SGD", "AdamW"):
        found = row["providers"][name]
        assert found["seconds"] and "graph" not in found and found["no graph"].startswith("wrong: ")


def test_ratios(gpu):
    import gpu_linalg
    import gpu_step

    found = {"triton": {"seconds": [0, 2.0, 9], "graph": [0, 1.0, 9]}, "torch.linalg": {"seconds": [0, 8.0, 9]}}
    row = gpu_linalg.compare(found | {"CuPy": {"reason": "slow"}}, 0.5)
    assert row["ratios"] == {"seconds": {"torch.linalg": 4.0}, "graph": {"torch.linalg": 8.0}}
    assert row["over floor"] == 2.0
    found = {"triton": {"seconds": [0, 2.0, 9], "graph": [0, 1.0, 9]}, "loop": {"seconds": [0, 8.0, 9]}}
    found |= {"SGD": {"seconds": [0, 5.0, 9], "graph": [0, 3.0, 9]}, "AdamW": {"reason": "slow"}}
    assert gpu_step.compare(found, 0.5) == {"ratios": {"loop": 8.0, "SGD": 3.0}, "floor": 0.5, "over floor": 2.0}
