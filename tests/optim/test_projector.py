"""Projector: any torch optimizer keeps the constraint, and is otherwise what it was."""

import copy
import gc
import math
import weakref

import pytest
import torch
from helpers.matrices import kappa, non_orthonormality
from helpers.training import assert_constraint, backward, batches, low_rank_layers, train
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import condlr_ext
from condlr_ext import LowRankConv2d, LowRankLinear
from condlr_ext.errors import NonFiniteError
from condlr_ext.optim import CondLRSGD, Projector, param_groups


class SignDescent(torch.optim.Optimizer):
    """A third-party optimizer of the old kind: it writes to .data, and throws the gradients away."""

    def __init__(self, params, lr):
        super().__init__(params, dict(lr=lr))

    def step(self, closure=None):
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data.add_(p.grad.data.sign(), alpha=-group["lr"])
                    p.grad = None
        return loss


class Pair:
    """Muon for the matrices and AdamW for the rest, which it does not take."""

    def __init__(self, model):
        matrices = [p for p in model.parameters() if p.dim() == 2]
        self.muon = torch.optim.Muon(matrices, 0.01)
        self.adamw = torch.optim.AdamW([p for p in model.parameters() if p.dim() != 2], 0.01)

    def step(self):
        self.muon.step(), self.adamw.step()


OPTIMIZERS = {
    "SGD": lambda m: torch.optim.SGD(m.parameters(), 0.1, 0.5, weight_decay=1e-3),
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), 0.01),
    "fused AdamW": lambda m: torch.optim.AdamW(m.parameters(), 0.01, fused=True),
    "Muon": Pair,
    "SignDescent": lambda m: SignDescent(m.parameters(), 0.005),
}


def make_model(seed=0, dtype=None):
    """Two layers and two factors of equal shapes, for the batches."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        LowRankConv2d(1, 6, 3, padding=1, rank=4, dtype=dtype),
        nn.ReLU(),
        nn.Flatten(),
        LowRankLinear(96, 12, rank=5, dtype=dtype),
        nn.ReLU(),
        LowRankLinear(12, 12, rank=5, dtype=dtype),
        nn.ReLU(),
        LowRankLinear(12, 12, rank=5, dtype=dtype),
        nn.Linear(12, 3, dtype=dtype),
    )
    with torch.no_grad():  # torch's default scale lets the signal of four layers fade
        for layer in low_rank_layers(model):
            layer.S.mul_(2)
    return model


def spread(model):
    """Cores far outside the band: the next projection clips them to both of its edges."""
    with torch.no_grad():
        for layer in low_rank_layers(model):
            layer.S.copy_(torch.diag(torch.linspace(1, 3, layer.rank)))


@pytest.mark.parametrize("tangent", [False, True], ids=["", "tangent"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_learns_under_the_constraint(backend, name, tangent):
    model = make_model()
    optimizer = OPTIMIZERS[name](model)
    Projector(model, 0.1, tangent=tangent).attach(getattr(optimizer, "muon", optimizer))
    assert_constraint(model, 0.1)  # before the first step
    losses = train(model, optimizer, batches(60))
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert_constraint(model, 0.1)


def test_a_step_is_that_of_the_optimizer_then_qr_and_clip(backend):
    model = make_model().double()
    twin = copy.deepcopy(model)
    projected, plain = (torch.optim.AdamW(m.parameters(), 0.02) for m in (model, twin))
    Projector(model, 0.2, band="optimal", sigma_max=0.9).attach(projected)
    twin.load_state_dict(model.state_dict())
    ((x, y),) = batches(1, torch.float64)
    for m, optimizer in ((model, projected), (twin, plain)):
        backward(m, x, y)
        optimizer.step()
    for ours, free in zip(low_rank_layers(model), low_rank_layers(twin), strict=True):
        (U, R_U), (V, R_V) = (condlr_ext.linalg.qr(X.detach()) for X in (free.U, free.V))
        S = condlr_ext.linalg.clip_spectrum(R_U @ free.S.detach() @ R_V.mT, 0.2, "optimal", 0.9)
        for X, Y in ((ours.U, U), (ours.S, S), (ours.V, V)):
            torch.testing.assert_close(X.detach(), Y, rtol=0, atol=1e-12)
        assert torch.linalg.matrix_norm(ours.S, 2) <= 0.9 * (1 + 1e-12)
    assert torch.equal(model[-1].weight, twin[-1].weight)


def test_factors_of_equal_shape_go_through_one_call(monkeypatch):
    """Seven factors of four shapes and four cores of two, one of them under another bound."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    Projector(model, 0.1).attach(optimizer)
    calls = []
    for op in (condlr_ext.ops.linalg.qr, condlr_ext.ops.linalg.clip_spectrum):
        run = op.run
        monkeypatch.setattr(
            op, "run", lambda name, A, *args, op=op, run=run: calls.append((op.name, A.shape)) or run(name, A, *args)
        )
    train(model, optimizer, batches(1))
    shapes = [(name, tuple(shape)) for name, shape in calls]
    assert sorted(shapes) == [
        ("clip_spectrum", (1, 4, 4)),
        ("clip_spectrum", (3, 5, 5)),
        ("qr", (1, 6, 4)),
        ("qr", (1, 9, 4)),
        ("qr", (1, 96, 5)),
        ("qr", (5, 12, 5)),
    ]


