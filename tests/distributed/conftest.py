"""These tests start gloo processes."""

import multiprocessing

import torch.distributed as dist

able = dist.is_available() and dist.is_gloo_available() and "forkserver" in multiprocessing.get_all_start_methods()
collect_ignore_glob = [] if able else ["*"]
