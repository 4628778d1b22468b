"""Training scripts as people have them, with each of the optimizers: schedulers, AMP, accumulation, trainers' calls."""

import copy
import math

import pytest
import torch
from helpers.matrices import kappa, non_orthonormality
from helpers.models import MODELS, example_input
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler

import condlr_ext
from condlr_ext.optim import CondLRAdamW, CondLRSGD, Projector, param_groups

TAU = 0.2


def projected(optimizer, model, tau=TAU, **options):
    Projector(model, tau, **options).attach(optimizer)
    return optimizer


OPTIMIZERS = {
    "CondLRSGD": lambda m: CondLRSGD(m, 0.05, 0.9, tau=TAU),
    "CondLRAdamW": lambda m: CondLRAdamW(m, 0.003, tau=TAU),
    "SGD and Projector": lambda m: projected(torch.optim.SGD(m.parameters(), 0.02, 0.9), m),
    "AdamW and Projector": lambda m: projected(torch.optim.AdamW(m.parameters(), 0.003, fused=True), m),
}
each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def build(kind, seed=0):
    torch.manual_seed(seed)
    model = MODELS[kind]()
    condlr_ext.factorize(model, budget=0.5, exclude=["fc"] if kind == "resnet" else ["head"])
    return model


def data(kind, count, batch=8, dtype=torch.float32):
    """Batches of two classes that differ by their mean."""
    torch.manual_seed(1)
    for _ in range(count):
        y = torch.arange(batch) % 2
        yield example_input(kind, batch, dtype) + 0.5 * y.view(-1, *[1] * (2 if kind == "encoder" else 3)), y


def layers_of(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, condlr_ext.nn.LowRankLayer)}


def assert_constraint(model, tau=TAU):
    for name, layer in layers_of(model).items():
        assert kappa(layer.S) <= (1 + tau) * (1 + 5e-6), name
        assert max(non_orthonormality(layer.U), non_orthonormality(layer.V)) <= 2e-6, name


def backward(model, x, y):
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    return loss


def train(model, optimizer, batches):
    losses = []
    for x, y in batches:
        optimizer.zero_grad()
        losses.append(backward(model, x, y).item())
        optimizer.step()
    return losses


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@each_optimizer
@pytest.mark.parametrize("kind", ["resnet", "vit", "encoder"])
def test_networks_learn_under_the_constraint(kind, name):
    model = build(kind)
    optimizer = OPTIMIZERS[name](model)
    assert_constraint(model)
    losses = train(model, optimizer, data(kind, 20))
    assert sum(losses[-4:]) < 0.5 * sum(losses[:4])
    assert_constraint(model)


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4], 0.1),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 5, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2, base_momentum=0.5, max_momentum=0.9),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=8),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(o, 4)], milestones=[3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=0.01, anneal_epochs=3),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@each_optimizer
def test_every_scheduler_does_what_it_does_to_torchs_optimizer(name, scheduler):
    """The bias of a low-rank layer goes the way it goes beside it in torch's own optimizer under the same schedule."""
    layer = condlr_ext.LowRankLinear(5, 4, rank=2)
    bias = nn.Parameter(layer.bias.detach().clone())
    adam = "Adam" in name
    optimizer = OPTIMIZERS[name](layer)
    twin = torch.optim.AdamW([bias], 0.003) if adam else torch.optim.SGD([bias], 0.05, 0.9)
    twin.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"]
    plans = [SCHEDULERS[scheduler](o) for o in (optimizer, twin)]
    seen = []
    for step in range(7):
        for p in layer.parameters():
            p.grad = torch.sin(torch.arange(float(p.numel())) + step).view_as(p)
        bias.grad = layer.bias.grad.clone()
        for o, plan in zip((optimizer, twin), plans, strict=True):
            o.step()
            plan.step(*([1.0] if scheduler == "ReduceLROnPlateau" else []))
        groups = [o.param_groups[0] for o in (optimizer, twin)]
        assert groups[0]["lr"] == groups[1]["lr"]
        assert groups[0].get("betas", groups[0].get("momentum")) == groups[1].get("betas", groups[1].get("momentum"))
        seen.append(groups[0]["lr"])
        torch.testing.assert_close(layer.bias, bias, rtol=0, atol=1e-6)
        assert kappa(layer.S) <= (1 + TAU) * (1 + 5e-6)
    assert len(set(seen)) > 1
    state = plans[0].state_dict()
    plans[0].load_state_dict(copy.deepcopy(state))
    assert plans[0].get_last_lr() == [optimizer.param_groups[0]["lr"]]


