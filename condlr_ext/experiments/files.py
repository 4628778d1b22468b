"""Files that are either whole or not there."""

import os
from pathlib import Path


def make_folder(path: Path) -> None:
    """Makes the folder, and finds out now, not after the work, whether it can be written.

    Raises:
        ValueError: it cannot.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        write_whole(path / "probe", b"")
        (path / "probe").unlink()
    except OSError as error:
        raise ValueError(f"the folder for the results must be one that can be written, got {path}: {error}") from None


def write_whole(path: Path, data: bytes) -> None:
    """Write under a temporary name, then rename: an interrupted run leaves the old file or none."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
