"""capturable=True: the Triton step in the interpreter, options on the device, nothing that waits."""

import ast
import copy
import inspect
import textwrap
import weakref

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from helpers.kernels import run_on_cpu

import condlr_ext
from condlr_ext.optim import CondLRAdamW, CondLRSGD, base, step_args
from condlr_ext.optim.step_args import StepCall

if run_on_cpu():
    from condlr_ext.kernels.triton.step import launch as step

interpreter = pytest.mark.interpreter


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return torch.nn.Sequential(
        condlr_ext.LowRankLinear(7, 9, rank=3),
        torch.nn.LayerNorm(9),
        condlr_ext.LowRankLinear(9, 5, bias=False, rank=4),
        torch.nn.Linear(5, 4),
    ).to(dtype)


def train(optimizer, model, steps, change=lambda i: None):
    """The parameters after these steps of a fixed sequence of batches."""
    generator = torch.Generator().manual_seed(1)
    dtype = next(model.parameters()).dtype
    for i in range(steps):
        change(i)
        x, y = torch.randn(6, 7, generator=generator).to(dtype), torch.randint(0, 4, (6,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x).float(), y).backward()
        with condlr_ext.backend("triton" if getattr(optimizer, "capturable", False) else "auto"):
            optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


@interpreter
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, pytest.param(torch.float64, marks=pytest.mark.slow)], ids=str
)
def test_same_steps_as_without(dtype):
    """Momentum that starts, weight decay, a bias and layers that are not low-rank; float16 on float32 masters."""
    finals = []
    for capturable in (False, True):
        model = network(dtype)
        options = dict(momentum=0.9, weight_decay=1e-3, tau=0.2, capturable=capturable)
        finals.append(train(CondLRSGD(model, 0.1, **options), model, 5))
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(*finals, rtol=0, atol=tolerance)


@interpreter
def test_adamw_takes_the_same_steps():
    """Compared in float64, because Adam divides a gradient that is only rounding by itself."""
    finals = []
    for capturable in (False, True):
        model = network(torch.float64)
        options = dict(weight_decay=0.1, amsgrad=True, tau=0.2, capturable=capturable)
        lr = torch.tensor(0.01, dtype=torch.float64) if capturable else 0.01
        finals.append(train(CondLRAdamW(model, lr, **options), model, 4))
    torch.testing.assert_close(*finals, rtol=0, atol=1e-7)


@pytest.mark.ptx
@interpreter
def test_options_on_the_device_are_read_at_every_step():
    """lr and tau change between steps, with no table built anew; the same as numbers set in the groups."""
    finals = []
    for capturable in (False, True):
        model = network(torch.float64)
        optimizer = CondLRSGD(model, 0.1, momentum=0.5, tau=0.5, capturable=capturable)
        tensors = {"lr": torch.tensor(0.1), "tau": torch.tensor([0.5], dtype=torch.float64)}
        group = optimizer.param_groups[0]
        if capturable:
            group.update(tensors)
        tables = []

        def change(i, group=group, tensors=tensors, capturable=capturable, optimizer=optimizer, tables=tables):
            for name, value in (("lr", 0.1 / 2**i), ("tau", 0.5 / (i + 1))):
                if capturable:
                    tensors[name].fill_(value)
                else:
                    group[name] = value
            tables += [id(call.table) for call in optimizer._calls]

        finals.append(train(optimizer, model, 5, change))
        if capturable:
            assert len(set(tables[2:])) == 1  # that of the first step starts the momentum
    torch.testing.assert_close(*finals, rtol=0, atol=1e-7)  # lr is kept in float32
    assert max(condlr_ext.condition_numbers(model).values()) <= 1.1 * (1 + 1e-9)


@interpreter
def test_a_replaced_option_is_kept_until_the_next_step():
    """Options are told apart by id; a third tensor could get that of one which is gone."""
    model = network()
    optimizer = CondLRSGD(model, torch.tensor(0.1), tau=0.2, capturable=True)
    train(optimizer, model, 1)
    replaced = weakref.ref(optimizer.param_groups[0]["lr"])
    optimizer.defaults.clear()
    optimizer.param_groups[0]["lr"] = torch.tensor(0.2)
    assert replaced() is not None
    train(optimizer, model, 1)
    assert replaced() is None


@interpreter
def test_groups_with_their_own_tensors():
    """A tensor reaches the layers of its own group alone."""
    model = network(torch.float64)
    first, rest = dict(model[0].named_parameters()), dict(model[2].named_parameters())
    groups = [
        {"params": [(f"0.{k}", p) for k, p in first.items()], "lr": torch.tensor(0.0), "momentum": torch.tensor(0.0)},
        {"params": [(f"2.{k}", p) for k, p in rest.items()], "lr": torch.tensor(0.1)},
    ]
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = CondLRSGD(groups, 0.1, tau=0.2, capturable=True)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with condlr_ext.backend("triton"):
        optimizer.step()
    moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    names = [name for name, _ in model.named_parameters()]
    # U and V of layer 0, made in float32, are orthonormalized again
    assert not moved[names.index("0.S")] and moved[names.index("2.S")] and moved[names.index("2.U")]
    assert (before[0] - model[0].U).abs().max() < 1e-6


