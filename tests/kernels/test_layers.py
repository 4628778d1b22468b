"""The Triton kernels of the layers on CPU tensors, in a process started with TRITON_INTERPRET=1."""

import itertools

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from helpers import tf32
from helpers.kernels import run_on_cpu

import condlr_ext
from condlr_ext import functional, ops, reference
from condlr_ext.errors import BackendError
from condlr_ext.kernels.triton import devices
from condlr_ext.kernels.triton.linear import configs

pytestmark = pytest.mark.interpreter

if run_on_cpu():
    import triton
    import triton.language as tl

    from condlr_ext.kernels.triton.linear import launch as layers
    from condlr_ext.kernels.triton.linear import low_rank, tuning

    @triton.jit
    def round_to_tf32(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        tl.store(out_ptr + i, low_rank.rounded(tl.load(x_ptr + i, mask=i < n)), mask=i < n)


SIZES = [  # rows, n, m, r
    (1, 1, 1, 1), (3, 17, 33, 3), (17, 33, 3, 1), (33, 63, 100, 17), (63, 100, 17, 16), (100, 3, 63, 3),
    (5, 300, 20, 20), (40, 20, 300, 19), (2, 130, 140, 100), (9, 64, 64, 64), (0, 6, 5, 2),
]  # fmt: skip
ALL = [True] * 5


def tensors(rows, n, m, r, dtype=torch.float64):
    """X, U, S, V, b and the gradient of Y."""
    shapes = ((rows, n), (m, r), (r, r), (n, r), (m,), (rows, m))
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]


def error(got, true) -> float:
    assert got.shape == true.shape
    return (got.double() - true).norm().item()


def check(got, plain, true, moduli, dtype):
    """Assert at most twice the error of plain PyTorch, plus two roundings of the sum of moduli for lucky exact numbers.

    In float64 rounding of both sides is allowed, since `true` is computed in it.
    """
    eps = torch.finfo(dtype).eps
    for mine, theirs, exact, modulus in zip(got, plain, true, moduli, strict=True):
        assert mine.dtype == dtype and mine.isfinite().all()
        allowed = 32 * eps if dtype == torch.float64 else 2 * eps
        assert error(mine, exact) <= 2 * error(theirs, exact) + allowed * modulus.norm().item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("rows,n,m,r", SIZES)
def test_linear_agrees_with_the_reference(rows, n, m, r, dtype):
    low = tensors(rows, n, m, r, dtype)
    exact = [t.double() for t in low]

    def run(forward, backward, X, U, S, V, b, G):
        Y, P = forward(X, U, S, V, b)
        return Y, P, forward(X, U, S, V, None)[0], *backward(G, X, P, U, S, V, ALL)

    ours = layers.low_rank_linear, layers.low_rank_linear_backward
    plain = reference.low_rank_linear, reference.low_rank_linear_backward
    moduli = run(*plain, *(t.abs() for t in exact))
    check(run(*ours, *low), run(*plain, *low), run(*plain, *exact), moduli, dtype)


@pytest.mark.parametrize("kernel", ["chain", "sums"])
def test_every_configuration_computes_the_same(kernel, monkeypatch):
    """Configurations of every architecture, for one size that no tile divides; grids stay small."""
    X, U, S, V, b, G = tensors(70, 45, 37, 11, torch.float32)
    exact = [t.double() for t in (X, U, S, V, b, G)]
    Y, P = reference.low_rank_linear(*exact[:5])
    true = [Y, P, *reference.low_rank_linear_backward(exact[5], exact[0], P, *exact[1:4], ALL)]
    original, seen = configs.of, set()
    for architecture, rounding, rank in itertools.product(configs.ARCHITECTURES, ("tf32", "ieee"), (16, 64)):
        for config in original(kernel, architecture, torch.float32, rank, rounding):
            if (key := repr(config.kwargs)) in seen or config.kwargs.get("CORE", 16) > 16:
                continue
            seen.add(key)
            monkeypatch.setattr(configs, "of", lambda name, *a, c=config: [c] if name == kernel else original(name, *a))
            Y, P = layers.low_rank_linear(X, U, S, V, b)
            for got, exact_ in zip((Y, P, *layers.low_rank_linear_backward(G, X, P, U, S, V, ALL)), true, strict=True):
                assert error(got, exact_) < 1e-6 * exact_.norm(), config
    assert len(seen) >= 3


