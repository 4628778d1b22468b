"""Layers against their dense twins: function, gradients, shapes, dtypes, autocast, meta device, errors."""

import copy
import itertools
import math
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers.layers import CONVS, randomize
from helpers.matrices import backward_error, kappa, non_orthonormality
from torch import nn
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

import condlr_ext
from condlr_ext import LowRankConv1d, LowRankConv2d, LowRankConv3d, LowRankLinear, functional
from condlr_ext.errors import NonFiniteError, RankError, ShapeError
from condlr_ext.nn import truncated
from condlr_ext.nn.truncated import randomized_svd

ROUTES = pytest.mark.parametrize("route", ["factorized", "merged"])


@pytest.mark.parametrize("options", CONVS, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("cls", [LowRankConv1d, LowRankConv2d, LowRankConv3d])
@ROUTES
def test_conv_is_its_dense_twin(backend, cls, options, route):
    d = cls._d
    layer = randomize(cls(4, 6, **options, rank=3, dtype=torch.float64))
    layer.route = route
    dense = layer.to_dense()
    assert type(dense) is cls._dense and (dense.bias is None) == (options.get("bias") is False)
    x = torch.randn(2, 4, *[9, 8, 7][:d], dtype=torch.float64)
    torch.testing.assert_close(layer(x), dense(x))
    torch.testing.assert_close(layer(x[0]), dense(x[0]))
    if d == 2:
        nhwc = x.to(memory_format=torch.channels_last)
        torch.testing.assert_close(layer(nhwc), dense(x))
    assert layer.weight.shape == dense.weight.shape
    back = cls.from_dense(dense, rank=3)
    torch.testing.assert_close(back.weight, dense.weight)
    assert max(non_orthonormality(back.U), non_orthonormality(back.V)) < 1e-12


@pytest.mark.parametrize("m,n,r", [(1, 1, 1), (3, 17, 2), (33, 5, 5), (10, 64, 10), (63, 100, 17)])
@pytest.mark.parametrize("lead", [(), (7,), (2, 3), (0,), (300,)], ids=str)
@ROUTES
def test_linear_is_its_dense_twin(backend, m, n, r, lead, route):
    for bias in (True, False):
        layer = randomize(LowRankLinear(n, m, bias, rank=r, dtype=torch.float64))
        layer.route = route
        dense = layer.to_dense()
        x = torch.randn(*lead, n, dtype=torch.float64)
        torch.testing.assert_close(layer(x), dense(x))
        wide = torch.randn(*lead, 2 * n, dtype=torch.float64)[..., ::2]
        torch.testing.assert_close(layer(wide), dense(wide))


def gradients(fn, tensors):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    fn(*leaves).pow(2).sum().backward()
    return [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows,m,n,r", [(3, 33, 17, 5), (64, 20, 30, 20), (40, 100, 7, 3), (300, 150, 90, 70)])
@ROUTES
def test_error_is_that_of_plain_pytorch(backend, dtype, rows, m, n, r, route):
    """Outputs and gradients: at most twice the error of the same products in plain PyTorch at the same dtype."""

    def plain(X, U, S, V, b):
        return X @ V @ S.mT @ U.mT + b if route == "factorized" else F.linear(X, U @ S @ V.mT, b)

    layer = partial(functional.low_rank_linear, route=route)
    shapes = ((rows, n), (m, r), (r, r), (n, r), (m,))
    exact = [torch.randn(s, dtype=dtype).double() / s[-1] ** 0.5 for s in shapes]
    low = [t.to(dtype) for t in exact]
    truth = [plain(*exact), *gradients(plain, exact)]
    ours = [layer(*low), *gradients(layer, low)]
    theirs = [plain(*low), *gradients(plain, low)]
    for o, p, t in zip(ours, theirs, truth, strict=True):
        assert o.dtype == dtype
        # the order of the products may differ: one rounding of the result is always allowed
        atol = torch.finfo(dtype).eps * t.abs().max()
        assert (o.double() - t).abs().max() <= 2 * (p.double() - t).abs().max() + atol


def test_fresh_layers_are_on_the_constraint_set_at_torchs_scale():
    for layer in (LowRankLinear(200, 300, rank=40), LowRankConv2d(16, 32, 3, groups=2, rank=20)):
        assert max(non_orthonormality(layer.U), non_orthonormality(layer.V)) < 1e-6
        assert kappa(layer.S.detach()) <= 1 + 1e-6 and layer.condition_number() <= 1 + 1e-6
    x = torch.randn(2000, 200)
    variance = LowRankLinear(200, 300, bias=False, rank=40)(x).var()
    assert variance.item() == pytest.approx(nn.Linear(200, 300, bias=False)(x).var().item(), rel=0.1)


def test_from_dense_is_the_best_approximation():
    dense = nn.Linear(30, 20).double()
    sigma = torch.linalg.svdvals(dense.weight)
    for r in (1, 7, 20):
        layer = LowRankLinear.from_dense(dense, rank=r)
        error = (layer.weight - dense.weight).norm()
        assert error.item() == pytest.approx(sigma[r:].norm().item(), abs=1e-12)
        assert torch.equal(layer.bias, dense.bias) and layer.rank == r
    assert LowRankLinear.from_dense(dense, rank=0.3).rank == 6


def test_from_dense_keeps_mode_grad_and_dtype():
    dense = nn.Conv2d(3, 8, 3, padding=1).to(torch.bfloat16).eval().requires_grad_(False)
    layer = LowRankConv2d.from_dense(dense, rank=4)
    assert not layer.training and not layer.S.requires_grad and layer.U.dtype == torch.bfloat16
    assert layer.padding == (1, 1)
    with pytest.raises(TypeError, match="LowRankLinear.from_dense: module must be Linear, got Conv2d"):
        LowRankLinear.from_dense(dense, rank=2)


def test_geometry_may_differ_by_dimension(backend):
    """Depthwise, one size per dimension."""
    options = dict(kernel_size=(1, 3, 5), stride=(2, 1, 3), padding=(0, 1, 2), dilation=(1, 2, 1), groups=4)
    layer = randomize(LowRankConv3d(4, 8, **options, rank=2, dtype=torch.float64))
    x = torch.randn(2, 4, 6, 7, 8, dtype=torch.float64)
    for route in ("factorized", "merged"):
        layer.route = route
        torch.testing.assert_close(layer(x), layer.to_dense()(x))


@pytest.mark.parametrize("value", [torch.zeros(4, 5), nn.Parameter(torch.zeros(4, 5)), None], ids=type)
def test_weight_is_differentiable_and_read_only(value):
    layer = LowRankLinear(5, 4, rank=2)
    layer.weight.sum().backward()
    assert all(p.grad is not None for p in (layer.U, layer.S, layer.V))
    with pytest.raises(AttributeError, match="LowRankLinear.weight is formed from U, S and V and cannot be assigned"):
        layer.weight = value
    assert set(layer.state_dict()) == {"U", "S", "V", "bias"}


def test_tools_that_look_at_weights():
    """Reading works; those that would put another weight in its place refuse, and leave the layer as it was."""
    layer = LowRankConv2d(3, 8, 3, rank=2)
    x = torch.randn(1, 3, 5, 5)
    before = layer(x)
    assert prune.L1Unstructured(amount=0.5).compute_mask(layer.weight, torch.ones(8, 3, 3, 3)).sum() == 108
    assert torch.nn.init._calculate_fan_in_and_fan_out(layer.weight) == (27, 72)
    assert layer.weight.device == layer.U.device and layer.weight.dtype == layer.U.dtype
    penalty = layer.weight.abs().sum()
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(penalty, (layer.U, layer.S, layer.V)))
    for tool in (
        lambda: prune.l1_unstructured(layer, "weight", 0.5),
        lambda: torch.nn.utils.parametrizations.spectral_norm(layer),
        lambda: torch.nn.utils.parametrizations.weight_norm(layer),
    ):
        with pytest.raises((TypeError, ValueError, KeyError)):
            tool()
        assert type(layer) is LowRankConv2d and set(layer.state_dict()) == {"U", "S", "V", "bias"}
        assert torch.equal(layer(x), before)


def test_meta_layers_and_their_parameters_later(backend):
    for layer in (
        LowRankLinear(20, 10, rank=3, device="meta"),
        LowRankConv2d(4, 6, 3, groups=2, rank=3, device="meta"),
    ):
        assert all(p.is_meta for p in layer.parameters()) and layer.weight.is_meta
        layer.to_empty(device="cpu").reset_parameters()
        assert max(non_orthonormality(layer.U), non_orthonormality(layer.V)) < 1e-6
        assert layer.condition_number() <= 1 + 1e-6 and layer.bias.isfinite().all()


@pytest.mark.parametrize("m,n", [(1100, 1030), (1030, 1100)])
@pytest.mark.parametrize("spectrum", ["flat", "graded", "low rank"])
def test_large_weights_take_a_randomized_svd(m, n, spectrum, monkeypatch):
    """Its error is within 1 % of the best, for fresh weights, graded ones and those of lower rank; reproducibly."""
    A = torch.randn(m, n) / n**0.5
    if spectrum != "flat":
        sigma = torch.logspace(0, -3, 1030) if spectrum == "graded" else torch.ones(1030) * (torch.arange(1030) < 30)
        A = torch.linalg.qr(torch.randn(m, 1030))[0] * sigma @ torch.linalg.qr(torch.randn(n, 1030))[0].mT
    calls = []
    monkeypatch.setattr(truncated, "randomized_svd", lambda *args: calls.append(args) or randomized_svd(*args))
    linear = nn.Linear(n, m, device="meta")
    linear.weight, linear.bias = nn.Parameter(A), nn.Parameter(torch.zeros(m))
    state = torch.get_rng_state()
    layer = LowRankLinear.from_dense(linear, rank=60)
    assert len(calls) == 1 and torch.equal(torch.get_rng_state(), state)
    sigma = torch.linalg.eigvalsh(A.double().mT @ A.double()).flip(0).clamp_min(0).sqrt()
    best = sigma[60:].norm()
    rounding = max(m, n) ** 0.5 * torch.finfo(torch.float32).eps  # of the products' sums of max(m, n) terms
    assert (layer.weight - A).norm() <= 1.01 * best + rounding * sigma.norm()
    assert max(non_orthonormality(layer.U), non_orthonormality(layer.V)) < 1e-5
    assert (layer.S.diagonal().diff() <= 0).all() and (layer.S.diagonal() >= 0).all()
    assert torch.equal(LowRankLinear.from_dense(linear, rank=60).weight, layer.weight)
    truncated.truncated_svd(A[:100], 10)
    assert len(calls) == 2  # small ones are exact


def test_autocast_runs_in_its_dtype(backend):
    layer = LowRankLinear(20, 10, rank=4)
    conv = LowRankConv2d(2, 4, 3, rank=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, z = layer(torch.randn(3, 20)), conv(torch.randn(1, 2, 5, 5))
    assert y.dtype == z.dtype == torch.bfloat16
    (y.float().sum() + z.float().sum()).backward()
    assert layer.S.grad.dtype == torch.float32 and torch.isfinite(conv.V.grad).all()


def test_autocast_does_not_reach_to_dense_and_the_start():
    layer = LowRankLinear(20, 10, rank=4)
    exact = layer.to_dense().weight
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.to_dense().weight, exact)
        S = layer.S.detach().clone()
        condlr_ext.optim.CondLRSGD(layer, 0.1, tau=0.1)
    assert torch.equal(layer.S, S)


def test_factors_are_orthonormal_in_their_own_precision():
    layer = LowRankLinear(30, 20, rank=5, dtype=torch.float64)
    assert max(non_orthonormality(layer.U), non_orthonormality(layer.V)) < 1e-14


def test_meta_device_then_materialise():
    layer = LowRankLinear(6, 5, rank=2, device="meta")
    assert layer(torch.randn(3, 6, device="meta")).shape == (3, 5)
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert non_orthonormality(layer.U) < 1e-6
    assert torch.isfinite(layer(torch.randn(3, 6))).all()


def test_state_dict_pickle_deepcopy():
    layer = randomize(LowRankConv2d(2, 3, 3, rank=2))
    x = torch.randn(1, 2, 5, 5)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
    other = LowRankConv2d(2, 3, 3, rank=2)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x)) and set(layer.state_dict()) == {"U", "S", "V", "bias"}


