"""Fixtures of the tests of the baselines."""

import pytest

from condlr_ext.experiments import data


@pytest.fixture(scope="session")
def digits():
    """640 real digits [640, 64] and their labels."""
    split = data.load("digits", 0)
    return split.x_train[:640].flatten(1), split.y_train[:640]
