"""Readers of published data sets, on small files in their formats, whole and damaged; splits; augmentation."""

import gzip
import pickle
import struct

import numpy as np
import pytest
import torch
from helpers.data_files import write_npz
from scipy.io import savemat

from condlr_ext.experiments import data
from condlr_ext.experiments import dataset_files as formats

RNG = np.random.default_rng(0)


def images(n, *shape):
    return RNG.integers(0, 256, (n, *shape), dtype=np.uint8)


def labels(n, classes=10):
    return (np.arange(n) % classes).astype(np.uint8)


def idx_bytes(array):
    return b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape) + array.tobytes()


def write_mnist(folder, suffix=""):
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for part, n in (("train", 40), ("t10k", 20)):
        arrays[part] = images(n, 28, 28), labels(n)
        for what, array in zip(("images-idx3", "labels-idx1"), arrays[part], strict=True):
            content = idx_bytes(array)
            path = folder / f"{part}-{what}-ubyte{suffix}"
            path.write_bytes(gzip.compress(content) if suffix else content)
    return arrays


def write_cifar(folder, classes, binary):
    folder.mkdir(parents=True, exist_ok=True)
    (_, *parts) = data._CIFAR[f"cifar{classes}"][1 if binary else 2]
    arrays = []
    for files in parts:
        kept = []
        for file in files:
            x, y = images(20, 3072), labels(20, classes)
            kept.append((x, y))
            if binary:
                columns = [y[:, None], x] if classes == 10 else [y[:, None] // 5, y[:, None], x]
                (folder / file).write_bytes(np.concatenate(columns, 1).tobytes())
            else:
                content = {"data": x, "labels" if classes == 10 else "fine_labels": y.tolist(), "batch_label": "b"}
                (folder / file).write_bytes(pickle.dumps(content, protocol=2))
        arrays.append(tuple(np.concatenate(part) for part in zip(*kept, strict=True)))
    return arrays


def same(split, train, test, shape):
    for x, y, (want_x, want_y) in ((split.x_train, split.y_train, train), (split.x_test, split.y_test, test)):
        assert x.dtype == torch.float32 and y.dtype == torch.int64
        np.testing.assert_array_equal(x.numpy(), want_x.reshape(-1, *shape).astype(np.float32) / np.float32(255))
        np.testing.assert_array_equal(y.numpy(), want_y)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("place", ["", "raw", "FashionMNIST/raw"])
def test_mnist(tmp_path, suffix, place):
    arrays = write_mnist(tmp_path / place, suffix)
    split = data.load("fashion-mnist", 0, folder=tmp_path)
    same(split, arrays["train"], arrays["t10k"], (1, 28, 28))
    assert split.classes == 10 and split.shape == (1, 28, 28) and split.mean is None and not split.augment


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("deep", [True, False])
def test_cifar(tmp_path, classes, binary, deep):
    folder = tmp_path / data._CIFAR[f"cifar{classes}"][1 if binary else 2][0] if deep else tmp_path
    train, test = write_cifar(folder, classes, binary)
    split = data.load(f"cifar{classes}", 0, folder=tmp_path)
    same(split, train, test, (3, 32, 32))
    assert split.classes == classes and split.augment and len(split.mean) == len(split.std) == 3


def test_cifar_takes_the_binary_files_where_both_are(tmp_path):
    train, test = write_cifar(tmp_path / "cifar-10-batches-bin", 10, True)
    write_cifar(tmp_path / "cifar-10-batches-py", 10, False)
    same(data.load("cifar10", 0, folder=tmp_path), train, test, (3, 32, 32))


def test_svhn(tmp_path):
    arrays = []
    for part in ("train", "test"):
        x, y = images(20, 32, 32, 3), labels(20)
        stored = np.where(y == 0, 10, y)[:, None]
        savemat(tmp_path / f"{part}_32x32.mat", {"X": x.transpose(1, 2, 3, 0), "y": stored})
        arrays.append((x.transpose(0, 3, 1, 2), y))
    same(data.load("svhn", 0, folder=tmp_path), *arrays, (3, 32, 32))


@pytest.fixture
def roots(tmp_path, monkeypatch):
    """Roots for data sets without a folder, instead of those of the machine."""
    found = tmp_path / "packages", tmp_path / "torchvision"
    monkeypatch.setattr(data, "ROOTS", found)
    return found


@pytest.mark.parametrize("root, place", [(0, "fashion-mnist"), (1, "FashionMNIST/raw")])
def test_without_a_folder_packages_and_torchvision_are_looked_at(roots, root, place):
    write_mnist(roots[1] / "MNIST/raw")
    write_mnist(roots[0])  # may be any of its family
    arrays = write_mnist(roots[root] / place, ".gz")
    same(data.load("fashion-mnist", 0), arrays["train"], arrays["t10k"], (1, 28, 28))
    train, test = write_cifar(roots[1] / "cifar-100-python", 100, False)
    same(data.load("cifar100", 0), train, test, (3, 32, 32))


@pytest.mark.parametrize(
    "name, advice",
    [
        ("fashion-mnist", r"`apt-get install dataset-fashion-mnist`.*, or torchvision.datasets.FashionMNIST\('data', "),
        ("kmnist", r"to get it: torchvision.datasets.KMNIST\('data', download=True\), or give the folder"),
        ("cifar10", r"torchvision.datasets.CIFAR10\('data'"),
        ("svhn", "SVHN"),
    ],
)
def test_a_data_set_that_is_nowhere_is_an_error_that_says_how_to_get_it(roots, name, advice):
    with pytest.raises(ValueError, match=f"data: {name} is not here, neither below .*/packages, .*{advice}.*FOLDER/"):
        data.load(name, 0)


class Evil:
    def __reduce__(self):
        return print, ("run",)


def test_pickles_cannot_call(tmp_path, capsys):
    write_cifar(tmp_path, 10, False)
    (tmp_path / "data_batch_3").write_bytes(pickle.dumps({"data": Evil(), "labels": [0]}))
    with pytest.raises(ValueError, match=r"data_batch_3 is no CIFAR-10 batch.*builtins\.print"):
        data.load("cifar10", 0, folder=tmp_path)
    assert capsys.readouterr().out == ""


def damage(path, how):
    content = path.read_bytes()
    path.write_bytes({"truncated": content[:-7], "longer": content + b"x", "empty": b"", "foreign": b"hello"}[how])


@pytest.mark.parametrize("how", ["truncated", "longer", "empty", "foreign"])
@pytest.mark.parametrize(
    "name, write, file",
    [
        ("mnist", write_mnist, "train-images-idx3-ubyte"),
        ("mnist", write_mnist, "t10k-labels-idx1-ubyte"),
        ("mnist", lambda folder: write_mnist(folder, ".gz"), "train-images-idx3-ubyte.gz"),
        ("cifar10", lambda folder: write_cifar(folder, 10, True), "data_batch_2.bin"),
        ("cifar100", lambda folder: write_cifar(folder, 100, False), "train"),
    ],
    ids=["images", "labels", "gz", "binary", "pickle"],
)
def test_damaged_files_are_named(tmp_path, name, write, file, how):
    write(tmp_path)
    if how == "longer" and file in ("train", "train-images-idx3-ubyte.gz"):
        pytest.skip("what follows the end of a pickle or gzip member is not read")
    damage(tmp_path / file, how)
    with pytest.raises(ValueError, match=file):
        data.load(name, 0, folder=tmp_path)


def test_labels_must_be_in_range(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.full(40, 10, np.uint8)))
    with pytest.raises(ValueError, match=r"labels-idx1-ubyte must hold labels in 0\.\.9, got 10\.\.10"):
        data.load("mnist", 0, folder=tmp_path)


