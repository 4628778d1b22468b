"""Damaged and lying files of every format that is read: the documented error, or something that works."""

import contextlib
import copy
import gzip
import io
import json
import math
import os
import pickle
import struct
import tempfile
import time
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import nn

import condlr_ext
from condlr_ext import cli
from condlr_ext.errors import CheckpointError, NonFiniteError, RankError
from condlr_ext.experiments import data, dataset_files
from condlr_ext.experiments.checkpoint import load_checkpoint
from condlr_ext.experiments.config import TrainConfig
from condlr_ext.experiments.networks import build
from condlr_ext.optim import CondLRAdamW, CondLRSGD

from .case import Case
from .mutations import changed_json, damaged

SECONDS = 10.0  # of the processor, for one file


def run(case: Case) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        kind = case.random.choice(list(KINDS))
        for _ in range(10):
            case.counts["files"] += 1
            KINDS[kind](case, Path(folder))
            if case.faults:
                return


def attempt(case: Case, path: Path, errors: tuple, read, about: str):
    """Return what reading gives, or None after one of the errors, which name the file in one line."""
    start = time.process_time()
    try:
        return read()
    except errors as error:
        text = str(error)
        case.counts["refused"] += 1
        case.holds("the error names the file", path.name in text, f"{text[:300]}; {about}")
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        case.faults.append(f"undocumented {type(error).__name__}: {text}; {about}")
    finally:
        case.at_most("seconds of the processor", time.process_time() - start, SECONDS, about)
    return None


def command(case: Case, arguments: list[str], readable: bool, about: str) -> None:
    """Run the command line, which says what is wrong with a file in one line."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(arguments)
    case.counts["commands"] += 1
    case.holds("exit code 0 or 2", code == 0 if readable else code == 2, f"{code} {err.getvalue()[:300]}; {about}")
    lines = err.getvalue().splitlines()
    case.holds("an error of one line", not lines if readable else len(lines) == 1, f"{lines[:3]}; {about}")


# ------------------------------------------------------------------------------------------------ checkpoints


def small() -> nn.Sequential:
    low_rank = condlr_ext.nn.LowRankLinear
    return nn.Sequential(low_rank(12, 16, rank=5), nn.ReLU(), low_rank(16, 9, rank=3), nn.ReLU(), nn.Linear(9, 4))


OPTIMIZERS = {
    "CondLRSGD": lambda model: CondLRSGD(model, 0.1, momentum=0.9, tau=0.2),
    "CondLRAdamW": lambda model: CondLRAdamW(model, 0.01, tau=0.2),
    "SGD": lambda model: torch.optim.SGD(model.named_parameters(), 0.1, momentum=0.9),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), 0.01),
}


def trained(kind: str) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    model = small()
    optimizer = OPTIMIZERS[kind](model)
    step(model, optimizer)
    return model, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.linspace(0, 1, 72).view(6, 12)).square().mean().backward()
        optimizer.step()


@cache
def saved(kind: str) -> tuple[bytes, tuple]:
    """Return the bytes of a checkpoint, and a model with an optimizer to load it into."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.safetensors"
        model, optimizer = trained(kind)
        condlr_ext.save(model, path, optimizer, extra={"epoch": 3, "rng": torch.get_rng_state(), "best": (0.5, None)})
        return path.read_bytes(), (model, optimizer)


def mangled_tensors(case: Case, content: bytes) -> tuple[bytes, str]:
    """Return a safetensors file, damaged or with lies in its header, its metadata or the values in them."""
    if case.maybe(0.5):
        length = 8 + int.from_bytes(content[:8], "little")
        return damaged(case, content, length if case.maybe(0.8) else None)
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    metadata = header.get("__metadata__", {})
    texts = [key for key, value in metadata.items() if value[:1] in "[{"]
    if texts and case.maybe(0.75):
        key = "state" if "state" in texts and case.maybe(0.7) else case.random.choice(texts)
        value, about = changed_json(case, json.loads(metadata[key]))
        metadata[key] = dumped(value)
        about = f"{key} of the metadata: {about}"
    else:
        header, about = changed_json(case, header)
    text = dumped(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + content[8 + length :], about


def dumped(value) -> str:
    try:
        return json.dumps(value)
    except RecursionError:
        return "[" * 5000 + "]" * 5000


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def checkpoint(case: Case, folder: Path) -> None:
    kind = case.random.choice(list(OPTIMIZERS))
    content, (model, optimizer) = saved(kind)
    content, about = mangled_tensors(case, content)
    about = f"checkpoint of {kind}, {about}"
    path = folder / "case.safetensors"
    path.write_bytes(content)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    errors = (CheckpointError, RankError, NonFiniteError)
    found = attempt(case, path, errors, lambda: condlr_ext.load(model, path, optimizer), about)
    if found is None:
        unchanged = same(before[0], model.state_dict()) and same(before[1], optimizer.state_dict())
        case.holds("an error leaves model and optimizer unchanged", unchanged, about)
    else:
        case.counts["loaded"] += 1
        step_works(case, model, optimizer, about)
    model.load_state_dict(before[0])
    optimizer.load_state_dict(before[1])


def step_works(case: Case, model: nn.Module, optimizer: torch.optim.Optimizer, about: str) -> None:
    try:
        step(model, optimizer)
    except Exception as error:
        case.faults.append(f"loaded, but then {type(error).__name__} in a step: {str(error)[:300]}; {about}")


# ------------------------------------------------------------------------------------------------ LoRA


@cache
def saved_lora() -> tuple[bytes, bytes]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))
    adapters = condlr_ext.add_adapters(model, rank=2)
    for adapter in adapters.values():
        nn.init.normal_(adapter.delta.S)
    with tempfile.TemporaryDirectory() as folder:
        condlr_ext.save_lora(model, folder)
        return (Path(folder) / "adapter_model.safetensors").read_bytes(), (
            Path(folder) / "adapter_config.json"
        ).read_bytes()


