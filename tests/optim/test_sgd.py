"""CondLRSGD as a torch optimizer: groups, schedulers, resume, start, precision, errors; and that it learns."""

import copy
import itertools
import math
import pickle

import pytest
import torch
from helpers.matrices import kappa, non_orthonormality
from torch import nn
from torch.nn import functional as F

import condlr_ext
from condlr_ext import LowRankConv2d, LowRankLinear
from condlr_ext.errors import NonFiniteError
from condlr_ext.optim import CondLRAdamW, CondLRSGD, param_groups


def make_model(seed=0, dtype=None):
    torch.manual_seed(seed)
    return nn.Sequential(
        LowRankConv2d(1, 6, 3, padding=1, rank=4, dtype=dtype),
        nn.ReLU(),
        nn.Flatten(),
        LowRankLinear(6 * 16, 12, rank=5, dtype=dtype),
        nn.ReLU(),
        nn.Linear(12, 3, dtype=dtype),
    )


def batches(count, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        x = torch.randn(16, 1, 4, 4, generator=generator)
        yield x.to(dtype), x.flatten(1)[:, :3].argmax(1)


def train(model, optimizer, data, scheduler=None):
    losses = []
    for x, y in data:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        if scheduler:
            scheduler.step()
        losses.append(loss.item())
    return losses


def assert_constraint(model, tau, atol=2e-6):
    for module in model.modules():
        if isinstance(module, condlr_ext.nn.LowRankLayer):
            assert kappa(module.S) <= (1 + tau) * (1 + 5e-6)
            assert max(non_orthonormality(module.U), non_orthonormality(module.V)) <= atol


@pytest.mark.parametrize("tau", [0.0, 0.1, 0.5, math.inf])
def test_learns_under_the_constraint(backend, tau):
    model = make_model()
    optimizer = CondLRSGD(model, 0.2, 0.3, tau=tau)
    losses = train(model, optimizer, batches(150))
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])
    assert_constraint(model, tau)
    assert optimizer.skipped == 0 and isinstance(optimizer, torch.optim.Optimizer)


def test_backends_give_the_same_training():
    runs = []
    for name in ("reference", "cpu"):
        with condlr_ext.backend(name):
            model = make_model()
            runs.append(train(model, CondLRSGD(model, 0.1, 0.9, tau=0.1), batches(20)))
    assert runs[0] == pytest.approx(runs[1], rel=1e-4)


def test_start_puts_the_factors_on_the_constraint_set_without_changing_the_function():
    model = nn.Sequential(LowRankLinear(9, 8, rank=4, dtype=torch.float64))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p))
    weight = model[0].weight.detach().clone()
    CondLRSGD(model, 0.1, tau=math.inf)  # no bound: only the factors are made orthonormal
    assert max(non_orthonormality(model[0].U), non_orthonormality(model[0].V)) < 1e-13
    torch.testing.assert_close(model[0].weight, weight)
    CondLRSGD(model, 0.1, tau=0.2)
    assert kappa(model[0].S) <= 1.2 * (1 + 1e-12)
    S = model[0].S.detach().clone()
    CondLRSGD(model, 0.1, tau=0.2)
    assert torch.equal(model[0].S, S)  # already inside: a resumed model stays bit for bit
    CondLRSGD(model, 0.1, tau=0.2, sigma_max=0.5)
    assert torch.linalg.matrix_norm(model[0].S, 2) <= 0.5 * (1 + 1e-12)


def test_frozen_layers_are_not_touched():
    model = make_model()
    model[0].requires_grad_(False)
    with torch.no_grad():
        model[0].S.copy_(torch.diag(torch.arange(1.0, 5.0)))
    before = [p.clone() for p in model[0].parameters()]
    train(model, CondLRSGD(model, 0.1, 0.9, tau=0.0), batches(2))
    assert all(torch.equal(p, q) for p, q in zip(model[0].parameters(), before, strict=True))


