"""Writes to U and V between steps of the Triton step, and steps that move nothing, in Triton's interpreter."""

import os

import pytest
import torch
from helpers import external_writes as writes

import condlr_ext

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs a process with TRITON_INTERPRET=1"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, about NaN and Inf
]


@pytest.fixture(autouse=True)
def by_the_kernels():
    with condlr_ext.backend("triton"):
        yield


def test_the_weight_does_not_jump():
    writes.check_that_the_weight_does_not_jump(writes.sgd, writes.average_with_another, torch.float32)


def test_the_next_step_keeps_the_bound_and_moves_everything():
    writes.check_the_next_step(writes.adamw, writes.through_a_vector)


def test_a_frozen_factor_is_refused_by_name():
    writes.check_that_a_frozen_factor_is_refused(writes.sgd)


@pytest.mark.parametrize(
    "make, band, dtype", [(writes.sgd, "rms", torch.float16), (writes.adamw, "mean", torch.float32)]
)
def test_a_step_with_lr_0_and_zero_gradients_is_the_identity(make, band, dtype):
    writes.check_the_identity(make, band, dtype)
