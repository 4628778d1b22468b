"""Which layers factorize takes, what stays tied, and why others are skipped."""

import copy

import pytest
import torch
import torch.distributed as dist
from helpers.models import Conv1D, ResNet, tied
from torch import nn
from torch.nn.utils import prune
from torch.testing._internal.two_tensor import TwoTensor

import condlr_ext
from condlr_ext import LowRankLinear, factorize, to_dense


def test_include_exclude():
    def names(**options):
        return [x.name for x in factorize(ResNet(8), rank=2, **options).layers]

    assert names(include="layer?.conv*") == [f"layer{k}.conv{i}" for k in (1, 2, 3) for i in (1, 2)]
    assert names(include=nn.Linear) == ["fc"]
    assert names(exclude=[nn.Linear, "*.conv1", "layer[23].*"]) == ["stem.0", "layer1.conv2"]
    assert names(include=lambda name, m: m.weight.shape[-1] == 1) == ["layer2.shortcut.0", "layer3.shortcut.0"]
    # a plain name is the whole name: "4" is module 4, not 14
    deep = nn.Sequential(*[nn.Linear(4, 4) for _ in range(15)])
    assert [x.name for x in factorize(deep, rank=1, include="4").layers] == ["4"]


def test_shared_modules_stay_shared():
    shared = nn.Linear(6, 6)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.Linear(6, 6))})
    factorize(model, rank=2)
    assert model["a"] is model["b"][0] and isinstance(model["a"], LowRankLinear)


@pytest.mark.parametrize("init", ["svd", "random"])
def test_tied_layers_share_their_factors_and_are_tied_again(init):
    model = tied().double()
    x = torch.randn(5, 12, dtype=torch.float64)
    report = factorize(model, rank=8, init=init)
    assert [(r.name, r.tied_to) for r in report.layers] == [("0", None), ("2", "0"), ("1", None)]
    assert report.layers[1].parameters == 0 and report.kept == 2 * (8 * 20 + 64) / (2 * 96)
    for name in "USV":
        assert getattr(model[0], name) is getattr(model[2], name)
    assert model[0].bias is not model[2].bias
    # one gradient for both uses, one step for the shared factors: they stay one layer
    before = model(x)
    optimizer = condlr_ext.optim.CondLRSGD(model, lr=0.1, tau=0.5)
    model(x).pow(2).sum().backward()
    optimizer.step()
    assert torch.equal(model[0].weight, model[2].weight) and not torch.allclose(model(x), before)
    after = model(x)
    biases = [layer.bias for layer in model]
    to_dense(model)
    assert model[0].weight is model[2].weight and all(m.bias is b for m, b in zip(model, biases, strict=True))
    torch.testing.assert_close(model(x), after)


def test_weights_tied_to_something_else_are_left_alone():
    model = nn.ModuleDict({"embed": nn.Embedding(9, 6), "out": nn.Linear(6, 9, bias=False), "mid": nn.Linear(6, 6)})
    model["out"].weight = model["embed"].weight
    report = factorize(model, rank=2)
    assert [x.name for x in report.layers] == ["mid"] and report.skipped == {
        "out": "its weight is tied to that of embed",
        "embed": "an embedding is factorized where include or rank names it",
    }
    assert model["out"].weight is model["embed"].weight
    # of two tied layers only one is wanted
    model = tied()
    report = factorize(model, rank=2, exclude="2")
    assert (
        report.skipped == {"0": "its weight is tied to that of 2", "2": "left out by include or exclude"}
        and model[0].weight is model[2].weight
    )
    with pytest.raises(ValueError, match="0: its weight is tied to that of 2"):
        factorize(model, rank={"0": 2})
    with pytest.raises(ValueError, match=r"0, 2 have one weight and need one rank, got \[2, 3\]"):
        factorize(model, rank={"0": 2, "2": 3})
    # the same parameter, but transposed in one of them
    hf = nn.ModuleDict({"a": Conv1D(6, 6), "b": nn.Linear(6, 6), "c": nn.Linear(6, 6)})
    hf["b"].weight = hf["a"].weight
    report = factorize(hf, rank=2)
    assert set(report.skipped) == {"a", "b"} and [x.name for x in report.layers] == ["c"]


