"""What a launch costs the host, with a driver that does nothing: `python -m bench.launches [FILE.md]`, on a CPU.

With a Markdown file, the table in it between `<!-- python -m bench.launches -->` and `<!-- end -->` is rewritten.
"""

import itertools
import platform
import sys
import time
from collections.abc import Callable

import torch
import triton

import condlr_ext
from condlr_ext._table import markdown
from condlr_ext.kernels.triton.linear import configs, low_rank
from condlr_ext.kernels.triton.linear import launch as layers
from condlr_ext.kernels.triton.runtime import launching
from condlr_ext.kernels.triton.step import launch as step
from condlr_ext.reference import HYPER

from .idle import driver_of
from .markdown import replace_block

LAYERS = (2, 20, 60)


def microseconds(call: Callable[[], object], samples: int = 40) -> float:
    """Return the lower quartile over samples of 2 ms; others on the machine only lengthen them."""
    call()
    start = time.perf_counter()
    call()
    number = max(1, int(2e-3 / (time.perf_counter() - start)))
    times = []
    for _ in range(samples):
        start = time.perf_counter()
        for _ in range(number):
            call()
        times.append((time.perf_counter() - start) / number)
    return 1e6 * sorted(times)[samples // 4]


def launches(samples: int = 40) -> list[list[str]]:
    """Return rows for one launch of `chain`: by Triton, by a kept kernel, and again with the same tensors."""
    X, U, S, V = (torch.randn(shape) for shape in ((64, 160), (160, 32), (32, 32), (160, 32)))
    P, Y = torch.empty(64, 32), torch.empty(64, 160)
    config = configs.of("chain", "sm_90", torch.float32, 32, "ieee")[0]
    options = dict(FIRST=True, LAST=True, BIAS=False, RANK=32, PRECISION="ieee", **config.all_kwargs())
    args = (X, V, S, U, P, P, Y, 64, 160, 32, 160, 160, 32, 32, 1, 32, 32, 160)
    again = launching.launch(low_rank.chain, (1,), *args, **options)
    G = torch.randn_like(Y)
    calls = {
        "one launch of `chain`, by `JITFunction.run`": lambda: low_rank.chain[(1,)](*args, **options),
        "the same, kernel kept": lambda: launching.launch(low_rank.chain, (1,), *args, **options),
        "the same, tensors where they were": again,
        "`low_rank_linear`, one launch": lambda: layers.low_rank_linear(X, U, S, V),
        "its backward, three": lambda: layers.low_rank_linear_backward(G, X, P, U, S, V, [True] * 5),
    }
    return [[name, f"{microseconds(call, samples):.1f}"] for name, call in calls.items()]


def steps(layer_counts=LAYERS, samples: int = 40) -> list[list[str]]:
    """Return rows for the step of networks: nothing moved, gradients moved."""
    rows = []
    for count in layer_counts:
        params = []
        for i in range(count):
            m, n, r = 64 + i, 80, 8 + i % 3
            params += [torch.randn(shape) for shape in ((m, r), (r, r), (n, r), (m,))]
        first, second, buffers = ([torch.randn_like(p) for p in params] for _ in range(3))
        hyper = torch.zeros(count, 4, len(HYPER), dtype=torch.float64)
        skipped, turns = torch.zeros(count, dtype=torch.int64), itertools.cycle((first, second))

        def moved(params=params, turns=turns, rest=(buffers, hyper, skipped)):
            step.step(params, next(turns), *rest)

        def same(params=params, grads=first, rest=(buffers, hyper, skipped)):
            step.step(params, grads, *rest)

        for name, call in (("nothing moved", same), ("gradients moved", moved)):
            rows.append([f"step of {count} layers, {name}", f"{microseconds(call, samples):.0f}"])
    return rows


def optimizers(layer_counts=LAYERS, samples: int = 40) -> list[list[str]]:
    """Return rows for step() of an optimizer, gradients where they were."""
    rows = []
    for count in layer_counts:
        net = torch.nn.Sequential(*(condlr_ext.LowRankLinear(80, 80, rank=8 + i % 3) for i in range(count)))
        optimizer = condlr_ext.optim.CondLRSGD(net, 1e-3, momentum=0.9, tau=0.1)
        for p in net.parameters():
            p.grad = torch.randn_like(p)
        with condlr_ext.backend("triton"):
            rows.append([f"`CondLRSGD.step()` of {count} layers", f"{microseconds(optimizer.step, samples):.0f}"])
    return rows


def table() -> str:
    with driver_of(90):
        cells = [*launches(), *steps(), *optimizers()]
    about = f"Python {platform.python_version()}, torch {torch.__version__}, Triton {triton.__version__}"
    return f"{markdown(['what', 'us'], cells)}\n`python -m bench.launches`: {about}, one thread, an idle driver.\n"


def main(arguments: list[str]) -> None:
    torch.set_num_threads(1)
    made = table()
    for file in arguments:
        replace_block(file, "bench.launches", made)
    print(made)


if __name__ == "__main__":
    main(sys.argv[1:])
