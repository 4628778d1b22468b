"""Compiled files and their loading, `condlr info`, and the package without compiled files, which says so once."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import build_backend
import condlr_ext
from condlr_ext import info, ops

PACKAGE = Path(condlr_ext.__file__).parent
NO_BUILD = pytest.mark.skipif(os.environ.get("CONDLR_EXT_BUILD") == "none", reason="built without compiled parts")


@NO_BUILD
def test_compiled_parts_are_loaded_from_this_package():
    assert Path(ops.COMPILED.ops_path).parent == PACKAGE, ops.COMPILED.ops_reason
    assert ops.COMPILED.host and ops.COMPILED.host.PATH.parent == PACKAGE, ops.COMPILED.host_reason


@NO_BUILD
@pytest.mark.parametrize("where", ["root", "elsewhere"])
def test_info_shows_what_is_loaded(where, tmp_path):
    cwd = PACKAGE.parent if where == "root" else tmp_path
    command = [sys.executable, "-m", "condlr_ext", "info", "--json"]
    env = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    data = json.loads(subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=True).stdout)
    assert Path(data["_C"]).name.startswith("_C.") and Path(data["_C"]).parent == Path(data["package"])
    assert data["versions"]["torch"] == torch.__version__
    assert data["build"]["torch_target"] == "2.10" and data["isa"] in data["build"]["isa_levels"]
    table = data["ops"]["cpu"]
    assert {name: entry["served_by"] for name, entry in table.items()} == {name: "cpu" for name in ops.OPS}
    for name, entry in table.items():
        why = "TRITON_INTERPRET=1" if ops.OPS[name].has_triton else "no Triton kernel"
        assert why in entry["not"]["triton"][0]


def test_report_is_text_with_every_op():
    text = info.report()
    assert all(name in text for name in ops.OPS) and torch.__version__.split("+")[0] in text


def test_without_compiled_files(tmp_path):
    """A copy of the package without its libraries runs everything on the reference path and warns exactly once."""
    copy = tmp_path / "condlr_ext"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    code = (
        "import warnings\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    import torch, condlr_ext\n"
        "    model = torch.nn.Sequential(condlr_ext.LowRankLinear(6, 5, rank=3))\n"
        "    optimizer = condlr_ext.optim.CondLRSGD(model, 0.1, tau=0.1)\n"
        "    model(torch.randn(4, 6)).sum().backward(); optimizer.step()\n"
        "said = [w for w in caught if 'compiled kernels are not in use' in str(w.message)]\n"
        "assert len(said) == 1 and said[0].category is RuntimeWarning, caught\n"
        "assert condlr_ext.ops.step.step.unsupported_reasons('cpu', [], [], [], torch.empty(0, 4, 10), torch.empty(0))\n"
        "print(condlr_ext.__file__)\n"
    )
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).parent == copy


@NO_BUILD
def test_a_library_that_does_not_load_is_a_reason_not_a_crash(tmp_path):
    copy = tmp_path / "condlr_ext"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (copy / "_C.so").write_bytes(b"not a library")
    shutil.copy2(ops.COMPILED.ops_path, copy / "_core.so")  # a library without the functions
    code = "import condlr_ext; c = condlr_ext.ops.COMPILED; print(c.ops_reason, c.host_reason)"
    env = os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    assert "_C.so does not load" in done.stdout and "_core.so does not load" in done.stdout


@NO_BUILD
def test_info_through_a_symlink(tmp_path):
    (tmp_path / "condlr_ext").symlink_to(PACKAGE)
    command = [sys.executable, "-m", "condlr_ext", "info", "--json"]
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["_C"] == str(PACKAGE / "_C.so")


def test_unknown_build_switch_is_refused():
    env = os.environ | {"CONDLR_EXT_BUILD": "maybe"}
    setup = PACKAGE.parent / "setup.py"
    done = subprocess.run(
        [sys.executable, str(setup), "--name"], cwd=setup.parent, env=env, capture_output=True, text=True
    )
    assert done.returncode and "CONDLR_EXT_BUILD must be auto or none, got 'maybe'" in done.stderr


@pytest.mark.parametrize("hook", ["get_requires_for_build_wheel", "get_requires_for_build_editable"])
def test_torch_is_needed_to_build_only_where_something_is_compiled(hook, monkeypatch, tmp_path):
    monkeypatch.setattr(build_backend.build_meta, hook, lambda config_settings: [])
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("CONDLR_EXT_BUILD", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert getattr(build_backend, hook)() == [] and "no C++ compiler" in build_backend.no_build_reason()
    (tmp_path / "clang++").touch(mode=0o755)
    assert getattr(build_backend, hook)() == build_backend.TOOLS
    monkeypatch.setenv("CONDLR_EXT_BUILD", "none")
    assert getattr(build_backend, hook)() == []
    monkeypatch.delenv("CONDLR_EXT_BUILD")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert getattr(build_backend, hook)() == [] and "darwin" in build_backend.no_build_reason()
