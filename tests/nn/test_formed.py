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
from condlr_ext.nn.formed import FormedWeight, WatchedWeight


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


A = torch.eye(6)
FUNCTIONS = {
    "out": lambda W: torch.mul(A, A, out=W),
    "out of init": nn.init.eye_,
    "clamp_": lambda W: torch.clamp_(W, -1e-3, 1e-3),
    "relu_": torch.relu_,
    "inplace": lambda W: nn.functional.relu(W, inplace=True),
    "module": nn.ReLU(inplace=True),
    "foreach": lambda W: torch._foreach_mul_([W], 2),
    "foreach of views": lambda W: torch._foreach_zero_([torch.transpose(W, 0, 1)]),
    "copy": lambda W: torch._foreach_copy_([W], [A]),
    "aten": torch.ops.aten.zero_,
    "put": lambda W: torch.index_put_(W, (torch.tensor([0]),), torch.tensor(1.0)),
    "vector": lambda W: nn.utils.vector_to_parameters(torch.zeros(36), [W]),
    "view by a function": lambda W: torch.movedim(W, 0, 1).zero_(),
    "views by a function": lambda W: torch.split(W, 2)[1].zero_(),
    "out into a view": lambda W: torch.add(A[0], A[0], out=torch.select(W, 0, 0)),
}


@pytest.mark.parametrize("write", FUNCTIONS)
def test_functions_that_write_raise_in_training(write):
    layer = LowRankLinear(6, 6, rank=2)
    before = layer.weight.detach().clone()
    with torch.no_grad(), pytest.raises(AttributeError, match="formed from its factors at each access"):
        FUNCTIONS[write](layer.weight)
    with pytest.raises((AttributeError, RuntimeError), match="formed from|support automatic|is a view and is being"):
        FUNCTIONS[write](layer.weight)
    layer.requires_grad_(False)
    with pytest.raises(AttributeError, match="formed from its factors at each access"):
        FUNCTIONS[write](layer.weight)
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("train", (True, False))
def test_every_method_that_gives_a_view_gives_one_that_refuses_writes(train):
    layer = LowRankLinear(6, 6, rank=2).train(train)
    calls = {
        "as_strided": ((2, 2), (1, 2)), "broadcast_to": ((1, 6, 6),), "chunk": (2,), "dsplit": None, "expand": (1, 6, 6),
        "expand_as": (A,), "hsplit": (2,), "moveaxis": (0, 1), "movedim": (0, 1), "narrow": (0, 1, 2), "permute": (1, 0),
        "reshape": (36,), "reshape_as": (A.view(-1),), "select": (0, 1), "split": (2,), "split_with_sizes": ([2, 4],),
        "swapaxes": (0, 1), "swapdims": (0, 1), "tensor_split": (2,), "transpose": (0, 1), "unflatten": (0, (2, 3)),
        "unfold": (0, 2, 2), "unsqueeze": (0,), "view": (-1,), "view_as": (A.view(-1),), "vsplit": (2,),
    }  # fmt: skip
    itself_or_a_copy = {"contiguous", "cpu", "cuda", "pin_memory", "positive", "resolve_conj", "resolve_neg", "to"}
    not_strided = {"ccol_indices", "coalesce", "col_indices", "crow_indices", "indices", "row_indices", "values"}
    attributes = {"H", "T", "mH", "mT", "real"}
    for name in dir(torch.Tensor):
        schemas = [] if name.startswith("_") else torch._C._jit_get_schemas_for_operator(f"aten::{name}")
        if not any(r.alias_info and not r.alias_info.is_write for s in schemas for r in s.returns):
            continue
        if name in itself_or_a_copy | not_strided | {
            "imag",
            "dsplit",
            "slice_inverse",
        }:  # imag, dsplit: not of a matrix
            continue
        with torch.no_grad():
            W = layer.weight
            result = getattr(W, name) if name in attributes else getattr(W, name)(*calls.get(name, ()))
            for view in result if isinstance(result, tuple) else (result,):
                with pytest.raises(AttributeError, match="would be lost"):
                    view.zero_()
    for name in attributes:
        with torch.no_grad(), pytest.raises(AttributeError, match="would be lost"):
            getattr(layer.weight, name).zero_()


def test_numpy_gets_a_weight_that_is_read_only():
    array = LowRankLinear(6, 6, rank=2).weight.detach().numpy()
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 0


def test_only_training_and_recording_watch_functions():
    layer = LowRankLinear(6, 6, rank=2)
    assert type(layer.weight) is WatchedWeight
    assert type(layer.eval().weight) is WatchedWeight  # a frozen one, or without gradients: torch's fused kernels run
    with torch.no_grad():
        assert type(layer.weight) is FormedWeight
        assert type(layer.train().weight) is WatchedWeight
    assert type(layer.requires_grad_(False).eval().weight) is FormedWeight
    with torch.inference_mode():
        assert torch.equal(layer.train().weight @ A, layer.weight)


@pytest.mark.parametrize("write", [torch.relu_, lambda W: nn.functional.relu(W.T[1], inplace=True)])
def test_a_function_that_writes_where_none_is_watched_warns(write, recwarn):
    layer = LowRankLinear(6, 6, rank=2).eval()
    with torch.no_grad():
        layer(layer.weight)
        stored = nn.Parameter(layer.weight)
        stored.add_(1)
        assert not recwarn.list
        with pytest.warns(UserWarning, match="what a function wrote into it is lost"):
            write(layer.weight)


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
