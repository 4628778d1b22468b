"""CondLRAdamW: which step it takes, moments that a bad gradient does not touch, state, groups, capturable."""

import ast
import copy
import inspect
import math
import textwrap

import pytest
import torch
from helpers.matrices import kappa, non_orthonormality
from helpers.training import batches, make_model, train
from torch import nn

import condlr_ext
from condlr_ext import LowRankLinear
from condlr_ext.errors import NonFiniteError
from condlr_ext.optim import CondLRAdamW, param_groups
from condlr_ext.optim.adamw import AdamCall


def random_gradients(module, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def snapshot(optimizer):
    return copy.deepcopy(optimizer.state_dict()["state"])


def changed(before, after):
    """The parameters, by number, whose state differs."""
    return {i for i in before if any(not torch.equal(before[i][k], after[i][k]) for k in before[i])}


@pytest.mark.parametrize("tau", [0.0, 0.1, math.inf])
def test_learns_under_the_constraint(backend, tau):
    model = make_model()
    optimizer = CondLRAdamW(model, 0.01, tau=tau)
    losses = train(model, optimizer, batches(80))
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])
    for layer in (model[0], model[3]):
        assert kappa(layer.S) <= (1 + tau) * (1 + 5e-6)
        assert max(non_orthonormality(layer.U), non_orthonormality(layer.V)) <= 2e-6
    assert optimizer.skipped == 0 and isinstance(optimizer, torch.optim.Optimizer)


