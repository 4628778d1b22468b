"""Readers of the files in which image data sets are published.

Every reader returns x [N, C, H, W] uint8 and y [N] int64 in 0..classes - 1, or raises a ValueError that names the file
if that is damaged or holds something else.
"""

import gzip
import math
import pickle
import zlib
from pathlib import Path

import numpy as np

from .._extras import require

CIFAR_PIXELS = 3 * 32 * 32


def idx(path: Path) -> np.ndarray:
    """Read the bytes of an IDX file, plain or gzipped: 0, 0, 8 (bytes), dimensions, sizes as big-endian int32."""
    data = _bytes(path)
    if len(data) < 4 or data[:3] != b"\0\0\x08" or len(data) < 4 + 4 * data[3]:
        raise ValueError(f"data: {path} is no IDX file of bytes")
    start = 4 + 4 * data[3]
    shape = tuple(int(size) for size in np.frombuffer(data, ">i4", data[3], 4))
    if min(shape, default=0) < 1 or len(data) - start != math.prod(shape):
        raise ValueError(
            f"data: {path} is damaged: sizes {list(shape)} need {math.prod(shape)} bytes, it has {len(data) - start}"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


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
    data = np.frombuffer(_bytes(path), np.uint8)
    if data.size == 0 or data.size % (count + CIFAR_PIXELS):
        raise ValueError(f"data: {path} must hold records of {count + CIFAR_PIXELS} bytes, it has {data.size} bytes")
    records = data.reshape(-1, count + CIFAR_PIXELS)
    return records[:, count:].reshape(-1, 3, 32, 32), _labels(records[:, count - 1], classes, path)


def cifar_python(path: Path, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Read a pickled dictionary of data [N, 3072] uint8 and labels; only lists, strings and arrays are unpickled."""
    try:
        content = _unpickle(path)
        x = content[b"data"]
        y = _labels(np.asarray(content[b"labels" if classes == 10 else b"fine_labels"]), classes, path)
    except (KeyError, TypeError, AttributeError, IndexError, EOFError, pickle.UnpicklingError, ValueError) as error:
        raise ValueError(f"data: {path} is no CIFAR-{classes} batch: {error!r}") from None
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


def _bytes(path: Path) -> bytes:
    _exists(path)
    try:
        if path.suffix == ".gz":
            with gzip.open(path) as file:
                return file.read()
        return path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:  # gzip's checks are OSErrors
        raise ValueError(f"data: cannot read {path}: {error}") from None


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


_RECONSTRUCT = np.zeros(0).__reduce__()[0]
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): lambda text, _="latin1": text.encode("latin1"),  # bytes, as Python 3 writes old protocols
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _ALLOWED[module, name]


def _unpickle(path: Path) -> dict:
    _exists(path)
    with path.open("rb") as file:
        content = _Unpickler(file, encoding="bytes").load()
    return {key.encode() if isinstance(key, str) else key: value for key, value in content.items()}
