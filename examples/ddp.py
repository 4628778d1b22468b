"""DistributedDataParallel on two processes of this machine: both hold the same parameters, bit for bit, after every
step. Build the optimizer after DDP, which gives all processes the parameters of the first.
"""

import tempfile

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import condlr_ext

WORLD = 2


def train(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    bunch = load_digits()
    x, y = torch.tensor(bunch.data / 16, dtype=torch.float32), torch.tensor(bunch.target)

    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    condlr_ext.factorize(model, budget=0.3, exclude="4")
    parallel = DistributedDataParallel(model)
    optimizer = condlr_ext.optim.CondLRSGD(parallel, lr=0.2, momentum=0.5, tau=0.1)

    order = torch.Generator().manual_seed(0)
    for index in torch.cat([torch.randperm(1280, generator=order) for _ in range(10)]).split(64):
        mine = index.chunk(WORLD)[rank]
        optimizer.zero_grad()
        F.cross_entropy(parallel(x[mine]), y[mine]).backward()  # gradients are averaged over the processes
        optimizer.step()  # needs nothing from the other process

    mine = nn.utils.parameters_to_vector(model.parameters()).detach()
    everyone = [torch.empty_like(mine) for _ in range(WORLD)]
    dist.all_gather(everyone, mine)
    if rank == 0:
        accuracy = (model(x[1280:]).argmax(1) == y[1280:]).float().mean().item()
        kappa = max(condlr_ext.condition_numbers(model).values())
        print(f"accuracy {accuracy:.1%}, kappa {kappa:.4f}, equal on both processes: {torch.equal(*everyone)}")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(train, (f"{tempfile.mkdtemp()}/store",), nprocs=WORLD)
