"""Benchmarks of whole networks: every provider is judged, what is wrong gets no time, floors are those by hand."""

import copy
import json
import sys

import pytest
import torch
from helpers.bench_devices import CpuAsCuda
from torch import nn

import condlr_ext
from bench import memory, profiling, runner
from bench.cases import baselines, inference, network_setup, networks, steps, training
from bench.cases.baselines import FastPyTorch
from bench.cases.networks import Network, NetworkRank
from bench.machine import Cpu
from bench.registry import Row, Selection, Work
from bench.roofline import LayerCost, network_cost
from bench.runner import Options, measure
from condlr_ext.experiments.networks import TransformerBlock, WideBlock
from condlr_ext.optim import CondLRSGD

STEP, STILL = steps.OPERATIONS
(TRAIN,), (INFERENCE,) = training.OPERATIONS, inference.OPERATIONS
OPERATIONS = (STEP, STILL, TRAIN, INFERENCE)
QUICK = Options(seconds=0.0, rounds=1, compile="none")
PROVIDERS = {
    "step": {"ours", "reference", "fast PyTorch", "released", "dense SGD", "dense SGD fused", "dense AdamW fused"}
    | {"torch Muon"},
    "step still": {"ours", "fast PyTorch"},
    "train": {"ours", "reference", "fast PyTorch", "dense"},
    "inference": {"ours", "folded", "merged"},
}


@pytest.fixture
def tiny(monkeypatch):
    """The shape of a network with a convolution, a batch norm and linear layers."""

    def layers():
        conv = nn.Conv2d(1, 4, 3, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(4), nn.Flatten(), nn.ReLU(), nn.Linear(36, 5))

    monkeypatch.setitem(networks.NETWORKS, "tiny", Network(layers, (6, 1, 5, 5), 5))
    network_setup.setup.cache_clear()
    yield NetworkRank("tiny", 0.5)
    network_setup.setup.cache_clear()


def records(operation, shape, device=None, dtype="fp32", options=QUICK) -> list[dict]:
    torch.manual_seed(0)
    return list(measure(Row(operation, shape, dtype), device or Cpu(), options))


def reasons(found: list[dict]) -> dict[tuple[str, str], str]:
    return {(r["provider"], r["mode"]): r["reason"] for r in found if "reason" in r}


def test_smoke():
    device = Cpu()
    rows = Selection(size="smoke").rows(OPERATIONS, device)
    assert {row.operation.name for row in rows} == set(PROVIDERS)
    for row in rows:
        found = records(row.operation, row.shape, device)
        assert {r["provider"] for r in found} == PROVIDERS[row.operation.name]
        assert {r["mode"] for r in found} == set(row.operation.modes)
        for r in found:
            assert r["seconds"], (str(row), r)
            assert r["errors"] and all(0 <= e <= r["limits"][name] for name, e in r["errors"].items())
            assert sum(flops for flops, _ in r["work"]) > 0 or r["op"] == "step"
            json.dumps(r)


def test_default_rows():
    for operation in OPERATIONS:
        for size in ("default", "full"):
            names = [str(row) for row in Selection(size=size).rows([operation], Cpu())]
            assert len(set(names)) == len(names)
    assert "train VGG16 20% fp32" in map(str, Selection().rows([TRAIN], Cpu()))
    assert "step transformer rank 64 fp32" in map(str, Selection().rows([STEP], CpuAsCuda()))


def test_wrong_steps_get_no_time(tiny, monkeypatch):
    class Shorter(FastPyTorch):
        def layer_step(self, U, S, V, *buffers):
            before = U.clone()
            super().layer_step(U, S, V, *buffers)
            U.copy_(before + 0.9 * (U - before))

    monkeypatch.setattr(steps, "fast_pytorch", lambda model, lr: Shorter(model, lr, momentum=0.45, tau=0.1))
    monkeypatch.setattr(steps, "fused_sgd", lambda model, lr: torch.optim.SGD(model.parameters(), lr=0.9 * lr["other"]))
    monkeypatch.setattr(steps, "muon_direction", lambda G: -G)
    found = records(STEP, tiny)
    wrong = {name for name, _ in reasons(found)}
    assert wrong == {"fast PyTorch", "dense SGD fused", "torch Muon"}
    assert all(why.startswith("wrong: ") for why in reasons(found).values())
    (fast,) = (r for r in found if r["provider"] == "fast PyTorch")
    assert fast["seconds"] is None and 1e-5 < fast["error"] < 1e-2


