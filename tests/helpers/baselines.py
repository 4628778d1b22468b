"""Networks for digits, training and single steps, for the tests of the baselines."""

import torch
from torch import nn
from torch.nn import functional as F

import condlr_ext
from condlr_ext import LowRankLinear
from condlr_ext.nn import LowRankLayer
from helpers.models import DigitsCNN, digits_encoder


def mlp():
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 10))


HEADS = {mlp: "4", DigitsCNN: "head", digits_encoder: "2.head"}


def low_rank(build=mlp, rank=0.25, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    model = build().to(dtype)
    condlr_ext.factorize(model, rank=rank, exclude=HEADS[build])
    return model


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, LowRankLayer)]


def train(model, optimizer, digits, steps, start=0):
    """Train on batches of 64; return the losses."""
    x, y = digits
    losses = []
    for k in range(start, start + steps):
        index = (torch.arange(64) + 64 * k) % len(x)

        def closure(index=index):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x[index].to(next(model.parameters()))), y[index])
            loss.backward()
            return loss

        losses.append(optimizer.step(closure).item())
    return losses


def assert_same_state(a, b):
    assert a["param_groups"] == b["param_groups"]
    buffers = [{k: v for k, v in s["state"].items() if v} for s in (a, b)]
    assert buffers[0].keys() == buffers[1].keys() and buffers[0]
    for key, values in buffers[0].items():
        assert all(torch.equal(v, buffers[1][key][name]) for name, v in values.items())


def one_layer(U, S, V):
    layer = LowRankLinear(len(V), len(U), bias=False, rank=len(S), dtype=torch.float64)
    with torch.no_grad():
        for p, value in zip((layer.U, layer.S, layer.V), (U, S, V), strict=True):
            p.copy_(torch.as_tensor(value, dtype=torch.float64))
    return layer


def step_with(optimizer, layer, dU, dS, dV):
    for p, grad in zip((layer.U, layer.S, layer.V), (dU, dS, dV), strict=True):
        p.grad = torch.as_tensor(grad, dtype=torch.float64)
    optimizer.step()