def lora(case: Case, folder: Path) -> None:
    weights, config = saved_lora()
    about = ""
    if case.maybe(0.5):
        weights, about = mangled_tensors(case, weights)
    if not about or case.maybe(0.2):
        if case.maybe(0.3):
            config, more = damaged(case, config)
        else:
            value, more = changed_json(case, json.loads(config))
            config = dumped(value).encode("utf-8", "surrogatepass")
        about += f" config: {more}"
    (folder / "adapter_model.safetensors").write_bytes(weights)
    (folder / "adapter_config.json").write_bytes(config)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))
    before = copy.deepcopy(model.state_dict())
    about = f"LoRA, {about}"
    found = attempt(case, folder, (CheckpointError, ValueError), lambda: condlr_ext.load_lora(model, folder), about)
    if found is None:
        case.holds("an error leaves the model unchanged", same(before, model.state_dict()), about)
        return
    case.counts["loaded"] += 1
    y = model(torch.linspace(0, 1, 72).view(6, 12))
    if y.isfinite().all():
        step_works(case, model, CondLRSGD(model, 0.01, tau=math.inf), about)


# ------------------------------------------------------------------------------- the experiments' files


@cache
def saved_run() -> bytes:
    """Return the bytes of a checkpoint of `condlr train`, without training."""
    extra = {
        "run": "condlr:tau=0.1,rank=3", "ranks": {"1": 3, "3": 3}, "tau": 0.1, "seed": 0,
        "attack": {"eps": [0.1], "attacks": ["fgsm"], "steps": 2, "restarts": 1, "seed": 0, "batch_size": 8},
        "network": "mlp", "shape": [1, 4, 4], "classes": 3, "mean": None, "std": None, "data": "digits",
        "validation": 0.0, "test": True, "fingerprint": "0",
    }  # fmt: skip
    torch.manual_seed(0)
    model = build("mlp", [1, 4, 4], 3)
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][:-1]
    extra["ranks"] = dict.fromkeys(layers, 3)
    condlr_ext.factorize(model, rank=extra["ranks"])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.safetensors"
        condlr_ext.save(model, path, tau=0.1, extra=extra)
        load_checkpoint(path)  # it is one
        return path.read_bytes()


def run_checkpoint(case: Case, folder: Path) -> None:
    content, about = mangled_tensors(case, saved_run())
    path = folder / "case.safetensors"
    path.write_bytes(content)
    about = f"checkpoint of a run, {about}"
    found = attempt(case, path, (CheckpointError, RankError, NonFiniteError), lambda: load_checkpoint(path), about)
    if case.maybe(0.2):
        command(case, ["inspect", str(path)], found is not None, about)
    if found is not None:
        case.counts["loaded"] += 1
        model, metadata = found
        case.holds("it runs", model(torch.zeros(2, *metadata["shape"])).shape == (2, metadata["classes"]), about)


@cache
def cifar() -> bytes:
    random = np.random.default_rng(0)
    x = random.integers(0, 256, (4, 3072), dtype=np.uint8)
    return pickle.dumps({b"data": x, b"labels": [3, 1, 0, 2], b"filenames": [b"a", b"b", b"c", b"d"]}, 2)


def cifar_pickle(case: Case, folder: Path) -> None:
    content = cifar()
    start = content.index(b"data") - 100 if case.maybe(0.5) else 0
    edges = [*range(max(start, 0), 140), *range(len(content) - 120, len(content))]  # between are the pixels
    content, about = damaged(case, content, places=edges if case.maybe(0.9) else None)
    path = folder / "data_batch_1"
    path.write_bytes(content)
    data_file(case, path, lambda: dataset_files.cifar_python(path, 10), f"CIFAR, {about}")


