"""One low-rank layer, linear or convolution, forward and backward, in every way to compute it.

A provider is right in a mode if no result has more than twice the error of the worst result of the three products in
eager PyTorch, against float64.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from condlr_ext import autograd, backend, functional, ops

from ..machine import DTYPES
from ..registry import DENSE, OURS, SAME, Operation, Provider, Row, TimedCall, Work
from .baselines import plain_conv2d, plain_linear

MODES = ("forward", "backward", "both")  # backward: after a forward that is not timed
BOUNDS = {  # of limits: least, of a few roundings of the result; largest, whatever the error of eager
    "bf16": (4e-3, 3e-2), "fp16": (5e-4, 5e-3), "tf32": (1e-6, 3e-3), "fp32": (1e-6, 1e-4), "fp64": (1e-13, 1e-12)
}  # fmt: skip
FRACTIONS = (0.2, 0.5)  # rank over min(m, n)

# C_in, C_out, pixels a side, kernel, stride, padding; each network's first layer first
CONVS = {
    "VGG16": [
        (3, 64, 32, 3, 1, 1), (64, 64, 32, 3, 1, 1), (64, 128, 16, 3, 1, 1), (128, 128, 16, 3, 1, 1),
        (128, 256, 8, 3, 1, 1), (256, 256, 8, 3, 1, 1), (256, 512, 4, 3, 1, 1), (512, 512, 4, 3, 1, 1),
        (512, 512, 2, 3, 1, 1),
    ],
    "WRN16-4": [
        (3, 16, 32, 3, 1, 1), (16, 64, 32, 3, 1, 1), (16, 64, 32, 1, 1, 0), (64, 64, 32, 3, 1, 1),
        (64, 128, 32, 3, 2, 1), (64, 128, 32, 1, 2, 0), (128, 128, 16, 3, 1, 1), (128, 256, 16, 3, 2, 1),
        (128, 256, 16, 1, 2, 0), (256, 256, 8, 3, 1, 1),
    ],
    "LeNet5": [(1, 20, 28, 5, 1, 0), (20, 50, 12, 5, 1, 0)],
}  # fmt: skip
RESNET = [  # of ResNet-50 on 224 x 224
    (64, 64, 56, 1, 1, 0), (64, 64, 56, 3, 1, 1), (64, 256, 56, 1, 1, 0), (256, 64, 56, 1, 1, 0),
    (128, 128, 28, 3, 1, 1), (512, 128, 28, 1, 1, 0), (256, 256, 14, 3, 1, 1), (256, 1024, 14, 1, 1, 0),
    (512, 512, 7, 3, 1, 1), (2048, 512, 7, 1, 1, 0),
]  # fmt: skip
LINEARS = {  # n, m, rows for one sample
    "VGG16": [(512, 512, 1)],
    "LeNet5": [(800, 500, 1)],
    "MLP": [(64, 256, 1), (256, 256, 1), (784, 1024, 1)],
    "transformer": [(384, 384, 64), (384, 1536, 64), (1536, 384, 64)],
}


@dataclass(frozen=True)
class Linear:
    rows: int
    n: int
    m: int
    r: int

    def __str__(self) -> str:
        return f"{self.rows} x {self.n} -> {self.m}, r {self.r}"

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self.rows, self.n

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return self.m, self.n

    def ours(self, *tensors: Tensor, route: str = "auto") -> Tensor:
        return functional.low_rank_linear(*tensors, route=route)

    def three_products(self, x, U, S, V, bias) -> Tensor:
        return F.linear((x @ V) @ S.mT, U, bias)

    def folded(self, *tensors: Tensor) -> Tensor:
        return plain_linear(*tensors)

    def dense(self, *tensors: Tensor) -> Tensor:
        return F.linear(*tensors)

    def plan(self, *tensors: Tensor) -> ops.cost_model_cpu.Plan:
        return ops.cost_model_cpu.linear(*tensors)

    def explain(self, *tensors: Tensor) -> tuple[str, str]:
        """Return the backend that serves the factorized forward by default, and why."""
        return ops.layers.low_rank_linear.explain(*tensors)


@dataclass(frozen=True)
class Conv:
    """Images of side x side in channels_last, m filters of kernel x kernel."""

    batch: int
    channels: int
    m: int
    side: int
    kernel: int
    stride: int
    padding: int
    r: int

    def __str__(self) -> str:
        geometry = f"{self.kernel}x{self.kernel}/{self.stride} @{self.side}"
        return f"{self.batch} x {self.channels} -> {self.m} {geometry}, r {self.r}"

    @property
    def n(self) -> int:
        return self.channels * self.kernel**2

    @property
    def output_side(self) -> int:
        return (self.side + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def rows(self) -> int:
        return self.batch * self.output_side**2

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self.batch, self.channels, self.side, self.side

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return self.m, self.channels, self.kernel, self.kernel

    def ours(self, *tensors: Tensor, route: str = "auto") -> Tensor:
        stride, padding = self.stride, self.padding
        return functional.low_rank_conv2d(*tensors, stride, padding, kernel_size=self.kernel, route=route)

    def three_products(self, x, U, S, V, bias) -> Tensor:
        filters = V.mT.reshape(-1, *self.weight_shape[1:])
        P = F.conv2d(x, filters, None, self.stride, self.padding)
        return F.conv2d(F.conv2d(P, S[:, :, None, None]), U[:, :, None, None], bias)

    def folded(self, *tensors: Tensor) -> Tensor:
        return plain_conv2d(*tensors, self.weight_shape[2:], self.stride, self.padding)

    def dense(self, *tensors: Tensor) -> Tensor:
        return F.conv2d(*tensors, self.stride, self.padding)

    def plan(self, *tensors: Tensor) -> ops.cost_model_cpu.Plan:
        return ops.cost_model_cpu.conv(*tensors, *self._geometry)

    def explain(self, *tensors: Tensor) -> tuple[str, str]:
        """Return the backend that serves the factorized forward by default, and why."""
        return ops.layers.low_rank_conv.explain(*tensors, *self._geometry)

    @property
    def _geometry(self) -> tuple:
        return [self.kernel] * 2, [self.stride] * 2, [self.padding] * 2, [1, 1], 1


def work(shape: Linear | Conv, itemsize: int, input_gradient: bool = True) -> dict[str, list[Work]]:
    """Return the work of the factorized layer by mode.

    Every input is read once and every result written once; the products are those of the cheaper route (usually the
    thin ones), with the core on the smallest side. Padding counts as pixels.
    """
    rows, n, m, r, passes = shape.rows, shape.n, shape.m, shape.r, 1 + input_gradient
    x, y, core = math.prod(shape.input_shape), rows * m, min(rows, n, m) * r * r
    form = m * n * r + min(m, n) * r * r
    forward = min(rows * r * (m + n) + core, rows * m * n + form)
    backward = min(rows * r * (2 * m + passes * n) + 2 * core, passes * rows * m * n + 2 * form)
    return by_mode(
        Work(2 * forward, itemsize * (x + y + (m + n + r) * r + m)),
        Work(2 * backward, itemsize * (passes * (x + n * r) + y + 2 * (m + r) * r + m)),
    )


def dense_work(shape: Linear | Conv, itemsize: int, input_gradient: bool = True) -> dict[str, list[Work]]:
    """Return the work of the dense layer by mode."""
    rows, n, m, passes = shape.rows, shape.n, shape.m, 1 + input_gradient
    x, y = math.prod(shape.input_shape), rows * m
    return by_mode(
        Work(2 * rows * m * n, itemsize * (x + y + m * n + m)),
        Work(2 * passes * rows * m * n, itemsize * (passes * (x + m * n) + y + m)),
    )


def by_mode(forward: Work, backward: Work) -> dict[str, list[Work]]:
    return {"forward": [forward], "backward": [backward], "both": [forward, backward]}


class Form:
    """The tensors of a layer, by its factors or dense, and its exact results.

    Results are "Y", and "d" and the name of each tensor that requires a gradient, for the gradient G of Y.

    Args:
        function: Of the tensors in the order of their names; in float64 it gives the exact results.
        tensors: By name.
        G: Gradient of Y.
    """

    def __init__(self, function: Callable[..., Tensor], tensors: dict[str, Tensor], G: Tensor):
        self._function, self.tensors, self.G = function, tensors, G
        self._gradients = [f"d{name}" for name, t in tensors.items() if t.requires_grad]

    def calls(self, function: Callable[..., Tensor]) -> dict[str, TimedCall]:
        """Return the calls of a function of the tensors, by mode."""
        tensors = list(self.tensors.values())
        leaves = [t for t in tensors if t.requires_grad]
        kept = []

        def forward() -> tuple[Tensor, ...]:
            return (function(*tensors),)

        def keep() -> None:
            kept[:] = forward()

        def backward() -> tuple[Tensor, ...]:
            return torch.autograd.grad(kept.pop(), leaves, self.G)

        def both() -> tuple[Tensor, ...]:
            (Y,) = forward()
            return Y, *torch.autograd.grad(Y, leaves, self.G)

        names = ["Y", *self._gradients]
        return {
            "forward": TimedCall(forward, partial(self.errors, names[:1])),
            "backward": TimedCall(backward, partial(self.errors, names[1:]), prepare=keep),
            "both": TimedCall(both, partial(self.errors, names)),
        }

    @cached_property
    def exact(self) -> dict[str, Tensor]:
        double = {name: t.detach().double().requires_grad_(t.requires_grad) for name, t in self.tensors.items()}
        both = Form(self._function, double, self.G.double()).calls(self._function)["both"]
        searching, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False  # it would take seconds
        try:
            results = both.run()
        finally:
            torch.backends.cudnn.benchmark = searching
        return {name: t.detach() for name, t in zip(["Y", *self._gradients], results, strict=True)}

    def errors(self, names: list[str], results: tuple[Tensor, ...]) -> dict[str, float]:
        """Return relative Frobenius errors."""
        found = {}
        for name, result in zip(names, results, strict=True):
            truth = self.exact[name]
            found[name] = ((result.detach().double() - truth).norm() / truth.norm()).item()
        return found


class LayerProblem:
    """A layer on normal random numbers.

    Input, gradient and bias have variance 1, U and V are about orthonormal, S is about the identity, and the dense
    weight is their product. The first layer of a network needs no input_gradient.
    """

    def __init__(self, shape: Linear | Conv, dtype: str, device, input_gradient: bool = True):
        if dtype == "tf32" and device.kind != "cuda":
            raise ValueError(f"tf32 is an arithmetic of CUDA devices, the device is {device.name}")
        self._shape, self._dtype = shape, dtype
        m, n, r = shape.m, shape.n, shape.r
        with torch.device(device.device):
            x, G = torch.randn(shape.input_shape), torch.randn(shape.rows, m)
            U, V, bias = torch.randn(m, r) / m**0.5, torch.randn(n, r) / n**0.5, torch.randn(m)
            S = torch.eye(r) + 0.1 * torch.randn(r, r) / r**0.5
            W = (U @ S @ V.mT).reshape(shape.weight_shape)
        if isinstance(shape, Conv):
            G = G.view(shape.batch, shape.output_side, shape.output_side, m).movedim(-1, 1)  # channels_last
            x, W = (t.contiguous(memory_format=torch.channels_last) for t in (x, W))
        x, U, S, V, bias, W, G = (t.to(DTYPES[dtype]) for t in (x, U, S, V, bias, W, G))
        for t in (U, S, V, bias, W):
            t.requires_grad_()
        x.requires_grad_(input_gradient)
        self.factors = Form(shape.three_products, {"X": x, "U": U, "S": S, "V": V, "b": bias}, G)
        self.weight = Form(shape.dense, {"X": x, "W": W, "b": bias}, G)
        self.work = work(shape, x.itemsize, input_gradient)
        self._dense_work = dense_work(shape, x.itemsize, input_gradient)

        routes = {route: partial(shape.ours, route=route) for route in ("factorized", "merged")}
        kernels = {"cpu": "cpu", "cuda": "triton"}[device.kind]
        ours = {"ours": shape.ours, f"ours: {kernels}": on(kernels, routes["factorized"])}
        if device.kind == "cuda":  # on CPUs it is what "ours: cpu" is
            ours["ours: factorized"] = routes["factorized"]
        ours |= {"ours: merged": routes["merged"], "reference": on("reference", routes["factorized"])}
        self.providers = {name: partial(self._by_factors, function, OURS) for name, function in ours.items()} | {
            "eager": partial(self._by_factors, shape.three_products, SAME),
            "eager folded": partial(self._by_factors, shape.folded, SAME),
            "compiled": partial(self._by_factors, shape.three_products, SAME, compiled=True),
            "compiled folded": partial(self._by_factors, shape.folded, SAME, compiled=True),
            "dense": partial(self._by_weight, shape.dense),
            "compiled dense": partial(self._by_weight, shape.dense, compiled=True),
        }

    def kernels(self) -> Provider:
        """Return the compiled kernels of a linear layer on a CPU, whether faster or not."""
        return self._by_factors(partial(autograd.LowRankLinearFunction.apply, "cpu"), OURS)

    def _by_factors(self, function: Callable, role: str, compiled: bool = False) -> Provider:
        function = torch.compile(function, dynamic=False) if compiled else function
        return Provider(self.factors.calls(function), self.limits, role)

    def _by_weight(self, function: Callable, compiled: bool = False) -> Provider:
        function = torch.compile(function, dynamic=False) if compiled else function
        return Provider(self.weight.calls(function), self.limits, DENSE, self._dense_work)

    @cached_property
    def limits(self) -> dict[str, float]:
        """Return twice the largest error of the three products in eager PyTorch."""
        eager = self.factors.calls(self._shape.three_products)["both"]
        worst = max(eager.errors(eager.run()).values())
        least, most = BOUNDS[self._dtype]
        return {"": min(max(2 * worst, least), most)}

    def plan(self) -> dict:
        """Return the route and backend of "ours", and the costs that the model expects."""
        tensors = self.factors.tensors.values()
        plan, (backend, why) = self._shape.plan(*tensors), self._shape.explain(*tensors)
        costs = {"factorized": plan.factorized, "merged": plan.merged, "dense": plan.dense}
        found = {"route": plan.route, "gain": plan.gain, "costs": costs, "source": plan.source}
        return found | {"backend": backend, "why": why}


def on(name: str, function: Callable) -> Callable:
    """Return the function on the package's backend of that name."""

    def run(*tensors):
        with backend(name):
            return function(*tensors)

    return run


