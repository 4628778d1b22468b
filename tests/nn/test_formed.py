"""The computed weight refuses writes, which would be lost, and is a plain tensor in all else."""

import copy
import io
import pickle
from unittest import mock

import pytest
import torch
from torch import nn

from condlr_ext import LowRankAdapter, LowRankConv2d, LowRankLinear, factorize
from condlr_ext.baselines import vanilla_low_rank
from condlr_ext.nn.formed import FormedWeight


def attention():
    model = nn.MultiheadAttention(6, 2)
    factorize(nn.Sequential(model), rank=2)
    return model


WEIGHTS = {
    "linear": (LowRankLinear(8, 6, rank=2), "weight"),
    "conv": (LowRankConv2d(4, 6, 3, rank=2), "weight"),
    "adapter": (LowRankAdapter(nn.Linear(8, 6), 2), "weight"),
    "projection": (attention(), "in_proj_weight"),
    "out projection": (attention().out_proj, "weight"),
}


def augmented(W):
    W += 1


def assigned(W):
    W.data = torch.zeros_like(W)


WRITES = {
    "init": nn.init.kaiming_uniform_,
    "trunc_normal": nn.init.trunc_normal_,
    "zero": lambda W: W.zero_(),
    "clamp": lambda W: W.clamp_(-1, 1),
    "copy to data": lambda W: W.data.copy_(W),
    "add to data": lambda W: augmented(W.data),
    "data": assigned,
    "operator": augmented,
    "item": lambda W: W.__setitem__(0, 0),
    "detached": lambda W: W.detach().mul_(2),
    "row": lambda W: W[0].fill_(1),
    "flat": lambda W: W.view(-1).zero_(),
    "transposed": lambda W: W.flatten(1).mT.zero_(),
    "part": lambda W: W.chunk(2)[0].normal_(),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("name", WEIGHTS)
def test_writes_raise(name, write):
    module, attribute = WEIGHTS[name]
    before = getattr(module, attribute)
    for grad in (True, False):
        with (
            torch.set_grad_enabled(grad),
            pytest.raises(AttributeError, match="formed from its factors at each access"),
        ):
            WRITES[write](getattr(module, attribute))
    assert torch.equal(getattr(module, attribute), before)


def test_every_inplace_method_of_torch_is_refused():
    W = LowRankLinear(4, 4, rank=2).weight
    for name in dir(torch.Tensor):
        if (
            name.endswith("_")
            and not name.startswith("_")
            and name not in ("detach_", "requires_grad_", "share_memory_")
        ):
            with pytest.raises(AttributeError, match=f"{name} would be lost"):
                getattr(W, name)()


def test_the_two_factor_baseline_refuses_too():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    vanilla_low_rank(model, {"0": 2})
    with pytest.raises(AttributeError, match="zero_ would be lost"):
        model[0].weight.zero_()


def test_results_are_plain_and_differentiable():
    layer = LowRankLinear(8, 6, rank=2)
    W = layer.weight
    assert type(W) is FormedWeight and not torch.overrides.has_torch_function((W,))
    for result in (W + 1, W.clone(), W.double(), W @ W.mT, torch.relu(W), W[torch.tensor([0, 2])]):
        assert type(result) is torch.Tensor
    W.clone().zero_()
    (g,) = torch.autograd.grad(W.pow(2).sum(), layer.S)
    torch.testing.assert_close(g, 2 * layer.U.mT @ W @ layer.V)
    torch.testing.assert_close(nn.Parameter(layer.weight), W)


def test_as_a_parameter_it_is_stored_and_can_be_written():
    layer, dense = LowRankLinear(8, 6, rank=2), nn.Linear(8, 6)
    for given in (layer.weight, layer.weight.detach(), layer.weight.data):
        dense.weight = nn.Parameter(given, requires_grad=False)
        assert type(dense.weight) is nn.Parameter and dense.weight.is_leaf and not dense.weight.requires_grad
        assert torch.equal(copy.deepcopy(dense).weight, layer.weight)
        nn.init.ones_(dense.weight)
    dense.weight.data = layer.weight.data
    dense.weight.data.zero_()
    assert type(layer.to_dense().weight) is nn.Parameter


def test_copies_and_files_hold_plain_tensors():
    W = LowRankLinear(8, 6, rank=2).weight.detach()
    file = io.BytesIO()
    torch.save(W, file)
    file.seek(0)
    for copied in (copy.deepcopy(W), pickle.loads(pickle.dumps(W)), torch.load(file)):
        assert type(copied) is torch.Tensor and torch.equal(copied, W)


def test_in_traces_and_transforms_it_is_plain():
    layer, x = LowRankLinear(8, 6, rank=2), torch.randn(3, 8)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x):
        return x @ layer.weight.mT

    torch.testing.assert_close(compiled(x), x @ layer.weight.mT)
    ways = [lambda W: W.mT, lambda W: W.T, lambda W: W.data.t(), lambda W: W.view(6, 8).detach().transpose(0, 1)]
    for way in ways:  # of a weight that is read outside of what is compiled
        torch._dynamo.reset()
        product = torch.compile(lambda x, W, way=way: x @ way(W), backend="eager", fullgraph=True)
        torch.testing.assert_close(product(x, layer.weight), compiled(x))
    reads = nn.Sequential(layer)
    reads.forward = lambda x: x @ reads[0].weight.mT
    torch.testing.assert_close(torch.jit.trace(reads, x)(x), compiled(x))
    torch.testing.assert_close(torch.func.vmap(lambda row: layer.weight @ row)(x), compiled(x))


def test_the_fused_kernel_of_an_encoder_still_runs():
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    factorize(nn.Sequential(model), rank=4)
    kernel, x = torch._transformer_encoder_layer_fwd, torch.randn(2, 5, 16)
    with torch.no_grad(), mock.patch("torch._transformer_encoder_layer_fwd", side_effect=kernel) as fused:
        model.eval()(x)
    assert fused.call_count == 1
