"""ReleasedCondLR by hand and against its text in NumPy."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.baselines import low_rank, one_layer, step_with
from helpers.matrices import kappa, non_orthonormality, orthonormal, singular_values
from torch import nn

from condlr_ext import LowRankLinear
from condlr_ext.baselines import (
    ReleasedCondLR,
)
from condlr_ext.baselines.released import clamp_spectrum, sign_fixed_q
from condlr_ext.optim import param_groups

E = [[1.0, 0], [0, 1], [0, 0]]
ZERO2, ZERO3 = [[0.0, 0], [0, 0]], [[0.0, 0], [0, 0], [0, 0]]


@pytest.mark.parametrize("tau", [0.5, 0.0])
def test_released_two_steps_by_hand(tau):
    """lr 1, momentum 1/2; U moves by (0, 0, 3/4) in its first column at first, by momentum alone after that."""
    layer = one_layer(E, [[4, 0], [0, 1]], E)
    optimizer = ReleasedCondLR(layer, 1.0, 0.5, tau=tau)
    assert torch.equal(layer.S, torch.tensor([[4.0, 0], [0, 1]], dtype=torch.float64))  # nothing at construction
    # tau > 0: c = 1; tau = 0: c = 1 / mean(4, 1) = 2 / 5, which a gradient 5/2 times as large makes up for
    a = 0.75 if tau else 0.75 * 2.5
    step_with(optimizer, layer, [[0, 0], [0, 0], [a, 0]], ZERO2, ZERO3)
    # (1, 0, -3/4) has norm 5/4
    expected = [[0.8, 0], [0, 1], [-0.6, 0]]
    torch.testing.assert_close(layer.U, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-15)
    torch.testing.assert_close(layer.V, torch.tensor(E, dtype=torch.float64), rtol=0, atol=1e-15)
    # mean 5/2, half-width 5/2 * 0.5 / 2.5 = 1/2; or sqrt((16 + 1) / 2) on the diagonal
    expected = torch.diag(torch.tensor([3.0, 2] if tau else [8.5**0.5] * 2, dtype=torch.float64))
    torch.testing.assert_close(layer.S, expected, rtol=0, atol=1e-14)
    step_with(optimizer, layer, ZERO3, [[1, 0], [0, 0]], ZERO3)
    # the buffer is (0, 0, 3/4), scaled already; half of it, (0, 0, 3/8), has the part (9/50, 0, 6/25) off the span
    # of (4/5, 0, -3/5) and e2; c is now (2/3)² or still 2/5
    c = 4 / 9 if tau else 2 / 5
    column = np.array([0.8 - c * 0.18, 0, -0.6 - c * 0.24])
    expected = np.stack([column / np.linalg.norm(column), [0, 1, 0]], 1)
    torch.testing.assert_close(layer.U, torch.from_numpy(expected), rtol=0, atol=1e-15)
    # diag(3 - 1, 2) is in its band; diag(√8.5 - 1, √8.5) becomes the root of the mean square
    sigma = [2.0, 2.0] if tau else [math.sqrt(((8.5**0.5 - 1) ** 2 + 8.5) / 2)] * 2
    torch.testing.assert_close(layer.S, torch.diag(torch.tensor(sigma, dtype=torch.float64)), rtol=0, atol=1e-14)


def released_by_numpy(factors, gradients, lr, momentum, decay, tau):
    """(U, S, V) after these gradients, from the text of the class, in NumPy."""
    U, S, V = (X.copy() for X in factors)
    buffers = [np.zeros_like(X) for X in (U, S, V)]
    a = np.linalg.svd(S, compute_uv=False).mean()
    c = 1.0 if tau else 1 / a
    for grads in gradients:
        g = [G + decay * X + momentum * B for G, X, B in zip(grads, (U, S, V), buffers, strict=True)]
        g[0] = c * (g[0] - U @ (U.T @ g[0]))
        g[2] = c * (g[2] - V @ (V.T @ g[2]))
        buffers = g
        U, S, V = U - lr * g[0], S - lr * g[1], V - lr * g[2]
        (U, RU), (V, RV), (QS, RS) = map(np.linalg.qr, (U, V, S))
        U, V = U * np.sign(np.diag(RU)), V * np.sign(np.diag(RV))
        if tau:
            P, sigma, Qh = np.linalg.svd(S)
            k = 1 + tau
            half = sigma.mean() * (k - 1) / (k + 1)
            sigma = sigma.clip(sigma.mean() - half, sigma.mean() + half)
            S, c = P @ np.diag(sigma) @ Qh, (sigma[-1] / sigma[0]) ** 2
        else:
            S = np.sqrt(np.trace(S @ S.T) / len(S)) * QS * np.sign(np.diag(RS))
    return U, S, V


@pytest.mark.parametrize("tau", [0.3, 0.0])
def test_released_is_the_text(tau):
    U, S, V = orthonormal(9, 4), torch.randn(4, 4, dtype=torch.float64), orthonormal(6, 4)
    layer = one_layer(U, S, V)
    gradients = [[torch.randn_like(X) for X in (U, S, V)] for _ in range(6)]
    options = dict(lr=0.1, momentum=0.7, weight_decay=0.02)
    optimizer = ReleasedCondLR(layer, **options, tau=tau)
    for grads in gradients:
        step_with(optimizer, layer, *grads)
    exact = released_by_numpy(
        [X.numpy() for X in (U, S, V)],
        [[G.numpy() for G in grads] for grads in gradients],
        *options.values(),
        tau,
    )
    for p, value in zip((layer.U, layer.S, layer.V), exact, strict=True):
        torch.testing.assert_close(p.detach(), torch.from_numpy(value), rtol=0, atol=1e-12)


def test_released_layers_without_gradients_are_retracted_too():
    model = nn.Sequential(LowRankLinear(6, 5, rank=3), LowRankLinear(5, 4, rank=2))
    with torch.no_grad():
        model[1].S.copy_(torch.diag(torch.tensor([4.0, 1])))
        model[1].U.mul_(2)
    optimizer = ReleasedCondLR(model, 0.1, tau=0.5)
    for p in model[0].parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert singular_values(model[1].S).tolist() == pytest.approx([3, 2], rel=1e-6)
    assert non_orthonormality(model[1].U) < 1e-6


def test_released_momentum_of_the_bases_is_scaled():
    """Effective momentum mu c, c = 4/9 here: the buffer decays by 2/9 a step where a working one decays by 1/2."""
    layer = one_layer(E, [[3, 0], [0, 2]], E)
    optimizer = ReleasedCondLR(layer, 1e-9, 0.5, tau=0.5)  # nothing turns
    step_with(optimizer, layer, [[0, 0], [0, 0], [1, 0]], ZERO2, ZERO3)
    for k in range(1, 4):
        step_with(optimizer, layer, ZERO3, ZERO2, ZERO3)
        assert optimizer.state[layer.U]["momentum_buffer"][2, 0].item() == pytest.approx((2 / 9) ** k, rel=1e-6)


def test_released_sign_fix_kills_a_column():
    Q = sign_fixed_q(torch.tensor([[1.0, 0], [0, 0], [0, 0]]))
    assert Q[:, 0].tolist() == [1, 0, 0] and Q[:, 1].tolist() == [0, 0, 0]


@pytest.mark.parametrize("name", ["clamped_core_nan", "clamped_core_raises"])
def test_released_survives_the_cores_that_lapack_does_not(name):
    core = torch.from_numpy(np.load(Path(__file__).parents[1] / "data" / f"{name}.npy")).float()
    S, scale = clamp_spectrum(core, 0.1)
    assert kappa(S) <= 1.1 * (1 + 1e-5)
    assert scale.item() == pytest.approx(kappa(S) ** -2, rel=1e-4)


def test_released_takes_groups_by_role():
    model = low_rank()
    with torch.no_grad():
        model[0].S.copy_(torch.linspace(9, 1, 12).diag())  # wider than the band on both sides
    groups = param_groups(model, factors={"lr": 0.0}, cores={"lr": 0.0, "tau": 1.0})
    optimizer = ReleasedCondLR(groups, 0.1, tau=0.1)
    bias = model[0].bias.detach().clone()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    torch.testing.assert_close(model[0].bias.detach(), bias - 0.1)
    assert kappa(model[0].S) == pytest.approx(2, rel=1e-5)
