"""DLRT and RobustDLRT against their text, ranks found and factors replaced."""

import copy
import math

import numpy as np
import pytest
import torch
from helpers.baselines import assert_same_state, low_rank, one_layer, train
from helpers.matrices import kappa, non_orthonormality, orthonormal, singular_values, with_spectrum
from torch import nn
from torch.nn import functional as F

import condlr_ext
from condlr_ext import LowRankLinear
from condlr_ext.baselines import (
    DLRT,
    RobustDLRT,
)
from condlr_ext.baselines.rank_adaptive import kept_rank
from condlr_ext.baselines.robust_dlrt import penalty_gradient

MAKERS = {
    "dlrt": lambda model, lr, **k: DLRT(model, lr, **k, tolerance=0.1),
    "robust": lambda model, lr, **k: RobustDLRT(model, lr, **k, beta=0.05, tolerance=0.1, core_steps=5),
}
rank_adaptive = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def regression(model, target, x):
    def closure():
        model.zero_grad()
        loss = (model(x) - x @ target.mT).square().sum() / len(x) / 2
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("start", [1, 2, 6, 9])
@pytest.mark.parametrize("robust", [False, True], ids=["dlrt", "robust"])
def test_a_planted_rank_is_found(start, robust):
    torch.manual_seed(3)
    target = with_spectrum(torch.tensor([3.0, 2, 1.5] + [0.0] * 6, dtype=torch.float64), 12, 9)
    model = LowRankLinear(9, 12, bias=False, rank=start, dtype=torch.float64)
    options = dict(tolerance=0.02, min_rank=1)
    optimizer = RobustDLRT(model, 0.5, beta=0, core_steps=4, **options) if robust else DLRT(model, 0.5, **options)
    closure = regression(model, target, torch.randn(200, 9, dtype=torch.float64))
    for _ in range(100):
        optimizer.step(closure)
    assert optimizer.ranks == {"": 3} and model.rank == 3
    assert (model.weight - target).norm() < 0.1 and model.U.shape == (12, 3)


def dlrt_by_numpy(U, S, V, G, lr, tolerance, min_rank):
    """One step for the loss with gradient G(W), from the docstring."""
    W = U @ S @ V.T
    K, L = U @ S - lr * G(W) @ V, V @ S.T - lr * G(W).T @ U
    rank = min(2 * len(S), len(U), len(V))
    U1, V1 = (np.linalg.qr(np.hstack(pair))[0][:, :rank] for pair in ((U, K), (V, L)))
    S1 = U1.T @ W @ V1
    S1 = S1 - lr * U1.T @ G(U1 @ S1 @ V1.T) @ V1
    P, sigma, Qh = np.linalg.svd(S1)
    r = min_rank
    while r < rank and np.linalg.norm(sigma[r:]) >= tolerance * np.linalg.norm(sigma):
        r += 1
    return U1 @ P[:, :r] @ np.diag(sigma[:r]) @ Qh[:r] @ V1.T, r


@pytest.mark.parametrize("rank, m, n", [(2, 9, 7), (3, 5, 8), (4, 4, 6)])
def test_dlrt_is_the_text(rank, m, n):
    U, V = orthonormal(m, rank), orthonormal(n, rank)
    sigma = torch.logspace(0, -9, rank, dtype=torch.float64)
    sigma[-1] = 0  # neither small singular values nor zeros do harm
    S = with_spectrum(sigma, rank, rank)
    layer = one_layer(U, S, V)
    target, x = torch.randn(m, n, dtype=torch.float64), torch.randn(20, n, dtype=torch.float64)
    closure = regression(layer, target, x)
    gram = (x.mT @ x / 20).numpy()
    optimizer = DLRT(layer, 0.1, tolerance=0.3, min_rank=2)
    with torch.no_grad():
        before = (layer(x) - x @ target.mT).square().sum() / 40
    torch.testing.assert_close(optimizer.step(closure), before)
    exact, r = dlrt_by_numpy(*(X.numpy() for X in (U, S, V)), lambda W: (W - target.numpy()) @ gram, 0.1, 0.3, 2)
    torch.testing.assert_close(layer.weight.detach(), torch.from_numpy(exact), rtol=0, atol=1e-12)
    assert layer.rank == r and max(non_orthonormality(layer.U), non_orthonormality(layer.V)) < 1e-14
    assert layer.S.detach().count_nonzero() == r


