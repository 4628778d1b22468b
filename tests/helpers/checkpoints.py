"""A small model, its training and its state, for the tests of checkpoints."""

import copy

import torch
from torch import nn

import condlr_ext


def small_mlp(ranks=(5, 3)):
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 9), nn.ReLU(), nn.Linear(9, 4))
    if ranks:
        condlr_ext.factorize(model, rank={"0": ranks[0], "2": ranks[1]})
    return model


def make_optimizer(kind, model, tau=0.2):
    if kind == "CondLRSGD":
        return condlr_ext.optim.CondLRSGD(model, 0.1, momentum=0.9, tau=tau)
    if kind == "CondLRAdamW":
        return condlr_ext.optim.CondLRAdamW(model, 0.01, tau=tau)
    if kind == "SGD":
        return torch.optim.SGD(model.named_parameters(), 0.1, momentum=0.9)
    options = {"eps": 1e-4} if kind == "AdamW" else {}  # 1e-8 is zero in float16
    return getattr(torch.optim, kind)(model.parameters(), 0.01, **options)


def steps(model, optimizer, inputs, labels=10):
    for k, x in enumerate(inputs):
        optimizer.zero_grad()
        out = model(x).flatten(0, -2)
        y = torch.arange(k, k + len(out)) % out.shape[-1]
        nn.functional.cross_entropy(out.float(), y).backward()
        optimizer.step()


def equal_states(a, b):
    """Nested containers of the same types and values, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return type(a) is type(b) and list(a) == list(b) and all(equal_states(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal_states, a, b))
    return type(a) is type(b) and a == b


def snapshot(model, optimizer=None):
    state = {"types": [type(m) for m in model.modules()], "model": copy.deepcopy(model.state_dict())}
    return state | {"optimizer": copy.deepcopy(optimizer and optimizer.state_dict())}
