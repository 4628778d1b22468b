"""Parameter groups: options by role, layers found by their names, factors that cannot be stepped."""

import copy
import pickle
import sys
import threading

import pytest
import torch
from helpers.matrices import kappa, non_orthonormality
from helpers.training import assert_constraint, batches, make_model, train
from torch import nn

from condlr_ext import LowRankLinear
from condlr_ext.errors import NonFiniteError
from condlr_ext.optim import CondLRAdamW, CondLRSGD, Projector, param_groups


def test_groups_by_role_have_their_own_options():
    model = make_model()
    groups = param_groups(model, factors={"lr": 0.0}, cores={"tau": 0.5, "lr": 1.0}, other={"weight_decay": 0.1})
    assert [set(g["roles"]) for g in groups] == [{"U", "V"}, {"S"}, {"other"}]
    optimizer = CondLRSGD(groups, 0.1, tau=0.1)
    U = model[3].U.detach().clone()
    train(model, optimizer, batches(30))
    assert non_orthonormality(model[3].U) < 2e-6 and (model[3].U - U).abs().max() < 1e-6
    assert kappa(model[3].S) > 1.11 and kappa(model[3].S) <= 1.5 * (1 + 5e-6)


def test_add_param_group():
    model = make_model()
    late = nn.Sequential(LowRankLinear(3, 3, rank=2))
    late[0].S.data = torch.diag(torch.tensor([5.0, 1.0]))
    optimizer = CondLRSGD(model, 0.1, tau=0.1)
    optimizer.add_param_group({"params": [(f"late.{n}", p) for n, p in late.named_parameters()], "tau": 0.3})
    assert kappa(late[0].S) == pytest.approx(1.3, rel=1e-5)
    whole = LowRankLinear(4, 4, rank=2)
    with pytest.raises(ValueError, match="layer 'x' has U in the parameter groups but not S, V"):
        optimizer.add_param_group({"params": [("x.U", whole.U)]})
    assert len(optimizer.param_groups) == 2
    train(model, optimizer, batches(2))


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


def test_parameters_without_names_join_those_with_names():
    """As Lightning's fine-tuning callbacks and transfer-learning scripts add them."""
    model, head, late = make_model(), nn.Linear(10, 5), LowRankLinear(3, 3, rank=2)
    optimizer = CondLRSGD(model, 0.1, tau=0.1)
    optimizer.add_param_group({"params": head.parameters()})
    optimizer.add_param_group({"params": list(late.parameters()), "tau": 0.3})
    optimizer.add_param_group({"params": nn.Parameter(torch.ones(2))})
    assert optimizer.param_groups[1]["param_names"] == ["parameter 0 of group 1", "parameter 1 of group 1"]
    late.S.grad = torch.diag(torch.tensor([-50.0, 0.0]))
    head.bias.grad = torch.ones(5)
    before = head.bias.detach().clone()
    optimizer.step()
    assert torch.equal(head.bias, before - 0.1) and kappa(late.S) == pytest.approx(1.3, rel=1e-5)


def from_meta():
    model = make_model().to("meta").to_empty(device="cpu")
    for module in model:
        getattr(module, "reset_parameters", list)()
    return model


def assigned():
    model = make_model()
    model.load_state_dict({name: p.clone() for name, p in model.state_dict().items()}, assign=True)
    return model


GROUPS = {
    "in order": lambda m: m.parameters(),
    "reversed": lambda m: [*m.parameters()][::-1],
    "by dimension": lambda m: [
        {"params": [p for p in m.parameters() if p.dim() == 1]},
        {"params": [p for p in m.parameters() if p.dim() > 1]},
    ],
    "U and V apart": lambda m: [
        {"params": [m[0].V, *(p for p in m.parameters() if p is not m[0].U and p is not m[0].V)]},
        {"params": [m[0].U]},
    ],
    "other names": lambda m: [(f"{i}", p) for i, p in enumerate(m.parameters())],
}


