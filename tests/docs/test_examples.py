"""The examples and those in docstrings run."""

import doctest
import importlib
import os
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

import condlr_ext

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, path], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() and "Traceback" not in done.stderr


def test_there_are_examples():
    assert len(EXAMPLES) >= 14
    assert all(path.read_text().startswith('"""') for path in EXAMPLES)


def docstring_examples():
    examples = []
    for path in sorted((ROOT / "condlr_ext").rglob("*.py")):
        if ">>>" in path.read_text():
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            module = importlib.import_module(name)
            examples += [test for test in doctest.DocTestFinder().find(module) if test.examples]
    return examples


@pytest.mark.parametrize("test", docstring_examples(), ids=lambda test: test.name)
def test_docstring(test, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    layers = OrderedDict(fc=nn.Linear(12, 20), relu=nn.ReLU(), head=nn.Linear(20, 4))
    test.globs = {"condlr_ext": condlr_ext, "torch": torch, "nn": nn, "model": nn.Sequential(layers)}
    test.globs |= {"x": torch.rand(8, 12), "y": torch.randint(4, (8,))}
    assert not doctest.DocTestRunner().run(test).failed
