"""LoRA files in PEFT's format, written from adapters and read into them."""

import json
import math
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from .._extras import require
from .._factors import orthonormal_factors
from .._files import whole_file, write_whole
from ..adapters import adapters, set_adapters
from ..errors import CheckpointError
from ..nn import LowRankAdapter
from .checkpoint import read_safetensors

__all__ = ["load_lora", "save_lora"]

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."

# what a LoRA may say besides its two factors, and the value with which it says nothing
_NEUTRAL = {
    "bias": "none",
    "fan_in_fan_out": False,
    "layer_replication": None,
    "lora_bias": False,
    "modules_to_save": None,
    "use_dora": False,
}


def save_lora(model: nn.Module, folder, *, base_model: str | None = None) -> None:
    """Writes the adapters of a model as a plain LoRA, which PEFT and what reads its files can load without us.

    B = U S and A = Vᵀ per layer, lora_alpha = scale * rank, so that (lora_alpha / r) B A is delta W: nothing is lost
    but the rounding of the product U S. Two files, adapter_model.safetensors and adapter_config.json, each whole or
    absent. The frozen weights are not written.

    Args:
        folder: made if it is not there.
        base_model: name or path of the frozen model, for PEFT's "base_model_name_or_path".

    Raises:
        ValueError: no adapters, or one on a convolution whose dilation, groups or padding mode PEFT's LoRA lacks.
        ImportError: without safetensors. OSError: the folder cannot be written.
    """
    safetensors = require("safetensors.torch", "condlr_ext.save_lora", "safetensors")
    found = adapters(model)
    if not found or "" in found:
        what = "the model has no adapter" if not found else "the model is itself an adapter, which has no name"
        raise ValueError(f"save_lora: {what}")
    tensors = {}
    for name, adapter in found.items():
        A, B = _lora_factors(name, adapter)
        tensors[f"{_PREFIX}{name}.lora_A.weight"], tensors[f"{_PREFIX}{name}.lora_B.weight"] = A, B
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / _WEIGHTS) as temporary:
        safetensors.save_file(tensors, temporary, {"format": "pt"})
    config = _config(model, found) | {"base_model_name_or_path": base_model}
    write_whole(folder / _CONFIG, json.dumps(config, indent=2, sort_keys=True, allow_nan=False).encode())


def load_lora(model: nn.Module, folder) -> dict[str, LowRankAdapter]:
    """Puts the LoRA of a PEFT folder on a model, as adapters with the same function.

    B A becomes U S Vᵀ by two QR decompositions. The core of a LoRA that was trained without a bound is what it is:
    an optimizer with tau < inf clips it when it is made. A LoRA whose B is still zero starts as a new adapter.

    Args:
        model: the base model; its layers get adapters in place, and their own parameters are frozen.
        folder: with adapter_model.safetensors and adapter_config.json.

    Returns:
        The adapters by name.

    Raises:
        CheckpointError: files missing, damaged, with keys other than lora_A and lora_B, or of a LoRA with more than
            the two factors (DoRA, biases, saved modules). ValueError: layers that the model lacks or has in other
            shapes. The model is unchanged then.
    """
    folder = Path(folder)
    tensors, config = read_peft(folder, "LORA", "condlr_ext.load_lora")
    pairs = split_keys(tensors, {"lora_A": (".weight",), "lora_B": (".weight",)}, str(folder))
    changes = {}
    for name, parts in pairs.items():
        A, B = parts["lora_A"], parts["lora_B"]
        r = A.shape[0]
        if A.dim() < 2 or B.dim() != A.dim() or B.shape[1] != r or B[0, 0].numel() != 1:
            raise CheckpointError(
                f"{folder}: layer {name!r} must have lora_A [r, n, ...] and lora_B [m, r, 1...], got {list(A.shape)}"
                f" and {list(B.shape)}"
            )
        factors = orthonormal_factors(B.flatten(1), torch.eye(r, dtype=B.dtype), A.flatten(1).mT)
        changes[name] = (*factors, scaling(config, name, r, str(folder)))
    return set_adapters(model, changes, str(folder))