@pytest.mark.parametrize("rank", [20, 33])
def test_core_met_in_parts_and_whole(rank, monkeypatch):
    """P is read back from memory where the core does not fit beside it."""
    X, U, S, V, b, _ = tensors(40, 30, 50, rank)
    for core in (16, 32, 64):
        if core > 1 << (rank - 1).bit_length():
            continue
        config = configs.of("chain", "sm_90", torch.float64, 16, "ieee")[0]
        config = layers.triton.Config(config.kwargs | {"CORE": core}, num_warps=4, num_stages=1)
        monkeypatch.setattr(configs, "of", lambda *_, c=config: [c])
        Y, P = layers.low_rank_linear(X, U, S, V, b)
        expected = reference.low_rank_linear(X, U, S, V, b)
        torch.testing.assert_close((Y, P), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "mask", list(itertools.product([False, True], repeat=5)), ids=lambda m: "".join(map(str, map(int, m)))
)
def test_only_the_gradients_asked_for(mask):
    X, U, S, V, _, G = tensors(10, 7, 9, 3)
    P = X @ V
    needs_X, needs_P = mask[3] or ((mask[1] or mask[2]) and mask[4]), mask[1] or mask[2]
    got = layers.low_rank_linear_backward(
        G, X if needs_X else None, P if needs_P and not needs_X else None, U, S, V, list(mask)
    )
    expected = reference.low_rank_linear_backward(G, X, P, U, S, V, ALL)
    for g, e, needed in zip(got, expected, mask, strict=True):
        if needed:
            torch.testing.assert_close(g, e, rtol=1e-12, atol=1e-12)
        else:
            assert g.numel() == 0


def strided(t, how):
    """Return a copy of t in another layout: rows apart, columns first, every other row or column of a larger tensor."""
    if how == "rows apart":
        return torch.full((*t.shape[:-1], t.shape[-1] + 3), torch.nan, dtype=t.dtype)[..., 1:-2].copy_(t)
    if how == "transposed":
        return t.mT.contiguous().mT
    if how == "every other row":
        return torch.full((2 * t.shape[0], *t.shape[1:]), torch.nan, dtype=t.dtype)[::2].copy_(t)
    if how == "every other column":
        return torch.full((*t.shape[:-1], 2 * t.shape[-1]), torch.nan, dtype=t.dtype)[..., ::2].copy_(t)
    return t


@pytest.mark.ptx
@pytest.mark.parametrize("how", ["rows apart", "transposed", "every other row", "every other column"])
def test_strides(how):
    X, U, S, V, b, G = tensors(20, 9, 13, 5)
    expected = reference.low_rank_linear(X, U, S, V, b)
    gradients = reference.low_rank_linear_backward(G, X, expected[1], U, S, V, ALL)
    X, U, S, V, G, P = (strided(t, how) for t in (X, U, S, V, G, expected[1]))
    b = strided(b, "every other column")
    torch.testing.assert_close(layers.low_rank_linear(X, U, S, V, b), expected, rtol=1e-12, atol=1e-12)
    got = layers.low_rank_linear_backward(G, X, P, U, S, V, ALL)
    torch.testing.assert_close(got, tuple(gradients), rtol=1e-12, atol=1e-12)


@pytest.mark.ptx
def test_expanded_gradient_and_leading_dimensions():
    _, U, S, V, b, _ = tensors(1, 6, 7, 3)
    X = torch.randn(2, 0, 3, 6, dtype=torch.float64)
    Y, P = layers.low_rank_linear(X, U, S, V, b)
    assert Y.shape == (2, 0, 3, 7) and P.shape == (2, 0, 3, 3)
    X = torch.randn(2, 4, 3, 6, dtype=torch.float64)
    Y, P = layers.low_rank_linear(X, U, S, V, b)
    torch.testing.assert_close((Y, P), reference.low_rank_linear(X, U, S, V, b), rtol=1e-12, atol=1e-12)
    G = torch.ones((), dtype=torch.float64).expand(Y.shape)
    got = layers.low_rank_linear_backward(G, X, P, U, S, V, ALL)
    torch.testing.assert_close(got, reference.low_rank_linear_backward(G, X, P, U, S, V, ALL), rtol=1e-12, atol=1e-12)


