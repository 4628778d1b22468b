"""Baselines: each against its formulas in float64, its mathematics, its errors; and that they train real networks."""

import copy
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.matrices import kappa, non_orthonormality, orthonormal, singular_values, with_spectrum
from torch import nn
from torch.nn import functional as F

import condlr_ext
from condlr_ext import LowRankConv2d, LowRankLinear
from condlr_ext.baselines import (
    DLRT,
    CayleySGD,
    ProjectedSGD,
    ReleasedCondLR,
    RobustDLRT,
    TwoFactorConv,
    TwoFactorLinear,
    svd_prune,
    vanilla_low_rank,
)
from condlr_ext.baselines.rank_adaptive import kept_rank
from condlr_ext.baselines.released import clamp_spectrum, sign_fixed_q
from condlr_ext.baselines.robust_dlrt import penalty_gradient
from condlr_ext.baselines.stiefel import tangent_projection
from condlr_ext.errors import NonFiniteError, RankError
from condlr_ext.experiments import data
from condlr_ext.nn import LowRankLayer
from condlr_ext.optim import param_groups

OPTIMIZERS = {
    "released": lambda model, lr, **k: ReleasedCondLR(model, lr, **k, tau=0.1),
    "released tau 0": lambda model, lr, **k: ReleasedCondLR(model, lr, **k, tau=0),
    "cayley": CayleySGD,
    "cayley bound": lambda model, lr, **k: CayleySGD(model, lr, **k, tau=0.1),
    "projected": ProjectedSGD,
    "projected bound": lambda model, lr, **k: ProjectedSGD(model, lr, **k, tau=0.1),
    "dlrt": lambda model, lr, **k: DLRT(model, lr, **k, tolerance=0.1),
    "robust dlrt": lambda model, lr, **k: RobustDLRT(model, lr, **k, beta=0.05, tolerance=0.1, core_steps=5),
}
every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
rank_adaptive = pytest.mark.parametrize("make", [OPTIMIZERS["dlrt"], OPTIMIZERS["robust dlrt"]], ids=["dlrt", "robust"])


class Residual(nn.Module):
    """A small residual network with batch norm, a grouped dilated convolution and a strided one."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2, padding_mode="circular")
        self.down = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.head = nn.Linear(12 * 16, 10)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x.reshape(-1, 1, 8, 8))))
        x = F.relu(x + self.grouped(x))
        return self.head(F.relu(self.down(x)).flatten(1))


class Tokens(nn.Module):
    """nn.TransformerEncoder over the eight rows of a digit."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(8, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        return self.head(self.encoder(self.embed(x.reshape(-1, 8, 8))).mean(1))


def mlp():
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 10))


HEADS = {mlp: "4", Residual: "head", Tokens: "head"}


def low_rank(build=mlp, rank=0.25, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    model = build().to(dtype)
    condlr_ext.factorize(model, rank=rank, exclude=HEADS[build])
    return model


@pytest.fixture(scope="module")
def digits():
    split = data.load("digits", 0)
    return split.x_train[:640].flatten(1), split.y_train[:640]


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, LowRankLayer)]


def train(model, optimizer, digits, steps, start=0):
    """The losses of these steps on batches of 64."""
    x, y = digits
    losses = []
    for k in range(start, start + steps):
        index = (torch.arange(64) + 64 * k) % len(x)

        def closure(index=index):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x[index].to(next(model.parameters()))), y[index])
            loss.backward()
            return loss

        losses.append(optimizer.step(closure).item())
    return losses


# ------------------------------------------------------------------------------------------------ all optimizers


@every_optimizer
@pytest.mark.parametrize(
    "build, lr, steps, most", [(mlp, 0.3, 60, 0.9), (Residual, 0.1, 30, 0.6), (Tokens, 0.1, 40, 0.95)]
)
def test_learns_digits(make, build, lr, steps, most, digits):
    model = low_rank(build, rank=0.5)
    optimizer = make(model, lr, momentum=0.3)
    losses = train(model, optimizer, digits, steps)
    assert sum(losses[-5:]) < most * sum(losses[:5])
    assert isinstance(optimizer, torch.optim.Optimizer)
    for layer in layers_of(model):
        assert max(non_orthonormality(layer.U), non_orthonormality(layer.V)) < 3e-6
        assert layer.rank == len(layer.S) == layer.U.shape[1] == layer.V.shape[1]


