"""Data sets, each with samples in [0, 1] and a training, a validation and a test part; augmentation.

Nothing is downloaded: image data sets are read from where packages and torchvision put them, or from a given folder.
"""

import math
import zipfile
import zlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .._extras import require
from . import dataset_files as formats

TEST_SHARE = 0.3


@dataclass(frozen=True)
class Split:
    """Samples x [N, ...] float32 in [0, 1] and labels y [N] int64 in 0..classes - 1.

    Attributes:
        x_val: None without a validation part, as y_val.
        mean: Per channel, what a network should subtract, as published; None: nothing.
        std: Per channel, what it should divide by then.
        augment: Whether published training runs crop and flip the images.
    """

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: int
    x_val: Tensor | None = None
    y_val: Tensor | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    augment: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return tuple(self.x_train.shape[1:])

    @property
    def sizes(self) -> dict:
        """Numbers of samples per part, shape of a sample and number of classes, for results."""
        counts = {"train": len(self.y_train), "test": len(self.y_test)}
        counts |= {"shape": list(self.shape), "validation": 0 if self.y_val is None else len(self.y_val)}
        return counts | {"classes": self.classes}

    @cached_property
    def fingerprint(self) -> str:
        """Checksum of all samples and labels, and of which part they are in."""
        checksum = 0
        for part in (self.x_train, self.y_train, self.x_test, self.y_test, self.x_val, self.y_val):
            if part is not None:
                checksum = zlib.crc32(part.contiguous().numpy().data, checksum)
        return f"{checksum:08x}"


def load(name: str, seed: int, *, folder: Path | str | None = None, validation: float = 0.0) -> Split:
    """Return a data set by name, split by seed.

    Args:
        name: "digits" (scikit-learn's, [1, 8, 8]), the path of a .npz file with x [N, ...] in [0, 1] and integer labels
            y [N] (both split 70/30 by class), or one of FOLDERS, whose own test part is kept: "mnist",
            "fashion-mnist", "kmnist" ([1, 28, 28]), "cifar10", "cifar100", "svhn" ([3, 32, 32]).
        seed: Seed of the splits.
        folder: Folder with the files of a data set of FOLDERS, as published; without one they are looked for below
            ROOTS.
        validation: Share in [0, 1) of the training part that becomes the validation part, by class.

    Raises:
        ValueError: An unknown name, missing files (the message shows which are looked for), or a file that is damaged
            or holds something else (the file is named).
    """
    if not 0 <= validation < 1:
        raise ValueError(f"data: validation must be in [0, 1), got {validation}")
    if name in FOLDERS:
        split = FOLDERS[name](name, None if folder is None else Path(folder))
        if len(split.y_train.unique()) < 2:
            raise ValueError(f"data: the training part of {name} must have at least 2 classes, got 1")
    elif name == "digits" or name.endswith(".npz"):
        if name == "digits":
            bunch = require("sklearn.datasets").load_digits()
            x, y = bunch.images[:, None] / 16, bunch.target
        else:
            x, y = _read(Path(name))
        x_train, x_test, y_train, y_test = _divide(x.astype(np.float32), y.astype(np.int64), TEST_SHARE, seed)
        split = Split(x_train, y_train, x_test, y_test, int(y.max()) + 1)
    else:
        raise ValueError(
            f"data: unknown data set {name!r}; there are digits, {', '.join(FOLDERS)} and the path of a .npz file"
        )
    if validation:
        parts = _divide(split.x_train.numpy(), split.y_train.numpy(), validation, seed)
        split = replace(split, **dict(zip(("x_train", "x_val", "y_train", "y_val"), parts, strict=True)))
    return split


def balanced(y: Tensor, count: int | None) -> Tensor:
    """Return the indices, ascending, of the first samples of each class, `count` in all (None: of all samples) and as
    many of each class as there are, to one sample."""
    place = torch.zeros_like(y)  # among the samples of its class
    for label in y.unique():
        members = y == label
        place[members] = torch.arange(int(members.sum()), device="cpu")
    order = (place * (int(y.max()) + 1) + y).argsort()
    return order[:count].sort().values