def test_dense_parameters_follow_torch_sgd_exactly():
    options = dict(lr=0.1, momentum=0.9, dampening=0.0, weight_decay=0.01, nesterov=True)
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    twin = copy.deepcopy(dense)
    ours, theirs = CondLRSGD(dense, **options, tau=0.1), torch.optim.SGD(twin.parameters(), **options, fused=True)
    for _ in range(5):
        x = torch.randn(3, 4)
        for model, optimizer in ((dense, ours), (twin, theirs)):
            optimizer.zero_grad()
            model(x).pow(2).sum().backward()
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(dense.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("where", ["grad", "buffer"])
def test_memory_layouts_that_differ_are_not_fused(where):
    """torch's fused SGD walks raw memory: a channels_last gradient would be added to the wrong weights."""
    conv = nn.Conv2d(3, 4, 2, bias=False)
    twin = copy.deepcopy(conv)
    ours, theirs = CondLRSGD(conv, 0.1, 0.9, tau=0.1), torch.optim.SGD(twin.parameters(), 0.1, 0.9)
    for step in range(3):
        grad = torch.randn(4, 3, 2, 2)
        last = where == "grad" or step == 0  # the first gradient gives the buffer its strides
        conv.weight.grad = grad.to(memory_format=torch.channels_last) if last else grad
        twin.weight.grad = grad
        ours.step(), theirs.step()
    torch.testing.assert_close(conv.weight, twin.weight, rtol=0, atol=1e-6)


def test_arguments_of_the_step_are_kept_and_made_anew_when_something_changes():
    model = make_model()
    optimizer = CondLRSGD(model, 0.1, 0.9, tau=0.1)
    train(model, optimizer, batches(2))
    calls = optimizer._calls
    train(model, optimizer, batches(3))
    assert optimizer._calls is calls
    for change in ("buffer", "backend", "gradient", "momentum", "dtype"):
        twin, other = copy.deepcopy((model, optimizer))
        other._calls_key = None  # what a step without any memory does
        with condlr_ext.backend("reference" if change == "backend" else "auto"):
            for m, o in ((model, optimizer), (twin, other)):
                if change == "buffer":
                    o.state[m[0].U]["momentum_buffer"] = torch.ones_like(m[0].U)
                if change == "momentum":
                    o.param_groups[0]["momentum"] = 0.0
                if change == "dtype":
                    m.float() if m[0].U.dtype == torch.float64 else m.double()
                m.zero_grad()
                for p in m.parameters():
                    p.grad = torch.full_like(p, 0.1)
                if change == "gradient":
                    m[0].V.grad = None
                before = o._calls
                o.step()
                assert o._calls is not before
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True)), change


def test_a_step_makes_no_tensors_after_the_first():
    model = make_model()
    optimizer = CondLRSGD(model, 0.1, 0.9, tau=0.1)
    train(model, optimizer, batches(3))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        optimizer.step()
    events = profile.events()
    assert any("condlr_ext::step" in e.name for e in events)
    assert not [e for e in events if e.cpu_memory_usage > 0]


def test_bias_of_a_low_rank_layer_follows_torch_sgd(backend):
    layer = LowRankLinear(4, 3, rank=2)
    twin = nn.Parameter(layer.bias.detach().clone())
    options = dict(lr=0.1, momentum=0.9, dampening=0.1, weight_decay=0.01, maximize=True)
    ours, theirs = CondLRSGD(layer, **options, tau=0.1), torch.optim.SGD([twin], **options)
    for _ in range(4):
        for p in layer.parameters():
            p.grad = torch.randn_like(p)
        twin.grad = layer.bias.grad.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(layer.bias, twin)


SGD_OPTIONS = [
    dict(momentum=0.0, weight_decay=0.1),
    dict(momentum=0.9, dampening=0.3, weight_decay=0.1),
    dict(momentum=0.9, nesterov=True, weight_decay=0.1),
    dict(momentum=0.9, nesterov=True, maximize=True),
    dict(momentum=0.5, dampening=-0.5, maximize=True),
]


