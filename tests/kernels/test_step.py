"""The Triton step of a whole network in Triton's interpreter: against the reference step, invariants, skipped layers."""

import ast
import inspect
import math
import textwrap

import pytest
import torch
from helpers.kernels import ON_CPU, run_on_cpu
from helpers.matrices import (
    SPECTRA,
    backward_error,
    kappa,
    non_orthonormality,
    orthonormal,
    singular_values,
    with_spectrum,
)
from helpers.op_arguments import hyper_table

from condlr_ext import ops, reference
from condlr_ext.kernels.triton.devices import INTERPRETED
from condlr_ext.reference import BANDS, HYPER

pytestmark = ON_CPU
if run_on_cpu():
    from triton.runtime.interpreter import InterpretedFunction

    from condlr_ext.kernels.triton.qr import cholesky_qr
    from condlr_ext.kernels.triton.runtime import launching as launch
    from condlr_ext.kernels.triton.step import core_clip
    from condlr_ext.kernels.triton.step import launch as step

# linear layers and convolutions (n = channels * 3 * 3), of ranks 1 to 17
SHAPES = [(12, 20, 3), (9, 18, 9), (16, 36, 5), (6, 1, 1), (40, 18, 17)]


def network(dtype, shapes=SHAPES):
    params = []
    for m, n, r in shapes:
        S = with_spectrum(1 + 0.1 * SPECTRA["random"](r), r, r)
        params += [orthonormal(m, r), S, orthonormal(n, r), torch.randn(m, dtype=torch.float64)]
    params = [p.to(dtype).contiguous() for p in params]
    return params, like(params), like(params)


def like(params):
    return [torch.randn_like(p) for p in params]


def copies(tensors, dtype=None):
    return [t.to(dtype or t.dtype).clone() for t in tensors]


def run(params, grads, buffers, hyper):
    skipped = torch.zeros(len(hyper), dtype=torch.int64)
    step.StepPlan(params, grads).run(params, grads, buffers, hyper, skipped)
    return skipped


def reference_step(params, grads, buffers, hyper):
    skipped = torch.zeros(len(hyper), dtype=torch.int64)
    reference.step(params, grads, buffers, hyper, skipped)
    return skipped


def clip_in_float32(A, tau, band, sigma_max):
    """The reference's own is computed in float64."""
    U, sigma, Vh = torch.linalg.svd(A)
    lo, hi = reference.clip_edges(sigma, tau, band, sigma_max)
    return (U * sigma.clamp(lo.unsqueeze(-1), hi.unsqueeze(-1)).unsqueeze(-2)) @ Vh


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.slow)], ids=str)
def test_steps_of_training(dtype, monkeypatch):
    """With momentum that starts, weight decay and other gradients at every step."""
    params, _, buffers = network(dtype)
    exact, plain = ((copies(params, d), copies(buffers, d)) for d in (torch.float64, dtype))
    hyper = hyper_table(len(SHAPES), momentum=0.9, weight_decay=1e-3, fresh=1)
    skipped = torch.zeros(len(SHAPES), dtype=torch.int64)
    ours = step.StepPlan(params, params)
    for i in range(4):
        hyper[..., HYPER.index("fresh")] = i == 0
        grads = like(params)
        ours.run(params, grads, buffers, hyper, skipped)
        reference_step(exact[0], copies(grads, torch.float64), exact[1], hyper)
        with monkeypatch.context() as patch:
            if dtype == torch.float32:
                patch.setattr(reference, "clip_spectrum", clip_in_float32)
            reference_step(plain[0], grads, plain[1], hyper)
    assert not skipped.any()
    for role in range(4):
        for got, theirs, truth in ((params, plain[0], exact[0]), (buffers, plain[1], exact[1])):
            error, allowed = (
                math.sqrt(sum((a - b).pow(2).sum() for a, b in zip(x[role::4], truth[role::4], strict=True)))
                for x in (got, theirs)
            )
            assert error <= (2 * allowed if dtype == torch.float32 else 1e-12)
    for U, S, V, _ in zip(*[iter(params)] * 4, strict=True):
        assert kappa(S) <= 1.1 * (1 + (5e-6 if dtype == torch.float32 else 1e-12))
        assert max(non_orthonormality(U), non_orthonormality(V)) <= (1e-6 if dtype == torch.float32 else 1e-13)


