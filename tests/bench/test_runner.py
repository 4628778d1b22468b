"""Turns, samples and failures: what the runner does with providers, on a device whose clock the test sets."""

from dataclasses import dataclass

import pytest
import torch

from bench import runner, tables, timing
from bench.cases import network_setup, networks
from bench.records import FORMAT, Results, ours
from bench.registry import OURS, SAME, Operation, Provider, Row, TimedCall, Work


class Device:
    """Every call says how long it takes."""

    kind, device, default_cache = "cpu", torch.device("cpu"), "warm"

    def __init__(self):
        self.log = []

    def synchronize(self):
        pass

    def memory(self, call):
        return None

    def seconds(self, call, number, cold):
        self.log.append((call, number))
        return call.run()


def call(seconds) -> TimedCall:
    return TimedCall(lambda: seconds() if callable(seconds) else seconds, lambda out: {"": 0.0})


def test_samples():
    device, calls = Device(), [call(1e-4), call(0.3), call(2.0)]
    failed = {}
    samples = timing.interleave(device, calls, [1.0, 1.0, 0.1], 1.0, 11, False, failed)
    # 1.0 s hold eleven samples of 10 ms and four of 0.3 s; of the longest call there are the three of any
    assert [len(s) for s in samples] == [11, 4, 3] and not failed
    numbers = {id(c): {n for k, n in device.log if k is c} for c in calls}
    assert numbers[id(calls[0])] == {1, 100} and numbers[id(calls[1])] == numbers[id(calls[2])] == {1}
    turn = [calls.index(c) for c, _ in device.log]
    assert turn[:7] == [0, 0, 1, 2, 0, 1, 2]  # the first turn warms up and is no sample


@dataclass(frozen=True)
class Shape:
    name: str = "row"

    def __str__(self) -> str:
        return self.name


def operation(providers: dict) -> Operation:
    class Problem:
        work = {"call": [Work(1.0)], "other": [Work(1.0)]}

        def __init__(self, shape, dtype, device):
            self.providers = providers

    return Operation("op", "", Problem, lambda size, device: [Shape()], modes=("call",))


def provider(role: str, seconds) -> Provider:
    return Provider({"call": call(seconds)}, {"": 1.0}, role)


def test_a_provider_that_fails_later_has_no_time():
    """Judged, it was right; the run goes on."""
    turns = iter([1.0, 1.0])

    def later():
        return next(turns)

    rows = operation({"ours": lambda: provider(OURS, later), "torch": lambda: provider(SAME, 0.5)})
    mine, other = runner.measure(Row(rows, Shape(), "fp32"), Device(), runner.Options(1.0, 5))
    assert mine["seconds"] is None and mine["reason"] == "StopIteration: "
    assert other["seconds"] == [0.5] * 3 and other["samples"] == 3


@pytest.mark.parametrize("failing", ["made", "judged"])
def test_a_row_without_ours_is_lost(failing):
    def broken():
        raise ArithmeticError("no such core")

    mine = broken if failing == "made" else lambda: provider(OURS, broken)
    rows = operation({"ours": mine, "ours: merged": lambda: provider(OURS, 0.1), "torch": lambda: provider(SAME, 0.5)})
    found = list(runner.measure(Row(rows, Shape(), "fp32"), Device(), runner.Options(1.0, 3)))
    lost = [r for r in found if r["provider"] == "ours"]
    assert {r["mode"] for r in lost} == ({"call", "other"} if failing == "made" else {"call"})
    assert all(r["reason"] == "ArithmeticError: no such core" for r in lost)
    machine = {"device": "A CPU", "cores": 1}
    run = {"kind": "run", "format": FORMAT, "machine": machine, "versions": {}, "commit": None, "date": ""}
    won = [{**r, "row": "won"} for r in found if r["provider"] != "ours"]
    won += [{**won[0], "provider": "ours"}]
    results = Results([run, *found, *won])
    assert ours(next(results.rows(where=lambda r: r["row"] == "row"))) is None
    assert any("ours faster than the best other in 1 of 2 rows" in line for line in tables.show(results))


def test_images_of_one_channel_are_channels_last():
    x, _ = networks.NETWORKS["small LeNet5"].batch()
    B, C, H, W = x.shape
    assert C == 1 and x.stride() == (H * W, 1, W, 1)


def test_a_compiled_model_may_have_no_length():
    class Compiled:
        def __len__(self):
            raise TypeError("does not support len()")

        def __call__(self, x):
            return 2 * x

    model = torch.nn.Linear(3, 3)
    batches = [(torch.ones(2, 3), None)]
    net = networks.Network(lambda: model, (2, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    training = network_setup.Training(net, model, optimizer, batches, torch.float32, Compiled())
    training.next()
    assert training.forward().item() == 4.0
