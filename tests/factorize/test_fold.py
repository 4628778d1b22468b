"""fold: plain torch modules of the same function, as few products as there can be, nothing else changed."""

import copy
import pickle

import pytest
import torch
from helpers.layers import CONVS, randomize
from helpers.models import MODELS, Conv1D, Encoder, example_input
from torch import nn
from torch.nn.utils import parametrize, prune

import condlr_ext
from condlr_ext import LowRankConv1d, LowRankConv2d, LowRankConv3d, LowRankLinear, factorize, fold, to_dense


def pair(layer):
    """layer.folded(), which must be two plain modules."""
    folded = layer.folded()
    assert type(folded) is nn.Sequential and len(folded) == 2
    return folded


@pytest.mark.parametrize("options", CONVS, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("cls", [LowRankConv1d, LowRankConv2d, LowRankConv3d])
def test_conv_is_two_convolutions(cls, options):
    layer = randomize(cls(8, 12, **options, rank=2, dtype=torch.float64))
    folded = pair(layer)
    assert [type(m) for m in folded] == [cls._dense] * 2
    assert sum(p.numel() for p in folded.parameters()) < sum(p.numel() for p in layer.to_dense().parameters())
    x = torch.randn(2, 8, *[9, 8, 7][: cls._d], dtype=torch.float64)
    torch.testing.assert_close(folded(x), layer(x))
    torch.testing.assert_close(folded(x[0]), layer(x[0]))


@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_two_linears_below_the_dense_one(bias):
    layer = randomize(LowRankLinear(12, 24, bias, rank=7, dtype=torch.float64))
    x = torch.randn(3, 5, 12, dtype=torch.float64)
    torch.testing.assert_close(pair(layer)(x), layer(x))
    equal = randomize(LowRankLinear(12, 24, bias, rank=8, dtype=torch.float64))  # 8 (12 + 24) = 12 * 24
    assert type(equal.folded()) is nn.Linear
    torch.testing.assert_close(equal.folded()(x), equal(x))


def test_channels_last_stays():
    layer = LowRankConv2d(8, 16, 3, rank=2).to(memory_format=torch.channels_last)
    folded = pair(layer)
    x = torch.randn(2, 8, 6, 6)
    assert folded[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert folded(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_u_s_is_rounded_once(dtype):
    layer = randomize(LowRankLinear(40, 40, rank=9)).to(dtype)
    assert torch.equal(pair(layer)[1].weight, (layer.U.float() @ layer.S.float()).to(dtype))
    full = randomize(LowRankLinear(40, 40, rank=9))
    with torch.autocast("cpu"):
        folded = pair(full)
    assert torch.equal(folded[1].weight, full.U @ full.S)


@pytest.mark.parametrize("name", MODELS)
def test_whole_models_become_plain_ones(name):
    model = MODELS[name]().double().eval()
    x = example_input(name)
    x = x.double() if x.is_floating_point() else x
    factorize(model, rank=0.3)
    state = {n: p.requires_grad for n, p in model.named_parameters()}
    before, biases = model(x), {id(p) for n, p in model.named_parameters() if n.endswith("bias")}
    dense = sum(p.numel() for p in to_dense(copy.deepcopy(model)).parameters())
    assert fold(model) is model
    assert not any(type(m).__module__.startswith("condlr_ext") for m in model.modules())
    after = model(x)
    assert (after - before).abs().max() <= 1e-10 * before.abs().max()
    assert biases == {id(p) for n, p in model.named_parameters() if n.endswith("bias")}
    assert all(state.values()) and all(p.requires_grad for p in model.parameters())
    if name != "encoder":  # whose layers have to be dense
        assert sum(p.numel() for p in model.parameters()) < 0.9 * dense
    model.train()
    model(x).sum().backward()


@pytest.mark.filterwarnings("ignore:.*nested.*")
def test_the_fused_kernel_of_the_transformer_finds_its_weights():
    low = Encoder().double().eval()
    factorize(low, rank=4)
    x = example_input("encoder", dtype=torch.float64)
    folded = fold(copy.deepcopy(low))
    assert type(folded.encoder.layers[0].linear1) is nn.Linear
    with torch.no_grad():
        torch.testing.assert_close(folded(x), low(x))


def test_ties_frozen_factors_and_hooks_are_kept():
    model = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 12), nn.Linear(12, 8), Conv1D(12, 8)).double()
    model[2].weight = model[0].weight
    factorize(model, rank=2)
    model[1].V.requires_grad_(False)
    x, seen = torch.randn(5, 12, dtype=torch.float64), []
    handle = model[1].register_forward_hook(lambda module, args, output: seen.append(module))
    before = model(x)
    fold(model)
    torch.testing.assert_close(model(x), before)
    for i in range(2):
        assert model[0][i].weight is model[2][i].weight
    assert model[0][1].bias is not model[2][1].bias
    assert not model[1][0].weight.requires_grad and model[1][1].weight.requires_grad
    assert seen[1] is model[1]
    handle.remove()
    model(x)
    assert len(seen) == 2


def test_room_for_more_rank_is_left_out():
    layer = LowRankLinear(30, 20, rank=6, dtype=torch.float64)
    with torch.no_grad():
        for factor in (layer.U, layer.V, layer.S, layer.S.T):
            factor[:, 4:] = 0
    x = torch.randn(3, 30, dtype=torch.float64)
    assert pair(layer)[0].out_features == 4
    torch.testing.assert_close(layer.folded()(x), layer(x))


def test_a_zero_core_and_a_zero_layer():
    for zero in ("S", "USV"):
        layer = LowRankLinear(9, 8, rank=2)
        for name in zero:
            nn.init.zeros_(getattr(layer, name))
        x = torch.randn(4, 9)
        torch.testing.assert_close(pair(layer)(x), layer(x))


def test_adapters_stay():
    model = nn.Sequential(nn.Linear(20, 20), nn.ReLU(), LowRankLinear(20, 20, rank=3))
    condlr_ext.add_adapters(model, rank=2, include="0")
    adapter = model[0]
    fold(model)
    assert model[0] is adapter and isinstance(adapter.delta, LowRankLinear)
    assert type(model[2]) is nn.Sequential
    condlr_ext.merge_adapters(model)


def test_a_bare_layer_and_the_meta_device():
    layer = LowRankLinear(20, 10, rank=2)
    x = torch.randn(3, 20)
    torch.testing.assert_close(fold(layer)(x), layer(x))
    folded = fold(nn.Sequential(LowRankConv2d(8, 16, 3, rank=2, device="meta")))
    assert folded[0][1].weight.shape == (16, 2, 1, 1) and folded[0][1].weight.is_meta


def test_exported_programs_hold_two_products(tmp_path):
    model = nn.Sequential(LowRankLinear(20, 10, rank=2), nn.ReLU(), LowRankLinear(10, 20, rank=2)).eval()
    x = torch.randn(3, 20)
    before = model(x)
    program = torch.export.export(fold(model), (x,))
    torch.testing.assert_close(program.module()(x), before)
    assert sum("linear" in str(node.target) for node in program.graph.nodes) == 4


def test_it_is_dense_where_the_model_was():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    state = copy.deepcopy(model.state_dict())
    assert fold(model) is model and [type(m) for m in model] == [nn.Linear] * 2
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), state.values(), strict=True))
    factorize(model, rank=8)
    assert [type(m) for m in fold(model)] == [nn.Linear] * 2  # full rank: dense has fewer weights
    torch.testing.assert_close(to_dense(model).state_dict(), state)