OPTIONS = [
    dict(fresh=1),
    dict(nesterov=1, momentum=0.9),
    dict(dampening=0.5, weight_decay=0.1),
    dict(maximize=1, weight_decay=0.01),
    dict(tau=0.0),
    dict(tau=math.inf),
    dict(tau=math.inf, sigma_max=0.7),
    dict(sigma_max=0.9),
    dict(band=1),
    dict(band=2),
    dict(lr=30.0),  # too long for one pass in float64
    dict(precondition=0),
]


@pytest.mark.ptx
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_float64_is_the_reference(options):
    shapes = SHAPES[:4]
    params, grads, buffers = network(torch.float64, shapes)
    expected, expected_buffers = copies(params), copies(buffers)
    hyper = hyper_table(len(shapes), **options)
    assert not run(params, grads, buffers, hyper).any()
    assert not reference_step(expected, grads, expected_buffers, hyper).any()
    for got, want in zip(params + buffers, expected + expected_buffers, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12 if hyper[0, 0, 0] < 1 else 1e-10)


def test_options_differ_between_layers():
    params, grads, buffers = network(torch.float64, SHAPES[:3])
    expected, expected_buffers = copies(params), copies(buffers)
    hyper = torch.cat(
        [hyper_table(1, lr=0.1 * i, tau=0.2 * i, band=i, momentum=0.3 * i, sigma_max=2.0 - i / 2) for i in range(3)]
    )
    assert not run(params, grads, buffers, hyper).any()
    reference_step(expected, grads, expected_buffers, hyper)
    for got, want in zip(params + buffers, expected + expected_buffers, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.ptx
@pytest.mark.parametrize("size", [1e2, 1e6, 1e10])
def test_huge_steps_stay_orthonormal(size):
    """One pass of Cholesky-QR does up to 1e3 or so, Householder's reflections the rest."""
    params, grads, buffers = network(torch.float32, SHAPES[:3])
    hyper = hyper_table(3, lr=size)
    exact, exact_buffers = copies(params, torch.float64), copies(buffers, torch.float64)
    reference_step(exact, copies(grads, torch.float64), exact_buffers, hyper)
    ours, skipped = step.StepPlan(params, grads), torch.zeros(3, dtype=torch.int64)
    ours.run(params, grads, buffers, hyper, skipped)
    assert not skipped.any()
    rescued = (ours._state == cholesky_qr.RESCUE.value).tolist()
    assert any(rescued) == (size > 1e3)
    torch.testing.assert_close(params[0].double(), exact[0], rtol=0, atol=1e-5)
    for U, S, V, _ in zip(*[iter(params)] * 4, strict=True):
        assert max(non_orthonormality(U), non_orthonormality(V)) <= 1e-6 and kappa(S) <= 1.1 * (1 + 5e-6)


def test_drift_is_corrected():
    params, grads, buffers = network(torch.float32, SHAPES[:2])
    for X in params[0::4] + params[2::4]:
        X += 1e-5 * torch.randn_like(X) / len(X) ** 0.5
    assert not run(params, [0 * g for g in grads], [0 * b for b in buffers], hyper_table(2)).any()
    assert max(non_orthonormality(X) for X in params[0::4] + params[2::4]) <= 1e-6


@pytest.mark.parametrize("role, size, poisoned", [(0, 1e-3, 0), (2, 1e30, 1)])
def test_a_factor_that_is_not_orthonormal_is_left_alone_and_marked(role, size, poisoned):
    """By the last of its entries, rows and splits; NaN counts for more, and a later step finds no trace of that."""
    shapes = [(260, 30, 25) if role == 0 else (30, 260, 25), SHAPES[3]]
    params, grads, buffers = network(torch.float32, shapes)
    whole = params[role].clone()
    params[role][-1, -1] += size
    before = copies(params + buffers)
    hyper, skipped = hyper_table(2), torch.tensor([5, 0])
    ours = step.StepPlan(params, grads)
    ours.run(params, grads, buffers, hyper, skipped)
    assert skipped.tolist() == [reference.NOT_ORTHONORMAL + 5, 0]
    same = [torch.equal(p, q) for p, q in zip(params + buffers, before, strict=True)]
    assert same[:4] == same[8:12] == [True] * 4 and not any(same[i] for i in (5, 7, 13, 15))  # U = V = 1 stay
    assert reference_step(params[:4], grads[:4], buffers[:4], hyper[:1]).tolist() == [reference.NOT_ORTHONORMAL]
    grads[poisoned][0, 0] = math.nan
    ours.run(params, grads, buffers, hyper, skipped.zero_())
    assert skipped.tolist() == [1, 0]
    grads[poisoned][0, 0] = 0
    params[role].copy_(whole)
    ours.run(params, grads, buffers, hyper, skipped.zero_())
    assert not skipped.any()


def test_dependent_columns_are_marked_and_infinite_factors_counted():
    params, grads, buffers = network(torch.float64, SHAPES[:2])
    params[4][:, 1] = params[4][:, 0]
    params[0][-1, -1] = math.inf
    assert run(params, grads, buffers, hyper_table(2)).tolist() == [1, reference.NOT_ORTHONORMAL]
    params[0].copy_(orthonormal(*params[0].shape))
    grads[4] = grads[4].new_empty(0)  # one without a gradient is not looked at
    assert run(params, grads, buffers, hyper_table(2)).tolist() == [0, 0]


@pytest.mark.parametrize(
    "dtype, band", [(torch.float32, 0), (torch.float32, 1), (torch.float32, 2), (torch.float64, 0)], ids=str
)
def test_a_step_that_moves_nothing_is_the_identity(dtype, band):
    params, grads, buffers = network(dtype, SHAPES[2:4])
    ours, skipped = step.StepPlan(params, grads), torch.zeros(2, dtype=torch.int64)
    ours.run(params, grads, buffers, hyper_table(2, band=band), skipped)
    before = copies(params)
    for lr, scale, sigma_max in ((0.0, 1.0, math.inf), (0.05, 0.0, singular_values(params[1])[0].item())):
        hyper = hyper_table(2, band=band, lr=lr, sigma_max=sigma_max)
        ours.run(params, [scale * g for g in grads], [scale * b for b in buffers], hyper, skipped)
        assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    ours.run(params, grads, buffers, hyper_table(2, band=band, lr=0.0, tau=0.01, sigma_max=0.5), skipped)
    assert kappa(params[1]) <= 1.01 * (1 + 5e-6) and singular_values(params[1])[0] <= 0.5 * (1 + 2e-6)
    assert all(torch.equal(p, q) == (i % 4 != 1) for i, (p, q) in enumerate(zip(params, before, strict=True)))
    ours.run(params, grads, buffers, hyper_table(2, band=band), skipped)
    assert not any(torch.equal(p, q) for p, q in zip(params[:4], before[:4], strict=True)) and not skipped.any()


def test_a_core_above_rank_64_that_does_not_move_stays():
    core = torch.diag(torch.linspace(1, 1.0999, 66))
    before, info = core.clone(), torch.full((1,), -1, dtype=torch.int32)
    assert not torch.equal(reference.clip_spectrum(core, 0.1), core)
    core_clip.CoreClip([core], [0])(hyper_table(1, tau=0.1), torch.zeros_like(info), info)
    assert info == 0 and torch.equal(core, before)


@pytest.mark.ptx
@pytest.mark.parametrize("role", range(4))
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_gradient_leaves_that_layer_untouched(role, value):
    params, grads, buffers = network(torch.float32, SHAPES[:3])
    grads[4 + role].view(-1)[-1] = value
    before, before_buffers = copies(params), copies(buffers)
    hyper, skipped = hyper_table(3), torch.tensor([0, 5, 0])
    step.StepPlan(params, grads).run(params, grads, buffers, hyper, skipped)
    assert skipped.tolist() == [0, 6, 0]
    for i in range(12):
        untouched = 4 <= i < 8
        assert torch.equal(params[i], before[i]) == untouched
        assert torch.equal(buffers[i], before_buffers[i]) == untouched


@pytest.mark.ptx
@pytest.mark.parametrize("why", ["zero core", "zero trial", "overflow", "overflow in a buffer"])
def test_layers_that_cannot_move_are_counted(why):
    params, grads, buffers = network(torch.float32, SHAPES[:3])
    if why == "zero core":
        params[5].zero_()
    elif why == "zero trial":  # S - lr G = 0
        grads[5] = 2 * params[5]
    elif why == "overflow":
        grads[4].fill_(3e38)
    else:
        grads[7].fill_(3e38)
    hyper = hyper_table(
        3, lr=0.5, **(dict(fresh=1) if why != "overflow in a buffer" else dict(momentum=0.9, maximize=1))
    )
    buffers[7].fill_(-3e38)
    before = copies(params)
    assert run(params, grads, buffers, hyper).tolist() == [0, 1, 0]
    assert all(torch.equal(p, q) for p, q in zip(params[4:8], before[4:8], strict=True))
    assert not torch.equal(params[0], before[0])


def test_a_zero_core_moves_without_its_preconditioner():
    params, grads, buffers = network(torch.float32, SHAPES[:2])
    params[1].zero_()
    before = copies(params)
    assert not run(params, grads, buffers, hyper_table(2, precondition=0)).any()
    assert not any(torch.equal(p, q) for p, q in zip(params, before, strict=True))


@pytest.mark.parametrize("smallest", [0.0, 1e-9])
@pytest.mark.parametrize("tau", [0.1, math.inf])
def test_a_singular_core_does_no_harm(smallest, tau):
    """The factors move, on the Stiefel manifold, and a bounded core is lifted."""
    params, grads, buffers = network(torch.float64, SHAPES[:2])
    params[1] = with_spectrum(torch.tensor([2.0, 1.0, smallest], dtype=torch.float64), 3, 3)
    before = copies(params)
    assert not run(params, grads, buffers, hyper_table(2, tau=tau)).any()
    assert max(non_orthonormality(params[0]), non_orthonormality(params[2])) < 1e-12
    assert math.isinf(tau) or kappa(params[1]) < 1.1 * (1 + 1e-12)
    assert not any(torch.equal(p, q) for p, q in zip(params, before, strict=True))


@pytest.mark.ptx
@pytest.mark.parametrize("present", [0b0000, 0b0001, 0b0010, 0b0100, 0b1000, 0b1011, 0b1101])
def test_missing_gradients_leave_their_role_alone(present):
    params, grads, buffers = network(torch.float64, SHAPES[:2])
    params[7] = grads[7] = buffers[7] = params[7].new_empty(0)  # and a layer without bias
    grads = [g if present >> (i % 4) & 1 else g.new_empty(0) for i, g in enumerate(grads)]
    expected, expected_buffers, before = copies(params), copies(buffers), copies(params + buffers)
    hyper = hyper_table(2)
    assert not run(params, grads, buffers, hyper).any()
    reference_step(expected, grads, expected_buffers, hyper)
    for i, (got, want, old) in enumerate(zip(params + buffers, expected + expected_buffers, before, strict=True)):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
        assert torch.equal(got, old) == (not present >> (i % 4) & 1 or got.numel() == 0)


def test_no_momentum_needs_no_buffers():
    params, grads, _ = network(torch.float64, SHAPES[:2])
    expected, empty = copies(params), [p.new_empty(0) for p in params]
    hyper = hyper_table(2, momentum=0.0)
    assert not run(params, grads, empty, hyper).any()
    reference_step(expected, grads, empty, hyper)
    for got, want in zip(params, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.ptx
def test_a_plan_follows_its_tensors():
    """Gradients, then everything, somewhere else in memory; and equal input gives equal bits."""
    params, grads, buffers = network(torch.float32, SHAPES[:2])
    hyper, skipped = hyper_table(2), torch.zeros(2, dtype=torch.int64)
    ours = step.StepPlan(params, grads)
    one, other = (params, buffers), (copies(params), copies(buffers))
    for _ in range(2):
        grads = like(params)
        ours.run(one[0], grads, one[1], hyper, skipped)
        moved = copies(grads)
        ours.run(other[0], moved, other[1], hyper, skipped)
        assert all(torch.equal(a, b) for a, b in zip(one[0] + one[1], other[0] + other[1], strict=True))
        del grads, moved


@pytest.mark.ptx
def test_a_captured_run_has_a_table_of_its_own(monkeypatch):
    """Complete, whatever the plan's says, and the plan's stays for steps beside the graph."""
    params, grads, buffers = network(torch.float32, SHAPES[:1])
    hyper, skipped = hyper_table(1), torch.zeros(1, dtype=torch.int64)
    ours, written, write = step.StepPlan(params, grads), [], step.write_pointer_table
    twin, twin_buffers = copies(params), copies(buffers)
    ours.run(params, grads, buffers, hyper, skipped)
    known = ours._pointer_table.clone()
    monkeypatch.setattr(step, "capturing", lambda device: True)
    monkeypatch.setattr(
        step,
        "write_pointer_table",
        lambda pointer_table, values: written.append(pointer_table) or write(pointer_table, values),
    )
    ours.run(params, copies(grads), buffers, hyper, skipped)
    assert ours.captured and len(written) == 1 and torch.equal(ours._pointer_table, known)
    monkeypatch.undo()
    other = step.StepPlan(twin, grads)
    for _ in range(2):
        other.run(twin, grads, twin_buffers, hyper, skipped)
    assert not other.captured
    assert all(torch.equal(a, b) for a, b in zip(params + buffers, twin + twin_buffers, strict=True))


def test_plans_that_graphs_use_are_kept(monkeypatch):
    params, grads, buffers = network(torch.float32, SHAPES[:1])
    hyper, skipped = hyper_table(1), torch.zeros(1, dtype=torch.int64)
    monkeypatch.setattr(step, "capturing", lambda device: True)
    step.step(params, grads, buffers, hyper, skipped)
    monkeypatch.undo()
    plan = step._plans[params[0]]
    for missing in (0, 2):
        step.step(params, [g if i != missing else g[:0] for i, g in enumerate(grads)], buffers, hyper, skipped)
    assert step._captured[params[0]] == [plan]


def test_hyperparameters_are_read_at_every_step():
    params, grads, buffers = network(torch.float64, SHAPES[:1])
    hyper, skipped = hyper_table(1), torch.zeros(1, dtype=torch.int64)
    ours = step.StepPlan(params, grads)
    ours.run(params, grads, buffers, hyper, skipped)
    before = copies(params)
    hyper[..., HYPER.index("lr")] = 0
    hyper[..., HYPER.index("tau")] = math.inf
    ours.run(params, grads, buffers, hyper, skipped)
    for p, q in zip(params, before, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-14)


@pytest.mark.skipif(not INTERPRETED, reason="counts launches of the interpreter")
@pytest.mark.parametrize("above_64", [[], [(70, 66, 65), (80, 70, 66)]], ids=len)
def test_eight_launches(above_64, monkeypatch):
    """Whatever the number of layers, and also where gradients have moved; ranks above 64 have their own two clips."""
    shapes = [*SHAPES, *above_64]
    params, grads, buffers = network(torch.float32, shapes)
    hyper, skipped = hyper_table(len(shapes)), torch.zeros(len(shapes), dtype=torch.int64)
    ours = step.StepPlan(params, grads)
    launched = []
    monkeypatch.setattr(InterpretedFunction, "run", lambda kernel, *args, grid, **options: launched.append(kernel))
    counts = []
    for given in (grads, grads, like(params)):
        launched.clear()
        ours.run(params, given, buffers, hyper, skipped)
        counts.append(len(launched))
    assert counts == [10 if above_64 else 8] * 3


TAUS = (0.0, 0.5, 1e4)  # each with a band of its own; the other pairs are slow


@pytest.mark.parametrize(
    "tau, band",
    [pytest.param(t, b, marks=[pytest.mark.slow] * (i != b)) for i, t in enumerate(TAUS) for b in range(3)],
)
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.slow)], ids=str)
def test_clip_of_all_spectra(tau, band, dtype):
    """All cores of a network at once, in place, against the reference's; the bound is hard."""
    kinds = [kind for kind in SPECTRA if kind != "zero"]
    ranks = [1, 17, 5, 9, 2, 7]
    storage = torch.cat([with_spectrum(SPECTRA[kind](r), r, r).flatten() for kind, r in zip(kinds, ranks, strict=True)])
    together = storage.to(dtype)
    cores = [c.view(r, r) for c, r in zip(together.split([r * r for r in ranks]), ranks, strict=True)]
    before = copies(cores)
    info = torch.full((6,), -1, dtype=torch.int32)
    core_clip.CoreClip(cores, range(6))(hyper_table(6, tau=tau, band=band), torch.ones_like(info), info)
    assert (info == 0).all()
    for kind, out, A in zip(kinds, cores, before, strict=True):
        sigma = singular_values(A)  # directions of equal ones, also of zero, are anyone's choice
        lo, hi = reference.clip_edges(sigma, tau, BANDS[band])
        atol = backward_error(dtype, len(A)) * sigma[0].item()
        torch.testing.assert_close(singular_values(out), sigma.clamp(lo, hi), rtol=0, atol=atol)
        if kind == "graded":  # each direction is its own, though float32 could not tell the last from any other
            want = reference.clip_spectrum(A.double(), tau, BANDS[band])
            torch.testing.assert_close(out.double(), want, rtol=0, atol=1e-5 * sigma[0].item())
        moved = torch.linalg.norm(out.double() - A.double())
        assert moved <= torch.linalg.norm(sigma.clamp(lo, hi) - sigma) + len(A) * atol
        assert kappa(out) <= (1 + tau) * (1 + (5e-6 if dtype == torch.float32 else 1e-12 * (1 + tau)))


