"""Tensor parallel styles on four gloo processes: the unsharded layer, its gradients, and what is sent."""

import copy
import itertools
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

import condlr_ext
from condlr_ext.optim import CondLRSGD
from condlr_ext.parallel import (
    LowRankBottleneckParallel,
    LowRankColwiseParallel,
    LowRankRowwiseParallel,
    clip_grad_norm_,
)

WORLD = 4
PAGE = Path(__file__).parents[2] / "docs" / "guide" / "tensor-parallel.md"
STYLES = {
    "colwise": LowRankColwiseParallel,
    "rowwise": LowRankRowwiseParallel,
    "bottleneck": LowRankBottleneckParallel,
}
# in, out, rank: divisible; uneven; rows that fewer ranks than there are hold, and ranks that hold fewer rows than r
SIZES = {"even": (24, 16, 3), "uneven": (10, 21, 4), "empty": (5, 6, 5), "one output": (9, 1, 1)}
OF_LAYERS = [(size, "float64", True) for size in SIZES] + [("uneven", "float32", False)]  # the last is the bias
CASES = [(style, *case) for style in STYLES for case in OF_LAYERS]
TOKENS = 3, 8


def layer_of(size: str, dtype: str, bias: bool):
    torch.manual_seed(0)
    n, m, r = SIZES[size]
    layer = condlr_ext.LowRankLinear(n, m, bias, dtype=getattr(torch, dtype), rank=r)
    return layer, torch.randn(*TOKENS, n, dtype=layer.U.dtype), torch.randn(*TOKENS, m, dtype=layer.U.dtype)


def split(style: str, x, grad, rank: int):
    """Return the parts of an input and of the output's gradient that a rank sees."""
    if style != "colwise":
        x = chunk(x, rank)
    return x, grad if style == "rowwise" else chunk(grad, rank)


def chunk(t, rank: int, dim: int = -1):
    parts = t.chunk(WORLD, dim)
    return parts[rank] if rank < len(parts) else t.narrow(dim, 0, 0)


