"""Decisions are those of all processes: what one of them sees, all act on, and the ranks never part."""

import copy
import math

import pytest
import torch
import torch.distributed as dist
from helpers.sharding import OPTIMIZERS, assert_equal, distribute, gradients, network, set_gradients
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from condlr_ext._shards import Rows, Team, local, normal, qr
from condlr_ext.errors import NonFiniteError
from condlr_ext.optim import CondLRSGD

LOW_RANK = [kind for kind in OPTIMIZERS if kind != "projector"]


def parts(model, optimizer):
    """What this process holds of parameters and state."""
    states = [value for p in model.parameters() for value in optimizer.state[p].values()]
    return [local(t).clone() for t in (*model.parameters(), *states)]


def equal(before, after):
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def check_bad_gradient_of_one_process(mesh, kind, value):
    model = distribute(network(), mesh)
    optimizer = OPTIMIZERS[kind](model)
    set_gradients(model, gradients(model, 0))
    optimizer.step()
    set_gradients(model, gradients(model, 1))
    if mesh.get_local_rank() == 1:
        local(model[0].U.grad)[0, 0] = value
    before = [parts(layer, optimizer) for layer in model]
    optimizer.step()
    assert equal(before[0], parts(model[0], optimizer))
    assert not equal(before[1], parts(model[1], optimizer))
    assert optimizer.skipped == 1


@pytest.mark.parametrize("kind", LOW_RANK)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_gradient_of_one_process_leaves_the_layer_everywhere(pool, kind, value):
    pool.run(check_bad_gradient_of_one_process, 3, kind, value)


def check_named_everywhere(mesh):
    model = distribute(network(), mesh)
    optimizer = CondLRSGD(model, 0.1, tau=0.1, check_finite=True)
    set_gradients(model, gradients(model, 0))
    if mesh.get_local_rank() == 1:
        local(model[0].V.grad)[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match="the gradient of 0.V must be finite"):
        optimizer.step()
    if mesh.get_local_rank() == 2:
        local(model[1].U.data)[0, 0] = math.inf
    for make in OPTIMIZERS.values():
        with pytest.raises(NonFiniteError, match="U of layer '1' must be finite"):
            make(model)


def test_what_is_not_finite_in_one_process_is_named_everywhere(pool):
    pool.run(check_named_everywhere, 3)


def check_still(mesh):
    model = distribute(network(torch.float32), mesh)
    for options in ({"lr": 0.1}, {"lr": 0.0, "momentum": 0.9}):
        optimizer = CondLRSGD(model, tau=0.1, **options)
        set_gradients(model, [torch.zeros_like(g) if options["lr"] else g for g in gradients(model, 0)])
        before = [local(p).clone() for p in model.parameters()]
        optimizer.step()
        assert equal(before, [local(p) for p in model.parameters()])


def test_a_step_that_moves_nothing_is_the_identity(pool):
    pool.run(check_still, 3)


def check_equal_bits(mesh, kind):
    model = distribute(network(torch.float32), mesh)
    for module in model:
        module.S = nn.Parameter(module.S.full_tensor().detach())
    optimizer = OPTIMIZERS[kind](model)
    for step in range(5):
        set_gradients(model, gradients(model, step))
        optimizer.step()
        for module in model:
            theirs = [torch.empty_like(module.S) for _ in range(mesh.size())]
            dist.all_gather(theirs, module.S.detach(), group=mesh.get_group())
            assert all(torch.equal(module.S, S) for S in theirs)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_cores_have_the_same_bits_everywhere(pool, kind):
    """Plain tensors S among sharded U and V, which every process steps for itself."""
    pool.run(check_equal_bits, 3, kind)


def check_written(mesh, kind):
    whole = network()
    other = distribute(copy.deepcopy(whole), mesh)
    optimizers = [OPTIMIZERS[kind](model) for model in (whole, other)]
    for step in range(3):
        for model, optimizer in zip((whole, other), optimizers, strict=True):
            if step == 1:
                with torch.no_grad():
                    model[0].U.mul_(1.5)
                    model[1].V.add_(0.25)
            set_gradients(model, gradients(whole, step))
            optimizer.step()
    assert_equal(whole, other)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_factors_written_between_steps_are_made_orthonormal(pool, kind):
    pool.run(check_written, 3, kind)


