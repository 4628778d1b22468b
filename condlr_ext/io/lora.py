"""LoRA files in PEFT's format: written from adapters, read into adapters."""

import json
import math
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import _types
from .._factors import orthonormal_factors
from .._files import check_path, read_text, write_whole
from .._modules import check_module, unwrapped
from ..adapters import set_adapters
from ..errors import CheckpointError, NonFiniteError
from ..nn import LowRankAdapter, LowRankTransposedLinear
from .saved_modules import PREFIX, set_parts, split_parts, trained_parts
from .tensor_files import is_finite, read_tensors, write_tensors

__all__ = ["load_lora", "save_lora"]

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_LARGEST_ALPHA = 1e30  # float32 ends at 3e38

# settings that would change the function, with the values that do not
_NEUTRAL = {
    "bias": "none",
    "layer_replication": None,
    "lora_bias": False,
    "modules_to_save": None,
    "use_dora": False,
}
# settings of which every value leaves the function that of W + scaling B A, as the tensors say it
_HARMLESS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "eva_config", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core",
    "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config",
    "target_modules", "target_parameters", "task_type", "use_rslora",
}  # fmt: skip
# starts of A and B that leave W as it is; PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ subtract their start from W
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")


def save_lora(
    model: nn.Module, folder: _types.Path, *, base_model: str | None = None, exclude: _types.Patterns | None = None
) -> None:
    """Write the adapters of a model, and what else is trained, as a plain LoRA in PEFT's format.

    B = U S and A = Vᵀ per layer and lora_alpha = scale * rank, so (lora_alpha / r) B A is delta W up to the rounding of
    U S. A layer under several names is written under each, as PEFT changes the modules of a name alone.

    Of the rest, parameters that require gradients are trained: biases alone are written as PEFT's bias="all", others
    with the whole module that holds them, its frozen parameters and buffers too, as modules_to_save. Frozen modules are
    the base model's, their buffers too: a BatchNorm whose statistics change is trained. The files
    adapter_model.safetensors and adapter_config.json are each written atomically.

    Args:
        model: A model with adapters; names do not include wrappers of torch.compile, DataParallel or
            DistributedDataParallel.
        folder: Created if it is missing.
        base_model: Name or path of the frozen model, for PEFT's "base_model_name_or_path".
        exclude: Trained parameters to leave out: names or fnmatch patterns of parameters or of modules that hold them.

    Raises:
        ValueError: No adapters, one on a convolution with dilation, groups or a padding mode that PEFT's LoRA lacks, or
            a trained parameter that PEFT has no words for: one of the model itself, of a module with adapters in it, or
            the weight under an adapter.
        OSError: The folder cannot be written; one that was created here is removed.

    Examples:
        >>> adapters = condlr_ext.add_adapters(model, rank=4)
        >>> condlr_ext.save_lora(model, "lora")
    """
    check_module("save_lora", model)
    check_path("save_lora", "folder", folder)
    model = unwrapped(model)
    modules = model.named_modules(remove_duplicate=False)
    found = {name: module for name, module in modules if isinstance(module, LowRankAdapter)}
    if not found or "" in found:
        what = "the model has no adapter" if not found else "the model is itself an adapter, which has no name"
        raise ValueError(f"save_lora: {what}")
    tensors, settings = trained_parts(model, found, exclude)
    for name, adapter in found.items():
        A, B = _lora_factors(name, adapter)
        tensors[f"{PREFIX}{name}.lora_A.weight"], tensors[f"{PREFIX}{name}.lora_B.weight"] = A, B
    config = _config(model, found) | settings | {"base_model_name_or_path": base_model}
    text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False).encode()
    folder = Path(folder)
    try:
        created = [path for path in (folder, *folder.parents) if not path.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_tensors(folder / _WEIGHTS, tensors, {"format": "pt"})
            write_whole(folder / _CONFIG, text)
        except BaseException:
            if created:
                (folder / _WEIGHTS).unlink(missing_ok=True)
            for path in created:
                if path.exists():
                    path.rmdir()
            raise
    except (OSError, ValueError) as error:  # ValueError: a NUL, or what the file system cannot encode
        raise OSError(f"save_lora: cannot write {folder}: {error}") from None


def load_lora(model: nn.Module, folder: _types.Path) -> dict[str, LowRankAdapter]:
    """Load the LoRA of a PEFT folder into adapters of a model, with the same function.

    B A becomes U S Vᵀ by two QR decompositions. The core is not clipped here: an optimizer with tau < inf does that at
    construction. A LoRA whose B is still zero starts as a new adapter. Saved modules (modules_to_save) and biases are
    written into the model's own, which are trained from then on. An error leaves the model unchanged.

    Args:
        model: The base model; its layers get adapters in place. All else is frozen, unless the model has adapters
            already.
        folder: Folder with adapter_model.safetensors and adapter_config.json.

    Returns:
        The adapters by name.

    Raises:
        CheckpointError: Files are missing or damaged, have keys other than lora_A, lora_B and those of saved modules
            and biases, or belong to a LoRA with more than two factors (DoRA) or with biases of its own.
        ValueError: The model lacks a layer or a tensor, or has it in another shape or on the meta device.
    """
    check_module("load_lora", model)
    check_path("load_lora", "folder", folder)
    folder = Path(folder)
    tensors, config = read_peft(folder, ("modules_to_save", "bias"))
    tensors, others = split_parts(model, tensors, config, str(folder))
    pairs = split_keys(tensors, {"lora_A": (".weight",), "lora_B": (".weight",)}, str(folder))
    changes = {}
    for name, parts in pairs.items():
        A, B = parts["lora_A"], parts["lora_B"]
        fits = A.dim() >= 2 and A.numel() > 0 and B.shape == (len(B), len(A), *[1] * (A.dim() - 2)) and len(B) > 0
        if not fits or not A.is_floating_point() or not B.is_floating_point():
            raise CheckpointError(
                f"{folder}: layer {name!r} must have lora_A [r, n, ...] and lora_B [m, r, 1...],"
                f" floating-point, got {A.dtype} {list(A.shape)} and {B.dtype} {list(B.shape)}"
            )
        A, B = (t.float() if t.element_size() == 1 else t for t in (A, B))
        if not (is_finite(A) and is_finite(B)):
            raise CheckpointError(f"{folder}: lora_A and lora_B of layer {name!r} must be finite, got NaN or Inf")
        r = len(A)
        core = torch.eye(r, dtype=B.dtype, device=B.device)
        try:
            factors = orthonormal_factors(B.flatten(1), core, A.flatten(1).mT)
        except NonFiniteError as error:
            raise CheckpointError(
                f"{folder}: layer {name!r} has factors beyond the range of {B.dtype}: {error}"
            ) from error
        changes[name] = (*factors, scaling(config, name, r, str(folder)))
    made = set_adapters(model, changes, str(folder))
    set_parts(others)
    return made


def read_peft(folder: Path, known: tuple[str, ...] = ()) -> tuple[dict[str, Tensor], dict]:
    """Return the tensors and the configuration of a PEFT folder with a LoRA.

    A setting that is not known to be harmless must be off (None, False or empty).

    Args:
        folder: Folder with adapter_model.safetensors and adapter_config.json.
        known: Further settings that the caller handles.

    Raises:
        CheckpointError: Files are missing or damaged, peft_type is another, or a setting may change the function.
    """
    path = folder / _CONFIG
    tensors, _ = read_tensors(folder / _WEIGHTS)
    try:
        config = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type", "LORA") != "LORA":
        got = config.get("peft_type") if isinstance(config, dict) else "no settings"
        raise CheckpointError(f"{path}: peft_type must be LORA, got {got}")
    for key, value in config.items():
        if key in _HARMLESS or key in known:
            continue
        if key == "init_lora_weights":
            if value not in _PLAIN_STARTS and value is not None:
                raise CheckpointError(
                    f"{path}: init_lora_weights={value!r} changes the base weight; convert it to a plain LoRA by PEFT's"
                    " save_pretrained(path_initial_model_for_weight_conversion=...)"
                )
        elif value != _NEUTRAL.get(key) and value not in (None, False, {}, []):
            raise CheckpointError(f"{path}: {key}={value!r} is more than low-rank factors can say")
    return tensors, config


def split_keys(tensors: dict[str, Tensor], endings: dict[str, tuple[str, ...]], source: str) -> dict[str, dict]:
    """Return {layer: {part: tensor}} for PEFT's keys base_model.model.LAYER.PART[.ADAPTER]ENDING.

    Raises:
        CheckpointError: There are other keys, or a layer lacks a part.
    """
    patterns = {
        part: re.compile(rf"(?:{re.escape(PREFIX)})?(.+)\.{part}(?:\.[^.]+)?(?:{'|'.join(map(re.escape, ends))})")
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
    """Return PEFT's factor of B A for a layer: lora_alpha / r, or lora_alpha / √r with use_rslora.

    Raises:
        CheckpointError: Settings are missing or contradict the rank of the tensors.
    """

    def setting(key: str, pattern: str):
        patterns = config.get(pattern) or {}
        if not isinstance(patterns, dict):
            raise CheckpointError(f"{source}: {pattern} must be a dict, got {type(patterns).__name__}")
        for expression, value in patterns.items():
            if matches(expression, name):
                return value
        return config.get(key)

    try:
        r, alpha = setting("r", "rank_pattern"), setting("lora_alpha", "alpha_pattern")
    except (ValueError, re.error, RecursionError) as error:
        raise CheckpointError(f"{source}: {error}") from None
    if type(r) is not int or type(alpha) not in (int, float) or not 0 < abs(alpha) <= _LARGEST_ALPHA:
        got = f"{str(r)[:40]} and {str(alpha)[:40]}"
        raise CheckpointError(
            f"{source}: its settings must have r, an integer, and lora_alpha, a finite number other than 0, for layer"
            f" {name!r}, got {got}"
        )
    if r != rank:
        raise CheckpointError(f"{source}: layer {name!r} has rank {r} in the settings and {rank} in the tensors")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def matches(expression: str, name: str) -> bool:
    """Return whether PEFT's rule applies a pattern to a module: it matches the end of the name, or with ^ all of it.

    Patterns come from files. Those that could take long are refused: a repeated group, or more than two repetitions.

    Raises:
        ValueError: The pattern or the name is refused.
    """
    atoms = re.sub(r"\\.|\[\^?\]?(?:\\.|[^\]])*\]", "x", expression, flags=re.DOTALL)  # escapes and classes
    repeats = re.findall(r"[*+?{]", atoms.replace("(?:", "("))
    if len(expression) > 300 or len(name) > 300 or len(repeats) > 2 or re.search(r"\)[*+?{]", atoms):
        raise ValueError(f"the pattern {expression[:60]!r} is too long or repeats too much")
    return re.match(rf"(.*\.)?({expression})$", name) is not None


def _lora_factors(name: str, adapter: LowRankAdapter) -> tuple[Tensor, Tensor]:
    """Return A [r, in, *kernel] and B [m, r, 1...]; the product U S is rounded once."""
    layer, delta = adapter.layer, adapter.delta
    convolution = hasattr(delta, "kernel_size")
    if convolution:
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
    kernel = delta.weight_shape[2:]
    B = (U.to(dtype) @ S.to(dtype)).to(U.dtype).reshape(*U.shape, *[1] * len(kernel))
    A = V.mT.reshape(len(S), *delta.weight_shape[1:]) if convolution else V.mT
    return A.clone(memory_format=torch.contiguous_format), B.contiguous()


def _config(model: nn.Module, found: dict[str, LowRankAdapter]) -> dict:
    ranks = {name: adapter.rank for name, adapter in found.items()}
    alphas = {name: adapter.scale * adapter.rank for name, adapter in found.items()}
    r, alpha = (max(set(values), key=values.count) for values in (list(ranks.values()), list(alphas.values())))
    # PEFT applies a name of the list to every module whose name ends in it
    others = {n for n, m in model.named_modules() if LowRankAdapter.serves(m)}
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
        "fan_in_fan_out": all(isinstance(adapter.delta, LowRankTransposedLinear) for adapter in found.values()),
        "use_rslora": False,
        "inference_mode": True,
        **_NEUTRAL,
    }