def test_what_is_skipped_says_why():
    class Mine(nn.Linear):
        pass

    class Attention(nn.MultiheadAttention):
        pass

    def replaced():
        layer = nn.Linear(6, 6)
        layer.forward = lambda x: x
        return layer

    def hooked():
        layer = nn.Linear(6, 6)
        layer.register_state_dict_pre_hook(lambda *_: None)
        return layer

    utils = nn.utils
    model = nn.ModuleDict(
        {
            "mine": Mine(6, 6),
            "attention": Attention(6, 2),
            "weight_norm": utils.parametrizations.weight_norm(nn.Linear(6, 6)),
            "spectral_norm": utils.parametrizations.spectral_norm(nn.Conv2d(3, 6, 3)),
            "attention_norm": utils.parametrizations.spectral_norm(nn.MultiheadAttention(6, 2), "in_proj_weight"),
            "old_norm": utils.spectral_norm(nn.Linear(6, 6)),
            "pruned": prune.l1_unstructured(nn.Linear(6, 6), "weight", 0.5),
            "lazy": nn.LazyLinear(6),
            "low": LowRankLinear(6, 6, rank=3),
            "replaced": replaced(),
            "hooked": hooked(),
            "complex": nn.Linear(6, 6, dtype=torch.complex64),
            "plain": nn.Linear(6, 6),
        }
    )
    before = {name: type(module) for name, module in model.named_modules()}
    report = factorize(model, rank=2, exclude=["*.out_proj", "low"])
    parametrized = "its weight is parametrized (torch.nn.utils.parametrize)"
    assert report.skipped == {
        "mine": "a Mine may do more than its base class",
        "attention": "a Attention may do more than its base class",
        "weight_norm": parametrized,
        "spectral_norm": parametrized,
        "attention_norm": "its in_proj_weight is parametrized (torch.nn.utils.parametrize)",
        "old_norm": "its weight is not a plain parameter (pruned, or normalized by a hook)",
        "pruned": "its weight is not a plain parameter (pruned, or normalized by a hook)",
        "lazy": "its size is not known before its first forward",
        **dict.fromkeys(["low", "attention.out_proj", "attention_norm.out_proj"], "left out by include or exclude"),
        "replaced": "its forward was replaced on the instance",
        "hooked": "it has state_dict hooks, which know its dense weight",
        "complex": "its weight is torch.complex64",
    }
    assert "left as it is: mine: a Mine may do more than its base class" in str(report)
    after = {name: type(module) for name, module in model.named_modules()}
    assert {name for name in before if before[name] is not after[name]} == {"plain"}
    with pytest.raises(ValueError, match="no layer to factorize .* mine: a Mine may do more than its base class"):
        factorize(model, rank=2, include="mine")


def test_what_is_compiled_on_its_own_is_skipped():
    """Its wrapper would go on to run the dense layer."""
    model = nn.Sequential(nn.Linear(20, 20), torch.compile(nn.Linear(20, 20), backend="eager"))
    report = factorize(model, rank=2)
    assert [layer.name for layer in report.layers] == ["0"]
    assert "compiled on its own" in report.skipped["1._orig_mod"] and type(model[1]._orig_mod) is nn.Linear


class Mixture(nn.Module):
    """A module with matrices that are left alone, for all kinds of reasons."""

    def __init__(self):
        super().__init__()
        self.bag, self.embed, self.up = nn.EmbeddingBag(9, 8), nn.Embedding(9, 8), nn.ConvTranspose2d(4, 4, 3)
        self.pair, self.lazy = nn.Bilinear(3, 3, 3), nn.LazyConvTranspose2d(4, 3)
        self.attention = nn.MultiheadAttention(8, 2, add_bias_kv=True)
        self.experts = nn.Parameter(torch.rand(2, 8, 8))
        self.out = nn.Linear(8, 8)


def test_the_report_names_every_matrix_and_the_total():
    model = Mixture()
    total = sum(p.numel() for p in model.parameters() if not isinstance(p, nn.UninitializedParameter))
    report = factorize(model, rank=2, exclude="attention")
    left_out, lazy = "left out by include or exclude", "its size is not known before its first forward"
    assert report.skipped == {
        "attention.in_proj": left_out,
        "attention.out_proj": left_out,
        "attention.bias_k": "MultiheadAttention.bias_k is not supported",
        "attention.bias_v": "MultiheadAttention.bias_v is not supported",
        "experts": "a stack of matrices is factorized where include or rank names it",
        "bag.weight": "EmbeddingBag is not supported",
        "embed": "an embedding is factorized where include or rank names it",
        "lazy": lazy,
    }
    assert (report.dense_model_parameters, report.model_parameters) == (total, total - 64 + 36 - 144 + 84 - 27 + 28)
    assert f"parameters of the whole model: {total} -> {total - 87}" in str(report)
    assert "left as it is: bag.weight: EmbeddingBag is not supported" in str(report)
    with pytest.raises(ValueError, match="no layer to factorize .*EmbeddingBag is not supported"):
        factorize(Mixture(), rank=2, include=nn.EmbeddingBag)