OPTIONS = [
    dict(),
    dict(amsgrad=True, weight_decay=0.1),
    dict(maximize=True, betas=(0.5, 0.9), eps=1e-3, weight_decay=0.0),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_step_is_the_projected_and_retracted_one_of_adamw(backend, options):
    """Bias and core are torch.optim.AdamW's, the factors qf(U - lr (I - UUᵀ) D), D from torch's own moments."""
    layer = LowRankLinear(9, 8, rank=3, dtype=torch.float64)
    twin = copy.deepcopy(layer)
    lr = 0.02
    ours = CondLRAdamW(layer, lr, **options, tau=math.inf)
    theirs = torch.optim.AdamW([twin.S, twin.bias], lr, **options)
    # what AdamW adds to a parameter that is 0, without decay, is -lr D
    directions = [torch.zeros_like(p) for p in (twin.U, twin.V)]
    adam = torch.optim.AdamW(directions, 1.0, **options | {"weight_decay": 0.0})
    for step in range(5):
        random_gradients(layer, step)
        twin.S.grad, twin.bias.grad = layer.S.grad.clone(), layer.bias.grad.clone()
        for D, X in zip(directions, (layer.U, layer.V), strict=True):
            D.zero_()
            D.grad = X.grad.clone()
        adam.step()
        with torch.no_grad():
            for D, X in zip(directions, (twin.U, twin.V), strict=True):
                Q, R = torch.linalg.qr(X + lr * (D - X @ (X.mT @ D)))
                X.copy_(Q * R.diagonal().sign())
        theirs.step()
        ours.step()
    for p, q in zip(layer.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


def test_an_ill_conditioned_core_does_not_spoil_the_directions_of_the_factors(backend):
    """There is no product with (SSᵀ)⁻¹, so float32 and float64 agree where kappa² is beyond float32."""
    moved = []
    for dtype in (torch.float32, torch.float64):
        layer = LowRankLinear(9, 8, rank=3, dtype=torch.float64)
        with torch.no_grad():
            layer.S.copy_(torch.diag(torch.tensor([1.0, 1e-3, 1e-5])))
            for X in (layer.U, layer.V):
                X.copy_(torch.linalg.qr(torch.arange(1.0, X.numel() + 1).double().sin().view(X.shape))[0])
        layer.to(dtype)
        optimizer = CondLRAdamW(layer, 0.01, tau=math.inf)
        random_gradients(layer, 0)
        optimizer.step()
        moved.append(layer.U.detach().double())
    torch.testing.assert_close(*moved, rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_dense_parameters_follow_torch_adamw_exactly(options):
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    twin = copy.deepcopy(dense)
    ours = CondLRAdamW(dense, 0.01, **options, tau=0.1)
    theirs = torch.optim.AdamW(twin.parameters(), 0.01, **options, fused=True)
    for step in range(5):
        for model, optimizer in ((dense, ours), (twin, theirs)):
            random_gradients(model, step)
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(dense.parameters(), twin.parameters(), strict=True))


def test_dense_gradients_of_another_layout_are_not_fused():
    conv = nn.Conv2d(3, 4, 2, bias=False)
    twin = copy.deepcopy(conv)
    ours, theirs = CondLRAdamW(conv, 0.1, tau=0.1), torch.optim.AdamW(twin.parameters(), 0.1)
    for _ in range(3):
        twin.weight.grad = torch.randn(4, 3, 2, 2)
        conv.weight.grad = twin.weight.grad.to(memory_format=torch.channels_last)
        ours.step(), theirs.step()
    torch.testing.assert_close(conv.weight, twin.weight, rtol=0, atol=1e-6)


def test_weight_decay_acts_on_the_core_and_not_on_the_factors():
    layers = [LowRankLinear(6, 5, rank=3, dtype=torch.float64) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    for layer, decay in zip(layers, (0.0, 0.5), strict=True):
        optimizer = CondLRAdamW(layer, 0.1, weight_decay=decay, tau=math.inf)
        random_gradients(layer, 0)
        before = layer.S.detach().clone()
        optimizer.step()
    assert torch.equal(layers[0].U, layers[1].U) and torch.equal(layers[0].V, layers[1].V)
    torch.testing.assert_close(layers[1].S, layers[0].S - 0.1 * 0.5 * before)


@pytest.mark.parametrize("first", [True, False], ids=["first step", "later step"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
def test_a_bad_gradient_leaves_the_layer_its_moments_and_its_step_count(backend, value, first):
    """1e30: its square, which belongs in the second moment, is not finite in float32."""
    model = make_model()
    optimizer = CondLRAdamW(model, 0.01, tau=0.1, amsgrad=True)
    if not first:
        train(model, optimizer, batches(2))
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.1)
    model[3].V.grad[1, 1] = value
    before, state = copy.deepcopy(model.state_dict()), snapshot(optimizer)
    optimizer.step()
    after = model.state_dict()
    assert {k for k in before if torch.equal(after[k], before[k])} == {k for k in before if k.startswith("3.")}
    assert optimizer.skipped == 1
    if first:
        new = snapshot(optimizer)
        assert all(not new[i][k].any() for i in (4, 5, 6, 7) for k in new[i])
        assert all(new[i]["step"] == 1 for i in (0, 1, 2, 3, 8, 9))
    else:
        assert changed(state, snapshot(optimizer)) == {0, 1, 2, 3, 8, 9}  # 4 to 7 are those of layer 3


def test_only_the_core_has_a_gradient(backend):
    """The factors are frozen: a bad gradient of the core is counted, a good one moves it alone."""
    layer = LowRankLinear(6, 5, rank=3)
    optimizer = CondLRAdamW(layer, 0.1, tau=0.2)
    layer.S.grad = torch.full_like(layer.S, math.nan)
    before = copy.deepcopy(layer.state_dict())
    optimizer.step()
    assert optimizer.skipped == 1 and torch.equal(layer.S, before["S"])
    layer.S.grad = torch.randn_like(layer.S)
    optimizer.step()
    assert optimizer.skipped == 1 and not torch.equal(layer.S, before["S"])
    assert torch.equal(layer.U, before["U"]) and torch.equal(layer.bias, before["bias"])


def test_check_finite_names_what_is_wrong():
    model = make_model()
    optimizer = CondLRAdamW(model, 0.1, tau=0.1, check_finite=True)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model[3].S.grad[0, 0] = math.nan
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        NonFiniteError, match="CondLRAdamW.step: the gradient of 3.S must be finite.*nothing was changed"
    ):
        optimizer.step()
    assert all(torch.equal(model.state_dict()[k], before[k]) for k in before)
    model[3].S.grad.fill_(1e30)
    with pytest.raises(NonFiniteError, match="CondLRAdamW.step: left unchanged.*'3'"):
        optimizer.step()


def test_state_is_that_of_torch_and_goes_both_ways():
    model = make_model()
    adamw = torch.optim.AdamW(model.named_parameters(), 0.02, amsgrad=True)
    train(model, adamw, batches(2))
    optimizer = CondLRAdamW(model, 0.1, tau=0.2)
    optimizer.load_state_dict(adamw.state_dict())
    group = optimizer.param_groups[0]
    assert (group["lr"], group["amsgrad"], group["tau"]) == (0.02, True, 0.2)
    train(model, optimizer, batches(2))
    state = optimizer.state_dict()
    assert set(state["state"][0]) == {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step"}
    assert all(s["step"] == 4 for s in state["state"].values())
    adamw.load_state_dict(state)
    train(model, adamw, batches(1))
    assert all(s["step"] == 5 for s in adamw.state.values())
    for s in state["state"].values():
        s["step"] = 7  # as old checkpoints have it
    optimizer.load_state_dict(state)
    train(model, optimizer, batches(1))
    assert all(s["step"] == 8 for s in optimizer.state_dict()["state"].values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_resume_is_bit_exact(backend, dtype, tmp_path):
    """Also through a file, with masters and moments in float32 where the parameters are not."""
    data = list(batches(8, dtype))

    def fresh(seed):
        model = make_model(seed, dtype)
        return model, CondLRAdamW(param_groups(model, factors={"lr": 0.002}), 0.01, tau=0.1, amsgrad=True)

    model, optimizer = fresh(0)
    train(model, optimizer, data[:4])
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "state.pt")
    expected = train(model, optimizer, data[4:])
    again, resumed = fresh(3)
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    assert train(again, resumed, data[4:]) == expected
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    state = resumed.state[again[3].U]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32
    U = state.get("master", again[3].U)
    assert U.dtype == torch.float32 and non_orthonormality(U) < 2e-6
    assert kappa(resumed.state[again[3].S].get("master", again[3].S)) <= 1.1 * (1 + 5e-6)


def test_pickle_and_deepcopy_keep_training():
    model = make_model()
    optimizer = CondLRAdamW(model, 0.01, tau=0.1, check_finite=True)
    data = list(batches(5))
    train(model, optimizer, data[:2])
    pair = copy.deepcopy((model, optimizer))
    assert pair[1].check_finite
    assert train(*pair, data[2:]) == train(model, optimizer, data[2:])


def test_arguments_of_the_step_are_kept_and_made_anew_when_something_changes():
    model = make_model()
    optimizer = CondLRAdamW(model, 0.01, tau=0.1)
    train(model, optimizer, batches(2))
    calls = optimizer._calls
    train(model, optimizer, batches(2))
    assert optimizer._calls is calls
    for change in ("moment", "amsgrad", "gradient", "dtype", "betas"):
        twin, other = copy.deepcopy((model, optimizer))
        other._calls_key = None  # what a step without any memory does
        for m, o in ((model, optimizer), (twin, other)):
            if change == "moment":
                o.state[m[0].U]["exp_avg"] = torch.ones_like(m[0].U)
            if change == "amsgrad":
                o.param_groups[0]["amsgrad"] = True
            if change == "betas":
                o.param_groups[0]["betas"] = (0.1, 0.2)
            if change == "dtype":
                m.double()
            for p in m.parameters():
                p.grad = torch.full_like(p, 0.1)
            if change == "gradient":
                m[0].V.grad = None
            o.step()
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True)), change
        assert optimizer.skipped == 0


def test_frozen_layers_stay_and_unfrozen_ones_start():
    model = make_model()
    model[0].requires_grad_(False)
    with torch.no_grad():
        model[0].S.copy_(torch.diag(torch.arange(1.0, 5.0)))
    before = [p.clone() for p in model[0].parameters()]
    optimizer = CondLRAdamW(model, 0.01, tau=0.1)
    train(model, optimizer, batches(2))
    assert all(torch.equal(p, q) for p, q in zip(model[0].parameters(), before, strict=True))
    model[0].requires_grad_()
    train(model, optimizer, batches(1))
    assert kappa(model[0].S) <= 1.1 * (1 + 5e-6)


def test_groups_by_role_and_added_groups_have_their_own_options():
    model, late = make_model(), LowRankLinear(3, 3, rank=2)
    groups = param_groups(model, factors={"lr": 0.0}, cores={"tau": 0.5, "betas": (0.0, 0.0)}, other={"amsgrad": True})
    optimizer = CondLRAdamW(groups, 0.01, weight_decay=0.0, tau=0.1)
    optimizer.add_param_group({"params": [(f"late.{n}", p) for n, p in late.named_parameters()], "tau": 0.0})
    U, S, tau = model[3].U.detach().clone(), model[3].S.detach().clone(), 0.5
    random_gradients(model, 0)
    random_gradients(late, 1)
    optimizer.step()
    assert (model[3].U - U).abs().max() < 1e-6
    assert "max_exp_avg_sq" in optimizer.state[model[3].bias] and "max_exp_avg_sq" not in optimizer.state[model[3].S]
    # betas of 0: D is the sign of the gradient
    trial = condlr_ext.linalg.clip_spectrum(S - 0.01 * model[3].S.grad.sign(), tau)
    torch.testing.assert_close(model[3].S.detach(), trial, rtol=0, atol=1e-6)
    assert kappa(late.S) <= 1 + 5e-6


@pytest.mark.parametrize("lr", [torch.tensor(0.01), torch.tensor([0.01])], ids=["no dimension", "one element"])
def test_tensor_lr_is_read_at_each_step(lr):
    finals = []
    for rate in (0.01, lr):
        model = make_model()
        optimizer = CondLRAdamW(model, rate, tau=0.1)
        train(model, optimizer, batches(2))
        if rate is lr:
            lr.fill_(0.03)
        else:
            optimizer.param_groups[0]["lr"] = 0.03
        train(model, optimizer, batches(2))
        finals.append([p.detach().clone() for p in model.parameters()])
    torch.testing.assert_close(*finals, rtol=0, atol=1e-6)


def test_sparse_gradients_are_refused_before_anything_changes():
    model = nn.ModuleDict({"low": LowRankLinear(4, 3, rank=2), "embed": nn.Embedding(9, 4, sparse=True)})
    optimizer = CondLRAdamW(model, 0.1, tau=0.1)
    model["low"](model["embed"](torch.tensor([1, 2]))).sum().backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="CondLRAdamW.step: takes no sparse gradients, got one for embed.weight"):
        optimizer.step()
    assert all(torch.equal(model.state_dict()[k], before[k]) for k in before)


def test_capturable_reads_options_on_the_device_and_builds_one_table(monkeypatch):
    """The same steps as with numbers; without a GPU the step op is told that Triton serves these tensors."""
    monkeypatch.setattr(condlr_ext.ops.step.step, "unsupported_reasons", lambda *args: [])
    finals = []
    for capturable in (False, True):
        model = nn.Sequential(LowRankLinear(7, 9, rank=3), LowRankLinear(9, 5, rank=4)).double()
        torch.manual_seed(0)
        for layer in model:
            layer.reset_parameters()
        options = {"lr": 0.01, "tau": 0.5, "weight_decay": 0.1}
        if capturable:
            options = {k: torch.tensor(v, dtype=torch.float64) for k, v in options.items()}
        optimizer = CondLRAdamW(model, **options, capturable=capturable)
        tables = set()
        for step in range(4):
            for name in options:
                if capturable:
                    options[name].mul_(0.5)
                else:
                    optimizer.param_groups[0][name] *= 0.5
            for layer in model:
                random_gradients(layer, step)
            optimizer.step()
            tables.add(id(optimizer._calls[0].table))
        assert not capturable or len(tables) == 1
        finals.append([p.detach().clone() for p in model.parameters()])
    torch.testing.assert_close(*finals, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="weight_decay may be a tensor under capturable=True in groups of low-rank"):
        CondLRAdamW(make_model(), weight_decay=torch.tensor(0.1), tau=0.1, capturable=True)
    with pytest.raises(ValueError, match="CondLRAdamW: check_finite=True waits"):
        CondLRAdamW(make_model(), tau=0.1, capturable=True, check_finite=True)


def test_the_steady_step_does_not_wait():
    """Nothing that runs at every step reads a value from the device; the rest is what CondLRSGD runs."""
    waiting = {"item", "tolist", "cpu", "numpy", "nonzero", "equal", "synchronize", "all", "any", "bool", "float"}
    for function in (AdamCall.directions, AdamCall.gradient, CondLRAdamW._step_dense, CondLRAdamW._moments):
        calls = (
            n for n in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))) if isinstance(n, ast.Call)
        )
        names = {c.func.attr if isinstance(c.func, ast.Attribute) else getattr(c.func, "id", "") for c in calls}
        # lost.float() is a cast, any() looks at dtypes
        allowed = {AdamCall.directions: {"float"}, CondLRAdamW._step_dense: {"any"}}.get(function, set())
        assert not names & waiting - allowed, function