def data_file(case: Case, path: Path, read, about: str) -> None:
    """Read x [N, C, H, W] bytes and y [N] labels."""
    if (found := attempt(case, path, (ValueError,), read, about)) is None:
        return
    x, y = found
    case.counts["loaded"] += 1
    case.holds("images and labels", x.ndim == 4 and x.dtype == np.uint8 and y.shape == x.shape[:1], about)
    case.holds("labels in their range", y.min() >= 0 and y.max() < 10, about)


def idx(case: Case, folder: Path) -> None:
    packed = case.maybe(0.6)
    ending = ".gz" if packed else ""
    images, labels = folder / f"images{ending}", folder / f"labels{ending}"
    contents = {
        images: b"\0\0\x08\x03" + struct.pack(">iii", 6, 5, 4) + bytes(range(120)),
        labels: b"\0\0\x08\x01" + struct.pack(">i", 6) + bytes([0, 1, 2, 3, 9, 5]),
    }
    victim, about = case.random.choice([images, labels]), ""
    for path, content in contents.items():
        if path == victim and (case.maybe(0.7) or not packed):
            content, about = damaged(case, content, 16 if case.maybe(0.7) else None)
            if case.maybe(0.05):
                content, about = content + bytes(20_000_000), f"{about}, 20 MB more"
        content = gzip.compress(content, 1) if packed else content
        if path == victim and not about:
            content, about = damaged(case, content)
        path.write_bytes(content)
    about = f"{victim.name}, {about}"
    data_file(case, victim, lambda: dataset_files.mnist(images, labels), about)


@cache
def arrays(compressed: bool) -> bytes:
    file, y = io.BytesIO(), np.arange(60) % 3
    x = np.random.default_rng(0).random((60, 2, 3), dtype=np.float32)
    (np.savez_compressed if compressed else np.savez)(file, x=x, y=y)
    return file.getvalue()


def npz(case: Case, folder: Path) -> None:
    path = folder / "case.npz"
    content = arrays(case.maybe(0.5))
    headers = [*range(300), *range(len(content) - 900, len(content))]
    content, about = damaged(case, content, places=headers if case.maybe(0.6) else None)
    path.write_bytes(content)
    about = f"npz, {about}"
    if (found := attempt(case, path, (ValueError,), lambda: data.load(str(path), 0), about)) is not None:
        case.counts["loaded"] += 1
        case.holds("in [0, 1]", 0 <= found.x_train.min() and found.x_train.max() <= 1, about)


TOML = b"""data = "digits"
network = "mlp"
runs = ["dense", "condlr:tau=0.1,rank=8", {method = "vanilla", rank = 4, lr = 0.1}]
seeds = [0, 1]
epochs = 2
batch_size = 32
lr = 0.2
momentum = 0.3
drop_at = [0.5, 0.8]
validation = 0.1
eps = [0.05, 0.1]
attacks = ["fgsm", "pgd-ce"]
out = "runs/x"
"""
VALUES = (
    b"-1", b"0", b"1e400", b"nan", b"inf", b'"x"', b"[]", b"{}", b"true", b"9" * 400, b"[[[]]]", b"1979-05-27", b'""',
    b"[1, 2, 3]", b'"\\u0000"', b"-0.0", b"1e-400", b"[" * 2000 + b"]" * 2000, b"0x" + b"f" * 5000, b'["dense", 3]',
    b'"condlr:tau=' + b"9" * 400 + b'"', b'"condlr:rank=1e99"', b'"condlr:tau"', b'"condlr:,=,"', b'{method = 3}',
)  # fmt: skip


def study(case: Case, folder: Path) -> None:
    path, content = folder / "study.toml", TOML
    if case.maybe(0.6):
        lines = content.splitlines()
        at = case.random.randrange(len(lines))
        name = lines[at].split(b" ")[0]
        if case.maybe(0.1):
            name = case.random.choice([b"x", b'"\\n"', b"data.x", b"[data]", b"out", b"lr"])
        value = case.random.choice(VALUES)
        lines[at] = name + b" = " + value
        content, about = b"\n".join(lines), f"{name.decode()} = {value[:30].decode()}"
    else:
        content, about = damaged(case, content)
    path.write_bytes(content)
    about = f"TOML, {about}"
    if attempt(case, path, (ValueError,), lambda: TrainConfig.read(path), about) is not None:
        case.counts["loaded"] += 1
    elif case.maybe(0.2):
        command(case, ["train", "--config", str(path)], False, about)


KINDS = {
    "checkpoint": checkpoint, "lora": lora, "run": run_checkpoint, "cifar": cifar_pickle, "idx": idx, "npz": npz,
    "study": study,
}  # fmt: skip