def test_repr_names_the_rank():
    assert "rank=2" in repr(LowRankLinear(6, 5, rank=2))
    assert "rank=2, bias=False, groups=2" in repr(LowRankConv2d(2, 4, 3, groups=2, bias=False, rank=2))


U, S, V = torch.randn(4, 2), torch.randn(2, 2), torch.randn(5, 2)
X = torch.randn(3, 5)
linear, conv = functional.low_rank_linear, functional.low_rank_conv2d
image, Vc = torch.randn(1, 2, 6, 6), torch.randn(18, 2)


@pytest.mark.parametrize(
    "call,error,text",
    [
        (lambda: LowRankLinear(6, 5, rank=6), RankError, r"LowRankLinear: rank must be in 1..min\(m, n\) = 5 for a 5 x 6 weight, got 6"),
        (lambda: LowRankLinear(6, 5, rank=0), RankError, "got 0"),
        (lambda: LowRankLinear(6, 5, rank=1.5), RankError, r"a fraction must be in \(0, 1\], got 1.5"),
        (lambda: LowRankLinear(6, 5, rank=True), TypeError, "rank must be an int or a fraction"),
        (lambda: LowRankLinear("a", 5, rank=1), ValueError, "in_features must be an int >= 1, got 'a'"),
        (lambda: LowRankLinear(3, -5, rank=1), ValueError, "out_features must be an int >= 1, got -5"),
        (lambda: LowRankConv2d(0, 6, 3, rank=1), ValueError, "in_channels must be an int >= 1, got 0"),
        (lambda: LowRankConv2d(4, 6, 3, stride=1.5, rank=2), ValueError, "stride must be an int or 2 ints >= 1, got 1.5"),
        (lambda: LowRankConv2d(4, 6, None, rank=2), ValueError, "kernel_size must be an int or 2 ints >= 1, got None"),
        (lambda: LowRankConv2d(4, 6, 3, groups=3, rank=2), ValueError, "groups must divide in_channels = 4 and out_channels = 6, got 3"),
        (lambda: LowRankConv2d(4, 6, 3, padding="half", rank=2), ValueError, "padding must be ints"),
        (lambda: LowRankConv2d(4, 6, 3, padding="same", stride=2, rank=2), ValueError, "needs stride 1"),
        (lambda: LowRankConv2d(4, 6, (3, 3, 3), rank=2), ValueError, "kernel_size must be an int or 2 ints >= 1"),
        (lambda: LowRankConv2d(4, 6, 3, padding_mode="mirror", rank=2), ValueError, "padding_mode must be one of"),
        (lambda: linear(torch.randn(3, 4), U, S, V), ShapeError, r"input must be \[\*, 5\] to fit V \[5, 2\], got \[3, 4\]"),
        (lambda: linear(X, U, torch.randn(3, 3), V), ShapeError, "must share r"),
        (lambda: linear(X, U[0], S, V), ShapeError, "U, S, V must be matrices"),
        (lambda: linear(X, U, S, V, torch.randn(3)), ShapeError, r"bias must be \[4\] to fit U, got \[3\]"),
        (lambda: linear(X, torch.randn(4, 6), torch.randn(6, 6), torch.randn(5, 6)), RankError, "= 4, got 6"),
        (lambda: linear(X.double(), U, S, V), TypeError, "one dtype, got input torch.float64, U torch.float32"),
        (lambda: linear(X.int(), U, S, V), TypeError, "input must be a real floating-point tensor, got torch.int32"),
        (lambda: linear(X.to("meta"), U, S, V), ValueError, "one device, got cpu, meta"),
        (lambda: conv(image, U, S, Vc, kernel_size=2), ShapeError, "multiple of prod|must have 3 or 4 dimensions"),
        (lambda: conv(image[:, :1], U, S, Vc, kernel_size=3), ShapeError, "with 2 channels to fit V"),
        (lambda: conv(image, U, S, Vc, groups=3, kernel_size=3), ValueError, "groups must be a positive divisor of C_out = 4"),
        (lambda: conv(image, U, S, Vc, dilation=4, kernel_size=3), ShapeError, "is smaller than the kernel"),
        (lambda: conv(image, U, S, Vc, stride=0, kernel_size=3), ValueError, "stride must be an int or 2 ints >= 1, got 0"),
    ],
)  # fmt: skip
def test_bad_input(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_nan_core_is_named():
    model = nn.Sequential(nn.Linear(4, 4), LowRankLinear(4, 4, rank=2))
    model[1].S.data[0, 1] = math.nan
    with pytest.raises(NonFiniteError, match="layer 1: .*S must be finite"):
        condlr_ext.condition_numbers(model)


def test_conv_of_one_tap_is_a_linear_map():
    layer = randomize(LowRankConv2d(5, 4, 1, rank=3, dtype=torch.float64))
    x = torch.randn(2, 5, 3, 3, dtype=torch.float64)
    flat = F.linear(x.movedim(1, -1), layer.weight.flatten(1), layer.bias).movedim(-1, 1)
    torch.testing.assert_close(layer(x), flat)


def image_layer(dtype, groups=1, **options):
    """Tensors of a convolution, and the layer and its plain twin as functions of them."""
    shapes = ((2, 6, 9, 9), (8, 5), (5, 5), (6 // groups * 9, 5), (8,))
    tensors = [torch.randn(s, dtype=dtype).double() / max(s[-1], 5) ** 0.5 for s in shapes]

    def plain(X, U, S, V, b):
        if options["route"] == "merged":
            return F.conv2d(X, (U @ S @ V.mT).reshape(8, -1, 3, 3), b, padding=1, groups=groups)
        filters = V.mT.reshape(5, -1, 3, 3).repeat(groups, 1, 1, 1)
        P = F.conv2d(X, filters, padding=1, groups=groups)
        return F.conv2d(P, (U @ S)[:, :, None, None], b, groups=groups)

    layer = partial(functional.low_rank_conv2d, kernel_size=3, padding=1, groups=groups, **options)
    return tensors, layer, plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("groups", [1, 2])
@ROUTES
def test_conv_error_is_that_of_plain_pytorch(backend, dtype, groups, route):
    """Outputs and gradients, in both memory formats, as for the linear layer."""
    exact, layer, plain = image_layer(dtype, groups, route=route)
    truth = [plain(*exact), *gradients(plain, exact)]
    for memory_format in (torch.contiguous_format, torch.channels_last):
        low = [t.to(dtype) for t in exact]
        low[0] = low[0].contiguous(memory_format=memory_format)
        ours, theirs = ([fn(*low), *gradients(fn, low)] for fn in (layer, plain))
        for o, p, t in zip(ours, theirs, truth, strict=True):
            assert o.dtype == dtype
            atol = torch.finfo(dtype).eps * t.abs().max()
            assert (o.double() - t).abs().max() <= 2 * (p.double() - t).abs().max() + atol


@ROUTES
def test_autocast_is_as_right_as_the_dtype(route):
    exact, layer, plain = image_layer(torch.float32, route=route)
    single = [t.float() for t in exact]
    truth = [plain(*exact), *gradients(plain, exact)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = [layer(*single), *gradients(layer, single)]
        theirs = [plain(*single), *gradients(plain, single)]
    assert ours[0].dtype == torch.bfloat16 and all(g.dtype == torch.float32 for g in ours[1:])
    for o, p, t in zip(ours, theirs, truth, strict=True):
        atol = torch.finfo(torch.bfloat16).eps * t.abs().max()
        assert (o.double() - t).abs().max() <= 2 * (p.double() - t).abs().max() + atol


@ROUTES
def test_channels_last_without_copies(route):
    """No activation changes its memory format on the way, and nothing is copied but filters."""
    layer = LowRankConv2d(16, 32, 3, padding=1, rank=8)
    layer.route = route
    # from 16 images on torch leaves pointwise convolutions to oneDNN also on one thread
    x = torch.randn(16, 16, 12, 12).to(memory_format=torch.channels_last).requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        y = layer(x)
        y.backward(torch.randn_like(y))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert x.grad.is_contiguous(memory_format=torch.channels_last)
    copies = [e.input_shapes[0] for e in profile.events() if e.name in ("aten::copy_", "aten::_to_copy")]
    assert copies and all(math.prod(shape) < x.numel() for shape in copies)


def vgg16() -> nn.Sequential:
    layers, channels = [], 3
    for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
        if width == 0:
            layers.append(nn.MaxPool2d(2))
            continue
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.LeakyReLU()]
        channels = width
    head = [nn.Linear(512, 512), nn.LeakyReLU(), nn.Linear(512, 512), nn.LeakyReLU(), nn.Linear(512, 10)]
    return nn.Sequential(*layers, nn.Flatten(), *head)


def saved_bytes(model: nn.Module, x: torch.Tensor) -> int:
    """What the forward keeps for the backward, beside parameters and buffers."""
    known = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    storages = {}

    def pack(t):
        if t.untyped_storage()._cdata not in known:
            storages[t.untyped_storage()._cdata] = t.untyped_storage()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = model(x)
    assert output.requires_grad
    return sum(s.nbytes() for s in storages.values())


def test_memory_of_a_training_iteration_is_below_the_dense_models():
    """Saved tensors, parameters and gradients of VGG16 at 20 % rank; of P no more is kept than its size says."""
    with torch.device("meta"):
        dense, x = vgg16(), torch.empty(128, 3, 32, 32)
        saved = {"dense": saved_bytes(dense, x)}
        total = {"dense": saved["dense"] + 8 * sum(p.numel() for p in dense.parameters())}
        low_rank = vgg16()
        condlr_ext.factorize(low_rank, rank=0.2, exclude=str(len(low_rank) - 1), init="random")
        thin = 0
        for layer in low_rank:
            if isinstance(layer, condlr_ext.nn.LowRankLayer):
                layer.register_forward_hook(lambda layer, _, y: pixels.append(layer.rank * y.numel() // y.shape[1]))
        for route in ("factorized", "merged"):
            pixels = []
            for layer in low_rank:
                if isinstance(layer, condlr_ext.nn.LowRankLayer):
                    layer.route = route
            saved[route] = saved_bytes(low_rank, x)
            total[route] = saved[route] + 8 * sum(p.numel() for p in low_rank.parameters())
            thin = 4 * sum(pixels)
    assert saved["merged"] == saved["dense"] and saved["factorized"] == saved["dense"] + thin
    assert total["factorized"] < 0.93 * total["dense"] and total["merged"] < 0.9 * total["dense"]


def test_frozen_layers_keep_nothing_they_do_not_need():
    layer = LowRankLinear(40, 30, rank=5).requires_grad_(False)
    x = torch.randn(8, 40, requires_grad=True)
    for route in ("factorized", "merged"):
        layer.route = route
        assert saved_bytes(layer, x) == 0
        layer.V.requires_grad_(True)
        assert saved_bytes(layer, x) == x.numel() * 4
        layer.V.requires_grad_(False)
    layer.route = "factorized"
    layer.U.requires_grad_(True)
    assert saved_bytes(layer, x.detach()) == 8 * 5 * 4


def test_route_is_validated_and_kept():
    layer = randomize(LowRankConv2d(2, 3, 3, rank=2))
    assert layer.route == "auto" and "route" not in repr(layer)
    layer.route = "merged"
    assert "route=merged" in repr(layer) and set(layer.state_dict()) == {"U", "S", "V", "bias"}
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.route == "merged"
    with pytest.raises(
        ValueError, match="LowRankConv2d.route: route must be one of auto, factorized, merged, got 'fast'"
    ):
        layer.route = "fast"
    assert layer.route == "merged"
    for fn, args in ((linear, (X, U, S, V)), (partial(conv, kernel_size=3), (image, U, S, Vc))):
        with pytest.raises(ValueError, match="route must be one of auto, factorized, merged, got 'fast'"):
            fn(*args, route="fast")


def test_plan_says_which_route_and_why():
    """Far from the crossing, where no machine should disagree."""
    x = torch.empty(64, 256, 16, 16)
    low = LowRankConv2d(256, 256, 3, padding=1, rank=0.2).plan(x)
    assert low.route == "factorized" and low.factorized < low.merged and 2 < low.gain < 5
    full = LowRankConv2d(64, 64, 3, padding=1, rank=1.0).plan(torch.empty(64, 64, 32, 32))
    assert full.route == "merged" and full.gain < 1 < full.factorized / full.merged
    shortcut = LowRankConv2d(16, 64, 1, rank=8).plan(torch.empty(64, 16, 32, 32))
    assert shortcut.route == "merged" and shortcut.gain > 0.8
    wide = LowRankLinear(512, 512, rank=512)
    assert wide.plan(torch.empty(8192, 512)).route == "merged"
    assert wide.plan(torch.empty(4, 512)).route == "factorized"  # forming W costs more than the rows
    with torch.no_grad():
        inference = wide.plan(torch.empty(8192, 512))
    assert inference.dense < 0.6 * wide.plan(torch.empty(8192, 512)).dense
    with pytest.raises(ShapeError, match=r"input must be \[\*, 512\]"):
        wide.plan(torch.empty(4, 5))


def test_auto_takes_the_route_of_the_plan():
    layer = LowRankLinear(64, 64, rank=64)
    for rows in (1, 4096):
        x = torch.randn(rows, 64)
        y = layer(x)
        expected = (
            "MergedLinearFunctionBackward" if layer.plan(x).route == "merged" else "LowRankLinearFunctionBackward"
        )
        assert y.grad_fn.name() == expected
    assert expected == "MergedLinearFunctionBackward"


def test_float32_conv_error_is_that_of_plain_pytorch(backend):
    for groups, padding in itertools.product((1, 2), (0, 1)):
        layer = randomize(LowRankConv2d(6, 8, 3, padding=padding, groups=groups, rank=5))
        x = torch.randn(2, 6, 9, 9)
        exact = copy.deepcopy(layer).double()(x.double())
        plain = layer.to_dense()(x)
        bound = 2 * (plain.double() - exact).abs().max() + backward_error(torch.float32, 5) * exact.abs().max()
        assert (layer(x).double() - exact).abs().max() <= bound


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("d", [2, 3])
def test_memory_format_is_that_of_the_dense_twin(channels, d):
    """Also of an image with one channel, whose own strides do not tell, and through factorize and to_dense."""
    last = (torch.channels_last, torch.channels_last_3d)[d - 2]
    dense = (nn.Conv2d, nn.Conv3d)[d - 2](channels, 4, 3, padding=1)
    cls = (LowRankConv2d, LowRankConv3d)[d - 2]
    x = torch.randn(2, channels, *[5] * d)
    before = cls.from_dense(dense, rank=1.0)
    assert before(x).is_contiguous() and not before.channels_last
    for layer in (before.to(memory_format=last), cls.from_dense(dense.to(memory_format=last), rank=1.0)):
        y = copy.deepcopy(layer).double().float()(x)  # other conversions leave the format alone
        assert y.stride() == dense(x).stride() and y.is_contiguous(memory_format=last)
        torch.testing.assert_close(y, dense(x), rtol=0, atol=1e-5)
        assert layer.to_dense().weight.stride() == dense.weight.stride()
    if d == 2:  # torch has no way back from channels_last_3d that a module could take
        assert before.to(memory_format=torch.contiguous_format)(x).is_contiguous()


@ROUTES
@pytest.mark.parametrize("shape", [(20,), (7, 20), (0, 20), (2, 64, 20), (3, 4, 5, 20)], ids=str)
def test_outputs_of_linear_layers_may_be_changed_in_place(backend, shape, route):
    layer = LowRankLinear(20, 30, rank=5, dtype=torch.float64)
    layer.route = route
    x = torch.randn(shape, dtype=torch.float64)
    expected = torch.autograd.grad(F.relu(layer(x)).square().sum(), list(layer.parameters()))
    got = torch.autograd.grad(layer(x).relu_().square().sum(), list(layer.parameters()))
    torch.testing.assert_close(got, expected)


@ROUTES
def test_outputs_of_convolutions_may_be_changed_in_place(backend, route):
    layer = LowRankConv2d(3, 8, 3, rank=4)
    layer.route = route
    for x in (
        torch.randn(2, 3, 8, 8),
        torch.randn(3, 8, 8),
        torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last),
    ):
        layer(x).relu_().sum().backward()


def test_a_large_head_with_an_activation_in_place():
    """Of sizes that products serve, not the one compiled call."""
    model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(inplace=True), nn.Linear(512, 10))
    condlr_ext.factorize(model, budget=0.3)
    model(torch.randn(128, 512)).sum().backward()


def test_parameters_can_be_swapped():
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        layer = LowRankLinear(6, 5, rank=2)
        U = layer.U
        layer.double().load_state_dict(LowRankLinear(6, 5, rank=2).state_dict())
        assert layer.U is U and U.dtype == torch.float64
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def test_flops_are_counted():
    layer, x = LowRankLinear(20, 30, rank=5, bias=False), torch.randn(64, 20)
    for route, forward in (("factorized", 2 * 64 * 5 * (20 + 30) + 2 * 30 * 5 * 5), ("merged", 2 * 64 * 20 * 30)):
        layer.route = route
        merging = 2 * 5 * 20 * (5 + 30) if route == "merged" else 0  # S Vᵀ, then U (S Vᵀ)
        with FlopCounterMode(display=False) as counter:
            y = layer(x)
            assert counter.get_total_flops() == forward + merging
            y.sum().backward()
            assert counter.get_total_flops() > 2 * (forward + merging)
    convolution = LowRankConv2d(3, 8, 3, rank=4)
    with FlopCounterMode(display=False) as counter:
        convolution(torch.randn(2, 3, 8, 8)).sum().backward()
    assert counter.get_total_flops() > 2 * 2 * 36 * 4 * (27 + 8)


def test_row_space_of_from_dense():
    W, basis = nn.Linear(7, 5), torch.linalg.qr(torch.randn(7, 2)).Q
    layer = LowRankLinear.from_dense(W, 2, row_space=basis)
    torch.testing.assert_close(layer.weight, W.weight @ basis @ basis.mT)
    with pytest.raises(ShapeError, match=r"LowRankLinear.from_dense: row_space must be \[7, 3\], got \[7, 2\]"):
        LowRankLinear.from_dense(W, 3, row_space=basis)
    for bad in (1.1 * basis, torch.full((7, 2), torch.nan)):
        with pytest.raises(ValueError, match="row_space must have orthonormal columns to 1e-4, got"):
            LowRankLinear.from_dense(W, 2, row_space=bad)
