"""Certificates are sound: no bound below what an explicit matrix, a Jacobian, a pair of inputs or an attack shows."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import condlr_ext
from condlr_ext import LowRankConv2d, LowRankLinear, pruning
from condlr_ext.attacks import pgd
from condlr_ext.errors import NonFiniteError, ShapeError
from condlr_ext.robustness import certified_radius, conv_singular_values, layer_spectra, lipschitz, misalignment

F64 = torch.float64
EXACT = 1 + 1e-9  # float64 singular values of small matrices


def matrix(function, shape):
    """The linear part of function on inputs of this shape, as a matrix."""
    eye = torch.eye(math.prod(shape), dtype=F64).view(-1, *shape)
    return (function(eye) - function(torch.zeros_like(eye))).flatten(1).detach().mT


def norm(function, shape):
    return torch.linalg.matrix_norm(matrix(function, shape), 2).item()


def random_model(model):
    """float64, eval mode, every parameter and statistic random."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.2, 3)
    return model.double().eval()


def jacobian_norm(model, x):
    J = torch.autograd.functional.jacobian(lambda z: model(z[None])[0], x)
    return torch.linalg.matrix_norm(J.reshape(-1, x.numel()), 2).item()


# ------------------------------------------------------------------------------------------- convolutions


def ring_conv(weight, stride, dilation, groups):
    d = weight.dim() - 2
    conv = (F.conv1d, F.conv2d, F.conv3d)[d - 1]

    def run(x):
        for dim, k in enumerate(weight.shape[2:], start=2):
            step = dilation[dim - 2] if isinstance(dilation, tuple) else dilation
            around = torch.arange(x.shape[dim] + step * (k - 1)) % x.shape[dim]
            x = x.index_select(dim, around)
        return conv(x, weight, stride=stride, dilation=dilation, groups=groups)

    return run


@pytest.mark.parametrize(
    "out, inp, kernel, size, stride, dilation, groups",
    [
        (3, 2, (3, 3), (5, 6), 1, 1, 1),
        (2, 5, (1, 1), (4, 4), 1, 1, 1),
        (4, 2, (3, 3), (6, 4), 2, 1, 1),
        (2, 3, (5,), (4,), 1, 1, 1),  # the kernel wraps around
        (4, 4, (3, 2), (6, 9), (2, 3), (2, 1), 2),
        (5, 1, (2, 2, 2), (4, 4, 2), 2, 1, 1),
    ],
)
def test_fft_spectrum_is_the_svd_of_the_explicit_operator(out, inp, kernel, size, stride, dilation, groups):
    weight = torch.randn(out, inp // groups, *kernel, dtype=F64)
    explicit = torch.linalg.svdvals(matrix(ring_conv(weight, stride, dilation, groups), (inp, *size)))
    found = conv_singular_values(weight, size, stride=stride, dilation=dilation, groups=groups)
    torch.testing.assert_close(found, explicit, rtol=1e-12, atol=1e-12 * explicit[0].item())


def test_spectrum_of_an_orthogonal_convolution_repeats_one_value():
    delta = torch.zeros(3, 3, 3, 3)
    delta[:, :, 1, 1] = torch.eye(3)
    torch.testing.assert_close(conv_singular_values(delta, 5), torch.ones(75, dtype=F64))


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


def test_circular_norm_may_be_below_the_zero_padded_one_but_the_wider_ring_is_not():
    torch.manual_seed(3)
    below = 0
    for _ in range(20):
        conv = nn.Conv2d(1, 1, 3, padding=1, bias=False).double()
        true = norm(conv, (1, 3, 3))
        assert true <= conv_singular_values(conv.weight, (4, 4))[0] * EXACT
        assert true <= lipschitz(conv, torch.zeros(1, 1, 3, 3, dtype=F64)).bound * EXACT
        below += bool(conv_singular_values(conv.weight, (3, 3))[0] < true)
    assert below > 0


@pytest.mark.parametrize(
    "weight, size, options, error, message",
    [
        (torch.ones(2, 2), 4, {}, ShapeError, r"weight must be \[C_out, C_in / groups, \*kernel\]"),
        (torch.ones(3, 2, 3), 4, {"groups": 2}, ValueError, "groups must divide C_out = 3, .* got 2"),
        (torch.ones(3, 2, 3), 5, {"stride": 2}, ValueError, r"size must be a multiple of stride \(2,\), got \(5,\)"),
        (torch.full((3, 2, 3), math.nan), 4, {}, NonFiniteError, "weight must be finite"),
        (torch.ones(3, 2, 3), 0, {}, ValueError, "size must be an int or 1 ints >= 1, got 0"),
    ],
)
def test_bad_arguments_of_conv_singular_values(weight, size, options, error, message):
    with pytest.raises(error, match=message):
        conv_singular_values(weight, size, **options)


# ------------------------------------------------------------------------------------- rules without weights

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


class Function(nn.Module):
    def __init__(self, function, **constants):
        super().__init__()
        self.function, self.linear = function, nn.Linear(6, 6).double()
        for name, value in constants.items():
            self.register_buffer(name, value)

    def forward(self, x):
        return self.function(self, x)


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


# ------------------------------------------------------------------------------------------------ networks


class Block(nn.Module):
    """A residual block as torchvision writes it."""

    def __init__(self, inp, out, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inp, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.relu, self.downsample = nn.ReLU(inplace=True), None
        if stride != 1 or inp != out:
            self.downsample = nn.Sequential(nn.Conv2d(inp, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


def resnet():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1),
        Block(4, 4, 1), Block(4, 6, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5),
    )  # fmt: skip


def convnet():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), nn.BatchNorm2d(4), nn.LeakyReLU(0.1), nn.AvgPool2d(2),
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), nn.GELU(), nn.Dropout(0.5), nn.Flatten(),
        nn.Linear(24, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 5),
    )  # fmt: skip


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(128, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 5))


