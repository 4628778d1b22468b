"""What is made of benchmark records: tables, Markdown, comparisons, figures."""

import json
import math
import re
import subprocess
import sys
import types

import pytest

from bench import compare, plot, revisions, tables
from bench.records import Results, Writer

RUN = {
    "kind": "run", "format": 2, "date": "2026-01-02T03:04:05", "commit": "abc1234", "command": [],
    "machine": {"device": "A CPU", "cores": 2, "allocator": "default"},
    "versions": {"torch": "2.13.0", "condlr_ext": "0.1.0"},
}  # fmt: skip
CEILINGS = {"kind": "ceilings", "threads": 1, "copy": [[1 << 19, 1e11], [1 << 27, 1e10]], "fp32": 1e11}


def time_(provider, role, middle, spread=0.02, op="clip", row="16 x 8x8", shape=None, reason=None, **changes):
    record = {
        "kind": "time", "op": op, "row": row, "shape": shape or {"count": 16, "m": 8, "n": 8}, "dtype": "fp32",
        "mode": "call", "cache": "warm", "threads": 1, "provider": provider, "role": role,
        "seconds": [middle * (1 - spread / 2), middle, middle * (1 + spread / 2)], "samples": 11,
        "work": [[2e6, 1e6]], "error": 2e-7, "errors": {"A": 2e-7}, "limits": {"A": 1e-6}, "memory": None,
    }  # fmt: skip
    if reason:
        record |= {"seconds": None, "reason": reason, "samples": 0}
    return record | changes


def results(*times, run=RUN, others=(CEILINGS,), name="a.jsonl"):
    return Results([run, *others, *times], name)


ROW = (
    time_("ours", "ours", 1e-3),
    time_("plain", "same", 2e-3, error=3e-7),
    time_("slow", "same", 5e-3),
    time_("whole", "dense", 5e-4),
    time_("related", "context", 4e-3, error=0.3),
    time_("broken", "same", 1, reason="wrong: A 3e-03 > 1e-06"),
    time_("absent", None, 1, reason="ImportError: absent is not installed", work=[]),
)


def columns(lines, header):
    """{title: cell} of the line after the header."""
    at = next(i for i, line in enumerate(lines) if line.lstrip().startswith(header))
    split = [re.split(r"\s{2,}", line.strip()) for line in lines[at : at + 2]]
    return dict(zip(*split, strict=True))


def test_columns_of_a_row():
    found = columns(tables.show(results(*ROW)), "row ")
    assert found == {
        "row": "16 x 8x8",
        "time": "1.00 ms",
        "spread": "2.0 %",
        "best other": "plain",
        "its time": "2.00 ms",
        "x best": "2.00",
        "x dense": "0.50",
        "error": "2e-07",
        "other's": "3e-07",
        "GB/s": "1.00",  # 1e6 bytes in 1 ms
        "GFLOP/s": "2.00",
        "roofline": "10 %",  # 1e6 bytes, more than the cache of 2^19, at 1e10 byte/s: 0.1 ms
    }


def test_what_stands_below_a_table():
    text = "\n".join(tables.show(results(*ROW)))
    assert "clip (fp32, warm, 1 thread)" in text
    assert "beside it: related 4.00 ms, 4.00 x ours, error 3e-01" in text
    assert "no time for broken: wrong: A 3e-03 > 1e-06 (16 x 8x8)" in text
    assert "no time for absent: ImportError: absent is not installed (16 x 8x8)" in text
    assert "ours faster than the best other in 1 of 1 rows; ratio 2.00 / 2.00 / 2.00" in text
    assert "ours faster than dense in 0 of 1 rows; ratio 0.50 / 0.50 / 0.50" in text
    assert "copy 100 GB/s up to 512 KiB, 10 GB/s beyond; product fp32 100 GFLOP/s" in text


def test_a_row_without_a_time_of_ours_is_lost_not_left_out():
    lost = [
        time_("ours", "ours", 1, row="32 x 8x8", reason="wrong: A 1e+00 > 1e-06"),
        time_("plain", "same", 1e-3, row="32 x 8x8"),
    ]
    lines = tables.show(results(*ROW, *lost))
    assert any("ours faster than the best other in 1 of 2 rows" in line for line in lines)
    assert any(re.match(r"\s+32 x 8x8\s+-\s+-\s+plain", line) for line in lines)
    assert "no time for ours: wrong: A 1e+00 > 1e-06 (32 x 8x8)" in "\n".join(lines)