def check_start(mesh, singular):
    whole = network()
    with torch.no_grad():
        whole[0].U.normal_(generator=torch.Generator().manual_seed(1))
        whole[0].V.mul_(1e-3)
        whole[1].S.mul_(torch.tensor([1.0, 5.0, 0.1]))
        if singular:
            whole[0].U[:, 2] = whole[0].U[:, 0]
    other = distribute(copy.deepcopy(whole), mesh)
    for model in (whole, other):
        CondLRSGD(model, 0.1, tau=0.1)
    if not singular:
        assert_equal(whole, other)
    for X in (other[0].U.full_tensor(), other[0].V.full_tensor()):
        torch.testing.assert_close(X.mT @ X, torch.eye(4, dtype=X.dtype), rtol=0, atol=1e-12)


@pytest.mark.parametrize("singular", [False, True])
def test_start_on_the_constraint_set(pool, singular):
    pool.run(check_start, 3, singular)


def check_frozen(mesh):
    model = distribute(network(), mesh)
    model[0].U.requires_grad_(False)
    if mesh.get_local_rank() == 2:
        local(model[0].U.data)[0, 0] += 1
    with pytest.raises(ValueError, match="U of layer '0' is frozen and the layer not on the constraint set"):
        CondLRSGD(model, 0.1, tau=0.1)


def test_a_frozen_factor_that_would_change_is_refused_everywhere(pool):
    pool.run(check_frozen, 3)


def check_qr(mesh):
    torch.manual_seed(0)
    m, r = 13, 5
    given = {
        "plain": torch.randn(m, r),
        "scaled": torch.randn(m, r) * torch.tensor([1e-30, 1.0, 1e30, 1e-3, 1e3]),
        "ill-conditioned": torch.randn(m, r) @ torch.diag(torch.logspace(0, -12, r)) @ torch.randn(r, r),
        "equal columns": torch.randn(m, 1).expand(m, r),
        "zeros": torch.zeros(m, r),
    }
    given = {name: X.double() for name, X in given.items()}
    params = [distribute_tensor(X, mesh, [Shard(0)]) for X in given.values()]
    team = Team.of("p", params)
    rows = [Rows.of(team, p) for p in params]
    for (name, X), x, R in zip(given.items(), rows, qr(team, rows, 1e-13), strict=True):
        (Q,) = team.wholes([x.param], [x.values])
        torch.testing.assert_close(Q.mT @ Q, torch.eye(r, dtype=Q.dtype), rtol=0, atol=1e-12, msg=name)
        column = X.norm(dim=0).clamp_min(1e-300)
        torch.testing.assert_close(Q @ R / column, X / column, rtol=0, atol=1e-12, msg=name)
        assert (R.diagonal() >= 0).all() and torch.equal(R, R.triu())


def test_qr_of_rows(pool):
    pool.run(check_qr, 3)


def test_normal_numbers_depend_on_the_row_alone():
    rows = torch.arange(2000)
    whole = normal(rows, 50)
    torch.testing.assert_close(normal(rows[700:], 50), whole[700:], rtol=0, atol=0)
    assert abs(whole.mean()) < 0.02 and abs(whole.std() - 1) < 0.02
    assert (whole.mT @ whole / 2000 - torch.eye(50)).abs().max() < 0.12  # 5 standard deviations
    assert not torch.equal(whole, normal(rows, 50, seed=1))


def check_equal_groups(_):
    """torch may give parameters of a second mesh the groups of the first."""
    rows = torch.arange(8.0).reshape(4, 2)
    meshes = [init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor")) for _ in range(2)]
    factors = [distribute_tensor(rows, mesh, [Shard(0), Shard(0)]) for mesh in meshes]
    assert factors[0].device_mesh.get_group(0) is not factors[1].device_mesh.get_group(0)
    team = Team.of("the factors", factors)
    assert len(team.groups) == 2 and {team: True}[Team.of("one", factors[1:])]
    gram, once = team.sum([local(factors[0]).mT @ local(factors[0]), torch.ones(1)])
    assert torch.equal(gram, (rows.mT @ rows).double()) and once == 4


def test_groups_of_the_same_processes_are_one(pool):
    pool.run(check_equal_groups, 4)