class Sent(TorchDispatchMode):
    """Counts the bytes that a rank gives to collectives."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "c10d" in func.namespace and func._opname not in ("wait_tensor", "_wrap_tensor_autograd"):
            self.bytes += sum(t.nbytes for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, torch.Tensor))
        return func(*args, **(kwargs or {}))


def run(module, x, grad) -> dict:
    x = x.clone().requires_grad_()
    with Sent() as forward:
        y = module(x)
    with Sent() as backward:
        y.backward(grad)
    return {"y": y.detach(), "x": x.grad, "sent": (forward.bytes, backward.bytes)}


def layers(mesh) -> dict:
    rank, results = mesh.get_local_rank(), {}
    for style, *case in CASES:
        layer, x, grad = layer_of(*case)
        parallelize_module(layer, mesh, STYLES[style](), src_data_rank=None)
        found = run(layer, *split(style, x, grad, rank))
        for name, p in layer.named_parameters():
            assert p.grad.placements == p.placements and p.grad.shape == p.shape
            found[name] = p.placements[0], p.grad.to_local()
        results[(style, *case)] = found
    return results


def example() -> dict:
    """Return what the first block of the page defines."""
    namespace = {}
    exec(re.search(r"```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)[1], namespace)
    return namespace


def block_of(dtype: str, factorized: bool = True):
    torch.manual_seed(0)
    block = example()["Block"](32, heads=4)
    if factorized:
        condlr_ext.factorize(block, rank=8)
    block.to(getattr(torch, dtype))
    return block, *torch.randn(2, 2, 6, 32, dtype=getattr(torch, dtype))


def blocks(mesh) -> dict:
    results = {}
    dense = {"[qkv]": ColwiseParallel(), "o": RowwiseParallel(), "up": ColwiseParallel(), "down": RowwiseParallel()}
    for dtype, factorized in (("float32", True), ("float64", True), ("float32", False)):
        block, x, grad = block_of(dtype, factorized)
        parallelize_module(block, mesh, example()["plan"] if factorized else dense, src_data_rank=None)
        found = run(block, x, grad)
        found |= {n: getattr(p.grad, "full_tensor", lambda g=p.grad: g)() for n, p in block.named_parameters()}
        results[dtype, factorized] = found
    return results


def trained(block, x, grad) -> list[torch.Tensor]:
    """Return whole parameters after three steps."""
    optimizer = CondLRSGD(block, 0.05, 0.9, tau=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        block(x).backward(grad)
        optimizer.step()
    return [getattr(p, "full_tensor", lambda p=p: p)().detach() for p in block.parameters()]


def steps(mesh) -> list:
    block, x, grad = block_of("float64")
    return trained(parallelize_module(block, mesh, example()["plan"]), x, grad)


def layouts(mesh) -> list:
    """Return the outputs for torch's arguments of styles, beside those of torch's style on the dense layer."""
    results = []
    torch.manual_seed(0)
    layer, x = condlr_ext.LowRankLinear(12, 8, dtype=torch.float64, rank=3), torch.randn(4, 5, 12, dtype=torch.float64)
    for (ours, dense), (inputs, outputs), local in itertools.product(
        ((LowRankColwiseParallel, ColwiseParallel), (LowRankRowwiseParallel, RowwiseParallel)),
        ((Replicate(), Replicate()), (Shard(0), Shard(0)), (Shard(-1), Shard(2))),
        (True, False),
    ):
        arguments = {"input_layouts": inputs, "output_layouts": outputs, "use_local_output": local}
        whole = torch.distributed.tensor.distribute_tensor(x, mesh, [inputs])
        pair = []
        for module, style in ((copy.deepcopy(layer), ours), (layer.to_dense(), dense)):
            given = (whole.to_local() if local else whole).detach().requires_grad_()
            y = parallelize_module(module, mesh, style(**arguments), src_data_rank=None)(given)
            y.sum().backward()
            tensors = (t.full_tensor() if isinstance(t, DTensor) else t for t in (y.detach(), given.grad))
            pair.append([t.clone() for t in tensors])  # waits for what torch still gathers
            pair[-1].append(repr(y.placements) if isinstance(y, DTensor) else None)
        results.append(pair)
    return results


def refusals(mesh) -> dict:
    """Return the errors of parallel layers in use."""
    said = {}

    def note(name: str, action) -> None:
        try:
            action()
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"

    layer, x, _ = layer_of("uneven", "float32", True)
    parallelize_module(layer, mesh, LowRankColwiseParallel())
    note("again", lambda: parallelize_module(layer, mesh, LowRankColwiseParallel()))
    note("width", lambda: layer(x[..., 1:]))
    note("dtype", lambda: layer(x.double()))
    layer.route = "merged"
    note("merged", lambda: layer(x))
    attention = nn.MultiheadAttention(8, 2)
    condlr_ext.factorize(attention, rank=2)
    parallelize_module(attention, mesh, {"in_proj": LowRankColwiseParallel()})
    note("attention", lambda: attention(*[torch.randn(3, 2, 8)] * 3))
    return said


def double_backward(mesh) -> dict:
    """Return the gradients of a penalty on the gradient of the inputs."""
    rank, results = mesh.get_local_rank(), {}
    for style in STYLES:
        layer, x, _ = layer_of("uneven", "float64", True)
        parallelize_module(layer, mesh, STYLES[style]())
        penalty(layer, split(style, x, x, rank)[0]).backward()
        results[style] = {name: p.grad.full_tensor() for name, p in layer.named_parameters() if name != "bias"}
    return results


def penalty(layer, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)[0].square().sum()


def autocast(mesh) -> tuple:
    layer, x, _ = layer_of("uneven", "float32", True)
    parallelize_module(layer, mesh, LowRankBottleneckParallel())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(chunk(x, mesh.get_local_rank()))
    y.sum().backward()
    return y.dtype, layer.V.grad.dtype, y.detach().float()


def everything(mesh) -> dict:
    return {
        f.__name__: f(mesh) for f in (layers, blocks, steps, clipping, layouts, refusals, double_backward, autocast)
    }


@pytest.fixture(scope="module")
def results(pool):
    return pool.run(everything, WORLD)


def fully_sharded(_) -> dict:
    """Return one forward and backward of the page's block on a mesh of 2 x 2, each pair of ranks with half a batch."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    block, x, grad = block_of("float64")
    parallelize_module(block, mesh["tp"], example()["plan"])
    fully_shard(block, mesh=mesh["dp"])
    block.set_gradient_divide_factor(1.0)
    x, grad = (t.chunk(2)[mesh["dp"].get_local_rank()] for t in (x, grad))
    found = run(block, x, grad) | {name: p.grad.full_tensor() for name, p in block.named_parameters()}
    clipped = clip_grad_norm_(block.parameters(), 1.0), {n: p.grad.full_tensor() for n, p in block.named_parameters()}
    return found | {"clipped": clipped, "trained": trained(block, x, grad)}


