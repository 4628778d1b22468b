"""Ahead-of-time compilation of Triton kernels without a device, and properties of the machine code."""

import re
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

SHARED = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}  # bytes a program may have
SECONDS = 60


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


def compile_variant(variant: Variant) -> Code:
    """Compile in this process, which an alarm kills after SECONDS."""
    import importlib

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