@interpreter
def test_one_plan_for_all_steps(monkeypatch):
    """Tables are built for the first steps, never again while the parameters stay."""
    built = []
    original = step.StepPlan.__init__
    monkeypatch.setattr(step.StepPlan, "__init__", lambda self, *args: built.append(1) or original(self, *args))
    model = network()
    optimizer = CondLRSGD(model, 0.1, momentum=0.9, tau=0.2, capturable=True)
    train(optimizer, model, 4)
    assert len(built) == 1


@pytest.mark.ptx
@interpreter
def test_skipped_is_counted_on_the_device():
    """A layer with NaN in its gradient stays, and one without a gradient is not asked; counts go to the right layers."""
    model = network()
    model[0].requires_grad_(False)
    optimizer = CondLRSGD(model, 0.1, tau=0.2, capturable=True)
    for p in model[2].parameters():
        p.grad = torch.full_like(p, torch.nan)
    before = [p.detach().clone() for p in model[2].parameters()]
    with condlr_ext.backend("triton"):
        for _ in range(3):
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model[2].parameters(), strict=True))
    assert optimizer.skipped.item() == 3
    assert optimizer._skipped[torch.device("cpu")].tolist() == [0, 3]


@interpreter
def test_what_a_graph_uses_is_kept(monkeypatch):
    model = network()
    optimizer = CondLRSGD(model, 0.1, tau=0.2, capturable=True)
    train(optimizer, model, 2)
    (call,) = optimizer._calls
    table = call.table
    monkeypatch.setattr(base, "_capturing", lambda: True)
    with condlr_ext.backend("triton"):
        optimizer.step()
    monkeypatch.undo()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.param_groups[0]["tau"] = 0.3
    train(optimizer, model, 1)
    assert call is not optimizer._calls[0] and optimizer._captured[0][:2] == (call, table)
    assert not copy.deepcopy(optimizer)._captured


def test_what_capturable_cannot_do(monkeypatch):
    model = network()
    with pytest.raises(ValueError, match="check_finite=True waits for the device"):
        CondLRSGD(model, 0.1, tau=0.1, capturable=True, check_finite=True)
    with pytest.raises(ValueError, match="momentum may be a tensor under capturable=True in groups of low-rank layers"):
        CondLRSGD(model, 0.1, momentum=torch.tensor(0.9), tau=0.1, capturable=True)
    with pytest.raises(ValueError, match="tau as a tensor must have one element"):
        CondLRSGD(model, 0.1, tau=torch.ones(2), capturable=True)
    with pytest.raises(ValueError, match="tau must be a number >= 0"):
        CondLRSGD(model, 0.1, tau=torch.tensor(-1.0), capturable=True)
    optimizer = CondLRSGD(model, 0.1, tau=0.1, capturable=True)
    model(torch.randn(2, 7)).sum().backward()
    before = [p.detach().clone() for p in model.parameters()]
    monkeypatch.setattr(base, "_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="before one is captured"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.skipif(run_on_cpu(), reason="kernels serve CPU tensors")
def test_needs_the_triton_step():
    model = network()
    optimizer = CondLRSGD(model, 0.1, tau=0.1, capturable=True)
    model(torch.randn(2, 7)).sum().backward()
    with pytest.raises(
        condlr_ext.errors.BackendError, match="capturable=True needs the Triton step: a tensor is on cpu"
    ):
        optimizer.step()


def test_the_steady_step_does_not_wait():
    """No code that runs at every step of CondLRSGD reads a value from the device."""
    waiting = {"item", "tolist", "cpu", "numpy", "nonzero", "equal", "synchronize", "isfinite"}
    for function in (
        CondLRSGD.step, CondLRSGD._step_layers, CondLRSGD._step_device, CondLRSGD._counts, CondLRSGD._step_others,
        CondLRSGD._step_dense, CondLRSGD._master, StepCall.is_valid_for, StepCall.run, StepCall.directions,
        StepCall.gradient, step_args._Marks.ask, step_args._Marks.have_come,
    ):  # fmt: skip
        calls = (
            n for n in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))) if isinstance(n, ast.Call)
        )
        names = {c.func.attr if isinstance(c.func, ast.Attribute) else getattr(c.func, "id", "") for c in calls}
        # it waits once, when momentum starts
        found = names & waiting - ({"nonzero", "tolist"} if function is CondLRSGD._step_device else set())
        assert not found, (function, found)
