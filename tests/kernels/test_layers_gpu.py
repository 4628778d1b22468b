"""The Triton kernels of the layers on a CUDA device."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import tf32
from helpers.cuda import on_another_stream
from helpers.layer_kernels import ALL, PRECISIONS, ours, plain, precision

import condlr_ext
from condlr_ext import functional, ops, reference
from condlr_ext.kernels.triton import devices

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("float32_convolutions")]

if torch.cuda.is_available() and not devices.INTERPRETED:
    from condlr_ext.kernels.triton.linear import configs
    from condlr_ext.kernels.triton.linear import launch as layers

SIZES = [  # rows, n, m, r
    (1, 1, 1, 1), (3, 17, 33, 3), (33, 63, 100, 17), (100, 3, 63, 3), (63, 100, 17, 16), (300, 400, 301, 32),
    (129, 512, 256, 50), (1000, 1024, 512, 64), (257, 640, 320, 128), (512, 768, 1024, 200), (96, 1024, 512, 256),
    (20000, 96, 64, 19), (0, 6, 5, 2),
]  # fmt: skip


@pytest.fixture(params=PRECISIONS)
def dtype(request):
    with precision(request.param) as dtype:
        yield dtype


def tensors(rows, n, m, r, dtype, device="cuda"):
    """Return X, U, S, V, b and the gradient of Y, scaled so that sums over the rows fit in float16."""
    low = []
    for shape, scale in (((rows, n), 1), ((m, r), m), ((r, r), r), ((n, r), n), ((m,), 1), ((rows, m), max(rows, 1))):
        low.append((torch.randn(shape, dtype=torch.float64) / scale**0.5).to(device, dtype))
    return low


def check(got, theirs, true, moduli, dtype):
    """Assert at most twice the error of plain PyTorch, plus two roundings of the sum of moduli for lucky exact numbers."""
    rounds = dtype == torch.float32 and torch.get_float32_matmul_precision() == "high"
    for mine, other, exact, modulus in zip(got, theirs, true, moduli, strict=True):
        assert mine.dtype == dtype and mine.shape == exact.shape and mine.isfinite().all()
        # in tf32 each operand of three products is rounded by up to 2**-11, where cuBLAS may take exact ones
        allowed = 6 * 2.0**-11 if rounds else (32 if dtype == torch.float64 else 2) * torch.finfo(dtype).eps
        distance, limit = ((t.double() - exact).norm().item() for t in (mine, other))
        assert distance <= 2 * limit + allowed * modulus.norm().item()


@pytest.mark.parametrize("rows,n,m,r", SIZES)
def test_linear_agrees_with_the_reference(rows, n, m, r, dtype):
    low = tensors(rows, n, m, r, dtype)
    exact = [t.double() for t in low]
    check(ours(*low), plain(*low), plain(*exact), plain(*(t.abs() for t in exact)), dtype)


@pytest.mark.parametrize("rows,n,m,r", [size for size in SIZES if size[0] > 30])
def test_tf32_operands_are_rounded(rows, n, m, r):
    """Outputs that are cut have 0.2 % more distance, and all are too small."""
    low = tensors(rows, n, m, r, torch.float32)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        got = ours(*low)
    finally:
        torch.set_float32_matmul_precision(before)
    exact = plain(*(t.double() for t in low))
    for mine, expected, true in zip(got, tf32.layer(*low), exact, strict=True):
        assert tf32.distance(mine, expected) <= tf32.TOLERANCE
        assert abs(tf32.gain(mine, true) - 1) <= abs(tf32.gain(expected, true) - 1) + tf32.TOLERANCE


@pytest.mark.parametrize("rank", [16, 32, 64, 128, 256])
def test_every_configuration(rank, dtype, monkeypatch):
    low = tensors(200, 520, 390, rank - 3, dtype)
    exact = [t.double() for t in low]
    theirs, true, moduli = plain(*low), plain(*exact), plain(*(t.abs() for t in exact))
    original, here = configs.of, devices.architecture(low[0].device)
    for kernel in ("chain", "sums"):
        for config in original(kernel, here, dtype, rank, layers.precision(dtype)):
            monkeypatch.setattr(
                configs, "of", lambda name, *a, k=kernel, c=config: [c] if name == k else original(name, *a)
            )
            check(ours(*low), theirs, true, moduli, dtype)


def test_repeated_runs_give_the_same_bits(dtype):
    """A race would not, and memory that nothing wrote shows as NaN (torch fills it under deterministic algorithms)."""
    low = tensors(3000, 520, 390, 61, dtype)
    first = ours(*low)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(ours(*low), first, strict=True))


def strided(t):
    return torch.full((*t.shape[:-1], t.shape[-1] + 3), torch.nan, dtype=t.dtype, device=t.device)[..., 1:-2].copy_(t)


@pytest.mark.parametrize("move", [strided, lambda t: t.mT.contiguous().mT], ids=["rows apart", "transposed"])
def test_strides(move, dtype):
    X, U, S, V, b, G = tensors(70, 64, 96, 24, dtype)
    expected = ours(X, U, S, V, b, G)
    got = ours(*(move(t) for t in (X, U, S, V)), b, move(G))
    eps = 2.0**-10 if dtype == torch.float32 else torch.finfo(dtype).eps
    for a, b in zip(got, expected, strict=True):
        assert (a - b).norm() <= 8 * eps * b.norm()


def test_rows_beyond_32_bits():
    """Offsets in X and Y pass 2**31 elements."""
    rows, n = (1 << 31) // 4096 + 100, 4096
    if torch.cuda.mem_get_info()[0] < 6 * rows * n:
        pytest.skip("needs 13 GB of free memory")
    torch.use_deterministic_algorithms(False)
    U, S, V = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in ((n, 16), (16, 16), (n, 16)))
    X = torch.randn(rows, n, device="cuda", dtype=torch.bfloat16)
    Y, _ = layers.low_rank_linear(X, U, S, V, None)
    for part in (slice(0, 50), slice(rows - 50, rows)):
        exact = X[part].double() @ V.double() @ S.mT.double() @ U.mT.double()
        assert (Y[part].double() - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("kernel,stride,padding", [(3, 1, 1), (1, 1, 0), (3, 2, 0), (1, 2, 0)])
def test_conv_agrees_with_the_reference(kernel, stride, padding, dtype):
    x, U, S, V, b, _ = tensors(1, 20 * kernel**2, 48, 19, dtype)
    x = torch.randn(3, 20, 12, 11, dtype=torch.float64).to("cuda", dtype).to(memory_format=torch.channels_last)
    geometry = [kernel] * 2, [stride] * 2, [padding] * 2, [1, 1], 1

    def both(forward, backward, x, U, S, V, b, G=None):
        Y, P = forward(x, U, S, V, b, *geometry)
        G = torch.ones_like(Y) if G is None else G
        return Y, P, *backward(G, x, P, U, S, V, ALL, *geometry)

    args = x, U, S, V, b
    exact = [t.double() for t in args]
    by_torch = reference.low_rank_conv, reference.low_rank_conv_backward
    got = both(layers.low_rank_conv, layers.low_rank_conv_backward, *args)
    check(got, both(*by_torch, *args), both(*by_torch, *exact), both(*by_torch, *(t.abs() for t in exact)), dtype)
    assert got[0].is_contiguous(memory_format=torch.channels_last)


def model(dtype=torch.float32):
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        condlr_ext.LowRankConv2d(3, 16, 3, padding=1, rank=7), torch.nn.ReLU(), torch.nn.Flatten(),
        condlr_ext.LowRankLinear(16 * 64, 40, rank=13), torch.nn.ReLU(), condlr_ext.LowRankLinear(40, 10, rank=5),
    )  # fmt: skip
    x = torch.randn(32, 3, 8, 8, dtype=dtype)
    return net.to("cuda", dtype, memory_format=torch.channels_last), x.cuda().to(memory_format=torch.channels_last)


def gradients(net, x, forward=None):
    net.zero_grad()
    y = (forward or net)(x)
    y.square().mean().backward()
    return [y.detach().clone(), *(p.grad.clone() for p in net.parameters())]


def near(got, expected, tolerance=1e-5):
    for a, b in zip(got, expected, strict=True):
        assert (a - b).norm() <= tolerance * b.norm()


def test_layers_use_the_kernels():
    """Backend "triton" uses them; "auto" gives the same by any path."""
    net, x = model()
    with condlr_ext.backend("reference"):
        expected = gradients(net, x)
    for name in ("triton", "auto"):
        with condlr_ext.backend(name):
            near(gradients(net, x), expected)
    X, U, S, V, b, _ = (t.requires_grad_() for t in tensors(8192, 1024, 1024, 32, torch.bfloat16))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        functional.low_rank_linear(X, U, S, V, b, route="factorized")
    kernels = [e.key for e in profile.key_averages()]
    chosen = ops.layers.low_rank_linear.automatic(X, U, S, V, b)
    assert any("chain" in key for key in kernels) == (chosen == "triton")


@pytest.mark.parametrize("dtype_", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype_):
    net, x = model()
    expected = gradients(net, x)
    with torch.autocast("cuda", dtype=dtype_), condlr_ext.backend("triton"):
        y = net(x)
    assert y.dtype == dtype_
    y.float().square().mean().backward()
    assert (y.float() - expected[0]).norm() < 0.03 * expected[0].norm()


@pytest.mark.parametrize("name", ["auto", "triton"])
def test_compile(name):
    torch._dynamo.reset()
    net, x = model()
    with condlr_ext.backend(name):
        expected = gradients(net, x)
        near(gradients(net, x, torch.compile(net, fullgraph=True)), expected)


@pytest.mark.parametrize("name", ["auto", "triton"])
def test_captured_forward_and_backward(name):
    net, x = model()
    with condlr_ext.backend(name):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                net.zero_grad(set_to_none=True)
                net(x).square().mean().backward()
        torch.cuda.current_stream().wait_stream(stream)
        net.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = net(x)
            y.square().mean().backward()
        x.copy_(torch.randn_like(x))
        graph.replay()
        replayed = [y.clone(), *(p.grad.clone() for p in net.parameters())]
        near(replayed, gradients(net, x), 1e-6)


def test_other_stream():
    """Work on a stream that is not the current one at import time, ordered with what precedes it there."""
    low = tensors(2000, 512, 512, 40, torch.float32)
    expected = ours(*low)
    got = on_another_stream(lambda: ours(low[0] * 1.0, *low[1:]))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_second_device():
    low = tensors(100, 64, 48, 9, torch.float32, "cuda:1")
    exact = [t.double() for t in low]
    assert torch.cuda.current_device() == 0
    check(ours(*low), plain(*low), plain(*exact), plain(*(t.abs() for t in exact)), torch.float32)


def test_torch_func():
    net, x = model()
    layer = net[-1]
    parameters = {k: p.detach() for k, p in layer.named_parameters()}
    inputs = torch.randn(5, 40, device="cuda")

    def loss(parameters, x):
        return torch.func.functional_call(layer, parameters, x).square().sum()

    per_sample = torch.vmap(torch.func.grad(loss), (None, 0))(parameters, inputs)
    layer.zero_grad()
    layer(inputs).square().sum().backward()
    for name, p in layer.named_parameters():
        near([per_sample[name].sum(0)], [p.grad], 1e-4)
    with condlr_ext.backend("triton"), pytest.raises(condlr_ext.errors.BackendError, match="under torch.func"):
        torch.func.grad(loss)(parameters, inputs)


def test_direct_calls_of_the_ops():
    """torch.ops.condlr_ext.* on CUDA tensors, without the package's functions between."""
    args = tensors(300, 200, 100, 20, torch.float32)
    raw = torch.ops.condlr_ext
    Y, P = raw.low_rank_linear(*args[:5])
    near([Y, P], raw._reference_low_rank_linear(*args[:5]), 1e-5)
    torch.library.opcheck(raw._triton_low_rank_linear.default, tuple(args[:5]))
    torch.library.opcheck(raw.low_rank_linear.default, tuple(args[:5]))


def test_tuning_keeps_one_configuration(monkeypatch):
    """Outside of deterministic mode the candidates are timed, once; the result stays right."""
    from condlr_ext.kernels.triton.linear import tuning

    torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(tuning, "_chosen", {})
    low = tensors(1000, 512, 300, 32, torch.float32)  # n not m: forward and backward are sizes of two kinds
    exact = [t.double() for t in low]
    for _ in range(2):
        check(ours(*low), plain(*low), plain(*exact), plain(*(t.abs() for t in exact)), torch.float32)
        assert len(tuning._chosen) == 3  # forward, backward, sums


def test_same_as_dense():
    """The layer is the function of its dense twin."""
    for bias, dtype in itertools.product((True, False), (torch.float32, torch.bfloat16)):
        layer = condlr_ext.LowRankLinear(300, 200, bias, rank=24).to("cuda", dtype)
        x = torch.randn(4, 50, 300, device="cuda", dtype=dtype)
        with condlr_ext.backend("triton"):
            y = layer(x)
        exact = F.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
        assert (y.double() - exact).norm() <= 0.02 * exact.norm()
