"""Registration: opcheck of every op, torch.compile without graph breaks, which implementation served a call."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.inductor import LINKS
from helpers.op_arguments import arguments, layer_tensors, one_of_each, step_arguments
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import condlr_ext
from condlr_ext import functional, linalg, ops
from condlr_ext.errors import BackendError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("prefix", ["", "_reference_"])
@pytest.mark.parametrize("name", ops.OPS)
def test_opcheck(name, prefix):
    for args in arguments(name):
        opcheck(getattr(torch.ops.condlr_ext, prefix + name).default, args)


def test_every_op_is_tagged_and_has_a_reference_twin():
    for name in ops.OPS:
        by_triton = [f"_triton_{name}"] if ops.OPS[name].has_triton else []
        for full in (name, f"_reference_{name}", *by_triton):
            op = getattr(torch.ops.condlr_ext, full).default
            assert torch.Tag.pt2_compliant_tag in op.tags


class Calls(TorchDispatchMode):
    """Names of the package's ops that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "condlr_ext":
            self.names.append(func._schema.name.split("::")[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["auto", "cpu", "reference"])
def test_which_op_is_called(name):
    with condlr_ext.backend(name), Calls() as calls:
        one_of_each()
    layers = {"low_rank_linear", "low_rank_linear_backward", "low_rank_conv", "low_rank_conv_backward"}
    others = {f"_reference_{op}" if name == "reference" else op for op in ops.OPS.keys() - layers}
    compiled = {"low_rank_linear", "low_rank_linear_backward"}  # of the other layers torch's own products serve
    assert set(calls.names) == others | (set() if name == "reference" or ops.COMPILED.ops_reason else compiled)


_SERVED = """
import sys, torch, condlr_ext
from condlr_ext import reference
sys.path.insert(0, {tests!r})
from helpers.op_arguments import COMPILED, one_of_each
assert condlr_ext.ops.COMPILED.ops_path, condlr_ext.ops.COMPILED.ops_reason
for op in COMPILED:
    assert torch._C._dispatch_has_kernel_for_dispatch_key("condlr_ext::" + op, "CPU"), op
served = []
def watch(name):
    fn = getattr(reference, name)
    def wrapped(*args, **kwargs):
        served.append(name)
        return fn(*args, **kwargs)
    return wrapped
for name in ("svd", "qr", "layer_step", "clip_spectrum"):
    setattr(reference, name, watch(name))
for backend, by_reference in (("auto", False), ("cpu", False), ("reference", True)):
    served.clear()
    with condlr_ext.backend(backend):
        one_of_each()
    # layer_step and clip_spectrum are looked up at call time, so their trace shows whether the reference arithmetic ran
    assert ("layer_step" in served, "clip_spectrum" in served) == (by_reference, by_reference), (backend, served)
print(condlr_ext.ops.COMPILED.ops_path)
"""


@pytest.mark.skipif(os.environ.get("CONDLR_EXT_BUILD") == "none", reason="built without compiled parts")
@pytest.mark.parametrize("where", ["root", "elsewhere"])
def test_which_implementation_serves(where, tmp_path):
    """Asked in a process started in the repository root and in one started elsewhere."""
    cwd = ROOT if where == "root" else tmp_path
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CONDLR_EXT_BACKEND")}
    code = _SERVED.format(tests=str(Path(__file__).parents[1]))
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).name.startswith("_C.")


@pytest.mark.skipif(os.environ.get("CONDLR_EXT_BUILD") == "none", reason="built without compiled parts")
def test_linear_layers_are_compiled_where_that_is_faster(monkeypatch):
    small, wide = (60, 50, 5), (600, 500, 250)  # m, n, rank
    for size, rows, dtype, amd, threads, compiled in (
        (small, 16, torch.float32, True, 1, True),
        (small, 16, torch.bfloat16, True, 1, False),
        (small, 2, torch.float64, True, 1, False),
        (small, 40000, torch.float64, True, 2, True),
        (small, 40000, torch.float64, True, 3, False),
        (small, 40000, torch.float32, False, 1, False),
        (wide, 16, torch.float32, True, 1, True),
        (wide, 16, torch.float32, True, 2, False),
        (wide, 32, torch.float32, True, 2, True),
    ):
        monkeypatch.setattr(ops.layers, "_ON_AMD", amd)
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        m, n, r = size
        U, S, V, b = (t.to(dtype).requires_grad_() for t in layer_tensors(m=m, n=n, r=r))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            functional.low_rank_linear(
                torch.randn(rows, n, dtype=dtype), U, S, V, b, route="factorized"
            ).sum().backward()
        names = {e.name for e in profile.events() if e.name.startswith("condlr_ext::")}
        expected = {"condlr_ext::low_rank_linear", "condlr_ext::low_rank_linear_backward"} if compiled else set()
        assert names == expected, (size, rows, dtype, amd, threads)


