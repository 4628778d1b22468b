"""What is trained beside a LoRA, in PEFT's terms: whole modules (modules_to_save) and biases alone (bias)."""

import re
from collections import Counter, defaultdict

import torch
from torch import Tensor, nn

from .._modules import matcher, not_plain
from ..errors import CheckpointError
from ..nn import LowRankAdapter
from .tensor_files import is_finite, plain

PREFIX = "base_model.model."
_NOT_WRAPPED = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)  # by PEFT
_PEFT_NAMES = ("base_layer", "lora_A", "lora_B", "lora_A.default", "lora_B.default", "lora_dropout.default")


def trained_parts(model: nn.Module, found: dict[str, LowRankAdapter], exclude) -> tuple[dict[str, Tensor], dict]:
    """Return what is trained outside of the adapters' changes: tensors by PEFT's keys, and the settings for them.

    Args:
        model: The model.
        found: Its adapters by every name.
        exclude: Names or fnmatch patterns of parameters and modules to leave out.

    Raises:
        ValueError: PEFT has no words for a trained parameter, or a pattern matches none.
    """
    modules = _base_modules(model)
    inside = {id(p) for adapter in found.values() for p in adapter.delta.parameters()}
    leaves = defaultdict(set)
    for name in _not_excluded(model, exclude):
        p = model.get_parameter(name)
        if p.requires_grad and id(p) not in inside:
            owner, _, leaf = name.rpartition(".")
            leaves[owner].add(leaf)
    biases, saved, lost = {}, set(), []
    for owner, names in leaves.items():
        module = model.get_submodule(owner)
        adapted = owner.removesuffix(".layer") if owner.removesuffix(".layer") in found else None
        if names == {"bias"} and not module._buffers:
            place = f"{adapted}.base_layer" if adapted else owner
            biases[owner] = ".".join(filter(None, (PREFIX[:-1], place, "bias")))
            continue
        whole = owner
        while whole and isinstance(modules.get(whole), _NOT_WRAPPED):
            whole = whole.rpartition(".")[0]
        if not whole or whole not in modules or any(f"{name}.".startswith(f"{whole}.") for name in found):
            lost += [f"{owner}.{name}".lstrip(".") for name in sorted(names)]
        else:
            saved.add(whole)
    if lost:
        raise ValueError(
            f"save_lora: the trained parameters {', '.join(lost)} cannot be written: PEFT saves biases, and whole"
            " modules without adapters in them; freeze them, leave them out by exclude, or use condlr_ext.save"
        )
    saved = sorted(name for name in saved if not any(name.startswith(f"{other}.") for other in saved))
    tensors = {
        f"{PREFIX}{name}.{key}": _stored(f"{name}.{key}", value)
        for name in saved
        for key, value in modules[name].state_dict().items()
    }
    biases = {
        key: _stored(f"{owner}.bias", model.get_submodule(owner).bias)
        for owner, key in biases.items()
        if key not in tensors
    }
    targets = [_target(name, modules, found) for name in saved]
    return tensors | biases, {"modules_to_save": targets or None, "bias": "all" if biases else "none"}


