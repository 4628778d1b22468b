"""Torch's own defaults for new tensors, whatever a program has set: they decide what networks are made of."""

from contextlib import contextmanager

import torch


@contextmanager
def torch_defaults():
    """Make new tensors float32 on the CPU, as in a fresh process; also a decorator."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        if torch.get_default_device().type == "cpu":  # the mode that sets a device costs time at every call of torch
            yield
        else:
            with torch.device("cpu"):
                yield
    finally:
        torch.set_default_dtype(dtype)