_EVERY_ISA = """
import torch
from condlr_ext import _native, ops
forward, backward = ops.layers.low_rank_linear, ops.layers.low_rank_linear_backward
torch.manual_seed(0)

def run(way, X, U, S, V, b, G, P):
    gradients = getattr(backward, way)(G, X, P, U, S, V, [True] * 5)
    return *getattr(forward, way)(X, U, S, V, b), *gradients

for rows, m, n, r in ((1, 1, 1, 1), (3, 33, 17, 5), (70, 20, 45, 20), (0, 6, 5, 2), (40, 100, 7, 3)):
    for dtype in (torch.float32, torch.float64):
        shapes = ((rows, n), (m, r), (r, r), (n, r), (m,), (rows, m), (rows, r))
        low = [torch.randn(shape, dtype=dtype) for shape in shapes]
        exact = [t.double() for t in low]
        # the rounding error of sums of products, each factor by its modulus: twice, as the "exact" values have theirs
        bounds = run("reference", *(t.abs() for t in exact))
        unit = 2 * (rows + m + n + 2 * r + 1) * torch.finfo(dtype).eps
        for got, true, bound in zip(run("dispatched", *low), run("reference", *exact), bounds):
            assert got.shape == true.shape and ((got - true).abs() <= unit * bound).all(), (rows, m, n, r, dtype)
print(_native.isa())
"""


@pytest.mark.skipif(condlr_ext.ops.COMPILED.host is None, reason="built without compiled parts")
def test_linear_kernel_on_every_instruction_set():
    for isa in condlr_ext.ops.COMPILED.host.isa_levels():
        done = subprocess.run(
            [sys.executable, "-c", _EVERY_ISA],
            cwd=ROOT,
            env=os.environ | {"CONDLR_EXT_ISA": isa},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == isa


def test_vmap_keeps_the_backend():
    A = torch.randn(3, 4, 4)
    for name, prefix in (("reference", "_reference_"), ("cpu", "")):
        with condlr_ext.backend(name), Calls() as calls:
            torch.vmap(lambda A: linalg.svd(A).sigma)(A)
            torch.vmap(torch.func.grad(lambda A: linalg.polar(A).Q.sum()))(A)
        assert set(calls.names) == {prefix + "svd", prefix + "polar"}


def test_direct_calls_are_checked():
    raw = torch.ops.condlr_ext
    params, grads, buffers, hyper, skipped = step_arguments()
    for call, text in (
        (
            lambda op: op("low_rank_linear")(
                torch.ones(2, 3), torch.ones(4, 2), torch.ones(2, 2), torch.ones(5, 2), None
            ),
            "must be|cannot be multiplied",
        ),
        (
            lambda op: op("low_rank_linear")(
                torch.ones(2, 5), torch.ones(4, 2), torch.ones(3, 3), torch.ones(5, 2), None
            ),
            "must be|cannot be multiplied",
        ),
        (
            lambda op: op("low_rank_linear")(
                torch.ones(2, 5), torch.ones(4, 2), torch.ones(2, 2), torch.ones(5, 2), torch.ones(3)
            ),
            "must have|must match",
        ),
        (lambda op: op("svd")(torch.ones(3)), "A must be a matrix"),
        (lambda op: op("polar")(torch.ones(3, 3, dtype=torch.complex64)), "real floating point|float32 or float64"),
        (lambda op: op("clip_spectrum")(torch.eye(3), -1.0, 0, 1.0), "tau must be >= 0"),
        (lambda op: op("clip_spectrum")(torch.eye(3), 0.1, -1, 1.0), "band must be 0"),
        (lambda op: op("clip_spectrum")(torch.eye(3), 0.1, 0, -1.0), "sigma_max must be > 0"),
        (lambda op: op("step")(params, grads, buffers, hyper.float(), skipped), "hyper must be"),
        (lambda op: op("step")(params, grads, buffers, hyper, skipped[:1]), "skipped must be"),
        (lambda op: op("step")(params, [grads[0][:2], *grads[1:]], buffers, hyper, skipped), "layer 0: grad"),
        (lambda op: op("step")(params, grads, [*buffers[:5], buffers[4], *buffers[6:]], hyper, skipped), "layer 1: "),
    ):
        before = [p.clone() for p in params]
        for prefix in ("", "_reference_"):
            with pytest.raises(RuntimeError, match=text):
                call(lambda name, prefix=prefix: getattr(raw, prefix + name))
        assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


def test_backends_agree():
    with condlr_ext.backend("reference"):
        expected = one_of_each()
    with condlr_ext.backend("cpu"):
        got = one_of_each()
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6)


