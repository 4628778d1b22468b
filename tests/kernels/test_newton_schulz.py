"""polar and clip_spectrum by matrix products, and the checks of their results, in Triton's interpreter."""

import math

import numpy as np
import pytest
import torch
from helpers.kernels import ON_CPU, WELL_CONDITIONED, batch_of, run_on_cpu, with_orthogonal_columns
from helpers.matrices import kappa, non_orthonormality, singular_values, with_spectrum

from condlr_ext import reference
from condlr_ext.kernels.status import ALL_ZERO, NOT_FINITE, OK
from condlr_ext.kernels.triton.devices import INTERPRETED

pytestmark = ON_CPU
if run_on_cpu():
    import triton
    import triton.language as tl

    from condlr_ext.kernels.triton.spectral import bound, newton_schulz, product
    from condlr_ext.kernels.triton.spectral import launch as spectral

    @triton.jit
    def is_within(A_ptr, interval_ptr, workspace_ptr, within_ptr, n, WIDE_TILE: tl.constexpr, BLOCK: tl.constexpr):
        p, q = tl.load(interval_ptr), tl.load(interval_ptr + 1)
        other_ptr = workspace_ptr + n * n
        within = newton_schulz.is_within(
            A_ptr, n, n, p, q, workspace_ptr, other_ptr, 0, 1, within_ptr, WIDE_TILE, 128, BLOCK
        )
        tl.store(within_ptr, tl.where(within, 1, 0))

    @triton.jit
    def record_steps(out_ptr, least):
        least = tl.cast(least, tl.float64)
        while least < 1 - 2e-4:
            a, b, least = newton_schulz.step(least)
            tl.store(out_ptr, a)
            tl.store(out_ptr + 1, b)
            out_ptr += 2


INF = math.inf
LARGER = [(65, 65), *(pytest.param(*shape, marks=pytest.mark.slow) for shape in ((70, 100), (120, 96), (128, 128)))]


@pytest.mark.parametrize("m,n", LARGER)
def test_polar(m, n, monkeypatch):
    monkeypatch.setattr(spectral, "_svd", None)  # asked for nothing
    A = batch_of(WELL_CONDITIONED.values(), m, n)
    tall = A if m >= n else A.mT
    Q = torch.full_like(tall, math.nan)
    assert newton_schulz.polar_factor(tall, Q).tolist() == [0] * len(A)
    exact = reference.polar(tall.double())
    theirs = torch.from_numpy(np.stack([u @ v for u, _, v in (np.linalg.svd(a, full_matrices=False) for a in tall)]))
    for q, a, e, t in zip(Q, tall, exact, theirs, strict=True):
        assert non_orthonormality(q) <= 2 * non_orthonormality(t)
        assert (q - e).norm() <= (t - e).norm()  # sums are in float64
        H = q.mT.double() @ a.double()
        assert torch.linalg.eigvalsh((H + H.mT) / 2).min() > 0


@pytest.mark.parametrize("tau,band,sigma_max", [(0.1, 0, INF), (0.0, 1, INF), (1.0, 0, 0.25), (INF, 1, 0.9)])
@pytest.mark.parametrize("m,n", LARGER)
def test_clip_spectrum(m, n, tau, band, sigma_max):
    A = batch_of(WELL_CONDITIONED.values(), m, n)
    constraint = torch.tensor([[tau, band, sigma_max]], dtype=torch.float64)
    out = torch.full_like(A, math.nan)
    tall, into = (A, out) if m >= n else (A.mT, out.mT)
    active_mask = newton_schulz.clip_spectrum(tall, constraint, torch.zeros(len(A), dtype=torch.int32), into)
    assert active_mask.tolist() == [0] * len(A)
    for kind, a, o in zip(WELL_CONDITIONED, A, out, strict=True):
        exact = reference.clip_spectrum(a.double(), tau, reference.BANDS[band], sigma_max)
        # rounding is relative to what is left or was taken away, of an outlier to its singular value
        scale = 2.5 * exact.norm() if kind == "outlier" else max(a.norm(), exact.norm())
        assert (o - exact).norm() <= 4e-7 * scale, kind
        assert kappa(o) <= (1 + tau) * (1 + 5e-6) and singular_values(o)[0] <= sigma_max * (1 + 5e-6)
        unchanged = kind == "equal" and sigma_max > 0.3 or kind == "in_band" and (tau, sigma_max) == (0.1, INF)
        assert torch.equal(o, a) == unchanged, kind