model = make_model()


@pytest.mark.parametrize(
    "call,text",
    [
        (lambda: CondLRAdamW(model, -0.1, tau=0.1), "CondLRAdamW: lr must be finite and >= 0, got -0.1"),
        (lambda: CondLRAdamW(model, betas=(1.0, 0.9), tau=0.1), r"betas must be two numbers in \[0, 1\), got \(1.0, 0.9\)"),
        (lambda: CondLRAdamW(model, betas=(0.9,), tau=0.1), "betas must be two numbers"),
        (lambda: CondLRAdamW(model, eps=-1.0, tau=0.1), "eps must be finite and >= 0"),
        (lambda: CondLRAdamW(model, weight_decay=-1.0, tau=0.1), "weight_decay must be finite and >= 0"),
        (lambda: CondLRAdamW(model, tau=-1), "tau must be a number >= 0"),
    ],
)  # fmt: skip
def test_bad_input(call, text):
    with pytest.raises(ValueError, match=text):
        call()


@pytest.mark.parametrize("amsgrad", [False, True])
def test_factors_in_any_memory_layout_take_the_same_steps(amsgrad):
    """LAPACK's factors come column by column."""
    layers = [LowRankLinear(8, 6, rank=3, dtype=torch.float64) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    for name in "USV":
        p = getattr(layers[1], name)
        setattr(layers[1], name, nn.Parameter(p.detach().mT.contiguous().mT))
    assert not layers[1].U.is_contiguous()
    for layer in layers:
        optimizer = CondLRAdamW(layer, 0.1, tau=0.5, amsgrad=amsgrad)
        for seed in range(3):
            random_gradients(layer, seed)
            optimizer.step()
    torch.testing.assert_close(list(layers[1].parameters()), list(layers[0].parameters()))
