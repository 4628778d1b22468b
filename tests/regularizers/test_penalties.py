"""All penalties: gradients at distinct, repeated and zero singular values, models, dtypes, errors."""

import copy
import math

import pytest
import torch
from helpers.matrices import orthonormal, with_spectrum
from torch import nn

import condlr_ext
from condlr_ext import regularizers
from condlr_ext.errors import NonFiniteError, ShapeError
from condlr_ext.regularizers import (
    cnc,
    layer_matrices,
    lipschitz,
    log_volume,
    robust_dlrt,
    spectral_norm,
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


def test_descent_on_log_volume_and_cnc_flattens_the_spectrum():
    for penalty, lr in ((log_volume, 0.02), (cnc, 0.002)):
        A = with_spectrum([2.0, 1.5, 1.0, 0.5, 0.3], 8, 5).requires_grad_()
        before = condlr_ext.linalg.cond(A.detach())
        for _ in range(400):
            (grad,) = torch.autograd.grad(penalty(A), A)
            A.data -= lr * grad
        assert condlr_ext.linalg.cond(A.detach()) < 1 + (before - 1) / 5


def test_a_model_is_the_sum_over_its_layers_low_rank_and_dense_alike(model):
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


def test_penalties_compile_without_graph_breaks(model):
    model = model[2:8:4].append(model[7])  # dense, and two low-rank layers of equal shape: compiling takes long

    def every(model):
        return sum(penalty(model) for penalty in PENALTIES.values()) + tsc(model)

    expected = torch.autograd.grad(every(model), model[1].S)[0]
    compiled = torch.compile(every, fullgraph=True, backend="aot_eager")
    value = compiled(model)
    torch.testing.assert_close(value, every(model))
    torch.testing.assert_close(torch.autograd.grad(value, model[1].S)[0], expected)


@pytest.mark.parametrize("sigma", [(3.0, 2.0, 1.5), (2.0, 2.0, 2.0), (0.0, 0.0, 0.0)], ids=str)
def test_reserved_directions_are_neutral(sigma):
    """RankController reserves them as zero columns of U and V, zero rows and columns of S."""
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


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: spectral_norm([]), ValueError, "spectral_norm: matrices must hold at least one matrix, got none"),
        (lambda: spectral_norm(torch.ones(3)), ShapeError, r"the matrix must be \[\*, m, n\] and not empty, got shape \[3\]"),
        (lambda: log_volume([torch.ones(0, 3)]), ShapeError, r"matrix 0 .* got shape \[0, 3\]"),
        (lambda: cnc({"head": torch.ones(2, 2).long()}), TypeError, "cnc: head must be a real .* got torch.int64"),
        (lambda: log_volume(nn.ReLU()), ValueError, "layer_matrices: the model must have a layer to act on"),
        (lambda: layer_matrices([1]), TypeError, "layer_matrices: model must be a torch.nn.Module, got list"),
        (lambda: layer_matrices(nn.Linear(2, 2), exclude="head"), ValueError, "exclude 'head' matches nothing"),
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


# name: degree of the penalty in the scale of the matrix
@pytest.mark.parametrize("name, degree", [("log_volume", 0), ("cnc", 0), ("robust_dlrt", 2), ("spectral_norm", 2)])
@pytest.mark.parametrize("exponent", [-100, -73, 60])
def test_gradients_scale_with_the_matrix(name, degree, exponent):
    gradients = []
    for e in (0, exponent):
        torch.manual_seed(0)
        A = (torch.randn(2, 5, 3) * 2.0**e).requires_grad_()
        PENALTIES[name](A).backward()
        gradients.append(A.grad.double() * 2.0 ** (e * (1 - degree)))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


def test_near_overflow_is_right_or_named():
    signs = torch.tensor([[1.0, 1, 1], [1, -1, 1], [1, 1, 1]])
    matrices = {"good": torch.eye(3), "large": 3e38 * signs}
    for penalty in (log_volume, cnc):
        torch.testing.assert_close(penalty(matrices), penalty({"good": torch.eye(3), "large": signs}))
    for penalty in (spectral_norm, lipschitz, robust_dlrt):
        with pytest.raises(NonFiniteError, match="the penalty of large is not finite"):
            penalty(matrices)
    signs, scaled = (regularizers.kappa_bound(s * (signs + 0.5 * torch.eye(3)).double()) for s in (1.0, 1e308))
    torch.testing.assert_close(scaled, signs)


@every_penalty
def test_nan_names_the_layer(penalty):
    matrices = {"good": torch.eye(3), "bad": torch.full((3, 3), math.nan), "also good": torch.ones(4, 2)}
    with pytest.raises(NonFiniteError, match="the penalty of bad is not finite"):
        penalty(matrices)


def test_everything_is_exported():
    assert condlr_ext.regularizers is regularizers
    assert all(callable(getattr(regularizers, name)) for name in regularizers.__all__)
