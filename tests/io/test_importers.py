"""Importers: the same function from checkpoints built in the layouts of other packages, and errors that change nothing."""

import copy
import json
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers.matrices import non_orthonormality
from safetensors.torch import save_file
from torch import nn

from condlr_ext import LowRankAdapter, LowRankLinear, condition_numbers
from condlr_ext.errors import CheckpointError, RankError
from condlr_ext.io import importers
from condlr_ext.nn import LowRankLayer


def parameter(*shape):
    return nn.Parameter(torch.randn(shape) / shape[0] ** 0.5)


# what the layers of the other packages hold and compute, written from their formulas


class CondLRLinear(nn.Module):
    def __init__(self, n, m, r, bias=True):
        super().__init__()
        self.U, self.S_hat, self.V = parameter(m, r), parameter(r, r), parameter(n, r)
        self.bias = parameter(m) if bias else None

    def forward(self, x):
        y = x @ self.V @ self.S_hat.T @ self.U.T
        return y if self.bias is None else y + self.bias


class CondLRConv(CondLRLinear):
    """im2col; a bias whatever the convolution had."""

    def __init__(self, conv, r):
        super().__init__(conv.weight[0].numel(), conv.out_channels, r)
        self.conv = [conv.kernel_size, 1, conv.padding, conv.stride]

    def forward(self, x):
        columns = F.unfold(x, *self.conv).mT
        size = [(s + 2 * p - k) // t + 1 for s, p, k, t in zip(x.shape[2:], self.conv[2], self.conv[0], self.conv[3])]  # noqa: B905
        return super().forward(columns).mT.reshape(len(x), -1, *size)


class DLRTLinear(nn.Module):
    """U on the input's side, capacity R, active rank r, which the state_dict has as a number."""

    def __init__(self, n, m, capacity, r):
        super().__init__()
        self.U, self.S, self.V, self.bias = (
            parameter(n, capacity),
            parameter(capacity, capacity),
            parameter(m, capacity),
            parameter(m),
        )
        self.r = r
        self.register_state_dict_post_hook(lambda self, state, prefix, _: state.update({prefix + "r": self.r}))

    def forward(self, x):
        r = self.r
        return x @ self.U[:, :r] @ self.S[:r, :r] @ self.V[:, :r].T + self.bias


class DLRTConv(nn.Module):
    """Tucker core and factors with capacity; the bias enters twice."""

    def __init__(self, conv, capacity, r):
        super().__init__()
        self.S = parameter(*capacity)
        self.Us = nn.ParameterList([parameter(d, c) for d, c in zip(conv.weight.shape, capacity, strict=True)])
        self.bias = parameter(conv.out_channels) if conv.bias is not None else None
        self.r, self.stride, self.padding = r, conv.stride, conv.padding
        self.register_state_dict_post_hook(lambda self, state, prefix, _: state.update({prefix + "r": self.r}))

    def forward(self, x):
        a, b, c, d = self.r
        parts = [U[:, :r] for U, r in zip(self.Us, self.r, strict=True)]
        W = torch.einsum("abcd,oa,ib,hc,wd->oihw", self.S[:a, :b, :c, :d], *parts)
        y = F.conv2d(x, W, self.bias, self.stride, self.padding)
        return y if self.bias is None else y + self.bias[:, None, None]


class OIALRLayer(nn.Module):
    """u s vh of the taller orientation, for linear and convolutional layers."""

    def __init__(self, layer, r):
        super().__init__()
        self.shape = layer.weight.shape
        m, n = layer.weight.shape[0], layer.weight[0].numel()
        self.trans = m < n
        self.u, self.s, self.vh = parameter(max(m, n), r), parameter(r, r), parameter(r, min(m, n))
        self.bias = None if layer.bias is None else parameter(m)
        self.run = F.linear if isinstance(layer, nn.Linear) else (lambda *a: F.conv2d(*a, layer.stride, layer.padding))

    def forward(self, x):
        W = self.u @ self.s @ self.vh
        return self.run(x, (W.T if self.trans else W).reshape(self.shape), self.bias)


class GeoLoRALinear(nn.Module):
    def __init__(self, linear, capacity, r, alpha):
        super().__init__()
        n, m = linear.in_features, linear.out_features
        self.original_linear = linear
        self.lora_U, self.lora_S, self.lora_V = (
            parameter(n, capacity),
            parameter(capacity, capacity),
            parameter(m, capacity),
        )
        self.Sinv = nn.Parameter(torch.eye(capacity))
        self.r, self.alpha = r, alpha

    def forward(self, x):
        r = self.r
        change = x @ self.lora_U[:, :r] @ self.lora_S[:r, :r] @ self.lora_V[:, :r].T
        return self.original_linear(x) + self.alpha / r * change


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.block = nn.Sequential(nn.ReLU(), nn.Conv2d(8, 6, (3, 2), stride=2, padding=(1, 0)), nn.LeakyReLU())
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.fc1, self.act, self.fc2 = nn.Linear(24, 10), nn.ReLU(), nn.Linear(10, 16, bias=False)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        for part in self.children():
            x = part(x)
        return x


def foreign(replace):
    """The network with its layers replaced, statistics moved, in eval mode."""
    torch.manual_seed(5)
    net = Net()
    for name, make in replace.items():
        net.set_submodule(name, make(net.get_submodule(name)))
    net(torch.randn(8, 3, 8, 8))
    return net.eval()


FOREIGN = {
    importers.condlr: lambda: foreign({
        "stem": lambda c: CondLRConv(c, 5), "block.1": lambda c: CondLRConv(c, 4), "fc1": lambda f: CondLRLinear(24, 10, 3),
        "fc2": lambda f: CondLRLinear(10, 16, 6, bias=False), "head": lambda f: CondLRLinear(16, 4, 4),
    }),
    importers.robust_dlrt: lambda: foreign({
        "stem": lambda c: DLRTConv(c, (6, 2, 3, 3), [4, 2, 3, 2]), "block.1": lambda c: DLRTConv(c, (5, 6, 3, 2), [5, 3, 2, 2]),
        "fc1": lambda f: DLRTLinear(24, 10, 7, 4),
    }),
    importers.oialr: lambda: foreign({
        "stem": lambda c: OIALRLayer(c, 4), "block.1": lambda c: OIALRLayer(c, 3), "fc1": lambda f: OIALRLayer(f, 5),
        "fc2": lambda f: OIALRLayer(f, 2),
    }),
}  # fmt: skip
RANKS = {
    importers.condlr: {"stem": 5, "block.1": 4, "fc1": 3, "fc2": 6, "head": 4},
    importers.robust_dlrt: {"stem": 4, "block.1": 5, "fc1": 4},
    importers.oialr: {"stem": 4, "block.1": 3, "fc1": 5, "fc2": 2},
}
IDS = {"argvalues": list(FOREIGN), "ids": lambda f: f.__name__}


def assert_same(model, net, x):
    y = net(x)
    # products of a handful of layers, each off by a few roundings of its largest output
    torch.testing.assert_close(model(x), y, rtol=0, atol=200 * torch.finfo(y.dtype).eps * float(y.detach().abs().max()))


@pytest.mark.parametrize("importer", **IDS)
def test_the_function_is_the_same(importer, tmp_path):
    net, x = FOREIGN[importer](), torch.randn(4, 3, 8, 8)
    model = Net().eval()
    assert importer(net.state_dict(), model) == RANKS[importer]
    assert {n: m.rank for n, m in model.named_modules() if isinstance(m, LowRankLayer)} == RANKS[importer]
    assert_same(model, net, x)
    for name in RANKS[importer]:
        layer = model.get_submodule(name)
        assert max(non_orthonormality(X) for X in (layer.U, layer.V)) < 2e-6
    assert all(k < 1e6 for k in condition_numbers(model).values())

    torch.save({f"module.{k}": v for k, v in net.state_dict().items()}, tmp_path / "net.pth")  # a torch file, from DDP
    again = Net().eval()
    importer(tmp_path / "net.pth", again)
    assert torch.equal(again(x), model(x))
    tensors = {k: v if isinstance(v, torch.Tensor) else torch.tensor(v) for k, v in net.state_dict().items()}
    save_file(tensors, tmp_path / "net.safetensors")
    importer(str(tmp_path / "net.safetensors"), again)  # and into layers that are low-rank already
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("importer", **IDS)
def test_float64(importer):
    net, x = FOREIGN[importer]().double(), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    model = Net().double().eval()
    importer(net.state_dict(), model)
    assert_same(model, net, x)


def test_orthonormal_factors_are_taken_as_they_are():
    net = nn.Sequential(CondLRLinear(12, 9, 4))
    with torch.no_grad():
        for X in (net[0].U, net[0].V):
            X.copy_(torch.linalg.qr(X.double())[0])
    model = nn.Sequential(nn.Linear(12, 9))
    importers.condlr(net.state_dict(), model)
    for ours, theirs in (("U", "U"), ("S", "S_hat"), ("V", "V"), ("bias", "bias")):
        assert torch.equal(getattr(model[0], ours), getattr(net[0], theirs))


def test_condlr_names_the_leaves():
    """The release numbers the leaves of the model: lr_model.5 is fc1."""
    net, x = FOREIGN[importers.condlr](), torch.randn(4, 3, 8, 8)
    leaves = ["stem", "norm", "block.0", "block.1", "block.2", "pool.0", "pool.1", "fc1", "act", "fc2", "head"]
    state = {}
    for key, value in net.state_dict().items():
        name = next(leaf for leaf in leaves if key.startswith(f"{leaf}."))
        state[f"lr_model.{leaves.index(name)}{key.removeprefix(name)}"] = value
    model = Net().eval()
    assert importers.condlr(state, model) == RANKS[importers.condlr]
    assert_same(model, net, x)
    with pytest.raises(CheckpointError, match=r"lr_model\.11\.U names no leaf of the model, it has 11"):
        importers.condlr(state | {"lr_model.11.U": torch.ones(1)}, Net())


def test_directions_of_zeros_do_not_count():
    """OIALR without new shapes leaves cut directions as zeros; Tucker ranks may exceed what the kernel can reach."""
    net, x = foreign({"fc1": lambda f: OIALRLayer(f, 8)}), torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        net.fc1.u[:, 3:], net.fc1.s[3:], net.fc1.s[:, 3:], net.fc1.vh[3:] = 0, 0, 0, 0
    model = Net().eval()
    assert importers.oialr(net.state_dict(), model) == {"fc1": 3} and condition_numbers(model)["fc1"] < 1e6
    assert_same(model, net, x)

    wide = nn.Sequential(nn.Conv2d(2, 8, 1))
    tucker = nn.Sequential(DLRTConv(wide[0], (6, 2, 1, 1), [6, 2, 1, 1]))  # 6 x 2 core: rank 2
    assert importers.robust_dlrt(tucker.state_dict(), wide) == {"0": 2}
    assert_same(wide, tucker, torch.randn(2, 2, 5, 5))


def test_oialr_attention_projections_become_dense():
    encoder = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True).eval()
    state = encoder.state_dict()
    u, s, vh = parameter(24, 5), parameter(5, 5), parameter(5, 8)
    expected = copy.deepcopy(encoder)
    expected.self_attn.in_proj_weight.data = u @ s @ vh
    lin = OIALRLayer(encoder.linear1, 3)
    expected.linear1.weight.data = lin.u @ lin.s @ lin.vh
    expected.linear1.bias.data = lin.bias
    del state["self_attn.in_proj_weight"], state["linear1.weight"]
    state |= {"self_attn.in_proj_u": u, "self_attn.in_proj_s": s, "self_attn.in_proj_vh": vh}
    state |= {f"linear1.{k}": v for k, v in lin.state_dict().items()}
    assert importers.oialr(state, encoder) == {"linear1": 3} and isinstance(encoder.linear1, LowRankLinear)
    with torch.enable_grad():  # torch's fast path reads weights, too
        assert_same(encoder, expected, torch.randn(2, 6, 8))


