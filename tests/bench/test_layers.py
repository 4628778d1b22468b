"""Low-rank layers in the benchmarks: what is measured, what is counted, and that nothing wrong gets a time."""

import json
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.bench_devices import Host

from bench.cases import layers
from bench.cases.layers import Conv, LayerProblem, Linear
from bench.machine import Cpu
from bench.registry import DENSE, OURS, SAME, Operation, Row, Selection
from bench.runner import Options, measure

ROOT = Path(__file__).parents[2]
QUICK = Options(seconds=0.01, rounds=2, compile="none")
ON_CPU = {"ours", "ours: cpu", "ours: merged", "reference", "eager", "eager folded", "dense"}
LINEAR, CONV = (33, 17, 20, 3), (2, 4, 6, 5, 3, 2, 1, 3)
COMPILED = {"compiled", "compiled folded", "compiled dense"}


class Cuda:
    """A device as a registry needs it."""

    kind = "cuda"


def measured(shape, options=QUICK, dtype="fp32", device=None) -> list[dict]:
    operation = Operation("layer", "", LayerProblem, lambda size, device: [], layers.MODES, extra=layers.plans)
    return list(measure(Row(operation, shape, dtype), device or Cpu(), options))


def by_name(records: list[dict], mode: str) -> dict[str, dict]:
    return {r["provider"]: r for r in records if r["kind"] == "time" and r["mode"] == mode}


@pytest.mark.parametrize("row", Selection(size="smoke").rows(layers.OPERATIONS, Cpu()), ids=str)
def test_every_provider_is_right_and_timed(row):
    torch.manual_seed(0)
    records = list(measure(row, Cpu(), QUICK))
    names = {"forward": ["Y"], "backward": ["dX", "dU", "dS", "dV", "db"]}
    names["both"] = names["forward"] + names["backward"]
    for mode in layers.MODES:
        found = by_name(records, mode)
        assert set(found) == ON_CPU
        for name, r in found.items():
            assert "reason" not in r and r["error"] < 1e-6, (name, r)
            low, median, high = r["seconds"]
            assert 0 < low <= median <= high
            role = OURS if name.startswith("ours") or name == "reference" else DENSE if name == "dense" else SAME
            assert r["role"] == role
            results = [n for n in names[mode] if n[1:] not in ("U", "S", "V")] if name == "dense" else names[mode]
            assert set(r["errors"]) == set(results) | ({"dW"} if name == "dense" and mode != "forward" else set())
            assert len(r["work"]) == (2 if mode == "both" else 1)
        assert found["dense"]["work"] != found["ours"]["work"] == found["eager"]["work"]
    (plan,) = (r for r in records if r["kind"] == "plan")
    assert plan["route"] == min(plan["costs"], key=lambda route: (route == "dense", plan["costs"][route]))
    assert plan["backend"] == "cpu" and plan["row"] == str(row.shape) and plan["gain"] > 0
    assert all(json.dumps(r) for r in records)


