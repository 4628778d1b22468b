"""Parameter groups: options by role, layers found by their names, factors that cannot be stepped."""

import copy

import pytest
import torch
from helpers.matrices import kappa, non_orthonormality
from helpers.training import assert_constraint, batches, make_model, train
from torch import nn

from condlr_ext import LowRankLinear
from condlr_ext.optim import CondLRSGD, param_groups


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
    with pytest.raises(ValueError, match="layer 'x' has U in the parameter groups but not S, V"):
        optimizer.add_param_group({"params": [("x.U", nn.Parameter(torch.randn(4, 2)))]})
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


def test_foreign_parameters_named_like_factors():
    class Cell(nn.Module):
        def __init__(self):
            super().__init__()
            self.U, self.S, self.V = (nn.Parameter(torch.randn(3, k)) for k in (3, 2, 4))

    cell = Cell()  # no U S Vᵀ: the shapes do not fit
    for source in (cell, cell.named_parameters()):
        optimizer = CondLRSGD(source, 0.1, tau=0.1)
        assert optimizer.param_groups[0]["roles"] == ["other"] * 3
