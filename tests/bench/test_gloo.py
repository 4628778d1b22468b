"""What sharded steps send, measured on two processes."""

import pytest

from bench import gloo, sharding

SIZE = 3, 16, 4, 1  # layers, width, rank, steps


@pytest.mark.slow
def test_the_table_counts_what_the_model_counts():
    _, _, *rows = gloo.table((1, 2), SIZE).partition("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [(name, int(processes)) for name, processes, *_ in cells] == [
        (name, processes) for name in gloo.OPTIMIZERS for processes in (1, 2)
    ]
    by_row = {(name, processes): (calls, size) for name, processes, calls, size, _ in cells}
    counted = f"{8 * 3 * sharding.numbers_of_layer(4) / 1e3:.1f}"
    for name in gloo.OPTIMIZERS:
        assert by_row[name, "1"] == ("0", "0.0")
    assert by_row["`CondLRSGD`", "2"] == by_row["`CondLRAdamW`", "2"] == ("1", counted)
    assert by_row["`Projector` on torch's SGD", "2"][0] == "2"
