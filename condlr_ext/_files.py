"""Atomic writing of files."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path) -> Iterator[Path]:
    """Yield a temporary path to write to, then sync it and rename it to `path`; an exception deletes it instead."""
    target = Path(os.path.realpath(path))  # replaces the target of a link, not the link
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # sync the new name too
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_whole(path, data: bytes) -> None:
    """Write a file atomically."""
    with whole_file(path) as temporary:
        temporary.write_bytes(data)
