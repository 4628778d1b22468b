"""Helpers of the tests of the Triton kernels on CPU tensors."""

import ast
import inspect

import pytest
import torch

from condlr_ext.kernels.triton import devices

from .matrices import orthonormal, with_spectrum


def run_on_cpu() -> bool:
    """Return whether kernels run on CPU tensors in this process; only then the tests import them."""
    return devices.serves(torch.empty(0))


ON_CPU = [
    pytest.mark.interpreter,
    # lanes that are masked out later hold what uninitialized memory held, here NaN
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

# spectra in training, and at the limits of what counts as well-conditioned
WELL_CONDITIONED = {
    "kappa_10": lambda k: torch.linspace(1, 0.1, k, dtype=torch.float64),
    "outlier": lambda k: torch.where(torch.arange(k) == 0, 1.0, 0.101).double(),
    "equal": lambda k: torch.full((k,), 0.3, dtype=torch.float64),
    "at_both_edges": lambda k: torch.where(torch.arange(k) < (k + 1) // 2, 1.1, 1.0).double(),
    "out_a_little": lambda k: torch.linspace(1.06, 0.94, k, dtype=torch.float64),
    "in_band": lambda k: torch.linspace(1.04, 1.0, k, dtype=torch.float64),
}


def batch_of(spectra, m, n):
    return torch.stack([with_spectrum(spectrum(min(m, n)), m, n) for spectrum in spectra]).float()


def with_orthogonal_columns(sigma):
    """Return a square matrix on which Jacobi's rotations have little to do."""
    return orthonormal(len(sigma), len(sigma)).float() * sigma


def host_waits(module) -> list[str]:
    """Return the calls in the source of a module by which the host would wait for the device or read from it."""
    calls = (node for node in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(node, ast.Call))
    names = (c.func.attr if isinstance(c.func, ast.Attribute) else getattr(c.func, "id", "") for c in calls)
    waits = "item tolist cpu numpy nonzero synchronize any all equal unique bool float int".split()
    return sorted(set(names) & set(waits))