@pytest.mark.parametrize("options", SGD_OPTIONS, ids=str)
def test_core_follows_torch_sgd_and_the_factors_the_projected_direction(backend, options):
    """At tau = Inf: S is torch's, U is qf(U - lr (I - UUᵀ) D (SSᵀ + δ²)⁻¹) for the D that torch adds to a parameter."""
    layer = LowRankLinear(7, 6, rank=3, dtype=torch.float64)
    twin, lr = copy.deepcopy(layer), 0.02
    ours = CondLRSGD(layer, lr, **options, tau=math.inf)
    theirs = torch.optim.SGD([twin.S, twin.bias], lr, **options)
    directions = [torch.zeros_like(p) for p in (twin.U, twin.V)]
    sgd = torch.optim.SGD(directions, 1.0, **options | {"weight_decay": 0.0})
    for _ in range(5):
        for p, q in zip(layer.parameters(), twin.parameters(), strict=True):
            p.grad, q.grad = (torch.randn_like(p),) * 2
        for D, X in zip(directions, (layer.U, layer.V), strict=True):
            D.zero_()
            D.grad = X.grad.clone()
        sgd.step()  # adds -D to 0
        S = twin.S.detach()
        with torch.no_grad():
            for D, X, core in zip(directions, (twin.U, twin.V), (S, S.mT), strict=True):
                gram = core @ core.mT
                gram.diagonal().add_((1e-6 * torch.linalg.matrix_norm(core, 2)) ** 2)
                xi = (D - X @ (X.mT @ D)) @ torch.linalg.inv(gram)
                Q, R = torch.linalg.qr(X + lr * xi)
                X.copy_(Q * R.diagonal().sign())
        theirs.step()
        ours.step()
    for p, q in zip(layer.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-11)


def test_autograd_notices_a_step_between_forward_and_backward(backend):
    model = nn.Sequential(LowRankLinear(4, 4, rank=2), nn.Tanh(), LowRankLinear(4, 4, rank=2))
    optimizer = CondLRSGD(model, 0.1, tau=0.1)
    loss = model(torch.randn(3, 4)).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_closure_and_state_dict_keys():
    model = make_model()
    optimizer = CondLRSGD(model, 0.1, 0.9, tau=0.1)
    x, y = next(iter(batches(1)))

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert first.item() > optimizer.step(closure).item()
    assert set(optimizer.state_dict()["state"][0]) == {"momentum_buffer"}


@pytest.mark.parametrize("order", ["optimizer last", "optimizer first"])
def test_resume_is_bit_exact(backend, order, tmp_path):
    def fresh():
        model = make_model(seed=5)
        optimizer = CondLRSGD(param_groups(model, factors={"lr": 0.05}), 0.1, 0.9, tau=0.1, sigma_max=2.0)
        return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)

    data = list(batches(12))
    model, optimizer, scheduler = fresh()
    train(model, optimizer, data[:6], scheduler)
    path = tmp_path / "state.pt"
    torch.save(
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
        },
        path,
    )
    expected = train(model, optimizer, data[6:], scheduler)

    saved = torch.load(path, weights_only=True)
    if order == "optimizer last":
        again = make_model(seed=9)
        again.load_state_dict(saved["model"])
        resumed = CondLRSGD(param_groups(again, factors={"lr": 0.05}), 0.1, 0.9, tau=0.1, sigma_max=2.0)
        plan = torch.optim.lr_scheduler.StepLR(resumed, 3, 0.5)
    else:
        again, resumed, plan = fresh()
        again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    plan.load_state_dict(saved["scheduler"])
    assert train(again, resumed, data[6:], plan) == expected
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


def test_pickle_and_deepcopy_keep_training():
    model = make_model()
    optimizer = CondLRSGD(model, 0.1, 0.9, tau=0.1)
    data = list(batches(6))
    train(model, optimizer, data[:3])
    pair = copy.deepcopy((model, optimizer))
    assert train(*pair, data[3:]) == train(model, optimizer, data[3:])


def test_groups_by_role_have_their_own_options():
    model = make_model()
    groups = param_groups(model, factors={"lr": 0.0}, cores={"tau": 0.5, "lr": 1.0}, other={"weight_decay": 0.1})
    assert [set(g["roles"]) for g in groups] == [{"U", "V"}, {"S"}, {"other"}]
    optimizer = CondLRSGD(groups, 0.1, tau=0.1)
    U = model[3].U.detach().clone()
    train(model, optimizer, batches(30))
    assert non_orthonormality(model[3].U) < 2e-6 and (model[3].U - U).abs().max() < 1e-6
    assert kappa(model[3].S) > 1.11 and kappa(model[3].S) <= 1.5 * (1 + 5e-6)


