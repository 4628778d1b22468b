"""The model of a sharded step: its counts are those of layers, its schedule that of streams, the page has its tables."""

from pathlib import Path

import pytest
from torch import nn

import condlr_ext
from bench import sharding
from bench.sharding import Task, simulate

PAGE = Path(__file__).parents[2] / "docs" / "internals" / "distributed.md"
SMALL = sharding.Transformer("small", 2, 64, 96, 16, vocabulary=50)


def network(model: sharding.Transformer) -> nn.ModuleList:
    layers = [nn.Linear(n, m, bias=False, device="meta") for m, n in model.matrices() * model.blocks]
    return nn.ModuleList(layers)


@pytest.mark.parametrize("r", [None, 8])
def test_parameters_are_those_of_layers(r):
    layers = network(SMALL)
    if r:
        condlr_ext.factorize(layers, rank=r, init="random")
    dense = 2 * 50 * 64 + 5 * 64  # embedding, head, two norms of each block and the last
    assert SMALL.parameters(r) == sum(p.numel() for p in layers.parameters()) + dense


def test_models_have_their_published_sizes():
    assert [round(model.parameters(None) / 1e8) for model in sharding.MODELS] == [67, 690]


def test_each_gpu_sends_its_part_of_every_other():
    """Muon: a GPU has 1/8 of each matrix and keeps 1/8 of that; the other way the same."""
    entries = SMALL.blocks * SMALL.of_block(None)
    assert sharding.muon(SMALL, 8, 8).bytes == 2 * 2 * entries / 8 * 7 / 8
    rows = SMALL.blocks * sum(n for _, n in SMALL.matrices())
    assert sharding.dion(SMALL, 8, 8).bytes == 2 * 2 * rows * 8 * 7 / 8


def test_our_sum_depends_on_rank_and_layers_alone():
    wide = sharding.Transformer("wide", 2, 640, 960, 160, vocabulary=50)
    assert sharding.numbers(wide, 8) == sharding.numbers(SMALL, 8) == 14 * (2 * (2 * 64 + 8) + 2 * 64 + 4)


@pytest.mark.parametrize("time", [sharding.all_reduce, sharding.half, lambda b, g: sharding.all_to_all(b, g, g)])
def test_times_are_latency_and_bytes(time):
    for group in (8, 64):
        empty, one, two = time(0, group), time(1e9, group), time(2e9, group)
        assert 0 < empty < one and two - one == pytest.approx(one - empty)
    assert time(1e9, 64) > time(1e9, 8)


def test_a_ring_within_a_node():
    seven = 7 * sharding.NVLINK_LATENCY + 7 / 8 * 1e9 / sharding.NVLINK
    assert sharding.all_reduce(1e9, 8) == pytest.approx(2 * seven)


def test_streams_keep_their_order_and_wait():
    ends = simulate(
        [
            Task("gather 0", "links", 2.0),
            Task("gather 1", "links", 2.0),
            Task("product 0", "compute", 3.0, ("gather 0",)),
            Task("product 1", "compute", 1.0, ("gather 1",)),  # gathered at 4, but compute is busy until 5
            Task("last", "links", 1.0, ("product 1",)),
        ]
    )
    assert ends == {"gather 0": 2, "gather 1": 4, "product 0": 5, "product 1": 6, "last": 7}


def test_an_iteration_is_as_long_as_what_it_cannot_hide():
    model = sharding.MODELS[0]
    ends = simulate(sharding.training(model, None, 8, 64))
    flops = 6 * sharding.TOKENS * (model.blocks * model.of_block(None) + model.outside()) / sharding.DENSE
    assert flops < max(ends.values()) < 1.2 * flops
    assert max(ends, key=ends.__getitem__) == "reduce 0"


def test_the_page_has_these_tables():
    """Where it fails: `python -m bench.sharding docs/internals/distributed.md`."""
    text = PAGE.read_text()
    assert sharding.rewrite(text) == text


def test_missing_tables_are_named():
    with pytest.raises(ValueError, match="for each of step, latency, memory, schedule, got"):
        sharding.rewrite("no table")


def test_it_prints_its_tables(capsys):
    sharding.main([])
    printed = capsys.readouterr().out
    assert all(table() in printed for table in sharding.TABLES.values())
