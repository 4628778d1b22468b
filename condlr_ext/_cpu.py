"""The CPU that this process runs on."""

import functools
import platform
import re
from pathlib import Path


@functools.cache
def _description() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # not Linux
        return ""


def model() -> str:
    """Return the name of the model."""
    found = re.search(r"^model name\s*: (.+)$", _description(), re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def is_amd() -> bool:
    return "AuthenticAMD" in _description()