def test_scheduler_and_tensor_lr_are_read_at_each_step():
    model = make_model()
    optimizer = CondLRSGD(model, torch.tensor(0.1), tau=0.1)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2], gamma=0.0)
    data = list(batches(4))
    train(model, optimizer, data[:2], scheduler)
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, data[2:], scheduler)
    for p, q in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


def test_add_param_group():
    model = make_model()
    late = nn.Sequential(LowRankLinear(3, 3, rank=2))
    late[0].S.data = torch.diag(torch.tensor([5.0, 1.0]))
    optimizer = CondLRSGD(model, 0.1, tau=0.1)
    optimizer.add_param_group({"params": [(f"late.{n}", p) for n, p in late.named_parameters()], "tau": 0.3})
    assert kappa(late[0].S) == pytest.approx(1.3, rel=1e-5)
    with pytest.raises(ValueError, match="layer 'x' has U in the parameter groups but not S, V"):
        optimizer.add_param_group({"params": [("x.U", nn.Parameter(torch.randn(4, 2)))]})
    assert len(optimizer.param_groups) == 2
    train(model, optimizer, batches(2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_parameters_have_float32_masters(dtype):
    model = make_model(dtype=dtype)
    optimizer = CondLRSGD(model, 0.1, 0.5, tau=0.1)
    data = list(batches(8, dtype))
    train(model, optimizer, data[:4])
    for module in (model[0], model[3]):
        U, S = (optimizer.state[p]["master"] for p in (module.U, module.S))
        assert U.dtype == torch.float32 and non_orthonormality(U) < 2e-6 and kappa(S) <= 1.1 * (1 + 5e-6)
        assert torch.equal(module.U, U.to(dtype))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    expected = train(model, optimizer, data[4:])
    again = make_model(seed=3, dtype=dtype)
    resumed = CondLRSGD(again, 0.1, 0.5, tau=0.1)
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    assert train(again, resumed, data[4:]) == expected


def test_non_finite_gradient_is_counted_or_raised():
    model = make_model()
    optimizer = CondLRSGD(model, 0.1, 0.9, tau=0.1)
    train(model, optimizer, batches(1))
    before = copy.deepcopy(model.state_dict())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model[3].S.grad[0, 0] = math.nan
    optimizer.step()
    after = model.state_dict()
    assert all(torch.equal(after[k], before[k]) == k.startswith("3.") for k in before)
    assert optimizer.skipped == 1

    strict = CondLRSGD(model, 0.1, 0.9, tau=0.1, check_finite=True)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NonFiniteError, match="the gradient of 3.S must be finite.*nothing was changed"):
        strict.step()
    assert all(torch.equal(model.state_dict()[k], before[k]) for k in before)
    model[3].S.grad.zero_()
    with torch.no_grad():
        model[3].S.zero_()
    with pytest.raises(NonFiniteError, match="left unchanged, because the core is zero.*'3'"):
        strict.step()


def test_grad_scaler_skips_the_step():
    model = make_model()
    optimizer = CondLRSGD(model, 0.1, tau=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    ((x, y),) = batches(1)
    for poison in (True, False):
        before = copy.deepcopy(model.state_dict())
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        if poison:
            model[5].weight.grad[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update()
        same = all(torch.equal(model.state_dict()[k], before[k]) for k in before)
        assert same == poison


def test_parameters_without_gradients_and_clipping():
    model = make_model()
    optimizer = CondLRSGD(model, 0.1, tau=0.1)
    optimizer.step()  # nothing has a gradient
    F.cross_entropy(model(next(iter(batches(1)))[0]), torch.zeros(16, dtype=torch.long)).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    assert_constraint(model, 0.1)


def test_meta_model_can_have_an_optimizer():
    optimizer = CondLRSGD(nn.Sequential(LowRankLinear(5, 4, rank=2, device="meta")), 0.1, tau=0.1)
    assert (
        optimizer.param_groups[0]["roles"] == ["U", "S", "V", "other"]
        and optimizer.param_groups[0]["params"][0].is_meta
    )


def test_two_models_need_different_names():
    a, b = (nn.Sequential(LowRankLinear(4, 4, rank=2)) for _ in range(2))
    optimizer = CondLRSGD(a, 0.1, tau=0.1)
    with pytest.raises(ValueError, match="two parameters are called '0.U'; give those of a second model a prefix"):
        optimizer.add_param_group({"params": list(b.named_parameters())})
    for p in (*a.parameters(), *b.parameters()):
        p.grad = torch.randn_like(p)
    optimizer.add_param_group({"params": [(f"b.{n}", p) for n, p in b.named_parameters()]})
    for _ in range(3):
        optimizer.step()
    assert_constraint(a, 0.1)
    assert_constraint(b, 0.1)


def from_meta():
    layer = LowRankLinear(5, 4, rank=2, device="meta").to_empty(device="cpu")
    layer.reset_parameters()
    return layer


def assigned():
    layer = LowRankLinear(5, 4, rank=2)
    layer.load_state_dict({name: torch.ones_like(p) for name, p in layer.state_dict().items()}, assign=True)
    return layer


@pytest.mark.parametrize(
    "pick", ["reversed", "one", "two groups", "deep copy", "off the meta device", "assigned", "roles without names"]
)
def test_bare_factors_are_refused(pick):
    layer = copy.deepcopy(LowRankLinear(5, 4, rank=2))
    with torch.no_grad():
        layer.U.add_(0.1)  # trained by something else: no longer orthonormal
    U, S, V, _ = layer.parameters()
    others = [copy.deepcopy(layer), from_meta(), assigned()]
    groups = {
        "reversed": [V, S, U],
        "one": [V],
        "two groups": [{"params": [U, V]}, {"params": [S]}],
        "deep copy": others[0].parameters(),
        "off the meta device": others[1].parameters(),
        "assigned": others[2].parameters(),
        "roles without names": [{"params": [nn.Parameter(torch.ones(2, 2))], "roles": ["S"]}],
    }[pick]
    with pytest.raises(ValueError, match="need their names"):
        CondLRSGD(groups, 0.1, tau=0.1)


def test_roles_that_do_not_fit_are_named():
    layer = LowRankLinear(5, 4, rank=2)
    named = [(f"e_{n}", p) for n, p in layer.named_parameters()]
    with pytest.raises(ValueError, match="parameter 'e_U' has the role 'U'; the name of such a factor ends in 'U'"):
        CondLRSGD([{"params": named, "roles": ["U", "S", "V", "other"]}], 0.1, tau=0.1)
    with pytest.raises(ValueError, match='roles must name "U", "S", "V" or "other" for each of 4 parameters'):
        CondLRSGD([{"params": list(layer.named_parameters()), "roles": ["U"]}], 0.1, tau=0.1)
    square = [(n, nn.Parameter(torch.ones(3, k))) for n, k in (("U", 3), ("S", 2), ("V", 4))]
    with pytest.raises(ValueError, match=r"layer '' must have U \[m, r\], S \[r, r\], V \[n, r\], got S \[3, 2\]"):
        CondLRSGD([{"params": square, "roles": ["U", "S", "V"]}], 0.1, tau=0.1)
    with pytest.raises(ValueError, match="tau belong in cores, got them in factors"):
        param_groups(layer, factors={"tau": 0.1})


def test_a_module_with_foreign_factors_is_told_apart_by_its_layers():
    class Cell(nn.Module):
        def __init__(self):
            super().__init__()
            self.U, self.S, self.V = (nn.Parameter(torch.randn(3, 3)) for _ in range(3))
            self.low = LowRankLinear(3, 3, rank=2)

    cell = Cell()
    before = cell.U.detach().clone()
    optimizer = CondLRSGD(cell, 0.1, tau=0.1)
    assert torch.equal(cell.U, before) and optimizer.param_groups[0]["roles"].count("U") == 1


def test_options_survive_pickle_and_deepcopy():
    model = make_model()
    optimizer = CondLRSGD(model, 0.1, 0.9, tau=0.1, check_finite=True)
    train(model, optimizer, batches(1))
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert twin.check_finite and twin.skipped == 0
        for group in twin.param_groups:
            for p in group["params"]:
                p.grad = torch.full_like(p, math.nan)
        with pytest.raises(NonFiniteError):
            twin.step()


def test_weights_loaded_after_construction_reach_the_masters():
    model, other = make_model(dtype=torch.bfloat16), make_model(seed=4, dtype=torch.bfloat16)
    optimizer = CondLRSGD(model, 0.0, tau=0.1)
    CondLRSGD(other, 0.0, tau=0.1)
    model.load_state_dict(other.state_dict())
    train(model, optimizer, batches(1, torch.bfloat16))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0.02)


def test_masters_and_momentum_are_restored_in_float32():
    model = make_model(dtype=torch.bfloat16)
    optimizer = CondLRSGD(model, 0.1, 0.5, tau=0.1)
    train(model, optimizer, batches(3, torch.bfloat16))
    again = copy.deepcopy(model)
    resumed = CondLRSGD(again, 0.1, 0.5, tau=0.1)
    resumed.load_state_dict(optimizer.state_dict())
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        for key in optimizer.state[p]:
            assert torch.equal(optimizer.state[p][key], resumed.state[q][key])
            assert optimizer.state[p][key].dtype == resumed.state[q][key].dtype
    assert optimizer.state[model[0].U]["momentum_buffer"].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cls", [CondLRSGD, CondLRAdamW])
def test_low_precision_resumes_bit_for_bit_in_any_order(cls, dtype):
    """What an optimizer made on the rounded model changes of it must not be taken for an edit by the user."""
    options = {"momentum": 0.5} if cls is CondLRSGD else {"eps": 1e-4}
    data = list(batches(6, dtype))
    model = make_model(dtype=dtype)
    optimizer = cls(model, 0.01, tau=0.1, **options)
    train(model, optimizer, data[:3])
    weights, state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, data[3:])
    for order in itertools.permutations(["optimizer", "weights", "state"]):
        if order.index("optimizer") > order.index("state"):
            continue
        again = make_model(seed=3, dtype=dtype)
        for what in order:
            if what == "optimizer":
                resumed = cls(again, 0.01, tau=0.1, **options)
            elif what == "weights":
                again.load_state_dict(weights)
            else:
                resumed.load_state_dict(copy.deepcopy(state))  # torch takes tensors over as they are
        train(again, resumed, data[3:])
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True)), order


