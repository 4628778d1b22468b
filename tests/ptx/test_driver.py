"""Launches of Triton come to the executor, and only while it is asked for."""

import pytest
import torch
from helpers.ptx import driver, memory
from helpers.ptx.driver import executing

import condlr_ext
from condlr_ext.errors import BackendError
from condlr_ext.kernels.triton import devices
from condlr_ext.kernels.triton.linear import launch as layers
from condlr_ext.kernels.triton.spectral import newton_schulz


def forward(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    low = [torch.randn(s, generator=generator).to(dtype) for s in ((20, 9), (7, 3), (3, 3), (9, 3), (7,))]
    return layers.low_rank_linear(*low)[0]


def test_only_within():
    """Each run has its own architecture; outside CPU tensors are refused."""
    for sm in (80, 90):
        with executing(sm) as run:
            assert devices.architecture(torch.device("cpu")) == f"sm_{sm}"
            with condlr_ext.backend("triton"):
                condlr_ext.functional.low_rank_linear(*(torch.ones(s) for s in ((2, 4), (3, 2), (2, 2), (4, 2), (3,))))
        ((name, grid, instructions, counts),) = run.launches
        assert name == "chain" and grid == (1, 1, 1) and instructions == run.instructions > 100 and run.reports == []
        assert counts is None
    with condlr_ext.backend("triton"), pytest.raises(BackendError, match="a tensor is on cpu"):
        condlr_ext.functional.low_rank_linear(*(torch.ones(s) for s in ((2, 4), (3, 2), (2, 2), (4, 2), (3,))))


def test_reports_raise_unless_they_are_allowed(monkeypatch):
    original = memory.Allocation.__init__

    def shorter(self, storage, label):
        original(self, storage, label)
        self.nbytes -= 4 if label == "Y_ptr" else 0

    monkeypatch.setattr(memory.Allocation, "__init__", shorter)
    with executing(80) as run, pytest.raises(memory.SanitizerError, match="(?s)memcheck: chain .*Y_ptr.*low_rank.py:"):
        forward()
    assert [report.kind for report in run.reports] == ["memcheck"]
    monkeypatch.setitem(driver.ALLOWED, ("low_rank.py", "chain", "memcheck"), "made up here")
    with executing(80) as run:
        forward()
    assert run.reports == []


def test_allowed_reports_have_a_reason():
    assert all(reason for reason in driver.ALLOWED.values())


def test_the_order_of_blocks_does_not_matter():
    """The same bits by a group of programs in several orders of their turns."""
    A = torch.linalg.qr(torch.randn(66, 66))[0][None] * torch.linspace(1, 2, 66)
    results = []
    for schedule in (None, 1, 2):
        with executing(90, schedule=schedule) as run:
            results.append(torch.empty_like(A))
            assert newton_schulz.polar_factor(A, results[-1]).tolist() == [0]
        assert run.launches[0][1] == (3, 1, 1)
    assert all(torch.equal(result, results[0]) for result in results)


def test_tensors_are_forgotten():
    with executing(80) as run:
        forward()
        assert len(run.memory.allocations) > 1
        run.forget()
        assert run.memory.allocations == [None] and run.launches == []
