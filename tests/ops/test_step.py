"""The step op on every backend: against the formulas written again in float64 NumPy, invariants, skipped layers."""

import math

import numpy as np
import pytest
import torch
from helpers.matrices import SPECTRA, kappa, non_orthonormality, orthonormal, with_spectrum
from helpers.op_arguments import hyper_table

import condlr_ext
from condlr_ext import linalg, ops, reference
from condlr_ext.reference import BANDS

SHAPES = [(6, 5, 3), (40, 40, 7), (17, 100, 17), (64, 9, 9), (1, 3, 1), (130, 70, 33), (3, 3, 3)]


def network(dtype, shapes=SHAPES, bias=True, kind="random"):
    params = []
    for m, n, r in shapes:
        S = with_spectrum(1 + 0.1 * SPECTRA[kind](r), r, r)
        params += [
            orthonormal(m, r),
            S,
            orthonormal(n, r),
            torch.randn(m if bias else 0, dtype=torch.float64),
        ]
    params = [p.to(dtype).contiguous() for p in params]
    grads = [torch.randn_like(p) for p in params]
    return params, grads, [torch.randn_like(p) for p in params]


def run(params, grads, buffers, hyper):
    skipped = torch.zeros(len(hyper), dtype=torch.int64)
    ops.step.step(params, grads, buffers, hyper, skipped)
    return skipped


def numpy_step(params, grads, buffers, options):
    """One layer in float64, from the formulas: QR by Householder, the clip by a full SVD."""
    o = dict(lr=0.05, momentum=0.3, tau=0.1, sigma_max=math.inf, dampening=0, weight_decay=0, precondition=1) | options
    U, S, V, b = (p.double().numpy() for p in params)
    directions, new_buffers = [], []
    for i, (p, g, B) in enumerate(zip(params, grads, buffers, strict=True)):
        p, g, B = (t.double().numpy() for t in (p, g, B))
        g = -g if o.get("maximize") else g
        if i in (1, 3):
            g = g + o["weight_decay"] * p
        B = g if o.get("fresh") else o["momentum"] * B + (1 - o["dampening"]) * g
        new_buffers.append(B)
        directions.append(g + o["momentum"] * B if o.get("nesterov") else B)

    def retract(X, D, gram):
        if math.isinf(o["tau"]):
            gram = gram + (1e-6 * np.linalg.norm(S, 2)) ** 2 * np.eye(len(gram))
        inverse = np.linalg.inv(gram) if o["precondition"] else np.eye(len(gram))
        Q, R = np.linalg.qr(X - o["lr"] * (D - X @ (X.T @ D)) @ inverse)
        return Q * np.where(np.diag(R) < 0, -1, 1)

    P, sigma, Qh = np.linalg.svd(S - o["lr"] * directions[1])
    tau, s = o["tau"], np.sqrt((sigma**2).mean())
    lo, hi = (0, math.inf) if math.isinf(tau) or len(sigma) == 1 else (2 * s / (2 + tau), 2 * s * (1 + tau) / (2 + tau))
    if hi > o["sigma_max"]:
        lo, hi = lo * o["sigma_max"] / hi if math.isfinite(hi) else 0, o["sigma_max"]
    S_new = P * sigma.clip(lo, hi) @ Qh
    new = [
        retract(U, directions[0], S @ S.T),
        S_new,
        retract(V, directions[2], S.T @ S),
        b - o["lr"] * directions[3],
    ]
    return [torch.from_numpy(np.asarray(t)) for t in new + new_buffers]