def test_reasons_that_differ_in_numbers_are_one():
    rows = [time_("other", "same", 1, row=f"{n}", reason=f"wrong: A {n}e-03 > 1e-06") for n in (3, 4)]
    lines = tables.show(results(*rows, time_("ours", "ours", 1e-3, row="3")))
    assert [line.strip() for line in lines if "no time" in line] == [
        "no time for other: wrong: A 3e-03 > 1e-06 (2 of 2 rows)"
    ]


def test_modes_and_threads_are_columns_only_where_they_vary():
    other = [time_("ours", "ours", 1e-3, threads=2, mode="backward")]
    header = next(line for line in tables.show(results(*ROW, *other)) if line.lstrip().startswith("row "))
    assert header.split()[1:4] == ["mode", "threads", "time"]
    assert "(fp32, warm)" in tables.heading("clip", list(results(*ROW, *other).rows()))


def test_detail_has_every_provider():
    lines = [re.split(r"\s{2,}", line.strip()) for line in tables.show(results(*ROW), detail=True)]
    assert ["16 x 8x8", "ours", "ours", "1.00 ms", "2.0 %", "11", "1.00", "2e-07", "10 %", "-"] in lines
    assert ["slow", "same", "5.00 ms", "2.0 %", "11", "5.00", "2e-07", "2.0 %", "-"] in lines
    assert ["absent", "-", "none", "-", "0", "-", "2e-07", "-", "-"] in lines


def test_our_backend_where_ours_has_no_time():
    lines = tables.show(results(time_("ours: cpu", "ours", 1e-3), *ROW[1:2]))
    assert columns(lines, "row ")["of"] == "ours: cpu"


def test_tables_of_other_records():
    memory = [
        {"kind": "memory", "op": "train", "row": "VGG16 20%", "provider": p, "threads": 1, "bytes": b, "seconds": s,
         "page_faults": f}
        for p, b, s, f in (("ours", 1 << 20, 0.5, 10), ("dense", 3 << 20, 1.0, None))
    ]  # fmt: skip
    launches = [{"kind": "launches", "op": "step", "row": "VGG16 20%", "provider": "ours", "launches": 8}]
    lines = tables.show(results(*ROW, others=(CEILINGS, *memory, *launches)))
    dense = next(line for line in lines if "VGG16 20%  dense" in line)
    assert re.split(r"\s{2,}", dense.strip()) == [
        "train VGG16 20%",
        "dense",
        "1",
        "3.00 MiB",
        "3.00",
        "1.00 s",
        "-",
    ]
    assert columns(lines, "op ") == {"op": "step", "row": "VGG16 20%", "provider": "ours", "launches": "8"}


@pytest.mark.parametrize(
    "seconds, text",
    [(None, "-"), (1.0, "1.00 s"), (12.34, "12.3 s"), (9.996e-4, "1.00 ms"), (2.5e-5, "25.0 us"), (3e-8, "30.0 ns")],
)
def test_durations(seconds, text):
    assert tables.duration(seconds) == text


# files


def test_a_last_line_that_was_cut_off(tmp_path):
    write = Writer(tmp_path / "a.jsonl")
    for record in (RUN, CEILINGS, *ROW[:2]):
        write(record)
    text = write.file.read_text()
    write.file.write_text(text[:-40])
    assert [r["provider"] for r in Results.read(write.file).times] == ["ours"]
    write.file.write_text(text[:-40] + "\n" + json.dumps(ROW[2]) + "\n")
    with pytest.raises(ValueError, match="line 4 is no record"):
        Results.read(write.file)


def test_files_of_another_kind(tmp_path):
    (tmp_path / "old.json").write_text('{\n "date": 1\n}\n')
    with pytest.raises(ValueError, match="line 1 is no record"):
        Results.read(tmp_path / "old.json")
    with pytest.raises(ValueError, match="format 1, this version reads 2"):
        Results([RUN | {"format": 1}])


# Markdown