NETWORKS = {"resnet": resnet, "convnet": convnet, "mlp": mlp}
every_network = pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)


@pytest.mark.parametrize("low_rank", [False, True])
@every_network
def test_the_bound_is_above_jacobians_and_quotients(build, low_rank):
    for seed in range(3):
        torch.manual_seed(seed)
        model = build()
        if low_rank:
            condlr_ext.factorize(model, budget=0.5)
        model = random_model(model)
        x = torch.rand(40, 2, 8, 8, dtype=F64)
        bound = lipschitz(model, x).bound
        assert max(jacobian_norm(model, z) for z in torch.randn(10, 2, 8, 8, dtype=F64)) <= bound * EXACT
        y = x + 0.3 * torch.randn_like(x)
        with torch.no_grad():
            quotients = (model(x) - model(y)).norm(dim=1) / (x - y).flatten(1).norm(dim=1)
        assert quotients.max() <= bound * EXACT
        assert bound <= lipschitz(model, x, circulant=False).bound * EXACT
        assert lipschitz(model.float(), x.float()).bound == pytest.approx(bound, rel=1e-5)


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


@every_network
def test_batch_norm_is_folded_into_the_layer_before_it(build):
    model = random_model(build())
    folded = copy.deepcopy(model)
    pairs = []
    for parent in [folded, *(m for m in folded.modules() if isinstance(m, (Block, nn.Sequential)))]:
        children = list(parent.named_children())
        for (_, layer), (name, bn) in zip(children, children[1:], strict=False):
            if isinstance(bn, nn.modules.batchnorm._BatchNorm) and (parent, name) not in pairs:
                scale = bn.weight / (bn.running_var + bn.eps).sqrt()
                layer.weight.data *= scale.view(-1, *[1] * (layer.weight.dim() - 1))
                layer.bias = nn.Parameter(
                    bn.bias - bn.running_mean * scale + (0 if layer.bias is None else layer.bias * scale)
                )
                pairs.append((parent, name))
    for parent, name in pairs:
        setattr(parent, name, nn.Identity())
    x = torch.rand(2, 2, 8, 8, dtype=F64)
    torch.testing.assert_close(folded(x), model(x))
    report = lipschitz(model, x)
    assert report.bound == pytest.approx(lipschitz(folded, x).bound, rel=1e-9)
    assert len(report.layers) == len(lipschitz(folded, x).layers)
    assert ("+" in str(report)) == bool(pairs)


