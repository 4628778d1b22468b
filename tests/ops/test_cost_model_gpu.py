"""Which path serves a layer on a GPU, and why: on fake tensors and a device of our own, so that no GPU is needed."""

import json
import types

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import condlr_ext
from condlr_ext import ops
from condlr_ext.kernels.triton import devices
from condlr_ext.ops import cost_model_gpu, tables

LINEAR, CONV = ops.layers.low_rank_linear, ops.layers.low_rank_conv
GEOMETRY = ([3, 3], [1, 1], [1, 1], [1, 1], 1)


@pytest.fixture(autouse=True)
def device(monkeypatch):
    """A GPU with the properties of an H200, and nothing measured."""
    properties = types.SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    monkeypatch.setattr(devices, "INSTALLED", True)
    monkeypatch.setattr(devices, "INTERPRETED", False)
    cost_model_gpu._known.cache_clear()
    with FakeTensorMode():
        yield properties
    cost_model_gpu._known.cache_clear()
    tables.reload()


def layer(rows, n, m, r, dtype=torch.bfloat16, requires_grad=True):
    options = {"device": "cuda", "dtype": dtype, "requires_grad": requires_grad}
    return [torch.empty(shape, **options) for shape in ((rows, n), (m, r), (r, r), (n, r), (m,))]


def image(channels_last=True, batch=8):
    memory = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(batch, 64, 32, 32, device="cuda", memory_format=memory)


def factors(m=64, n=576, r=13):
    return [torch.empty(shape, device="cuda") for shape in ((m, r), (r, r), (n, r), (m,))]


@pytest.mark.parametrize(
    "rows,n,m,r,dtype,path",
    [
        (8192, 4096, 4096, 64, torch.bfloat16, "triton"),  # X and Y are moved once instead of twice
        (1, 4096, 4096, 64, torch.bfloat16, "reference"),  # one program would read U and V alone
        (8192, 4096, 4096, 256, torch.float32, "reference"),  # bound by arithmetic, where a library is better
        (8192, 4096, 4096, 257, torch.bfloat16, "reference"),
        (0, 16, 16, 4, torch.bfloat16, "triton"),
    ],
)
def test_estimated(rows, n, m, r, dtype, path):
    args = layer(rows, n, m, r, dtype)
    name, why = LINEAR.explain(*args)
    assert name == path
    assert LINEAR.choose(*args) == "auto"  # found out when it runs
    if r > 256:
        assert "rank 257 exceeds 256" in why
    elif path == "reference":
        assert "us (estimated)" in why
    with condlr_ext.backend("reference"):
        assert LINEAR.choose(*args) == "reference"


def test_convolutions():
    U, S, V, b = factors()
    assert CONV.automatic(image(), U, S, V, b, *GEOMETRY) == "triton"
    name, why = CONV.explain(image(channels_last=False), U, S, V, b, *GEOMETRY)
    assert name == "reference" and "channels_last" in why
    name, why = CONV.explain(image(), *factors(n=288)[:4], *GEOMETRY[:-1], 2)
    assert name == "reference" and "groups = 2" in why
    backward = ops.layers.low_rank_conv_backward
    grad = torch.empty(8, 64, 32, 32, device="cuda")
    name, why = backward.explain(grad, image(), None, U, S, V, [True] * 5, *GEOMETRY)
    assert name == "reference" and "gradient is not in channels_last" in why
    grad = grad.to(memory_format=torch.channels_last)
    name, why = backward.explain(grad, image(channels_last=False), None, U, S, V, [True] * 5, *GEOMETRY)
    assert name == "reference" and "input is not in channels_last" in why
    both = torch.empty(8192, 1, 8, 8, device="cuda"), torch.empty(8192, 64, 1, 1, device="cuda")
    for x, kernel in zip(both, (9, 576), strict=True):  # torch answers in the contiguous format
        assert "channels_last" in CONV.explain(x, *factors(n=kernel, r=5), *GEOMETRY)[1]