def test_float32_momentum_goes_with_a_model_made_double():
    model = make_model()
    optimizer = CondLRSGD(model, 0.1, 0.5, tau=0.1)
    train(model, optimizer, batches(2))
    model.double()
    train(model, optimizer, batches(2, torch.float64))
    assert optimizer.state[model[3].S]["momentum_buffer"].dtype == torch.float64 and optimizer.skipped == 0


def test_singular_core_loaded_after_construction_trains_again(backend):
    model = nn.Sequential(LowRankLinear(6, 5, rank=3))
    optimizer = CondLRSGD(model, 0.01, tau=0.1)
    with torch.no_grad():
        model[0].S.copy_(torch.diag(torch.tensor([1.0, 0.5, 0.0])))
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert optimizer.skipped == 0
    assert_constraint(model, 0.1)


def test_a_zero_core_is_named():
    model = nn.Sequential(LowRankLinear(6, 5, rank=3))
    with torch.no_grad():
        model[0].S.zero_()
    with pytest.warns(UserWarning, match="CondLRSGD: the core of layer '0' is zero"):
        CondLRSGD(model, 0.1, tau=0.1)


def test_frozen_factors_keep_their_values():
    layer = LowRankLinear(6, 5, rank=3)
    layer.S.requires_grad_(False)
    before = layer.S.clone()
    optimizer = CondLRSGD(layer, 0.1, tau=0.1)
    layer(torch.randn(4, 6)).square().sum().backward()
    optimizer.step()
    assert torch.equal(layer.S, before) and non_orthonormality(layer.U) < 2e-6
    with torch.no_grad():
        layer.S.copy_(torch.diag(torch.tensor([3.0, 2.0, 1.0])))
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match="S of layer '' is frozen and the layer not on the constraint set"):
        CondLRSGD(layer, 0.1, tau=0.1)
    assert all(torch.equal(before[name], p) for name, p in layer.state_dict().items())
    CondLRSGD(layer, 0.1, tau=2.0)
    layer.bfloat16()
    before = layer.S.clone()
    CondLRSGD(layer, 0.1, tau=2.0)  # what rounding takes off the set is no reason
    assert torch.equal(layer.S, before)


