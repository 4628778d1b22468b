"""Tables in Markdown files."""

from pathlib import Path

import pytest
from helpers.bench_records import CEILINGS, ROW, RUN, time_record

from bench import markdown
from bench.records import Writer

ROOT = Path(__file__).parents[2]


@pytest.fixture
def written(tmp_path):
    write = Writer(tmp_path / "results" / "a.jsonl")
    network = {"row": "VGG16 20%", "shape": {"network": "VGG16", "rank": 0.2}}
    for record in (
        RUN, CEILINGS, *ROW,
        time_record("ours", "ours", 1.0, op="train", mode="iteration", **network),
        time_record("dense", "dense", 3.0, op="train", mode="iteration", **network),
        time_record("dense compiled", "dense", 2.5, op="train", mode="iteration", **network),
        time_record("ours", "ours", 0.1, op="step", **network),
        time_record("released", "context", 3.8, op="step", **network),
    ):  # fmt: skip
        write(record)
    return tmp_path


def test_markdown_tables(written):
    text = (
        "# Title\n\n<!-- python -m bench networks: results/a.jsonl threads=1 -->\nold\n<!-- end -->\n"
        '\nwords\n\n<!-- python -m bench rows: results/a.jsonl op="clip,qr" row=16* -->\n<!-- end -->\nlast\n'
    )
    made = markdown.rewrite(text, written)
    assert markdown.rewrite(made, written) == made
    assert "old" not in made and made.endswith("<!-- end -->\nlast\n")
    lines = made.splitlines()
    assert lines[3].startswith("| network, rank | iterations / s | iteration: dense | iteration: fast PyTorch |")
    assert lines[5] == "| VGG16 20% | 1.00 | 2.50 | - | - | 38.0 | - | 0.10 % |"
    (row,) = [line for line in lines if line.startswith("| clip 16 x 8x8 | 1.00 ms |")]
    rule = lines[lines.index(row) - 1]
    assert rule.count("|") == row.count("|") and rule.startswith("| --- | ---: |")
    assert "`results/a.jsonl`: fp32, warm, 1 thread, A CPU, torch 2.13.0, condlr_ext 0.1.0 at abc1234" in made


@pytest.mark.parametrize(
    "comment, message",
    [
        ("<!-- python -m bench rows: results/a.jsonl -->\n", "needed"),
        ("<!-- python -m bench rows: results/a.jsonl -->\n<!-- python -m bench rows: x -->\n", "needed"),
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
        markdown.rewrite(comment, written)


def test_score(written):
    made = markdown.rewrite("<!-- python -m bench score: results/a.jsonl op=clip -->\n<!-- end -->", written)
    assert made.splitlines()[3:5] == [
        "| clip | the best other | 1 of 1 rows | 2.00 | 2.00 | 2.00 |",
        "| clip | dense | 0 of 1 rows | 0.50 | 0.50 | 0.50 |",
    ]


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda page: page.name)
def test_tables_of_the_documentation_are_those_of_the_results(page):
    text = page.read_text()
    assert markdown.rewrite(text) == text
    assert page.name != "benchmarks.md" or text.count("<!-- python -m bench ") >= 7