def test_a_batch_norm_that_cannot_be_folded_counts_by_itself():
    model = random_model(nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 3, 1), nn.ReLU(), nn.BatchNorm2d(3)))
    x = torch.rand(1, 2, 4, 4, dtype=F64)
    rows = lipschitz(model, x).layers
    assert [row.kind for row in rows] == ["BatchNorm2d", "Conv2d", "BatchNorm2d"]
    scale = (model[0].weight / (model[0].running_var + model[0].eps).sqrt()).abs()
    assert rows[0].bound == pytest.approx(scale.max().item()) and rows[0].kappa == pytest.approx(
        (scale.max() / scale.min()).item()
    )
    tokens = random_model(
        nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(3))
    )  # channels are tokens, not rows of the weight
    x = torch.rand(1, 3, 4, dtype=F64)
    assert len(lipschitz(tokens, x).layers) == 2
    assert jacobian_norm(tokens, x[0]) <= lipschitz(tokens, x).bound * EXACT


def test_a_layer_whose_output_is_used_beside_its_batch_norm_is_not_folded():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)

        def forward(self, x):
            x = self.linear(x)
            return x + self.norm(x)

    model = random_model(Both())
    sigma = torch.linalg.matrix_norm(model.linear.weight, 2).item()
    scale = (model.norm.weight / (model.norm.running_var + model.norm.eps).sqrt()).abs().max().item()
    report = lipschitz(model, torch.rand(1, 6, dtype=F64))
    assert report.bound == pytest.approx(sigma * (1 + scale)) and len(report.layers) == 2


def test_training_mode_warns_and_comes_back():
    model = convnet().train()
    with pytest.warns(UserWarning, match="in train mode are 1, 9"):
        report = lipschitz(model, torch.rand(2, 2, 8, 8))
    assert (
        all(m.training for m in model.modules())
        and report.bound == lipschitz(model.eval(), torch.rand(2, 2, 8, 8)).bound
    )


class UsesBoth(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.change, self.linear = change, nn.Linear(4, 4)

    def forward(self, x):
        x = self.linear(x)
        changed = self.change(x)
        return changed + x


class Custom(nn.Linear):
    def forward(self, x):
        return super().forward(x) ** 3


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else 2 * x


def hooked():
    layer = nn.Linear(4, 4)
    layer.register_forward_hook(lambda m, args, out: 10 * out)
    return nn.Sequential(nn.ReLU(), layer)


def hooked_itself():
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    model.register_forward_hook(lambda m, args, out: 100 * out)
    return model


def patched():
    model = nn.Sequential(nn.Linear(4, 4))
    original = model[0].forward
    model[0].forward = lambda x: 100 * original(x)
    return model


def pieces_in_place(m, x):
    a, b = x.chunk(2, 1)[0], x.chunk(2, 1)[1]
    parts = (x + 0).chunk(2, 1)
    parts[0].mul_(10)
    return parts[0] + parts[1] + a + b


def base_in_place(m, x):
    h = x + 0
    parts = h.chunk(2, 1)
    h.mul_(10)
    return parts[0] + parts[1]


REFUSED = {
    "layer norm": (nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), r"module 1 \(LayerNorm\)"),
    "attention": (nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8)), r"module 0 \(TransformerEncoderLayer\)"),
    "product": (Function(lambda m, x: x * torch.sigmoid(x)), "mul in the model"),
    "square": (nn.Sequential(Function(lambda m, x: x * x)), "mul in module 0"),
    "power": (Function(lambda m, x: x**2), "pow in the model"),
    "division": (Function(lambda m, x: 1 / (1 + x)), "truediv in the model"),
    "by zero": (Function(lambda m, x: x[:, :1] / torch.zeros(1)), "truediv in the model|finite"),
    "sqrt": (Function(lambda m, x: x.abs().sqrt()), "sqrt in the model"),
    "max of a tensor": (Function(lambda m, x: x.amax(1)), "amax in the model"),
    "gather": (Function(lambda m, x: x[:, [0, 0, 0]]), "getitem in the model"),
    "bicubic": (Function(lambda m, x: F.interpolate(x.view(1, 1, 2, 2), scale_factor=2.0, mode="bicubic")), "interpolate"),
    "training dropout": (Function(lambda m, x: F.dropout(x, 0.5)), "dropout in the model"),
    "threshold": (nn.Sequential(nn.Threshold(0.1, 0.0)), r"module 0 \(Threshold\)"),
    "batch statistics": (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False)), "1 must have running statistics"),
    "control flow": (Branching(), "torch.fx cannot trace Branching"),
    "hooks of the model": (hooked_itself(), "the model has hooks"),
    "a layer's own forward": (patched(), r"module 0 \(Linear\) has a forward of its own"),
    "celu": (nn.Sequential(nn.CELU(-1.0)), r"module 0 \(CELU\)"),
    "celu function": (Function(lambda m, x: F.celu(x, -1.0)), "celu in the model"),
    "softplus": (nn.Sequential(nn.Softplus(1.0, 0.0)), r"module 0 \(Softplus\)"),
    "softplus function": (Function(lambda m, x: F.softplus(x, 1.0, 0.0)), "softplus in the model"),
    "linear of a vector": (Function(lambda m, x: F.linear(x, m.linear.weight[0, :4])), "linear in the model"),
    "pieces in place": (Function(pieces_in_place), "uses chunk_2, which was changed in place"),
    "base of pieces in place": (Function(base_in_place), "uses chunk, which was changed in place"),
    "hooks": (hooked(), r"module 1 \(Linear\) has hooks"),
    "in place": (UsesBoth(lambda x: x.add_(1.0)), "uses linear, which was changed in place"),
    "in place module": (UsesBoth(lambda x: F.relu(x, inplace=True)), "uses linear, which was changed in place"),
    "view in place": (UsesBoth(lambda x: x.view(-1, 4).mul_(2.0)), "uses linear, which was changed in place"),
    "data": (Function(lambda m, x: x * x.detach()), "mul in the model|detach in the model"),
    "statistics": (Function(lambda m, x: (x - x.mean()) / x.std()), "std in the model"),
    "keywords only": (Function(lambda m, x: torch.relu(input=x)), "relu in the model"),
    "reinterpreted": (Function(lambda m, x: x.view(torch.float16)), "view in the model"),
}  # fmt: skip