@pytest.mark.parametrize(
    "labels", [[0.5, 1.5], ["a", "b"], [None, None], [[0], [1]], 3, []], ids=["floats", "texts", "objects", "2-D", "0-D", "none"]
)  # fmt: skip
def test_labels_must_be_integers(tmp_path, labels):
    write_cifar(tmp_path, 10, False)
    path = next(tmp_path.rglob("data_batch_2"))
    path.write_bytes(pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": labels}, protocol=2))
    with pytest.raises(ValueError, match="data_batch_2"):
        data.load("cifar10", 0, folder=tmp_path)


def test_labels_that_unfold_to_billions(tmp_path):
    write_cifar(tmp_path, 10, False)
    labels = [0, 1]
    for _ in range(40):
        labels = [labels, labels]
    path = next(tmp_path.rglob("data_batch_2"))
    path.write_bytes(pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": labels}, protocol=2))
    with pytest.raises(ValueError, match="data_batch_2 .* labels must be a list of integers, got list"):
        data.load("cifar10", 0, folder=tmp_path)


def test_one_class_is_no_training_part(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.zeros(40, np.uint8)))
    with pytest.raises(ValueError, match="the training part of mnist must have at least 2 classes, got 1"):
        data.load("mnist", 0, folder=tmp_path)


def test_no_mat_file(tmp_path):
    for part in ("train", "test"):
        (tmp_path / f"{part}_32x32.mat").write_bytes(b"MATLAB" * 30)
    with pytest.raises(ValueError, match=r"train_32x32\.mat is no SVHN file"):
        data.load("svhn", 0, folder=tmp_path)


@pytest.mark.parametrize("name", data.FOLDERS)
def test_missing_files_show_what_is_looked_for(tmp_path, name):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=rf"{name} are not in .*it holds notes\.txt.*FOLDER/"):
        data.load(name, 0, folder=tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        data.load(name, 0, folder=tmp_path / "none")


def test_validation_is_cut_off_the_training_part():
    whole, split = data.load("digits", 0), data.load("digits", 0, validation=0.25)
    assert split.x_train.shape == (942, 1, 8, 8) and split.x_val.shape == (315, 1, 8, 8)
    assert torch.equal(split.x_test, whole.x_test) and torch.equal(split.y_test, whole.y_test)
    together = torch.cat([split.x_train, split.x_val]).flatten(1)
    assert sorted(map(tuple, together.tolist())) == sorted(map(tuple, whole.x_train.flatten(1).tolist()))
    assert (torch.bincount(split.y_val) - torch.bincount(whole.y_train) / 4).abs().max() < 1
    assert whole.x_val is None
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"validation must be in \[0, 1\)"):
            data.load("digits", 0, validation=share)
    with pytest.raises(ValueError, match="cannot set aside 0.001 of 1257 samples"):
        data.load("digits", 0, validation=0.001)


