"""fully_shard on two processes: each holds half of the rows of every factor, and the step sends r x r matrices only.

    torchrun --standalone --nproc-per-node 2 examples/fsdp.py

Run without torchrun, it starts it.
"""

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.run import main as torchrun

import condlr_ext


def train() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    bunch = load_digits()
    x, y = torch.tensor(bunch.data / 16, dtype=torch.float32), torch.tensor(bunch.target)

    torch.manual_seed(0)  # fully_shard keeps the rows that each process has
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    condlr_ext.factorize(model, budget=0.3, exclude="4")
    for layer in condlr_ext.nn.low_rank_layers(model).values():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = condlr_ext.optim.CondLRSGD(model, lr=0.2, momentum=0.5, tau=0.1)  # after sharding

    order = torch.Generator().manual_seed(0)
    for index in torch.cat([torch.randperm(1280, generator=order) for _ in range(10)]).split(64):
        mine = index.chunk(world)[rank]
        optimizer.zero_grad()
        F.cross_entropy(model(x[mine]), y[mine]).backward()
        optimizer.step()

    with torch.no_grad():
        accuracy = (model(x[1280:]).argmax(1) == y[1280:]).float().mean().item()
    kappa = max(condlr_ext.linalg.cond(layer.S.full_tensor()).item() for layer in (model[0], model[2]))
    if rank == 0:
        rows = len(model[0].U.to_local())
        print(f"accuracy {accuracy:.1%}, kappa {kappa:.4f}, {rows} of {len(model[0].U)} rows of U here")
    dist.destroy_process_group()


if __name__ == "__main__":
    if "RANK" in os.environ:
        train()
    else:
        torchrun(["--standalone", "--nproc-per-node", "2", __file__])