def test_old_devices_and_no_triton(device, monkeypatch):
    device.major, device.minor = 7, 5
    assert "compute capability 8.0 is needed, cuda:0 has 7.5" in LINEAR.explain(*layer(8192, 4096, 4096, 64))[1]
    monkeypatch.setattr(torch.version, "hip", "7.0")
    for device.gcnArchName in ("gfx90a:sramecc+:xnack-", "gfx950"):
        assert f"gfx942 is needed, cuda:0 is {device.gcnArchName}" in LINEAR.explain(*layer(8192, 4096, 4096, 64))[1]
    device.major, device.minor, device.gcnArchName = 9, 4, "gfx942:sramecc+:xnack-"
    assert LINEAR.explain(*layer(8192, 4096, 4096, 64))[0] == "triton"
    monkeypatch.setattr(devices, "INSTALLED", False)
    assert LINEAR.explain(*layer(8192, 4096, 4096, 64)) == ("reference", "Triton is not installed")


def test_plain_pytorch_serves_unknown_devices(device):
    device.major, device.minor = 8, 9
    assert cost_model_gpu.source(torch.device("cuda:0")) == cost_model_gpu.UNKNOWN
    name, why = LINEAR.explain(*layer(8192, 4096, 4096, 64))
    assert name == "reference" and cost_model_gpu.UNKNOWN in why
    assert ops.cost_model_cpu.linear(*layer(8192, 4096, 4096, 64)).route == "factorized"


def test_known_devices_are_estimated(device):
    for device.major, device.minor in ((8, 0), (9, 0), (9, 4), (10, 0)):
        for dtype in (torch.float16, torch.float32, torch.float64):
            costs = cost_model_gpu.linear(
                "backward", *layer(512, 512, 512, 64, dtype)[:2], layer(512, 512, 512, 64, dtype)[3]
            )
            assert all(0 < c < 1e5 for c in costs[:4]) and costs.source == "estimated"


def measured(monkeypatch, tmp_path, rows, device="some GPU"):
    table = {"device": device, "date": "2026-01-02", "columns": tables.COLUMNS, "rows": rows}
    (tmp_path / "some-gpu.json").write_text(json.dumps({"format": tables.FORMAT, "tables": [table]}))
    monkeypatch.setenv("CONDLR_EXT_TABLES", str(tmp_path))
    tables.reload()
    cost_model_gpu._known.cache_clear()


def test_what_was_measured_decides(monkeypatch, tmp_path):
    sizes = [8192, 4096, 4096, 64]
    table = [
        ["forward", "linear", "bfloat16", *sizes, 90.0, 80.0, 300.0, 290.0],
        ["forward", "linear", "bfloat16", 1024, 4096, 4096, 64, 10.0, 20.0, 5.0, 4.0],
        ["backward", "linear", "bfloat16", *sizes, 90.0, 100.0, 600.0, 580.0],
        ["forward", "linear", "bfloat16", 8192, 4096, 4096, 256, None, 50.0, 40.0, 30.0],
    ]
    measured(monkeypatch, tmp_path, table)
    name, why = LINEAR.explain(*layer(*sizes))
    assert name == "reference"
    assert why == (
        "products take 80 us, the Triton kernels 90 us (measured on some GPU, 2026-01-02, in some-gpu.json, at 8192 rows, n 4096, m 4096, rank 64)"
    )
    X, U, S, V, b = layer(8000, 4000, 4100, 50)  # the nearest, within a factor of two
    assert LINEAR.explain(X, U, S, V, b) == ("reference", why)
    G = torch.empty(8192, 4100, device="cuda", dtype=torch.bfloat16)
    assert ops.layers.low_rank_linear_backward.automatic(G, X, None, U, S, V, [True] * 5) == "triton"
    assert LINEAR.automatic(*layer(1500, 4096, 4096, 64)) == "triton"
    assert LINEAR.automatic(*layer(8192, 4096, 4096, 256)) == "reference"
    assert "estimated" in cost_model_gpu.linear("forward", *layer(1, 4096, 4096, 64)[:2], V).source
    assert "estimated" in cost_model_gpu.linear("forward", *layer(*sizes, torch.float16)[:2], V).source
    plan = ops.cost_model_cpu.linear(*layer(*sizes))
    assert plan[:3] == (80 + 90, 900, 870) and plan.route == "factorized" and "measured on some GPU" in plan.source
    args = layer(1024, 4096, 4096, 64, requires_grad=False)
    assert ops.cost_model_cpu.choose(ops.cost_model_cpu.linear, *args) == "merged"
    with condlr_ext.backend("triton"):
        assert ops.cost_model_cpu.choose(ops.cost_model_cpu.linear, *args) == "factorized"
    measured(monkeypatch, tmp_path, table, "another GPU")
    assert LINEAR.automatic(*layer(*sizes)) == "triton"