def test_balanced_samples():
    y = torch.tensor([0, 0, 0, 2, 1, 0, 2, 1, 1, 0])
    assert data.balanced(y, 6).tolist() == [0, 1, 3, 4, 6, 7]
    assert data.balanced(y, 8).tolist() == [0, 1, 2, 3, 4, 6, 7, 8]  # class 2 has only two
    assert data.balanced(y, None).tolist() == data.balanced(y, 99).tolist() == list(range(10))
    assert data.balanced(y, 2).tolist() == [0, 4]


def test_crop_and_flip():
    """Every image is a window of its padded self, as it is or mirrored; all offsets and both sides come up."""
    x = torch.rand(2000, 2, 6, 5)
    out = data.crop_and_flip(x, torch.Generator().manual_seed(0))
    assert out.shape == x.shape
    padded = torch.nn.functional.pad(x, [4] * 4)
    windows = padded.unfold(2, 6, 1).unfold(3, 5, 1).permute(2, 3, 0, 1, 4, 5)  # [9, 9, N, C, H, W]
    hits = torch.stack([(w == out).flatten(3).all(3) for w in (windows, windows.flip(-1))])
    assert hits.any(0).any(0).any(0).all()
    counts = hits.sum(3)
    assert (counts > 0).all() and 900 < counts[0].sum() < 1130
    again = data.crop_and_flip(x, torch.Generator().manual_seed(0))
    assert torch.equal(out, again)


def test_idx_of_any_dimension(tmp_path):
    array = images(3, 2, 4, 5)
    (tmp_path / "a").write_bytes(idx_bytes(array))
    np.testing.assert_array_equal(formats.idx(tmp_path / "a"), array)