@every_optimizer
def test_resumes_exactly(make, digits):
    model = low_rank()
    optimizer = make(model, 0.1, momentum=0.5)
    train(model, optimizer, digits, 8)
    twin = copy.deepcopy(model)
    resumed = make(twin, 0.3, momentum=0.1)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    copied_model, copied = pickle.loads(pickle.dumps((model, optimizer)))
    losses = train(model, optimizer, digits, 8, start=8)
    assert train(twin, resumed, digits, 8, start=8) == losses
    assert train(copied_model, copied, digits, 8, start=8) == losses
    for p, q, c in zip(model.parameters(), twin.parameters(), copied_model.parameters(), strict=True):
        assert torch.equal(p, q) and torch.equal(p, c)


@every_optimizer
def test_other_parameters_follow_torch_sgd(make, digits):
    """With the layers' own loss gone, the classifier of fixed features is trained as torch's SGD trains it."""
    model = low_rank(dtype=torch.float64)
    optimizer = make(model, 0.1, momentum=0.9, weight_decay=0.01)
    head = copy.deepcopy(model[4])
    theirs = torch.optim.SGD(head.parameters(), 0.1, momentum=0.9, weight_decay=0.01)
    features = torch.randn(32, 48, dtype=torch.float64)
    taken = 0
    for _ in range(12):
        before = model[4].weight.clone()

        def closure():
            optimizer.zero_grad()
            for p in (p for layer in layers_of(model) for p in layer.parameters()):
                p.grad = torch.zeros_like(p)
            loss = model[4](features).square().sum() / 32
            loss.backward()
            return loss

        optimizer.step(closure)
        if torch.equal(before, model[4].weight):  # RobustDLRT makes bases
            continue
        taken += 1
        theirs.zero_grad()
        (head(features).square().sum() / 32).backward()
        theirs.step()
        torch.testing.assert_close(model[4].weight, head.weight, rtol=1e-12, atol=1e-14)
    assert taken >= 10


@every_optimizer
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_gradient_changes_nothing(make, value, digits):
    model = low_rank()
    optimizer = make(model, 0.1, momentum=0.5)
    train(model, optimizer, digits, 3)
    before, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    calls = []

    def closure():
        calls.append(0)
        optimizer.zero_grad()
        F.cross_entropy(model(digits[0][:8]), digits[1][:8]).backward()
        if len(calls) == (3 if isinstance(optimizer, DLRT) else 1):
            model[4].bias.grad[0] = value

    with pytest.raises(NonFiniteError, match=r"NaN or Inf in that of 4\.bias; nothing was changed"):
        optimizer.step(closure)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert_same_state(state, optimizer.state_dict())


@every_optimizer
def test_autocast_has_no_effect_on_the_step(make, digits):
    results = []
    for enabled in (False, True):
        model = low_rank()
        optimizer = make(model, 0.1, momentum=0.5)

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            with torch.autocast("cpu", enabled=False):
                F.cross_entropy(model(digits[0][:64]), digits[1][:64]).backward()

        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            for _ in range(7):
                optimizer.step(closure)
        results.append(model.state_dict())
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


def assert_same_state(a, b):
    assert a["param_groups"] == b["param_groups"]
    buffers = [{k: v for k, v in s["state"].items() if v} for s in (a, b)]
    assert buffers[0].keys() == buffers[1].keys() and buffers[0]
    for key, values in buffers[0].items():
        assert all(torch.equal(v, buffers[1][key][name]) for name, v in values.items())


