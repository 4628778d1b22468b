"""Pipeline and context parallelism on two gloo processes: they work because low-rank layers are plain modules.

Of context parallelism this is the layers' side, with keys and values gathered by hand: torch's context_parallel has no
attention for CPUs.
"""

import pytest
import torch
import torch.nn.functional as F
from helpers.models import ViTBlock
from torch import nn
from torch.distributed import _functional_collectives as collectives
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

import condlr_ext
from condlr_ext.optim import CondLRSGD

SCHEDULES = {"GPipe": ScheduleGPipe, "1F1B": Schedule1F1B}
BATCHES, STEPS = 4, 3  # of a step


def blocks() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*(ViTBlock(16, heads=2) for _ in range(4))).double()
    condlr_ext.factorize(model, rank=0.5)
    return model


def data() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(2, 2 * BATCHES, 6, 16, dtype=torch.float64)


def optimizer_of(model) -> CondLRSGD:
    return CondLRSGD(model, 0.05, 0.9, tau=0.1)


def unsplit() -> nn.Sequential:
    model, (x, y) = blocks(), data()
    optimizer = optimizer_of(model)
    for _ in range(STEPS):
        optimizer.zero_grad()
        for part_x, part_y in zip(x.chunk(BATCHES), y.chunk(BATCHES), strict=True):
            (F.mse_loss(model(part_x), part_y) / BATCHES).backward()
        optimizer.step()
    return model


def stages(mesh) -> dict:
    """Train two blocks of four on each rank; return their parameters."""
    rank, results, (x, y) = mesh.get_local_rank(), {}, data()
    for name, schedule in SCHEDULES.items():
        model = nn.Sequential(*list(blocks())[2 * rank : 2 * rank + 2])
        stage = PipelineStage(model, rank, num_stages=2, device=torch.device("cpu"), group=mesh.get_group())
        pipeline, optimizer = schedule(stage, BATCHES, loss_fn=F.mse_loss), optimizer_of(model)
        for _ in range(STEPS):
            optimizer.zero_grad()
            pipeline.step(x) if rank == 0 else pipeline.step(target=y)
            optimizer.step()
        results[name] = [p.detach() for p in model.parameters()]
    return results


class ContextParallelBlock(nn.Module):
    """A ViT block for a part of the sequence: keys and values come from all ranks."""

    def __init__(self, block: ViTBlock, group):
        super().__init__()
        self.block, self.group = block, group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        attention = self.block.attn
        q, k, v = attention.qkv(self.block.norm1(x)).chunk(3, -1)
        k, v = (collectives.all_gather_tensor_autograd(t.contiguous(), 1, self.group) for t in (k, v))
        q, k, v = (t.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for t in (q, k, v))
        x = x + attention.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.block.mlp(self.block.norm2(x))


def context(mesh) -> list[torch.Tensor]:
    """Train on half of every sequence on each rank; return the parameters."""
    group = mesh.get_group()
    model, (x, y) = blocks(), (t.chunk(2, 1)[mesh.get_local_rank()] for t in data())
    parallel = nn.Sequential(*(ContextParallelBlock(block, group) for block in model))
    optimizer = optimizer_of(model)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (F.mse_loss(parallel(x), y) / 2).backward()
        for p in model.parameters():
            torch.distributed.all_reduce(p.grad, group=group)
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def everything(mesh) -> tuple:
    return stages(mesh), context(mesh)


@pytest.fixture(scope="module")
def results(pool):
    return pool.run(everything, 2)


def assert_trained_alike(found: list[torch.Tensor]) -> None:
    expected, start = list(unsplit().parameters()), list(blocks().parameters())
    assert len(found) == len(expected) and max((p - q).abs().max() for p, q in zip(expected, start, strict=True)) > 1e-3
    for p, q in zip(found, expected, strict=True):
        torch.testing.assert_close(p, q.detach(), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_two_stages_train_like_the_whole(results, schedule):
    assert_trained_alike([p for by_schedule, _ in results for p in by_schedule[schedule]])


def test_parts_of_sequences_train_like_the_whole(results):
    for _, found in results:
        assert_trained_alike(found)