def plan_record(row: Row, problem) -> dict:
    start = {"kind": "plan", "op": row.operation.name, "row": str(row.shape), "shape": asdict(row.shape)}
    return start | {"dtype": row.dtype, "threads": torch.get_num_threads()} | problem.plan()


def plans(row: Row, device) -> list[dict]:
    return [plan_record(row, LayerProblem(row.shape, row.dtype, device))]


def rank(fraction: float, m: int, n: int) -> int:
    return max(1, math.ceil(fraction * min(m, n) - 1e-9))


def linear_shapes(size: str, device) -> list[Linear]:
    if size == "smoke":
        return [Linear(33, 17, 20, 3)]
    if device.kind == "cuda":
        sizes = ((4096, 4096), (1024, 4096), (4096, 1024), (4096, 11008), (512, 512))
        ranks = (8, 16, 32, 64, 128, 256, 512)
        return [Linear(rows, n, m, r) for rows in (1, 32, 512, 8192) for n, m in sizes for r in ranks]
    batches = (1, 8, 32, 128) if size == "full" else (1, 32)
    sizes = [layer for layers in LINEARS.values() for layer in layers] + [(4096, 4096, 16)] * (size == "full")
    return [Linear(b * rows, n, m, rank(f, m, n)) for n, m, rows in sizes for b in batches for f in FRACTIONS]


