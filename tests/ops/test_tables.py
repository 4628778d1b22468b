"""Tables of measured times: which one counts, what it decides, and what is refused."""

import json
import math
import os

import pytest
import torch

import condlr_ext
from condlr_ext import ops
from condlr_ext.ops import cost_model_cpu, layers, tables

ROW = ["both", "linear", "float32", 64, 96, 80, 16, 10.0, 20.0, 30.0, 25.0]
GOOD = {"device": "A CPU", "threads": 1, "date": "2026-01-02", "columns": list(tables.COLUMNS), "rows": [ROW]}


@pytest.fixture(autouse=True)
def device(monkeypatch, tmp_path):
    monkeypatch.setattr(tables, "cpu", lambda: "A CPU")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setenv("CONDLR_EXT_TABLES", str(tmp_path))
    tables.reload()
    yield
    tables.reload()


def write(folder, content, name="mine.json"):
    file = folder / name
    file.write_text(content if isinstance(content, str) else json.dumps({"format": tables.FORMAT, "tables": content}))
    tables.reload()
    return file


def args(rows=64, n=96, m=80, r=16):
    factors = [torch.zeros(shape, requires_grad=True) for shape in ((m, r), (r, r), (n, r), (m,))]
    return torch.zeros(rows, n, requires_grad=True), *factors


@pytest.mark.skipif(ops.COMPILED.ops_reason is not None, reason="built without compiled parts")
def test_the_fastest_measured_one_serves(tmp_path):
    for kernels, products, merged, served, route in (
        (10, 20, 30, True, "factorized"),
        (20, 10, 30, False, "factorized"),
        (20, 10, 5, False, "merged"),
        (None, 10, None, False, "factorized"),
    ):
        write(tmp_path, [GOOD | {"rows": [ROW[:7] + [kernels, products, merged, 7]]}])
        X, U, *rest = args()
        assert layers.is_served(X, U) == served
        plan = cost_model_cpu.linear(X, U, *rest)
        assert plan.route == route and plan.dense == 7
        assert plan.source == "measured on A CPU, 2026-01-02, in mine.json, at 64 rows, n 96, m 80, rank 16"
        assert layers.low_rank_linear.rests_on("cpu") == "measured on A CPU, 2026-01-02, in mine.json"


def test_convolutions_have_rows_of_their_own(tmp_path):
    write(tmp_path, [GOOD | {"rows": [["forward", "conv", "float32", 512, 27, 8, 4, None, 20.0, 10.0, 9.0]]}])
    layer = condlr_ext.LowRankConv2d(3, 8, 3, padding=1, rank=4)
    with torch.no_grad():
        assert layer.plan(torch.zeros(2, 3, 16, 16))[:3] == (20.0, 10.0, 9.0)
    assert layer.plan(torch.zeros(2, 3, 16, 16)).source == "estimated"  # no time with gradients
    both = condlr_ext.LowRankConv2d(6, 8, 3, padding=1, rank=4, groups=2)
    with torch.no_grad():
        assert both.plan(torch.zeros(2, 6, 16, 16)).source == "estimated"


def test_a_table_is_for_similar_sizes_a_device_and_its_threads(tmp_path, monkeypatch):
    def source(**sizes):
        return cost_model_cpu.linear(*args(**sizes)).source

    write(tmp_path, [GOOD])
    assert "measured" in source() and "measured" in source(rows=128, n=48) and source(rows=129) == "estimated"
    write(tmp_path, [GOOD | {"threads": 2}, GOOD | {"device": "Another CPU"}])
    assert source() == "estimated" and "routes estimated" in layers.low_rank_linear.rests_on("cpu")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert "measured" in source()
    monkeypatch.setenv("CONDLR_EXT_TABLES", "")
    tables.reload()
    assert source() == "estimated"


BROKEN = {
    "no JSON": "{",
    "not a dict": "[]",
    "another format": json.dumps({"format": 1, "tables": []}),
    "another file": json.dumps({"model": "gpt"}),
    "deep": "[" * 100_000,
    "no number": json.dumps(
        {"format": tables.FORMAT, "tables": [GOOD | {"rows": [ROW[:7] + [math.nan, 1.0, 1.0, 1.0]]}]}
    ),
    "unknown key": [GOOD | {"kernel": "x"}],
    "no date": [GOOD | {"date": "yesterday"}],
    "a long name": [GOOD | {"device": "x" * 201}],
    "an escape in a name": [GOOD | {"device": "\x1b[2J"}],
    "other columns": [GOOD | {"columns": ["rows"]}],
    "rows are no list": [GOOD | {"rows": "x"}],
    "a short row": [GOOD | {"rows": [ROW[:-1]]}],
    "an unknown direction": [GOOD | {"rows": [["sideways", *ROW[1:]]]}],
    "an unhashable direction": [GOOD | {"rows": [[[], *ROW[1:]]]}],
    "a size of 0": [GOOD | {"rows": [ROW[:3] + [0] + ROW[4:]]}],
    "a size beyond reason": [GOOD | {"rows": [ROW[:3] + [10**400] + ROW[4:]]}],
    "a negative time": [GOOD | {"rows": [ROW[:7] + [-1.0, 1.0, 1.0, 1.0]]}],
    "an infinite time": [GOOD | {"rows": [ROW[:7] + [1e400, 1.0, 1.0, 1.0]]}],
    "a true time": [GOOD | {"rows": [ROW[:7] + [True, 1.0, 1.0, 1.0]]}],
    "no time of PyTorch": [GOOD | {"rows": [ROW[:7] + [1.0, None, 1.0, 1.0]]}],
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_what_is_no_table_is_refused_by_name_and_plain_pytorch_serves(content, tmp_path):
    file = write(tmp_path, content)
    with pytest.warns(RuntimeWarning, match=f"{file} is no table of measured times: .*plain PyTorch serves"):
        assert not layers.is_served(*args()[:2])
    assert cost_model_cpu.linear(*args()).route == "factorized"
    assert layers.low_rank_linear.rests_on("cpu") == f"plain PyTorch, since {file} was refused"


def test_a_pipe_and_a_huge_file_are_not_read(tmp_path):
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.json")
        with pytest.raises(ValueError, match="pipe.json is no table .* a regular file of at most"):
            tables.read(tmp_path / "pipe.json")
    with open(tmp_path / "huge.json", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match="huge.json is no table .* a regular file of at most"):
        tables.read(tmp_path / "huge.json")


def test_a_refused_file_beside_a_good_one(tmp_path):
    """What was measured on this device still counts."""
    write(tmp_path, [GOOD])
    write(tmp_path, "{", "broken.json")
    with pytest.warns(RuntimeWarning, match="broken.json"):
        assert "measured on A CPU" in cost_model_cpu.linear(*args()).source


def test_the_shipped_tables_can_be_read_and_say_where_they_are_from():
    for entry in tables.read(tables.Path(tables.__file__).with_name("measured.json")):
        assert entry["origin"] and entry["commit"]


def test_the_folder_is_that_of_the_version(monkeypatch, tmp_path):
    monkeypatch.delenv("CONDLR_EXT_TABLES")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if tables.sys.platform == "linux":
        assert tables.folder() == tmp_path / "condlr_ext" / condlr_ext.__version__