def test_compiled_providers(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # spares the C++ compiler
    options = Options(seconds=0.01, rounds=1, compile="all", providers=tuple(COMPILED))
    records = measured(Linear(*LINEAR), options)
    for mode in layers.MODES:
        found = by_name(records, mode)
        assert set(found) == COMPILED | {"ours"} and all(r["seconds"] for r in found.values())
        assert found["compiled dense"]["role"] == DENSE and found["compiled"]["role"] == SAME


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp64"])
def test_other_arithmetic(dtype):
    eps = torch.finfo(layers.DTYPES[dtype]).eps
    for r in measured(Linear(*LINEAR), dtype=dtype):
        if r["kind"] == "time":
            assert r["seconds"] and r["error"] < 2 * eps


def test_tf32_is_refused_on_a_cpu():
    first, *_ = measured(Linear(*LINEAR), dtype="tf32")
    assert first["reason"].startswith("ValueError: tf32 is an arithmetic of CUDA devices")


def test_a_backend_that_cannot_serve_says_why(monkeypatch):
    """Without the interpreter Triton has nothing to offer to CPU tensors."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("Triton interprets")
    found = by_name(measured(Linear(*LINEAR), device=Host()), "both")
    assert found["ours: triton"]["reason"].startswith("BackendError: ") and found["ours: triton"]["seconds"] is None
    assert set(found) == ON_CPU - {"ours: cpu"} | {"ours: triton", "ours: factorized"}
    assert all(r["seconds"] for name, r in found.items() if name != "ours: triton")


class Scaled(torch.autograd.Function):
    """The identity with a gradient that is a little too long."""

    @staticmethod
    def forward(ctx, t):
        return t.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * (1 + 1e-4)


def wrong_gradient(index, *tensors):
    tensors = list(tensors)
    tensors[index] = Scaled.apply(tensors[index])
    return tensors


PLAIN_FOLDED = {Linear: Linear.folded, Conv: Conv.folded}


def with_folded(kind, folded):
    """A shape whose provider "eager folded" is this function of the shape and the tensors."""

    @dataclass(frozen=True)
    class Changed(kind):
        def folded(self, *tensors):
            return folded(partial(PLAIN_FOLDED[kind], self), *tensors)

        __str__ = kind.__str__

    return Changed(*(LINEAR if kind is Linear else CONV))


KINDS = pytest.mark.parametrize("kind", [Linear, Conv])


@KINDS
@pytest.mark.parametrize("index, name", list(enumerate(["dX", "dU", "dS", "dV", "db"])))
def test_a_wrong_gradient_gets_no_time_backward(kind, index, name):
    options = Options(seconds=0.01, rounds=1, compile="none", providers=("eager", "eager folded"))
    records = measured(with_folded(kind, lambda right, *t: right(*wrong_gradient(index, *t))), options)
    for mode in layers.MODES:
        found = by_name(records, mode)
        assert found["ours"]["seconds"] and found["eager"]["seconds"]
        wrong = found["eager folded"]
        if mode == "forward":
            assert wrong["seconds"] and "reason" not in wrong
        else:
            assert wrong["seconds"] is None and wrong["reason"].startswith(f"wrong: {name} 1e-04 > ")
            assert wrong["error"] == pytest.approx(1e-4, rel=0.1)


@KINDS
def test_a_wrong_forward_gets_no_time(kind):
    """Though its gradients are right, which get theirs."""
    records = measured(with_folded(kind, lambda right, *t: right(*t) + 1e-4 * right(*t).detach()))
    for mode in layers.MODES:
        wrong = by_name(records, mode)["eager folded"]
        if mode == "backward":
            assert wrong["seconds"] and "reason" not in wrong
        else:
            assert wrong["seconds"] is None and wrong["reason"].startswith("wrong: Y 1e-04 > ")


def test_what_fails_gets_no_time():
    """A gradient that is missing, NaN, and an exception."""
    missing = measured(with_folded(Linear, lambda right, x, *t: right(x.detach(), *t)))
    assert by_name(missing, "forward")["eager folded"]["seconds"]
    for mode in ("backward", "both"):
        found = by_name(missing, mode)["eager folded"]
        assert found["reason"].startswith("RuntimeError: ") and found["seconds"] is None

    def failing(right, *tensors):
        raise ArithmeticError("lost")

    lost = by_name(measured(with_folded(Linear, failing)), "forward")["eager folded"]
    assert lost["reason"] == "ArithmeticError: lost" and lost["seconds"] is None and lost["error"] is None
    for r in measured(with_folded(Linear, lambda right, *t: right(*t) * torch.nan)):
        if r.get("provider") == "eager folded":
            assert r["reason"].startswith("wrong: ") and r["error"] is None and r["seconds"] is None


def test_the_dense_layer_is_judged_by_its_own_weight():
    class Wrong(Linear):
        def dense(self, x, W, bias):
            return super().dense(x, W, bias) + (0 if W.dtype == torch.float64 else 1e-3)

    found = by_name(measured(Wrong(*LINEAR)), "forward")
    assert found["dense"]["reason"].startswith("wrong: Y ") and found["dense"]["seconds"] is None
    assert found["ours"]["seconds"]


def test_a_poor_baseline_excuses_little():
    """One that rounds too much loosens the limits of the others to what is sane, and gets no time beyond that."""

    class Rounding(Linear):
        def three_products(self, x, U, S, V, bias):
            Y = super().three_products(x, U, S, V, bias)
            return Y if Y.dtype == torch.float64 else Y.bfloat16().float()

    found = by_name(measured(Rounding(*LINEAR)), "forward")
    assert found["eager"]["reason"].startswith("wrong: Y ") and found["eager"]["limits"] == {"Y": 1e-4}
    assert found["eager folded"]["seconds"] and found["eager folded"]["limits"] == {"Y": 1e-4}


def test_work():
    forward, backward = (layers.work(Linear(rows=2, n=3, m=5, r=1), 4)[mode][0] for mode in ("forward", "backward"))
    factors, x, y = 1 * (3 + 1 + 5), 6, 10
    assert forward.bytes == 4 * (x + y + factors + 5) and backward.bytes == 4 * (2 * x + y + 2 * factors + 5)
    # X V, P Sᵀ, T Uᵀ; Q, dX, dU, dV, and the core twice
    assert forward.flops == 12 + 4 + 20 and backward.flops == 2 * (12 + 20) + 8
    (first,) = layers.work(Linear(rows=2, n=3, m=5, r=1), 4, input_gradient=False)["backward"]
    assert first.flops == backward.flops - 12 and first.bytes == backward.bytes - 4 * (x + 3)
    dense = layers.dense_work(Linear(rows=2, n=3, m=5, r=1), 4)
    assert dense["forward"][0].flops == 60 and dense["backward"][0].flops == 120
    assert dense["forward"][0].bytes == 4 * (x + y + 20) and dense["backward"][0].bytes == 4 * (2 * (x + 15) + y + 5)
    assert dense["both"] == dense["forward"] + dense["backward"]
    conv = Conv(batch=2, channels=3, m=5, side=8, kernel=3, stride=2, padding=1, r=1)
    assert (conv.rows, conv.n) == (2 * 16, 27)
    assert layers.work(conv, 1)["forward"][0].bytes == 2 * 3 * 64 + 32 * 5 + (27 + 5 + 1) + 5


def test_work_is_that_of_the_cheaper_route():
    """At full rank the thin products do more than the dense one, and W is cheap to form when the rows are many."""
    full = Linear(rows=10**6, n=64, m=64, r=64)
    dense = layers.dense_work(full, 4)
    for mode, flops in (("forward", 2 * 10**6 * 64**2), ("backward", 4 * 10**6 * 64**2)):
        assert flops == dense[mode][0].flops < layers.work(full, 4)[mode][0].flops < 1.001 * flops


def test_the_first_layer_has_no_input_gradient():
    problem = LayerProblem(Conv(*CONV), "fp32", Cpu(), input_gradient=False)
    for name, gradients in (("ours", {"dU", "dS", "dV", "db"}), ("dense", {"dW", "db"})):
        provider = problem.providers[name]()
        call = provider.calls["backward"]
        call.prepare()
        found = call.errors(call.run())
        assert set(found) == gradients and max(found.values()) < provider.limit("dU")


@pytest.mark.parametrize("shape", [Conv(*CONV), Conv(2, 5, 6, 4, 1, 1, 0, 4)], ids=str)
def test_convolutions_are_channels_last(shape):
    problem = LayerProblem(shape, "bf16", Cpu())
    for t in (problem.factors.tensors["X"], problem.factors.G, problem.weight.tensors["W"], problem.weight.G):
        assert t.is_contiguous(memory_format=torch.channels_last)
    assert all(t.dtype == torch.bfloat16 for t in problem.factors.tensors.values())


@pytest.mark.parametrize("size", ["smoke", "default", "full"])
@pytest.mark.parametrize("device", [Cpu(), Cuda()], ids=["cpu", "cuda"])
def test_shapes(size, device):
    rows = Selection(size=size).rows(layers.OPERATIONS, device)
    assert len(set(map(str, rows))) == len(rows)
    assert {row.dtype for row in rows} == ({"bf16", "fp32"} if device.kind == "cuda" else {"fp32"})
    for row in rows:
        shape = row.shape
        assert 1 <= shape.r <= min(shape.m, shape.n) and shape.rows >= 1
    compiled = sum(row.operation.headline(row.shape) for row in rows)
    assert 0 < compiled <= 10 or size == "smoke"
