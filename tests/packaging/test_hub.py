"""`make hub`: the package in the format of Hugging Face's kernels loads from its folder and computes as ours does."""

import ast
import contextlib
import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
import torch

import condlr_ext

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    spec = importlib.util.spec_from_file_location("hub", ROOT / "tools" / "hub.py")
    hub = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hub)
    return hub.build(tmp_path_factory.mktemp("hub"))


@pytest.fixture(scope="module")
def kernel(folder):
    """The package as `kernels` loads it, or by its documented layout where that is not installed."""
    with contextlib.suppress(ImportError):  # tests/kernels, on the path, is no such package
        from kernels import get_local_kernel

        return get_local_kernel(folder, backend="cpu", trust_remote_code=True)
    variant = folder / "build" / "torch-cpu"
    name = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_computes_what_the_package_computes(kernel):
    A = torch.randn(3, 20, 12, dtype=torch.float64)
    with condlr_ext.backend("reference" if os.environ.get("TRITON_INTERPRET") != "1" else "triton"):
        ours = condlr_ext.linalg
        expected = [*ours.svd(A), *ours.qr(A), ours.polar(A).Q, ours.clip_spectrum(A, 0.1, "optimal", 0.7)]
    got = [*kernel.svd(A), *kernel.qr(A), kernel.polar(A), kernel.clip_spectrum(A, 0.1, "optimal", 0.7)]
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


def test_bad_matrices(kernel):
    A = torch.randn(2, 6, 4)
    A[0, 1, 2] = torch.nan
    for result in (*kernel.svd(A), *kernel.qr(A), kernel.polar(A)):
        assert result[0].isnan().all() and result[1].isfinite().all()
    for bad in (torch.ones(3), torch.ones(3, 3).half()):
        with pytest.raises(TypeError, match="A must be float32 or float64"):
            kernel.qr(bad)
    with pytest.raises(ValueError, match="tau must be >= 0"):
        kernel.clip_spectrum(A, -1.0)


def test_layers_take_the_place_of_a_forward(kernel):
    A = torch.randn(8, 8)

    class Bounded(torch.nn.Module):
        tau, band = 0.1, "rms"

    assert torch.linalg.cond(kernel.layers.ClipSpectrum.forward(Bounded(), A)) <= 1.1 * (1 + 1e-5)
    assert torch.equal(kernel.layers.Orthonormalize().forward(A), kernel.qr(A)[0])
    for layer in (kernel.layers.ClipSpectrum, kernel.layers.Orthonormalize):  # what kernelize asks of them
        assert {name for name in vars(layer) if not name.startswith("__")} == {"forward"}


def test_it_imports_nothing_but_torch_triton_and_itself(folder):
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    variants = sorted((folder / "build").iterdir())
    assert [v.name for v in variants] == ["torch-cpu", "torch-cuda", "torch-rocm"]
    for path in variants[0].rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, path
            elif isinstance(node, ast.ImportFrom) and not node.level:
                assert node.module.split(".")[0] in allowed, path
