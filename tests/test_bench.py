"""The benchmark runs, compares every provider with float64, and writes its record."""

import json
import os
import subprocess
import sys
from pathlib import Path

import condlr_ext

ROOT = Path(__file__).parents[1]


def run(file: Path, *arguments: str) -> dict:
    command = [sys.executable, str(ROOT / "bench" / "cpu.py"), "--quick", "--threads", "1", "--json", str(file)]
    environment = os.environ | {"PYTHONPATH": str(Path(condlr_ext.__file__).parents[1])}
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text())


def test_quick_run(tmp_path):
    record = run(tmp_path / "record.json")
    assert record["allocator"] == "default"
    kinds = {row["row"].split()[0] for row in record["rows"]}
    assert kinds == {"svd", "clip", "qr", "step", "iteration"}
    for row in record["rows"]:
        assert row["seconds"] and row["ratio"] and row["floor"] > 0, f"{row['row']}, {row['provider']}: {row['error']}"
    assert {t["row"] for t in record["targets"]} == {"iteration digits MLP 20%", "iteration digits MLP 50%"}


def test_tuned_allocator(tmp_path):
    assert run(tmp_path / "record.json", "--allocator", "tuned", "--only", "qr")["allocator"] == "tuned"


def test_a_wrong_provider_gets_no_time(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import cpu
    from timing import Case, Rates, Work

    class Rows:
        def rows(self, wanted):
            right = Case(lambda: None, lambda: 1e-7, limit=1e-5, work=[Work(flops=1.0)])
            wrong = Case(lambda: None, lambda: 1e-3, limit=1e-5, work=[Work(flops=1.0)])
            return {"row": {"ours": right, "other": wrong}}

    monkeypatch.setattr("sys.argv", ["cpu.py", "--quick"])
    ours, other = records = cpu.measure(Rows(), ["row"], cpu.parse())
    cpu.add_floors(records, {ours["threads"]: Rates(1.0, 1.0)})
    assert ours["seconds"] and ours["ratio"] == 1
    assert other["seconds"] is None and other["ratio"] is None and other["error"] == 1e-3
    cpu.show(records)
    assert "wrong" in capsys.readouterr().out
