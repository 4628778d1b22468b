"""Linear algebra in the benchmarks: nothing wrong gets a time, and nobody waits for a slow baseline."""

import sys
import weakref

import numpy
import pytest
import torch
from helpers.bench_devices import Host

from bench import runner
from bench.cases import linear_algebra
from bench.cases.linear_algebra import Batch
from bench.registry import Operation, Row


def measured(problem) -> list[dict]:
    operation = Operation("op", "", lambda *_: problem, lambda *_: [])
    return list(runner.measure(Row(operation, Batch(1, 2, 2), "fp32"), Host(), runner.Options(seconds=0, rounds=1)))


def broken(out, **changes):
    """The results with some of them changed."""
    return tuple(changes[str(i)](t) if str(i) in changes else t for i, t in enumerate(out))


def turned(t):
    return t.flip(-1)


def other_sign(t):
    return -t


def longer(t):
    return t * (1 + 1e-5)


def lost(t):
    return t * torch.nan


TURN = torch.matrix_exp(1e-3 * (torch.ones(6, 6).triu(1) - torch.ones(6, 6).tril(-1)))
KINDS = {name: getattr(linear_algebra, name) for name in ("SVD", "QR", "POLAR", "CLIP", "BASIS")}


def judged(problem, function):
    """Return the verdict on a function of A in place of a provider."""
    return runner.judge(Host(), *made(problem, function))


def made(problem, function):
    provider = problem._provider(function, "ours")
    return provider, provider.calls["call"]


@pytest.mark.parametrize(
    "name, changes, why",
    [
        ("SVD", {"1": longer}, "A"),
        ("SVD", {"0": turned, "1": turned, "2": turned}, "order"),
        ("SVD", {"0": other_sign, "1": other_sign}, "order"),
        ("SVD", {"0": longer, "1": lambda t: t / (1 + 1e-5)}, "U"),
        ("SVD", {"2": longer, "1": lambda t: t / (1 + 1e-5)}, "V"),
        ("SVD", {"2": lost}, "finite"),
        ("QR", {"1": longer}, "A"),
        ("QR", {"0": longer, "1": lambda t: t / (1 + 1e-5)}, "Q"),
        ("QR", {"0": turned, "1": lambda t: t.flip(-2)}, "R"),
        ("POLAR", {"1": longer}, "A"),
        ("POLAR", {"0": other_sign, "1": other_sign}, "sign"),
        ("POLAR", {"0": lambda t: t @ TURN, "1": lambda t: TURN.mT @ t}, "H"),
        ("CLIP", {"0": longer}, "clipped"),
        ("CLIP", {"0": lost}, "finite"),
        ("CLIP", {"0": lambda t: t + 5e-5 * t[:, :1, :1].sign() * torch.eye(6)}, "clipped"),
        ("BASIS", {"0": longer}, "Q"),
        ("BASIS", {"0": lambda t: TURN @ t}, "span"),
    ],
)
def test_wrong_linear_algebra_gets_no_time(name, changes, why):
    kind = KINDS[name]
    shape = Batch(3, 6, 4) if name == "BASIS" else Batch(3, 6, 6)
    problem = linear_algebra.MatrixProblem(kind, shape, "fp32", Host())
    assert "reason" not in judged(problem, kind.torch)
    found = judged(problem, lambda A: broken(kind.torch(A), **changes))
    assert found["reason"].startswith("wrong: ") and f" {why} " in found["reason"]


def test_kappa_beyond_the_bound_is_wrong():
    """In one matrix that is clipped well but for it."""
    problem = linear_algebra.MatrixProblem(linear_algebra.CLIP, Batch(3, 6, 6), "fp32", Host())
    U, sigma, Vh = torch.linalg.svd(problem._exact[1])
    sigma[0] = 1.1 * (1 + 3e-5) * sigma[-1]
    wrong = problem._exact.clone()
    wrong[1] = (U * sigma) @ Vh
    provider, call = made(problem, lambda A: (wrong,))
    provider.limits = {"clipped": 1e-2, "kappa": 5e-6}
    assert runner.judge(Host(), provider, call)["reason"].startswith("wrong: kappa 3e-05")


