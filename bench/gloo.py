"""What the steps of sharded optimizers send: `python -m bench.gloo [FILE.md]`, on any machine.

Processes with gloo on one machine: calls and bytes are those of any other, times say nothing about a network and are
given as ratios. With a Markdown file, the table in it between `<!-- python -m bench.gloo -->` and `<!-- end -->` is
rewritten.
"""

import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import condlr_ext
from condlr_ext._table import markdown
from condlr_ext.optim import CondLRAdamW, CondLRSGD, Projector

from .markdown import replace_block

PROCESSES = (1, 2, 4)
LAYERS, WIDTH, RANK = 8, 512, 32


def projected(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9)
    Projector(model, tau=0.1).attach(optimizer)
    return optimizer


OPTIMIZERS = {
    "`CondLRSGD`": lambda model: CondLRSGD(model, 0.01, 0.9, tau=0.1),
    "`CondLRAdamW`": lambda model: CondLRAdamW(model, 1e-3, tau=0.1),
    "`Projector` on torch's SGD": projected,
}


class Sent(TorchDispatchMode):
    """Counts the calls of collectives, and the bytes of their inputs."""

    def __init__(self):
        super().__init__()
        self.calls = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in func._opname:
            self.calls += 1
            self.bytes += sum(t.nbytes for t in tree_leaves(args) if isinstance(t, torch.Tensor))
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Step:
    """Calls and bytes of a process, and the seconds of a step: the least of some."""

    calls: int
    bytes: int
    seconds: float


def measure(mesh: DeviceMesh | None, name: str, layers: int, width: int, rank: int, steps: int) -> Step:
    """Step a network of square layers with random gradients, sharded if there is a mesh."""
    torch.manual_seed(0)
    model = nn.Sequential(*(condlr_ext.LowRankLinear(width, width, bias=False, rank=rank) for _ in range(layers)))
    if mesh:
        fully_shard(model, mesh=mesh)
    optimizer = OPTIMIZERS[name](model)
    times = []
    for _ in range(steps + 1):
        for p in model.parameters():
            p.grad = 0.01 * torch.randn_like(p)
        start = time.perf_counter()
        optimizer.step()
        times.append(time.perf_counter() - start)
    with Sent() as sent:
        optimizer.step()
    return Step(sent.calls, sent.bytes, min(times[-steps:]))


def _process(rank: int, folder: str, world: int, size: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    found = {name: measure(mesh, name, *size) for name in OPTIMIZERS}
    if rank == 0:
        torch.save(found, Path(folder, "found.pt"))
    dist.destroy_process_group()


def sharded(world: int, *size: int) -> dict[str, Step]:
    """Return the steps of every optimizer on so many processes, as the first of them sees it."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_process, (folder, world, size), nprocs=world)
        return torch.load(Path(folder, "found.pt"), weights_only=False)


def table(processes: tuple[int, ...] = PROCESSES, size: tuple = (LAYERS, WIDTH, RANK, 20)) -> str:
    by_world = {world: sharded(world, *size) for world in processes}
    rows = []
    for name in OPTIMIZERS:
        whole = measure(None, name, *size)
        for world, found in by_world.items():
            step = found[name]
            ratio = f"{step.seconds / whole.seconds:.1f}"
            rows.append([name, str(world), str(step.calls), f"{step.bytes / 1e3:.1f}", ratio])
    titles = ["optimizer", "processes", "collectives", "KB", "time, not sharded = 1"]
    layers, width, rank, _ = size
    about = f"{layers} layers {width} -> {width}, rank {rank}; torch {torch.__version__}, one thread a process"
    return f"{markdown(titles, rows)}\n`python -m bench.gloo`: {about}.\n"


def main(arguments: list[str]) -> None:
    torch.set_num_threads(1)
    made = table()
    for file in arguments:
        replace_block(file, "bench.gloo", made)
    print(made)


if __name__ == "__main__":
    main(sys.argv[1:])
