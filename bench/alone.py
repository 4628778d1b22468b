"""A training iteration in a process of its own: peak memory, time and page faults.

In the process where providers take turns, the others' memory lies between what one frees and the end of the heap, so
glibc hands less of it back than in a real training run: what the allocator costs shows only here.

python bench/alone.py NETWORK PROVIDER FRACTION THREADS prints the measures as JSON.
"""

import json
import re
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from baselines import plain_twin
from iterations import Training
from networks import NETWORKS
from subjects import STILL, dense_sgd, factorised, fast_pytorch, ours

PROVIDERS = {"ours": ours, "dense": dense_sgd(fused=True), "fast PyTorch": fast_pytorch}


def alone(network: str, provider: str, fraction: float) -> dict:
    """{"bytes", "seconds", "page_faults"} of a fresh process with this one's environment and threads."""
    command = [sys.executable, __file__, network, provider, str(fraction), str(torch.get_num_threads())]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure(network: str, provider: str, fraction: float) -> dict:
    """bytes: what resident memory rises by at its peak, from after the imports: weights, gradients, momentum,
    activations, scratch. seconds and page_faults: medians of an iteration.
    """
    before = resident("VmRSS")
    (net,) = (net for net in NETWORKS if net.name == network)
    model = net.build()
    if provider != "dense":
        model = factorised(net, model, fraction)
    if provider == "fast PyTorch":
        model = plain_twin(model)
    model = model.to(memory_format=torch.channels_last)
    optimizer = PROVIDERS[provider](model, dict.fromkeys(("factors", "cores", "other"), STILL))
    training = Training(net, model, optimizer, *net.batch())
    seconds, faults = [], []
    for _ in range(5):
        start, faults_before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        training.iteration()
        seconds.append(time.perf_counter() - start)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults_before)
    return {
        "bytes": resident("VmHWM") - before,
        "seconds": statistics.median(seconds[2:]),
        "page_faults": statistics.median(faults[2:]),
    }


def resident(what: str) -> int:
    """VmRSS, the resident memory now, or VmHWM, its peak, in bytes."""
    return 1024 * int(re.search(rf"{what}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[4]))
    print(json.dumps(measure(sys.argv[1], sys.argv[2], float(sys.argv[3]))))
