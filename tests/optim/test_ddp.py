"""DistributedDataParallel on two gloo processes: equal parameters on both, those of one process."""

import copy
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers.models import Encoder, example_input
from torch.nn.parallel import DistributedDataParallel

import condlr_ext
from condlr_ext.optim import CondLRAdamW, CondLRSGD

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")

STEPS, BATCH = 20, 8  # of both processes together
WAYS = {
    "plain": {},
    "no_sync": {},
    "static_graph": {"static_graph": True},
    "find_unused_parameters": {"find_unused_parameters": True},
    "gradient_as_bucket_view": {"gradient_as_bucket_view": True},
    "bfloat16": {},
    "adamw": {},
}


def network(dtype=torch.float32):
    model = Encoder(depth=1)
    condlr_ext.factorize(model, rank=0.5, exclude="head")
    return model.to(dtype)


def batch(step: int, dtype=torch.float32):
    torch.manual_seed(step)
    return example_input("encoder", BATCH, dtype), torch.randint(0, 10, (BATCH,))


def loss_of(model, x, y):
    return F.cross_entropy(model(x).float(), y)


def optimizer_of(model, way: str = "plain"):
    return CondLRAdamW(model, 0.01, tau=0.1) if way == "adamw" else CondLRSGD(model, 0.1, 0.9, tau=0.1)


def train(way: str, rank: int) -> dict:
    """Half of every batch here; with no_sync in two parts, of which the first waits for the other process."""
    dtype = torch.bfloat16 if way == "bfloat16" else torch.float32
    torch.manual_seed(rank)  # DDP takes the parameters of process 0
    model = network(dtype)
    parallel = DistributedDataParallel(model, **WAYS[way])
    optimizer = optimizer_of(parallel, way)
    start = copy.deepcopy(model.state_dict())
    for step in range(STEPS):
        x, y = (t.chunk(2)[rank] for t in batch(step, dtype))
        optimizer.zero_grad()
        if way == "no_sync":
            (x, last_x), (y, last_y) = x.chunk(2), y.chunk(2)
            with parallel.no_sync():
                (loss_of(parallel, x, y) / 2).backward()
            (loss_of(parallel, last_x, last_y) / 2).backward()
        else:
            loss_of(parallel, x, y).backward()
        optimizer.step()
    return {"start": start, "end": model.state_dict(), "state": optimizer.state_dict()["state"]}


def refusal() -> str:
    """Return the error of the optimizer for FullyShardedDataParallel."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    flat = FullyShardedDataParallel(network(), device_id=torch.device("cpu"))
    loss_of(flat, *batch(0)).backward()  # the layers themselves work
    with pytest.raises(ValueError) as error:
        optimizer_of(flat)
    return str(error.value)


def process(rank: int, folder: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        results = {way: train(way, rank) for way in WAYS}
        torch.save((results, refusal()), Path(folder, f"{rank}.pt"))
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    torch.multiprocessing.spawn(process, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def tensors(tree) -> list[torch.Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(tree) if isinstance(t, torch.Tensor)]


@pytest.mark.parametrize("way", WAYS)
def test_both_processes_hold_the_same_bits(results, way):
    """Parameters, momentum and float32 masters, after 20 steps from unequal seeds."""
    first, second = (tensors(ways[way]) for ways, _ in results)
    assert len(first) > 40 and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("way", [way for way in WAYS if way not in ("bfloat16", "adamw")])
def test_as_one_process_on_the_joined_batch(results, way):
    """They agree to rounding: the mean over two halves is that of the batch in another order."""
    stored = results[0][0][way]
    model = network()
    model.load_state_dict(stored["start"])
    optimizer = optimizer_of(model)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, *batch(step)).backward()
        optimizer.step()
    moved = 0
    for name, p in model.state_dict().items():
        torch.testing.assert_close(stored["end"][name], p, rtol=1e-4, atol=1e-5)
        moved = max(moved, (p - stored["start"][name]).abs().max().item())
    assert moved > 0.01
    assert max(condlr_ext.condition_numbers(model).values()) <= 1.1 * (1 + 5e-6)


def test_flat_parameters_are_refused(results):
    for _, said in results:
        assert "must have U, S, V as its own parameters, got none; FullyShardedDataParallel flattens" in said