@pytest.mark.parametrize("as_closure", [False, True, "keyword"])
def test_tangent_takes_the_turning_part_from_the_gradients(as_closure):
    model = make_model().double()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    Projector(model, 0.1, tangent=True).attach(optimizer)
    ((x, y),) = batches(1, torch.float64)
    backward(model, x, y)
    expected = {p: p.grad.clone() for p in model.parameters()}
    for layer in low_rank_layers(model):
        for X in (layer.U, layer.V):
            expected[X] -= X.detach() @ (X.detach().mT @ expected[X])
            assert (expected[X] - X.grad).abs().max() > 1e-6
    if as_closure == "keyword":
        loss = optimizer.step(closure=lambda: backward(model, x, y))
    else:
        loss = optimizer.step(lambda: backward(model, x, y)) if as_closure else optimizer.step()
    assert (loss is not None) == bool(as_closure)
    for p in model.parameters():
        torch.testing.assert_close(p.grad, expected[p], rtol=0, atol=1e-12)


def test_tangent_takes_expanded_gradients():
    layer = LowRankLinear(6, 5, rank=3)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    Projector(layer, 0.1, tangent=True).attach(optimizer)
    for p in layer.parameters():
        p.grad = torch.ones(p.shape[0], *[1] * (p.dim() - 1)).expand(p.shape)
    U = layer.U.detach().clone()
    optimizer.step()
    torch.testing.assert_close(layer.U.grad, torch.ones(5, 3) - U @ (U.mT @ torch.ones(5, 3)))


def test_groups_have_their_own_constraint_and_schedules_take_effect_at_the_next_step():
    model = make_model()
    first, rest = list(model[0].parameters()), [p for i, m in enumerate(model) if i for p in m.parameters()]
    optimizer = torch.optim.SGD([{"params": first, "tau": 0.5, "sigma_max": 2.0}, {"params": rest}], 0.2)
    projector = Projector(model, 0.05)
    projector.attach(optimizer)
    spread(model)
    train(model, optimizer, batches(1))
    assert_constraint(nn.ModuleList(low_rank_layers(model)[:1]), 0.5)
    assert_constraint(nn.ModuleList(low_rank_layers(model)[1:]), 0.05)
    assert kappa(model[0].S) > 1.4 and torch.linalg.matrix_norm(model[0].S, 2) <= 2 * (1 + 5e-6)
    optimizer.param_groups[0]["tau"] = torch.tensor(0.01)
    optimizer.param_groups[0]["band"] = "mean"
    projector.tau = 0.02
    train(model, optimizer, batches(1))
    assert_constraint(nn.ModuleList(low_rank_layers(model)[:1]), 0.01)
    assert_constraint(nn.ModuleList(low_rank_layers(model)[1:]), 0.02)
    optimizer.param_groups[1]["band"] = "max"
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="Projector: layer '3': band must be one of rms, mean, optimal, got 'max'"):
        train(model, optimizer, batches(1))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_groups_by_role_are_read_from_the_core():
    model = make_model()
    groups = param_groups(model, cores={"tau": 0.3})
    optimizer = torch.optim.SGD(groups, 0.2)
    Projector(model, 0.0).attach(optimizer)
    spread(model)
    train(model, optimizer, batches(1))
    assert_constraint(model, 0.3)
    assert min(kappa(layer.S) for layer in low_rank_layers(model)) > 1.2


