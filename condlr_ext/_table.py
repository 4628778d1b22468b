"""Tables as aligned text and as Markdown."""

import re
from collections.abc import Sequence
from itertools import zip_longest

_NUMBER = re.compile(r"[-+−]?(\.?\d|nan|inf)")


def text(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table as aligned text.

    The first column and columns without a number are flush left, the others flush right.

    Args:
        titles: One per column; a line break in a title starts another line of the header.
        rows: Cells as text.

    Returns:
        The lines, without a final line break.
    """
    header = list(zip_longest(*(title.split("\n")[::-1] for title in titles), fillvalue=""))[::-1]
    columns = []
    for i, column in enumerate(zip(*header, *rows, strict=True)):
        right = i > 0 and any(_NUMBER.match(cell) for cell in column[len(header) :])
        width = max(map(len, column))
        columns.append([cell.rjust(width) if right else cell.ljust(width) for cell in column])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))


def markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown, the first column flush left and the others flush right.

    Args:
        titles: One per column; line breaks become spaces.
        rows: Cells as text.

    Returns:
        The lines, with a final line break.
    """
    lines = [[title.replace("\n", " ") for title in titles], ["---"] + ["---:"] * (len(titles) - 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