@pytest.fixture
def written(tmp_path):
    write = Writer(tmp_path / "results" / "a.jsonl")
    network = {"row": "VGG16 20%", "shape": {"network": "VGG16", "rank": 0.2}}
    for record in (
        RUN, CEILINGS, *ROW,
        time_("ours", "ours", 1.0, op="train", mode="iteration", **network),
        time_("dense", "dense", 3.0, op="train", mode="iteration", **network),
        time_("dense compiled", "dense", 2.5, op="train", mode="iteration", **network),
        time_("ours", "ours", 0.1, op="step", **network),
        time_("released", "context", 3.8, op="step", **network),
    ):  # fmt: skip
        write(record)
    return tmp_path


def test_markdown_tables(written):
    text = (
        "# Title\n\n<!-- python -m bench networks: results/a.jsonl threads=1 -->\nold\n<!-- end -->\n"
        '\nwords\n\n<!-- python -m bench rows: results/a.jsonl op="clip,qr" row=16* -->\n<!-- end -->\nlast\n'
    )
    made = tables.rewrite(text, written)
    assert tables.rewrite(made, written) == made
    assert "old" not in made and made.endswith("<!-- end -->\nlast\n")
    lines = made.splitlines()
    assert lines[3].startswith("| network, rank | iterations / s | iteration: dense | iteration: fast PyTorch |")
    assert lines[5] == "| VGG16 20% | 1.00 | 2.50 | - | - | 38.0 | - | 0.10 % |"
    (row,) = [line for line in lines if line.startswith("| clip 16 x 8x8 | 1.00 ms |")]
    rule = lines[lines.index(row) - 1]
    assert rule.count("|") == row.count("|") and rule.startswith("|---|---:|")
    assert "`results/a.jsonl`: fp32, warm, 1 thread, A CPU, torch 2.13.0, condlr_ext 0.1.0 at abc1234" in made


@pytest.mark.parametrize(
    "comment, message",
    [
        ("<!-- python -m bench rows: results/a.jsonl -->\n", "needed"),
        (
            "<!-- python -m bench rows: results/a.jsonl -->\n<!-- python -m bench rows: x -->\n<!-- end -->",
            "no <!-- end -->",
        ),
        ("<!-- python -m bench nothing: results/a.jsonl -->\n<!-- end -->", "no table 'nothing'"),
        ("<!-- python -m bench rows: results/a.jsonl thread=1 -->\n<!-- end -->", "option 'thread=1'"),
        ("<!-- python -m bench rows: results/a.jsonl threads=7 -->\n<!-- end -->", "nothing in"),
        ("<!-- python -m bench rows: results/a.jsonl op=step row=16* -->\n<!-- end -->", "nothing in"),
        ("<!-- python -m bench memory: results/a.jsonl -->\n<!-- end -->", "nothing in"),
    ],
)
def test_faulty_comments(written, comment, message):
    with pytest.raises(ValueError, match=message):
        tables.rewrite(comment, written)


# comparisons


def test_no_regression_on_equal_results():
    a = results(*ROW)
    found = compare.compare(a, results(*ROW))
    (change,) = found.changes
    assert change.verdict == "as before" and change.slowdown == pytest.approx(1) and not found.regressions
    assert found.only == ([], []) and not found.missed
    assert compare.show(found, a, a)[-1] == "1 as before: no regression; half of the bounds are below 1.05"


def slower(factor, baseline=1.0, spread=0.02, samples=11):
    changed = {"ours": factor, "plain": baseline, "slow": baseline, "whole": baseline}
    return [
        time_(r["provider"], r["role"], changed[r["provider"]] * r["seconds"][1], spread, samples=samples)
        for r in ROW[:4]
    ]


def test_slower_beyond_noise():
    (change,) = compare.compare(results(*slower(1)), results(*slower(1.2))).changes
    noise = math.log(1.01 / 0.99) / 2
    assert change.slowdown == pytest.approx(1.2) and change.regression
    assert change.bound == pytest.approx(max(1.05, math.exp(2 * noise * 2)))  # ours and baselines, in A and B
    assert not compare.compare(results(*slower(1)), results(*slower(1.04))).regressions
    assert compare.compare(results(*slower(1.2)), results(*slower(1))).changes[0].verdict == "faster"