def test_prescribed_gradients():
    """They sum to zero, and every factor, core and bias moves by MOVE, but for what the constraint takes away."""
    setup = network_setup.setup("digits MLP")
    sets = setup.gradients(0.2)
    assert all(sum(g[name] for g in sets).norm() < 1e-5 for name in sets[0])
    stepped = setup.exact_step(0.2, network_setup.ours, tuple(steps.MOVING.items()))
    for name, p in setup.source(0.2).named_parameters():
        moved = (stepped[name] - p).norm() / p.norm() / steps.MOVE
        assert 0.2 < moved < 1.01 if name.endswith(".S") else 0.8 < moved < 1.05, (name, moved)


@pytest.mark.filterwarnings("ignore:CUDA is not available")  # by the profiler
def test_replays_of_steps(tiny, monkeypatch):
    """Judged from the start again; without the kernels, ours on them gets no time."""
    monkeypatch.setattr(runner, "SHORT", float("inf"))
    found = records(STEP, tiny, CpuAsCuda())
    assert {r["kind"] for r in found} == {"time", "launches"}
    replayed = {r["provider"] for r in found if r["kind"] == "time" and r["mode"] == "call, graph" and r["seconds"]}
    assert replayed == PROVIDERS["step"]
    assert reasons([r for r in found if r["kind"] == "time"])["ours: triton", "call"].startswith("BackendError: ")


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_replays_that_do_nothing_get_no_time(tiny, monkeypatch):
    monkeypatch.setattr(runner, "SHORT", float("inf"))
    monkeypatch.setattr(CpuAsCuda, "graph", lambda self, call: (lambda: None, None))
    found = [r for r in records(STEP, tiny, CpuAsCuda()) if r["kind"] == "time" and r["mode"] == "call, graph"]
    assert {r["provider"] for r in found} == PROVIDERS["step"]
    assert all(r["seconds"] is None and r["reason"].startswith("wrong: ") for r in found)


@pytest.mark.parametrize("found, reason", [(3, None), (ArithmeticError("lost"), "ArithmeticError: lost")])
def test_launches(tiny, monkeypatch, found, reason):
    def launches(device, call):
        call()
        if reason:
            raise found
        return found

    monkeypatch.setattr(steps, "launches", launches)
    counted = steps.launch_records(Row(STEP, tiny, "fp32"), CpuAsCuda())
    assert [r["provider"] for r in counted] == ["ours", "dense SGD fused", "dense AdamW fused"]
    for r in counted:
        assert (r["op"], r["row"]) == ("step", "tiny 50%")
        assert r.get("reason") == reason and r["launches"] == (None if reason else 3)
    assert steps.launch_records(Row(STEP, tiny, "fp32"), Cpu()) == []


def test_wrong_training_gets_no_time(tiny, monkeypatch):
    class Lazy(FastPyTorch):
        def step(self):
            pass

    forward = condlr_ext.LowRankLinear.forward
    monkeypatch.setattr(condlr_ext.LowRankLinear, "forward", lambda self, x: forward(self, x * (1 + 1e-2)))
    monkeypatch.setattr(training, "fast_pytorch", lambda model, lr: Lazy(model, lr, momentum=0.45, tau=0.1))
    found = reasons(records(TRAIN, tiny))
    assert {name for name, _ in found} == {"ours", "reference", "fast PyTorch"}
    assert found["ours", "backward"].startswith("wrong: gradients")
    assert {mode for name, mode in found if name == "fast PyTorch"} == {"iteration"}
    assert found["fast PyTorch", "iteration"].startswith("wrong: parameters")


def test_a_missing_backward_gets_no_time(tiny, monkeypatch):
    monkeypatch.setattr(training.Training, "backward", lambda self: self.loss.detach())
    found = reasons(records(TRAIN, tiny))
    assert {mode for _, mode in found} == {"backward"} and len(found) == 4