@rank_adaptive
def test_at_full_rank_it_is_sgd_of_the_dense_weight(make):
    """Nothing is truncated and no direction is new: momentum and decay must be torch's, in whatever bases."""
    model = LowRankLinear(5, 5, bias=False, rank=5, dtype=torch.float64)
    dense = model.to_dense()
    optimizer = make(model, 0.1, momentum=0.8, weight_decay=0.05)
    optimizer.param_groups[0].update(tolerance=0.0, beta=0.0)
    theirs = torch.optim.SGD(dense.parameters(), 0.1, momentum=0.8, weight_decay=0.05)
    target, x = torch.randn(5, 5, dtype=torch.float64), torch.randn(9, 5, dtype=torch.float64)
    for k in range(18):
        optimizer.step(regression(model, target, x))
        if isinstance(optimizer, DLRT) or k % 6:  # every sixth step of RobustDLRT is for the bases
            regression(dense, target, x)()
            theirs.step()
        torch.testing.assert_close(model.weight, dense.weight, rtol=0, atol=1e-12)


@rank_adaptive
def test_shared_frozen_and_unused_layers(make):
    torch.manual_seed(0)
    shared, frozen, unused = (LowRankLinear(6, 6, rank=2) for _ in range(3))
    tied = LowRankLinear(6, 6, rank=2)
    tied.U, tied.S, tied.V = shared.U, shared.S, shared.V
    frozen.requires_grad_(False)
    model = nn.ModuleList([shared, tied, frozen, unused])
    optimizer = make(model, 0.1)
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(8, 6)

    def closure():
        optimizer.zero_grad()
        loss = (tied(torch.relu(frozen(shared(x)))) - x).square().mean()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(13)]
    assert losses[-1] < losses[0]
    assert tied.U is shared.U and tied.S is shared.S and tied.V is shared.V and tied.rank == shared.rank
    assert sum(p is shared.S for p in optimizer.param_groups[0]["params"]) == 1
    for i, layer in ((2, frozen), (3, unused)):
        torch.testing.assert_close(layer.weight.detach(), weight_of(before, i), rtol=0, atol=1e-6)
    assert torch.equal(frozen.U, before["2.U"])
    tied.U = nn.Parameter(tied.U.detach().clone())
    with pytest.raises(ValueError, match="layer '1' shares some of its factors with another layer, but not all"):
        make(model, 0.1)


def weight_of(state, i):
    return state[f"{i}.U"] @ state[f"{i}.S"] @ state[f"{i}.V"].mT


def test_an_error_in_the_closure_leaves_dlrt_as_it_was(digits):
    model = low_rank()
    optimizer = DLRT(model, 0.1, 0.5, tolerance=0.1)
    train(model, optimizer, digits, 2)
    before, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    params = list(model.parameters())
    calls = []

    def closure():
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        optimizer.zero_grad()
        F.cross_entropy(model(digits[0][:8]), digits[1][:8]).backward()

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p is q for p, q in zip(params, model.parameters(), strict=True))
    assert_same_state(state, optimizer.state_dict())


def test_kept_rank():
    sigma = torch.tensor([4.0, 2, 1, 0.5])
    norm = sigma.norm().item()
    for rank in range(1, 5):
        tail = sigma[rank:].norm().item() / norm
        assert kept_rank(sigma, tail + 1e-6) == rank
        assert kept_rank(sigma, max(tail - 1e-6, 0)) == min(rank + 1, 4)
    assert kept_rank(torch.tensor([4.0, 2, 0]), 0.0) == 2 and kept_rank(torch.zeros(3), 0.1) == 1


def test_kept_rank_does_not_depend_on_the_scale():
    sigma = torch.tensor([4.0, 2, 1, 0.5], dtype=torch.float64)
    for scale in (1e-300, 1e-170, 1e170, 1e300):
        assert [kept_rank(sigma * scale, t) for t in (0.1, 0.2, 0.3, 0.6)] == [
            kept_rank(sigma, t) for t in (0.1, 0.2, 0.3, 0.6)
        ]