def test_within_noise():
    a, b = results(*slower(1, spread=0.2)), results(*slower(1.2, spread=0.2))
    assert compare.compare(a, b).changes[0].verdict == "as before"
    a, b = results(*slower(1, spread=0, samples=1)), results(*slower(1.2, spread=0, samples=1))
    assert compare.compare(a, b).changes[0].verdict == "as before"


def test_drift_of_the_machine():
    (change,) = compare.compare(results(*slower(1)), results(*slower(1.5, baseline=1.5))).changes
    assert change.drift == pytest.approx(1.5) and change.slowdown == pytest.approx(1) and not change.regression
    (change,) = compare.compare(results(*slower(1)), results(*slower(1.0, baseline=0.7))).changes
    assert change.regression


def test_drift_where_a_row_has_no_baseline():
    """That of the other rows; the reference path and context are no baselines."""

    def alone(ours, others):
        roles = {"ours": ("ours", ours), "reference": ("same", others), "related": ("context", others)}
        return [time_(name, role, middle, row="alone") for name, (role, middle) in roles.items()]

    a, b = results(*ROW, *alone(1, 1)), results(*slower(1.3, baseline=1.3), *alone(1.3, 5))
    found = compare.compare(a, b)
    assert not found.regressions
    (change,) = [c for c in found.changes if c.key[1] == "alone"]
    assert change.drift == pytest.approx(1.3)


def test_scatter_of_the_baselines_of_all_rows():
    """Quantiles within a process do not show what differs between processes."""

    def row(n, ours, plain):
        return [time_("ours", "ours", ours, 0.001, row=str(n)), time_("plain", "same", plain, 0.001, row=str(n))]

    before = [r for n in range(5) for r in row(n, 1, 1)]
    factors = (0.9, 0.95, 1.0, 1.05, 1.1)
    found = compare.compare(results(*before), results(*(r for n, f in enumerate(factors) for r in row(n, 1, f))))
    scatter = math.log(1.06 / 0.94) / 2  # quantiles of 20 and 80 % of five are between the first two and the last two
    assert not found.regressions
    assert all(change.bound == pytest.approx(math.exp(5 * scatter), rel=2e-3) for change in found.changes)


def test_disagreeing_baselines_are_noise():
    b = slower(1.4)
    b[1]["seconds"], b[2]["seconds"] = ([s * f for s in r["seconds"]] for r, f in zip(b[1:3], (0.7, 1.4), strict=True))
    assert not compare.compare(results(*slower(1)), results(*b)).regressions


def test_wrong_is_a_regression():
    wrong = [time_("ours", "ours", 1, reason="wrong: A 1e+00 > 1e-06"), *ROW[1:]]
    a, b = results(*ROW), results(*wrong)
    found = compare.compare(a, b)
    assert [c.verdict for c in found.regressions] == ["lost"]
    assert "lost: clip 16 x 8x8 (fp32, call, warm, 1 thread): ours: wrong: A 1e+00 > 1e-06" in "\n".join(
        compare.show(found, a, b)
    )
    back = compare.compare(b, a)
    assert not back.regressions and [c.verdict for c in back.changes] == ["gained"]


def test_what_raises_is_a_regression_and_a_missing_baseline_none():
    raised = [time_("ours", None, 1, reason="RuntimeError: no"), *ROW[1:]]
    assert compare.compare(results(*ROW), results(*raised)).regressions
    without = [ROW[0], time_("plain", None, 1, reason="ImportError: no plain"), *ROW[2:]]
    found = compare.compare(results(*ROW), results(*without))
    assert not found.regressions
    assert found.missed == ["clip 16 x 8x8 (fp32, call, warm, 1 thread): plain: ImportError: no plain"]


def test_rows_of_one_side():
    more = time_("ours", "ours", 1, row="new")
    a, b = results(*ROW), results(*ROW, more)
    assert compare.compare(a, b).only == ([], ["clip new (fp32, call, warm, 1 thread)"])
    assert compare.compare(b, a).only == (["clip new (fp32, call, warm, 1 thread)"], [])
    assert "only in B: clip new" in "\n".join(compare.show(compare.compare(a, b), a, b))


