"""Ahead-of-time compilation of the Triton kernels without a device, and properties of the machine code."""

import importlib
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

SHARED = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}  # bytes a program may have
SECONDS = 60

TYPES = {"fp16": "fp16", "bf16": "bf16", "tf32": "fp32", "fp32": "fp32", "fp64": "fp64"}
# the products of a layer, with the stride of S that is 1: forward, backward, the same for the pointwise half
CHAINS = {
    "forward": {"FIRST": True, "LAST": True, "BIAS": True, "s_col": 1},
    "backward": {"FIRST": True, "LAST": True, "BIAS": False, "s_row": 1},
    "pointwise": {"FIRST": False, "LAST": True, "BIAS": True, "s_col": 1},
    "pointwise backward": {"FIRST": True, "LAST": False, "BIAS": False, "s_row": 1},
}
COUNTS = ("n_rows", "splits", "u_tiles", "v_tiles", "rows_per_split")  # integers of any value
OTHERS = (
    "runtime.launching", "qr.cholesky_qr", "spectral.band", "spectral.bound", "spectral.jacobi",
    "spectral.newton_schulz", "spectral.product", "step.core_clip", "step.network_step",
)  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """A kernel as a launch would compile it.

    types has "i32", "*fp32" and so on for every argument that is no constant, with ":16" for multiples of 16.
    """

    module: str
    kernel: str
    architecture: str
    types: dict[str, str]
    constants: dict
    options: dict
    default: bool = True
    kind: str = ""  # a label for the test ids
    dtype: str = ""

    def __str__(self):
        blocks = "-".join(f"{k}{v}" for k, v in (self.constants | self.options).items() if v != "")
        return f"{self.architecture}-{self.kernel}-{self.dtype}-{self.kind}-{blocks}".replace("num_", "")


@dataclass(frozen=True)
class Code:
    """A compiled kernel."""

    seconds: float
    shared: int
    spilled: int  # bytes of stack, or registers
    registers: int
    assembly: str = field(repr=False)
    ttir: str = field(repr=False)

    def count(self, pattern: str) -> int:
        return len(re.findall(pattern, self.assembly))


def variants(architecture: str) -> Iterator[Variant]:
    """Yield every configuration of every kernel."""
    import torch

    from condlr_ext.kernels.triton.linear import configs

    dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64}
    for dtype in TYPES:
        rounding = "ieee" if dtype in ("fp32", "fp64") else "tf32"
        for rank in configs.RANKS:
            for kernel in ("chain", "sums", "combine"):
                listed = configs.of(kernel, architecture, dtypes.get(dtype, torch.float32), rank, rounding)
                for i, config in enumerate(listed):
                    for kind, fixed in CHAINS.items() if kernel == "chain" else [("", {"BIAS": True})]:
                        fixed = fixed | {"RANK": rank, "PRECISION": rounding}
                        yield _of_layer(kernel, architecture, dtype, kind, fixed, config, i == 0)
    for name in OTHERS:
        module = importlib.import_module(f"condlr_ext.kernels.triton.{name}")
        for kernel, types, constants, options, default in module.variants(architecture):
            types = {name: types[name] for name in kernel.arg_names if name not in constants}
            tensors = "-".join(dict.fromkeys(t.lstrip("*") for t in types.values() if t[:3] in ("*fp", "*bf")))
            yield Variant(name, kernel.fn.__name__, architecture, types, constants, options, default, dtype=tensors)


def _of_layer(kernel: str, architecture: str, dtype: str, kind: str, fixed: dict, config, default: bool) -> Variant:
    from condlr_ext.kernels.triton.linear import low_rank

    constants, types = fixed | config.kwargs, {}
    if kernel == "combine":
        constants["s_col"] = 1
    for name in getattr(low_rank, kernel).arg_names:
        if name.endswith("_ptr"):
            summed = name.endswith("sums_ptr") or (kernel == "sums" and name == "db_ptr")
            types[name] = f"*{('fp64' if dtype == 'fp64' else 'fp32') if summed else TYPES[dtype]}:16"
        elif name not in constants:
            types[name] = "i32" if name in COUNTS else "i32:16"
    options = {k: v for k, v in config.all_kwargs().items() if k not in config.kwargs}
    return Variant("linear.low_rank", kernel, architecture, types, constants, options, default, kind, dtype)


def compile_variant(variant: Variant) -> Code:
    """Compile in this process, which an alarm kills after SECONDS."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(f"condlr_ext.kernels.triton.{variant.module}"), variant.kernel)
    names = function.arg_names
    assert set(names) == set(variant.types) | set(variant.constants), (names, variant)
    signature = {name: variant.types.get(name, "constexpr").split(":")[0] for name in names}
    constants = {(names.index(name),): value for name, value in variant.constants.items()}
    aligned = {
        (names.index(name),): [["tt.divisibility", 16]] for name, t in variant.types.items() if t.endswith(":16")
    }
    if variant.architecture == "gfx942":
        target = GPUTarget("hip", "gfx942", 64)
    else:
        target = GPUTarget("cuda", int(variant.architecture.removeprefix("sm_")), 32)

    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(SECONDS)
    start = time.perf_counter()
    binary = triton.compile(ASTSource(function, signature, constants, aligned), target=target, options=variant.options)
    seconds = time.perf_counter() - start
    signal.alarm(0)

    if variant.architecture == "gfx942":
        text = binary.asm["amdgcn"]
        used, spilled, scratch = (  # scalar registers are spilled to lanes of vector registers, not to memory
            int(re.search(rf"\.{name}:\s*(\d+)", text)[1])
            for name in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
        )
        return Code(seconds, binary.metadata.shared, spilled + scratch, used, text, binary.asm["ttir"])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage.stdout)[1]) for name in ("REG", "STACK", "LOCAL"))
    return Code(seconds, binary.metadata.shared, stack + local, registers, binary.asm["ptx"], binary.asm["ttir"])
