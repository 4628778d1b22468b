"""Processes with gloo between them that stay for many tests, so that each pays for its imports once."""

import datetime
import multiprocessing
import tempfile
import traceback
import warnings

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

# imported once for all processes
multiprocessing.set_forkserver_preload(["pytest", "torch", "torch._dynamo", "torch.distributed.fsdp"])


LARGEST = 4


class Pool:
    """LARGEST processes that run functions together; started at the first use, and anew after a failure."""

    def __init__(self):
        self._processes, self._pipes = [], []

    def run(self, function, world: int, *args) -> list:
        """Return function(mesh, *args) of the first `world` processes; mesh is theirs, with one dimension.

        Raises:
            AssertionError: It has raised in one of them; the text is its traceback.
        """
        if not self._processes:
            self._start()
        for pipe in self._pipes[:world]:
            pipe.send((function, world, args))
        replies = [pipe.recv() for pipe in self._pipes[:world]]
        errors = [error for error, _ in replies if error]
        if errors:
            self.stop()
            # that of the process that failed, not of one that waited for it
            raise AssertionError(
                min(errors, key=lambda text: "Connection closed by peer" in text or "Timed out" in text)
            )
        return [value for _, value in replies]

    def _start(self) -> None:
        context = torch.multiprocessing.get_context("forkserver")
        store = f"{tempfile.mkdtemp()}/store"
        for rank in range(LARGEST):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, store, theirs), daemon=True)
            process.start()
            self._processes.append(process)
            self._pipes.append(ours)

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []


def _serve(rank: int, store: str, pipe) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    timeout = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=LARGEST, timeout=timeout)
    meshes = {world: DeviceMesh("cpu", list(range(world))) for world in range(1, LARGEST + 1)}
    while True:
        try:
            function, world, args = pipe.recv()
        except EOFError:
            return
        torch.manual_seed(0)
        try:
            pipe.send((None, function(meshes[world], *args)))
        except BaseException:
            pipe.send((traceback.format_exc(), None))
