"""Tables as text and as Markdown."""

import pytest

from condlr_ext import _table

ROWS = [["a", "1.5", "-", "plain"], ["longer name", "-20", "3 ± 1", "x"]]


def test_text_is_aligned():
    lines = _table.text(["run", "max\nκ", "kept", "route"], ROWS).splitlines()
    assert lines == [
        "             max",
        "run            κ   kept  route",
        "a            1.5      -  plain",
        "longer name  -20  3 ± 1  x",
    ]


def test_text_without_rows_is_the_header():
    assert _table.text(["eps", "worst"], []) == "eps  worst"


def test_markdown():
    assert _table.markdown(["run", "max\nκ", "kept", "route"], ROWS).splitlines() == [
        "| run | max κ | kept | route |",
        "| --- | ---: | ---: | ---: |",
        "| a | 1.5 | - | plain |",
        "| longer name | -20 | 3 ± 1 | x |",
    ]


@pytest.mark.parametrize("rows", [[["a"]], [["a", "b", "c"]]])
def test_a_row_of_another_length_is_an_error(rows):
    with pytest.raises(ValueError, match="zip"):
        _table.text(["x", "y"], rows)
