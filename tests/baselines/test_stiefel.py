"""CayleySGD and ProjectedSGD: retractions, momentum and orthonormality."""

import pytest
import torch
from helpers.baselines import one_layer, step_with, train
from helpers.matrices import kappa, non_orthonormality, orthonormal
from helpers.models import DigitsCNN
from torch import nn

import condlr_ext
from condlr_ext import LowRankLinear
from condlr_ext.baselines import (
    CayleySGD,
    ProjectedSGD,
)
from condlr_ext.baselines.stiefel import tangent_projection


@pytest.mark.parametrize("n, p", [(7, 3), (5, 5), (4, 1), (9, 8)])
def test_cayley_retraction_is_the_cayley_transform(n, p):
    X = orthonormal(n, p)
    xi = tangent_projection(X, torch.randn(n, p, dtype=torch.float64))
    M = xi - X @ (X.mT @ xi) / 2
    W = M @ X.mT - X @ M.mT
    torch.testing.assert_close(W @ X, xi)
    for size in (0.3, 1.0, 5.0):  # ‖W‖_F before the cap at 1
        scale = size / torch.linalg.matrix_norm(W)
        A = W * min(scale, 1 / torch.linalg.matrix_norm(W))
        eye = torch.eye(n, dtype=torch.float64)
        exact = torch.linalg.solve(eye - A / 2, (eye + A / 2) @ X)
        torch.testing.assert_close(CayleySGD.retract(X, scale * xi), exact, rtol=0, atol=1e-13)
        Y = X + A @ X
        for _ in range(60):  # the fixed-point iteration of the paper
            Y = X + A @ (X + Y) / 2
        torch.testing.assert_close(Y, exact, rtol=0, atol=1e-13)


