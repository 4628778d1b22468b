"""The tables and the figure of the documentation are those of the committed results."""

import csv
import html
import itertools
import re

import numpy as np
import pytest

from condlr_ext.experiments import TrainConfig, report
from studies import figure, tables

MARK = re.compile(r"<!-- (study|sizes|gaps) [\w-]+ -->\n(.*?)<!-- end -->", re.DOTALL)
RESULTS = sorted(tables.RESULTS.glob("*.csv"))


@pytest.mark.parametrize("page", tables.pages(), ids=lambda page: page.name)
def test_marked_tables_are_those_of_the_results(page):
    text = page.read_text(encoding="utf-8")
    assert tables.rewrite(text) == text, "run python -m studies"


def test_there_are_tables():
    found = [kind for page in tables.pages() for kind, _ in MARK.findall(page.read_text(encoding="utf-8"))]
    assert found.count("study") >= 7 and found.count("sizes") >= 2 and found.count("gaps") >= 7


@pytest.mark.parametrize("kind", ["study", "sizes", "gaps"])
def test_a_changed_cell_is_found(kind):
    text = (tables.ROOT / "docs" / "results" / "digits.md").read_text(encoding="utf-8")
    broken = re.sub(rf"(<!-- {kind} digits-mlp -->.*?)(\d+\.\d ±)", r"\g<1>0.3 ±", text, count=1, flags=re.DOTALL)
    assert broken != text and tables.rewrite(broken) == text


@pytest.mark.parametrize(
    ("study", "row", "title"),
    [("digits-none", "dense lr 0.5", "clean %"), ("digits-mlp", "dense lr 9", "clean %"), ("digits-mlp", "dense lr 0.5", "odd")],
)  # fmt: skip
def test_a_table_of_what_is_not_there_is_an_error(study, row, title):
    with pytest.raises(ValueError, match=study):
        tables.rewrite(f"<!-- study {study} -->\n| run | {title} |\n| --- | --- |\n| {row} |\n<!-- end -->")


@pytest.mark.parametrize("old, new", [
    ("<!-- end -->", ""),
    ("<!-- end -->", "<!-- sizes digits-mlp -->"),
    ("<!-- sizes digits-mlp -->", "<!-- sizes digits-mlp-->"),
    ("| --- | ---: |\n| dense lr 0.5 | 98.0 |\n", ""),
    ("dense lr 0.5", "dense lr 9"),
    ("budget 0.27", "budget 9"),
])  # fmt: skip
def test_faulty_marks(old, new):
    text = "<!-- sizes digits-mlp -->\n| run | budget 0.27 |\n| --- | ---: |\n| dense lr 0.5 | 98.0 |\n<!-- end -->\n"
    tables.rewrite(text)
    assert old in text
    with pytest.raises(ValueError, match=r"needed: <!-- study NAME|sizes digits-mlp: no (table|run or column)"):
        tables.rewrite(text.replace(old, new))


def test_gaps_and_means_are_those_of_the_rows():
    with open(tables.RESULTS / "digits-mlp.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))

    def worst(label):
        return 100 * np.array(
            [float(r["worst@0.1"]) for r in sorted(rows, key=lambda r: r["seed"]) if r["label"] == label]
        )

    first, second = worst("CondLR τ=0.1 lr 0.5"), worst("dense σ≤1 clip lr 0.2")
    gap, deviation = np.mean(first - second), np.std(first - second, ddof=1)
    assert len(first) == 5 and gap < 0
    ((_, _, cell),) = tables.gaps(
        "digits-mlp", ["run", "above", "worst 0.1"], [["CondLR τ=0.1 lr 0.5", "dense σ≤1 clip lr 0.2"]]
    )
    assert cell == f"−{-gap:.1f} ± {deviation:.1f}"
    ((_, cell),) = tables.study("digits-mlp", ["run", "worst 0.1"], [["CondLR τ=0.1 lr 0.5"]])
    assert cell == f"{first.mean():.1f} ± {first.std(ddof=1):.1f}"


def test_points():
    assert tables.points([-1.04, -3.04]) == "−2.0 ± 1.4" and tables.points([0.01, -0.03]) == "0.0 ± 0.0"
    assert tables.points([2.0]) == "+2.0" and tables.points([]) == "-"


@pytest.mark.parametrize(
    "path", sorted((tables.ROOT / "docs" / "results").glob("digits*.md")), ids=lambda path: path.stem
)
def test_numbers_of_the_text_stand_in_its_tables(path):
    text = path.read_text(encoding="utf-8")
    number = re.compile(r"(?<![\d.])\d+\.\d(?!\d)")
    said = set(number.findall(MARK.sub("", text)))
    shown = {n for _, table in MARK.findall(text) for n in number.findall(table)}
    assert said <= shown | {"1.1", "1.5"}  # bounds of κ


def test_the_figure_is_that_of_the_results():
    svg = figure.PATH.read_text(encoding="utf-8")
    assert html.escape(figure.description(), quote=False) in svg, "run python -m studies"
    for points in figure.data().values():
        assert [e for e, *_ in points] == [0, *figure.BUDGETS] and all(0 <= mean <= 100 for _, mean, _ in points)


@pytest.mark.figures
def test_drawing_twice_gives_the_same_bytes():
    assert figure.draw() == figure.draw()


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_results_are_of_the_studies_settings(path):
    """Every run and seed of the study has one row, and its settings are those of the study's file."""
    config = TrainConfig.read(tables.ROOT / "studies" / f"{path.stem}.toml").plain()
    settings, rows = report.read(path)
    pairs = [(row["run"], row["seed"]) for row in rows]
    assert len(set(pairs)) == len(pairs)
    assert set(pairs) == set(itertools.product(config["runs"], config["seeds"]))
    assert {name: config[name] for name in settings if name in config} == {
        k: v for k, v in settings.items() if k in config
    }
    assert {row["status"] for row in rows} <= {"trained", "diverged", "collapsed"}
    assert all(row["status"] == "diverged" or row["clean"] >= row[f"worst@{settings['eps'][-1]:g}"] for row in rows)


def test_there_are_results():
    assert len(RESULTS) >= 11
    assert all(len(path.read_text(encoding="utf-8").splitlines()) <= 1500 for path in RESULTS)