def test_a_layer_unfrozen_later_starts_on_the_constraint_set():
    layer = LowRankLinear(6, 5, rank=3, dtype=torch.float64).requires_grad_(False)
    with torch.no_grad():
        layer.U.copy_(torch.randn_like(layer.U))
    weight = layer.weight.clone()
    optimizer = CondLRSGD(layer, 0.0, tau=math.inf)
    layer.requires_grad_()
    for p in layer.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    torch.testing.assert_close(layer.weight, weight)
    assert non_orthonormality(layer.U) < 1e-13


def test_a_skipped_first_step_does_not_start_the_momentum(backend):
    layer = LowRankLinear(4, 3, rank=2)
    twin = nn.Parameter(layer.bias.detach().clone())
    options = dict(lr=0.1, momentum=0.9, dampening=0.5)
    ours, theirs = CondLRSGD(layer, **options, tau=0.1), torch.optim.SGD([twin], **options)
    for p in layer.parameters():
        p.grad = torch.randn_like(p)
    good = layer.S.grad.clone()
    layer.S.grad = good * math.nan
    ours.step()
    assert ours.skipped == 1 and "momentum_buffer" not in ours.state[layer.bias]
    layer.S.grad, twin.grad = good, layer.bias.grad.clone()
    ours.step()
    theirs.step()
    torch.testing.assert_close(layer.bias, twin)