def test_geolora_becomes_adapters():
    net = foreign({"fc1": lambda f: GeoLoRALinear(f, 8, 3, 2.0), "fc2": lambda f: GeoLoRALinear(f, 6, 2, 2.0)})
    model, x = Net().eval(), torch.randn(4, 3, 8, 8)
    assert importers.geolora(net.state_dict(), model, rank={"fc1": 3, "fc2": 2}, alpha=2.0) == {"fc1": 3, "fc2": 2}
    assert isinstance(model.fc1, LowRankAdapter) and model.fc1.scale == pytest.approx(2 / 3)
    assert_same(model, net, x)
    assert not model.fc1.layer.weight.requires_grad and model.fc1.delta.S.requires_grad

    with torch.no_grad():
        net.fc1.lora_S.zero_()  # as at its start
    model = Net().eval()
    importers.geolora(net.state_dict(), model, rank=2, alpha=2.0)
    net.fc1.r = 2
    assert_same(model, net, x)

    for options, error, text in (
        (dict(rank={"fc1": 3}), ValueError, "rank must be given for fc1, fc2, got fc1"),
        (dict(rank=7), CheckpointError, "rank r of layer 'fc2' must be in 1..6, got 7"),
        (dict(rank=0), CheckpointError, "rank r of layer 'fc1' must be in 1..8, got 0"),
    ):
        fails(importers.geolora, net.state_dict(), text, error, **options, alpha=1.0)
    state = net.state_dict()
    fails(importers.geolora, state | {"fc9.x": torch.ones(1)}, "the model has no fc9.x", rank=2, alpha=1.0)
    fails(importers.geolora, {k: v for k, v in state.items() if k != "fc1.original_linear.bias"}, "lacks fc1.layer.bias", rank=2, alpha=1.0)  # fmt: skip