@pytest.mark.parametrize("name", ["released", "released tau 0", "cayley bound", "projected bound"])
def test_a_step_that_overflows_changes_nothing(name, digits):
    model = low_rank()
    optimizer = OPTIMIZERS[name](model, 0.1)
    optimizer.param_groups[0]["lr"] = 1e38
    before = copy.deepcopy(model.state_dict())
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e3)
    with pytest.raises(NonFiniteError, match="NaN or Inf in 0.S, 2.S; nothing was changed"):
        optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda m: ReleasedCondLR(m, -0.1, tau=0.1), "ReleasedCondLR: lr must be a finite number >= 0, got -0.1"),
        (lambda m: ReleasedCondLR(m, 0.1, math.inf, tau=0.1), "momentum must be a finite number"),
        (lambda m: ReleasedCondLR(m, 0.1, tau=-0.1), "tau must be a finite number >= 0"),
        (lambda m: ReleasedCondLR(m, 0.1, tau=math.inf), "tau must be a finite number >= 0"),
        (lambda m: ReleasedCondLR(mlp(), 0.1, tau=0.1), "must have low-rank layers"),
        (lambda m: ReleasedCondLR(m.half(), 0.1, tau=0.1), "U of layer '0' must be float32 or float64, got torch.float16"),
        (lambda m: ReleasedCondLR(m.to("meta"), 0.1, tau=0.1), "got a meta tensor"),
        (lambda m: CayleySGD(m, 0.1, tau=-1), "CayleySGD: tau must be a number >= 0"),
        (lambda m: CayleySGD(mlp(), 0.1), "must have low-rank layers, or weights name dense ones"),
        (lambda m: CayleySGD(m, 0.1, weights="5"), "weights must be names of modules .* got '5'"),
        (lambda m: ProjectedSGD(m.parameters(), 0.1), "the parameters of low-rank layers need their names"),
        (lambda m: ProjectedSGD(m, 0.1, weight_decay="x"), "ProjectedSGD: weight_decay must be"),
        (lambda m: DLRT(m, 0.1, tolerance=1), r"DLRT: tolerance must be a number in \[0, 1\), got 1"),
        (lambda m: DLRT(m, 0.1, tolerance=0.1, min_rank=0), "min_rank must be an int >= 1, got 0"),
        (lambda m: DLRT(mlp(), 0.1, tolerance=0.1), "must have low-rank layers that are trained, got none"),
        (lambda m: DLRT(m.requires_grad_(False), 0.1, tolerance=0.1), "layers that are trained, got none"),
        (lambda m: RobustDLRT(m, 0.1, beta=-1, tolerance=0.1), "beta must be a finite number >= 0, got -1"),
        (lambda m: RobustDLRT(m, 0.1, beta=0, tolerance=0.1, core_steps=0), "core_steps must be an int >= 1, got 0"),
    ],
)  # fmt: skip
def test_bad_arguments(make, text):
    with pytest.raises(ValueError, match=text):
        make(low_rank())


def test_more_bad_arguments():
    model = low_rank()
    with pytest.raises(TypeError, match="DLRT: model must be a module"):
        DLRT(model.parameters(), 0.1, tolerance=0.1)
    with pytest.raises(TypeError, match="a closure that computes loss and gradients is needed"):
        DLRT(model, 0.1, tolerance=0.1).step(None)
    model[0].U.requires_grad_(False)
    with pytest.raises(ValueError, match="layer '0' must have all of U, S, V trained or none, got S, V"):
        DLRT(model, 0.1, tolerance=0.1)
    model[2].S.data[0, 0] = math.nan
    for make in (OPTIMIZERS["released"], CayleySGD):
        with pytest.raises(NonFiniteError, match="S of layer '2' must be finite"):
            make(model, 0.1)
    for make in (OPTIMIZERS["released"], OPTIMIZERS["robust dlrt"]):
        model = low_rank()
        optimizer = make(model, 0.1)
        model[4].weight.grad = torch.zeros(10, 48).to_sparse()
        with pytest.raises(RuntimeError, match="step does not take sparse gradients"):
            optimizer.step()
        with pytest.raises(ValueError, match="add_param_group: "):
            optimizer.add_param_group({"params": [("extra", nn.Parameter(torch.ones(1)))]})


# -------------------------------------------------------------------------------------------------- ReleasedCondLR


def one_layer(U, S, V):
    layer = LowRankLinear(len(V), len(U), bias=False, rank=len(S), dtype=torch.float64)
    with torch.no_grad():
        for p, value in zip((layer.U, layer.S, layer.V), (U, S, V), strict=True):
            p.copy_(torch.as_tensor(value, dtype=torch.float64))
    return layer


def step_with(optimizer, layer, dU, dS, dV):
    for p, grad in zip((layer.U, layer.S, layer.V), (dU, dS, dV), strict=True):
        p.grad = torch.as_tensor(grad, dtype=torch.float64)
    optimizer.step()


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


# ---------------------------------------------------------------------------------------------- Stiefel manifold


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
    model = Residual()
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


# ---------------------------------------------------------------------------------------------------------- DLRT


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


# ----------------------------------------------------------------------------------------------------- RobustDLRT


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


# -------------------------------------------------------------------------------------------------------- vanilla