def test_products_serve_some_matrices_of_a_batch():
    k = 65
    well_conditioned = batch_of([WELL_CONDITIONED["kappa_10"], WELL_CONDITIONED["equal"]], k, k)
    A = torch.stack(
        (
            well_conditioned[0],
            with_orthogonal_columns(torch.logspace(0, -3, k)),
            torch.zeros(k, k),
            well_conditioned[1],
            torch.randn(k, k),
        )
    )
    A[4, 3, 60] = math.nan
    out, info = spectral.clip_spectrum(A, 0.1, 0, INF)
    assert info.tolist() == [OK, OK, ALL_ZERO, OK, NOT_FINITE]
    for a, o in zip(A[:2], out[:2], strict=True):
        exact = reference.clip_spectrum(a.double(), 0.1)
        assert (o - exact).norm() <= 4e-7 * exact.norm() and kappa(o) <= 1.1 * (1 + 5e-6)
    assert torch.equal(out[2:4], A[2:4])
    torch.testing.assert_close(out[4], A[4], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("others", ["non-finite", pytest.param("ill_conditioned", marks=pytest.mark.slow)])
def test_polar_of_a_batch_of_which_products_serve_some(others):
    k = 65
    well_conditioned = batch_of([WELL_CONDITIONED["kappa_10"]], k, k)[0]
    A = torch.stack(
        (
            torch.full((k, k), INF),
            well_conditioned,
            well_conditioned * 1e-20 if others == "ill_conditioned" else well_conditioned,
        )
    )
    if others == "ill_conditioned":
        A[0] = with_orthogonal_columns(torch.logspace(0, -3, k))
    Q, info = spectral.polar(A)
    assert info.tolist() == [OK if others == "ill_conditioned" else NOT_FINITE, OK, OK]
    assert (Q[1] - Q[2]).abs().max() <= 1e-6
    for q, a in zip(Q, A, strict=True):
        if a.isfinite().all():
            H = q.mT.double() @ (a.double() / a.abs().max())
            assert non_orthonormality(q) <= 2e-7 and torch.linalg.eigvalsh((H + H.mT) / 2).min() > -1e-7
        else:
            assert q.isnan().all()


def shifted(spectrum, k, at, by):
    sigma = spectrum(k)
    sigma[at] *= 1 + by
    return with_spectrum(sigma, k, k)


def good_and_bad(k, tau):
    """Matrices with kappa 1 + tau up to rounding, and such that exceed it; p and q of their band."""
    half = lambda k: torch.where(torch.arange(k) < (k + 1) // 2, 1 + tau, 1.0).double()  # noqa: E731
    good = [shifted(half, k, at, by) for at in (0, -1) for by in (0.0, 4e-7, -4e-7)]
    bad = [shifted(half, k, 0, 2.5e-6), shifted(half, k, 0, 1.0)]
    bad += [shifted(half, k, -1, by) for by in (-2.5e-6, -1.0)] if k > 1 else []
    bad += [torch.full((k, k), math.nan, dtype=torch.float64)]
    lo, hi = 1 - 1.5e-6, (1 + tau) * (1 + 1.5e-6)
    return good, bad, torch.tensor([2.0, -(hi * hi + lo * lo)], dtype=torch.float64) / (hi * hi - lo * lo)


@pytest.mark.ptx
@pytest.mark.parametrize("k", [1, 20, 64])
@pytest.mark.parametrize("tau", [0.0, 0.1, 4.0])
def test_check_tells_a_violated_bound_from_rounding(k, tau):
    good, bad, interval = good_and_bad(k, tau)
    A = torch.stack([*good, *bad, *bad])
    interval = interval.repeat(len(A), 1)
    interval[-len(bad) :] = 0  # not checked
    active_mask = torch.zeros(len(A), dtype=torch.int32)
    bound.check(A, interval, active_mask)
    assert active_mask.tolist() == [0] * len(good) + [1] * len(bad) + [0] * len(bad)


@pytest.mark.skipif(not INTERPRETED, reason="its tiles are those of the interpreter")
@pytest.mark.parametrize("k", [65, pytest.param(96, marks=pytest.mark.slow)])
@pytest.mark.parametrize("tau", [0.0, 0.1, 4.0])
def test_polynomials_tell_a_violated_bound_from_rounding(k, tau):
    def check(A, interval):
        within = torch.full((1,), -1)
        is_within[(1,)](A, interval, A.new_empty(2, k, k), within, k, WIDE_TILE=128, BLOCK=16384)
        return within.item()

    good, bad, interval = good_and_bad(k, tau)
    assert [check(A, interval) for A in good] == [1] * len(good)
    assert [check(A, interval) for A in bad] == [0] * len(bad)
    assert check(bad[0], torch.zeros_like(interval)) == 1  # not checked


def test_a_violated_bound_is_repaired(monkeypatch):
    A = batch_of([WELL_CONDITIONED["out_a_little"]], 20, 20)
    checks, check, multiply = [], bound.check, spectral.product

    def spoilt(X, Y, out, **options):
        """Move singular values nine tenths of the way, in float32."""
        if X.dtype == torch.float32 and "weight" in options:
            options["weight"] = options["weight"] * 0.9
        return multiply(X, Y, out, **options)

    def watched(out, interval, active_mask):
        check(out, interval, active_mask)
        checks.append((kappa(out[0]), active_mask.tolist()))

    monkeypatch.setattr(spectral, "product", spoilt)
    monkeypatch.setattr(bound, "check", watched)
    out, info = spectral.clip_spectrum(A, 0.05, 0, INF)
    ((spoilt_kappa, active_mask),) = checks
    assert spoilt_kappa > 1.05 * (1 + 5e-6) and active_mask == [1]
    exact = reference.clip_spectrum(A.double(), 0.05)
    assert info.tolist() == [OK] and kappa(out[0]) <= 1.05 * (1 + 5e-6) and (out - exact).norm() <= 1e-7 * exact.norm()


@pytest.mark.skipif(not INTERPRETED, reason="replaces a device function by one of Python")
def test_a_violated_bound_is_repaired_by_blocks(monkeypatch):
    A = with_orthogonal_columns(WELL_CONDITIONED["out_a_little"](66).float())[None]
    clip, outcomes = newton_schulz.clip_spectrum, []

    def watched(*args):
        outcomes.append(clip(*args).tolist())
        return torch.tensor(outcomes[-1], dtype=torch.int32)

    monkeypatch.setattr(newton_schulz, "clip_spectrum", watched)
    monkeypatch.setattr(newton_schulz, "SIGN", 0.1)  # steps that stop too early
    with monkeypatch.context() as unchecked:
        unchecked.setattr(newton_schulz, "is_within", lambda *args: True)
        spoilt, _ = spectral.clip_spectrum(A, 0.05, 0, INF)
    assert kappa(spoilt[0]) > 1.05 * (1 + 5e-6)
    out, info = spectral.clip_spectrum(A, 0.05, 0, INF)
    assert outcomes == [[0], [1]]
    exact = reference.clip_spectrum(A.double(), 0.05)
    assert info.tolist() == [OK] and kappa(out[0]) <= 1.05 * (1 + 5e-6) and (out - exact).norm() <= 1e-7 * exact.norm()


@pytest.mark.ptx
def test_steps_take_every_interval_to_one():
    for least in (newton_schulz.POLAR, newton_schulz.SIGN):
        steps = torch.zeros(40, 2, dtype=torch.float64)
        record_steps[(1,)](steps, least)
        steps = steps[steps[:, 0] > 0].tolist()
        x = torch.cat((torch.logspace(math.log10(least), 0, 10001, dtype=torch.float64).clamp_max(1), torch.ones(1)))
        tiny = least * torch.logspace(-6, 0, 100, dtype=torch.float64)
        above = torch.full((1,), 1.002, dtype=torch.float64)  # what rounding may make of 1
        for i, (a, b) in enumerate(steps):
            x, tiny = x * (a - b * x**2), tiny * (a - b * tiny**2)
            assert x.min() > 0 and x.max() <= 1 + 1e-12 and tiny.min() > 0 and tiny.max() <= 1 + 1e-12
            if i == 0:
                assert above * (a - b * above**2) > 0
        assert (1 - x).max() <= 2e-4 and (1 - x * (3 - x**2) / 2).abs().max() <= 1e-7


def test_product_adds_in_float64_where_asked():
    X = torch.randn(1, 40, 3000)
    exact = X.double() @ X.double().mT
    out = product.product(X, X.mT, torch.empty(1, 40, 40, dtype=torch.float64), wide=True)
    torch.testing.assert_close(out, exact, rtol=1e-13, atol=1e-11)


@pytest.mark.ptx
@pytest.mark.parametrize("m,n,k", [(1, 1, 1), (150, 3, 140), (5, 130, 17)])
def test_product(m, n, k):
    X, Y, C, weight = torch.randn(2, m, k), torch.randn(2, n, k).mT, torch.randn(2, n, m).mT, torch.randn(2, k)
    out = product.product(X, Y, torch.empty(2, m, n), C=C, weight=weight, alpha=-0.5, beta=2.0, gamma=1.5)
    expected = -0.5 * (X * weight[:, None]).double() @ Y.double() + 2 * C.double() + 1.5 * torch.eye(m, n)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5)
    C[0, 0, 0] = INF
    kept = torch.full((3, m, n), 7.0)
    mode = torch.tensor([0, 1, 2], dtype=torch.int32)
    X, Y, C, weight = (torch.cat((t, t[:1])) for t in (X, Y, C, weight))
    product.product(X, Y, kept, C=C, weight=weight, mode=mode)
    assert (kept[0] == 7).all() and torch.equal(kept[1], C[1]) and kept[2, 0, 0] == INF
