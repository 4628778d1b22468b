"""The sharded step of the optimizers under fully_shard is that of one process; two collectives at most, for all layers."""

import copy
import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode

from condlr_ext import LowRankConv2d, LowRankLinear, condition_numbers
from condlr_ext.optim import CondLRAdamW, CondLRSGD, Projector

BATCH = 12  # divided by 2, 3 and 4


def projector(model, **options):
    optimizer = torch.optim.AdamW(model.parameters(), 0.02, eps=1e-4)  # of smaller ones Adam magnifies the rounding
    Projector(model, 0.1, **options).attach(optimizer)
    return optimizer


OPTIMIZERS = {
    "sgd": lambda model: CondLRSGD(model, 0.1, 0.9, weight_decay=0.01, tau=0.1),
    "nesterov": lambda model: CondLRSGD(model, 0.1, 0.9, nesterov=True, tau=math.inf, sigma_max=1.0),
    "dampening": lambda model: CondLRSGD(model, 0.1, 0.9, dampening=0.5, tau=0.0),
    "long steps": lambda model: CondLRSGD(model, 30.0, tau=0.1, sigma_max=1.0),
    "very long steps": lambda model: CondLRSGD(model, 1e6, tau=0.1, sigma_max=1.0),
    "adamw": lambda model: CondLRAdamW(model, 0.02, eps=1e-4, tau=0.1),
    "amsgrad": lambda model: CondLRAdamW(model, 0.02, eps=1e-4, tau=0.1, amsgrad=True, maximize=True),
    "projector": projector,
    "tangent": functools.partial(projector, tangent=True),
}


def network(dtype=torch.float32):
    """Shards of U and V that are uneven, empty, wide (fewer rows than columns) and of one row."""
    torch.manual_seed(0)
    return nn.Sequential(
        LowRankConv2d(1, 5, 3, padding=1, rank=4),
        nn.Tanh(),
        nn.Flatten(),
        LowRankLinear(80, 3, rank=3),
        nn.Tanh(),
        LowRankLinear(3, 1, rank=1),
        nn.Tanh(),
        LowRankLinear(1, 7, rank=1, bias=False),
        nn.Tanh(),
        nn.Linear(7, 3),
    ).to(dtype)


def sharded(model, mesh, **options):
    for module in model:
        if list(module.parameters(recurse=False)):
            fully_shard(module, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def loss_of(model, step: int, part: int = 0, parts: int = 1):
    p = next(model.parameters())
    random = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, 1, 4, 4, generator=random, dtype=torch.float64).to(p.dtype)
    y = torch.randint(0, 3, (BATCH,), generator=random)
    return F.cross_entropy(model(x.chunk(parts)[part]).float(), y.chunk(parts)[part])


def train(model, optimizer, steps, mesh=None):
    for step in steps:
        optimizer.zero_grad()
        part = (0, 1) if mesh is None else (mesh.get_local_rank(), mesh.size())
        loss_of(model, step, *part).backward()
        optimizer.step()


def whole(t):
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def assert_same_training(model, other, optimizer, of_other, **tolerances):
    """Parameters and state of a model that is not sharded, and of one that is."""
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(whole(q.detach()), p.detach(), msg=lambda m, n=name: f"{n}: {m}", **tolerances)
        state, of_sharded = optimizer.state[p], of_other.state[q]
        assert state.keys() == of_sharded.keys()
        for key, value in state.items():
            got = of_sharded[key]
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(whole(got), value, msg=lambda m, n=(name, key): f"{n}: {m}", **tolerances)
            else:
                assert got == value


def check_equal_to_one_process(mesh, kind, dtype):
    model = network(dtype)
    other = sharded(copy.deepcopy(model), mesh)
    optimizer, of_other = OPTIMIZERS[kind](model), OPTIMIZERS[kind](other)
    # rounding of gradients, which training amplifies
    tolerances = dict(rtol=1e-10, atol=1e-12) if dtype == torch.float64 else dict(rtol=2e-4, atol=2e-5)
    for step in range(1 if kind == "very long steps" else 4):
        train(model, optimizer, [step])
        train(other, of_other, [step], mesh)
        assert_same_training(model, other, optimizer, of_other, **tolerances)
    if kind != "nesterov":
        assert max(condition_numbers(model).values()) <= 1.1 * (1 + 5e-6)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_equal_to_one_process(pool, kind):
    pool.run(check_equal_to_one_process, 2, kind, torch.float64)


@pytest.mark.parametrize("kind", ["sgd", "adamw", "projector"])
def test_equal_to_one_process_in_float32(pool, kind):
    pool.run(check_equal_to_one_process, 3, kind, torch.float32)


def check_collectives(mesh, kind, count):
    model = sharded(network(), mesh)
    optimizer = OPTIMIZERS[kind](model)
    for step in range(2):
        loss_of(model, step).backward()
        with CommDebugMode() as communication:
            optimizer.step()
        assert dict(communication.get_comm_counts()) == {torch.ops.c10d.allreduce_: count}


@pytest.mark.parametrize("kind, count", [("sgd", 1), ("adamw", 1), ("very long steps", 2)])
def test_collectives_of_a_step(pool, kind, count):
    """One for the whole network; two in steps so long that the trial points must be summed too."""
    pool.run(check_collectives, 2, kind, count)
