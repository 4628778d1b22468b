"""`python -m bench` as users call it: a run, its file and tables, comparisons, errors."""

import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from bench import __main__ as cli
from bench import revisions, runner
from bench.__main__ import main
from bench.machine import Cpu
from bench.records import Results
from bench.registry import Selection

ROOT = Path(__file__).parents[2]
SMOKE = ["clip", "qr", "--size", "smoke", "--seconds-per-provider", "0.02", "--threads", "1", "--compile", "none"]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A real run of the smallest rows."""
    file = tmp_path_factory.mktemp("run") / "bench.jsonl"
    assert main([*SMOKE, "--json", str(file)]) == 0
    return file


def test_records(file):
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert [r["kind"] for r in records[:2]] == ["run", "ceilings"] and records[-1]["kind"] == "ceilings"
    run, ceilings = records[:2]
    assert {"format", "date", "commit", "command", "machine", "versions"} <= set(run) and run["format"] == 2
    assert run["command"][:2] == ["clip", "qr"] and run["machine"]["allocator"] in ("default", "tuned")
    assert run["versions"]["torch"] == torch.__version__
    assert ceilings["threads"] == 1 and ceilings["fp32"] > 1e8 and all(rate > 1e7 for _, rate in ceilings["copy"])
    times = records[2:-1]
    assert {(r["kind"], r["op"]) for r in times} == {("time", "clip"), ("time", "qr")}
    for r in times:
        assert {"row", "shape", "dtype", "mode", "cache", "threads", "provider", "role", "seconds", "work"} <= set(r)
        assert "reason" in r or 0 < r["seconds"][0] <= r["seconds"][1] <= r["seconds"][2]
        assert "reason" in r or all(r["errors"][name] <= r["limits"][name] for name in r["errors"])
    assert {r["provider"] for r in times} >= {"ours", "torch.linalg"}
    assert torch.get_num_threads() == 1


def test_table(file, capsys):
    assert main(["--table", str(file)]) == 0
    out = capsys.readouterr().out
    assert "clip (fp32, warm, 1 thread)" in out and "all operations" in out
    assert main(["--table", str(file), "--detail"]) == 0
    assert "torch.linalg  same" in capsys.readouterr().out


def test_equal_files_show_no_regression(file, capsys):
    assert main(["--compare", str(file), str(file)]) == 0
    assert "no regression" in capsys.readouterr().out


def test_a_regression_exits_with_1(file, tmp_path, capsys):
    records = [json.loads(line) for line in file.read_text().splitlines()]
    for record in records:
        if record.get("provider") == "ours" and record["op"] == "clip":
            record["seconds"] = [1e3 * s for s in record["seconds"]]
    changed = tmp_path / "changed.jsonl"
    changed.write_text("".join(json.dumps(r) + "\n" for r in records))
    assert main(["--compare", str(file), str(changed)]) == 1
    assert "SLOWER" in capsys.readouterr().out
    assert main(["--compare", str(changed), str(file)]) == 0


def test_plot(file, capsys):
    pytest.importorskip("matplotlib")
    assert main(["--plot", str(file)]) == 0
    drawn = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [f.parent for f in drawn] == [file.parent] * 2 and all(f.stat().st_size > 5000 for f in drawn)


def test_markdown(file, capsys):
    readme = file.parent / "README.md"
    other = file.parent / "other.md"
    other.write_text("no table\n")
    readme.write_text(f"a\n<!-- python -m bench rows: {file} op=clip -->\n<!-- end -->\nb\n")
    assert main(["--markdown", str(readme), str(other)]) == 0
    assert capsys.readouterr().out == f"{readme}: rewritten\n{other}: as it was\n"
    made = readme.read_text()
    assert "| clip 4 x 8x8 |" in made and "| qr" not in made and made.startswith("a\n") and made.endswith("\nb\n")
    assert main(["--markdown", str(readme)]) == 0
    assert readme.read_text() == made and "as it was" in capsys.readouterr().out


def test_list(capsys):
    assert main(["--list", "clip", "--only", "8x8", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("clip: singular values") and lines[1:] == ["  clip 16 x 8x8 fp32"]


def test_rows_per_number_of_threads_with_the_same_inputs(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(
        runner, "measure", lambda row, on, how: seen.append((torch.get_num_threads(), torch.rand(1).item())) or ()
    )
    monkeypatch.setattr(Cpu, "ceilings", lambda self, dtypes, quick: {"copy": [[1, 1.0]], "threads": "of the run"})
    arguments = ["clip", "--size", "smoke", "--threads", "2", "1", "--json", str(tmp_path / "a.jsonl")]
    main([*arguments])
    assert [threads for threads, _ in seen] == [2, 1] and seen[0][1] == seen[1][1]
    records = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [r["threads"] for r in records if r["kind"] == "ceilings"] == [2, 2, 1, 1] and torch.get_num_threads() == 1


def test_profile(monkeypatch, capsys):
    def breakdown(row, names, device):
        return f"{row.shape} {names} {device.kind} {torch.get_num_threads()}"

    monkeypatch.setitem(sys.modules, "bench.profiling", types.SimpleNamespace(breakdown=breakdown))
    assert main(["clip", "--size", "smoke", "--threads", "1", "--profile"]) == 0
    assert "clip 4 x 8x8 fp32, 1 thread\n4 x 8x8 ('ours', 'dense', 'fast PyTorch') cpu 1" in capsys.readouterr().out


def test_an_interrupted_run_keeps_its_rows(monkeypatch, tmp_path, capsys):
    whole, calls = runner.measure, []

    def measure(row, on, how):
        calls.append(row)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(row, on, how)

    monkeypatch.setattr(runner, "measure", measure)
    file = tmp_path / "a.jsonl"
    assert main([*SMOKE, "--json", str(file), "--providers", "torch.linalg", "nobody"]) == 130
    out, err = capsys.readouterr()
    assert "clip (fp32, warm, 1 thread)" in out and out.endswith(f"{file}\n") and "\nqr" not in out
    assert "interrupted" in err and "no row has a provider 'nobody'" in err
    assert {r["provider"] for r in Results.read(file).times} == {"ours", "torch.linalg"}


def test_a_file_is_not_overwritten_by_default(tmp_path):
    (tmp_path / "bench.jsonl").write_text("")
    (tmp_path / "bench-2.jsonl").write_text("")
    assert cli.unused(tmp_path / "bench.jsonl") == tmp_path / "bench-3.jsonl"


@pytest.mark.slow
def test_the_tuned_allocator_elsewhere(tmp_path):
    """Run in another process; its arguments survive the restart."""
    file = tmp_path / "tuned.jsonl"
    arguments = [*SMOKE[1:], "--only", "4 x 8x8", "--allocator", "tuned", "--json", str(file)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    started = [sys.executable, "-m", "bench", *arguments]
    done = subprocess.run(started, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(file)
    found = Results.read(file)
    assert found.run["machine"]["allocator"] == "tuned" and {r["row"] for r in found.times} == {"4 x 8x8"}


@pytest.mark.slow
def test_revisions(tmp_path, monkeypatch, capsys):
    """The working tree against the last commit, both by the present benchmark."""
    if revisions.git("rev-parse", "--show-toplevel", check=False) != str(revisions.ROOT):
        pytest.skip("not a git repository")
    monkeypatch.setattr(revisions, "ROUNDS", 1)
    monkeypatch.chdir(tmp_path)
    before = revisions.git("worktree", "list")
    arguments = [*SMOKE[1:], "--only", "4 x 8x8", "--providers", "torch.linalg", "--compare", "HEAD", "."]
    assert main(arguments) in (0, 1)  # whichever this machine was just now
    out = capsys.readouterr().out
    assert "qr 4 x 8x8  ours" in out and "B  working-tree: " in out
    files = sorted(file.name for file in (tmp_path / "runs").rglob("*.jsonl"))
    assert files == [f"A-{revisions.named('HEAD')}-1.jsonl", "B-working-tree-1.jsonl"]
    assert revisions.git("worktree", "list") == before


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nothing"], "no operation 'nothing'; there are clip"),
        (["clip", "--only", "nothing"], "no row matches 'nothing'"),
        (["clip", "--dtypes", "bf16"], "these operations have fp32, fp64, not bf16"),
        (["clip", "--dtypes", "fp8"], "no arithmetic 'fp8'; there are fp32"),
        (["clip", "--backend", "nothing", "--size", "smoke", "--json", os.devnull], "backend"),
        (["--threads", "0"], "--threads must be >= 1, got 0"),
        (["--seconds", "0"], "--seconds must be > 0, got 0"),
        (["--seconds-per-provider", "-1"], "--seconds-per-provider must be > 0, got -1"),
        (["--device", "cpu", "--prepare"], "--prepare is for CUDA devices"),
        (["--tune", "missing.jsonl"], "No such file"),
        (["--size", "huge"], "invalid choice: 'huge'"),
        (["--list", "--profile"], "not allowed with"),
        (["--table", "missing.jsonl"], "No such file"),
        (["--plot", "missing.jsonl"], "No such file"),
        (["--markdown", "missing.md"], "No such file"),
        (["--compare", "missing.jsonl", "nothing"], "neither"),
    ],
)
def test_errors(arguments, message, capsys):
    assert main([*arguments]) == 2
    out, err = capsys.readouterr()
    assert message in err and err.startswith("bench: error: ") and err.count("\n") == 1 and not out


def test_a_file_and_a_revision(file, capsys):
    assert main(["--compare", str(file), "HEAD"]) == 2
    assert "HEAD is no results file; compare two files or two revisions" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_no_cuda(capsys):
    assert main(["clip", "--device", "cuda"]) == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err


def test_example_in_the_guide():
    """The operation that the guide adds is measured, and a wrong provider of it gets no time."""
    guide = ROOT / "docs" / "guide" / "benchmarking.md"
    (code,) = re.findall(r"```python\n(.*?)```", guide.read_text(), flags=re.DOTALL)
    names = {"__name__": "example"}
    exec(code, names)
    operation, cpu = names["OPERATION"], Cpu()
    (row,) = Selection(size="smoke").rows([operation], cpu)
    options = runner.Options(seconds=0.01, rounds=2)
    ours, other = runner.measure(row, cpu, options)
    assert ours["seconds"] and other["seconds"] and ours["row"] == "16 x 8x8"
    names["linalg"] = types.SimpleNamespace(cond=lambda A: 1.01 * torch.linalg.cond(A))
    ours, other = runner.measure(row, cpu, options)
    assert ours["reason"].startswith("wrong: kappa") and not ours["seconds"] and other["seconds"]
