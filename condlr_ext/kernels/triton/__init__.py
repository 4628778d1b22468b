"""Triton kernels and the devices they run on. Only the modules of the wings import Triton, on first use."""

import importlib.util
import os
from collections.abc import Sequence

import torch

INSTALLED = importlib.util.find_spec("triton") is not None
# triton.jit reads this variable once, when a kernel is defined
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def unsupported_reasons(tensors: Sequence[torch.Tensor]) -> list[str]:
    """Return the reasons why no Triton kernel can serve these tensors, whatever their shapes."""
    if not INSTALLED:
        return ["Triton is not installed"]
    device = tensors[0].device
    reasons = []
    if INTERPRETED:
        if device.type != "cpu":
            reasons.append(f"TRITON_INTERPRET=1 interprets CPU tensors, a tensor is on {device}")
        if any(t.dtype == torch.bfloat16 for t in tensors):
            reasons.append("Triton's interpreter computes bfloat16 wrongly")
    elif device.type != "cuda":
        reasons.append(f"a tensor is on {device}; for CPU tensors start the process with TRITON_INTERPRET=1")
    else:
        properties = torch.cuda.get_device_properties(device)
        if torch.version.hip is not None:
            if not properties.gcnArchName.startswith("gfx942"):
                reasons.append(f"gfx942 is needed, {device} is {properties.gcnArchName}")
        elif properties.major < 8:
            reasons.append(f"compute capability 8.0 is needed, {device} has {properties.major}.{properties.minor}")
    return reasons


def architecture(device: torch.device) -> str:
    """Return the name under which the configurations for this device are listed."""
    if device.type != "cuda":
        return "sm_90"  # interpreted: any will do
    if torch.version.hip is not None:
        return "gfx942"
    return {9: "sm_90", 10: "sm_100"}.get(torch.cuda.get_device_properties(device).major, "sm_80")
