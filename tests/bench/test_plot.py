"""Figures."""

import pytest
from helpers.bench_records import results, time_record

from bench import markdown, plot, tables
from bench.cases import scaling


def png(file):
    return file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and file.stat().st_size > 5000


def test_figures(tmp_path):
    pytest.importorskip("matplotlib")
    times = []
    for n in (8, 16, 64):
        shape = {"row": f"16 x {n}x{n}", "shape": {"count": 16, "m": n, "n": n}}
        work = [[1e4 * n**3, 64 * n * n]]
        times += [
            time_record("ours", "ours", 1e-6 * n, work=work, **shape),
            time_record("plain", "same", 1e-7 * n**2, work=work, **shape),
        ]
    network = {"op": "step", "row": "VGG16 20%", "shape": {"network": "VGG16", "rank": 0.2}}
    times += [time_record("ours", "ours", 1.0, **network), time_record("dense SGD", "dense", 0.1, **network)]
    found = results(*times)
    assert plot.abscissa([{"count": 16, "m": 64, "n": n} for n in (1, 2, 4)]) == "n"
    assert plot.abscissa([{"padding": n, "n": n + 1, "r": n % 3 + 1} for n in range(9)]) == "r"
    assert plot.abscissa([{"padding": n, "n": n + 1} for n in range(9)]) == "n"
    assert plot.abscissa([{"n": n} for n in (1, 2)]) is None
    assert plot.abscissa([{"network": "VGG16", "rank": rank} for rank in (0.2, 0.5, 64)]) is None
    assert plot.abscissa([{"layer": {"r": rank}} for rank in (1, 2, 3)]) is None
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
    monkeypatch.setattr(scaling, "fits", lambda results: fits)
    shape = {"subject": "clip", "sweep": "rank", "value": 8}
    found = results(time_record("ours", "ours", 1e-5, op="scaling", row="clip rank 8", shape=shape))
    assert [file.name for file in plot.draw(found, tmp_path / "b")] == ["b-roofline.png", "b-scaling.png"]
    assert png(tmp_path / "b-scaling.png")
    titles, cells, _ = markdown.TABLES["scaling"](found, lambda r: True)
    line = dict(zip(titles, cells[0], strict=True))
    assert (line["exponent"], line["theory"], line["time there"]) == ("2.90", "3.00", "600 us")
    assert line["beyond memory, estimated"] == "64: 5.00 ms"
    assert any("beyond memory, estimated" in line for line in tables.show(found))
    assert markdown.TABLES["scaling"](found, lambda r: r["threads"] == 2) == ([], [], [])


def test_nothing_to_draw(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="no times to draw"):
        plot.draw(results(), tmp_path / "c")