def read_peft(folder: Path, kind: str, user: str) -> tuple[dict[str, Tensor], dict]:
    """The tensors and the configuration of a PEFT folder.

    Raises:
        CheckpointError: files missing or damaged, another peft_type, settings that add to the low-rank factors.
    """
    tensors, _ = read_safetensors(folder / _WEIGHTS, user)
    try:
        config = json.loads((folder / _CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {folder / _CONFIG}: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type", kind) != kind:
        got = config.get("peft_type") if isinstance(config, dict) else "no settings"
        raise CheckpointError(f"{folder / _CONFIG}: peft_type must be {kind}, got {got}")
    for key, neutral in _NEUTRAL.items():
        if config.get(key, neutral) not in (neutral, None):
            raise CheckpointError(f"{folder / _CONFIG}: {key}={config[key]!r} is more than low-rank factors can say")
    return tensors, config


def split_keys(tensors: dict[str, Tensor], endings: dict[str, tuple[str, ...]], source: str) -> dict[str, dict]:
    """{layer: {part: tensor}} of PEFT's keys base_model.model.LAYER.PART[.ADAPTER]ENDING.

    Raises:
        CheckpointError: other keys, with their names, or a layer with a part missing.
    """
    patterns = {
        part: re.compile(rf"(?:{re.escape(_PREFIX)})?(.+)\.{part}(?:\.[^.]+)?(?:{'|'.join(map(re.escape, ends))})")
        for part, ends in endings.items()
    }
    layers, unknown = {}, []
    for key, tensor in tensors.items():
        hits = [(part, match) for part, pattern in patterns.items() if (match := pattern.fullmatch(key))]
        if not hits:
            unknown.append(key)
            continue
        part, match = hits[0]
        if layers.setdefault(match[1], {}).setdefault(part, tensor) is not tensor:
            raise CheckpointError(
                f"{source}: layer {match[1]!r} has more than one {part}; give the tensors of one adapter"
            )
    if unknown:
        raise CheckpointError(f"{source}: unknown keys {', '.join(sorted(unknown))}")
    for name, parts in layers.items():
        if missing := sorted(set(endings) - set(parts)):
            raise CheckpointError(f"{source}: layer {name!r} lacks {', '.join(missing)}")
    if not layers:
        raise CheckpointError(f"{source} holds no layers")
    return layers


def scaling(config: dict, name: str, rank: int, source: str) -> float:
    """PEFT's factor of B A for a layer: lora_alpha / r, or with use_rslora lora_alpha / √r.

    Raises:
        CheckpointError: settings that are missing, or contradict the rank of the tensors.
    """

    def setting(key: str, pattern: str):
        for expression, value in (config.get(pattern) or {}).items():
            if re.match(rf"(.*\.)?({expression})$", name):  # as PEFT matches them: the end of the name, or ^ all of it
                return value
        return config[key]

    try:
        r, alpha = setting("r", "rank_pattern"), float(setting("lora_alpha", "alpha_pattern"))
    except (KeyError, TypeError, ValueError, re.error) as error:
        raise CheckpointError(f"{source}: its settings must have r and lora_alpha: {error!r}") from None
    if r != rank:
        raise CheckpointError(f"{source}: layer {name!r} has rank {r} in the settings and {rank} in the tensors")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _lora_factors(name: str, adapter: LowRankAdapter) -> tuple[Tensor, Tensor]:
    """A [r, in, *kernel] and B [m, r, 1...]; the product U S is rounded once."""
    layer, delta = adapter.layer, adapter.delta
    if not isinstance(layer, nn.Linear):
        lacking = {
            "dilation": any(d != 1 for d in layer.dilation),
            "groups": layer.groups != 1,
            "padding_mode": layer.padding_mode != "zeros",
        }
        for what, there in lacking.items():
            if there:
                raise ValueError(
                    f"save_lora: layer {name!r} has {what} {getattr(layer, what)}, which PEFT's LoRA lacks"
                )
    U, S, V = (p.detach().cpu() for p in (delta.U, delta.S, delta.V))
    dtype = torch.promote_types(S.dtype, torch.float32)
    kernel = layer.weight.shape[2:]
    B = (U.to(dtype) @ S.to(dtype)).to(U.dtype).reshape(*U.shape, *[1] * len(kernel))
    A = V.mT.reshape(-1, layer.weight.shape[1], *kernel)
    return A.clone(memory_format=torch.contiguous_format), B.contiguous()


def _config(model: nn.Module, found: dict[str, LowRankAdapter]) -> dict:
    ranks = {name: adapter.rank for name, adapter in found.items()}
    alphas = {name: adapter.scale * adapter.rank for name, adapter in found.items()}
    r, alpha = (max(set(values), key=values.count) for values in (list(ranks.values()), list(alphas.values())))
    # PEFT takes a name of the list for every module whose name ends in it
    others = {n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))}
    others -= {f"{name}.layer" for name in found}
    alike = any(other != name and other.endswith(f".{name}") for name in found for other in (*others, *found))
    exact = {name: f"^{re.escape(name)}" for name in found}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "r": r,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "rank_pattern": {exact[name]: value for name, value in ranks.items() if value != r},
        "alpha_pattern": {exact[name]: value for name, value in alphas.items() if value != alpha},
        "target_modules": "|".join(re.escape(name) for name in found) if alike else sorted(found),
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "use_rslora": False,
        "inference_mode": True,
        **_NEUTRAL,
    }
