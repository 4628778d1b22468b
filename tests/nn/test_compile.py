"""torch.compile of real models: no graph breaks, no recompilation from step to step or between batch sizes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.inductor import LINKS
from helpers.models import MODELS, example_input
from torch._dynamo.utils import counters

import condlr_ext
from condlr_ext import LowRankConv2d, LowRankLinear, reference
from condlr_ext.optim import CondLRSGD

SMALL = {"resnet": dict(width=8), "vit": dict(depth=1), "encoder": dict(depth=1)}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def low_rank(name: str):
    torch.manual_seed(0)
    model = MODELS[name](**SMALL[name])
    condlr_ext.factorize(model, rank=0.5)
    return model


def train(model, forward, name: str, batches) -> list[float]:
    """Losses of a few steps, one for each batch size; the optimizer's step is not compiled."""
    optimizer = CondLRSGD(model, 0.05, 0.9, tau=0.1)
    losses = []
    for step, batch in enumerate(batches):
        torch.manual_seed(step)
        x, y = example_input(name, batch), torch.randint(0, 10, (batch,))
        optimizer.zero_grad()
        loss = F.cross_entropy(forward(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# torch's own fake convolution tells batches below 16 from the others
@pytest.mark.parametrize("name", SMALL)
def test_training_compiles_twice_for_all_batch_sizes(name):
    """Once for the first batch size, once for all others, as torch does for any model; the losses are eager's."""
    batches = (16, 16, 19, 40, 17)
    model = low_rank(name)
    expected = train(twin := copy.deepcopy(model), twin, name, batches)
    losses = train(model, torch.compile(model, fullgraph=True, backend="aot_eager"), name, batches)
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
    # another order of float32 products, through five steps
    assert losses == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("route", ["auto", "factorized", "merged"])
def test_a_dynamic_batch_stays_open(route):
    """mark_dynamic raises where anything made a number of the batch size: in forward, backward or a fake."""
    model = torch.nn.Sequential(
        LowRankConv2d(3, 8, 3, padding=1, rank=4),
        LowRankConv2d(8, 8, 3, groups=2, padding_mode="circular", padding=2, rank=4),
        torch.nn.Flatten(),
        LowRankLinear(8 * 18 * 18, 10, rank=4),
    )
    for i in (0, 1, 3):
        model[i].route = route
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (16, 19, 64):
            x = example_input("resnet", batch)
            torch._dynamo.mark_dynamic(x, 0)
            compiled(x).sum().backward()
    assert counters["stats"]["unique_graphs"] == 1


def test_sizes_that_are_open_do_not_decide():
    """Compiled code takes the routes for many rows, whatever batch it was compiled with."""
    layers = [LowRankLinear(64, 64, rank=60), LowRankLinear(64, 64, rank=8), LowRankConv2d(3, 32, 3, rank=20)]
    few = [torch.randn(2, 64), torch.randn(2, 64), torch.randn(2, 3, 6, 6)]
    many = [x[:1].expand(reference.MANY, *x.shape[1:]) for x in few]
    expected = [layer.plan(x).route for layer, x in zip(layers, many, strict=True)]
    assert expected == ["merged", "factorized", "merged"]
    assert [layer.plan(x).route for layer, x in zip(layers, few, strict=True)] != expected
    seen = []

    def choose(*inputs):
        seen[:] = [layer.plan(x).route for layer, x in zip(layers, inputs, strict=True)]
        return [x + 1 for x in inputs]

    for x in few:
        torch._dynamo.mark_dynamic(x, 0)
    torch.compile(choose, fullgraph=True, backend="eager")(*few)
    assert seen == expected


def test_products_of_open_sizes_are_right():
    A, B, C = torch.randn(3, 7), torch.randn(7, 5), torch.randn(5, 40)
    traced = torch.fx.experimental.proxy_tensor.make_fx(reference.product, tracing_mode="symbolic")(A, B, C)
    assert "multi_dot" not in traced.code  # which makes numbers of them
    for rows in (3, 100):
        A = torch.randn(rows, 7)
        torch.testing.assert_close(traced(A, B, C), A @ B @ C)


@LINKS
def test_inductor_trains_a_transformer():
    model = low_rank("vit")
    expected = train(twin := copy.deepcopy(model), twin, "vit", (8, 8, 8))
    with torch._dynamo.config.patch(error_on_recompile=True):
        losses = train(model, torch.compile(model, fullgraph=True), "vit", (8, 8, 8))
    assert losses == pytest.approx(expected, rel=1e-4)


def test_autocast_compiles():
    dtype = torch.bfloat16
    model = low_rank("encoder")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = example_input("encoder")
    results = []
    for forward in (model, compiled):
        model.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            y = forward(x)
        y.float().pow(2).sum().backward()
        results.append((y.detach(), [p.grad.clone() for p in model.parameters()]))
    (y, grads), (y_compiled, grads_compiled) = results
    assert y_compiled.dtype == y.dtype == dtype and grads_compiled[0].dtype == torch.float32
    # both are rounded to dtype at the same points, except where the compiler fuses
    for ours, eager in zip((y_compiled, *grads_compiled), (y, *grads), strict=True):
        assert (ours - eager).norm() <= 4 * torch.finfo(dtype).eps * eager.norm()