CONVS = [
    (nn.Conv2d(3, 8, 3, 2, 1), (2, 3, 9, 10)),
    (nn.Conv2d(8, 12, 3, padding="same", dilation=2, groups=4, padding_mode="circular"), (2, 8, 9, 7)),
    (nn.Conv2d(6, 4, (3, 1), groups=2, bias=False), (6, 9, 7)),
    (nn.Conv1d(4, 6, 5, 2, 2, padding_mode="reflect"), (3, 4, 17)),
    (nn.Conv3d(4, 6, 3, groups=2, padding=1), (2, 4, 5, 6, 5)),
    (nn.Conv2d(4, 4, 1), (2, 4, 5, 5)),
]


@pytest.mark.parametrize("conv, shape", CONVS, ids=lambda x: type(x).__name__ if isinstance(x, nn.Module) else str(x))
def test_vanilla_convolution(conv, shape):
    conv = copy.deepcopy(conv).double()
    x = torch.randn(shape, dtype=torch.float64)
    full = min(conv.weight.shape[0], conv.weight[0].numel())
    torch.testing.assert_close(TwoFactorConv.from_dense(conv, full)(x), conv(x))
    layer = TwoFactorConv.from_dense(conv, 2)
    U, sigma, V = condlr_ext.linalg.svd(conv.weight.detach().flatten(1))
    best = (U[:, :2] * sigma[:2] @ V[:, :2].mT).reshape(conv.weight.shape)
    torch.testing.assert_close(layer.weight, best)
    with torch.no_grad():
        conv.weight.copy_(best)
    torch.testing.assert_close(layer(x), conv(x))
    assert sum(p.numel() for p in layer.parameters()) == 2 * sum(best.flatten(1).shape) + len(best) * (
        conv.bias is not None
    )
    halves = [singular_values(part.weight.flatten(1)) for part in layer]
    torch.testing.assert_close(halves[0], halves[1])  # the spectrum is split evenly


def test_vanilla_in_networks(digits):
    torch.manual_seed(0)
    for build, ranks in (
        (Residual, {"stem": 4, "grouped": 4, "down": 5}),
        (
            Tokens,
            {"encoder.layers.0.self_attn.out_proj": 6, "encoder.layers.0.linear1": 8, "encoder.layers.0.linear2": 8},
        ),
    ):
        model = build()
        assert vanilla_low_rank(model, ranks) is model
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.8)
        losses = train(model, optimizer, digits, 30)
        assert sum(losses[-5:]) < 0.95 * sum(losses[:5])
        assert all(p.grad is not None for p in model.parameters())
        x = digits[0][:16]
        model.eval()
        slow = model(x)
        with torch.no_grad():  # the encoder's fast path reads the weights
            torch.testing.assert_close(model(x), slow, rtol=1e-4, atol=1e-5)


def test_vanilla_keeps_sharing_and_refuses_ties():
    layer = nn.Linear(4, 4)
    model = nn.ModuleList([layer, nn.Sequential(layer), nn.Linear(4, 4)])
    vanilla_low_rank(model, {"0": 2})
    assert isinstance(model[0], TwoFactorLinear) and model[1][0] is model[0]
    frozen = nn.Sequential(nn.Linear(4, 4).requires_grad_(False))
    vanilla_low_rank(frozen, {"0": 2})
    assert not any(p.requires_grad for p in frozen.parameters())
    tied = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match="the weight of '0' is tied to that of '1'"):
        vanilla_low_rank(tied, {"0": 2})
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="'0' is no nn.Linear or nn.Conv1d/2d/3d of the model; it has none"):
        vanilla_low_rank(normed, {"0": 2})
    with pytest.raises(RankError, match=r"TwoFactorConv.from_dense: rank must be in 1..4 for \[4, 18\], got 5"):
        vanilla_low_rank(nn.Sequential(nn.Conv2d(2, 4, 3)), {"0": 5})


# -------------------------------------------------------------------------------------------------------- pruning