class ScheduleFree(torch.optim.SGD):
    """The interface of the schedule-free optimizers."""

    def train(self):
        pass

    def eval(self):
        pass


class SAM(torch.optim.SGD):
    def second_step(self):
        pass


def test_remove_and_what_cannot_be_attached():
    model, other = make_model(), make_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.2)
    projector = Projector(model, 0.1)
    handle = projector.attach(optimizer)
    with pytest.raises(ValueError, match="this SGD is attached already"):
        projector.attach(optimizer)
    handle.remove()
    handle.remove()
    spread(model)
    train(model, optimizer, batches(1))
    assert min(kappa(layer.S) for layer in low_rank_layers(model)) > 2
    projector.attach(optimizer)
    assert_constraint(model, 0.1)
    with pytest.raises(TypeError, match="must be a torch.optim.Optimizer, got Sequential"):
        projector.attach(model)
    with pytest.raises(ValueError, match="must have a parameter of the model's low-rank layers, got Adam without"):
        projector.attach(torch.optim.Adam(other.parameters()))
    with pytest.raises(ValueError, match=r"alone, got ScheduleFree, whose eval\(\) puts averages in their place"):
        Projector(model, 0.1).attach(ScheduleFree(model.parameters()))
    with pytest.raises(
        ValueError, match=r"alone, got SAM, whose second_step\(\) runs no hooks; attach to its base_opt"
    ):
        Projector(model, 0.1).attach(SAM(model.parameters(), 0.1))
    with pytest.raises(ValueError, match="CondLRSGD keeps the constraint itself"):
        projector.attach(CondLRSGD(model, 0.1, tau=0.1))
    with pytest.raises(ValueError, match="model must have low-rank layers, got none"):
        Projector(nn.Linear(3, 3), 0.1)
    with pytest.raises(ValueError, match="Projector: tau must be a number >= 0"):
        Projector(model, -1)


def test_nothing_is_written_when_attach_fails():
    model = make_model()
    with torch.no_grad():
        model[0].S.mul_(torch.arange(1.0, 5.0))
        model[7].V[0, 0] = math.nan
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(NonFiniteError, match="Projector: V of layer '7' must be finite"):
        Projector(model, 0.1).attach(optimizer)
    after = model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before if k != "7.V")
    assert not optimizer._optimizer_step_post_hooks