def polar_tensors(names, r):
    shapes = {"fc1": (10, 24), "fc2": (16, 10)}
    prefix, tensors = "base_model.model.", {}
    for name in names:
        m, n = shapes[name]
        parts = {"lora_A.weight": (r, n), "lora_S.parametrizations.weight.original": (r, r), "lora_B.weight": (m, r)}
        tensors |= {f"{prefix}{name}.{part}": torch.randn(shape) for part, shape in parts.items()}
    return tensors


@pytest.mark.parametrize("form", ["identity", "diagonal", "removal"])
def test_polar_becomes_adapters(tmp_path, form):
    base, x = Net().eval(), torch.randn(4, 3, 8, 8)
    tensors = polar_tensors(["fc1", "fc2"], 3)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "adapter_name": "polar", "r": 3, "lora_alpha": 5, "parameterize_S": form}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    expected = copy.deepcopy(base)
    for name in ("fc1", "fc2"):
        A, S, B = (v for k, v in tensors.items() if f".{name}." in k)
        S = {"identity": S, "diagonal": S * torch.eye(3), "removal": torch.eye(3)}[form]
        expected.get_submodule(name).weight.data += 5 / 3 * B @ S @ A
    model = copy.deepcopy(base)
    made = importers.polar(tmp_path, model)
    assert list(made) == ["fc1", "fc2"] and made["fc2"].rank == 3
    assert_same(model, expected, x)
    if form == "identity":
        plain = {
            k.replace("base_model.model.", "").replace(".parametrizations.weight.original", ".weight"): v
            for k, v in tensors.items()
        }
        model = copy.deepcopy(base)
        importers.polar(plain, model, alpha=5)
        assert_same(model, expected, x)
        with pytest.raises(ValueError, match="polar needs alpha where no adapter_config.json says it"):
            importers.polar(plain, model)
        fails(
            importers.polar, plain | {"fc1.lora_magnitude": torch.ones(2)}, "unknown keys fc1.lora_magnitude", alpha=1.0
        )
        fails(
            importers.polar,
            {k: v for k, v in plain.items() if k != "fc1.lora_S.weight"},
            "'fc1' lacks lora_S",
            alpha=1.0,
        )
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"parameterize_S": "cubic"}))
        fails(importers.polar, tmp_path, "parameterize_S must be one of identity, diagonal, removal, got 'cubic'")