@pytest.mark.ptx
def test_many_splits_add_up_in_order(monkeypatch):
    """Rows in more splits than one, the last one shorter; twice the same bits."""
    X, U, S, V, _, G = tensors(301, 9, 13, 5, torch.float32)
    monkeypatch.setattr(devices, "multiprocessors", lambda device: 16)
    launch, grids = layers.launching.launch, []

    def watched(kernel, grid, *args, **options):
        if kernel is layers.low_rank.sums:
            grids.append(grid)
        return launch(kernel, grid, *args, **options)

    monkeypatch.setattr(layers.launching, "launch", watched)
    low = [G, X, X @ V, U, S, V]
    runs = [layers.low_rank_linear_backward(*low, ALL) for _ in range(2)]
    assert all(splits > 1 for _, splits in grids) and len(grids) == 2
    backward, exact = reference.low_rank_linear_backward, [t.double() for t in low]
    moduli = backward(*(t.abs() for t in exact), ALL)
    check(runs[0], backward(*low, ALL), backward(*exact, ALL), moduli, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


CONVS = [  # kernel, stride, padding, dilation, pixels a side
    (3, 1, 1, 1, 6), (1, 1, 0, 1, 5), (1, 2, 0, 1, 5), (2, (1, 2), (0, 1), (2, 1), 6), (3, 1, 0, 1, 3),
]  # fmt: skip


@pytest.mark.ptx
@pytest.mark.parametrize("d", [1, 2, 3])
@pytest.mark.parametrize("kernel,stride,padding,dilation,side", CONVS)
def test_conv_agrees_with_the_reference(d, kernel, stride, padding, dilation, side):
    def ints(v):
        return [v] * d if isinstance(v, int) else [v[i % 2] for i in range(d)]

    geometry = ints(kernel), ints(stride), ints(padding), ints(dilation), 1
    image = torch.randn(2, *[side] * d, 5, dtype=torch.float64).movedim(-1, 1)
    n = 5 * torch.Size(geometry[0]).numel()
    _, U, S, V, b, _ = tensors(1, n, 7, 3)
    Y, P = layers.low_rank_conv(image, U, S, V, b, *geometry)
    expected = reference.low_rank_conv(image, U, S, V, b, *geometry)
    torch.testing.assert_close((Y, P), expected, rtol=1e-12, atol=1e-12)
    assert d == 1 or Y.movedim(1, -1).is_contiguous()
    G = torch.randn(Y.shape, dtype=torch.float64)
    true = reference.low_rank_conv_backward(G, image, P, U, S, V, ALL, *geometry)
    for mask in (ALL, [True, False, False, False, False], [False, True, True, False, True], [False, False, True, False, False],
                 [False, False, False, True, True]):  # fmt: skip
        for channels_last in (True, False):
            grad = G.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else G
            for kept in (P, None):
                got = layers.low_rank_conv_backward(grad, image, kept, U, S, V, mask, *geometry)
                for g, e, needed in zip(got, true, mask, strict=True):
                    if needed:
                        torch.testing.assert_close(g, e, rtol=1e-12, atol=1e-12)
                    else:
                        assert g.numel() == 0


@pytest.mark.parametrize("d", [1, 2])
@pytest.mark.parametrize("kernel,stride,padding", [(1, 1, 0), (1, 2, 0), (3, 1, 1), (3, 2, 1)])
def test_conv_answers_in_the_memory_format_of_torch(d, kernel, stride, padding):
    """Compiled code relies on the fakes, which say so. Tested in float32, which keeps channels_last on CPUs too."""
    geometry = [kernel] * d, [stride] * d, [padding] * d, [1] * d, 1
    image = torch.randn(2, *[5] * d, 4).movedim(-1, 1)
    _, U, S, V, b, _ = tensors(1, 4 * kernel**d, 7, 3, torch.float32)
    both = []
    for by in ((layers.low_rank_conv, layers.low_rank_conv_backward), (ops.layers._conv, ops.layers._conv_backward)):
        Y, P = by[0](image, U, S, V, b, *geometry)
        G = torch.randn(Y.shape).as_strided(Y.shape, Y.stride())
        both.append([t.stride() for t in (Y, P, *by[1](G, image, P, U, S, V, ALL, *geometry))])
    assert both[0] == both[1]


@pytest.mark.parametrize("conv", [False, True])
def test_gradcheck(conv):
    _, U, S, V, b, _ = (t.requires_grad_() for t in tensors(1, 8 if conv else 4, 5, 3))
    x = torch.randn(2, 3, 3, 2, dtype=torch.float64).movedim(-1, 1) if conv else torch.randn(3, 4, dtype=torch.float64)
    x.requires_grad_()

    def run(*args):
        with condlr_ext.backend("triton"):
            return functional.low_rank_conv2d(*args, kernel_size=2) if conv else functional.low_rank_linear(*args)

    torch.autograd.gradcheck(run, (x, U, S, V, b))
    torch.autograd.gradgradcheck(run, (x, U, S, V, b))


@pytest.mark.parametrize(
    "name", ["low_rank_linear", "low_rank_linear_backward", "low_rank_conv", "low_rank_conv_backward"]
)
def test_opcheck(name):
    from helpers.op_arguments import arguments

    channels_last = {"memory_format": torch.channels_last}
    for args in arguments(name):
        args = [a.to(**channels_last) if isinstance(a, torch.Tensor) and a.dim() == 4 else a for a in args]
        torch.library.opcheck(getattr(torch.ops.condlr_ext, f"_triton_{name}").default, tuple(args))


def test_layers_train_by_the_kernels():
    """A network with a linear layer and a convolution, five steps, the same weights as on the reference path."""
    finals = []
    for name in ("triton", "reference"):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            condlr_ext.LowRankConv2d(2, 4, 3, padding=1, rank=3), torch.nn.ReLU(), torch.nn.Flatten(),
            condlr_ext.LowRankLinear(4 * 16, 5, rank=3),
        ).double().to(memory_format=torch.channels_last)  # fmt: skip
        x, y = torch.randn(6, 2, 4, 4, dtype=torch.float64), torch.randint(0, 5, (6,))
        x = x.to(memory_format=torch.channels_last)
        optimizer = condlr_ext.optim.CondLRSGD(model, 0.1, 0.9, tau=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            with condlr_ext.backend(name):
                loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
        finals.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*finals, rtol=1e-10, atol=1e-10)