OPTIONS = [
    dict(),
    dict(fresh=1),
    dict(nesterov=1),
    dict(dampening=0.5, weight_decay=0.1),
    dict(maximize=1, weight_decay=0.01),
    dict(tau=0.0),
    dict(tau=math.inf),
    dict(tau=math.inf, sigma_max=0.7),
    dict(sigma_max=0.9),
    dict(lr=30.0),
    dict(precondition=0),
    dict(precondition=0, tau=math.inf),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_float64_is_the_formula(backend, options):
    params, grads, buffers = network(torch.float64)
    expected = [
        numpy_step(params[i : i + 4], grads[i : i + 4], buffers[i : i + 4], options) for i in range(0, len(params), 4)
    ]
    assert not run(params, grads, buffers, hyper_table(len(SHAPES), **options)).any()
    for layer, new in enumerate(expected):
        at = slice(4 * layer, 4 * layer + 4)
        for got, want in zip((*params[at], *buffers[at]), new, strict=True):
            # kappa of the trial point grows with lr ‖D‖
            torch.testing.assert_close(got, want, rtol=0, atol=1e-11 if options.get("lr", 0) < 1 else 1e-9)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_float32_is_as_accurate_as_plain_pytorch(backend, options, monkeypatch):
    """Root mean square error against float64 at most twice that of the formulas in float32 PyTorch, per role."""

    def clip_in_float32(A, tau, band, sigma_max):
        U, sigma, Vh = torch.linalg.svd(A)
        lo, hi = reference.clip_edges(sigma, tau, band, sigma_max)
        return (U * sigma.clamp(lo.unsqueeze(-1), hi.unsqueeze(-1)).unsqueeze(-2)) @ Vh

    ours, theirs = torch.zeros(8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    hyper = hyper_table(4, **options)
    for seed in range(10):
        torch.manual_seed(seed)
        params, grads, buffers = network(torch.float32, SHAPES[:4])
        exact = [[t.double() for t in group] for group in (params, grads, buffers)]
        plain = [[t.clone() for t in group] for group in (params, grads, buffers)]
        ops.step.step.reference(*exact, hyper, torch.zeros(4, dtype=torch.int64))
        with monkeypatch.context() as patch:
            patch.setattr(reference, "clip_spectrum", clip_in_float32)  # the reference's own is computed in float64
            ops.step.step.reference(*plain, hyper, torch.zeros(4, dtype=torch.int64))
        run(params, grads, buffers, hyper)
        for error, got in ((ours, params + buffers), (theirs, plain[0] + plain[2])):
            for i, (value, truth) in enumerate(zip(got, exact[0] + exact[2], strict=True)):
                error[i % 4 + 4 * (i >= len(params))] += (value - truth).pow(2).sum()
    assert (ours.sqrt() <= 2 * theirs.sqrt()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("band", range(3), ids=BANDS)
@pytest.mark.parametrize("tau", [0.0, 0.1, 0.5])
def test_bound_and_orthogonality_hold_at_every_step(backend, tau, band, dtype):
    params, grads, buffers = network(dtype, SHAPES[:5])
    hyper = hyper_table(5, tau=tau, band=band)
    for _ in range(10):
        run(params, [torch.randn_like(g) for g in grads], buffers, hyper)
        for U, S, V, _ in zip(*[iter(params)] * 4, strict=True):
            assert kappa(S) <= (1 + tau) * (1 + (5e-6 if dtype == torch.float32 else 1e-12))
            assert max(non_orthonormality(U), non_orthonormality(V)) <= (2e-6 if dtype == torch.float32 else 1e-13)


@pytest.mark.parametrize("size", [1e2, 1e4, 1e6])
def test_huge_steps_stay_orthonormal(backend, size):
    """One pass of Cholesky-QR would not do: the Gram matrix has a condition number of size²."""
    params, grads, buffers = network(torch.float32, SHAPES[:4])
    hyper = hyper_table(4, lr=size)
    assert not run(params, grads, buffers, hyper).any()
    for U, S, V, _ in zip(*[iter(params)] * 4, strict=True):
        assert max(non_orthonormality(U), non_orthonormality(V)) <= 2e-6 and kappa(S) <= 1.1 * (1 + 5e-6)


def test_drift_is_corrected(backend):
    """Factors that are orthonormal to 1e-5 only come out orthonormal to rounding."""
    params, grads, buffers = network(torch.float32, SHAPES[:3])
    for X in params[0::4] + params[2::4]:
        X += 1e-5 * torch.randn_like(X) / len(X) ** 0.5
    run(params, [0 * g for g in grads], [0 * b for b in buffers], hyper_table(3))
    assert max(non_orthonormality(X) for X in params[0::4] + params[2::4]) <= 2e-6


@pytest.mark.parametrize("role", [0, 2])
def test_a_factor_that_is_not_orthonormal_is_left_alone_and_marked(backend, role):
    params, grads, buffers = network(torch.float32, SHAPES[:3])
    params[4 + role] *= 1.001
    before = [p.clone() for p in params]
    skipped = run(params, grads, buffers, hyper_table(3))
    assert skipped.tolist() == [0, reference.NOT_ORTHONORMAL, 0]
    assert [torch.equal(p, q) for p, q in zip(params, before, strict=True)] == [False] * 4 + [True] * 4 + [False] * 4
    grads[5][0, 0] = math.inf
    assert run(params, grads, buffers, hyper_table(3)).tolist() == [0, 1, 0]
    grads[5][0, 0] = 0
    params[4 + role][-1, -1] = math.inf
    assert run(params, grads, buffers, hyper_table(3)).tolist() == [0, 1, 0]


@pytest.mark.parametrize("band", range(3))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_step_that_moves_nothing_is_the_identity(backend, band, dtype):
    params, grads, buffers = network(dtype, SHAPES[:4])
    run(params, grads, buffers, hyper_table(4, band=band))
    for lr, scale in ((0.0, 1.0), (0.05, 0.0)):
        before = [p.clone() for p in params]
        run(params, [scale * g for g in grads], [0 * b for b in buffers], hyper_table(4, band=band, lr=lr))
        assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    run(params, grads, buffers, hyper_table(4, band=band, lr=0.0, tau=0.01))  # another bound does something
    assert max(kappa(S) for S in params[1::4]) <= 1.01 * (1 + 5e-6)


def test_missing_gradients_leave_their_role_alone(backend):
    for present in range(16):
        params, grads, buffers = network(torch.float64, SHAPES[:2])
        before = [p.clone() for p in params]
        before_buffers = [b.clone() for b in buffers]
        grads = [g if present >> (i % 4) & 1 else g.new_empty(0) for i, g in enumerate(grads)]
        assert not run(params, grads, buffers, hyper_table(2)).any()
        for i, (p, q, b, c) in enumerate(zip(params, before, buffers, before_buffers, strict=True)):
            moved = bool(present >> (i % 4) & 1)
            assert torch.equal(p, q) != moved and torch.equal(b, c) != moved


def test_no_momentum_needs_no_buffers(backend):
    params, grads, _ = network(torch.float64, SHAPES[:2])
    empty = [p.new_empty(0) for p in params]
    expected = [
        numpy_step(params[i : i + 4], grads[i : i + 4], [0 * g for g in grads[i : i + 4]], dict(momentum=0))
        for i in (0, 4)
    ]
    run(params, grads, empty, hyper_table(2, momentum=0.0))
    for got, want in zip(params, expected[0][:4] + expected[1][:4], strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("role", range(4))
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_gradient_leaves_that_layer_untouched(backend, role, value):
    params, grads, buffers = network(torch.float32, SHAPES[:3])
    grads[4 + role].view(-1)[-1] = value
    before, before_buffers = [p.clone() for p in params], [b.clone() for b in buffers]
    assert run(params, grads, buffers, hyper_table(3)).tolist() == [0, 1, 0]
    for i in range(12):
        untouched = 4 <= i < 8
        assert torch.equal(params[i], before[i]) == untouched
        assert torch.equal(buffers[i], before_buffers[i]) == untouched


@pytest.mark.parametrize("why", ["zero core", "zero trial", "overflow"])
def test_layers_that_cannot_move_are_counted(backend, why):
    params, grads, buffers = network(torch.float32, SHAPES[:3])
    if why == "zero core":
        params[5].zero_()
    elif why == "zero trial":  # S - lr G = 0
        grads[5] = 2 * params[5]
    else:
        grads[4].fill_(3e38)
    hyper = hyper_table(3, fresh=1, lr=0.5)
    before = [p.clone() for p in params]
    assert run(params, grads, buffers, hyper).tolist() == [0, 1, 0]
    assert all(torch.equal(p, q) for p, q in zip(params[4:8], before[4:8], strict=True))
    assert not torch.equal(params[0], before[0])


def test_a_zero_core_moves_without_its_preconditioner(backend):
    params, grads, buffers = network(torch.float32, SHAPES[:2])
    params[1].zero_()
    before = [p.clone() for p in params]
    assert not run(params, grads, buffers, hyper_table(2, precondition=0)).any()
    assert not any(torch.equal(p, q) for p, q in zip(params, before, strict=True))


@pytest.mark.parametrize("smallest", [0.0, 1e-12])
def test_a_singular_core_is_lifted(backend, smallest):
    """The preconditioner takes the core as it is on the constraint set."""
    params, grads, buffers = network(torch.float64, SHAPES[:3])
    params[5] = with_spectrum(torch.tensor([2.0, 1.5, 1.2, 1.1, 1.0, 0.5, smallest], dtype=torch.float64), 7, 7)
    lifted = linalg.clip_spectrum(params[5], 0.1)
    expected = numpy_step([params[4], lifted, *params[6:8]], grads[4:8], buffers[4:8], {})
    assert not run(params, grads, buffers, hyper_table(3)).any()
    if smallest == 0:
        for got, want in ((params[4], expected[0]), (params[6], expected[2])):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    assert max(non_orthonormality(params[4]), non_orthonormality(params[6])) < 1e-12 and kappa(params[5]) < 1.1 + 1e-12


def test_mixed_dtypes_and_layers_without_bias(backend):
    a, b = network(torch.float32, SHAPES[:1]), network(torch.float64, SHAPES[1:3], bias=False)
    params, grads, buffers = ([*x, *y] for x, y in zip(a, b, strict=True))
    assert not run(params, grads, buffers, hyper_table(3)).any()
    assert all(non_orthonormality(X) < 1e-6 for X in params[0::4])


def test_no_layers(backend):
    assert run([], [], [], hyper_table(0)).shape == (0,)


def test_threads_do_not_change_the_result():
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            torch.manual_seed(1)
            params, grads, buffers = network(torch.float32)
            with condlr_ext.backend("cpu"):
                run(params, grads, buffers, hyper_table(len(SHAPES)))
            results.append(params + buffers)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_wrong_arguments_are_named_and_nothing_is_written():
    params, grads, buffers = network(torch.float32, SHAPES[:2])
    before = [p.clone() for p in params]
    for broken, text in (
        ((params[:7], grads, buffers, hyper_table(2)), "4 tensors for each of the 2 layers"),
        (
            (params, [*grads[:7], grads[7].double()], buffers, hyper_table(2)),
            "layer 1: grads of bias must be float32",
        ),
        ((params, [*grads[:6], grads[6][:2], grads[7]], buffers, hyper_table(2)), "layer 1: grads of V must have"),
        (
            (params, grads, [*buffers[:4], buffers[0]] + buffers[5:], hyper_table(2)),
            "layer 1: momentum_buffers of U must have",
        ),
        ((params, grads, buffers, hyper_table(2, tau=-1.0)), "tau must be >= 0"),
        (
            (
                [*params[:7], torch.zeros(40, 1)],
                [*grads[:7], torch.zeros(40, 1)],
                [*buffers[:7], torch.zeros(40, 1)],
                hyper_table(2),
            ),
            r"layer 1: bias must be a vector",
        ),
    ):
        with pytest.raises(RuntimeError, match=text):
            ops.step.step.dispatched(*broken, torch.zeros(2, dtype=torch.int64))
        assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


@pytest.mark.skipif(bool(ops.COMPILED.ops_reason), reason="the sums of the reference path are LAPACK's")
@pytest.mark.parametrize("length", [1e-3, 0.3, 10.0, 1e4])
def test_sums_of_equal_terms_are_not_biased(length):
    """Entries of U are ±1/√m, those of the gradient ±1, whose sums in float32 all round in one direction."""
    m, rows = 4096, torch.arange(4096)
    U = torch.stack([1 - 2 * (rows >> k & 1) for k in range(2)], 1) / m**0.5
    params = [U, torch.eye(2), torch.linalg.qr(torch.randn(20, 2))[0].contiguous(), torch.empty(0)]
    grads = [torch.randn(m, 2).sign(), torch.zeros(2, 2), torch.zeros(20, 2), torch.empty(0)]
    hyper, skipped = (
        hyper_table(1, lr=length / m**0.5, momentum=0.0, weight_decay=0.0),
        torch.zeros(1, dtype=torch.int64),
    )
    for _ in range(3):
        ops.step.step.run("cpu", params, grads, [torch.empty(0)] * 4, hyper, skipped)
    assert not skipped.any() and non_orthonormality(params[0]) <= 1e-6