def penalty(S):
    mean = S.square().sum() / len(S)
    return torch.linalg.matrix_norm(S.mT @ S - mean * torch.eye(len(S), dtype=S.dtype))


@pytest.mark.parametrize("r", [2, 3, 17])
def test_penalty_gradient(r):
    S = torch.randn(r, r, dtype=torch.float64, requires_grad=True)
    (exact,) = torch.autograd.grad(penalty(S), S)
    torch.testing.assert_close(penalty_gradient(S.detach()), exact)
    torch.testing.assert_close(torch.sum(exact * S), 2 * penalty(S))  # R is homogeneous of degree two
    sigma = singular_values(S)
    assert math.log(sigma[0] / sigma[-1]) <= penalty(S).item() / (math.sqrt(2) * sigma[-1].item() ** 2)


@pytest.mark.parametrize("exponent", [-100, -73, 64, 100])
def test_penalty_gradient_is_of_degree_one(exponent):
    S = torch.randn(5, 5)
    torch.testing.assert_close(penalty_gradient(S * 2.0**exponent) / 2.0**exponent, penalty_gradient(S))


@pytest.mark.parametrize("S", [torch.zeros(3, 3), 2 * torch.eye(4), torch.ones(1, 1), 0.3 * orthonormal(6, 6).float()])
def test_penalty_gradient_where_the_spectrum_is_flat(S):
    assert torch.equal(penalty_gradient(S), torch.zeros_like(S))


def test_the_penalty_alone_flattens_the_spectrum():
    layer = one_layer(orthonormal(9, 4), torch.diag(torch.tensor([4.0, 3, 2, 1])), orthonormal(8, 4))
    optimizer = RobustDLRT(layer, 0.01, beta=1.0, tolerance=0.1, core_steps=10)
    optimizer.param_groups[0]["core_steps_left"] = 10  # no new directions
    values = [penalty(layer.S).item()]
    for _ in range(9):
        for p in layer.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        values.append(penalty(layer.S).item())
    # dR/dt = -beta ‖grad R‖²
    assert all(b < a for a, b in zip(values, values[1:], strict=False)) and kappa(layer.S) < 3.2


def test_robust_cycle(digits):
    model = low_rank(rank=6)
    optimizer = RobustDLRT(model, 0.1, beta=0.05, tolerance=0.1, core_steps=3)
    x = digits[0][:64]
    with torch.no_grad():
        before = model(x)
    bias = model[4].bias.clone()
    assert optimizer.ranks == {"0": 6, "2": 6}
    train(model, optimizer, digits, 1)
    assert optimizer.ranks == {"0": 12, "2": 12}
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-5)
    assert torch.equal(model[4].bias, bias)
    bases = [model[0].U, model[0].V, model[0].S]
    train(model, optimizer, digits, 2)
    assert model[0].U is bases[0] and model[0].V is bases[1] and not torch.equal(model[4].bias, bias)
    train(model, optimizer, digits, 1)
    assert all(6 <= rank < 12 for rank in optimizer.ranks.values())
    assert torch.equal(model[0].S, model[0].S.diagonal().diag())
    train(model, optimizer, digits, 2)
    S = model[0].S.detach().clone()
    optimizer.truncate()
    assert model[0].rank == kept_rank(singular_values(S), 0.1)
    rank = model[0].rank
    train(model, optimizer, digits, 1)
    assert optimizer.ranks["0"] == 2 * rank  # a new cycle


def test_the_penalty_lowers_kappa_on_digits(digits):
    numbers = {}
    for beta in (0.0, 0.05):
        model = low_rank()
        optimizer = RobustDLRT(model, 0.2, 0.5, beta=beta, tolerance=0.1)
        losses = train(model, optimizer, digits, 99)  # whole cycles
        assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
        numbers[beta] = max(condlr_ext.condition_numbers(model).values())
    assert numbers[0.05] < 0.9 * numbers[0.0]
