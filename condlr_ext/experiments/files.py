"""The folder of the results, and files in it that are either whole or not there."""

import tempfile
from pathlib import Path

from .._files import write_whole

__all__ = ["make_folder", "write_whole"]


def make_folder(path: Path) -> None:
    """Makes the folder, and finds out now, not after the work, whether it can be written.

    Raises:
        ValueError: it cannot.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):  # a name of its own: other runs may share the folder
            pass
    except OSError as error:
        raise ValueError(f"the folder for the results must be one that can be written, got {path}: {error}") from None
