"""What a step sends is what the model of its cost counts."""

import pytest

from bench import gloo, sharding


def measured(mesh, name: str) -> gloo.Step:
    return gloo.measure(mesh, name, layers=3, width=16, rank=4, steps=0)


@pytest.mark.parametrize("name", ["`CondLRSGD`", "`CondLRAdamW`"])
def test_one_sum_of_so_many_numbers(pool, name):
    for step in pool.run(measured, 3, name):
        assert (step.calls, step.bytes) == (1, 8 * 3 * sharding.numbers_of_layer(4))
