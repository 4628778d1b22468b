"""Scratch memory of the compiled kernels goes back to the system above a limit."""

from pathlib import Path

import pytest
import torch

import condlr_ext

STATM = Path("/proc/self/statm")
LIMIT = 64 * 2**20


def resident():
    return int(STATM.read_text().split()[1]) * 4096


@pytest.mark.skipif(not STATM.exists(), reason="needs /proc")
@pytest.mark.skipif(condlr_ext.ops.COMPILED.ops_path is None, reason="needs the compiled kernels")
@pytest.mark.parametrize("call", [condlr_ext.linalg.svd, condlr_ext.linalg.qr, condlr_ext.linalg.polar])
def test_scratch_above_the_limit_is_returned(call):
    A = torch.randn(160_000, 64)
    with condlr_ext.backend("cpu"):
        call(A[:100])
        before = resident()
        call(A)
        kept = resident() - before
    assert kept < LIMIT + 2**24
