"""Launch configurations of the Triton kernels of a linear layer: the default against the others."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from ..registry import OURS, SAME, Operation, Provider, TimedCall
from .layers import LayerProblem, Linear, dtypes

RESULTS = {"chain": ["Y"], "sums": ["dU", "dS", "dV", "db"]}  # by kernel; "sums" with the "combine" after it


@dataclass(frozen=True)
class KernelShape:
    kernel: str
    layer: Linear

    def __str__(self) -> str:
        return f"{self.kernel} {self.layer}"


class ConfigurationProblem:
    """One kernel with each of its configurations; "ours" is the default."""

    def __init__(self, shape: KernelShape, dtype: str, device):
        import triton

        from condlr_ext.kernels.triton import devices
        from condlr_ext.kernels.triton.linear import configs, launch, tuning

        self._problem, self._kernel = LayerProblem(shape.layer, dtype, device), shape.kernel
        forward = shape.kernel == "chain"
        self.work = {"call": self._problem.work["forward" if forward else "backward"]}
        (x, U, S, V, bias), G = (t.detach() for t in self._problem.factors.tensors.values()), self._problem.factors.G
        P, mask = x @ V, [False, True, True, True, True]

        def compute() -> tuple:
            if forward:
                return launch.low_rank_linear(x, U, S, V, bias)[:1]
            return launch.low_rank_linear_backward(G, x, P, U, S, V, mask)[1:]

        rank, rounding = triton.next_power_of_2(max(shape.layer.r, 16)), launch.precision(G.dtype)
        default, *others = configs.of(shape.kernel, devices.architecture(G.device), G.dtype, rank, rounding)

        def run(config: triton.Config) -> tuple:
            with tuning.impose(shape.kernel, config):
                return compute()

        self.providers = {"ours": partial(self._provider, partial(run, default), OURS)}
        self.providers |= {str(config): partial(self._provider, partial(run, config), SAME) for config in others}

    def _provider(self, run: Callable, role: str) -> Provider:
        call = TimedCall(run, partial(self._problem.factors.errors, RESULTS[self._kernel]))
        return Provider({"call": call}, self._problem.limits, role)


def shapes(size: str, device) -> list[KernelShape]:
    if device.kind != "cuda":
        return []
    layers = [Linear(rows, 4096, 4096, r) for r in (64, 128, 256, 16) for rows in (8192, 512)]
    return [KernelShape(name, x) for x in ([Linear(33, 17, 20, 3)] if size == "smoke" else layers) for name in RESULTS]


OPERATIONS = (
    Operation(
        "configurations", "launch configurations of the Triton kernels of linear layers, on a GPU",
        ConfigurationProblem, shapes, dtypes=dtypes, supported=("bf16", "fp16", "fp32", "tf32"), share=4.0,
        by_default=False,
    ),
)  # fmt: skip