def test_clip_of_cores_above_rank_64():
    """Those of one rank go together, each with the constraint of its layer."""
    storage = torch.zeros(3 * 66 * 66 + 2 * 40)
    cores = [storage.as_strided((r, r), (r, 1), at) for r, at in ((66, 0), (5, 4356), (66, 4436), (65, 8792))]
    for core in cores:
        core.copy_(with_spectrum(torch.linspace(1, 1.4, len(core), dtype=torch.float64), *core.shape))
    before = copies(cores, torch.float64)
    hyper, info = hyper_table(6, tau=0.1), torch.full((6,), -1, dtype=torch.int32)
    hyper[4, :, HYPER.index("tau")] = 0.2
    core_clip.CoreClip(cores, [0, 1, 4, 5])(hyper, torch.ones_like(info), info)
    assert info.tolist() == [0, 0, -1, -1, 0, 0]
    for core, A, tau in zip(cores, before, (0.1, 0.1, 0.2, 0.1), strict=True):
        torch.testing.assert_close(core.double(), reference.clip_spectrum(A, tau, "rms"), rtol=0, atol=2e-6)
        assert kappa(core) <= (1 + tau) * (1 + 5e-6)


@pytest.mark.parametrize("scale", [1e2, 1e8, 1e20])
def test_a_huge_gradient_breaks_neither_bound_nor_cap(scale):
    params, grads, buffers = network(torch.float32)
    for dS in grads[1::4]:
        dS.mul_(scale)
    assert not run(params, grads, buffers, hyper_table(len(SHAPES), sigma_max=1.5)).any()
    for S in params[1::4]:
        assert singular_values(S)[0] <= 1.5 * (1 + 2e-6) and kappa(S) <= 1.1 * (1 + 5e-6)