def planted():
    """Two layers with known spectra and a classifier."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 25), nn.ReLU(), nn.Linear(25, 4)).double()
    with torch.no_grad():
        model[0].weight.copy_(with_spectrum(0.5 ** torch.arange(20.0, dtype=torch.float64), 30, 20))
        model[2].weight.copy_(with_spectrum(0.9 ** torch.arange(25.0, dtype=torch.float64), 25, 30))
    return model


def ranks_of(report):
    return {layer.name: layer.rank for layer in report.layers}


def test_prune_by_tolerance():
    model, dense = planted(), planted()
    report = svd_prune(model, tolerance=0.1, exclude="4")
    # tails of geometric spectra: q^r, and (q^2r - q^50) / (1 - q^50) < 0.01 at q = 0.9: r = 20 or more
    expected = {name: kept_rank(singular_values(dense.get_submodule(name).weight), 0.1) for name in ("0", "2")}
    assert ranks_of(report) == expected and expected["0"] == 4 and 18 <= expected["2"] <= 22
    for name in ("0", "2"):
        W = dense.get_submodule(name).weight.detach()
        error = (model.get_submodule(name).weight - W).norm() / W.norm()
        assert error < 0.1
        torch.testing.assert_close(error, singular_values(W)[expected[name] :].norm() / W.norm())


@pytest.mark.parametrize("budget", [0.2, 0.5, 0.9, 3.0])
def test_prune_by_budget_is_the_least_tolerance(budget):
    model, dense = planted(), planted()
    report = svd_prune(model, budget=budget, exclude="4")
    assert report.kept <= budget
    spectra = {name: singular_values(dense.get_submodule(name).weight) for name in ("0", "2")}
    dropped = {name: (s[ranks_of(report)[name] :].norm() / s.norm()).item() for name, s in spectra.items()}
    if budget == 3.0:
        assert ranks_of(report) == {"0": 20, "2": 25}
        return
    # one more rank for the layer with the larger error would be the next smaller tolerance: it must not fit
    worst = max(dropped, key=dropped.get)
    more = {name: rank + (name == worst) for name, rank in ranks_of(report).items()}
    cost = sum(r * sum(dense.get_submodule(name).weight.shape) + r * r for name, r in more.items())
    assert cost > budget * (600 + 750)
    other = "0" if worst == "2" else "2"  # and the other layer has no rank that this tolerance would drop
    s = spectra[other]
    assert (s[ranks_of(report)[other] - 1 :].norm() / s.norm()).item() >= dropped[worst]


def test_prune_takes_zero_weights():
    model = planted()
    nn.init.zeros_(model[2].weight)
    report = svd_prune(model, budget=0.5, exclude="4")
    assert ranks_of(report)["2"] == 1 and ranks_of(report)["0"] > 4 and report.kept <= 0.5


def test_prune_by_rank_and_errors():
    model = planted()
    before = copy.deepcopy(model.state_dict())
    for options, text in (
        ({}, "give one of rank, tolerance and budget"),
        ({"rank": 2, "budget": 0.5}, "give one of rank, tolerance and budget"),
        ({"tolerance": 1.0}, r"tolerance must be in \[0, 1\), got 1.0"),
        ({"budget": 0}, r"budget must be in \(0, inf\), got 0"),
        ({"budget": math.nan}, "budget must be in"),
        ({"tolerance": 0.1, "include": "nothing"}, "matches no module"),
    ):
        with pytest.raises(ValueError, match=text):
            svd_prune(model, **options)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert "over the budget" in str(svd_prune(copy.deepcopy(model), budget=1e-3))
    assert ranks_of(svd_prune(model, rank={"0": 3, "2": 0.2})) == {"0": 3, "2": 5}


def test_pruned_network_is_fine_tuned(digits):
    torch.manual_seed(0)
    model = Residual()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.8)
    train(model, optimizer, digits, 60)
    svd_prune(model, tolerance=0.5, exclude="head")
    assert isinstance(model.down, LowRankConv2d) and model.down.rank < 12
    losses = train(model, torch.optim.SGD(model.parameters(), 0.02, momentum=0.8), digits, 30, start=60)
    assert sum(losses[-5:]) < sum(losses[:5])


# ------------------------------------------------------------------------------------------------------------ GPU


@pytest.mark.gpu
@every_optimizer
def test_on_cuda_as_on_the_cpu(make):
    torch.backends.cuda.matmul.allow_tf32 = False
    results = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = nn.Sequential(LowRankLinear(12, 9, rank=4), nn.Tanh(), LowRankLinear(9, 5, rank=3)).double()
        x = torch.randn(16, 12, dtype=torch.float64).to(device)
        model.to(device)
        optimizer = make(model, 0.1, momentum=0.5)

        def closure(model=model, optimizer=optimizer, x=x):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            return loss

        results.append([optimizer.step(closure).item() for _ in range(12)])
    assert results[0] == pytest.approx(results[1], rel=1e-8)
