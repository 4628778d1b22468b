"""A model that is sharded on the meta device is initialized without gathering it, the same for any number of processes."""

import pytest
import torch
from helpers.sharding import network
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode

from condlr_ext import condition_numbers
from condlr_ext.nn import LowRankEmbedding, low_rank_layers
from condlr_ext.optim import CondLRSGD


def check_meta(mesh, dims):
    if dims == 2:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    with torch.device("meta"):
        model = network(torch.float32)
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = CondLRSGD(model, 0.1, 0.9, tau=0.1)
    assert not optimizer.state
    model.to_empty(device="cpu")
    with CommDebugMode() as communication:
        for layer in model:
            layer.reset_parameters()
    kinds = {str(kind) for kind in communication.get_comm_counts()}
    assert kinds == ({"c10d.allreduce_"} if mesh.size() > 1 else set())
    CondLRSGD(model, 0.1, tau=0.1)
    whole = {name: p.full_tensor().detach() for name, p in model.named_parameters()}
    for name in low_rank_layers(model):
        for role in "UV":
            X = whole[f"{name}.{role}"]
            torch.testing.assert_close(X.mT @ X, torch.eye(X.shape[1]), rtol=0, atol=2e-6)
        assert whole[f"{name}.bias"].unique().numel() == whole[f"{name}.bias"].numel()
    assert max(condition_numbers(model).values()) <= 1 + 1e-6
    return whole


def test_meta_then_to_empty_then_reset(pool):
    """Equal to rounding in 1, 3 and 2 x 2 processes with one seed."""
    alone = pool.run(check_meta, 1, 1)[0]
    for world, dims in ((3, 1), (4, 2)):
        for whole in pool.run(check_meta, world, dims):
            torch.testing.assert_close(whole, alone, rtol=1e-5, atol=1e-6)


def check_embedding(mesh):
    with torch.device("meta"):
        layer = LowRankEmbedding(10, 6, padding_idx=7, rank=3)
    fully_shard(layer, mesh=mesh)
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    U = layer.U.full_tensor()
    torch.testing.assert_close(U.mT @ U, torch.eye(3), rtol=0, atol=2e-6)
    assert not U[7].any() and U.any(1).sum() == 9


def test_the_padding_row_of_an_embedding_is_zero(pool):
    pool.run(check_embedding, 3)


def check_condition_number(mesh):
    whole, model = network(), network()
    with torch.no_grad():
        for net in (whole, model):
            net[0].U.mul_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
            net[1].S[0, 0] = 5
    for layer in model:
        fully_shard(layer, mesh=mesh)
    found = condition_numbers(model)
    assert found == pytest.approx(condition_numbers(whole), rel=1e-10)
    return found


def test_condition_numbers(pool):
    """Of the weight, also where U is not orthonormal; the same in all processes."""
    first, *rest = pool.run(check_condition_number, 3)
    assert all(found == first for found in rest)
