"""These tests start gloo processes, which most of them share."""

import multiprocessing

import pytest
import torch.distributed as dist
from helpers.processes import Pool

able = dist.is_available() and dist.is_gloo_available() and "forkserver" in multiprocessing.get_all_start_methods()
collect_ignore_glob = [] if able else ["*"]


@pytest.fixture(scope="session")
def pool():
    pool = Pool()
    yield pool
    pool.stop()
