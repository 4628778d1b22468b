"""Readers of the files in which image data sets are published.

Every reader returns x [N, C, H, W] uint8 and y [N] int64 in 0..classes - 1, or raises a ValueError that names the file
if that is damaged or holds something else.
"""

import gzip
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .._extras import require
from . import pickled_arrays

CIFAR_PIXELS = 3 * 32 * 32
LIMIT = 2**31  # bytes that are read from one file, unpacked


def idx(path: Path) -> np.ndarray:
    """Read the bytes of an IDX file, plain or gzipped: 0, 0, 8 (bytes), dimensions, sizes as big-endian int32.

    No more is read, and so unpacked, than the sizes ask for.
    """
    with _open(path) as file:
        head = file.read(4)
        sizes = file.read(4 * head[3]) if len(head) == 4 else b""
        if len(head) < 4 or head[:3] != b"\0\0\x08" or len(sizes) < 4 * head[3]:
            raise ValueError(f"data: {path} is no IDX file of bytes")
        shape = tuple(int(size) for size in np.frombuffer(sizes, ">i4"))
        need = math.prod(shape)
        if min(shape, default=0) < 1 or need > LIMIT:
            raise ValueError(f"data: {path} must have sizes from 1 to {LIMIT} bytes in all, got {list(shape)}")
        data = _read(file, need + 1)
    if len(data) != need:
        got = "more" if len(data) > need else f"{len(data)}"
        raise ValueError(f"data: {path} is damaged: sizes {list(shape)} need {need} bytes, it has {got}")
    return np.frombuffer(data, np.uint8).reshape(shape)


def mnist(images: Path, labels: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read two IDX files, images [N, H, W] and labels [N], of the MNIST family (MNIST, Fashion-MNIST, KMNIST ...)."""
    x, y = idx(images), idx(labels)
    if x.ndim != 3 or y.shape != x.shape[:1]:
        raise ValueError(
            f"data: {images} and {labels} must hold images [N, H, W] and labels [N],"
            f" got {list(x.shape)} and {list(y.shape)}"
        )
    return x[:, None], _labels(y, 10, labels)


def cifar_binary(path: Path, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Read records of one (CIFAR-10) or two (CIFAR-100: coarse, fine) label bytes and 3072 pixels, channels first."""
    count = 1 if classes == 10 else 2
    with _open(path) as file:
        data = np.frombuffer(_read(file, LIMIT), np.uint8)
    if data.size == 0 or data.size % (count + CIFAR_PIXELS):
        raise ValueError(f"data: {path} must hold records of {count + CIFAR_PIXELS} bytes, it has {data.size} bytes")
    records = data.reshape(-1, count + CIFAR_PIXELS)
    return records[:, count:].reshape(-1, 3, 32, 32), _labels(records[:, count - 1], classes, path)


def cifar_python(path: Path, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Read a pickled dictionary of data [N, 3072] uint8 and labels; nothing in it is called (see pickled_arrays)."""
    with _open(path) as file:
        raw = _read(file, LIMIT)
    try:
        content = pickled_arrays.loads(raw)
        x = content[b"data"]
        y = content[b"labels" if classes == 10 else b"fine_labels"]
        if isinstance(y, list) and all(type(label) is int for label in y):  # NumPy would unfold lists without end
            y = np.asarray(y)
        if not isinstance(y, np.ndarray):
            raise ValueError(f"labels must be a list of integers, got {type(y).__name__}")
        y = _labels(y, classes, path)
    except (KeyError, ValueError) as error:
        raise ValueError(f"data: {path} is no CIFAR-{classes} batch: {error}") from None
    if not isinstance(x, np.ndarray) or x.dtype != np.uint8 or x.shape != (len(y), CIFAR_PIXELS) or not len(y):
        raise ValueError(f"data: {path} must hold bytes [{len(y)}, {CIFAR_PIXELS}], got {getattr(x, 'shape', type(x))}")
    return x.reshape(-1, 3, 32, 32), y


def svhn(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read X [32, 32, 3, N] and y [N, 1] in 1..10, where 10 is the digit 0, of a MATLAB file."""
    _exists(path)
    try:
        content = require("scipy.io").loadmat(path, variable_names=("X", "y"))
        x, y = content["X"], content["y"].ravel()
    except ImportError:
        raise
    except Exception as error:  # whatever a damaged file makes of the parser
        raise ValueError(f"data: {path} is no SVHN file, or a damaged one: {error}") from None
    if x.dtype != np.uint8 or x.shape != (32, 32, 3, len(y)) or not len(y):
        raise ValueError(f"data: {path} must hold bytes X [32, 32, 3, {len(y)}], got {x.dtype} {list(x.shape)}")
    if y.dtype.kind == "f" and (y == np.round(y)).all():  # what MATLAB saves unless told otherwise
        y = y.astype(np.int64)
    return np.ascontiguousarray(x.transpose(3, 2, 0, 1)), _labels(y, 10, path, first=1) % 10


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """Open a file, unpacking it if its name ends in .gz; what cannot be read is a ValueError."""
    _exists(path)
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield file
    except (OSError, EOFError, zlib.error) as error:  # gzip's checks are OSErrors
        raise ValueError(f"data: cannot read {path}: {error}") from None


def _read(file: BinaryIO, count: int) -> bytes:
    """Read at most `count` bytes, in pieces: a claimed size allocates nothing."""
    pieces = []
    while count > 0 and (piece := file.read(min(count, 1 << 20))):
        pieces.append(piece)
        count -= len(piece)
    return b"".join(pieces)


def _exists(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"data: there is no file {path}")


def _labels(y: np.ndarray, classes: int, path: Path, first: int = 0) -> np.ndarray:
    if y.dtype.kind not in "iu" or y.ndim != 1 or not len(y):
        raise ValueError(f"data: {path} must hold integer labels [N], got {y.dtype} {list(y.shape)}")
    last = first + classes - 1
    if y.min() < first or y.max() > last:
        raise ValueError(f"data: {path} must hold labels in {first}..{last}, got {y.min()}..{y.max()}")
    return y.astype(np.int64)