def test_tied_convolutions_of_other_groups_share_what_has_one_shape():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 12, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1, groups=2)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(torch.cat([x, x], 1)) + self.a(x)

    model, x = Model().double(), torch.randn(2, 4, 5, 5, dtype=torch.float64)
    factorize(model, rank=2)
    before = model(x)
    fold(model)
    torch.testing.assert_close(model(x), before)
    assert model.a[0].weight.shape == (2, 4, 3, 3) and model.b[0].weight.shape == (4, 4, 3, 3)


@pytest.mark.parametrize("plain", [fold, to_dense])
def test_factors_shared_between_kinds_of_layers(plain):
    linear, conv = LowRankLinear(8, 12, rank=2), LowRankConv2d(8, 12, 1, rank=2)
    conv.U, conv.S, conv.V = linear.U, linear.S, linear.V
    model, x = nn.ModuleList([linear, conv]), torch.randn(2, 8, 5, 5)
    before = conv(x)
    plain(model)
    torch.testing.assert_close(model[1](x), before)
    torch.testing.assert_close(
        model[0](x.movedim(1, -1)).movedim(-1, 1), before - conv.bias[:, None, None] + linear.bias[:, None, None]
    )


class Reused(nn.Module):
    """The factor in one tensor for all layers: as memory that is freed comes back under the same address."""

    rooms = {}

    def __init__(self, name):
        super().__init__()
        self.name = name

    @torch.no_grad()
    def forward(self, factor):
        return self.rooms.setdefault((self.name, factor.shape), torch.empty_like(factor)).copy_(factor)


@pytest.mark.parametrize("plain", [fold, to_dense])
def test_parametrized_factors_are_nobody_elses(plain):
    """They are made anew at each access, so that which tensor it is says nothing."""
    model = nn.Sequential(*[LowRankLinear(20, 20, rank=4) for _ in range(3)])
    for layer in model:
        for name in "USV":
            parametrize.register_parametrization(layer, name, Reused(name))
    assert model[0].U is model[1].U
    x = torch.randn(3, 20)
    before = model(x)
    plain(model)
    torch.testing.assert_close(model(x), before)
    weights = [p for name, p in model.named_parameters() if name.endswith("weight")]
    assert len({p.data_ptr() for p in weights}) == len(weights) == (6 if plain is fold else 3)