def test_kinks_are_back_when_time_is_taken(tiny, monkeypatch):
    pools = []
    forward = nn.ReLU.forward

    def recorded(self, x):
        pools.append(1)
        return forward(self, x)

    monkeypatch.setattr(nn.ReLU, "forward", recorded)
    problem = TRAIN.problem(tiny, "fp32", Cpu())
    call = problem.providers["ours"]().calls["iteration"]
    pools.clear()
    call.rewind()
    call.prepare()
    loss = call.run()
    assert not pools
    call.errors(loss)
    call.prepare()
    call.run()
    assert len(pools) == 1


@pytest.mark.parametrize("dtype", ["tf32", "bf16"])
def test_other_arithmetic(tiny, dtype):
    for operation in (TRAIN, INFERENCE):
        found = records(operation, tiny, dtype=dtype)
        assert not reasons(found)
        assert dtype == "tf32" or max(r["error"] for r in found) > 1e-4


def test_wrong_inference_gets_no_time(tiny, monkeypatch):
    fold = inference.fold

    def without_core(model):
        for layer in network_setup.low_rank_layers(model).values():
            layer.S.data.copy_(layer.S.mean() * torch.eye(layer.rank))
        return fold(model)

    monkeypatch.setattr(inference, "fold", without_core)
    found = records(INFERENCE, tiny)
    assert {name for name, _ in reasons(found)} == {"folded"}
    assert reasons(found)["folded", "call"].startswith("wrong: outputs")


