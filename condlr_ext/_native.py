"""Build information and CPU features, from the compiled library _core.so, which links neither torch nor Python."""

import ctypes
from pathlib import Path

PATH = Path(__file__).with_name("_core.so")
LIBRARY = ctypes.CDLL(str(PATH))  # raises OSError
for _function in ("condlr_build_info", "condlr_cpu_features", "condlr_isa_levels", "condlr_isa"):
    getattr(LIBRARY, _function).restype = ctypes.c_char_p


def build_info() -> dict[str, str | list[str]]:
    """Return compiler, flags, torch versions and the instruction sets compiled."""
    info = dict(line.split("\t") for line in LIBRARY.condlr_build_info().decode().splitlines())
    return info | {"isa_levels": info["isa_levels"].split()}


def cpu_features() -> dict[str, bool]:
    """Return the features of this CPU that the instruction sets ask for."""
    lines = LIBRARY.condlr_cpu_features().decode().splitlines()
    return {name: present == "1" for name, present in (line.split("\t") for line in lines)}


def isa_levels() -> list[str]:
    """Return the instruction sets that this CPU can run, lowest first."""
    return LIBRARY.condlr_isa_levels().decode().split()


def isa() -> str:
    """Return the instruction set in use; CONDLR_EXT_ISA lowers it.

    Raises:
        ValueError: CONDLR_EXT_ISA names none that this machine runs.
    """
    name = ctypes.c_char_p()
    check(LIBRARY.condlr_isa(ctypes.byref(name)))
    return name.value.decode()


def check(error: bytes | None) -> None:
    """Raise ValueError for the error text of a function of the library."""
    if error is not None:
        raise ValueError(error.decode())
