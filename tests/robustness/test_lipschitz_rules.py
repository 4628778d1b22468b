"""Every rule for operations without weights is above the Jacobians it bounds."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.operators import EXACT, F64, Function, jacobian_norm
from torch import nn

from condlr_ext.robustness import lipschitz

ACTIVATIONS = [
    nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(0.3), nn.LeakyReLU(-2.5), nn.ELU(), nn.ELU(2.0), nn.CELU(0.5), nn.SELU(),
    nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Mish(), nn.Hardswish(), nn.Tanh(), nn.Sigmoid(), nn.Hardsigmoid(),
    nn.Softplus(), nn.Softplus(3.0), nn.Softsign(), nn.LogSigmoid(), nn.Softshrink(), nn.Hardtanh(-0.5, 2),
    nn.PReLU(init=1.7), nn.PReLU(3), nn.RReLU(0.5, 2.5), nn.Identity(),
]  # fmt: skip


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_slopes_of_activations(activation):
    activation = activation.double().eval()
    t = torch.linspace(-8, 8, 39999, dtype=F64, requires_grad=True)
    grid = t.view(-1, 3) if isinstance(activation, nn.PReLU) else t.view(1, -1)
    (slope,) = torch.autograd.grad(activation(grid).sum(), t)
    bound = lipschitz(activation, grid[:1].detach()).bound
    largest = slope.abs().max().item()
    assert largest <= bound * (1 + 1e-7) and bound <= 1.01 * largest  # torch's hardsigmoid has a float32 1/6


OTHERS = {
    "max pool": (nn.MaxPool2d(2), 1),
    "overlapping max pool": (nn.MaxPool2d(3, 2, 1), 2),
    "dense max pool": (nn.MaxPool2d(3, 1), 3),
    "dilated max pool": (nn.MaxPool2d(2, 2, dilation=2), 2),
    "max pool 1d": (nn.Sequential(nn.Flatten(2), nn.MaxPool1d(4, 2, ceil_mode=True)), math.sqrt(2)),
    "average pool": (nn.AvgPool2d(2), 1 / 2),
    "overlapping average pool": (nn.AvgPool2d(3, 2, 1), None),
    "average pool without padding": (nn.AvgPool2d(3, 2, 1, count_include_pad=False, ceil_mode=True), None),
    "average pool with divisor": (nn.AvgPool2d(2, divisor_override=1), 2),
    "adaptive pool": (nn.AdaptiveAvgPool2d((3, 4)), None),
    "global pool": (nn.AdaptiveAvgPool2d(1), 1 / 6),
    "reflection": (nn.ReflectionPad2d(2), 2),
    "zeros": (nn.ZeroPad2d((1, 2, 0, 1)), 1),
    "nearest": (nn.Upsample(scale_factor=2), 2),
    "bilinear": (nn.Upsample(scale_factor=2, mode="bilinear"), None),
    "softmax": (nn.Softmax(1), 0.5),
    "pixel shuffle": (nn.PixelShuffle(2), 1),
}


@pytest.mark.parametrize("module, expected", OTHERS.values(), ids=OTHERS)
def test_rules_without_weights(module, expected):
    module = module.double().eval()
    x = 3 * torch.randn(1, 4, 6, 6, dtype=F64)
    bound = lipschitz(module, x).bound
    if expected is not None:
        assert bound == pytest.approx(expected, rel=1e-9)
    worst = 0.0
    for _ in range(10):
        worst = max(worst, jacobian_norm(module, torch.randn(4, 6, 6, dtype=F64)))
    assert worst <= bound * EXACT
    assert bound <= 3 * worst or isinstance(module, (nn.MaxPool2d, nn.Softmax))


def test_overlapping_max_pooling_really_expands():
    x, y = torch.zeros(1, 1, 5, 5), torch.zeros(1, 1, 5, 5)
    y[0, 0, 2, 2] = 1
    pool = nn.MaxPool2d(3, 1)
    assert (pool(y) - pool(x)).norm() == 3 * (y - x).norm()
    assert lipschitz(pool, x).bound == 3


FUNCTIONS = {
    "residual": lambda m, x: x + m.linear(x),
    "residual, in place": lambda m, x: (m.linear(x).add_(x)).relu_(),
    "difference": lambda m, x: 2 - x.sub(m.linear(x)),
    "sum of itself": lambda m, x: x + x,
    "parts joined again": lambda m, x: torch.cat(x.chunk(2, 1), 1),
    "slices stacked again": lambda m, x: torch.stack(x.unbind(1), 1),
    "linear by keyword": lambda m, x: F.linear(x, weight=m.linear.weight),
    "celu and softplus": lambda m, x: F.softplus(F.celu(x, 0.5), beta=2.0),
    "concatenation": lambda m, x: torch.cat([x, F.relu(x), x], 1),
    "stack": lambda m, x: torch.stack((x, m.linear(x))).flatten(0, 1).reshape(1, -1),
    "scaled": lambda m, x: (x - m.mean) / m.std * 3,
    "scaled by a buffer": lambda m, x: m.std * x,
    "broadcast": lambda m, x: x.mean(1, keepdim=True) + m.linear(x) + m.mean,
    "broadcast product": lambda m, x: x[:, :1] * m.std,
    "expand": lambda m, x: x[:, :, None].expand(-1, -1, 5),
    "repeat": lambda m, x: x.repeat(1, 4),
    "mean": lambda m, x: x.view(x.size(0), 2, 3).mean(dim=-1),
    "sum": lambda m, x: torch.sum(x, 1, keepdim=True),
    "pad": lambda m, x: F.pad(x, (1, 2), value=50.0),
    "reflect": lambda m, x: F.pad(x, (2, 2), mode="reflect"),
    "chunks": lambda m, x: torch.cat([F.gelu(x.chunk(2, 1)[i]) for i in range(2)], 1),
    "slices": lambda m, x: x[:, 1:4] + x[:, None, 2],
    "functional": lambda m, x: F.leaky_relu(F.elu(x, 1.5), negative_slope=1.2),
    "linear": lambda m, x: F.linear(x, m.linear.weight, m.linear.bias),
    "max pool": lambda m, x: F.max_pool2d(x.view(1, 1, 2, 3), 2, stride=1).flatten(1),
    "average pool": lambda m, x: F.avg_pool1d(x[:, None], 3, 1),
    "interpolate": lambda m, x: F.interpolate(x[:, None], scale_factor=3.0, mode="linear"),
    "dropout": lambda m, x: F.dropout(x, 0.5, training=m.training) + torch.sigmoid(x).clamp(0, 0.7),
    "shapes": lambda m, x: x.reshape(x.shape[0], -1) * (1 / x.shape[1]),
    "constant": lambda m, x: x * m.linear(m.mean[None]),
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_rules_of_functions(function):
    model = Function(function, mean=torch.rand(6, dtype=F64), std=torch.rand(6, dtype=F64) + 0.1).eval()
    x = torch.randn(1, 6, dtype=F64)
    bound = lipschitz(model, x).bound
    worst = max(jacobian_norm(model, torch.randn(6, dtype=F64)) for _ in range(20))
    assert worst <= bound * EXACT and bound < 4 * worst


def test_sum_rules_by_hand():
    model = Function(FUNCTIONS["residual"])
    sigma = torch.linalg.matrix_norm(model.linear.weight, 2).item()
    x = torch.randn(2, 6, dtype=F64)
    assert lipschitz(model, x).bound == pytest.approx(1 + sigma)
    assert lipschitz(Function(FUNCTIONS["concatenation"]), x).bound == pytest.approx(math.sqrt(3))
    assert lipschitz(nn.Sequential(model, nn.ReLU(), model), x).bound == pytest.approx((1 + sigma) ** 2)
    assert lipschitz(Function(lambda m, x: m.mean[None] * 1.0, mean=torch.ones(6)), x).bound == 0
