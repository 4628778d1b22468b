"""What a launch asks of a device, counted while it is executed: instructions, arithmetic, and bytes of global memory."""

import collections
import re

import numpy as np

from .parse import Instruction

SECTOR = 32  # bytes; memory is asked for in pieces of these
_TENSOR = {"f16": "fp16", "bf16": "bf16", "tf32": "tf32", "f64": "fp64 tensor"}
_ARITHMETIC = {"fma": 2, "add": 1, "sub": 1, "mul": 1, "div": 1, "sqrt": 1}


def flops(i: Instruction) -> tuple[str, int] | None:
    """Return the kind of arithmetic of an instruction and its flops for each thread; None: it has none.

    Kinds are those of tensor cores by the type of the factors, fp16, bf16, tf32 and "fp64 tensor", and fp32 and fp64 of
    the threads, where quotients and roots count as one, comparisons and conversions not at all.
    """
    if shape := re.match(r"(mma|wgmma)\..*\.m(\d+)n(\d+)k(\d+)\.", ".".join([i.opcode, *i.modifiers])):
        m, n, k = map(int, shape.groups()[1:])
        return _TENSOR[i.modifiers[-2]], 2 * m * n * k // (32 if i.opcode == "mma" else 128)
    if i.opcode in _ARITHMETIC and i.type in ("f32", "f64"):
        return f"fp{i.type[1:]}", _ARITHMETIC[i.opcode]
    return None


class Counts:
    """Counts of a launch.

    Attributes:
        instructions: Of warps, all blocks together.
        flops: By kind, all blocks together; a guarded instruction counts for all threads that come to it.
        asked: Bytes that warps ask for, an instruction at a time and sectors at a time: what goes through the L2 cache
            if the L1 cache helps nobody.
        touched: Bytes of all sectors that anybody has read or written.
    """

    def __init__(self):
        self.instructions, self.asked, self.touched = 0, 0, 0
        self.flops = collections.Counter()
        self._blocks = {}

    def execute(self, code, number: int, threads: int, mask) -> None:
        """Count a basic block; mask: the threads that execute it, None: all."""
        if (code, number) not in self._blocks:
            start, stop, *_ = code.blocks[number]
            found = collections.Counter()
            for kind, each in filter(None, map(flops, code.function.instructions[start:stop])):
                found[kind] += each
            self._blocks[code, number] = stop - start, found
        instructions, found = self._blocks[code, number]
        warps = threads // 32 if mask is None else np.count_nonzero(mask.reshape(-1, 32).any(1))
        self.instructions += instructions * int(warps)
        active = threads if mask is None else int(np.count_nonzero(mask))
        for kind, each in found.items():
            self.flops[kind] += each * active

    def access(self, warp, at) -> None:
        """Count an access of threads of these warps at these bytes of an allocation, at most a sector each."""
        self.asked += SECTOR * len(np.unique(warp << 40 | at // SECTOR))