def test_worst_first():
    rows = [
        [time_(p, r, f * s, row=str(i)) for p, r, s, f in (("ours", "ours", 1, f), ("plain", "same", 1, 1))]
        for i, f in enumerate((1, 3, 2))
    ]
    before = [time_(r["provider"], r["role"], 1, row=r["row"]) for row in rows for r in row]
    found = compare.compare(results(*before), results(*(r for row in rows for r in row)))
    assert [c.key[1] for c in found.changes] == ["1", "2", "0"]


@pytest.mark.parametrize(
    "b, message",
    [
        (results(*ROW, run=RUN | {"machine": RUN["machine"] | {"device": "B"}}), "different devices: .* A CPU, .* B"),
        (results(*ROW, run=RUN | {"machine": RUN["machine"] | {"allocator": "tuned"}}), "different allocators"),
        (results(*ROW, time_("ours", "ours", 1, threads=2)), "different numbers of threads"),
        (results(*(r | {"row": "1"} for r in ROW)), "no row in common"),
    ],
)
def test_what_cannot_be_compared(b, message):
    with pytest.raises(ValueError, match=message):
        compare.compare(results(*ROW), b)


def test_rounds_are_merged():
    first = [time_("ours", "ours", 1.0), time_("plain", "same", 2.0)]
    second = [time_("ours", "ours", 1.2), time_("plain", "same", 1, reason="RuntimeError: once")]
    merged = compare.merge([results(*first), results(*second)], "both")
    ours, plain = merged.times
    assert ours["seconds"] == pytest.approx([0.99, 1.1, 1.212]) and ours["samples"] == 22
    assert plain["seconds"] is None and plain["reason"] == "RuntimeError: once"
    assert ours["floor"] > 0 and merged.name == "both"


