"""Launch configurations by kernel, architecture, precision and rank; the first of a list is the default.

All compile for their architecture within its shared memory, the defaults without register spills
(tests/kernels/test_aot.py). No GPU has run them yet: docs/results/kernels.md says what their machine code allows.
"""

import functools

import torch
import triton

RANKS = (16, 32, 64, 128, 256)
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")  # sm_80 serves every other NVIDIA GPU too: within 99 KiB

# by the largest rank that a list serves: BLOCK_B, BLOCK_N, BLOCK_M, CORE (0: the whole rank), warps, stages
_CHAIN = {
    ("sm_80", "half"): {
        32: [(64, 128, 64, 0, 4, 3), (64, 64, 64, 0, 4, 4), (128, 64, 64, 0, 4, 3)],
        64: [(64, 64, 64, 0, 4, 3), (64, 128, 64, 0, 8, 3), (128, 64, 64, 0, 8, 3)],
        128: [(64, 64, 64, 32, 8, 3), (64, 64, 64, 32, 4, 3), (128, 64, 64, 32, 8, 3)],
        256: [(64, 64, 64, 32, 8, 2), (64, 128, 64, 32, 8, 2)],
    },
    ("sm_80", "tf32"): {
        32: [(64, 32, 32, 0, 4, 3), (64, 64, 64, 0, 4, 3)],
        64: [(64, 32, 32, 0, 4, 3), (64, 64, 64, 32, 8, 3)],
        128: [(64, 32, 32, 16, 8, 3), (64, 32, 32, 32, 4, 3)],
        256: [(32, 32, 32, 16, 8, 2)],
    },
    ("sm_80", "ieee"): {
        16: [(64, 32, 64, 16, 4, 3), (32, 32, 32, 16, 4, 3)],
        32: [(64, 16, 32, 16, 4, 3), (32, 32, 32, 32, 4, 3)],
        64: [(64, 16, 32, 16, 8, 3), (32, 32, 32, 16, 4, 3)],
        128: [(32, 16, 32, 16, 8, 3), (64, 16, 32, 16, 8, 3)],
        256: [(16, 32, 32, 16, 8, 2), (32, 16, 32, 16, 8, 2)],
    },
    ("sm_90", "half"): {
        32: [(64, 128, 64, 0, 4, 3), (64, 64, 64, 0, 4, 4), (128, 64, 64, 0, 4, 3)],
        64: [(64, 128, 64, 0, 4, 3), (64, 64, 64, 0, 4, 4), (64, 64, 128, 0, 4, 3), (128, 64, 64, 0, 8, 3)],
        128: [(64, 128, 64, 0, 8, 3), (64, 64, 64, 0, 4, 3), (64, 64, 128, 32, 8, 3), (128, 64, 64, 0, 8, 3)],
        256: [(64, 64, 64, 32, 8, 2), (64, 128, 64, 32, 8, 2), (64, 64, 128, 32, 8, 2)],
    },
    ("sm_90", "tf32"): {
        16: [(64, 64, 64, 0, 4, 3), (64, 32, 32, 0, 4, 4), (128, 32, 32, 0, 4, 3)],
        32: [(64, 64, 64, 0, 4, 3), (64, 32, 32, 0, 4, 4)],
        64: [(64, 64, 64, 0, 8, 3), (64, 64, 64, 32, 4, 3), (64, 32, 32, 0, 4, 3)],
        128: [(64, 64, 64, 32, 8, 3), (64, 32, 32, 32, 8, 3), (64, 32, 32, 32, 4, 3)],
        256: [(64, 32, 32, 32, 8, 2), (64, 64, 64, 32, 8, 2)],
    },
    ("gfx942", "half"): {
        32: [(64, 64, 64, 0, 4, 2), (64, 32, 32, 0, 4, 2)],
        64: [(64, 64, 64, 0, 4, 2), (64, 64, 64, 32, 8, 2), (64, 32, 32, 0, 4, 2)],
        128: [(64, 64, 64, 32, 4, 2), (64, 32, 32, 32, 4, 2)],
        256: [(64, 32, 32, 32, 8, 2), (64, 64, 64, 32, 8, 2)],
    },
    ("gfx942", "tf32"): {
        32: [(64, 32, 32, 0, 4, 2), (32, 32, 32, 0, 4, 2)],
        64: [(64, 32, 32, 32, 4, 2), (32, 32, 32, 32, 4, 2)],
        128: [(64, 32, 32, 32, 8, 2), (32, 32, 32, 32, 4, 2)],
        256: [(32, 32, 16, 32, 8, 2), (64, 32, 32, 32, 8, 2)],
    },
    ("gfx942", "ieee"): {
        32: [(64, 32, 64, 0, 4, 2), (64, 16, 32, 0, 4, 2)],
        64: [(64, 32, 64, 16, 4, 2), (64, 16, 32, 16, 8, 2)],
        128: [(64, 16, 32, 16, 8, 2), (32, 32, 32, 16, 4, 2)],
        256: [(32, 16, 32, 16, 8, 2), (64, 16, 16, 16, 8, 2)],
    },
}
_CHAIN["sm_90", "ieee"] = _CHAIN["sm_80", "ieee"] | {
    32: [(32, 32, 32, 32, 4, 3), (64, 16, 32, 16, 4, 3)],
    64: [(64, 16, 32, 16, 8, 3), (64, 32, 64, 16, 8, 3), (32, 32, 32, 16, 4, 3)],
}
_CHAIN["sm_100", "half"] = _CHAIN["sm_90", "half"] | {
    64: [(64, 128, 64, 32, 4, 3), (64, 128, 64, 0, 8, 3), (64, 128, 64, 0, 4, 3)],
    128: [(64, 64, 64, 0, 4, 3), (64, 128, 64, 0, 8, 3), (128, 64, 64, 0, 8, 3)],
    256: [(64, 64, 64, 32, 8, 2), (64, 128, 64, 32, 8, 2), (64, 64, 128, 32, 8, 2)],
}
_CHAIN["sm_100", "tf32"] = _CHAIN["sm_90", "tf32"] | {
    16: [(64, 64, 64, 0, 4, 3), (64, 32, 32, 0, 4, 3), (128, 32, 32, 0, 4, 3)],
    32: [(64, 64, 64, 0, 4, 3), (64, 32, 32, 0, 4, 3)],
}
_CHAIN["sm_100", "ieee"] = _CHAIN["sm_90", "ieee"]