def test_skipped_counts_also_when_some_layers_have_no_gradient():
    model = make_model()
    optimizer = CondLRSGD(model, 0.1, 0.9, tau=0.1)
    for p in model[3].parameters():
        p.grad = torch.full_like(p, math.nan)
    optimizer.step()
    late = LowRankLinear(3, 3, rank=2)
    optimizer.add_param_group({"params": [(f"late.{n}", p) for n, p in late.named_parameters()]})
    optimizer.step()
    assert optimizer.skipped == 2


def test_check_finite_takes_sparse_gradients():
    model = nn.ModuleDict({"embed": nn.Embedding(9, 4, sparse=True), "low": LowRankLinear(4, 3, rank=2)})
    optimizer = CondLRSGD(model, 0.1, tau=0.1, check_finite=True)
    for poison in (False, True):
        optimizer.zero_grad()
        (model["low"](model["embed"](torch.tensor([1, 2]))).sum() * (math.nan if poison else 1)).backward()
        if poison:
            with pytest.raises(NonFiniteError, match="gradient of embed.weight"):
                optimizer.step()
        else:
            optimizer.step()


def test_state_of_torch_sgd_can_be_loaded():
    model = make_model()
    sgd = torch.optim.SGD(model.named_parameters(), 0.05, 0.9)
    train(model, sgd, batches(2))
    optimizer = CondLRSGD(model, 0.1, 0.5, tau=0.2)
    optimizer.load_state_dict(sgd.state_dict())
    group = optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], group["tau"]) == (0.05, 0.9, 0.2)
    train(model, optimizer, batches(2))
    broken = optimizer.state_dict()
    broken["param_groups"][0]["tau"] = -1
    with pytest.raises(ValueError, match="tau must be a number >= 0"):
        optimizer.load_state_dict(broken)
    assert optimizer.param_groups[0]["tau"] == 0.2


def test_sparse_gradients_are_for_dense_parameters_alone():
    model = nn.ModuleDict({"embed": nn.Embedding(9, 4, sparse=True), "low": LowRankLinear(4, 3, rank=2)})
    optimizer = CondLRSGD(model, 0.1, tau=0.1)
    model["low"](model["embed"](torch.tensor([1, 2]))).sum().backward()
    model["low"].U.grad = model["low"].U.grad.to_sparse()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="takes no sparse gradients for low-rank layers, got one for low.U"):
        optimizer.step()
    assert all(torch.equal(model.state_dict()[k], before[k]) for k in before)


