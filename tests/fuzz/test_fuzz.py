"""The runner of random cases: a fault of any kind is found, and its number leads back to it."""

import os
import signal
import sys
import time

import pytest
import torch

import condlr_ext
from condlr_ext import linalg
from condlr_ext.optim import CondLRSGD
from fuzz import __main__ as command
from fuzz import cores, files, runner, steps
from fuzz.case import Case


def until_fault(run, seconds=20.0):
    """Number and text of the first fault."""
    for _, _, number, faults in runner.run_for(seconds, {"kind": run}, seed=0):
        if faults:
            return number, faults[0]
    return None


def in_case_3(action):
    def run(case):
        case.counts["cases"] += 1
        if case.random.random() == Case("kind", 0, 3).random.random():
            action()

    return run


def test_a_crash_is_a_fault_and_the_next_case_runs():
    run = in_case_3(lambda: os.kill(os.getpid(), signal.SIGKILL))
    seen = {}
    for _, totals, number, faults in runner.run_for(20.0, {"kind": run}, seed=0):
        seen[number] = faults
        if number == 6:
            assert totals.counts["cases"] == 6 and totals.cases == 7
            break
    assert seen == {n: ["the process ended with SIGKILL"] if n == 3 else [] for n in range(7)}


def test_a_hang_is_a_fault(monkeypatch):
    monkeypatch.setattr(runner, "LONGEST", 1.0)
    assert until_fault(in_case_3(lambda: time.sleep(60))) == (3, "did not end within 1 s")


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is that of Linux")
def test_too_much_memory_is_a_fault():
    number, text = until_fault(in_case_3(lambda: bytearray(3 * runner.MEMORY)))
    assert number == 3 and text.startswith("raised MemoryError")


def test_an_exception_is_a_fault():
    number, text = until_fault(in_case_3(lambda: {}["x"]))
    assert number == 3 and text.startswith("raised KeyError: 'x' (") and "test_fuzz.py" in text


@pytest.mark.parametrize("kind", command.KINDS)
def test_a_case_is_the_same_again(kind):
    first, second = ([runner.run_case(kind, command.KINDS[kind], 5, n) for n in order] for order in ((0, 1), (1, 0)))
    for a, b in zip(first, reversed(second), strict=True):
        assert a.counts == b.counts and not a.faults and not b.faults


def finds(run, kind, what):
    """Whether one of the first cases has a fault that begins so."""
    return any(text.startswith(what) for n in range(60) for text in runner.run_case(kind, run, 0, n).faults)


@pytest.mark.parametrize("name,what", [("clip_spectrum", "clip: kappa"), ("polar", "polar: Q orthonormal")])
def test_a_wrong_matrix_is_found(monkeypatch, name, what):
    right = getattr(linalg, name)

    def slightly_off(A, *args):
        result = right(A, *args)
        first = result[0] if isinstance(result, tuple) else result
        first[:, :1] *= 1 + 1e-3
        return result

    monkeypatch.setattr(linalg, name, slightly_off)
    assert finds(cores.run, "cores", what)


def test_a_wrong_step_is_found(monkeypatch):
    right = CondLRSGD.step

    def forgetful(self, closure=None):
        right(self, closure)
        with torch.no_grad():
            for group in self.param_groups:
                for p, role in zip(group["params"], group["roles"], strict=True):
                    if role == "S":
                        p[:1] *= 1.5

    monkeypatch.setattr(CondLRSGD, "step", forgetful)
    assert finds(steps.run, "steps", "kappa: ")


def test_a_wrong_error_is_found(monkeypatch):
    def careless(*_):
        raise KeyError("x")

    monkeypatch.setattr(condlr_ext, "load", careless)
    assert finds(files.run, "files", "undocumented KeyError")


def test_the_command_says_how_to_repeat_a_fault(monkeypatch, capsys):
    def fault(case):
        case.at_most("size", 3.0, 2.0, "here")

    monkeypatch.setattr(command, "KINDS", {"cores": fault, "steps": lambda case: None})
    monkeypatch.setattr(sys, "argv", ["fuzz", "--seed", "7", "--seconds", "1"])
    assert command.main() == 1
    out = capsys.readouterr().out
    assert "cores: size: 3, at most 2 was promised; here" in out
    assert "python -m fuzz --only cores --seed 7 --case 0" in out and "seed 7, " in out
    monkeypatch.setattr(sys, "argv", "fuzz --only cores --seed 7 --case 0".split())
    assert command.main() == 1
    monkeypatch.setattr(sys, "argv", ["fuzz", "--only", "steps", "--seconds", "1"])
    assert command.main() == 0
