"""Two low-rank layers whose parameters are distributed, with given gradients, for the tests of steps on shards."""

import torch
from torch import nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from condlr_ext import LowRankLinear
from condlr_ext.optim import CondLRAdamW, CondLRSGD, Projector

ROWS, ALL = Shard(0), Replicate()
BY_ROWS = {"U": [ROWS], "S": [ROWS], "V": [ROWS], "bias": [ROWS]}


def projected(model):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    Projector(model, 0.1, tangent=True).attach(optimizer)
    return optimizer


OPTIMIZERS = {
    "sgd": lambda model: CondLRSGD(model, 0.1, 0.9, tau=0.1),
    "adamw": lambda model: CondLRAdamW(model, 0.1, eps=1e-3, tau=0.1),
    "projector": projected,
}


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(LowRankLinear(9, 11, rank=4), LowRankLinear(11, 5, rank=3)).to(dtype)


def distribute(model, mesh, layout=BY_ROWS):
    """Distribute the parameters of the layers by role; return the model."""
    for module in model:
        for role, placements in layout.items():
            setattr(module, role, nn.Parameter(distribute_tensor(getattr(module, role).detach(), mesh, placements)))
    return model


def gradients(model, step):
    random = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, generator=random, dtype=torch.float64).to(p.dtype) for p in model.parameters()]


def set_gradients(model, grads):
    """Give the parameters these gradients, or the parts of them that belong here."""
    for p, grad in zip(model.parameters(), grads, strict=True):
        p.grad = grad.clone()
        if hasattr(p, "placements"):
            p.grad = distribute_tensor(grad, p.device_mesh, p.placements, src_data_rank=None)


def assert_equal(whole, other, rtol=1e-10, atol=1e-12):
    for (name, p), q in zip(whole.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(q.full_tensor(), p, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def assert_same_steps(whole, other, kind, steps=3):
    """Whole and distributed parameters, equal now, are so after steps with equal gradients."""
    optimizers = [OPTIMIZERS[kind](model) for model in (whole, other)]
    for step in range(steps):
        for model, optimizer in zip((whole, other), optimizers, strict=True):
            set_gradients(model, gradients(whole, step))
            optimizer.step()
    assert_equal(whole, other)
    return optimizers