def test_layers_without_a_gradient_are_not_touched():
    """The rms band shrinks a core whenever it acts, so a layer that did not move must not be projected again."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.2)
    Projector(model, 0.1).attach(optimizer)
    train(model, optimizer, batches(3))
    model[0].requires_grad_(False)
    with torch.no_grad():
        model[0].S.copy_(torch.diag(torch.arange(1.0, 5.0)))
    before = [p.clone() for p in model[0].parameters()]
    model.zero_grad()
    train(model, optimizer, batches(2))
    assert all(torch.equal(p, q) for p, q in zip(model[0].parameters(), before, strict=True))
    model[0].requires_grad_()
    train(model, optimizer, batches(1))
    assert_constraint(model, 0.1)


def test_two_optimizers_share_the_layers():
    model = make_model()
    cores = [layer.S for layer in low_rank_layers(model)]
    others = [p for p in model.parameters() if all(p is not S for S in cores)]
    optimizers = [torch.optim.Adam([{"params": cores, "tau": 0.4}], 0.01), torch.optim.SGD(others, 0.1)]
    projector = Projector(model, 0.1)
    for optimizer in optimizers:
        projector.attach(optimizer)
    for x, y in batches(5):
        backward(model, x, y)
        for optimizer in optimizers:
            spread(model)
            optimizer.step()
            assert_constraint(model, 0.4)
            assert min(kappa(layer.S) for layer in low_rank_layers(model)) > 1.3


def test_layers_that_are_replaced_or_added_are_found_or_refused():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    Projector(model, 0.1, tangent=True).attach(optimizer)
    model[5] = LowRankLinear(12, 12, rank=5)
    ((x, y),) = batches(1)
    backward(model, x, y)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="layer '5' is newer than attach.*give it to one with add_param_group"):
        optimizer.step()
    assert all(torch.equal(model.state_dict()[k], before[k]) for k in before)
    with torch.no_grad():
        for p in model[5].parameters():
            p.copy_(torch.randn_like(p))
        weight = model[5].weight
    optimizer.add_param_group({"params": model[5].parameters(), "tau": math.inf, "lr": 0.0})
    backward(model, x, y)
    gradient = model[5].U.grad.clone()
    optimizer.step()
    assert torch.equal(model[5].U.grad, gradient)  # no tangent part where U is not orthonormal
    torch.testing.assert_close(model[5].weight, weight, rtol=1e-4, atol=1e-4)
    assert max(non_orthonormality(model[5].U), non_orthonormality(model[5].V)) <= 2e-6
    optimizer.param_groups[1]["tau"] = 0.3
    train(model, optimizer, batches(1))
    assert kappa(model[5].S) == pytest.approx(1.3, rel=1e-5) and not torch.equal(model[5].U.grad, gradient)
    assert non_orthonormality(model[5].U) <= 2e-6 and (model[5].U.mT @ gradient).norm() > 0.01
    assert (model[5].U.mT @ model[5].U.grad).norm() < 1e-6 * model[5].U.grad.norm()
    model.append(LowRankLinear(3, 3, rank=2))  # nobody trains it, and it has no gradient: it may be frozen
    model[-1].requires_grad_(False)
    train(model, optimizer, batches(1))


def test_layers_that_are_not_trained_from_the_start_are_left_alone():
    """Fine-tuning the last layers: the gradients of the others are there, but no optimizer takes them."""
    model = make_model()
    optimizer = torch.optim.SGD(model[5:].parameters(), 0.1)
    Projector(model, 0.0).attach(optimizer)
    before = copy.deepcopy(model[:5].state_dict())
    train(model, optimizer, batches(3))
    assert all(torch.equal(before[k], v) for k, v in model[:5].state_dict().items())
    assert_constraint(nn.ModuleList([model[5], model[7]]), 0.0)


@pytest.mark.parametrize("fused", [False, True], ids=["skipped by the scaler", "skipped by the fused rule"])
def test_a_step_that_the_scaler_skips_changes_nothing(fused):
    """Fused optimizers run, hooks and all, and read found_inf themselves."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), 0.02, fused=fused)
    Projector(model, 0.1, tangent=True).attach(optimizer)
    assert getattr(optimizer, "_step_supports_amp_scaling", False) == fused
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    data = list(batches(4))
    for step, (x, y) in enumerate(data):
        if step == 2:  # out of its band: projecting again would show
            with torch.no_grad():
                model[0].S.mul_(torch.linspace(1, 2, 4))
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        if step == 2:
            model[8].weight.grad[0, 0] = math.inf
        before = copy.deepcopy(model.state_dict())
        scaler.step(optimizer)
        scaler.update()
        same = all(torch.equal(model.state_dict()[k], before[k]) for k in before)
        assert same == (step == 2)
    assert scaler.get_scale() == 4.0
    assert_constraint(model, 0.1)


