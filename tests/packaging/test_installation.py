"""`condlr info` on one screen: what the choices rest on, what is wrong, and what to do."""

import importlib
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

from condlr_ext import _installation, info, ops


@pytest.fixture(autouse=True)
def whole(monkeypatch):
    """An installation without a fault, for each test to break."""
    host = SimpleNamespace(
        PATH="_core.so",
        isa=lambda: "avx512",
        isa_levels=lambda: ["baseline", "avx2", "avx512"],
        build_info=lambda: {
            "compiler": "gcc",
            "torch_built_against": "2.13",
            "isa_levels": ["baseline", "avx2", "avx512"],
        },
        cpu_features=lambda: {"avx2": True, "fma": True, "avx512f": True},
    )
    compiled = SimpleNamespace(ops_reason=None, host_reason=None, host=host, ops_path="_C.so")
    monkeypatch.setattr(ops, "COMPILED", compiled)
    monkeypatch.setattr(_installation, "_torchvision", lambda: None)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("CONDLR_EXT_ISA", raising=False)
    return compiled


def test_nothing_is_wrong():
    assert _installation.problems() == [] and info.report().endswith("no problem found")


def test_one_screen():
    lines = info.report().splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 120


@pytest.mark.parametrize("compiler", [None, "g++"])
def test_no_compiled_kernels(whole, monkeypatch, compiler):
    whole.ops_reason, whole.host = "no compiled op library _C in there", None
    monkeypatch.setattr(shutil, "which", lambda name: compiler if name == compiler else None)
    (problem,) = _installation.problems()
    assert "plain PyTorch" in problem.what and "no compiled op library" in problem.what
    assert ("install a C++ compiler" in problem.remedy) == (compiler is None)
    assert "--no-cache-dir" in problem.remedy  # else pip takes the wheel that it built before
    assert "PROBLEM" in info.report() and info.collect()["problems"] == [problem._asdict()]


def test_where_no_kernels_are_built_there_is_nothing_to_do(whole, monkeypatch):
    whole.ops_reason = "no compiled op library"
    monkeypatch.setattr(sys, "platform", "darwin")
    (problem,) = _installation.problems()
    assert problem.remedy.startswith("none: the kernels are built on Linux only")


@pytest.mark.parametrize("version, wrong", [("2.9.1+cpu", True), ("2.10.0", False), ("2.14.0a0+git1", False)])
def test_another_torch(monkeypatch, version, wrong):
    monkeypatch.setattr(torch, "__version__", version)
    assert [p.what for p in _installation.problems()] == ([f"torch {version} is older than 2.10"] if wrong else [])


def test_no_avx(whole, monkeypatch):
    whole.host.isa_levels = lambda: ["baseline", "avx2"]
    assert not _installation.problems()
    whole.host.isa_levels = lambda: ["baseline"]
    whole.host.cpu_features = lambda: {"avx2": False, "fma": True, "avx512f": False}
    (problem,) = _installation.problems()
    assert "this CPU has no avx2" in problem.what
    whole.host.build_info = lambda: {"isa_levels": ["baseline"]}  # of another architecture
    assert not _installation.problems()


def test_a_lowered_instruction_set(monkeypatch):
    monkeypatch.setenv("CONDLR_EXT_ISA", "avx512")
    assert not _installation.problems()
    monkeypatch.setenv("CONDLR_EXT_ISA", "baseline")
    assert [p.remedy for p in _installation.problems()] == ["unset it"]


def test_a_torchvision_of_another_torch(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(importlib, "import_module", lambda name: 1 / 0)
    problem = _installation._torchvision.__wrapped__()
    assert "cannot be imported beside torch" in problem.what and "division by zero" in problem.what


@pytest.mark.parametrize(
    "installed, version, compiler, what",
    [
        (True, "3.7.1", "gcc", None),
        (True, None, "gcc", None),  # of another distribution
        (False, None, "gcc", "Triton is not installed"),
        (True, "3.5.0", "gcc", "Triton 3.5.0 is not one"),
        (True, "3.10.0", "gcc", "Triton 3.10.0 is not one"),
        (True, "3.7.1", None, "with a C compiler"),
    ],
)
def test_on_a_gpu(monkeypatch, installed, version, compiler, what):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_installation.devices, "INSTALLED", installed)
    monkeypatch.setattr(_installation, "version", lambda package: version)
    monkeypatch.setattr(shutil, "which", lambda name: compiler)
    found = _installation.problems()
    assert len(found) == (what is not None) and all(what in problem.what for problem in found)


def test_every_choice_says_what_it_rests_on():
    table = info.collect()["ops"]["cpu"]
    assert all(entry["rests_on"] for entry in table.values())
    for name in ("low_rank_linear", "svd", "qr", "polar"):
        assert "measured on" in table[name]["rests_on"]