# revisions, on a small repository


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Two commits; the second changes csrc. setup.py builds condlr_ext/_C.so out of csrc/code, or fails."""
    root = tmp_path / "repository"
    (root / "condlr_ext" / "bench").mkdir(parents=True)
    (root / "csrc").mkdir()
    (root / "condlr_ext" / "__init__.py").write_text("")
    (root / "condlr_ext" / "bench" / "old.py").write_text("")
    (root / ".gitignore").write_text("*.so\n")
    (root / "CMakeLists.txt").write_text("")
    (root / "setup.py").write_text(
        "from pathlib import Path\ncode = Path('csrc/code').read_text()\n"
        "if code == 'faulty': raise SystemExit('no such instruction')\n"
        "Path('condlr_ext/_C.so').write_text('built ' + code)\n"
    )
    for code in ("faulty", "one", "two"):
        (root / "csrc" / "code").write_text(code)
        git = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b"]
        if code == "faulty":
            subprocess.run([*git, "init", "--quiet"], check=True)
        subprocess.run([*git, "add", "-A"], check=True)
        subprocess.run([*git, "commit", "--quiet", "-m", code], check=True)
    (root / "condlr_ext" / "_C.so").write_text("present")
    monkeypatch.setattr(revisions, "ROOT", root.resolve())
    return root


def trees():
    return revisions.git("worktree", "list").splitlines()


def test_worktree_of_the_same_sources(repository):
    with revisions.worktree("HEAD") as root:
        assert (root / "condlr_ext" / "_C.so").read_text() == "present"
        assert (root / "condlr_ext" / "bench" / "tables.py").exists() and not (
            root / "condlr_ext/bench/old.py"
        ).exists()
        assert len(trees()) == 2
    assert not root.exists() and len(trees()) == 1


def test_worktree_of_other_sources_is_built(repository):
    with revisions.worktree("HEAD~1") as root:
        assert (root / "condlr_ext" / "_C.so").read_text() == "built one"


def test_a_build_that_fails(repository):
    with pytest.raises(ChildProcessError, match=r"setup\.py build_ext failed in .*: no such instruction"):
        with revisions.worktree("HEAD~2"):
            pass
    assert len(trees()) == 1


def test_nothing_is_built_where_nothing_is(repository):
    (repository / "condlr_ext" / "_C.so").unlink()
    with revisions.worktree("HEAD~2") as root:
        assert not (root / "condlr_ext" / "_C.so").exists()


def test_worktrees_go_when_the_measurement_fails(repository, tmp_path):
    with pytest.raises(ChildProcessError, match="-m bench failed"):  # the small package has no linalg
        revisions.measure(("HEAD", "HEAD~1"), ["clip"], tmp_path / "out")
    assert len(trees()) == 1


def test_no_revision(repository, tmp_path):
    with pytest.raises(ValueError, match="'nonsense' is neither a results file nor a revision"):
        revisions.measure(("HEAD", "nonsense"), [], tmp_path)


def test_no_repository(tmp_path, monkeypatch):
    monkeypatch.setattr(revisions, "ROOT", tmp_path)
    with pytest.raises(ValueError, match="no git repository of condlr_ext"):
        revisions.measure(("HEAD", "."), [], tmp_path)


# figures


def png(file):
    return file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and file.stat().st_size > 5000


def test_figures(tmp_path):
    pytest.importorskip("matplotlib")
    times = []
    for n in (8, 16, 64):
        shape = {"row": f"16 x {n}x{n}", "shape": {"count": 16, "m": n, "n": n}}
        work = [[1e4 * n**3, 64 * n * n]]
        times += [
            time_("ours", "ours", 1e-6 * n, work=work, **shape),
            time_("plain", "same", 1e-7 * n**2, work=work, **shape),
        ]
    network = {"op": "step", "row": "VGG16 20%", "shape": {"network": "VGG16", "rank": 0.2}}
    times += [time_("ours", "ours", 1.0, **network), time_("dense SGD", "dense", 0.1, **network)]
    found = results(*times)
    assert plot.abscissa([{"count": 16, "m": 64, "n": n} for n in (1, 2, 4)]) == "n"
    assert plot.abscissa([{"padding": n, "n": n + 1, "r": n % 3 + 1} for n in range(9)]) == "r"
    assert plot.abscissa([{"padding": n, "n": n + 1} for n in range(9)]) == "n"
    assert plot.abscissa([{"n": n} for n in (1, 2)]) is None
    assert plot.abscissa([{"network": "VGG16", "rank": rank} for rank in (0.2, 0.5, 64)]) is None
    files = plot.draw(found, tmp_path / "a")
    assert [file.name for file in files] == ["a-roofline.png", "a-speedup.png"] and all(map(png, files))
    row = next(found.rows("clip"))
    (mine, x, y), (other, *_) = plot.roofline_marks(row)
    assert (mine, other) == (True, False) and x == pytest.approx(1e4 * 512 / 4096) and y == pytest.approx(5.12e6 / 8e-6)


def test_growth(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    fit = {"subject": "clip", "sweep": "rank", "provider": "ours", "mode": "call", "exponent": 2.9, "theory": 3}
    fit |= {"dtype": "fp32", "cache": "warm", "threads": 1, "estimates": [[64, 5e-3]]}
    fits = [fit | {"points": [[8, 1e-5], [16, 8e-5], [32, 6e-4]]}]
    scaling = types.SimpleNamespace(fits=lambda results: fits)
    monkeypatch.setitem(sys.modules, "bench.scaling", scaling)
    monkeypatch.setattr("bench.scaling", scaling, raising=False)
    shape = {"subject": "clip", "sweep": "rank", "value": 8}
    found = results(time_("ours", "ours", 1e-5, op="scaling", row="clip rank 8", shape=shape))
    assert [file.name for file in plot.draw(found, tmp_path / "b")] == ["b-roofline.png", "b-scaling.png"]
    assert png(tmp_path / "b-scaling.png")
    found_columns = columns(tables.show(found), "of ")
    assert found_columns["exponent"] == "2.90" and found_columns["time there"] == "600 us"
    assert found_columns["beyond memory, estimated"] == "64: 5.00 ms"
    header, cells, _ = tables.TABLES["scaling"](found, lambda r: True)
    assert dict(zip(header, cells[0], strict=True))["theory"] == "3.00"
    assert tables.TABLES["scaling"](found, lambda r: r["threads"] == 2) == ([], [], [])


def test_a_file_that_is_no_text_is_named(tmp_path):
    file = tmp_path / "noise.jsonl"
    file.write_bytes(bytes(range(128, 256)))
    with pytest.raises(ValueError, match="noise.jsonl is no results file: it is not text"):
        Results.read(file)


def test_nothing_to_draw(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="no times to draw"):
        plot.draw(results(), tmp_path / "c")
