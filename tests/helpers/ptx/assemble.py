"""Kernels of a few instructions, for the tests of the executor."""

import torch

from .memory import Global
from .parse import parse
from .run import Launch
from .translate import Module

_TEXT = """
.visible .entry test(
    {parameters}
)
.reqntid {threads}
{{
    .reg .pred %p<32>;
    .reg .b16 %rs<32>;
    .reg .b32 %r<128>;
    .reg .b64 %rd<64>;
    {loads}
    mov.u32 %r0, %tid.x;
    {body}
    ret;
}}
"""


def run(body: str, *tensors: torch.Tensor, threads=32, shared=0, grid=(1, 1, 1), **options) -> Launch:
    """Execute this body and return the launch.

    %r0 is the number of the thread; %rd0, %rd1 and so on are the addresses of the tensors.
    """
    parameters = ",\n".join(f".param .u64 test_param_{k}" for k in range(len(tensors)))
    loads = "\n".join(f"ld.param.b64 %rd{k}, [test_param_{k}];" for k in range(len(tensors)))
    text = _TEXT.format(parameters=parameters, threads=threads, loads=loads, body=body)
    memory = Global()
    addresses = {f"test_param_{k}": memory.address(tensor, f"tensor {k}") for k, tensor in enumerate(tensors)}
    launch = Launch(Module(parse(text), "test", shared), memory, grid, addresses, **options)
    launch.run()
    return launch


def kinds(launch: Launch) -> set[str]:
    """Return the kinds of what was reported."""
    return {report.kind for report in launch.reports.values()}


def element(address: str, tensor: int, width: int) -> str:
    """Return the instructions that set a register to the address of the element of this thread."""
    return f"mad.wide.u32 {address}, %r0, {width}, %rd{tensor};"