# by the largest rank that a list serves: BLOCK_B, BLOCK_I, warps, stages
_SUMS = {
    ("sm_80", "half"): {
        32: [(64, 64, 4, 3), (32, 64, 4, 3)],
        64: [(64, 64, 4, 3), (64, 128, 4, 3)],
        128: [(32, 64, 8, 3), (64, 64, 8, 2)],
        256: [(16, 64, 8, 4), (64, 64, 8, 3)],
    },
    ("sm_80", "tf32"): {
        64: [(32, 64, 4, 3), (16, 64, 4, 3)],
        128: [(32, 64, 8, 3), (16, 64, 4, 3)],
        256: [(32, 64, 8, 3), (16, 64, 8, 3)],
    },
    ("sm_80", "ieee"): {
        64: [(16, 64, 4, 3), (32, 32, 4, 3)],
        128: [(32, 64, 8, 3), (16, 64, 8, 3)],
        256: [(16, 64, 8, 3), (32, 32, 8, 3)],
    },
    ("sm_90", "half"): {
        32: [(64, 64, 4, 3), (64, 128, 4, 3)],
        64: [(64, 64, 4, 3), (64, 128, 4, 3), (32, 64, 4, 4)],
        128: [(64, 64, 4, 3), (64, 128, 8, 3), (64, 64, 8, 3)],
        256: [(64, 64, 8, 3), (64, 128, 8, 3), (32, 64, 8, 3)],
    },
    ("sm_90", "tf32"): {  # pipelined loads would go to shared memory transposed, 4 bytes at a time
        16: [(32, 64, 4, 1), (32, 64, 4, 3)],
        32: [(32, 64, 4, 1), (16, 64, 4, 3)],
        64: [(32, 64, 4, 1), (32, 64, 8, 1), (32, 64, 4, 3)],
        256: [(32, 64, 8, 1), (32, 64, 8, 3)],
    },
    ("sm_90", "ieee"): {
        16: [(16, 64, 4, 3), (32, 32, 4, 3)],
        32: [(16, 64, 4, 3), (32, 64, 4, 3)],
        64: [(32, 64, 4, 3), (16, 64, 4, 3)],
        128: [(32, 64, 8, 3), (16, 64, 8, 3)],
        256: [(32, 64, 8, 3), (32, 32, 8, 3)],
    },
    ("sm_100", "half"): {
        32: [(64, 64, 4, 3), (64, 128, 4, 3)],
        64: [(32, 64, 4, 3), (64, 128, 4, 3)],
        128: [(64, 64, 8, 3), (64, 128, 8, 3)],
        256: [(64, 64, 8, 3), (32, 64, 8, 3)],
    },
    ("gfx942", "half"): {
        32: [(64, 64, 4, 2), (32, 64, 4, 2)],
        64: [(64, 64, 4, 2), (64, 128, 4, 2)],
        128: [(64, 64, 8, 2), (64, 128, 8, 2)],
        256: [(64, 64, 8, 2), (32, 64, 8, 2)],
    },
    ("gfx942", "tf32"): {
        64: [(32, 64, 4, 2), (16, 64, 4, 2)],
        256: [(32, 64, 8, 2), (16, 64, 8, 2)],
    },
}
_SUMS["sm_100", "tf32"] = _SUMS["sm_90", "tf32"] | {128: [(64, 64, 8, 1), (32, 64, 8, 3)]}
_SUMS["sm_100", "ieee"] = _SUMS["sm_90", "ieee"] | {
    32: [(16, 64, 4, 3), (32, 32, 4, 3)],
    64: [(32, 64, 4, 3), (32, 32, 4, 3)],
}
_SUMS["gfx942", "ieee"] = _SUMS["gfx942", "tf32"]

