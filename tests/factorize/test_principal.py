"""Principal directions of a layer's inputs as its row space."""

import copy

import pytest
import torch
from helpers.models import mlp
from torch import nn

import condlr_ext
from condlr_ext import factorize
from condlr_ext.factorize import principal
from condlr_ext.factorize.principal import patches


def leading(z, rank):
    """Projector onto the leading eigenvectors of zᵀ z, in float64, by LAPACK."""
    _, Q = torch.linalg.eigh(z.mT.double() @ z.double())
    return Q[:, -rank:] @ Q[:, -rank:].mT


def assert_on_leading(layer, W, z):
    """The layer has the weight W on the leading directions of z [N, n], and orthonormal factors."""
    W = W.detach().flatten(1).double()
    expected = W @ leading(z, layer.rank)
    torch.testing.assert_close(layer.weight.flatten(1).double(), expected, rtol=0, atol=4e-6 * W.norm().item())
    for X in (layer.U, layer.V):
        torch.testing.assert_close(X.mT @ X, torch.eye(layer.rank), rtol=0, atol=1e-5)


def test_principal_directions_of_each_layers_inputs():
    torch.manual_seed(0)
    model = mlp()
    x = torch.rand(200, 64) * torch.linspace(0, 1, 64).square()
    x[:, :7] = 0  # never lit: nothing of the weight there is worth a direction
    dense = copy.deepcopy(model)
    hidden = torch.relu(dense[0](x))
    states = torch.get_rng_state(), model[0].weight.grad
    report = factorize(model, rank={"0": 30, "2": 12}, init="pca", example_input=x)
    assert torch.equal(states[0], torch.get_rng_state()) and model[0].U.grad is None and model.training
    assert_on_leading(model[0], dense[0].weight, x)
    assert_on_leading(model[2], dense[2].weight, hidden)
    assert model[0].V[:7].abs().max() < 1e-6 and model[0].bias is not None
    assert report.layers[0].kappa == pytest.approx(model[0].condition_number(), rel=1e-4)

    plain = copy.deepcopy(dense)
    factorize(plain, rank={"0": 30, "2": 12})
    ours, theirs = (condlr_ext.robustness.misalignment(m, x) for m in (model, plain))
    assert all(ours[name].mean() < theirs[name].mean() for name in ("0", "2"))


@pytest.mark.parametrize(
    "conv, shape",
    [
        (nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2), (5, 4, 9, 8)),
        (nn.Conv2d(4, 6, (3, 2), padding="same", groups=2), (5, 4, 6, 7)),
        (nn.Conv2d(2, 6, 3, padding=(1, 2), padding_mode="circular"), (5, 2, 6, 7)),
        (nn.Conv2d(2, 6, 3, padding="valid"), (2, 6, 7)),
        (nn.Conv1d(3, 5, 4, stride=3, padding=2), (6, 3, 11)),
        (nn.Conv3d(2, 6, 2, padding="same", padding_mode="replicate"), (3, 2, 4, 4, 5)),
    ],
    ids=str,
)  # fmt: skip
def test_patches_are_what_the_flattened_weight_is_multiplied_with(conv, shape, monkeypatch):
    torch.manual_seed(0)
    conv, x = copy.deepcopy(conv).double(), torch.randn(shape, dtype=torch.float64)
    batch = x if x.dim() == len(conv.kernel_size) + 2 else x[None]
    z = patches(conv, batch)
    expected = conv(batch) - conv.bias.view(-1, *[1] * len(conv.kernel_size))
    W = conv.weight.flatten(1).view(conv.groups, -1, z.shape[1])
    N, m = expected.shape[:2]
    produced = torch.einsum("ngpk,gmk->ngmp", z.view(N, conv.groups, -1, z.shape[1]), W).reshape(expected.shape)
    torch.testing.assert_close(produced, expected)
    monkeypatch.setattr(principal, "ENTRIES", 1)  # sample by sample
    model = nn.Sequential(copy.deepcopy(conv).float())
    factorize(model, rank=3, init="pca", example_input=x.float())
    assert_on_leading(model[0], conv.weight, z)


def test_principal_directions_of_attention_ties_and_layers_not_called():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=6, batch_first=True)
    packed, q, k = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(4, 5, 8), torch.randn(4, 3, 6)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.cross, self.packed = attention, packed
            self.a, self.b, self.unused = (nn.Linear(8, 8) for _ in range(3))
            self.b.weight = self.a.weight

        def forward(self, q, k):
            y = self.cross(q, k, k, need_weights=False)[0]
            return self.b(torch.relu(self.a(self.packed(y, y, y, need_weights=False)[0])))

    model = Net()
    dense = copy.deepcopy(model)
    y = dense.cross(q, k, k, need_weights=False)[0].detach()
    first = dense.packed(y, y, y, need_weights=False)[0].detach()
    twice = torch.cat([first.flatten(0, 1), torch.relu(dense.a(first)).detach().flatten(0, 1)])
    factorize(model, rank=3, init="pca", example_input=(q, k))
    assert_on_leading(model.cross.q_proj, dense.cross.q_proj_weight, q.flatten(0, 1))
    assert_on_leading(model.cross.v_proj, dense.cross.v_proj_weight, k.flatten(0, 1))
    assert_on_leading(model.packed.in_proj, dense.packed.in_proj_weight, y.flatten(0, 1))
    assert_on_leading(model.a, dense.a.weight, twice)
    assert model.a.V is model.b.V
    plain = copy.deepcopy(dense)
    factorize(plain, rank=3)
    for name in ("cross.out_proj", "packed.out_proj", "unused"):  # as with "svd"
        assert torch.equal(model.get_submodule(name).weight, plain.get_submodule(name).weight)


def test_inputs_of_few_dimensions_leave_the_rest_to_the_weight():
    torch.manual_seed(0)
    few, W = torch.randn(3, 9) @ torch.eye(9), nn.Linear(9, 9, dtype=torch.float64)
    P = leading(few, 3)
    model = nn.Sequential(copy.deepcopy(W))
    factorize(model, rank=5, init="pca", example_input=few.double())
    U, sigma, Vh = torch.linalg.svd(W.weight - W.weight @ P)
    expected = W.weight @ P + (U[:, :2] * sigma[:2]) @ Vh[:2]
    torch.testing.assert_close(model[0].weight, expected, rtol=0, atol=1e-9)
    plain = nn.Sequential(copy.deepcopy(W))
    factorize(plain, rank=5)
    for nothing in (torch.zeros(4, 9, dtype=torch.float64), torch.zeros(0, 9, dtype=torch.float64)):
        model = nn.Sequential(copy.deepcopy(W))
        factorize(model, rank=5, init="pca", example_input=nothing)
        assert torch.equal(model[0].weight, plain[0].weight)


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_principal_directions_do_not_depend_on_the_scale_of_the_inputs(scale):
    projectors = []
    for factor in (1.0, scale):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 8)).double()
        x = torch.randn(50, 12, dtype=torch.float64) * torch.linspace(0.1, 1, 12)
        factorize(model, rank=4, init="pca", example_input=x * factor)
        projectors.append(model[0].V @ model[0].V.mT)
    torch.testing.assert_close(projectors[1], projectors[0])