def conv_shapes(size: str, device) -> list[Conv]:
    """Return the networks' layers but the first, which have no input gradient; on CPUs by default every other one."""
    if size == "smoke":
        return [Conv(2, 4, 6, 5, 3, 2, 1, 3)]
    vgg, wrn = (CONVS[name][1:] for name in ("VGG16", "WRN16-4"))
    if device.kind == "cuda":
        layers = [(128, *layer) for layer in vgg] + [(64, *layer) for layer in RESNET]
    else:
        step, batches = (1, (1, 32, 128)) if size == "full" else (2, (32,))
        layers = [(b, *layer) for layer in dict.fromkeys(vgg[::step] + wrn[::step]) for b in batches]
    return [Conv(*layer, rank(f, layer[2], layer[1] * layer[4] ** 2)) for layer in layers for f in FRACTIONS]


def dtypes(device) -> tuple[str, ...]:
    return ("bf16", "fp32") if device.kind == "cuda" else ("fp32",)


HEADLINES = (
    *(Linear(8192, 4096, 4096, r) for r in (64, 128, 256)),
    Linear(2048, 384, 1536, 77),
    *(Conv(batch, 64, 64, 32, 3, 1, 1, 13) for batch in (32, 128)),
)
SUPPORTED = ("fp32", "tf32", "bf16", "fp16", "fp64")
OPERATIONS = tuple(
    Operation(name, what, LayerProblem, shapes, MODES, dtypes, SUPPORTED, HEADLINES.__contains__, plans, share)
    for name, what, shapes, share in (
        ("linear", "low-rank linear layers, forward and backward, beside the dense layer", linear_shapes, 8.0),
        ("conv", "low-rank convolutions, forward and backward, beside the dense layer", conv_shapes, 3.0),
    )
)
