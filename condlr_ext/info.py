"""Installed versions, and which implementation serves which op: the content of `condlr info`."""

import importlib.metadata
import os
import platform

import torch

from . import _table, ops
from .reference import HYPER, ROLES

_SOFTWARE = (
    "condlr_ext",
    "triton",
    "numpy",
    "scikit-learn",
    "matplotlib",
    "tqdm",
    "safetensors",
)


def collect() -> dict:
    """Return versions, compiled parts, CPU features, and per device which backend serves each op and why."""
    compiled = ops.COMPILED
    host = compiled.host
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return {
        "versions": {"python": platform.python_version(), "torch": torch.__version__}
        | {name: _version(name) for name in _SOFTWARE},
        "package": os.path.dirname(os.path.abspath(__file__)),
        "_C": compiled.ops_path or compiled.ops_reason,
        "_host": host.__file__ if host else compiled.host_reason,
        "build": host.build_info() if host else {},
        "isa": host.isa() if host else None,
        "cpu_features": [name for name, present in host.cpu_features().items() if present] if host else [],
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "backend": ops.current_backend(),
        "ops": {device: {name: _serving(op, device) for name, op in ops.OPS.items()} for device in devices},
    }


def report() -> str:
    """Return collect() as text."""
    data = collect()
    lines = [f"{name:<14} {version or 'not installed'}" for name, version in data["versions"].items()]
    lines += [f"{key:<14} {data[key]}" for key in ("package", "_C", "_host")]
    lines += [f"{'build':<14} {key}: {value}" for key, value in data["build"].items()]
    lines.append(f"{'CPU':<14} {data['isa'] or 'unknown'} kernels; has {' '.join(data['cpu_features']) or 'unknown'}")
    lines.append(f"{'threads':<14} {data['threads']}")
    lines.append(f"{'CUDA':<14} {data['cuda'] or 'no device'}")
    lines.append(f"{'backend':<14} {data['backend']}")
    for device, table in data["ops"].items():
        rows = []
        for name, entry in table.items():
            rows.append((name, entry["served_by"], entry["what"]))
            rows += [("", "", f"not {other}: {'; '.join(why)}") for other, why in entry["not"].items()]
        titles = (f"op on {device}", "served by", "that is (small float32 tensors, backend auto)")
        lines += ["", _table.text(titles, rows)]
    return "\n".join(lines)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _serving(op: ops.Op, device: str) -> dict:
    args = _sample(op.name, device)
    reasons = {name: op.unsupported_reasons(name, *args) for name in ops.BACKENDS if name != "auto"}
    served_by = op.automatic(*args)
    what = {"cpu": op.cpu_is, "triton": "Triton kernel"}.get(served_by, "plain PyTorch")
    return {"served_by": served_by, "what": what, "not": {name: why for name, why in reasons.items() if why}}


def _sample(name: str, device: str) -> tuple:
    """Return typical arguments of the op."""
    like = {"dtype": torch.float32, "device": device}
    U, S, V, bias = (torch.empty(shape, **like) for shape in ((8, 4), (4, 4), (8, 4), (8,)))
    if name == "step":
        layer = [U, S, V, bias]
        hyper = torch.empty(1, len(ROLES), len(HYPER), dtype=torch.float64, device="cpu")
        return layer, layer, layer, hyper, torch.empty(1, dtype=torch.int64, device=device)
    if name in ("svd", "qr", "polar", "clip_spectrum"):
        return (S,)
    rows = torch.empty(4096, 8, **like)
    if "conv" in name:
        rows = rows.view(64, 8, 8, 8).movedim(-1, 1)  # channels_last
    geometry = ([1, 1], [1, 1], [0, 0], [1, 1], 1) if "conv" in name else ()
    if name.endswith("_backward"):
        return rows, rows, *([rows] if name.startswith("low_rank") else []), U, S, V, [True] * 5, *geometry
    return rows, U, S, V, bias, *geometry
