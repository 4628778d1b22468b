"""Certified radii hold under attack; misalignment against projections."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers.digits import shuffled_digits
from helpers.operators import EXACT, F64
from torch import nn

import condlr_ext
from condlr_ext import LowRankConv2d, LowRankLinear
from condlr_ext.attacks import pgd
from condlr_ext.robustness import certified_radius, lipschitz, misalignment


def test_radius_is_the_distance_to_the_boundary_of_a_linear_classifier():
    model = nn.Linear(6, 2).double()
    model.weight.data[1] = -model.weight.data[0]
    model.bias.data[:] = torch.tensor([0.1, -0.1])
    x = torch.rand(30, 6, dtype=F64)
    value = x @ model.weight[0] + 0.1
    y = (value < 0).long()
    torch.testing.assert_close(certified_radius(model, x, y), (value.abs() / model.weight[0].norm()).detach())
    assert not certified_radius(model, x, 1 - y).any()
    report = lipschitz(model, x)
    assert torch.equal(certified_radius(model, x, y, report), certified_radius(model, x, y, report.bound))
    model.weight.data.zero_()
    radius = certified_radius(model, x, torch.tensor([0, 1] * 15))
    assert torch.isinf(radius[::2]).all() and not radius[1::2].any()
    for bound in (-1.0, math.nan):
        with pytest.raises(ValueError, match="certified_radius: bound must be >= 0, got"):
            certified_radius(model, x, y, bound)
    with pytest.raises(ValueError, match="at least 2 classes, got 1"):
        certified_radius(nn.Linear(6, 1).double(), x, 0 * y)


@pytest.fixture(scope="module")
def digits():
    x, y = shuffled_digits()
    return x.view(-1, 1, 8, 8), y


@pytest.mark.parametrize("conv", [False, True])
def test_no_attack_succeeds_within_the_certified_radius(digits, conv):
    x, y = digits
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)]
    if conv:
        layers = [
            nn.Conv2d(1, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(128, 10),
        ]
    model = nn.Sequential(*layers)
    condlr_ext.factorize(model, budget=0.6, exclude=str(len(layers) - 1))
    optimizer = condlr_ext.optim.CondLRSGD(model, lr=0.1, momentum=0.9, tau=0.1, sigma_max=1.0)
    for _ in range(6):
        for index in torch.randperm(1200).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()
    model.eval()
    x, y = x[1200:1400], y[1200:1400]
    radius = certified_radius(model, x, y)
    clean = model(x).argmax(1) == y
    assert clean.float().mean() > 0.85 and torch.equal(radius > 0, clean) and radius.median() > 0.02
    generator = torch.Generator().manual_seed(0)
    attack = partial(pgd, norm="l2", steps=20, generator=generator)
    for index in clean.nonzero()[:, 0].split(1)[:25]:
        within = 0.999 * radius[index].item()
        eps = [within, 4 * within, 16 * within, 64 * within]
        found = attack(model, x[index], y[index], eps)
        assert (found[0] - x[index]).norm() <= within * (1 + 1e-5)
        wrong = model(found[:, 0]).argmax(1) != y[index]
        assert not wrong[0]
    budgets = [0.5 * radius.median().item(), 3.0]
    found = attack(model, x, y, budgets)
    survived = [(model(f).argmax(1) == y).double().mean().item() for f in found]
    certified = [(radius > eps).double().mean().item() for eps in budgets]
    assert certified[0] > 0.4 and all(c <= s for c, s in zip(certified, survived, strict=True))
    assert survived[1] < 0.2  # the attack is one


def test_misalignment_of_linear_layers():
    layer, dense = LowRankLinear(8, 6, rank=3, dtype=F64), nn.Linear(8, 4).double()
    model = nn.Sequential(layer, nn.Tanh(), nn.Linear(6, 9).double())
    z = torch.randn(12, 8, dtype=F64)
    z[0], z[1] = 0, layer.V[:, 0].detach()
    z[2] = torch.linalg.qr(torch.cat((layer.V.detach(), torch.eye(8, dtype=F64)), 1)).Q[:, 5]  # orthogonal to V
    z[2] -= layer.V.detach() @ (layer.V.detach().mT @ z[2])
    found = misalignment(model, z)
    torch.testing.assert_close(found["0"][3:], (z.norm(dim=1) / (z @ layer.V).norm(dim=1)).detach()[3:])
    assert found["0"][0] == 1 and found["0"][1] == pytest.approx(1) and found["0"][2] > 1e10
    torch.testing.assert_close(found["2"], torch.ones(12, dtype=F64))  # tall: every z is in the row space
    fat = misalignment(dense, z)[""]
    projector = torch.linalg.pinv(dense.weight) @ dense.weight
    torch.testing.assert_close(fat[1:], (z.norm(dim=1) / (z @ projector.mT).norm(dim=1)).detach()[1:])
    dense.weight.data[1:] = dense.weight.data[:1]  # rank 1
    w = dense.weight[0] / dense.weight[0].norm()
    torch.testing.assert_close(misalignment(dense, z)[""][3:], (z.norm(dim=1) / (z @ w).abs()).detach()[3:])
    # what kappa bounds, and what it leaves open
    with torch.no_grad():
        W = layer.weight
        layer_condition = torch.linalg.matrix_norm(W, 2) * z.norm(dim=1) / (z @ W.mT).norm(dim=1)
    kappa = layer.condition_number()
    assert (layer_condition[3:] <= kappa * found["0"][3:] * EXACT).all() and (layer_condition[3:] > kappa).any()


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_misalignment_does_not_depend_on_the_scale_of_the_input(scale):
    for model, z in (
        (LowRankLinear(8, 6, rank=3, dtype=F64), torch.randn(5, 8, dtype=F64)),
        (LowRankConv2d(2, 4, 3, rank=2).double(), torch.randn(5, 2, 6, 6, dtype=F64)),
    ):
        torch.testing.assert_close(misalignment(model, scale * z), misalignment(model, z))


@pytest.mark.parametrize(
    "options",
    [
        dict(padding=1),
        dict(stride=2, dilation=2),
        dict(padding="same", groups=2),
        dict(padding=1, padding_mode="circular"),
    ],
    ids=str,
)
@pytest.mark.parametrize("low_rank", [False, True])
def test_misalignment_of_convolutions_is_that_of_their_patches(options, low_rank):
    conv = nn.Conv2d(4, 6, 3, **options).double()
    z = torch.randn(5, 4, 7, 7, dtype=F64)
    if low_rank:
        conv = LowRankConv2d.from_dense(conv, rank=2)
    pad = 0 if "padding" not in options else 1
    padded = F.pad(z, (pad,) * 4, mode="circular" if "padding_mode" in options else "constant")
    patches = F.unfold(padded, 3, dilation=conv.dilation, stride=conv.stride)
    patches = patches.unflatten(1, (conv.groups, -1))
    P = torch.linalg.pinv(conv.weight.flatten(1)) @ conv.weight.flatten(1)
    seen = torch.einsum("ij,bgjl->bgil", P, patches)
    expected = patches.flatten(1).norm(dim=1) / seen.flatten(1).norm(dim=1)
    torch.testing.assert_close(misalignment(conv, z)[""], expected.detach())


def test_misalignment_leaves_the_model_alone_and_joins_calls():
    layer = LowRankLinear(6, 6, rank=2)
    model = nn.Sequential(layer, nn.Dropout(0.5), layer).train()
    assert misalignment(model, torch.rand(4, 6))["0"].shape == (8,)
    assert model.training and not layer._forward_pre_hooks
    with pytest.raises(RuntimeError):
        misalignment(model, torch.rand(4, 5))
    assert model.training and not layer._forward_pre_hooks
    with pytest.raises(ValueError, match="misalignment: the model must call nn.Linear"):
        misalignment(nn.Sequential(nn.ReLU()), torch.rand(4, 5))
    zero = nn.Conv2d(1, 2, 3)
    zero.weight.data.zero_()
    assert torch.isinf(misalignment(zero, torch.rand(2, 1, 4, 4))[""]).all()
    assert misalignment(layer, torch.rand(0, 6))[""].shape == (0,)
    named = Named()
    assert torch.equal(misalignment(named, torch.ones(2, 6))["layer"], misalignment(named.layer, torch.ones(2, 6))[""])


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = LowRankLinear(6, 6, rank=2)

    def forward(self, x):
        return self.layer(input=x)
