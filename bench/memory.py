"""A training iteration in a process of its own: peak memory, time and page faults.

Where providers take turns in one process, peaks are not those of a training run, and on CPUs glibc hands less memory
back, so the cost of the allocator shows only here.

`python -m bench.memory NETWORK RANK PROVIDER THREADS DEVICE` prints the measures as JSON.
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
from .cases.network_setup import STILL, Training, capturable, factorized, fast_pytorch, fused_sgd, ours
from .cases.networks import NETWORKS, NetworkRank
from .registry import Row

MEASURED = ("LeNet5", "VGG16", "WRN16-4", "ViT block", "GPT block")
PROVIDERS = ("ours", "dense", "fast PyTorch")
TIMEOUT = 120  # seconds for a process


def memory_records(row: Row, device) -> list[dict]:
    """Return a record of `measure` for each of PROVIDERS in float32, or its "reason" where the process fails."""
    if row.shape.network not in MEASURED or row.dtype != "fp32":
        return []
    records = []
    for provider in PROVIDERS:
        record = {"kind": "memory", "op": row.operation.name, "row": str(row.shape), "dtype": row.dtype}
        record |= {"provider": provider, "threads": torch.get_num_threads()}
        records.append(record | in_new_process(row.shape, provider, device.kind))
    return records


def in_new_process(shape: NetworkRank, provider: str, kind: str) -> dict:
    """Return measure() of a new process with this one's environment and threads, or the "reason" why it failed."""
    arguments = [shape.network, str(shape.rank), provider, str(torch.get_num_threads()), kind]
    paths = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "bench.memory", *arguments],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        return {"reason": f"it takes more than {TIMEOUT} s"}
    if done.returncode:
        return {"reason": (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1][:300]}
    return json.loads(done.stdout.splitlines()[-1])


def measure(shape: NetworkRank, provider: str, kind: str) -> dict:
    """Measure training iterations in this process.

    Returns:
        "bytes": on CPUs the rise of resident memory at its peak, from after the imports (weights, gradients, momentum,
        activations, workspace), on CUDA devices the peak of allocated memory; "seconds" and "page_faults": medians of
        an iteration.
    """
    train(NetworkRank("small LeNet5", 0.2), provider, kind, 2)  # PyTorch loads parts at their first use
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
    """Return the seconds and page faults of each iteration."""
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
    """Return VmRSS, the resident memory now, or VmHWM, its peak, in bytes."""
    return 1024 * int(re.search(rf"{what}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


if __name__ == "__main__":
    network, rank, provider, threads, kind = sys.argv[1:]
    torch.set_num_threads(int(threads))
    shape = NetworkRank(network, float(rank) if "." in rank else int(rank))
    print(json.dumps(measure(shape, provider, kind)))
