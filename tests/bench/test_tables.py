"""Tables in the terminal, and results files."""

import json
import re

import pytest
from helpers.bench_records import CEILINGS, ROW, RUN, results, time_record

from bench import cells, tables
from bench.records import Results, Writer


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
        time_record("ours", "ours", 1, row="32 x 8x8", reason="wrong: A 1e+00 > 1e-06"),
        time_record("plain", "same", 1e-3, row="32 x 8x8"),
    ]
    lines = tables.show(results(*ROW, *lost))
    assert any("ours faster than the best other in 1 of 2 rows" in line for line in lines)
    assert any(re.match(r"\s+32 x 8x8\s+-\s+-\s+plain", line) for line in lines)
    assert "no time for ours: wrong: A 1e+00 > 1e-06 (32 x 8x8)" in "\n".join(lines)


def test_reasons_that_differ_in_numbers_are_one():
    rows = [time_record("other", "same", 1, row=f"{n}", reason=f"wrong: A {n}e-03 > 1e-06") for n in (3, 4)]
    lines = tables.show(results(*rows, time_record("ours", "ours", 1e-3, row="3")))
    assert [line.strip() for line in lines if "no time" in line] == [
        "no time for other: wrong: A 3e-03 > 1e-06 (2 of 2 rows)"
    ]


def test_modes_and_threads_are_columns_only_where_they_vary():
    other = [time_record("ours", "ours", 1e-3, threads=2, mode="backward")]
    header = next(line for line in tables.show(results(*ROW, *other)) if line.lstrip().startswith("row "))
    assert header.split()[1:4] == ["mode", "threads", "time"]
    assert "(fp32, warm)" in tables.heading("clip", list(results(*ROW, *other).rows()))


def test_detail_has_every_provider():
    lines = [re.split(r"\s{2,}", line.strip()) for line in tables.show(results(*ROW), detail=True)]
    assert ["16 x 8x8", "ours", "ours", "1.00 ms", "2.0 %", "11", "1.00", "2e-07", "10 %", "-"] in lines
    assert ["slow", "same", "5.00 ms", "2.0 %", "11", "5.00", "2e-07", "2.0 %", "-"] in lines
    assert ["absent", "-", "none", "-", "0", "-", "2e-07", "-", "-"] in lines


def test_our_backend_where_ours_has_no_time():
    lines = tables.show(results(time_record("ours: cpu", "ours", 1e-3), *ROW[1:2]))
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
    assert cells.duration(seconds) == text


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


def test_a_file_that_is_no_text_is_named(tmp_path):
    file = tmp_path / "noise.jsonl"
    file.write_bytes(bytes(range(128, 256)))
    with pytest.raises(ValueError, match="noise.jsonl is no results file: it is not text"):
        Results.read(file)