def _divide(x: np.ndarray, y: np.ndarray, share: float, seed: int) -> list[Tensor]:
    """Split x and y in two parts each, the second a share of the samples, with the classes in proportion."""
    train_test_split = require("sklearn.model_selection").train_test_split
    try:
        parts = train_test_split(x, y, test_size=share, stratify=y, random_state=seed)
    except ValueError as error:
        raise ValueError(f"data: cannot set aside {share:g} of {len(y)} samples: {error}") from None
    return [torch.from_numpy(np.ascontiguousarray(part)) for part in parts]


# -------------------------------------------------------------------------------------- published image data sets

ROOTS = (Path("/usr/share/datasets"), Path("data"), Path("~/data"))  # of Debian's packages; where torchvision downloads
_NORM = {  # mean and standard deviation of the channels, as the published training runs take them
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
}
_IDX = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST"}
_CIFAR = {
    "cifar10": (
        10,
        ("cifar-10-batches-bin", tuple(f"data_batch_{i}.bin" for i in range(1, 6)), ("test_batch.bin",)),
        ("cifar-10-batches-py", tuple(f"data_batch_{i}" for i in range(1, 6)), ("test_batch",)),
    ),
    "cifar100": (
        100,
        ("cifar-100-binary", ("train.bin",), ("test.bin",)),
        ("cifar-100-python", ("train",), ("test",)),
    ),
}


def _mnist(name: str, folder: Path | None) -> Split:
    for place in _folders(name, folder):
        parts = []
        for part in ("train", "t10k"):
            pair = [_plain_or_gz(place / f"{part}-{what}-ubyte") for what in ("images-idx3", "labels-idx1")]
            parts.append(pair if all(pair) else None)
        if all(parts):
            (x, y), (x_test, y_test) = (formats.mnist(*pair) for pair in parts)
            return _whole(name, x, y, x_test, y_test, 10)
    raise _nothing(name, folder)


def _plain_or_gz(path: Path) -> Path | None:
    return next((p for p in (path, path.with_name(path.name + ".gz")) if p.is_file()), None)


def _cifar(name: str, folder: Path | None) -> Split:
    classes, *layouts = _CIFAR[name]
    for (_, *parts), read in zip(layouts, (formats.cifar_binary, formats.cifar_python), strict=True):
        for place in _folders(name, folder):
            if all((place / file).is_file() for part in parts for file in part):
                pairs = ([read(place / file, classes) for file in part] for part in parts)
                (x, y), (x_test, y_test) = (map(np.concatenate, zip(*pair, strict=True)) for pair in pairs)
                return _whole(name, x, y, x_test, y_test, classes, augment=True)
    raise _nothing(name, folder)


def _svhn(name: str, folder: Path | None) -> Split:
    for place in _folders(name, folder):
        if all((place / f"{part}_32x32.mat").is_file() for part in ("train", "test")):
            (x, y), (x_test, y_test) = (formats.svhn(place / f"{part}_32x32.mat") for part in ("train", "test"))
            return _whole(name, x, y, x_test, y_test, 10)
    raise _nothing(name, folder)


def _whole(name: str, x, y, x_test, y_test, classes: int, augment: bool = False) -> Split:
    if x.shape[1:] != x_test.shape[1:]:
        raise ValueError(f"data: {name}: training images {list(x.shape[1:])}, test images {list(x_test.shape[1:])}")
    x, x_test = (torch.from_numpy(np.array(part)).float().div_(255) for part in (x, x_test))
    mean, std = _NORM.get(name, (None, None))
    return Split(x, torch.from_numpy(y), x_test, torch.from_numpy(y_test), classes, None, None, mean, std, augment)


FOLDERS = dict.fromkeys(_IDX, _mnist) | dict.fromkeys(_CIFAR, _cifar) | {"svhn": _svhn}


def _folders(name: str, folder: Path | None) -> list[Path]:
    """Return the folders to look in: the given one and where torchvision and the archives put the files in it, or those
    places below ROOTS that are this data set's alone."""
    inside = [f"{_IDX[name]}/raw"] if name in _IDX else [place for place, *_ in _CIFAR.get(name, (0,))[1:]]
    if folder is not None:
        return [folder / place for place in ("", *(["raw"] if name in _IDX else []), *inside)]
    own = ["", name] if name == "svhn" else [name, *inside, *(f"{name}/{place}" for place in inside)]
    return [root.expanduser() / place for root in ROOTS for place in own]


