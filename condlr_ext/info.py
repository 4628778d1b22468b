"""The content of `condlr info`: what is installed, what serves which op and why, and what is wrong."""

import os
import platform
import textwrap

import torch

from . import _cpu, _installation, _table, ops
from .reference import HYPER, ROLES

_NEEDED = ("torch", "numpy", "triton")
_OPTIONAL = ("scikit-learn", "scipy", "matplotlib", "tqdm", "pydantic", "safetensors")


def collect() -> dict:
    """Return versions, compiled parts, CPU features, per device what serves each op and why, and problems."""
    compiled = ops.COMPILED
    host = compiled.host
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return {
        "versions": {"python": platform.python_version(), "condlr_ext": _installation.version("condlr_ext")}
        | {name: _installation.version(name) for name in (*_NEEDED, *_OPTIONAL)}
        | {"torch": torch.__version__},
        "package": os.path.dirname(os.path.abspath(__file__)),
        "_C": compiled.ops_path or compiled.ops_reason,
        "_core": str(host.PATH) if host else compiled.host_reason,
        "build": host.build_info() if host else {},
        "isa": host.isa() if host else None,
        "cpu": _cpu.model(),
        "cpu_features": [name for name, present in host.cpu_features().items() if present] if host else [],
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "backend": ops.current_backend(),
        "ops": {device: {name: _serving(op, device) for name, op in ops.OPS.items()} for device in devices},
        "problems": [problem._asdict() for problem in _installation.problems()],
    }


def report() -> str:
    """Return collect() as text that fits a screen."""
    data = collect()
    versions, build = data["versions"], data["build"]
    with_version = (f"{name} {versions[name]}" for name in (*_NEEDED, *_OPTIONAL) if versions[name])
    missing = [name for name in (*_NEEDED, *_OPTIONAL) if not versions[name]]
    compiled = f"by {build['compiler']} with torch {build['torch_built_against']}" if build else "nothing"
    facts = {
        "condlr_ext": f"{versions['condlr_ext'] or 'not installed'}, in {data['package']}",
        "with": f"python {versions['python']}, {', '.join(with_version)}",
        "without": ", ".join(missing) or None,
        "compiled": f"{compiled}; {data['isa'] or 'no'} kernels in use",
        "CPU": f"{data['cpu']}, {data['threads']} thread{'s' * (data['threads'] != 1)}",
        "GPU": data["cuda"] or "no CUDA device",
        "backend": data["backend"],
    }
    lines = [_paragraph(name, text) for name, text in facts.items() if text]
    for device, table in data["ops"].items():
        rows = [(name, entry["served_by"], entry["what"], entry["rests_on"]) for name, entry in table.items()]
        lines += ["", _table.text((f"op on {device}", "served by", "that is", "chosen by"), rows)]
        lines += [f"not {text}" for text in _refusals(table)]
    lines.append("")
    for problem in data["problems"]:
        lines += [_paragraph("PROBLEM", problem["what"]), _paragraph("  to do", problem["remedy"])]
    return "\n".join(lines if data["problems"] else [*lines, "no problem found"])


def _paragraph(name: str, text: str) -> str:
    return textwrap.fill(f"{name:<12}{text}", 110, subsequent_indent=12 * " ", break_on_hyphens=False)


def _refusals(table: dict[str, dict]) -> list[str]:
    """Return which backends do not serve which ops, and why, a line for each reason."""
    refused: dict[tuple[str, str], list[str]] = {}
    for name, entry in table.items():
        for backend, reasons in entry["not"].items():
            refused.setdefault((backend, "; ".join(reasons)), []).append(name)
    return [
        f"{backend}{'' if len(names) == len(table) else ', ' + ', '.join(names)}: {why}"
        for (backend, why), names in refused.items()
    ]


def _serving(op: ops.Op, device: str) -> dict:
    args = _sample(op.name, device)
    reasons = {name: op.unsupported_reasons(name, *args) for name in ops.BACKENDS if name != "auto"}
    served_by = op.automatic(*args)
    what = {"cpu": op.cpu_is, "triton": "Triton kernel"}.get(served_by, "plain PyTorch")
    return {
        "served_by": served_by,
        "what": what,
        "rests_on": op.rests_on(device),
        "not": {name: why for name, why in reasons.items() if why},
    }


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
