"""Penalties against closed forms, by gradcheck at distinct, repeated and zero singular values, and on real layers."""

import copy
import math

import pytest
import torch
from torch import nn

import condlr_ext
from condlr_ext import pruning, regularizers
from condlr_ext.errors import NonFiniteError, ShapeError
from condlr_ext.regularizers import (
    cnc,
    kappa_bound,
    layer_matrices,
    lipschitz,
    log_volume,
    robust_dlrt,
    spectral_norm,
    transformed_l1,
    tsc,
)

F64 = torch.float64
PENALTIES = {
    "spectral_norm": spectral_norm,
    "lipschitz": lambda A: lipschitz(A, bound=0.3),
    "log_volume": log_volume,
    "robust_dlrt": robust_dlrt,
    "cnc": cnc,
    "cnc-released": lambda A: cnc(A, form="released"),
}
every_penalty = pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES)


def orthonormal(m, n, dtype=F64):
    return torch.linalg.qr(torch.randn(m, n, dtype=F64)).Q.to(dtype)


def with_spectrum(sigma, m=None, n=None):
    sigma = torch.tensor(sigma, dtype=F64)
    r = len(sigma)
    return orthonormal(m or r, r) * sigma @ orthonormal(n or r, r).mT


def network():
    """Dense, low-rank and convolutional layers, two of equal shape."""
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=2), nn.Flatten(),
        nn.Linear(96, 20), nn.Tanh(), nn.Linear(20, 20), nn.Linear(20, 20), nn.Linear(20, 4),
    )  # fmt: skip
    condlr_ext.factorize(model, rank={"0": 5, "6": 7, "7": 7})
    return model.double()


@pytest.mark.parametrize("m, n", [(5, 5), (7, 4), (3, 6)])
@every_penalty
def test_gradients_at_distinct_singular_values(penalty, m, n):
    A = torch.randn(2, m, n, dtype=F64, requires_grad=True)
    torch.autograd.gradcheck(penalty, A)


# a floor of 0.1: at 1e-3 the curvature at a zero, 1e6, is beyond finite differences
@pytest.mark.parametrize(
    "penalty",
    [lambda A: log_volume(A, floor=0.1), lambda A: cnc(A, floor=0.1), lambda A: cnc(A, form="released")],
    ids=["log_volume", "cnc", "cnc-released"],
)
def test_smooth_penalties_at_repeated_and_zero_singular_values(penalty):
    for sigma in ([2.0, 2.0, 2.0, 2.0], [2.0, 2.0, 0.5, 0.5], [2.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0]):
        for A in (with_spectrum(sigma), with_spectrum(sigma, n=6)):
            A.requires_grad_()
            torch.autograd.gradcheck(penalty, A)


def test_robust_dlrt_at_repeated_and_zero_singular_values():
    for sigma in ([2.0, 2.0, 0.5, 0.5], [2.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0]):
        torch.autograd.gradcheck(robust_dlrt, with_spectrum(sigma, m=5).requires_grad_())


@every_penalty
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_values_and_gradients_are_finite_at_degenerate_matrices(penalty, dtype):
    cases = [3 * orthonormal(6, 6), torch.eye(6), torch.zeros(6, 6), torch.ones(6, 6), 1e-30 * torch.eye(6)]
    cases += [torch.diag(torch.tensor([1.0, 1, 1, 0, 0, 0])), with_spectrum([1.0, 1e-6], 6, 6), torch.ones(1, 1)]
    for case in cases:
        A = case.to(dtype).requires_grad_()
        value = penalty(A)
        value.backward()
        assert torch.isfinite(value) and torch.isfinite(A.grad).all()


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


def test_descent_on_log_volume_and_cnc_flattens_the_spectrum():
    for penalty, lr in ((log_volume, 0.02), (cnc, 0.002)):
        A = with_spectrum([2.0, 1.5, 1.0, 0.5, 0.3], 8, 5).requires_grad_()
        before = condlr_ext.linalg.cond(A.detach())
        for _ in range(400):
            (grad,) = torch.autograd.grad(penalty(A), A)
            A.data -= lr * grad
        assert condlr_ext.linalg.cond(A.detach()) < 1 + (before - 1) / 5


