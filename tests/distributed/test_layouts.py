"""The step in every layout: replicas of shards, tensor parallel factors, both; it is that of whole parameters."""

import copy

import pytest
from helpers.sharding import (
    ALL,
    BY_ROWS,
    OPTIMIZERS,
    ROWS,
    assert_same_steps,
    distribute,
    gradients,
    network,
    set_gradients,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.debug import CommDebugMode

from condlr_ext.optim import CondLRSGD

# by role, for one mesh dimension or two
LAYOUTS = {
    "U by rows": {"U": [ROWS], "S": [ALL], "V": [ALL], "bias": [ROWS]},
    "V by rows": {"U": [ALL], "S": [ALL], "V": [ROWS], "bias": [ALL]},
    "U and V by rows": {"U": [ROWS], "S": [ALL], "V": [ROWS], "bias": [ROWS]},
    "all by rows": BY_ROWS,
    "replicated": {"U": [ALL], "S": [ALL], "V": [ALL], "bias": [ALL]},
    "replicas of shards": {"U": [ALL, ROWS], "S": [ALL, ROWS], "V": [ALL, ROWS], "bias": [ALL, ROWS]},
    "shards of rows": {"U": [ROWS, ROWS], "S": [ROWS, ALL], "V": [ROWS, ALL], "bias": [ROWS, ROWS]},
}


def check_layout(mesh, name, kind):
    layout = LAYOUTS[name]
    if len(layout["U"]) == 2:
        mesh = init_device_mesh("cpu", (2, 2))
    assert_same_steps(network(), distribute(network(), mesh, layout), kind)


KINDS = [pytest.param(kind, marks=pytest.mark.slow if kind == "adamw" else []) for kind in OPTIMIZERS]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_layout(pool, name, kind):
    pool.run(check_layout, 2 * len(LAYOUTS[name]["U"]), name, kind)


def check_fsdp_of_tensor_parallel(mesh, kind):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    whole, other = network(), network()
    distribute(other[:1], mesh["tensor"], LAYOUTS["U by rows"])
    fully_shard(other[0], mesh=mesh["data"])
    fully_shard(other[1], mesh=mesh["data"])
    assert "Strided" in str(other[0].U.placements) and other[1].U.device_mesh.ndim == 1
    assert_same_steps(whole, other, kind)
    set_gradients(other, gradients(other, 0))
    optimizer = OPTIMIZERS[kind](other)
    with CommDebugMode() as communication:
        optimizer.step()
    per_dimension = {"projector": 3}.get(kind, 1)  # tangent parts, factors, cores
    assert communication.get_total_counts() == 2 * per_dimension


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_fsdp_of_tensor_parallel(pool, kind):
    """One layer on both dimensions of the mesh and one on the first: still one sum for each dimension."""
    pool.run(check_fsdp_of_tensor_parallel, 4, kind)


def check_refusals(mesh):
    whole = network()
    for placement, name in ((Shard(1), "U"), (Shard(1), "S")):
        model = distribute(copy.deepcopy(whole), mesh, BY_ROWS | {name: [placement]})
        for make in OPTIMIZERS.values():
            with pytest.raises(ValueError, match=r"must be divided by rows, Shard\(0\), got .*Shard\(dim=1\)"):
                make(model)
    model = distribute(whole, mesh)
    with pytest.raises(ValueError, match="capturable=True needs whole parameters"):
        CondLRSGD(model, 0.1, tau=0.1, capturable=True)


def test_refusals(pool):
    pool.run(check_refusals, 2)