# float64, on every architecture, for correctness only: libraries are faster. A product has at least as many tiles of
# the tensor core, 16 x 8, as a block has warps, else several would compute the same; 32 rows of rank 256 are too many
_DOUBLE = {
    "chain": {128: [(32, 16, 32, 16, 4, 1)], 256: [(16, 16, 32, 16, 4, 1)]},
    "sums": {16: [(16, 32, 4, 2)], 256: [(16, 32, 8, 2)]},
}


@functools.cache
def of(kernel: str, architecture: str, dtype: torch.dtype, rank: int, rounding: str) -> list[triton.Config]:
    """Return the configurations to choose from.

    Args:
        kernel: "chain", "sums" or "combine".
        architecture: One of ARCHITECTURES.
        dtype: Of the tensors.
        rank: One of RANKS, the width of a tile.
        rounding: Of float32 products, "tf32" or "ieee".
    """
    # all registers: by itself ptxas allows fewer, for more programs than shared memory holds
    registers = None if architecture == "gfx942" else 255
    double = dtype == torch.float64
    if kernel == "combine":
        blocks = {"BLOCK_I": 16 if double and rank == 256 else 32, "CORE": 16}
        return [triton.Config(blocks, num_warps=4 if double or rank == 16 else 8, num_stages=2, maxnreg=registers)]
    if double:
        lists = _DOUBLE[kernel]
    else:
        lists = (_CHAIN if kernel == "chain" else _SUMS)[architecture, rounding if dtype.itemsize == 4 else "half"]
    found = []
    for *blocks, warps, stages in lists[min(largest for largest in lists if largest >= rank)]:
        if kernel == "chain":
            block_b, block_n, block_m, core = blocks
            blocks = dict(BLOCK_B=block_b, BLOCK_N=block_n, BLOCK_M=block_m, CORE=core or rank)
        else:
            blocks = dict(zip(("BLOCK_B", "BLOCK_I"), blocks, strict=True))
        found.append(triton.Config(blocks, num_warps=warps, num_stages=stages, maxnreg=registers))
    return found
