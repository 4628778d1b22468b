"""Files that are whole or absent."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path) -> Iterator[Path]:
    """A path beside `path` to write to; at the end it becomes `path`, on the disk, or vanishes if anything raised."""
    target = Path(os.path.realpath(path))  # of a link what it points to is replaced
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # the new name as well
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_whole(path, data: bytes) -> None:
    """Write a file such that an interruption leaves the old one, or none."""
    with whole_file(path) as temporary:
        temporary.write_bytes(data)
