"""Optimizers that were made before sharding: replaced parameters are followed, orphaned ones named."""

import pytest
import torch
from helpers.sharding import OPTIMIZERS, assert_equal, distribute, gradients, network, set_gradients
from torch import nn
from torch.distributed.fsdp import fully_shard

from condlr_ext.optim import CondLRSGD, Projector

LOW_RANK = [kind for kind in OPTIMIZERS if kind != "projector"]


def check_replaced(mesh, kind):
    whole, model = network(), network()
    optimizers = [OPTIMIZERS[kind](net) for net in (whole, model)]
    for step in range(4):
        if step == 2:  # as accelerate does: the groups get the parameters that fully_shard has made
            name_of = {id(p): name for name, p in model.named_parameters()}
            for layer in model:
                fully_shard(layer, mesh=mesh)
            new = dict(model.named_parameters())
            for group in optimizers[1].param_groups:
                group["params"] = [new[name_of[id(p)]] for p in group["params"]]
            assert len(optimizers[1].state_dict()["state"]) == len(new)
        for net, optimizer in zip((whole, model), optimizers, strict=True):
            set_gradients(net, gradients(whole, step))
            optimizer.step()
    assert_equal(whole, model)
    assert optimizers[1].state.keys() == set(model.parameters())


@pytest.mark.parametrize("kind", LOW_RANK)
def test_state_follows_replaced_parameters(pool, kind):
    pool.run(check_replaced, 2, kind)


def check_another_shape(mesh):
    model = network()
    optimizer = CondLRSGD(model, 0.1, 0.9, tau=0.1)
    group = optimizer.param_groups[0]
    group["params"][0] = nn.Parameter(group["params"][0].detach()[1:])
    with pytest.raises(ValueError, match=r"what replaced 0.U must have its shape \[11, 4\], got \[10, 4\]"):
        optimizer.step()


def test_replaced_by_another_shape(pool):
    pool.run(check_another_shape, 1)


def check_orphans(mesh):
    model = network()
    optimizer = CondLRSGD(model, 0.1, 0.9, tau=0.1)
    optimizer.step()  # without gradients, which is no fault
    projected = Projector(model, 0.1)
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    projected.attach(sgd)
    distribute(model, mesh)
    set_gradients(model, gradients(model, 0))
    with pytest.raises(RuntimeError, match=r"those of layer '0' are no longer its module's: make the optimizer after"):
        optimizer.step()
    with pytest.raises(ValueError, match=r"layer '0' is newer than attach\(\) and has gradients, but no optimizer"):
        sgd.step()


def test_sharding_after_the_optimizer_is_named(pool):
    pool.run(check_orphans, 2)