# ------------------------------------------------------------------------------------------ errors


def fails(importer, source, text, error=CheckpointError, model=None, **options):
    model = model or Net()
    types, state = [type(m) for m in model.modules()], copy.deepcopy(model.state_dict())
    trained = [p.requires_grad for p in model.parameters()]
    with pytest.raises(error, match=text) as caught:
        importer(source, model, **options)
    assert "\n" not in str(caught.value)
    assert [type(m) for m in model.modules()] == types and [p.requires_grad for p in model.parameters()] == trained
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("importer", **IDS)
def test_errors_leave_the_model_unchanged(importer, tmp_path):
    good = FOREIGN[importer]().state_dict()
    factor = {importers.condlr: "fc1.S_hat", importers.robust_dlrt: "fc1.S", importers.oialr: "fc1.s"}[importer]
    other = {importers.condlr: "fc1.U", importers.robust_dlrt: "fc1.V", importers.oialr: "fc1.vh"}[importer]
    fails(importer, good | {"fc1.extra": torch.ones(2), "what": torch.ones(1)}, "the model has no fc1.extra, what")
    fails(importer, {k: v for k, v in good.items() if k != "norm.running_var"}, "it lacks norm.running_var")
    fails(importer, {k: v for k, v in good.items() if k != other}, f"lacks {other}")
    fails(importer, good | {other: torch.randn(9, 9)}, "fc1")
    fails(importer, good | {factor: torch.full_like(good[factor], torch.nan)}, "factors of layer 'fc1' must be finite")
    fails(importer, good, "'fc1' has rank 2 in the model and rank", RankError, low_rank_fc1())
    fails(importer, Net().state_dict(), "holds no low-rank layer of this layout, its keys are stem.weight")
    fails(importer, {"state_dict": good, "epoch": 3}, "must hold a dict of tensors, got a dict of state_dict, epoch")
    path = tmp_path / "net.pth"
    fails(importer, path, "cannot read .*net.pth")
    torch.save(FOREIGN[importers.oialr]().norm, path)  # a whole module
    fails(importer, path, "net.pth is damaged or holds pickled objects, which are not loaded")
    for content in (b"", b"text", pickle.dumps([1, 2], protocol=2)):
        path.write_bytes(content)
        fails(importer, path, "net.pth")
    (tmp_path / "net.safetensors").write_bytes(b"text")
    fails(importer, tmp_path / "net.safetensors", "cannot read .*net.safetensors")


def low_rank_fc1():
    model = Net()
    model.fc1 = LowRankLinear(24, 10, rank=2)
    return model


def test_active_ranks_are_needed():
    good = FOREIGN[importers.robust_dlrt]().state_dict()
    fails(importers.robust_dlrt, {k: v for k, v in good.items() if k != "stem.r"}, "lacks stem.r")
    for r in ([4, 2, 3], [7, 2, 3, 2], [4, 2, 0, 2]):
        fails(
            importers.robust_dlrt,
            good | {"stem.r": r},
            r"of layer 'stem' must be in 1\.\.6, 1\.\.2, 1\.\.3, 1\.\.3, got",
        )
    fails(importers.robust_dlrt, good | {"fc1.r": 3.5}, r"must be in 1\.\.7, got 3\.5")
    fails(
        importers.robust_dlrt,
        good | {"stem.Us.1": torch.ones(3, 1)},
        r"factors of layer 'stem' do not fit its core \[4, 2, 3, 2\]",
    )
    stray = {f"no.{k}": torch.eye(2) for k in ("u", "s", "vh")}
    fails(importers.oialr, FOREIGN[importers.oialr]().state_dict() | stray, "the model has no layer 'no'")