def test_unscaled_and_scaled_fused_runs_agree():
    finals = []
    for scale in (1.0, 1024.0):
        model = make_model()
        optimizer = torch.optim.AdamW(model.parameters(), 0.02, fused=True)
        Projector(model, 0.1, tangent=True).attach(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        for x, y in batches(5):
            optimizer.zero_grad()
            scaler.scale(F.cross_entropy(model(x), y)).backward()
            scaler.step(optimizer)
            scaler.update()
        finals.append([p.detach().clone() for p in model.parameters()])
    torch.testing.assert_close(*finals, rtol=0, atol=1e-5)


def test_a_layer_that_is_no_longer_finite_is_named_and_spreads_nothing(backend):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    Projector(model, 0.1).attach(optimizer)
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.1)
    model[5].V.grad[2, 2] = math.nan
    with pytest.raises(NonFiniteError, match="Projector: after SGD.step these layers must be finite.*: '5'"):
        optimizer.step()
    assert torch.isfinite(model[5].S).all() and torch.isfinite(model[5].U).all()
    assert model[5].V.isnan().sum() == 1
    assert_constraint(nn.ModuleList([layer for layer in low_rank_layers(model) if layer is not model[5]]), 0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_parameters_are_projected_in_float32(dtype):
    """The stored parameter is a rounded point of the constraint set: each entry is off by eps / 2 of itself."""
    model = make_model(dtype=dtype)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    Projector(model, 0.1, tangent=True).attach(optimizer)
    train(model, optimizer, batches(10, dtype))
    eps = torch.finfo(dtype).eps
    for layer in low_rank_layers(model):
        r = layer.rank
        assert kappa(layer.S.float()) <= 1.1 * (1 + 1.1 * r**0.5 * eps)
        # |UᵀU - I| <= 2 |dU| |U| + ..., |dU|_F <= eps / 2 |U|_F = eps / 2 √r
        assert max(non_orthonormality(X.float()) for X in (layer.U, layer.V)) <= 1.1 * r**0.5 * eps
        assert layer.U.dtype == dtype


def test_copies_of_the_optimizer_have_no_hooks_and_nothing_keeps_it_alive():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    projector = Projector(model, 0.1)
    projector.attach(optimizer)
    pair = copy.deepcopy((model, optimizer))
    Projector(pair[0], 0.1).attach(pair[1])
    data = list(batches(3))
    assert train(*pair, data) == train(model, optimizer, data)
    alive = weakref.ref(optimizer)
    del optimizer, pair
    gc.collect()
    assert alive() is None and not projector._attached


class Wrapper(torch.optim.Optimizer):
    """As accelerate's AcceleratedOptimizer: an Optimizer by class, with nothing but the optimizer inside."""

    __module__ = "accelerate.optimizer"

    def __init__(self, optimizer):
        self.optimizer = optimizer

    param_groups = property(lambda self: self.optimizer.param_groups)
    state = property(lambda self: self.optimizer.state)

    def state_dict(self):
        return self.optimizer.state_dict()

    def step(self, closure=None):
        return self.optimizer.step(closure)


def test_wrapped_optimizers_are_unwrapped(tmp_path):
    model = nn.Sequential(LowRankLinear(8, 6, rank=3))
    inner = torch.optim.Adam(model.parameters(), 0.1)
    wrapped = Wrapper(inner)
    projector = Projector(model, 0.1)
    projector.attach(wrapped)
    with pytest.raises(ValueError, match="this Adam is attached already"):
        projector.attach(inner)
    model(torch.randn(5, 8)).pow(2).sum().backward()
    wrapped.step()
    assert condlr_ext.condition_numbers(model)["0"] <= 1.1 * (1 + 5e-6)
    path, state = tmp_path / "run.safetensors", copy.deepcopy(inner.state_dict())
    for saved, loaded in ((wrapped, inner), (inner, wrapped)):
        condlr_ext.save(model, path, saved)
        inner.state.clear()
        condlr_ext.load(model, path, loaded)
        assert torch.equal(inner.state_dict()["state"][0]["exp_avg"], state["state"][0]["exp_avg"])
    with pytest.raises(ValueError, match="CondLRSGD keeps the constraint itself"):
        projector.attach(Wrapper(CondLRSGD(model, 0.1, tau=0.1)))

    class Averaging(torch.optim.Optimizer):  # may write to the weights after the step of the optimizer inside
        optimizer, param_groups = inner, inner.param_groups

        def __init__(self):
            pass

    with pytest.raises(TypeError, match="must call torch's step hooks, got Averaging"):
        projector.attach(Averaging())


def test_factors_that_are_computed_are_refused():
    for change in (lambda m: prune.l1_unstructured(m, "S", 0.5), lambda m: parametrizations.orthogonal(m, "S")):
        model = nn.Sequential(LowRankLinear(8, 6, rank=3))
        change(model[0])
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for make in (lambda: Projector(model, 0.1).attach(optimizer), lambda: CondLRSGD(model, 0.1, tau=0.1)):  # noqa: B023
            with pytest.raises(
                ValueError, match="layer '0' must have U, S, V as its own parameters, got S that is comp"
            ):
                make()