def test_idx_cut_anywhere(tmp_path):
    content = idx_bytes(images(3, 2, 4))
    for end in range(len(content)):
        (tmp_path / "a").write_bytes(content[:end])
        with pytest.raises(ValueError, match="/a is"):
            formats.idx(tmp_path / "a")


# ------------------------------------------------------------------------------------------ digits and arrays


def test_digits_are_split_by_class_and_seed():
    split = data.load("digits", 0)
    assert (len(split.y_train), len(split.y_test), split.classes) == (1257, 540, 10)
    assert split.shape == (1, 8, 8) and split.x_train.dtype == torch.float32
    assert split.x_train.min() == 0 and split.x_train.max() == 1
    share = split.y_test.bincount() / (split.y_test.bincount() + split.y_train.bincount())
    assert (share - 0.3).abs().max() < 0.01  # a whole sample of about 178
    again, other = data.load("digits", 0), data.load("digits", 1)
    assert torch.equal(again.x_train, split.x_train) and not torch.equal(other.x_train, split.x_train)


def test_npz(tmp_path):
    loaded = data.load(str(write_npz(tmp_path / "mine.npz")), 0)
    assert loaded.classes == 3 and loaded.x_train.shape == (42, 2, 3) and loaded.x_test.shape == (18, 2, 3)


def arrays(**change):
    return {"x": np.full((20, 3), 0.5), "y": np.arange(20) % 2} | change


@pytest.mark.parametrize(
    "content, message",
    [
        ({"x": np.zeros((20, 3))}, "needs arrays x and y, it holds x"),
        (arrays(x=np.zeros(20)), r"needs x \[N, ...\] and y \[N\], got x \[20\]"),
        (arrays(x=np.zeros((20, 0))), r"got x \[20, 0\]"),
        (arrays(y=np.zeros(19, int)), r"and y \[19\]"),
        (arrays(y=np.zeros(20)), "y integers, got float64 and float64"),
        (arrays(x=np.zeros((20, 3), complex)), "x must be real numbers"),
        (arrays(x=np.full((20, 3), np.nan)), "x holds NaN or Inf"),
        (arrays(x=np.full((20, 3), 255, np.uint8)), r"x must lie in \[0, 1\], got \[255, 255\]"),
        (arrays(y=np.arange(20) % 2 + 1), r"labels must be 0..C-1 .* got \[1, 2\]"),
        (arrays(y=np.zeros(20, int)), "C >= 2"),
        (arrays(y=(np.arange(20) == 3).astype(int)), "2 samples of every class .* got 1 of class 1"),
        (arrays(x=np.array([[{}]] * 20, dtype=object)), "x must be an array of numbers, not of objects"),
    ],
)
def test_unusable_arrays(tmp_path, content, message):
    path = tmp_path / "bad.npz"
    np.savez(path, **content)
    with pytest.raises(ValueError, match=f"cannot use {path}: .*{message}"):
        data.load(str(path), 0)


def test_members_of_other_names_are_no_arrays(tmp_path):
    path = write_npz(tmp_path / "a.npz")
    path.write_bytes(path.read_bytes().replace(b"x.npy", b"x\0npy"))
    with pytest.raises(ValueError, match="a.npz: it needs arrays x and y, it holds"):
        data.load(str(path), 0)


def test_damaged_and_missing_files(tmp_path):
    good = write_npz(tmp_path / "good.npz").read_bytes()
    flipped = bytearray(good)
    flipped[100:140] = bytes(40)
    for name, content in {
        "cut": good[:200],
        "noise": b"no archive",
        "empty": b"",
        "flipped": flipped,
    }.items():
        path = tmp_path / f"{name}.npz"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"cannot use {path}"):
            data.load(str(path), 0)
    with pytest.raises(ValueError, match="there is no file .*absent.npz"):
        data.load(str(tmp_path / "absent.npz"), 0)
    with pytest.raises(
        ValueError, match="unknown data set 'imagenet'; there are digits, mnist, .* and the path of a .npz"
    ):
        data.load("imagenet", 0)