def test_kappa_bound_holds_and_is_exact_for_two():
    for r in (1, 2, 3, 10, 40):
        A = torch.randn(200, r, r, dtype=F64)
        sigma = torch.linalg.svdvals(A)
        kappa, bound = sigma[:, 0] / sigma[:, -1], kappa_bound(A)
        assert (bound >= kappa * (1 - 1e-10)).all()
        if r <= 2:
            torch.testing.assert_close(bound, kappa, rtol=1e-7, atol=0)
    flat = 3 * orthonormal(64, 20, torch.float32)
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


def test_spectral_norm_and_lipschitz_by_hand():
    A, B = with_spectrum([3.0, 2.0], 5, 4), with_spectrum([0.5, 0.2])
    torch.testing.assert_close(spectral_norm([A, B]), torch.tensor((9 + 0.25) / 2, dtype=F64))
    torch.testing.assert_close(lipschitz([A, B], bound=1.5), torch.tensor(math.log(2), dtype=F64))
    leaf = B.clone().requires_grad_()
    lipschitz(leaf).backward()
    assert not leaf.grad.any()  # within the bound
    # at a repeated largest value: the same subgradient whatever basis the SVD picks, here A / (‖A‖ r) for all tied
    Q = orthonormal(6, 6).requires_grad_()
    lipschitz(2 * Q).backward()
    torch.testing.assert_close(Q.grad, Q.detach() / 6)
    half = with_spectrum([2.0, 2.0, 1.0, 1.0]).requires_grad_()
    spectral_norm(half).backward()
    torch.testing.assert_close(half.grad, with_spectrum_of(half.detach(), lambda s: torch.where(s > 1.5, s / 2, 0)))


def with_spectrum_of(A, function):
    U, s, Vh = torch.linalg.svd(A)
    return U * function(s) @ Vh


def test_cnc_released_is_the_public_formula_and_moves_with_scale():
    W = torch.randn(5, 9, dtype=F64)
    formula = (1e-5 + torch.linalg.det(W @ W.mT / 5)).log() ** 2
    torch.testing.assert_close(cnc(W, form="released"), formula)
    assert abs(cnc(2 * W, form="released") - formula) > 1
    torch.testing.assert_close(cnc(2 * W), cnc(W))
    # unit determinant is the optimum of the released form whatever the condition number
    assert cnc(math.sqrt(2) * torch.diag(torch.tensor([100.0, 0.01], dtype=F64)), form="released") < 1e-9
    assert cnc(torch.diag(torch.tensor([100.0, 0.01], dtype=F64))) > 100
    torch.testing.assert_close(cnc(W.mT, form="released"), torch.tensor(math.log(1e-5) ** 2, dtype=F64))
    wide = 10 * torch.randn(60, 400)  # the determinant is about 1e250
    assert torch.isfinite(cnc(wide, form="released")) and cnc(wide, form="released") > 1e4


def test_transformed_l1_limits():
    t = torch.tensor([0.0, 1e-3, 1.0, 50.0], dtype=F64)
    torch.testing.assert_close(transformed_l1(-t, 1e9), t, rtol=1e-6, atol=0)
    torch.testing.assert_close(transformed_l1(t, 1e-9), (t > 0).to(F64), rtol=1e-5, atol=0)
    assert transformed_l1(torch.tensor(1.0), 3.0) == 1


