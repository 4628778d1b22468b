"""Data sets: scikit-learn's digits and a user's own .npz file, split the same way for the same seed."""

import math
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .extras import require

TEST_SHARE = 0.3


@dataclass(frozen=True)
class Split:
    """x [N, features] float32 in [0, 1], y [N] int64 in 0..classes - 1."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: int


def load(name: str, seed: int) -> Split:
    """A stratified 70/30 split of the data set, drawn by seed.

    Args:
        name: "digits" or the path of a .npz file with x [N, ...] in [0, 1] and integer labels y [N].
        seed: of the split.

    Raises:
        ValueError: an unknown name, or a file that is damaged or holds something else (the file is named).
    """
    if name == "digits":
        bunch = require("sklearn.datasets").load_digits()
        x, y = bunch.data / 16, bunch.target
    elif name.endswith(".npz"):
        x, y = _read(Path(name))
    else:
        raise ValueError(f"data: unknown data set {name!r}; there are digits and the path of a .npz file")
    x, y = x.reshape(len(x), -1).astype(np.float32), y.astype(np.int64)
    parts = require("sklearn.model_selection").train_test_split(
        x, y, test_size=TEST_SHARE, stratify=y, random_state=seed
    )
    x_train, x_test, y_train, y_test = (torch.from_numpy(part) for part in parts)
    return Split(x_train, y_train, x_test, y_test, int(y.max()) + 1)


def _read(path: Path):
    if not path.is_file():
        raise ValueError(f"data: there is no file {path}")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"data: cannot use {path}: it is no .npz file, or a damaged one")
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = {"x", "y"} - set(archive.files)
            if missing:
                raise ValueError(f"it needs arrays x and y, it holds {', '.join(archive.files) or 'none'}")
            x, y = (_member(archive, name) for name in ("x", "y"))
        _check(x, y)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"data: cannot use {path}: {error}") from None
    return x, y


def _member(archive, name: str) -> np.ndarray:
    try:
        return archive[name]
    except ValueError as error:
        raise ValueError(f"{name} must be an array of numbers, not of objects, and undamaged") from error


def _check(x: np.ndarray, y: np.ndarray) -> None:
    if x.ndim < 2 or x[0:1].size == 0 or y.shape != x.shape[:1]:
        raise ValueError(f"it needs x [N, ...] and y [N], got x {list(x.shape)} and y {list(y.shape)}")
    if not (np.issubdtype(x.dtype, np.number) and not np.iscomplexobj(x)) or not np.issubdtype(y.dtype, np.integer):
        raise ValueError(f"x must be real numbers and y integers, got {x.dtype} and {y.dtype}")
    if not np.isfinite(x).all():
        raise ValueError("x holds NaN or Inf")
    if x.min() < 0 or x.max() > 1:
        raise ValueError(f"x must lie in [0, 1], got [{x.min()}, {x.max()}]; divide bytes by 255 first")
    labels, counts = np.unique(y, return_counts=True)
    if len(labels) < 2 or labels[0] != 0 or labels[-1] != len(labels) - 1:
        raise ValueError(f"labels must be 0..C-1 with C >= 2 and none left out, got {labels[:20].tolist()}")
    tests = math.ceil(len(y) * TEST_SHARE)
    if counts.min() < 2 or tests < len(labels):
        raise ValueError(
            "a stratified split needs 2 samples of every class and at least as many test samples as classes, "
            f"got {counts.min()} of class {labels[counts.argmin()]} and {tests} for {len(labels)} classes"
        )
