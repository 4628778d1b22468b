"""torch.export and ONNX: graphs of torch's own ops, for any batch size, which run where this package is not installed."""

import subprocess
import sys

import pytest
import torch
from helpers.models import MODELS, example_input

import condlr_ext
from condlr_ext import LowRankConv1d, LowRankConv2d, LowRankLinear

BATCH = torch.export.Dim("batch", min=1)
NETWORKS = pytest.mark.parametrize("name", ["resnet", "vit", "encoder"])


def low_rank(name: str):
    torch.manual_seed(0)
    model = MODELS[name]()
    condlr_ext.factorize(model, rank=0.4)
    return model.eval()


def namespaces(program) -> set[str]:
    """Return the namespaces of all ops in the graph, subgraphs included."""
    graphs = [m for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    targets = [n.target for g in graphs for n in g.graph.nodes if n.op == "call_function"]
    return {t.namespace for t in targets if isinstance(t, torch._ops.OpOverload)}


@NETWORKS
@pytest.mark.parametrize("strict", [False, True])
def test_export(name, strict):
    model = low_rank(name)
    program = torch.export.export(model, (example_input(name),), dynamic_shapes=({0: BATCH},), strict=strict)
    assert namespaces(program) == {"aten"}
    with torch.no_grad():
        for batch in (1, 4, 9):
            x = example_input(name, batch)
            torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("route", ["auto", "factorized", "merged"])
def test_all_layers_and_routes(route):
    """Also under a backend that this machine could not run."""
    model = torch.nn.Sequential(
        LowRankConv2d(2, 8, 3, padding="same", rank=3),
        LowRankConv2d(8, 4, 3, groups=2, dilation=2, stride=2, padding=2, padding_mode="reflect", rank=3),
        torch.nn.Flatten(2),
        LowRankConv1d(4, 6, 3, rank=2),
        torch.nn.AdaptiveAvgPool1d(5),
        LowRankLinear(5, 4, bias=False, rank=2),
    ).to(memory_format=torch.channels_last)
    for layer in model:
        if isinstance(layer, condlr_ext.nn.LowRankLayer):
            layer.route = route
    with condlr_ext.backend("triton"):
        program = torch.export.export(model, (torch.randn(3, 2, 12, 10),), dynamic_shapes=({0: BATCH},))
    assert namespaces(program) == {"aten"}
    for batch in (1, 3, 5):
        x = torch.randn(batch, 2, 12, 10)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


def test_exported_route_is_the_layers():
    """Factorized, the graph has no product with as many numbers as W; merged, it has."""
    layer = LowRankLinear(40, 30, rank=4)
    for route, forms_W in (("factorized", False), ("merged", True), ("auto", False)):
        layer.route = route
        program = torch.export.export(layer, (torch.randn(3, 40),))
        products = [n.meta["val"].shape for n in program.graph.nodes if "matmul" in str(n.target)]
        assert any(set(shape) == {30, 40} for shape in products) == forms_W


def test_exported_model_trains():
    """The gradients of its parameters are those of the model."""
    model = low_rank("vit").train()
    x = example_input("vit")
    exported = torch.export.export(model, (x,)).module()
    model(x).pow(2).sum().backward()
    exported(x).pow(2).sum().backward()
    expected = dict(model.named_parameters())
    for name, p in exported.named_parameters():
        torch.testing.assert_close(p.grad, expected[name].grad, rtol=1e-4, atol=1e-4)


def test_saved_program_runs_without_the_package(tmp_path):
    model = low_rank("resnet")
    x = example_input("resnet", 3)
    program = torch.export.export(model, (example_input("resnet"),), dynamic_shapes=({0: BATCH},))
    torch.export.save(program, tmp_path / "model.pt2")
    torch.save((x, model(x).detach()), tmp_path / "data.pt")
    code = (
        "import sys, torch\n"
        "x, y = torch.load('data.pt')\n"
        "torch.testing.assert_close(torch.export.load('model.pt2').module()(x), y, rtol=1e-4, atol=1e-5)\n"
        "assert 'condlr_ext' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@NETWORKS
def test_onnx(name, tmp_path):
    pytest.importorskip("onnxscript", reason="torch.onnx.export needs onnxscript")
    model = low_rank(name)
    x = example_input(name)
    torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=True, dynamic_shapes=({0: BATCH},), verbose=False)
    import onnx

    stored = onnx.load(tmp_path / "model.onnx")
    assert {node.domain for node in stored.graph.node} == {""} and not stored.functions
    runtime = pytest.importorskip("onnxruntime", reason="running the file needs onnxruntime")
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    for batch in (1, 4, 9):
        x = example_input(name, batch)
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), model(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*:torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_torch_jit_trace(tmp_path):
    for layer, x in (
        (LowRankLinear(20, 30, rank=5), torch.randn(64, 20)),
        (LowRankConv2d(3, 8, 3, rank=4), torch.randn(2, 3, 8, 8)),
    ):
        torch.jit.save(torch.jit.trace(layer, x), tmp_path / "layer.pt")
        x = torch.randn(5, *x.shape[1:])
        torch.testing.assert_close(torch.jit.load(tmp_path / "layer.pt")(x), layer(x))


def test_symbolic_trace():
    model = torch.nn.Sequential(
        LowRankConv2d(2, 8, 3, padding="same", rank=3),
        LowRankConv2d(8, 4, 3, padding=2, padding_mode="reflect", rank=3),
        torch.nn.Flatten(),
        LowRankLinear(4 * 100, 6, rank=4),
    )
    x = torch.randn(2, 2, 8, 8)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))