def _tree(name: str) -> str:
    if name in _IDX:
        files = [f"{part}-{what}-ubyte" for part in ("train", "t10k") for what in ("images-idx3", "labels-idx1")]
        return f"FOLDER/ or FOLDER/raw/ or FOLDER/{_IDX[name]}/raw/: {', '.join(files)}, each plain or .gz"
    if name == "svhn":
        return "FOLDER/: train_32x32.mat, test_32x32.mat"
    return " or ".join(f"FOLDER/ or FOLDER/{place}/: {', '.join(a + b)}" for place, a, b in _CIFAR[name][1:])


def _nothing(name: str, folder: Path | None) -> ValueError:
    if folder is None:
        download = f"torchvision.datasets.{_IDX.get(name, name.upper())}('data', download=True)"
        if name == "svhn":
            download = "torchvision.datasets.SVHN('data', split, download=True) for both splits"
        install = "`apt-get install dataset-fashion-mnist` on Debian and Ubuntu, or " if name == "fashion-mnist" else ""
        return ValueError(
            f"data: {name} is not here, neither below {', '.join(map(str, ROOTS))} nor in a given folder; to get it:"
            f" {install}{download}, or give the folder that has its files, {_tree(name)}"
        )
    there = sorted(p.name for p in folder.iterdir())[:10] if folder.is_dir() else None
    found = "there is no such folder" if there is None else f"it holds {', '.join(there) or 'nothing'}"
    return ValueError(f"data: the files of {name} are not in {folder} ({found}); it takes {_tree(name)}")


# ------------------------------------------------------------------------------------------------ a user's arrays


def _read(path: Path):
    if not path.is_file():
        raise ValueError(f"data: there is no file {path}")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"data: cannot use {path}: it is no .npz file, or a damaged one")
    try:
        with np.load(path, allow_pickle=False) as archive:
            if not {"x.npy", "y.npy"} <= set(archive.zip.namelist()):
                raise ValueError(f"it needs arrays x and y, it holds {', '.join(archive.files) or 'none'}")
            x, y = (_member(archive, name) for name in ("x", "y"))
        _check(x, y)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"data: cannot use {path}: {error}") from None
    return x, y


def _member(archive, name: str) -> np.ndarray:
    """Return an array of the archive, whose size is checked against what is there before anything is allocated."""
    there = archive.zip.getinfo(f"{name}.npy").file_size
    if there > formats.LIMIT:
        raise ValueError(f"{name} has {there} bytes unpacked, more than the limit of {formats.LIMIT}")
    try:
        with archive.zip.open(f"{name}.npy") as file:
            version = np.lib.format.read_magic(file)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = header(file)
        if math.prod(shape) * dtype.itemsize > there:
            raise ValueError("its header asks for more than there is")
        return archive[name]
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
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


# ---------------------------------------------------------------------------------------------------- augmentation

PAD = 4  # pixels on each side, as published for CIFAR


def crop_and_flip(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Pad each image with 4 zeros on every side, crop it to its size at random, and mirror it half of the time.

    Args:
        x: Images [N, C, H, W].
        generator: Source of the draws, on the CPU.
    """
    n, _, height, width = x.shape
    whole = {"dtype": torch.int64, "device": "cpu"}
    down, right = torch.randint(0, 2 * PAD + 1, (2, n, 1), generator=generator, **whole)
    mirrored = torch.rand(n, 1, dtype=torch.float32, device="cpu", generator=generator) < 0.5
    rows = down + torch.arange(height, **whole)
    across = torch.arange(width, **whole)
    columns = right + torch.where(mirrored, across.flip(0), across)
    padded = F.pad(x, [PAD] * 4).movedim(1, -1)
    image = torch.arange(n, **whole).view(n, 1, 1)
    rows, columns = rows[:, :, None].to(x.device), columns[:, None, :].to(x.device)
    return padded[image.to(x.device), rows, columns].movedim(-1, 1)