def test_what_the_model_reads_can_be_dense_and_so_is_what_shares_it():
    class FeedForward(nn.Module):
        def __init__(self):
            super().__init__()
            self.wi, self.wo, self.wt = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(32, 16)
            self.wt.weight = self.wo.weight

        def forward(self, x):
            return self.wo(self.wi(x).to(self.wo.weight.dtype))

    model, x = FeedForward(), torch.randn(2, 16)
    factorize(model, rank=3)
    before = model(x)
    with pytest.raises(ValueError, match="fold: dense 'w0' matches nothing"):
        fold(model, dense="w0")
    fold(model, dense="wo")
    torch.testing.assert_close(model(x), before)
    assert type(model.wi) is nn.Sequential and type(model.wo) is nn.Linear and model.wt.weight is model.wo.weight


class Scaled(LowRankLinear):
    def forward(self, x):
        return 2 * super().forward(x)


def _other_forward(layer):
    layer.forward = lambda x: x
    return layer


@pytest.mark.parametrize("plain", [fold, to_dense])
@pytest.mark.parametrize(
    "layer, message",
    [
        (lambda: Scaled(20, 20, rank=2), "layer 1: the forward of this Scaled may do more"),
        (lambda: _other_forward(LowRankLinear(20, 20, rank=2)), "layer 1: the forward of this LowRankLinear may"),
        (lambda: prune.l1_unstructured(LowRankLinear(20, 20, rank=2), "S", 0.3), "layer 1: its S is no parameter"),
        (lambda: torch.compile(LowRankLinear(20, 20, rank=2), backend="eager"), "layer 1._orig_mod: it is compiled"),
    ],
)
def test_layers_that_are_more_are_refused_and_nothing_is_changed(plain, layer, message):
    model = nn.Sequential(LowRankLinear(20, 20, rank=2), layer())
    before = list(model)
    with pytest.raises(ValueError, match=f"{plain.__name__}: {message}"):
        plain(model)
    assert all(a is b for a, b in zip(model, before, strict=True))


def test_compiled_models_and_no_models():
    model = nn.Sequential(LowRankLinear(20, 20, rank=2), nn.ReLU())
    x = torch.randn(3, 20)
    compiled, before = torch.compile(model, backend="eager"), model(x)
    compiled(x)
    fold(compiled)
    torch.testing.assert_close(compiled(x), before)
    assert type(model[0]) is nn.Sequential
    with pytest.raises(TypeError, match="fold: model must be a torch.nn.Module, got dict"):
        fold({})


def test_a_weight_is_trained_where_a_factor_is():
    layer = LowRankLinear(20, 20, rank=2)
    layer.S.requires_grad_(False), layer.V.requires_grad_(False)
    assert [m.weight.requires_grad for m in pair(layer)] == [False, True]
    assert layer.to_dense().weight.requires_grad


class Reader(nn.Module):
    """Reads attributes of its layers as transformers' T5 (the weight), ViT and Whisper (the stride) do."""

    def __init__(self):
        super().__init__()
        self.conv, self.read = nn.Conv1d(8, 8, 4, stride=2), nn.Linear(16, 16)
        self.plain, self.branch, self.scale = nn.Linear(16, 16), nn.Linear(16, 16), 1.0
        self.calls = 0

    def forward(self, x, *, twice=False):
        self.calls += 1
        assert x.shape[-1] % self.conv.stride[0] == 0 and self.plain.in_features == 16
        x = self.conv(x).flatten(1).to(self.read.weight.dtype)
        x = self.plain(self.read(x))
        return self.branch(x) * self.branch.bias if twice else x


def test_what_the_model_reads_is_found_on_an_example():
    model, x = Reader().double(), torch.randn(3, 8, 6, dtype=torch.float64)
    factorize(model, rank=2)
    model.train()
    for options, dense in (({"twice": True}, {"read", "branch"}), ({}, {"read"})):
        folded = fold(copy.deepcopy(model), example_input={"x": x, **options})
        assert {name for name, m in folded.named_children() if type(m) is not nn.Sequential} == dense
        assert folded.training and all(m.training for m in folded.modules())
        assert all(type(m) in (Reader, nn.Sequential, nn.Linear, nn.Conv1d) for m in folded.modules())
        torch.testing.assert_close(folded(x, **options), model(x, **options))
        pickle.loads(pickle.dumps(folded))
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match="fold: the model fails on example_input"):
        fold(model, example_input=x[:, :3])
    assert dict(model.named_modules()) == before
    with pytest.raises(AttributeError, match="weight"):  # as documented
        fold(copy.deepcopy(model))(x)


def test_a_pair_keeps_the_geometry():
    for layer in (LowRankLinear(24, 24, rank=2), LowRankConv2d(8, 8, 3, 2, padding=1, rank=2)):
        folded, dense = pair(layer), layer.to_dense()
        names = ["in_features", "out_features"]
        if isinstance(layer, LowRankConv2d):
            names = "in_channels out_channels kernel_size stride padding dilation groups padding_mode".split()
        assert {name: getattr(folded, name) for name in names} == {name: getattr(dense, name) for name in names}
