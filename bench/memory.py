"""Peak memory of a training iteration, each provider in a process of its own.

python bench/memory.py NETWORK PROVIDER FRACTION THREADS prints the bytes by which resident memory rose, from after
the imports to its peak over two iterations: weights, gradients, momentum, activations, scratch.
"""

import re
import subprocess
import sys
from pathlib import Path

import torch
from baselines import plain_twin
from iterations import Training
from networks import NETWORKS
from subjects import STILL, dense_sgd, factorised, fast_pytorch, ours

PROVIDERS = {"ours": ours, "dense": dense_sgd(fused=None), "fast PyTorch": fast_pytorch}


def peak_memory(network: str, provider: str, fraction: float) -> int:
    """Bytes, measured in a fresh process with this one's environment and threads."""
    command = [sys.executable, __file__, network, provider, str(fraction), str(torch.get_num_threads())]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure(network: str, provider: str, fraction: float) -> int:
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
    for _ in range(2):
        training.iteration()
    return resident("VmHWM") - before


def resident(what: str) -> int:
    """VmRSS, the resident memory now, or VmHWM, its peak, in bytes."""
    return 1024 * int(re.search(rf"{what}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[4]))
    print(measure(sys.argv[1], sys.argv[2], float(sys.argv[3])))
