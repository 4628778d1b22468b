"""Helpers of the tests on a CUDA device."""

import torch

DEVICE = "cuda"


def litter(value):
    """Fill memory with a value and free it, so that torch hands it out next."""
    [torch.full((1 << k,), value, device=DEVICE) for k in range(7, 22) for _ in range(8)]


def on_another_stream(call):
    """Return call(), run on a stream of its own that is kept waiting, while the host goes on."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        out = call()
    stream.synchronize()
    return out


def captured(call):
    """Return the function that replays the call from a CUDA graph, captured after three runs."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


class never_waiting:
    """Context in which an error is raised where the host would wait for the device."""

    def __enter__(self):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *exc):
        torch.cuda.set_sync_debug_mode("default")
