"""Bounds and spectra of single layers against explicit matrices."""

import math

import pytest
import torch
from helpers.operators import EXACT, F64, norm
from torch import nn

import condlr_ext
from condlr_ext import LowRankConv2d, LowRankLinear, pruning
from condlr_ext.errors import NonFiniteError
from condlr_ext.robustness import layer_spectra, lipschitz, misalignment

CONVS = {
    "zeros": dict(kernel_size=3, padding=1),
    "valid": dict(kernel_size=3),
    "same, even": dict(kernel_size=(4, 2), padding="same"),
    "same, dilated": dict(kernel_size=3, padding="same", dilation=2),
    "wide padding": dict(kernel_size=3, padding=4),
    "stride 2": dict(kernel_size=3, stride=2, padding=1),
    "stride 2, dilation 2": dict(kernel_size=3, stride=2, padding=2, dilation=2),
    "stride above kernel": dict(kernel_size=2, stride=3),
    "groups": dict(kernel_size=3, padding=1, groups=2),
    "groups, stride": dict(kernel_size=3, padding=1, groups=2, stride=(1, 2)),
    "circular": dict(kernel_size=3, padding=1, padding_mode="circular"),
    "circular, stride": dict(kernel_size=3, padding=1, padding_mode="circular", stride=2),
    "circular, odd stride": dict(kernel_size=3, padding=1, padding_mode="circular", stride=4),
    "circular, wider": dict(kernel_size=2, padding=3, padding_mode="circular"),
    "reflect": dict(kernel_size=3, padding=2, padding_mode="reflect"),
    "replicate": dict(kernel_size=3, padding=(0, 2), padding_mode="replicate", stride=2),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize("options", CONVS.values(), ids=CONVS)
def test_convolution_bounds_hold_and_are_tight_on_a_ring(options, low_rank):
    layer = nn.Conv2d(4, 6, **options)
    if low_rank:
        layer = LowRankConv2d.from_dense(layer, rank=2)
    layer, size = layer.double(), (6, 7) if "circular" not in options.values() else (6, 6)
    true = norm(layer, (4, *size))
    x = torch.zeros(1, 4, *size, dtype=F64)
    report, patches = lipschitz(layer, x), lipschitz(layer, x, circulant=False)
    assert true <= report.bound * EXACT and report.bound <= patches.bound and patches.layers[0].how == "patches"
    W = layer.weight.detach().flatten(1)
    kernel = math.prod(layer.kernel_size)
    if options.get("padding_mode", "zeros") == "zeros":
        assert patches.bound <= math.sqrt(kernel) * torch.linalg.matrix_norm(W, 2) * EXACT
        if layer.stride == (1, 1):
            assert report.bound < 1.4 * true
    elif options["padding_mode"] == "circular" and layer.padding == (1, 1) and layer.stride in ((1, 1), (2, 2)):
        assert report.bound == pytest.approx(true, rel=1e-9) and report.layers[0].how == "circulant"
    assert report.layers[0].sigma_max == pytest.approx(torch.linalg.matrix_norm(W, 2).item())
    sigma = torch.linalg.svdvals(W)[: 2 if low_rank else 6]
    assert report.layers[0].kappa == pytest.approx((sigma[0] / sigma[-1]).item())


@pytest.mark.parametrize("low_rank", [False, True])
def test_other_dimensions(low_rank):
    for layer, shape in ((nn.Conv1d(3, 5, 4, padding=2), (3, 9)), (nn.Conv3d(2, 3, 2, padding=1), (2, 3, 4, 3))):
        if low_rank:
            layer = getattr(condlr_ext, "LowRank" + type(layer).__name__).from_dense(layer, rank=3)
        layer = layer.double()
        true, bound = norm(layer, shape), lipschitz(layer, torch.zeros(1, *shape, dtype=F64)).bound
        assert true <= bound * EXACT and bound < 1.4 * true


def test_a_low_rank_layer_is_bounded_as_its_weight_also_off_the_stiefel_manifold():
    layer = LowRankLinear(9, 7, rank=4).double()
    layer.U.data += 0.3 * torch.randn(7, 4)
    layer.S.data = torch.randn(4, 4, dtype=F64)
    x = torch.zeros(1, 9, dtype=F64)
    (row,) = lipschitz(layer, x).layers
    sigma = torch.linalg.svdvals(layer.weight)
    assert row.bound == pytest.approx(sigma[0].item()) == row.sigma_max
    assert row.kappa == pytest.approx((sigma[0] / sigma[3]).item()) and row.kind == "LowRankLinear"


def test_spectra_of_a_model_that_has_no_bound():
    model = nn.TransformerEncoderLayer(8, 2, 16).double()
    condlr_ext.factorize(model, rank=3, include=["linear1", "linear2"])
    spectra = layer_spectra(model)
    assert list(spectra) == ["self_attn.out_proj", "linear1", "linear2"]
    for name, (sigma_max, kappa) in spectra.items():
        sigma = torch.linalg.svdvals(model.get_submodule(name).weight)
        assert sigma_max == pytest.approx(sigma[0].item())
        assert kappa == pytest.approx((sigma[0] / sigma[2 if "linear" in name else -1]).item())
    model.linear2.S.data[0, 0] = math.inf
    with pytest.raises(NonFiniteError, match="layer_spectra: S of linear2 must be finite"):
        layer_spectra(model)


def test_pruned_weights_and_unbatched_images():
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(0), nn.Linear(64, 3)).double()
    x = torch.rand(1, 1, 4, 4, dtype=F64)
    dense = lipschitz(model, x).bound
    pruning.add_gates(model, exclude="3")
    model[0].parametrizations.weight[0].log_alpha.data.fill_(-1.0)
    pruning.add_masks(model, 0.3)
    pruned = lipschitz(model, x).bound
    pruning.make_permanent(model)
    assert pruned == pytest.approx(lipschitz(model, x).bound, rel=1e-12) and pruned < dense
    unbatched = nn.Sequential(nn.Flatten(0, 1), model[0])
    true = norm(model[0], (1, 4, 4))
    assert true <= lipschitz(unbatched, x).bound * EXACT <= 1.4 * true


def test_reserved_directions_are_no_part_of_the_weight():
    model, x = nn.Sequential(LowRankLinear(10, 8, rank=2)), torch.rand(3, 10)
    spectra, ratios = layer_spectra(model), misalignment(model, x)
    optimizer = condlr_ext.optim.CondLRSGD(model, lr=0.1, tau=0.1)
    condlr_ext.optim.RankController(model, optimizer, max_rank=6)
    assert model[0].rank == 6
    assert layer_spectra(model)["0"] == pytest.approx(spectra["0"], rel=1e-6)
    assert lipschitz(model, x).layers[0].kappa == pytest.approx(spectra["0"].kappa, rel=1e-6)
    torch.testing.assert_close(misalignment(model, x)["0"], ratios["0"], rtol=1e-6, atol=0)


def test_spectra_of_gates_are_those_of_eval_mode():
    model = nn.Sequential(nn.Linear(6, 5)).train()
    pruning.add_gates(model)
    random = torch.get_rng_state()
    assert layer_spectra(model) == layer_spectra(model.eval()) and torch.equal(torch.get_rng_state(), random)
