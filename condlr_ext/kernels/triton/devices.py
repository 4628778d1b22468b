"""Where kernels run, and what launches ask of a device; all read as attributes of this module at each use."""

import importlib.util
import os
from collections.abc import Sequence

import torch
from torch import Tensor

INSTALLED = importlib.util.find_spec("triton") is not None
# triton.jit reads this variable once, when a kernel is defined
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def serves(tensor: Tensor) -> bool:
    """Return whether kernels can read and write this tensor, whatever its shape."""
    return not _unserved(tensor)


def unsupported_reasons(tensors: Sequence[Tensor]) -> list[str]:
    """Return the reasons why no Triton kernel can serve these tensors, whatever their shapes."""
    if not INSTALLED:
        return ["Triton is not installed"]
    kinds = {(t.device, t.dtype): t for t in tensors}.values()
    return list(dict.fromkeys(_unserved(t) for t in kinds if not serves(t)))


def _unserved(tensor: Tensor) -> str:
    """Return why kernels cannot serve this tensor, empty if they can."""
    device = tensor.device
    if INTERPRETED:
        if device.type != "cpu":
            return f"TRITON_INTERPRET=1 interprets CPU tensors, a tensor is on {device}"
        return "Triton's interpreter computes bfloat16 wrongly" if tensor.dtype == torch.bfloat16 else ""
    if device.type != "cuda":
        return f"a tensor is on {device}; for CPU tensors start the process with TRITON_INTERPRET=1"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        served = properties.gcnArchName.startswith("gfx942")
        return "" if served else f"gfx942 is needed, {device} is {properties.gcnArchName}"
    if properties.major < 8:
        return f"compute capability 8.0 is needed, {device} has {properties.major}.{properties.minor}"
    return ""


def architecture(device: torch.device) -> str:
    """Return the name under which the configurations for this device are listed."""
    if device.type != "cuda":
        return "sm_90"  # interpreted: any will do
    if torch.version.hip is not None:
        return "gfx942"
    return {9: "sm_90", 10: "sm_100"}.get(torch.cuda.get_device_properties(device).major, "sm_80")


def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors, a small one where the interpreter stands for them."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


# the address of a tensor's first element as kernels see it
address = Tensor.data_ptr
