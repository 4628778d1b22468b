"""Log-volume, the bound on kappa and the penalty of RobustDLRT against closed forms."""

import math

import pytest
import torch
from helpers.matrices import orthonormal, with_spectrum
from torch import nn

import condlr_ext
from condlr_ext.errors import NonFiniteError, ShapeError
from condlr_ext.regularizers import (
    cnc,
    kappa_bound,
    layer_matrices,
    log_volume,
    robust_dlrt,
)

F64 = torch.float64


def test_robust_dlrt_at_repeated_and_zero_singular_values():
    for sigma in ([2.0, 2.0, 0.5, 0.5], [2.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0]):
        torch.autograd.gradcheck(robust_dlrt, with_spectrum(sigma, m=5).requires_grad_())


def test_log_volume_by_hand():
    sigma = torch.tensor([3.0, 2.0, 1.0], dtype=F64)
    log_K = 3 * (sigma.square().mean()).log() - 2 * sigma.log().sum()
    A = with_spectrum([3.0, 2.0, 1.0], 5, 3)
    torch.testing.assert_close(log_volume(A, floor=0), log_K)
    torch.testing.assert_close(log_volume(A.mT), log_volume(A))
    assert abs(log_volume(A) - log_K) < 1e-4  # the default floor is 1e-3 of the rms
    torch.testing.assert_close(log_volume(7.5 * A), log_volume(A))
    torch.testing.assert_close(log_volume((1e-30 * A).float()), log_volume(A).float(), rtol=1e-5, atol=0)
    assert abs(log_volume(2.5 * orthonormal(6, 4))) < 1e-13
    torch.testing.assert_close(cnc(A, floor=0), log_K**2)
    # the gradient of log K, 2 r S / ‖S‖² − 2 S⁻ᵀ
    S = torch.randn(4, 4, dtype=F64, requires_grad=True)
    log_volume(S, floor=0).backward()
    torch.testing.assert_close(S.grad, 8 * S.detach() / S.detach().square().sum() - 2 * S.detach().inverse().mT)
    with pytest.raises(NonFiniteError, match="log_volume: the penalty of the matrix is not finite"):
        log_volume(torch.ones(3, 3), floor=0)


def test_kappa_bound_holds_and_is_exact_for_two():
    for r in (1, 2, 3, 10, 40):
        A = torch.randn(200, r, r, dtype=F64)
        sigma = torch.linalg.svdvals(A)
        kappa, bound = sigma[:, 0] / sigma[:, -1], kappa_bound(A)
        assert (bound >= kappa * (1 - 1e-10)).all()
        if r <= 2:
            torch.testing.assert_close(bound, kappa, rtol=1e-7, atol=0)
    flat = 3 * orthonormal(64, 20).float()
    assert 1 <= kappa_bound(flat) < 1 + 1e-5 and kappa_bound(flat).dtype == F64
    assert kappa_bound(flat.mT) == kappa_bound(flat)
    assert torch.isinf(kappa_bound(torch.stack((torch.diag(torch.tensor([2.0, 1, 0])), torch.zeros(3, 3))))).all()
    with pytest.raises(ShapeError, match=r"kappa_bound: A must be \[\*, m, n\] with rows and columns, got \[3\]"):
        kappa_bound(torch.ones(3))


def test_robust_dlrt_by_hand():
    sigma = torch.tensor([3.0, 2.0, 1.0], dtype=F64)
    A = with_spectrum([3.0, 2.0, 1.0], 5, 3)
    expected = math.sqrt(3) * (sigma**2).std(correction=0)
    torch.testing.assert_close(robust_dlrt(A), expected)
    torch.testing.assert_close(robust_dlrt(A.mT), expected)
    S = torch.randn(4, 4, dtype=F64, requires_grad=True)
    value = robust_dlrt(S)
    value.backward()
    G = S.detach().mT @ S.detach()
    closed = 2 * S.detach() @ (G - G.trace() / 4 * torch.eye(4, dtype=F64)) / value.detach()
    torch.testing.assert_close(S.grad, closed)
    torch.testing.assert_close((S.grad * S.detach()).sum(), 2 * value.detach())
    for _ in range(20):  # the published bound on kappa
        S = torch.randn(3, 3, dtype=F64)
        sigma = torch.linalg.svdvals(S)
        assert sigma[0] / sigma[-1] <= math.exp(min(700, robust_dlrt(S) / (math.sqrt(2) * sigma[-1] ** 2)))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("r", [2, 13, 52, 128])
def test_robust_dlrt_is_silent_at_a_flat_spectrum_and_not_next_to_it(dtype, r):
    S = (1.7 * orthonormal(r, r)).to(dtype)
    leaf = S.clone().requires_grad_()
    robust_dlrt(leaf).backward()
    assert not leaf.grad.any()
    sigma = torch.ones(r, dtype=F64)
    sigma[0] += 1e-4 if dtype == torch.float32 else 1e-9
    leaf = (orthonormal(r, r) * sigma @ orthonormal(r, r)).to(dtype).requires_grad_()
    value = robust_dlrt(leaf)
    value.backward()
    expected = math.sqrt(r) * (sigma**2).std(correction=0).item()
    assert value.item() == pytest.approx(expected, rel=0.05)
    assert leaf.grad.norm() == pytest.approx(2, rel=0.2)


def test_training_with_a_penalty_lowers_kappa():
    from condlr_ext.optim import CondLRSGD

    kappas = []
    for beta in (0.0, 0.05):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3))
        condlr_ext.factorize(model, rank=6, exclude="2")
        optimizer = CondLRSGD(model, lr=0.1, momentum=0.5, tau=math.inf)
        x, y = torch.rand(64, 12), torch.randint(3, (64,))
        for _ in range(60):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            (loss + beta * log_volume(layer_matrices(model, exclude="2"))).backward()
            optimizer.step()
        kappas.append(condlr_ext.condition_numbers(model)["0"])
    assert kappas[1] < 1 + (kappas[0] - 1) / 2