def test_compiled_providers_are_judged(tiny, monkeypatch):
    """torch.compile with the backend that runs what was traced as it is."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compile(model, backend="eager"))
    options = Options(seconds=0.0, rounds=1, compile="all")
    for operation, names in ((TRAIN, {"ours", "dense"}), (INFERENCE, {"ours", "folded", "merged"})):
        found = records(operation, tiny, options=options)
        assert not reasons(found)
        assert {f"{name} compiled" for name in names} <= {r["provider"] for r in found}


def test_layer_costs():
    layer = LayerCost("", m=5, n=7, rows=100, first=False)
    assert layer.forward(None) == 2 * 100 * 35 and layer.backward(None) == 2 * layer.forward(None)
    assert layer.forward(1) == 2 * 100 * 12 + 2 * 5 and layer.folded(1) == 2 * 100 * 12
    assert layer.backward(1) == 2 * (2 * 100 * 5 + 2 * 100 * 7 + 2 * 5)
    assert layer.forward(5) == 2 * 100 * 35 + 2 * 35 * 5 and layer.folded(5) == 2 * 100 * 35  # merged is cheaper
    assert LayerCost("", 5, 7, 100, first=True).backward(None) == 2 * 100 * 35


def test_costs_of_networks(monkeypatch):
    def mlp():
        return nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))

    cost = network_cost(Network(mlp, (8, 6), 3))
    assert [(x.name, x.m, x.n, x.rows, x.first) for x in cost.layers] == [("0", 4, 6, 8, True), ("2", 3, 4, 8, False)]
    nothing, products = Work(0, 0), 2 * 8 * (24 + 12)
    assert cost.forward({}) == [Work(products, 4 * 36), nothing, Work(0, 4 * 2 * 32)]
    assert cost.backward({}) == [Work(2 * 8 * (24 + 2 * 12), 2 * 4 * 36), nothing, Work(0, 4 * 2 * 32)]
    assert cost.inference({"0": 1}, size=2)[0] == Work(2 * 8 * (10 + 12), 2 * 22)
    assert cost.step({"0": 2}, [30]) == [Work(8 * 10 * 4 + 4 * 8, 5 * 4 * 30)]

    for causal, pairs in ((False, 25), (True, 15)):
        cost = network_cost(Network(lambda causal=causal: TransformerBlock(8, 2, causal), (3, 5, 8)))
        assert [(x.m, x.n, x.rows) for x in cost.layers] == [(24, 8, 15), (8, 8, 15), (32, 8, 15), (8, 32, 15)]
        forward, backward = cost.forward({}), cost.backward({})
        # scores and their product with the values; their gradients and those of queries, keys and values
        assert forward[1] == Work(2 * 2 * 3 * pairs * 8, 4 * 4 * 120)
        assert backward[1] == Work(4 * 2 * 3 * pairs * 8, 4 * 8 * 120)
        # two layer norms, GELU on four times the width, two residuals
        assert forward[2].bytes == 4 * 120 * (2 * 2 + 2 * 4 + 2 * 2)
        assert backward[2].bytes == 4 * 120 * (3 * 2 + 2 * 4 + 2 * 2)

    cost = network_cost(Network(lambda: WideBlock(4, 4, 1), (2, 4, 3, 3)))
    assert cost.forward({})[2].bytes == 4 * 72 * (3 + 3 + 2) and cost.backward({})[2].bytes == 4 * 72 * (5 + 5 + 2)


def test_the_gpt_block_is_causal():
    block = networks.gpt_block(16, 2)
    x = torch.randn(1, 6, 16)
    y = x.clone()
    y[:, 4:] += 1
    torch.testing.assert_close(block(x)[:, :4], block(y)[:, :4])
    assert not torch.allclose(networks.vit_block(16, 2)(x)[:, :4], networks.vit_block(16, 2)(y)[:, :4], atol=1e-3)


def test_memory_of_a_process():
    """Weights, gradients and momentum, and what the first layer and its activation leave for the backward."""
    found = memory.in_new_process(NetworkRank("LeNet5", 0.2), "dense", "cpu")
    least = 3 * 4 * 430_500 + 2 * 4 * 128 * 20 * 24 * 24
    assert least < found["bytes"] < 5 * least, found
    assert found["seconds"] > 0 and found["page_faults"] >= 0


def test_a_process_that_fails_is_a_reason(monkeypatch):
    monkeypatch.setattr(sys, "executable", "false")
    assert memory.in_new_process(NetworkRank("LeNet5", 0.2), "dense", "cpu") == {"reason": "status 1"}


def test_memory_records(monkeypatch):
    calls = []
    monkeypatch.setattr(memory, "in_new_process", lambda *args: calls.append(args) or {"bytes": 5})
    found = memory.memory_records(Row(TRAIN, NetworkRank("LeNet5", 0.2), "fp32"), Cpu())
    assert [r["provider"] for r in found] == ["ours", "dense", "fast PyTorch"] == [provider for _, provider, _ in calls]
    assert all(r["kind"] == "memory" and r["row"] == "LeNet5 20%" and r["bytes"] == 5 for r in found)
    assert memory.memory_records(Row(TRAIN, NetworkRank("digits MLP", 0.2), "fp32"), Cpu()) == []


def test_breakdown(tiny):
    text = profiling.breakdown(Row(TRAIN, tiny, "fp32"), ["ours", "dense", "no provider"], Cpu())
    assert text.count("ms a call") == 6 and "no provider" not in text
    assert "train tiny 50% fp32, iteration, ours: " in text and "the package's ops" in text and "convolutions" in text


def test_a_restored_start_is_no_new_model_to_the_optimizer():
    """It goes on with the arguments it has, as the capture of a step demands."""
    model = torch.nn.Sequential(condlr_ext.LowRankLinear(7, 9, rank=3))
    optimizer = CondLRSGD(model, 0.1, tau=0.1)
    start = network_setup.Start(model, optimizer)
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):
        model(torch.randn(4, 7)).sum().backward()
        optimizer.step()
        (call,) = optimizer._calls
        start.restore()
        assert call.is_valid_for(list(model.parameters()), optimizer.state)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_small_layers_of_one_shape_are_stepped_as_a_batch(monkeypatch):
    """They end where steps one by one end."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(20, 20) for _ in range(3)), nn.Linear(20, 16))
    condlr_ext.factorize(model, rank=4)
    models = [copy.deepcopy(model) for _ in range(2)]
    for stacked, m in zip((baselines.STACKED, 0), models, strict=True):
        monkeypatch.setattr(baselines, "STACKED", stacked)
        optimizer = FastPyTorch(m, {"factors": 0.01, "cores": 0.01, "other": 0.01}, momentum=0.5, tau=0.1)
        assert [len(batch) for batch in optimizer.batches] == ([3, 1] if stacked else [1] * 4)
        for seed in range(2):
            generator = torch.Generator().manual_seed(seed)
            for p in m.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
    torch.testing.assert_close(list(models[0].parameters()), list(models[1].parameters()))