def test_reasons_not():
    params, grads, buffers = network(torch.float32, SHAPES[:1])
    hyper, skipped = hyper_table(1), torch.zeros(1, dtype=torch.int64)
    op = ops.step.step
    assert op.unsupported_reasons("triton", params, grads, buffers, hyper, skipped) == []
    for broken, text in (
        ([params[0].double(), *params[1:]], "torch.float32, torch.float64, the kernels"),
        ([params[0].T.contiguous().T, *params[1:]], "not contiguous"),
        ([torch.empty(600, 513), *params[1:]], "rank 513 exceeds 512"),
    ):
        (reason,) = op.unsupported_reasons("triton", broken, grads, buffers, hyper, skipped)
        assert text in reason


def test_the_host_does_not_wait():
    """A table is made only where a plan is; what runs at every step has no call that reads from the device."""
    waiting = {"item", "tolist", "cpu", "numpy", "nonzero", "bool", "equal", "synchronize", "tensor", "table", "to"}
    for function in (
        step.StepPlan.run,
        step.StepPlan._launch,
        step._over,
        core_clip.CoreClip.__call__,
        launch.launch,
        launch.addresses,
        launch.offsets,
        launch.write_pointer_table,
    ):
        source = inspect.getsource(function)
        calls = (n for n in ast.walk(ast.parse(textwrap.dedent(source))) if isinstance(n, ast.Call))
        names = {c.func.attr if isinstance(c.func, ast.Attribute) else getattr(c.func, "id", "") for c in calls}
        assert not names & waiting, function