@pytest.mark.skipif(not devices.INTERPRETED, reason="kept launches pass what watches the kernels by")
def test_which_implementation_runs(monkeypatch):
    """The kernels where they are named; compiled code and the backward, too."""
    ran = []
    for name in ("chain", "sums"):
        kernel = getattr(layers.low_rank, name)

        class Watched:
            fn = kernel.fn

            def __getitem__(self, grid, kernel=kernel, name=name):
                ran.append(name)
                return kernel[grid]

        monkeypatch.setattr(layers.low_rank, name, Watched())
    X, U, S, V, b, _ = (t.requires_grad_() for t in tensors(3, 6, 5, 2))
    with condlr_ext.backend("triton"):
        Y = functional.low_rank_linear(X, U, S, V, b)
    assert ran == ["chain"]
    Y.sum().backward()
    assert ran == ["chain", "chain", "sums"]
    ran.clear()
    functional.low_rank_linear(X, U, S, V, b, route="factorized").sum().backward()
    assert ran == []
    torch._dynamo.reset()
    with condlr_ext.backend("triton"):
        compiled = torch.compile(
            lambda x: functional.low_rank_linear(x, U, S, V, b), fullgraph=True, backend="aot_eager"
        )
        compiled(X).sum().backward()
    assert ran == ["chain", "chain", "sums"]


def test_autocast():
    layer = condlr_ext.LowRankLinear(9, 7, rank=3)
    x = torch.randn(4, 9)
    with torch.autocast("cpu", dtype=torch.float16), condlr_ext.backend("triton"):
        y = layer(x)
        y.float().sum().backward()
    assert y.dtype == torch.float16 and layer.U.grad.dtype == torch.float32
    true = F.linear(x.double(), layer.weight.double(), layer.bias.double()).detach()
    assert error(y, true) < 5e-3 * true.norm()


@pytest.fixture
def tf32_products():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("rows,n,m,r", [(33, 63, 100, 17), (5, 300, 20, 20), (70, 130, 140, 100)])
def test_tf32_operands_are_rounded(rows, n, m, r, tf32_products):
    X, U, S, V, b, G = low = tensors(rows, n, m, r, torch.float32)
    Y, P = layers.low_rank_linear(X, U, S, V, b)
    got = Y, P, *layers.low_rank_linear_backward(G, X, P, U, S, V, ALL)
    for ours, expected in zip(got, tf32.layer(*low), strict=True):
        assert tf32.distance(ours, expected) <= tf32.TOLERANCE


