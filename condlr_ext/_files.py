"""Atomic writing of files, and reading of small texts that others wrote."""

import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None

LARGEST_TEXT = 2**20  # bytes


def check_path(function: str, argument: str, path) -> None:
    """Raise TypeError unless path, the argument of that name, is a str or os.PathLike."""
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{function}: {argument} must be a str or os.PathLike, got {type(path).__name__}")


@contextmanager
def whole_file(path) -> Iterator[BinaryIO]:
    """Yield a new file to write to, then sync it and rename it to `path`; an exception deletes it instead.

    The file has the mode that the umask leaves. What killed writers of that name left behind is deleted.

    Raises:
        OSError: The name cannot be that of a file, before anything is written, or writing fails.
    """
    target = _target(path)
    start = f".{target.name[:50]}."  # a longer name would not fit in 255 bytes with what follows
    _remove_abandoned(target.parent, start)
    temporary, file = _locked(target.parent, start)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if fcntl is None:  # Windows renames no open file
                file.close()
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
    with whole_file(path) as file:
        file.write(data)


def read_text(path) -> str:
    """Return the content of a UTF-8 file of at most LARGEST_TEXT bytes.

    Raises:
        OSError: It cannot be read.
        ValueError: It is larger, or not UTF-8.
    """
    with open(path, "rb") as file:
        data = file.read(LARGEST_TEXT + 1)
    if len(data) > LARGEST_TEXT:
        raise ValueError(f"it has more than {LARGEST_TEXT} bytes")
    return data.decode()


def _target(path) -> Path:
    """Return the file to replace: that of a link, not the link."""
    try:
        target = Path(os.path.realpath(path))
        there = os.stat(target)
    except FileNotFoundError:
        return target
    except ValueError as error:  # a NUL, or what the file system cannot encode
        raise OSError(errno.EINVAL, str(error), str(path)) from None
    if stat.S_ISDIR(there.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(there.st_mode):  # a rename would replace the device or the pipe
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return target


def _locked(folder: Path, start: str) -> tuple[Path, BinaryIO]:
    """Create a temporary file, locked while its writer lives."""
    while True:
        path = folder / f"{start}{os.getpid()}.{secrets.token_hex(4)}.tmp"
        file = open(path, "xb")
        if not _lock(file.fileno()) or os.fstat(file.fileno()).st_nlink:
            return path, file
        file.close()  # another writer took it for abandoned before it was locked


def _remove_abandoned(folder: Path, start: str) -> None:
    """Delete temporary files whose writer is gone, on systems that say so."""
    if fcntl is None:
        return
    name = re.compile(re.escape(start) + r"\d+\.[0-9a-f]{8}\.tmp")
    try:
        abandoned = [entry.path for entry in os.scandir(folder) if name.fullmatch(entry.name)]
    except OSError:  # a folder that may be written, but not listed; a missing one is named when the file is made
        return
    for path in abandoned:
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError:  # another user's, or gone
            continue
        try:
            if _lock(descriptor):
                os.unlink(path)
        except FileNotFoundError:
            pass
        finally:
            os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Lock a file until it is closed; return False if another process holds it, or the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (OSError, AttributeError):  # AttributeError: no fcntl
        return False
    return True