def test_low_rank_layers_are_not_factorized_again_nor_the_rest_instead():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4))
    factorize(model, rank=4, exclude="2")
    for options in ({"rank": 2}, {"budget": 0.5}, {"rank": 2, "include": ["0", "2"]}):
        with pytest.raises(ValueError, match="low-rank already: 0.*; call to_dense first for new ranks"):
            factorize(model, **options)
    with pytest.raises(ValueError, match=r"not eligible: 0 \(it is low-rank already, of rank 4: to_dense first\)"):
        factorize(model, rank={"0": 2})
    assert type(model[2]) is nn.Linear and model[0].rank == 4
    factorize(model, rank=2, exclude=condlr_ext.nn.LowRankLayer)
    assert [layer.rank for layer in model] == [4, 4, 2]


def test_parts_of_pefts_layers_are_skipped():
    """PEFT finds, saves and merges them by their class."""
    Base = type("BaseTunerLayer", (nn.Module,), {"__module__": "peft.tuners.tuners_utils"})
    lora = type("Linear", (Base,), {"__module__": "peft.tuners.lora.layer"})()
    lora.base_layer, lora.lora_A = nn.Linear(8, 8), nn.ModuleDict({"default": nn.Linear(8, 2)})
    model = nn.Sequential(lora, nn.Linear(8, 8))
    report = factorize(copy.deepcopy(model), rank=2)
    assert [x.name for x in report.layers] == ["1"]
    assert dict.fromkeys(["0.base_layer", "0.lora_A.default"], report.skipped["0.base_layer"]) == report.skipped
    assert report.skipped["0.base_layer"] == "it is in PEFT's Linear: call merge_and_unload first"
    assert list(condlr_ext.add_adapters(model, 2)) == ["1"]


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")
def test_wrapped_and_sharded_models_are_refused_by_name(one_process, tmp_path):
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(net))
    for function in (factorize, condlr_ext.add_adapters):
        for model in (wrapped, nn.Sequential(wrapped)):
            with pytest.raises(ValueError, match="model must not be wrapped yet, got .* in DistributedDataParallel"):
                function(model, rank=2)
    factorize(low := copy.deepcopy(net), rank=2)
    condlr_ext.save(low, tmp_path / "low.safetensors")
    with pytest.raises(ValueError, match="load: model must not be wrapped yet"):
        condlr_ext.load(wrapped, tmp_path / "low.safetensors")
    assert type(wrapped.module[0]) is nn.Linear

    from torch.distributed.fsdp import fully_shard

    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    sharded = fully_shard(copy.deepcopy(net), mesh=mesh)
    with pytest.raises(ValueError, match="0, 1: its weight must be a plain tensor, got DTensor with placements"):
        factorize(sharded, rank=2)
    with pytest.raises(ValueError, match="add_adapters: layer 0: .* must be a plain tensor, got DTensor"):
        condlr_ext.add_adapters(sharded, 2)
    low = fully_shard(low, mesh=mesh)
    assert condlr_ext.condition_numbers(low).keys() == {"0", "1"}
    for function in (to_dense, condlr_ext.fold):
        with pytest.raises(ValueError, match="layer 0: .*[UV] must be a plain tensor, got DTensor"):
            function(low)
    with pytest.raises(TypeError, match="0.U must be a plain tensor, got DTensor"):
        condlr_ext.save(low, tmp_path / "sharded.safetensors")


def test_quantized_weights_are_skipped_and_refused_by_name():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    quantized = TwoTensor(torch.randn(8, 8), torch.randn(8, 8))  # stands for torchao's: no arithmetic of ours works
    model[0].weight = nn.Parameter(quantized, requires_grad=False)
    with pytest.raises(
        ValueError, match="layer 0: LowRankAdapter: the layer's weight must be a plain tensor, got TwoT"
    ):
        condlr_ext.add_adapters(model, 2)
    assert all(p.requires_grad for p in model[1].parameters())
    report = factorize(model, rank=2)
    assert [x.name for x in report.layers] == ["1"] and "must be a plain tensor, got TwoTensor" in report.skipped["0"]
    with pytest.raises(TypeError, match="0.weight must be a plain tensor, got TwoTensor"):
        condlr_ext.save(model, "never-written.safetensors")