def test_the_nearest_row_of_the_kind_of_layer(monkeypatch, tmp_path):
    rows = [[kind, "bfloat16", r, 576, 64, 16, *[t] * 4] for kind, r, t in
            (("linear", 4096, 3.0), ("linear", 8192, 1.0), ("conv", 8192, 2.0))]  # fmt: skip
    measured(monkeypatch, tmp_path, [["forward", *row] for row in rows])
    assert cost_model_gpu.linear("forward", *layer(7000, 576, 64, 16)[:2], layer(1, 576, 64, 16)[3]).kernels == 1
    assert (
        cost_model_gpu.linear("forward", *layer(1300, 576, 64, 16)[:2], layer(1, 576, 64, 16)[3]).source == "estimated"
    )
    U, _, V, _ = (t.bfloat16() for t in factors(r=16))
    assert cost_model_gpu.conv("forward", image().bfloat16(), 8192, U, V).kernels == 2
    assert cost_model_gpu.pixels((8, 64, 32, 32), [3, 3], [1, 1], [1, 1], [2, 1]) == 8 * 30 * 32


def test_plan_of_a_convolution():
    U, S, V, b = (t.requires_grad_() for t in factors())
    plan = ops.cost_model_cpu.conv(image(batch=256), U, S, V, b, *GEOMETRY)
    assert plan.route == "factorized" and plan.gain > 1
    inference = ops.cost_model_cpu.conv(image(batch=256).detach(), *(t.detach() for t in (U, S, V, b)), *GEOMETRY)
    assert inference.factorized < plan.factorized and inference.dense < plan.dense


def test_tf32_is_a_precision_of_its_own():
    X, U, S, V, b = layer(8192, 4096, 4096, 256, torch.float32)
    costs = []
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            costs.append(cost_model_gpu.linear("forward", X, U, V))
    finally:
        torch.set_float32_matmul_precision(before)
    assert costs[1].dense < costs[0].dense / 4 and costs[1].kernels < costs[0].kernels / 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_choice_can_be_traced(dtype, monkeypatch):
    """torch.compile(fullgraph=True) passes through routes and dispatch, with sizes as numbers and as symbols."""
    from torch._dynamo import trace_rules, utils, variables

    # Dynamo looks up what it folds by identity: make it know the properties of our own device
    properties = torch.cuda.get_device_properties
    rules = trace_rules.get_torch_obj_rule_map()
    monkeypatch.setitem(rules, properties, variables.TorchInGraphFunctionVariable)
    monkeypatch.setitem(variables.torch.constant_fold_functions, properties, None)
    utils.common_constant_types.add(types.SimpleNamespace)
    monkeypatch.setattr(ops.cost_model_cpu, "_gradients", lambda *args: (True, True))  # a fake device has no autograd
    U, S, V, b = factors()
    torch._dynamo.reset()

    def run(X, image, factors, filters):
        linear = condlr_ext.functional.low_rank_linear(X, *factors)
        return linear, condlr_ext.functional.low_rank_conv2d(image, *filters, padding=1, kernel_size=3)

    for dynamic in (False, True):
        compiled = torch.compile(run, fullgraph=True, backend="eager", dynamic=dynamic)
        filters = [t.to(dtype) for t in (U, S, V, b)]
        X, *linear = layer(8192, 512, 256, 32, dtype, requires_grad=False)
        Y, Z = compiled(X, image().to(dtype), linear, filters)
        assert Y.shape == (8192, 256) and Z.shape == (8, 64, 32, 32)
