"""Results of single attacks in a file, so that an interrupted evaluation goes on after the last of them."""

import json
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from .._files import write_whole


class Journal:
    """The results of the attacks of one evaluation by name, in a JSON file; kept nowhere without a path.

    Args:
        path: The file; what it holds of another evaluation is dropped.
        key: What determines the results, as JSON can hold it.
    """

    def __init__(self, path: Path | None, key: dict):
        self._path, self._content = None if path is None else Path(path), {"key": key}
        if self._path is not None:
            try:
                stored = json.loads(self._path.read_text(encoding="utf-8"))
            except (OSError, ValueError, RecursionError):
                return
            if isinstance(stored, dict) and stored.get("key") == json.loads(json.dumps(key)):
                self._content = stored

    def recall(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        """Return the result of that name, bool or float64 on the CPU; compute and write it if the file has none."""
        if name in self._content:
            dtype = {"bool": torch.bool, "float64": torch.float64}[self._content[name]["dtype"]]
            return torch.tensor(self._content[name]["values"], dtype=dtype, device="cpu")
        result = compute()
        if self._path is not None:
            dtype = str(result.dtype).removeprefix("torch.")
            self._content[name] = {"dtype": dtype, "values": result.tolist()}
            write_whole(self._path, json.dumps(self._content).encode())
        return result


def checksum(model: nn.Module, *tensors: Tensor) -> int:
    """Return a checksum of tensors and of all a model holds."""
    total = 0
    for t in (*model.state_dict().values(), *tensors):
        total = zlib.crc32(t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data, total)
    return total
