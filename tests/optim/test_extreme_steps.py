"""U and V stay orthonormal to rounding after steps of any length, from cores of any size."""

import pytest
import torch
from helpers.matrices import non_orthonormality
from torch import nn

import condlr_ext
from condlr_ext.optim import CondLRSGD

ORTHONORMAL = {torch.float32: 2e-6, torch.float64: 4e-15}


def layers(dtype, count=12):
    for _ in range(count):
        n, m = (int(torch.randint(1, 40, ())) for _ in range(2))
        rank = int(torch.randint(1, min(m, n) + 1, ()))
        yield condlr_ext.LowRankLinear(n, m, rank=rank, bias=False, dtype=dtype)


@pytest.mark.parametrize("dtype", ORTHONORMAL, ids=str)
@pytest.mark.parametrize("core", [1.0, 1e-8, 1e-16, 1e-24])
@pytest.mark.parametrize("gradient", [1.0, 1e8, 1e15, 1e-15, 1e-30, 1e-41])
def test_orthonormal_after_any_step(backend, gradient, core, dtype):
    for layer in layers(dtype):
        with torch.no_grad():
            layer.S.mul_(core)
        optimizer = CondLRSGD(nn.Sequential(layer), 0.1, tau=0.1)
        for _ in range(2):
            for p in layer.parameters():
                p.grad = (gradient * torch.randn(p.shape, dtype=torch.float64)).to(dtype)
            optimizer.step()
        assert max(non_orthonormality(layer.U), non_orthonormality(layer.V)) <= ORTHONORMAL[dtype], layer