@pytest.mark.parametrize("make", [make_model, lambda: copy.deepcopy(make_model()), from_meta, assigned])
@pytest.mark.parametrize("groups", GROUPS)
def test_layers_are_known_by_their_parameters(make, groups):
    """As timm's groups, skorch, SAM and the Trainer's optimizer class give them: without names."""
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        model[0].U.add_(0.1)  # trained by something else: no longer orthonormal
    twin = copy.deepcopy(model)
    optimizer = CondLRSGD(GROUPS[groups](model), 0.1, 0.9, tau=0.1)
    expected = CondLRSGD(twin, 0.1, 0.9, tau=0.1)
    data = list(batches(3))
    train(model, optimizer, data)
    train(twin, expected, data)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    assert_constraint(model, 0.1)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_of_an_optimizer_keep_its_layers(duplicate):
    model = make_model()
    optimizer = CondLRSGD(model.parameters(), 0.1, tau=0.1)
    alone = duplicate(optimizer)  # without the model: its parameters belong to no layer
    for p, q in zip(optimizer.param_groups[0]["params"], alone.param_groups[0]["params"], strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    optimizer.step()
    alone.step()
    for p, q in zip(optimizer.param_groups[0]["params"], alone.param_groups[0]["params"], strict=True):
        assert torch.equal(p, q)


def with_shared_core():
    model = make_model()
    model[3] = LowRankLinear(model[3].V.shape[0], model[3].U.shape[0], rank=model[0].rank)
    model[3].S = model[0].S
    return model


def test_factors_that_are_missing_or_shared_are_named():
    layer = LowRankLinear(5, 5, rank=2)
    with pytest.raises(
        ValueError, match="layer 'LowRankLinear at parameter 0 of group 0' has V in .* but not S, U; pass all"
    ):
        CondLRSGD([layer.V], 0.1, tau=0.1)
    model = with_shared_core()
    for params in (model, model.parameters(), model.named_parameters()):
        with pytest.raises(ValueError, match="S of layer '.*' is a factor of something else too; shared ones cannot"):
            CondLRSGD(params, 0.1, tau=0.1)
    layer.V = layer.U
    with pytest.raises(ValueError, match="V of layer '.*' is a factor of something else too"):
        CondLRSGD(layer.parameters(), 0.1, tau=0.1)
    with pytest.raises(ValueError, match="pass pairs of names and parameters"):
        CondLRSGD([{"params": [nn.Parameter(torch.ones(2, 2))], "roles": ["S"]}], 0.1, tau=0.1)


@pytest.mark.parametrize("make", [CondLRSGD, CondLRAdamW, Projector])
def test_factors_that_share_memory_are_named(make):
    def build(model):
        return (
            make(model, tau=0.1).attach(torch.optim.SGD(model.parameters()))
            if make is Projector
            else make(model, 0.1, tau=0.1)
        )

    flat = torch.randn(2, 20, 3)
    layer = LowRankLinear(20, 20, rank=3)
    layer.U, layer.V = (nn.Parameter(X) for X in flat)  # neighbors in one tensor
    build(layer)
    layer.V = nn.Parameter(flat.flatten()[57:117].view(20, 3))
    with pytest.raises(ValueError, match=f"{make.__name__}.*: U of layer '' and V of layer '' must not share memory"):
        build(layer)
    model = nn.Sequential(*(LowRankLinear(4, 4, rank=2) for _ in range(2)))
    model[1].S.data = model[0].S.data
    with pytest.raises(ValueError, match="S of layer '[01]' and S of layer '[01]' must not share memory"):
        build(model)


def test_a_group_that_is_added_shares_no_memory_either():
    a, b = (LowRankLinear(6, 5, rank=3) for _ in range(2))
    b.U = nn.Parameter(a.U.data)
    optimizer = CondLRSGD(a.parameters(), 0.1, tau=0.1)
    with pytest.raises(ValueError, match="must not share memory"):
        optimizer.add_param_group({"params": list(b.parameters())})
    assert len(optimizer.param_groups) == 1 and b.U not in optimizer.state


def test_layers_may_be_made_while_an_optimizer_is(request):
    keep = [LowRankLinear(2, 2, rank=1, device="meta") for _ in range(2000)]
    stop, interval = threading.Event(), sys.getswitchinterval()
    request.addfinalizer(lambda: sys.setswitchinterval(interval))
    sys.setswitchinterval(1e-5)

    def make():
        while not stop.is_set():
            keep[0] = LowRankLinear(2, 2, rank=1, device="meta")

    thread = threading.Thread(target=make)
    thread.start()
    try:
        for _ in range(40):
            CondLRSGD(LowRankLinear(4, 4, rank=2).parameters(), 0.1, tau=0.1)
    finally:
        stop.set()
        thread.join()


def test_parameters_without_names_are_named_by_their_place():
    layer = LowRankLinear(5, 4, rank=2)
    optimizer = CondLRSGD([{"params": [layer.bias]}, {"params": [layer.U, layer.S, layer.V]}], 0.1, tau=0.1)
    optimizer.check_finite = True
    layer.S.grad = torch.full((2, 2), torch.inf)
    with pytest.raises(NonFiniteError, match="the gradient of parameter 1 of group 1 must be finite, got NaN or Inf"):
        optimizer.step()


def test_a_copy_of_a_module_may_share_its_parameters():
    layer = LowRankLinear(5, 4, rank=2)
    twin, half = LowRankLinear(5, 4, rank=2), LowRankLinear(5, 4, rank=2)
    for role in ("U", "S", "V", "bias"):
        setattr(twin, role, getattr(layer, role))
    half.U = layer.U  # as what is left of a layer whose core was replaced
    optimizer = CondLRSGD(layer.parameters(), 0.1, tau=0.1)
    assert optimizer.param_groups[0]["roles"] == ["U", "S", "V", "other"]


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


def test_foreign_parameters_named_like_factors():
    class Cell(nn.Module):
        def __init__(self):
            super().__init__()
            self.U, self.S, self.V = (nn.Parameter(torch.randn(k, 2)) for k in (3, 2, 4))

    cell = Cell()
    before = [p.detach().clone() for p in cell.parameters()]
    for source in (cell, cell.named_parameters(), cell.parameters()):
        with pytest.warns(UserWarning, match="no low-rank layer"):
            optimizer = CondLRSGD(source, 0.1, tau=0.1)
        assert optimizer.param_groups[0]["roles"] == ["other"] * 3
    assert all(torch.equal(p, q) for p, q in zip(cell.parameters(), before, strict=True))
    roles = {"params": cell.named_parameters(), "roles": ["U", "S", "V"]}  # those of a layer of one's own
    CondLRSGD([roles], 0.1, tau=0.1)
    assert non_orthonormality(cell.U) < 2e-6