@pytest.mark.ptx
def test_rounding_to_tf32():
    """All exponents, halfway cases, both zeros; Inf and every NaN remain. Only the interpreter drops bits here."""
    mantissas = torch.tensor([0, 1, 0xFFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x7FF000, 0x7FFFFF])
    x = (torch.arange(256)[:, None] << 23) + mantissas
    x = torch.cat([x, x - (1 << 31)]).flatten().to(torch.int32).view(torch.float32)
    out = torch.empty_like(x)
    round_to_tf32[(1,)](x, out, len(x), triton.next_power_of_2(len(x)))
    numbers = ~x.isnan()
    assert torch.equal(out[numbers].view(torch.int32) & -0x2000, tf32.rounded(x[numbers]).view(torch.int32))
    assert torch.equal(out[~numbers].view(torch.int32), x[~numbers].view(torch.int32))


def test_products_round_as_torch_is_set():
    before = torch.get_float32_matmul_precision()
    try:
        for setting, rounding in (("highest", "ieee"), ("high", "tf32")):
            torch.set_float32_matmul_precision(setting)
            assert layers.precision(torch.float32) == rounding
            assert layers.precision(torch.float16) == layers.precision(torch.float64) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)


def test_what_the_kernels_refuse():
    x, U, S, V, b, _ = tensors(2, 300, 300, 257)
    image = torch.randn(1, 3, 4, 4)
    with condlr_ext.backend("triton"):
        with pytest.raises(BackendError, match="rank 257 exceeds 256"):
            functional.low_rank_linear(x, U, S, V, b)
        if devices.INTERPRETED:
            with pytest.raises(BackendError, match="bfloat16 wrongly"):
                functional.low_rank_linear(*tensors(2, 4, 4, 2, torch.bfloat16)[:5])
        for groups, text in ((1, "not in channels_last"), (3, "groups = 3, only 1 is served")):
            _, U, S, V, b, _ = (t.float() for t in tensors(1, 3 // groups, 3, 1))
            with pytest.raises(BackendError, match=text):
                functional.low_rank_conv2d(image, U, S, V, b, groups=groups, kernel_size=1)
        with pytest.raises(BackendError, match="under torch.func"):
            args = tensors(2, 4, 4, 2)[:5]
            torch.func.grad(lambda x: functional.low_rank_linear(x, *args[1:]).sum())(args[0])


def test_auto_leaves_cpu_tensors_to_the_cpu():
    X, U, S, V, b, _ = tensors(3, 6, 5, 2)
    assert ops.layers.low_rank_linear.choose(X, U, S, V, b) == "cpu"


def test_the_fastest_configuration_is_kept(monkeypatch):
    """By a fake clock: each kind of size is tried once, and none where trying is forbidden."""
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(tuning.triton.testing, "do_bench", lambda launch, **_: launch())
    torch.use_deterministic_algorithms(False)
    capturing = [False]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    tried, gpu = [], torch.device("cuda")

    def launch(config):
        tried.append(config)
        if config == "too large":
            raise tuning.OutOfResources(2, 1, "shared memory")
        return {"slow": 3.0, "fast": 1.0}[config]

    candidates = ["slow", "fast", "too large"]
    assert tuning.fastest(gpu, ("k",), (100, 7), candidates, launch) == "fast" and tried == candidates
    assert (
        tuning.fastest(gpu, ("k",), (65, 8), candidates, launch) == "fast" and len(tried) == 3
    )  # the same powers of two
    capturing[0] = True
    assert tuning.fastest(gpu, ("k",), (100, 9), candidates, launch) == "slow"
    assert tuning.fastest(gpu, ("k",), (100, 7), candidates, launch) == "fast" and len(tried) == 3
    capturing[0] = False
    torch.use_deterministic_algorithms(True)
    assert tuning.fastest(gpu, ("k",), (100, 7), candidates, launch) == "slow"  # whatever was found before
    assert tuning.fastest(gpu, ("k",), (100, 9), candidates, launch) == "slow" and len(tried) == 3
    torch.use_deterministic_algorithms(False)
    assert tuning.fastest(gpu, ("k",), (100, 9), candidates, launch) == "fast" and len(tried) == 6
    assert tuning.fastest(gpu, ("k",), (1, 1), candidates[:1], launch) == "slow" and len(tried) == 6
