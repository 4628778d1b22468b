"""A training iteration in a process of its own: peak memory, time and page faults.

In the process where providers take turns, the others' memory lies beside: peaks are not those of a training run, and
on CPUs glibc hands less of it back, between what one frees and the end of the heap. What the allocator costs shows
only here.

python -m bench.memory NETWORK RANK PROVIDER THREADS DEVICE prints the measures as JSON.
"""

import contextlib
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from .cases.baselines import plain_twin
from .cases.networks import NETWORKS, NetworkRank
from .cases.network_setup import STILL, Training, capturable, factorized, fast_pytorch, fused_sgd, ours
from .registry import Row

ALONE = ("LeNet5", "VGG16", "WRN16-4", "ViT block", "GPT block")
PROVIDERS = ("ours", "dense", "fast PyTorch")
PATIENCE = 120  # seconds for a process


def memory_records(row: Row, device) -> list[dict]:
    """{"kind": "memory", "op", "row", "dtype", "provider", "threads", "bytes", "seconds", "page_faults"} for each of
    PROVIDERS in float32, or "reason" where its process fails.
    """
    if row.shape.network not in ALONE or row.dtype != "fp32":
        return []
    records = []
    for provider in PROVIDERS:
        record = {"kind": "memory", "op": row.operation.name, "row": str(row.shape), "dtype": row.dtype}
        record |= {"provider": provider, "threads": torch.get_num_threads()}
        records.append(record | alone(row.shape, provider, device.kind))
    return records


def alone(shape: NetworkRank, provider: str, kind: str) -> dict:
    """What `measure` finds in a fresh process with this one's environment and threads, or {"reason"}."""
    arguments = [shape.network, str(shape.rank), provider, str(torch.get_num_threads()), kind]
    root = str(Path(__file__).parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "bench.memory", *arguments],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
    except subprocess.TimeoutExpired:
        return {"reason": f"it takes more than {PATIENCE} s"}
    if done.returncode:
        return {"reason": (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1][:300]}
    return json.loads(done.stdout.splitlines()[-1])


def measure(shape: NetworkRank, provider: str, kind: str) -> dict:
    """bytes: on CPUs what resident memory rises by at its peak, from after the imports: weights, gradients, momentum,
    activations, scratch; on CUDA devices what is allocated at the peak. seconds and page_faults: medians of an
    iteration.
    """
    train(NetworkRank("small LeNet5", 0.2), provider, kind, 2)  # loads what PyTorch loads when it is first needed
    if kind == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak is that of now
        before = resident("VmRSS")
    seconds, faults = train(shape, provider, kind, 4)
    return {
        "bytes": torch.cuda.max_memory_allocated() if kind == "cuda" else resident("VmHWM") - before,
        "seconds": statistics.median(seconds[2:]),
        "page_faults": statistics.median(faults[2:]),
    }


def train(shape: NetworkRank, provider: str, kind: str, iterations: int) -> tuple[list[float], list[int]]:
    """Seconds and page faults of each iteration."""
    makers = {"ours": capturable if kind == "cuda" else ours, "dense": fused_sgd, "fast PyTorch": fast_pytorch}
    net = NETWORKS[shape.network]
    model = net.build()
    if provider != "dense":
        model = factorized(net, model, shape.rank)
    if provider == "fast PyTorch":
        model = plain_twin(model)
    model = model.to(memory_format=torch.channels_last).to(kind)
    optimizer = makers[provider](model, dict.fromkeys(("factors", "cores", "other"), STILL))
    x, y = net.batch()
    batch = x.detach().to(kind).requires_grad_(y is None), y if y is None else y.to(kind)
    training = Training(net, model, optimizer, [batch], torch.float32)
    seconds, faults = [], []
    for _ in range(iterations):
        training.next()
        start, faults_before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        training.iteration()
        if kind == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults_before)
    return seconds, faults


def resident(what: str) -> int:
    """VmRSS, the resident memory now, or VmHWM, its peak, in bytes."""
    return 1024 * int(re.search(rf"{what}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


if __name__ == "__main__":
    network, rank, provider, threads, kind = sys.argv[1:]
    torch.set_num_threads(int(threads))
    shape = NetworkRank(network, float(rank) if "." in rank else int(rank))
    print(json.dumps(measure(shape, provider, kind)))