def test_named_backends_are_strict():
    with (
        condlr_ext.backend("triton"),
        pytest.raises(BackendError, match="'triton' cannot serve svd: a tensor is on cpu"),
    ):
        linalg.svd(torch.eye(3))
    big = torch.eye(513)
    with condlr_ext.backend("cpu"), pytest.raises(BackendError, match=r"min\(m, n\) = 513 exceeds 512"):
        linalg.svd(big)
    assert ops.linalg.svd.choose(big) == "reference"


def test_auto_leaves_to_lapack_what_lapack_does_faster():
    """Sizes on both sides of the measured crossings; a named backend is not affected."""
    for op in (ops.linalg.svd, ops.linalg.polar):
        assert op.choose(torch.eye(512)) == "cpu"
        assert op.choose(torch.eye(200).double()) == "cpu" and op.choose(torch.eye(201).double()) == "reference"
        assert op.choose(torch.ones(4608, 64)) == "cpu" and op.choose(torch.ones(4608, 103)) == "reference"
    assert ops.linalg.clip_spectrum.choose(torch.eye(512).double(), 0.1, 0, 1.0) == "cpu"
    qr = ops.linalg.qr
    assert qr.choose(torch.ones(4608, 103)) == "cpu" and qr.choose(torch.ones(4608, 256)) == "reference"
    assert qr.choose(torch.eye(201).double()) == "reference" and qr.choose(torch.ones(402, 201).double()) == "cpu"
    assert qr.choose(torch.ones(2, 4608, 256)) == "cpu"
    with condlr_ext.backend("cpu"):
        assert ops.linalg.svd.choose(torch.eye(201).double()) == "cpu"


def test_backend_names_and_nesting():
    with pytest.raises(ValueError, match="must be one of auto, reference, cpu, triton, got 'gpu'"):
        condlr_ext.backend("gpu")
    before = ops.current_backend()
    with condlr_ext.backend("reference"):
        with pytest.raises(RuntimeError), condlr_ext.backend("cpu"):
            assert ops.current_backend() == "cpu"
            raise RuntimeError
        assert ops.current_backend() == "reference"
    assert ops.current_backend() == before
    twice = condlr_ext.backend("cpu")
    for _ in range(2):
        assert ops.current_backend() == before  # nothing happens until the block
        with twice, twice:
            assert ops.current_backend() == "cpu"


def test_environment_variable():
    code = "import torch, condlr_ext; print(condlr_ext.ops.linalg.svd.choose(torch.eye(2)))"
    for value, expected in (("reference", "reference"), ("nonsense", None)):
        env = os.environ | {"CONDLR_EXT_BACKEND": value}
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
        if expected:
            assert done.stdout.strip() == expected
        else:
            assert (
                done.returncode
                and "CONDLR_EXT_BACKEND must be one of auto" in done.stderr
                and "'nonsense'" in done.stderr
            )


def test_backward_keeps_the_backend_of_forward():
    layer = condlr_ext.LowRankLinear(5, 4, rank=2)
    x = torch.randn(32, 5)
    with condlr_ext.backend("reference"):
        by_products = layer(x).sum()
    by_kernels = layer(x).sum()
    for name, loss, expected in (("cpu", by_products, []), ("reference", by_kernels, ["low_rank_linear_backward"])):
        with condlr_ext.backend(name), Calls() as calls:
            loss.backward()
        assert calls.names == ([] if ops.COMPILED.ops_reason else expected)


