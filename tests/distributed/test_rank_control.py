"""RankController under DistributedDataParallel: different batches per process, one decision, that of the joined batches."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers.training import batches, make_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from condlr_ext.nn import low_rank_layers
from condlr_ext.optim import CondLRSGD, RankController


def loss_of(model):
    return lambda batch: F.cross_entropy(model(batch[0]), batch[1])


def data(count):
    return list(batches(count, torch.float64))


def check_update(mesh, tau, wrapped):
    """Made before DistributedDataParallel, as larger layers need, or after it."""
    rank, world = mesh.get_local_rank(), mesh.size()
    model = make_model(dtype=torch.float64)
    alone, reports = copy.deepcopy(model), []
    for net in (alone, model):
        optimizer = CondLRSGD(net, 0.05, tau=tau)
        given = data(3)
        options = {"budget": 0.4, "max_rank": None if wrapped else 1.0}
        if net is alone:
            with pytest.MonkeyPatch.context() as patch:  # as if it were the only process
                patch.setattr(dist, "is_initialized", lambda: False)
                reports.append(RankController(net, optimizer, **options).update(loss_of(net), given))
            continue
        given = [tuple(t.chunk(world)[rank] for t in batch) for batch in given]
        if not wrapped:
            controller = RankController(net, optimizer, **options)
        parallel = DistributedDataParallel(net)
        if wrapped:
            controller = RankController(parallel, optimizer, **options)
        reports.append(controller.update(loss_of(parallel if wrapped else net), given))
        loss_of(parallel)(given[0]).backward()  # the wrapper works as before
        optimizer.step()
    assert list(reports[0].ranks.values()) == list(reports[1].ranks.values())
    assert reports[1].change == pytest.approx(reports[0].change, rel=1e-9)
    mine = nn.utils.parameters_to_vector(model.parameters()).detach()
    theirs = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(theirs, mine)
    assert all(torch.equal(mine, other) for other in theirs)
    with pytest.raises(ValueError, match="batches must be as many in every process"):
        controller.update(loss_of(model), data(1 + rank))


@pytest.mark.parametrize("tau", [0.1, float("inf")])
@pytest.mark.parametrize("wrapped", [False, True])
def test_update(pool, tau, wrapped):
    pool.run(check_update, 4, tau, wrapped)


def check_sharded(mesh):
    from torch.distributed.fsdp import fully_shard

    model = make_model()
    for layer in low_rank_layers(model).values():
        fully_shard(layer, mesh=mesh)
    optimizer = CondLRSGD(model, 0.05, tau=0.1)
    with pytest.raises(ValueError, match="RankController: U of layer '0' must be a plain tensor, got DTensor"):
        RankController(model, optimizer)


def test_sharded_layers_are_refused(pool):
    pool.run(check_sharded, 2)