@pytest.mark.parametrize("name", ["CondLRSGD", "CondLRAdamW", "Projector"])
def test_constraint_is_scheduled_by_the_groups_after_a_free_warm_up(name):
    """tau = Inf, then a bound that tightens and a cap, at the next step each; the learning rate warms up meanwhile."""
    model = build("vit")
    groups = param_groups(model, cores={"tau": math.inf})
    if name == "Projector":
        optimizer = projected(torch.optim.SGD(groups, 0.05), model, tau=0.3)
    else:
        optimizer = {"CondLRSGD": CondLRSGD, "CondLRAdamW": CondLRAdamW}[name](groups, 0.01, tau=0.3)
    cores = next(g for g in optimizer.param_groups if "S" in g["roles"])
    warm_up = lr_scheduler.LinearLR(optimizer, 0.01, total_iters=4)
    for step, (x, y) in enumerate(data("vit", 8)):
        if step == 4:
            assert max(kappa(layer.S) for layer in layers_of(model).values()) > 1.5
        if step >= 4:
            cores["tau"] = 0.5 / (step - 3)
        if step == 6:
            cores["band"], cores["sigma_max"] = "optimal", 0.4
        train(model, optimizer, [(x, y)])
        warm_up.step()
        assert_constraint(model, cores["tau"])
        if step >= 6:
            norms = [torch.linalg.matrix_norm(layer.S.detach(), 2) for layer in layers_of(model).values()]
            assert max(norms) == pytest.approx(0.4, rel=1e-5)  # it was above


@each_optimizer
def test_grad_scaler_with_clipping_and_a_skipped_step(name):
    """The scale is a power of two, so the scaled run is the plain one bit for bit; Inf in a gradient skips a step."""
    runs = []
    for scaled in (False, True):
        model = build("vit")
        optimizer = OPTIMIZERS[name](model)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
        losses = []
        for step, (x, y) in enumerate(data("vit", 6)):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            scaler.scale(loss).backward()
            if step == 3:
                if not scaled:
                    continue
                model.blocks[0].mlp[0].U.grad[0, 0] = math.inf
            before, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict()["state"])
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            assert step == 3 or norm > 0.5
            scaler.step(optimizer)
            scaler.update()
            if step == 3:
                assert same(model, before) and scaler.get_scale() == 2.0**9
                after = optimizer.state_dict()["state"]
                assert all(torch.equal(state[i][k], after[i][k]) for i in state for k in state[i])
            losses.append(loss.item())
        runs.append([v for step, v in enumerate(losses) if not (scaled and step == 3)])
        assert_constraint(model)
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)


@each_optimizer
def test_autocast_in_the_forward_pass(name):
    """The factorizations are in float32: the bound holds to its rounding, not to bfloat16's."""
    model = build("encoder")
    optimizer = OPTIMIZERS[name](model)
    losses = []
    for x, y in data("encoder", 15):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])
    assert_constraint(model)


@each_optimizer
@pytest.mark.parametrize("kind", ["vit", "encoder"])
def test_accumulated_gradients_are_those_of_the_large_batch(kind, name):
    finals = []
    for parts in (1, 4):
        model = build(kind).double()
        optimizer = OPTIMIZERS[name](model)
        for x, y in data(kind, 3, dtype=torch.float64):
            optimizer.zero_grad()
            for piece, labels in zip(x.chunk(parts), y.chunk(parts), strict=True):
                (F.cross_entropy(model(piece), labels) / parts).backward()
            optimizer.step()
        finals.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*finals, rtol=0, atol=1e-9)