def test_copies_of_matrices_are_checked_too():
    problem = linear_algebra.MatrixProblem(linear_algebra.CLIP, Batch(18, 4, 4), "fp32", Host())
    A = problem._A
    assert torch.equal(A[:2], A[16:]) and not torch.equal(A[0], A[1])

    def wrong_at_the_end(A):
        (out,) = linear_algebra.CLIP.torch(A)
        return (torch.cat((out[:17], out[:1])),)

    assert judged(problem, wrong_at_the_end)["reason"].startswith("wrong: clipped")


def test_what_is_judged_is_made_of_the_first_inputs():
    """However often the others of the sets were used before."""
    problem = linear_algebra.MatrixProblem(linear_algebra.QR, Batch(2, 5, 5), "fp32", Host())
    provider, call = made(problem, torch.linalg.qr)
    for _ in range(3):
        assert "reason" not in runner.judge(Host(), provider, call)
    call.run()
    assert "reason" not in runner.judge(Host(), provider, call)
    call.rewind = None
    assert {"reason" in runner.judge(Host(), provider, call) for _ in range(2)} == {False, True}


def test_memory_is_poisoned_between_providers(monkeypatch):
    """NaN of the sizes of a provider's results is written when these are gone: a caching allocator reuses their memory."""
    problem = linear_algebra.MatrixProblem(linear_algebra.QR, Batch(2, 7, 5), "fp32", Host())
    assert problem._limits  # made before what is watched here
    results, poison = [], []

    def provider(A):
        out = torch.linalg.qr(A)
        results.extend(map(weakref.ref, out))
        return out

    full = torch.full

    def recorded(size, value, **options):
        assert all(result() is None for result in results)
        poison.append(full(size, value, **options))
        return poison[-1]

    arguments = made(problem, provider)
    monkeypatch.setattr(torch, "full", recorded)
    assert "reason" not in runner.judge(Host(), *arguments)
    assert [t.shape for t in poison] == [(2, 7, 5), (2, 5, 5)] and all(t.isnan().all() for t in poison)


def test_nobody_waits_for_a_slow_baseline(monkeypatch):
    monkeypatch.setattr(linear_algebra, "MAX_SECONDS", 0)
    problem = linear_algebra.MatrixProblem(linear_algebra.SVD, Batch(2, 5, 5), "fp32", Host())
    found = {r["provider"]: r for r in measured(problem) if r["mode"] == "call"}
    for name in ("torch.linalg", "reference"):
        assert found[name]["reason"] == "TimeoutError: a call would take 0 s"
    assert found["torch.linalg"]["seconds"] is None and found["ours"]["seconds"]
    assert found["ours: triton"]["reason"].startswith("BackendError: ")


@pytest.mark.parametrize("kind", [linear_algebra.SVD, linear_algebra.QR], ids=["svd", "qr"])
def test_cupy_where_it_is_installed(monkeypatch, kind):
    def found():
        problem = linear_algebra.MatrixProblem(kind, Batch(3, 7, 5), "fp32", Host())
        return {r["provider"]: r for r in measured(problem) if r["mode"] == "call"}

    monkeypatch.setattr(linear_algebra.importlib.util, "find_spec", lambda name: None)
    assert found()["CuPy"]["reason"] == "ImportError: cupy is not installed" and "NumPy" not in found()
    monkeypatch.setattr(linear_algebra.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "cupy", numpy)
    assert found()["CuPy"]["seconds"]
    problem = linear_algebra.MatrixProblem(kind, Batch(3, 7, 5), "fp32", Host())
    replayed = {r["provider"] for r in measured(problem) if r["mode"] == "call, graph"}
    assert "torch.linalg" in replayed and "CuPy" not in replayed  # it has streams of its own