def test_momentum_changed_in_place_is_read():
    model = make_model()
    optimizer = CondLRSGD(model, 0.1, torch.tensor(0.9), tau=0.1)
    train(model, optimizer, batches(1))
    optimizer.param_groups[0]["momentum"].fill_(0.25)
    train(model, optimizer, batches(1))
    assert (optimizer._calls[0].table[..., 1] == 0.25).all()


def test_foreign_parameters_named_like_factors():
    class Cell(nn.Module):
        def __init__(self):
            super().__init__()
            self.U, self.S, self.V = (nn.Parameter(torch.randn(3, k)) for k in (3, 2, 4))

    cell = Cell()  # no U S Vᵀ: the shapes do not fit
    for source in (cell, cell.named_parameters()):
        optimizer = CondLRSGD(source, 0.1, tau=0.1)
        assert optimizer.param_groups[0]["roles"] == ["other"] * 3


model = make_model()


def nan_core():
    broken = make_model()
    broken[3].S.data[1, 1] = math.nan
    return broken


@pytest.mark.parametrize(
    "call,error,text",
    [
        (lambda: CondLRSGD(model, -0.1, tau=0.1), ValueError, "lr must be finite and >= 0, got -0.1"),
        (lambda: CondLRSGD(model, math.nan, tau=0.1), ValueError, "lr must be finite and >= 0, got nan"),
        (lambda: CondLRSGD(model, 0.1, -1, tau=0.1), ValueError, "momentum must be finite and >= 0"),
        (lambda: CondLRSGD(model, 0.1, weight_decay=-1, tau=0.1), ValueError, "weight_decay must be finite and >= 0"),
        (lambda: CondLRSGD(model, 0.1, nesterov=True, tau=0.1), ValueError, "nesterov needs momentum > 0 and dampening 0"),
        (lambda: CondLRSGD(model, 0.1, tau=-0.5), ValueError, "tau must be a number >= 0 .* got -0.5"),
        (lambda: CondLRSGD(model, 0.1, tau=0.1, band="max"), ValueError, "band must be one of"),
        (lambda: CondLRSGD(model, 0.1, tau=0.1, sigma_max=-1), ValueError, "sigma_max must be None or a number > 0"),
        (lambda: CondLRSGD(model.parameters(), 0.1, tau=0.1), ValueError, "need their names: pass the model"),
        (lambda: CondLRSGD([(n, p) for n, p in model.named_parameters() if n != "3.V"], 0.1, tau=0.1), ValueError, "layer '3' has S, U .* but not V"),
        (lambda: CondLRSGD(nan_core(), 0.1, tau=0.1), NonFiniteError, "S of layer '3' must be finite, got NaN or Inf"),
        (lambda: CondLRSGD([], 0.1, tau=0.1), ValueError, "empty parameter list"),
    ],
)  # fmt: skip
def test_bad_input(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_state_of_another_model_is_refused():
    a = CondLRSGD(make_model(), 0.1, tau=0.1)
    b = CondLRSGD(nn.Sequential(*list(make_model().children())[:-1], nn.Sequential(nn.Linear(12, 3))), 0.1, tau=0.1)
    with pytest.raises(
        ValueError,
        match="group 0 holds parameter '5.weight' in the state where the optimizer has '5.0.weight'",
    ):
        b.load_state_dict(a.state_dict())


@pytest.mark.parametrize("cls", [CondLRSGD, CondLRAdamW])
def test_state_of_another_rank_is_refused(cls):
    a, b = (LowRankLinear(20, 30, rank=rank) for rank in (5, 6))
    options = {"momentum": 0.9} if cls is CondLRSGD else {}
    optimizer, other = (cls(layer, 0.1, tau=0.1, **options) for layer in (a, b))
    a(torch.randn(4, 20)).sum().backward()
    optimizer.step()
    text = rf"{cls.__name__}.load_state_dict: .* of U must be \[30, 6\] as the parameter is, got \[30, 5\]"
    with pytest.raises(ValueError, match=text):
        other.load_state_dict(optimizer.state_dict())
    assert not other.state_dict()["state"]