def test_tsc_by_hand_and_its_released_sign():
    layer = nn.Linear(3, 2).double()
    t = (layer.weight.square().sum(1) * 12.5 + 1e-3 * 3).detach()
    torch.testing.assert_close(tsc(layer).detach(), (101 * t / (100 + t)).sum())
    torch.testing.assert_close(tsc(layer, form="released").detach(), (101 * t / (100 - t)).sum())
    layer.weight.data *= 20
    assert tsc(layer, form="released") < 0 < tsc(layer)  # beyond its pole the released penalty is a reward
    torch.autograd.gradcheck(lambda W: torch.func.functional_call(Call(layer, tsc), {"layer.weight": W}), layer.weight)


class Call(nn.Module):
    def __init__(self, layer, function):
        super().__init__()
        self.layer, self.function = layer, function

    def forward(self):
        return self.function(self.layer)


def test_tsc_of_a_low_rank_layer_is_that_of_its_weight():
    model = network()
    dense = condlr_ext.to_dense(copy.deepcopy(model))
    torch.testing.assert_close(tsc(model), tsc(dense), rtol=1e-6, atol=0)
    assert tsc(model, exclude=["8", "0"]) < tsc(model)


def test_tsc_of_gates_counts_open_ones_and_closes_useless_channels():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    dense = tsc(model, exclude="2").item()
    pruning.add_gates(model, exclude="2")
    gate = model[0].parametrizations.weight[0]
    W, p = model[0].parametrizations.weight.original, gate.open_probability()
    t = p * (12.5 * W.square().sum(1) + 4e-3)
    torch.testing.assert_close(tsc(model, exclude="2"), (101 * t / (100 + t)).sum())
    assert tsc(model, exclude="2") < dense
    optimizer = torch.optim.SGD([gate.log_alpha], lr=5)
    for _ in range(60):
        optimizer.zero_grad()
        tsc(model, exclude="2").backward()
        optimizer.step()
    assert (gate.open_probability() < 0.1).all()


def test_a_model_is_the_sum_over_its_layers_low_rank_and_dense_alike():
    model = network()
    matrices = layer_matrices(model)
    assert list(matrices) == ["0", "2", "4", "6", "7", "8"]
    assert torch.equal(matrices["6"], model[6].S) and matrices["2"].shape == (6, 27)
    dense = condlr_ext.to_dense(copy.deepcopy(model))
    for name, penalty in PENALTIES.items():
        torch.testing.assert_close(penalty(model), sum(penalty(A) for A in matrices.values()))
        if "cnc" not in name and name not in ("log_volume", "robust_dlrt"):  # those know the rank
            torch.testing.assert_close(penalty(model), penalty(dense))
        model.zero_grad()
        penalty(model).backward()
        assert model[6].S.grad is not None and model[6].U.grad is None and model[2].weight.grad.shape == (6, 3, 3, 3)
    assert list(layer_matrices(model, exclude=["8"])) == ["0", "2", "4", "6", "7"]


def test_equal_shapes_go_through_one_call(monkeypatch):
    calls = []
    svd = condlr_ext.linalg.svd
    monkeypatch.setattr(condlr_ext.linalg, "svd", lambda A: calls.append(tuple(A.shape)) or svd(A))
    matrices = [
        torch.randn(5, 5),
        torch.randn(7, 4),
        torch.randn(5, 5),
        torch.randn(3, 4, 7),
        torch.randn(5, 5).double(),
    ]
    log_volume(matrices)
    assert sorted(calls) == [(1, 5, 5), (2, 5, 5), (4, 7, 4)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_are_penalised_in_float32(dtype):
    A = torch.randn(6, 4).to(dtype).requires_grad_()
    for penalty in PENALTIES.values():
        value = penalty(A)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, penalty(A.detach().float()))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(penalty(A), value, rtol=0, atol=0)


def test_penalties_compile_without_graph_breaks():
    model = network()

    def every(model):
        return sum(penalty(model) for penalty in PENALTIES.values()) + tsc(model)

    expected = torch.autograd.grad(every(model), model[6].S)[0]
    compiled = torch.compile(every, fullgraph=True, backend="aot_eager")
    value = compiled(model)
    torch.testing.assert_close(value, every(model))
    torch.testing.assert_close(torch.autograd.grad(value, model[6].S)[0], expected)