FUNCTIONS = {
    "linear": lambda x: functional.low_rank_linear(x, *TENSORS, route="factorized"),
    "merged linear": lambda x: functional.low_rank_linear(x, *TENSORS, route="merged"),
    "conv": lambda x: functional.low_rank_conv1d(x[:, None], *TENSORS, kernel_size=5, route="factorized"),
    "merged conv": lambda x: functional.low_rank_conv1d(x[:, None], *TENSORS, kernel_size=5, route="merged"),
    "svd": lambda x: linalg.svd(x).sigma,
    "qr": lambda x: linalg.qr(x).Q,
    "polar": lambda x: linalg.polar(x).Q,
    "clip": lambda x: linalg.clip_spectrum(x, 0.1),
    "cond": lambda x: linalg.cond(x),
}
TENSORS = [t.requires_grad_() for t in layer_tensors()]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_compile_fullgraph(name):
    torch._dynamo.reset()
    fn = FUNCTIONS[name]
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    x = torch.randn(7, 5)
    results = []
    for f in (fn, compiled):
        x = x.detach().requires_grad_()
        y = f(x)
        y.pow(2).sum().backward()
        results.append((y.detach(), x.grad))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("route", ["factorized", "merged"])
def test_compiled_torch_func(route):
    """Transforms inside compiled code reach plain products too."""
    torch._dynamo.reset()
    U, S, V, b = (t.detach() for t in TENSORS)

    def loss(x, S):
        return functional.low_rank_linear(x, U, S, V, b, route=route).pow(2).sum()

    def per_sample(x, S):
        return torch.vmap(torch.func.grad(loss, argnums=1), (0, None))(x, S)

    x, S = torch.randn(7, 5), torch.randn(3, 3)
    compiled = torch.compile(per_sample, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, S), per_sample(x, S))


def test_symbolic_sizes():
    """The cost model also takes sizes that are symbols, in compiled code and in other traces."""
    torch._dynamo.reset()
    tensors = [t.detach() for t in layer_tensors(m=4, n=3)]

    def forward(x, *tensors):
        image = functional.low_rank_conv1d(x, *tensors, kernel_size=3)
        return functional.low_rank_linear(image.mT[..., :3], *tensors)

    compiled = torch.compile(forward, fullgraph=True, dynamic=True, backend="aot_eager")
    traced = torch.fx.experimental.proxy_tensor.make_fx(forward, tracing_mode="symbolic")(
        torch.randn(7, 1, 9), *tensors
    )
    for rows in (7, 11):
        x = torch.randn(rows, 1, 9)
        torch.testing.assert_close(compiled(x, *tensors), forward(x, *tensors))
        torch.testing.assert_close(traced(x, *tensors), forward(x, *tensors))


def make_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        condlr_ext.LowRankConv2d(1, 4, 3, padding="same", rank=3),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        condlr_ext.LowRankLinear(4 * 16, 5, rank=3),
    )


@pytest.mark.parametrize("engine", ["aot_eager", pytest.param("inductor", marks=LINKS)])
def test_compiled_training_does_not_recompile(engine):
    """A model's forward and backward without graph breaks, the same losses as eager, one compilation for all steps."""
    torch._dynamo.reset()
    x, y = torch.randn(8, 1, 4, 4), torch.randint(0, 5, (8,))
    losses = []
    for compile_it in (False, True):
        model = make_model()
        optimizer = condlr_ext.optim.CondLRSGD(model, 0.1, 0.3, tau=0.1)
        forward = torch.compile(model, fullgraph=True, backend=engine) if compile_it else model
        run = []
        with torch._dynamo.config.patch(error_on_recompile=compile_it):
            for _ in range(4):
                optimizer.zero_grad()
                loss = torch.nn.functional.cross_entropy(forward(x), y)
                loss.backward()
                optimizer.step()
                run.append(loss.item())
        losses.append(run)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_compiled_code_follows_the_backend():
    """The choice is made at call time: a guard sees it change."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: functional.low_rank_linear(x, *TENSORS), fullgraph=True, backend="aot_eager")
    x = torch.randn(40, 5)
    seen = []
    for name in ("auto", "reference", "auto"):
        # a dispatch mode would keep torch.compile from running: the profiler sees the names
        with condlr_ext.backend(name):
            compiled(x)  # compiles where it has to
            with torch.autograd.profiler.profile() as profile:
                compiled(x)
        seen.append([e.name.split("::")[1] for e in profile.function_events if e.name.startswith("condlr_ext::")])
    kernels = [] if ops.COMPILED.ops_reason else ["low_rank_linear"]
    assert seen == [kernels, [], kernels]
