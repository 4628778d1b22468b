"""On a CUDA device training and linear algebra must agree with the CPU."""

import copy

import pytest
import torch

import condlr_ext
from condlr_ext import linalg

pytestmark = pytest.mark.gpu


def test_training_agrees_with_the_cpu():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        condlr_ext.LowRankConv2d(1, 6, 3, rank=4),
        torch.nn.Flatten(),
        condlr_ext.LowRankLinear(24, 5, rank=3),
    ).double()
    x, y = torch.randn(8, 1, 4, 4, dtype=torch.float64), torch.randint(0, 5, (8,))
    finals = []
    for device in ("cpu", "cuda"):
        twin = copy.deepcopy(model).to(device)
        optimizer = condlr_ext.optim.CondLRSGD(twin, 0.1, 0.9, tau=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(twin(x.to(device)), y.to(device)).backward()
            optimizer.step()
        assert optimizer.skipped.item() == 0 and optimizer.skipped.device.type == device
        finals.append([p.detach().cpu() for p in twin.parameters()])
    for a, b in zip(*finals, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_linalg_agrees_with_the_cpu():
    A = torch.randn(4, 9, 6, dtype=torch.float64)
    for fn in (lambda A: linalg.svd(A).sigma, linalg.orthonormalize, lambda A: linalg.clip_spectrum(A, 0.1)):
        torch.testing.assert_close(fn(A.cuda()).cpu(), fn(A), rtol=0, atol=1e-12)
    A[1, 0, 0] = torch.nan  # not looked at on a device: NaN comes back for that matrix alone
    assert linalg.svd(A.cuda()).sigma.isnan().any(-1).tolist() == [False, True, False, False]


def test_named_cpu_backend_refuses_cuda_tensors():
    with condlr_ext.backend("cpu"), pytest.raises(condlr_ext.errors.BackendError, match="on cuda"):
        linalg.svd(torch.eye(3, device="cuda"))