@pytest.mark.parametrize("size", [1e-30, 1e12, 1e20, 1e35])
def test_cayley_retraction_of_tiny_and_huge_directions(size):
    X = orthonormal(7, 3)
    xi = tangent_projection(X, torch.randn(7, 3, dtype=torch.float64))
    exact = CayleySGD.retract(X, size * xi)  # beyond ‖W‖_F = 1 only the direction counts
    if size > 1:
        torch.testing.assert_close(exact, CayleySGD.retract(X, 10 * xi))
    torch.testing.assert_close(CayleySGD.retract(X.float(), size * xi.float()).double(), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("cls", [CayleySGD, ProjectedSGD])
def test_retraction_is_first_order(cls):
    X = orthonormal(8, 3) * torch.tensor([1.0, -1, 1])  # of the signs that Householder QR gives, not all
    xi = tangent_projection(X, torch.randn(8, 3, dtype=torch.float64))
    assert (X.mT @ xi + xi.mT @ X).abs().max() < 1e-14
    errors = [(cls.retract(X, h * xi) - X - h * xi).norm().item() for h in (1e-3, 1e-4)]
    assert errors[0] < 1e-4 and errors[1] == pytest.approx(errors[0] / 100, rel=0.05)
    assert non_orthonormality(cls.retract(X, 0.3 * xi)) < 1e-14


def test_tangent_projection_is_the_orthogonal_one():
    X, Z = orthonormal(6, 3), torch.randn(6, 3, dtype=torch.float64)
    for _ in range(5):
        xi = tangent_projection(X, torch.randn(6, 3, dtype=torch.float64))
        assert abs(torch.sum(xi * (Z - tangent_projection(X, Z))).item()) < 1e-13


@pytest.mark.parametrize("cls", [CayleySGD, ProjectedSGD])
def test_stiefel_momentum_is_projected_at_each_point(cls):
    """Three steps of a layer, from the docstring, in float64; an ordinary SGD moves the core."""
    U, S, V = orthonormal(7, 3), torch.randn(3, 3, dtype=torch.float64), orthonormal(5, 3)
    layer = one_layer(U, S, V)
    optimizer = cls(layer, 0.2, 0.9, weight_decay=0.1)
    B = [torch.zeros_like(X) for X in (U, S, V)]
    for _ in range(3):
        grads = [torch.randn_like(X) / 5 for X in (U, S, V)]
        step_with(optimizer, layer, *grads)
        B = [0.9 * b + g for b, g in zip(B, grads, strict=True)]
        B[1] = B[1] + 0.1 * S
        B[0], B[2] = (M - X @ (X.mT @ M + M.mT @ X) / 2 for M, X in ((B[0], U), (B[2], V)))
        U, S, V = cls.retract(U, -0.2 * B[0]), S - 0.2 * B[1], cls.retract(V, -0.2 * B[2])
        for p, value in zip((layer.U, layer.S, layer.V), (U, S, V), strict=True):
            torch.testing.assert_close(p.detach(), value, rtol=0, atol=1e-13)


@pytest.mark.parametrize("cls", [CayleySGD, ProjectedSGD])
def test_momentum_works_on_the_manifold(cls):
    """The leading eigenvectors of a matrix with small gaps, by a dense orthonormal weight: momentum 0.9 gets
    much closer in 150 steps than none, which is what the buffers that stay zero in the released code amount to.
    """
    A = torch.diag(torch.cat([torch.full((3,), 1.0), torch.linspace(0.95, 0, 17)])).double()
    gaps = {}
    for momentum in (0.0, 0.9):
        torch.manual_seed(1)
        model = nn.Linear(20, 3, bias=False, dtype=torch.float64)
        wrapped = nn.ModuleDict({"fc": model})
        optimizer = cls(wrapped, 0.1, momentum, weights="fc")
        for _ in range(150):
            optimizer.zero_grad()
            loss = -torch.trace(model.weight @ A @ model.weight.mT) / 2
            loss.backward()
            optimizer.step()
        gaps[momentum] = 1.5 + loss.item()
        assert non_orthonormality(model.weight.mT) < 1e-13
    assert gaps[0.9] < 0.1 * gaps[0.0]


@pytest.mark.parametrize("cls", [CayleySGD, ProjectedSGD])
def test_orthonormality_lasts_in_float32(cls):
    X = orthonormal(12, 6).float()
    for _ in range(2000):
        X = cls.retract(X, tangent_projection(X, torch.randn(12, 6) / 10))
    assert non_orthonormality(X) < 1e-6  # without the Newton step CayleySGD is at 3e-6 here, and rising
    layer = LowRankLinear(40, 30, rank=20)
    optimizer = cls(layer, 0.05, 0.9, tau=0.2)
    for _ in range(100):
        for p in layer.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
        assert kappa(layer.S) <= 1.2 * (1 + 5e-6)
    assert max(non_orthonormality(layer.U), non_orthonormality(layer.V)) < 2e-6


@pytest.mark.parametrize("cls", [CayleySGD, ProjectedSGD])
def test_dense_weights_stay_orthonormal(cls, digits):
    torch.manual_seed(0)
    model = DigitsCNN()
    nearest = condlr_ext.linalg.polar(model.down.weight.detach().flatten(1)).Q
    optimizer = cls(model, 0.05, 0.9, weights=["stem", "grouped", "down", "head"])
    torch.testing.assert_close(model.down.weight.detach().flatten(1), nearest)
    losses = train(model, optimizer, digits, 30)
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])
    for layer in (model.stem, model.grouped, model.down, model.head):  # [8, 9], [8, 36], [12, 72], [10, 192]
        assert non_orthonormality(layer.weight.flatten(1).mT) < 2e-6
    tall = nn.Sequential(nn.Linear(3, 9))
    optimizer = cls(tall, 0.1, weights=["0"])
    tall(torch.randn(4, 3)).square().sum().backward()
    optimizer.step()
    assert non_orthonormality(tall[0].weight) < 1e-6


def test_stiefel_start_keeps_the_function():
    layer = one_layer(*(torch.randn(shape, dtype=torch.float64) for shape in ((8, 4), (4, 4), (6, 4))))
    weight = layer.weight.detach().clone()
    CayleySGD(layer, 0.1)
    assert max(non_orthonormality(layer.U), non_orthonormality(layer.V)) < 1e-13
    torch.testing.assert_close(layer.weight, weight)
    ProjectedSGD(layer, 0.1, tau=0.2)
    assert kappa(layer.S) <= 1.2 * (1 + 1e-12)