@each_optimizer
def test_calls_of_lightning(name):
    """step(closure=...) that does everything, toggled parameters, state moved between devices entry by entry."""
    model, twin = build("encoder"), build("encoder")
    optimizer, plain = OPTIMIZERS[name](model), OPTIMIZERS[name](twin)
    batches = list(data("encoder", 4))
    for x, y in batches:
        toggled = [p for p in model.parameters() if p.requires_grad]
        for p in toggled:
            p.requires_grad_(False)
        for p in (p for g in optimizer.param_groups for p in g["params"]):
            p.requires_grad_(True)

        def closure(x=x, y=y):
            optimizer.zero_grad(set_to_none=True)
            return backward(model, x, y)

        assert isinstance(optimizer.step(closure=closure), torch.Tensor)
        for p, state in optimizer.state.items():
            optimizer.state[p] = {k: v.to("cpu") if isinstance(v, torch.Tensor) else v for k, v in state.items()}
    train(twin, plain, batches)
    assert isinstance(optimizer, torch.optim.Optimizer) and same(model, twin)
    assert optimizer.defaults["lr"] == plain.param_groups[0]["lr"]
    assert name.split()[0] in repr(optimizer)


@each_optimizer
def test_calls_of_the_hf_trainer(name):
    """Its wrapper loads the state of the fresh optimizer at once and wraps step while it is called; zero_grad on the model."""
    model, twin = build("vit"), build("vit")
    optimizer, plain = OPTIMIZERS[name](model), OPTIMIZERS[name](twin)
    optimizer.load_state_dict(optimizer.state_dict())
    plan = lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 3))
    plain_plan = lr_scheduler.LambdaLR(plain, lambda step: min(1.0, (step + 1) / 3))
    original, calls = optimizer.step, []
    for x, y in data("vit", 4):
        backward(model, x, y)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step = lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs)
        optimizer.step()
        optimizer.step = original
        plan.step()
        model.zero_grad()
        plain.zero_grad()
        backward(twin, x, y)
        nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        plain.step()
        plain_plan.step()
        assert plan.get_last_lr()[0] == optimizer.param_groups[0]["lr"]
    assert len(calls) == 4 and same(model, twin)


@each_optimizer
def test_resume_from_a_file_is_bit_exact(name, tmp_path):
    """Model, optimizer and scheduler go through torch.save and weights_only; a projector is attached again."""
    batches = list(data("resnet", 6))

    def fresh(seed):
        model = build("resnet", seed)
        optimizer = OPTIMIZERS[name](model)
        return model, optimizer, lr_scheduler.CosineAnnealingLR(optimizer, 6)

    def run(model, optimizer, plan, batches):
        losses = []
        for batch in batches:
            losses += train(model, optimizer, [batch])
            plan.step()
        return losses

    objects = fresh(0)
    run(*objects, batches[:3])
    torch.save([x.state_dict() for x in objects], tmp_path / "state.pt")
    expected = run(*objects, batches[3:])
    again = fresh(1)
    for x, state in zip(again, torch.load(tmp_path / "state.pt", weights_only=True), strict=True):
        x.load_state_dict(state)
    assert run(*again, batches[3:]) == expected and same(objects[0], again[0])


@each_optimizer
def test_hooks_and_profiler_see_the_optimizer(name):
    model = build("encoder")
    optimizer = OPTIMIZERS[name](model)
    seen = []
    handles = [
        getattr(optimizer, f"register_{hook}_hook")(lambda *args, hook=hook: seen.append(hook))
        for hook in (
            "step_pre", "step_post", "state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post",
        )
    ]  # fmt: skip
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train(model, optimizer, data("encoder", 1))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == [
        "step_pre", "step_post", "state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post",
    ]  # fmt: skip
    events = {event.key for event in profile.key_averages()}
    kind = type(optimizer).__name__
    assert {f"Optimizer.step#{kind}.step", f"Optimizer.zero_grad#{kind}.zero_grad"} <= events
    for handle in handles:
        handle.remove()
    train(model, optimizer, data("encoder", 1))
    assert len(seen) == 6


@each_optimizer
def test_a_group_added_later_trains(name):
    model = build("encoder")
    optimizer = OPTIMIZERS[name](model)
    train(model, optimizer, data("encoder", 1))
    model.extra = condlr_ext.LowRankLinear(10, 10, rank=4)
    head = model.head
    model.head = nn.Sequential(head, model.extra)
    added = [(f"extra.{n}", p) for n, p in model.extra.named_parameters()]
    named = "param_names" in optimizer.param_groups[0]
    optimizer.add_param_group({"params": added if named else [p for _, p in added], "lr": 0.01})
    before = model.extra.S.detach().clone()
    train(model, optimizer, data("encoder", 2))
    assert not torch.equal(model.extra.S, before) and optimizer.param_groups[1]["lr"] == 0.01
    assert_constraint(model)
