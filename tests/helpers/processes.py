"""Functions on several gloo processes."""

import multiprocessing
import tempfile
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

# imported once for all processes
multiprocessing.set_forkserver_preload(["pytest", "torch", "torch._dynamo", "torch.distributed.fsdp"])


def run(function, world: int, *args) -> list:
    """Return function(rank, *args) of each process of a new group; function and results can be pickled."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            _process, (function, world, folder, args), nprocs=world, start_method="forkserver"
        )
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(world)]


def _process(rank: int, function, world: int, folder: str, args: tuple) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        torch.save(function(rank, *args), Path(folder, f"{rank}.pt"))
    finally:
        dist.destroy_process_group()
