"""A short study, trained once for all tests of this folder."""

import pytest

from condlr_ext.experiments import TrainConfig, train


@pytest.fixture(scope="package")
def trained(tmp_path_factory):
    """Results of short runs, and their folder."""
    out = tmp_path_factory.mktemp("trained")
    runs = ("dense", "vanilla", "condlr:tau=0.1", "condlr:tau=0,rank=4,sigma_max=1.5,band=optimal")
    return train(TrainConfig(runs=runs, epochs=2, attack_steps=3, out=out)), out