def split_parts(
    model: nn.Module, tensors: dict[str, Tensor], config: dict, source: str
) -> tuple[dict[str, Tensor], list[tuple[Tensor, Tensor]]]:
    """Return the tensors that belong to adapters, and the others as pairs (tensor of the model, its new value).

    Raises:
        CheckpointError: The settings are no modules_to_save and bias of PEFT, or tensors are missing or not finite.
        ValueError: The model has them in another shape or not at all.
    """
    targets, bias = config.get("modules_to_save") or [], config.get("bias", "none")
    if not isinstance(targets, list) or not all(isinstance(target, str) and target for target in targets):
        raise CheckpointError(f"{source}: modules_to_save must be a list of names, got {str(targets)[:60]}")
    if bias not in ("none", "all", "lora_only"):
        raise CheckpointError(f"{source}: bias must be none, all or lora_only, got {str(bias)[:60]}")
    rest, modules, pairs, values = dict(tensors), _base_modules(model), [], {}

    def take(key: str, target) -> None:
        if not isinstance(target, Tensor) or target.is_meta or not_plain(target):
            raise ValueError(f"{source}: the model has no tensor {key} that values can be written to")
        value = rest.pop(key)
        kinds = [t.is_floating_point() or t.dtype for t in (value, target)]
        if value.shape != target.shape or kinds[0] != kinds[1]:
            raise ValueError(
                f"{source}: {key} is {value.dtype} {list(value.shape)} in the file and {target.dtype}"
                f" {list(target.shape)} in the model"
            )
        value = value.to(target.dtype)
        if not is_finite(value):
            raise CheckpointError(f"{source}: {key} must be finite in {target.dtype}, got NaN or Inf")
        if not torch.equal(values.setdefault(id(target), value), value):
            raise ValueError(f"{source}: {key} is a tensor of the model that has another value under another name")
        pairs.append((target, value))

    for name, module in modules.items():
        if any(f"{PREFIX}{name}".endswith(target) for target in targets):
            state = module.state_dict(keep_vars=True)
            if missing := sorted(key for key in state if f"{PREFIX}{name}.{key}" not in rest):
                raise CheckpointError(f"{source}: the saved module {name!r} lacks {', '.join(missing)}")
            for key, target in state.items():
                take(f"{PREFIX}{name}.{key}", target)
                for copied in ("original_module", "modules_to_save"):  # with bias="all" PEFT writes these too
                    rest.pop(f"{PREFIX}{name}.{copied}.{key}", None)
    if bias != "none":
        for key in [key for key in rest if key.startswith(PREFIX) and key.endswith(".bias")]:
            owner = key[len(PREFIX) : -len("bias")].removesuffix(".").removesuffix(".base_layer")
            take(key, getattr(modules.get(owner), "bias", None))
    state = model.state_dict(keep_vars=True)
    names, written = Counter(map(id, state.values())), Counter(id(target) for target, _ in pairs)
    for name, t in state.items():
        if 0 < written[id(t)] < names[id(t)]:
            raise ValueError(
                f"{source}: {name} has further names in the model, under which the file does not change it"
            )
    return rest, pairs


@torch.no_grad()
def set_parts(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Write values into the tensors of a model; its parameters among them are trained from then on."""
    for target, value in pairs:
        target.copy_(value)
        if isinstance(target, nn.Parameter) and target.is_floating_point():
            target.requires_grad_(True)


def _base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules by every name, without those inside of adapters, so under PEFT's names."""
    modules = dict(model.named_modules(remove_duplicate=False))
    adapters = tuple(f"{name}." for name, module in modules.items() if isinstance(module, LowRankAdapter))
    return {name: module for name, module in modules.items() if not name.startswith(adapters)}


def _not_excluded(model: nn.Module, exclude) -> list[str]:
    """Return every name of each parameter that no pattern matches, nor a module that holds it."""
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    if exclude is None:
        return names
    modules = dict(model.named_modules(remove_duplicate=False))
    excluded = matcher("save_lora", "exclude", exclude, [*names, *modules])

    def kept(name: str) -> bool:
        holders = [name[: dot.start()] for dot in re.finditer(r"\.", name)]
        return not (excluded(name, model.get_parameter(name)) or any(excluded(h, modules[h]) for h in holders))

    return [name for name in names if kept(name)]


def _stored(place: str, value) -> Tensor:
    if not isinstance(value, Tensor):
        raise ValueError(f"save_lora: {place} is a {type(value).__name__}, which PEFT's files do not hold; exclude it")
    return plain(place, value).to("cpu", copy=True, memory_format=torch.contiguous_format)


def _target(name: str, modules: dict[str, nn.Module], found: dict[str, LowRankAdapter]) -> str:
    """Return a name for PEFT's modules_to_save: with its prefix where the name alone would mean other modules too.

    PEFT wraps what ends in the name, and takes no LoRA of what the name matches anywhere.
    """
    there = ["base_model", PREFIX[:-1], *(f"{PREFIX}{other}" for other in modules if other != name)]
    there += [f"{PREFIX}{adapter}.{inner}" for adapter in found for inner in _PEFT_NAMES]
    others = any(key.endswith(name) for key in there) or any(re.match(rf"(.*\.)?{name}(\.|$)", key) for key in found)
    return f"{PREFIX}{name}" if others else name
