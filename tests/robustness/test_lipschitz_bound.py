"""The bound of networks is above Jacobians and quotients; operations without a bound are refused by name."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from helpers.operators import EXACT, F64, Function, jacobian_norm
from torch import nn

import condlr_ext
from condlr_ext.errors import NonFiniteError, ShapeError
from condlr_ext.robustness import lipschitz


def random_model(model):
    """float64, eval mode, every parameter and statistic random."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.2, 3)
    return model.double().eval()


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


@pytest.mark.parametrize("scale", [1e-200, 1e-25, 1e25, 1e200])
def test_the_bound_scales_with_the_weights(scale):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Conv1d(1, 2, 3, padding=1)

        def forward(self, x):
            return torch.cat((self.a(x), self.b(x[:, None]).flatten(1)), 1)

    model, x = Both().double(), torch.randn(2, 4, dtype=F64)
    before = lipschitz(model, x).bound
    with torch.no_grad():
        for p in model.parameters():
            p *= scale
    assert lipschitz(model, x).bound == pytest.approx(scale * before, rel=1e-9)