@pytest.mark.slow
def test_the_block_of_the_page_under_fully_shard(pool):
    block, x, grad = block_of("float64")
    whole = run(block, x, grad)
    for rank, found in enumerate(pool.run(fully_sharded, WORLD)):
        for name in ("x", "y"):
            assert_equal(found[name], whole[name].chunk(2)[rank // 2], terms=1000)
        for name, p in block.named_parameters():
            if name != "k.bias":
                assert_equal(found[name], p.grad, terms=1000)
        assert_clipped_alike(*found["clipped"])
        assert_trained_alike(found["trained"])


def clipping(mesh) -> tuple:
    block, x, grad = block_of("float64")
    parallelize_module(block, mesh, example()["plan"])
    block(x).backward(grad)
    norms = [clip_grad_norm_(block.parameters(), limit) for limit in (1e9, 1.0)]
    assert norms[0] == norms[1]  # the first changes nothing
    return norms[1], {n: getattr(p.grad, "full_tensor", lambda g=p.grad: g)() for n, p in block.named_parameters()}


def assert_clipped_alike(norm: torch.Tensor, found: dict) -> None:
    block, x, grad = block_of("float64")
    block(x).backward(grad)
    assert_equal(norm, nn.utils.clip_grad_norm_(block.parameters(), 1.0), terms=1000)
    assert norm > 1
    for name, p in block.named_parameters():
        if name != "k.bias":
            assert_equal(found[name], p.grad, terms=1000)


def test_gradients_are_clipped_over_sharded_and_other_parameters(results):
    for result in results:
        assert_clipped_alike(*result["clipping"])


def test_clipping_of_whole_gradients_is_torchs():
    p = nn.Parameter(torch.zeros(4))
    p.grad = torch.full((4,), 3.0)
    assert clip_grad_norm_([p, nn.Parameter(torch.zeros(2))], 2.0) == 6
    torch.testing.assert_close(p.grad, torch.ones(4))
    assert clip_grad_norm_([nn.Parameter(torch.zeros(2))], 2.0) == 0


def assert_trained_alike(found: list[torch.Tensor]) -> None:
    for p, expected in zip(found, trained(*block_of("float64")), strict=True):
        torch.testing.assert_close(p, expected, rtol=1e-9, atol=1e-10)


def test_the_block_of_the_page_trains_like_the_unsharded_one(results):
    for result in results:
        assert_trained_alike(result["steps"])


def compiled(mesh) -> list:
    """Return the gradients of a compiled block beside those of an eager one."""
    gradients = []
    for wrap in (lambda model: model, lambda model: torch.compile(model, backend="aot_eager", fullgraph=True)):
        block, x, grad = block_of("float64")
        y = wrap(parallelize_module(block, mesh, example()["plan"]))(x.requires_grad_())
        y.backward(grad)
        gradients.append([y.detach(), x.grad, *(getattr(p.grad, "_local_tensor", p.grad) for p in block.parameters())])
    return gradients


@pytest.mark.slow
def test_compiled_blocks(pool):
    for eager, found in pool.run(compiled, WORLD):
        scale = max(t.abs().max() for t in eager)
        for a, b in zip(found, eager, strict=True):
            assert (a - b).abs().max() <= 1000 * torch.finfo(b.dtype).eps * scale


def assert_equal(found, expected, terms: int):
    """Compare sums of so many terms, added in another order."""
    rounding = terms * torch.finfo(expected.dtype).eps * expected.abs().max().item() if expected.numel() else 0
    torch.testing.assert_close(found, expected, rtol=0, atol=rounding)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_a_layer_is_the_unsharded_one(results, case):
    style, *rest = case
    layer, x, grad = layer_of(*rest)
    whole = run(layer, x, grad)
    terms = 4 * max(layer.U.numel(), layer.V.numel(), len(x.flatten()))
    sharded = {"U": style != "rowwise", "bias": style != "rowwise", "V": style != "colwise", "S": False}
    for rank, result in enumerate(results):
        found = result["layers"][case]
        x_part, y_part = split(style, whole["x"], whole["y"], rank)
        assert_equal(found["y"], y_part, terms)
        assert_equal(found["x"], x_part, terms)
        for name, p in layer.named_parameters():
            placement, local = found[name]
            assert placement == (Shard(0) if sharded[name] else Replicate())
            assert_equal(local, chunk(p.grad, rank, 0) if sharded[name] else p.grad, terms)
            if not sharded[name]:
                assert torch.equal(local, results[0]["layers"][case][name][1])


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_a_layer_sends_tokens_times_rank(results, case):
    style, size, dtype, _ = case
    one = TOKENS[0] * TOKENS[1] * SIZES[size][2] * (8 if dtype == "float64" else 4)
    expected = {"colwise": (0, one), "rowwise": (one, 0), "bottleneck": (one, one)}[style]
    assert all(result["layers"][case]["sent"] == expected for result in results)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_block_of_the_page_is_the_unsharded_one(results, dtype):
    block, x, grad = block_of(dtype)
    whole = run(block, x, grad) | {name: p.grad for name, p in block.named_parameters()}
    del whole["sent"], whole["k.bias"]  # attention does not depend on the latter
    for result in results:
        found = result["blocks"][dtype, True]
        for name, expected in whole.items():
            assert_equal(found[name], expected, terms=1000)  # 6 layers, each of at most 128 terms


def test_the_block_of_the_page_sends_tokens_times_rank(results):
    tokens, dim, r = 12, 32, 8
    for result in results:
        assert result["blocks"]["float32", True]["sent"] == (2 * tokens * r * 4, 4 * tokens * r * 4)
        assert result["blocks"]["float32", False]["sent"] == (2 * tokens * dim * 4, 4 * tokens * dim * 4)


def test_layouts_are_those_of_torch(results):
    for result in results:
        assert len(result["layouts"]) == 12
        for ours, dense in result["layouts"]:
            assert ours[2] == dense[2]
            for found, expected in zip(ours[:2], dense[:2], strict=True):
                assert found.shape == expected.shape
                assert_equal(found, expected, terms=100)


def test_errors_of_parallel_layers(results):
    for result in results:
        said = result["refusals"]
        assert said["again"].startswith(
            "TypeError: LowRankColwiseParallel: the module must be a LowRankLinear, got Par"
        )
        assert said["width"].endswith("input must be [*, 10] to fit this rank's rows of V, got [3, 8, 9]")
        assert "all tensors must have one dtype" in said["dtype"]
        assert said["merged"].startswith("ValueError: ParallelLowRankLinear: route must be")
        assert said["attention"].startswith("NotImplementedError: ParallelLowRankLinear: the projections")


@pytest.mark.parametrize("style", STYLES)
def test_double_backward(results, style):
    layer, x, _ = layer_of("uneven", "float64", True)
    penalty(layer, x).backward()
    for result in results:
        for name, found in result["double_backward"][style].items():
            assert_equal(found, layer.get_parameter(name).grad, terms=10_000)


def test_autocast_reaches_the_local_products(results):
    whole, x, _ = layer_of("uneven", "float32", True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = whole(x).float()
    for rank, result in enumerate(results):
        dtype, of_gradient, found = result["autocast"]
        assert (dtype, of_gradient) == (torch.bfloat16, torch.float32)
        torch.testing.assert_close(found, chunk(y, rank).detach(), rtol=0, atol=8 * 2**-8 * y.abs().max().item())


REFUSED = {
    "Linear": lambda: nn.Linear(4, 4),
    "LowRankConv2d": lambda: condlr_ext.LowRankConv2d(4, 4, 3, rank=2),
    "LowRankAdapter": lambda: condlr_ext.LowRankAdapter(nn.Linear(4, 4), rank=2),
    "LowRankTransposedLinear": lambda: condlr_ext.nn.LowRankTransposedLinear(nn.Linear, 4, 4, rank=2),
}


@pytest.mark.parametrize("style", STYLES.values())
@pytest.mark.parametrize("kind", REFUSED)
def test_other_modules_are_refused_by_name(style, kind):
    with pytest.raises(TypeError, match=rf"^{style.__name__}: the module must be a LowRankLinear, got {kind}$"):
        style()._apply(REFUSED[kind](), None)


def test_layers_that_cannot_be_sharded_are_refused():
    merged, computed = (condlr_ext.LowRankLinear(4, 4, rank=2) for _ in range(2))
    merged.route = "merged"
    with pytest.raises(ValueError, match="^LowRankColwiseParallel: the layer's route must be"):
        LowRankColwiseParallel()._apply(merged, None)
    nn.utils.parametrizations.orthogonal(computed, "U")
    with pytest.raises(TypeError, match="must be a LowRankLinear, got ParametrizedLowRankLinear"):
        LowRankColwiseParallel()._apply(computed, None)


def test_a_parallel_layer_has_no_constructor():
    with pytest.raises(TypeError, match="build a LowRankLinear and call parallelize_module"):
        condlr_ext.parallel.ParallelLowRankLinear(4, 4, rank=2)