@pytest.mark.parametrize("model, message", REFUSED.values(), ids=REFUSED)
def test_what_has_no_bound_is_refused_by_name(model, message):
    model = model.float().eval()
    shape = (1, 3, 4) if "Transformer" in message else (1, 4)
    with pytest.raises(ValueError, match=message):
        lipschitz(model, torch.rand(shape))


def test_a_subclass_with_its_own_forward_is_followed_and_refused():
    with pytest.raises(ValueError, match="pow in module 0"):
        lipschitz(nn.Sequential(Custom(4, 4)), torch.rand(1, 4))


@pytest.mark.parametrize(
    "model, x, error, message",
    [
        (lambda x: x, torch.ones(1, 4), TypeError, "model must be a torch.nn.Module, got function"),
        (nn.Linear(4, 4), torch.ones(1, 4).long(), TypeError, "x must be a floating-point tensor, got torch.int64"),
        (nn.Linear(4, 4), torch.ones(4), ShapeError, r"x must be \[B, ...\] with B >= 1, got \[4\]"),
        (nn.Linear(4, 4), torch.ones(0, 4), ShapeError, r"got \[0, 4\]"),
    ],
)
def test_bad_arguments_of_lipschitz(model, x, error, message):
    with pytest.raises(error, match=message):
        lipschitz(model, x)


def test_nan_in_a_layer_is_named():
    model = mlp()
    model[3].bias.data[0] = math.nan
    with pytest.raises(NonFiniteError, match="bias of 3 must be finite"):
        lipschitz(model, torch.rand(1, 2, 8, 8))


# -------------------------------------------------------------------------------------- radius of a sample


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
    data = pytest.importorskip("sklearn.datasets").load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(data.images[:, None] / 16, dtype=torch.float32), torch.tensor(data.target)
    return x[order], y[order]


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


# -------------------------------------------------------------------------------------------- misalignment


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


def test_room_for_a_larger_rank_is_no_part_of_the_weight():
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