@pytest.mark.parametrize("sigma", [(3.0, 2.0, 1.5), (2.0, 2.0, 2.0), (0.0, 0.0, 0.0)], ids=str)
def test_room_for_a_larger_rank_is_neutral(sigma):
    """As RankController keeps it: zero columns of U and V, zero rows and columns of S."""
    small = condlr_ext.LowRankLinear(9, 8, rank=3, dtype=F64)
    with torch.no_grad():
        small.S.copy_(with_spectrum(sigma))
    large = condlr_ext.LowRankLinear(9, 8, rank=5, dtype=F64)
    with torch.no_grad():
        for name in "USV":
            getattr(large, name).zero_()[tuple(slice(n) for n in getattr(small, name).shape)] = getattr(small, name)
    for name, penalty in PENALTIES.items():
        if name == "cnc-released" or not any(sigma) and name in ("cnc", "log_volume"):
            continue  # a volume, which grows with the rank; zeros count as many times the floor
        for wrap in (lambda layer: layer, layer_matrices):
            values = [penalty(wrap(layer)) for layer in (small, large)]
            grads = [torch.autograd.grad(v, layer.S)[0] for v, layer in zip(values, (small, large), strict=True)]
            torch.testing.assert_close(*values, msg=name)
            assert torch.isfinite(grads[1]).all() and not grads[1][3:].any() and not grads[1][:, 3:].any()
            torch.testing.assert_close(grads[0], grads[1][:3, :3], rtol=1e-9, atol=1e-12, msg=name)


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


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: spectral_norm([]), ValueError, "spectral_norm: matrices must hold at least one matrix, got none"),
        (lambda: spectral_norm(torch.ones(3)), ShapeError, r"the matrix must be \[\*, m, n\] and not empty, got shape \[3\]"),
        (lambda: log_volume([torch.ones(0, 3)]), ShapeError, r"matrix 0 .* got shape \[0, 3\]"),
        (lambda: cnc({"head": torch.ones(2, 2).long()}), TypeError, "cnc: head must be a real .* got torch.int64"),
        (lambda: log_volume(nn.ReLU()), ValueError, "layer_matrices: the model must have a layer to act on"),
        (lambda: layer_matrices([1]), TypeError, "layer_matrices: model must be a torch.nn.Module, got list"),
        (lambda: layer_matrices(nn.Linear(2, 2), exclude="head"), ValueError, "exclude 'head' matches no module"),
        (lambda: log_volume(torch.ones(2, 2), floor=-1), ValueError, r"floor must be a number in \[0, 1\), got -1"),
        (lambda: cnc(torch.ones(2, 2), form="paper"), ValueError, "form must be one of corrected, released, got 'paper'"),
        (lambda: tsc(nn.Linear(2, 2), a=0), ValueError, "tsc: a must be a finite number > 0, got 0"),
        (lambda: tsc(nn.Linear(2, 2), cost=-1), ValueError, "tsc: cost must be a finite number >= 0, got -1"),
        (lambda: lipschitz(torch.ones(2, 2), bound=0), ValueError, "lipschitz: bound must be a number > 0, got 0"),
    ],
)  # fmt: skip
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


@every_penalty
def test_nan_names_the_layer(penalty):
    matrices = {"good": torch.eye(3), "bad": torch.full((3, 3), math.nan), "also good": torch.ones(4, 2)}
    with pytest.raises(NonFiniteError, match="the penalty of bad is not finite"):
        penalty(matrices)


def test_nan_names_the_layer_in_tsc():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight.data[0, 0] = math.inf
    with pytest.raises(NonFiniteError, match="tsc: the penalty of 1 is not finite"):
        tsc(model)


def test_everything_is_exported():
    assert condlr_ext.regularizers is regularizers
    assert all(callable(getattr(regularizers, name)) for name in regularizers.__all__)
