"""Helpers for whole models: unwrap, select layers by name or type, replace modules, freeze, undo changes on error."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

DENSE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_WRAPPING_PACKAGES = {"accelerate", "lightning", "lightning_fabric", "pytorch_lightning"}


def check_module(function: str, model) -> None:
    """Raise TypeError unless model is a Module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model must be a torch.nn.Module, got {type(model).__name__}")


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside DistributedDataParallel, DataParallel and torch.compile wrappers."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):  # torch.compile
            model = model._orig_mod
        else:
            return model


def unwrapped_optimizer(optimizer: Optimizer | None) -> Optimizer | None:
    """Return the optimizer inside accelerate's and Lightning's wrappers, which step it and nothing else."""
    while inner := _inner_optimizer(optimizer):
        optimizer = inner
    return optimizer


def _inner_optimizer(optimizer) -> Optimizer | None:
    packages = {cls.__module__.partition(".")[0] for cls in type(optimizer).__mro__}
    inner = getattr(optimizer, "optimizer", None) if packages & _WRAPPING_PACKAGES else None
    return inner if isinstance(inner, Optimizer) else None


def not_plain(t: Tensor) -> str | None:
    """Return why no arithmetic of this package can be done on a tensor, None if it can: it is sharded or quantized."""
    if not is_traceable_wrapper_subclass(t):
        return None
    placements = getattr(t, "placements", None)  # recognizes a DTensor without importing it
    detail = f" with placements {tuple(placements)}" if placements is not None else ""
    return f"must be a plain tensor, got {type(t).__name__}{detail}"


def parameter_count(model: nn.Module) -> int:
    """Return the number of entries of a model's parameters; those of unknown size count nothing."""
    return sum(p.numel() for p in model.parameters() if not isinstance(p, UninitializedTensorMixin))


def refuse_wrapped(function: str, model: nn.Module) -> None:
    """Raise ValueError if the model is or holds a wrapper that knows its parameters and would miss new ones."""
    for name, module in model.named_modules():
        kinds = [cls.__name__ for cls in type(module).__mro__]
        for kind in ("DistributedDataParallel", "FullyShardedDataParallel"):
            if kind in kinds:
                raise ValueError(
                    f"{function}: model must not be wrapped yet, got {name or 'a model'} in {kind}, which keeps to the"
                    f" parameters that it was made with; call {function} before"
                )


def is_peft_layer(module: nn.Module) -> bool:
    """Whether PEFT wraps a layer here: its parts are found, saved and merged by PEFT alone."""
    return any(
        cls.__name__ in ("BaseTunerLayer", "AuxiliaryTrainingWrapper") and cls.__module__.startswith("peft.")
        for cls in type(module).__mro__
    )


def matcher(function: str, what: str, patterns, names: list[str]) -> Callable[..., bool]:
    """Return a predicate (name, module, parents=()) -> bool: does the layer match any of the patterns?

    Args:
        function: The caller, named in error texts.
        what: The caller's argument, named in error texts.
        patterns: A name (whole, or an fnmatch pattern), a type, a predicate (name, module) -> bool, or a list of these.
        names: All names in the model; each name or pattern must match one.

    Raises:
        ValueError: A name or pattern matches no module.
        TypeError: Something else among the patterns.
    """
    if isinstance(patterns, (str, type)) or callable(patterns):
        patterns = [patterns]
    if not isinstance(patterns, Iterable):
        raise TypeError(f"{function}: {what} must be a name, a type, a predicate or a list of these, got {patterns!r}")
    patterns = list(patterns)
    for p in patterns:
        if isinstance(p, str):
            if not any(fnmatchcase(name, p) for name in names):
                raise ValueError(f"{function}: {what} {p!r} matches nothing in the model")
        elif not callable(p):
            raise TypeError(f"{function}: {what} entries must be names, types or predicates, got {p!r}")

    def matches(name: str, module: nn.Module, parents: Iterable[tuple[str, nn.Module]] = ()) -> bool:
        """Return whether the layer matches or, by name or type, one of the `parents` that hold it as a parameter."""
        identities = [(name, module), *parents]
        for p in patterns:
            if isinstance(p, str):
                hit = any(fnmatchcase(n, p) for n, _ in identities)
            elif isinstance(p, type):
                hit = any(isinstance(m, p) for _, m in identities)
            else:
                hit = p(name, module)
            if hit:
                return True
        return False

    return matches


def chooser(function: str, include, exclude, names: list[str]) -> Callable[..., bool]:
    """Return a predicate like matcher's: does the layer match include, or include is None, and not exclude?"""
    included = matcher(function, "include", include, names) if include is not None else lambda *_: True
    excluded = matcher(function, "exclude", exclude, names) if exclude is not None else lambda *_: False
    return lambda *layer: included(*layer) and not excluded(*layer)


def select_layers(
    where: str, model: nn.Module, types: tuple[type, ...], exclude: str | Iterable[str] = ()
) -> dict[str, nn.Module]:
    """Return the model's modules of these types by name, without those that `exclude` matches.

    Raises:
        TypeError: model is not a Module.
        ValueError: A pattern matches no such layer, or no layer is left.
    """
    check_module(where, model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, types)}
    known = ", ".join(layers) or "a model without any"
    excluded = matcher(where, "exclude", exclude, list(layers))
    layers = {name: module for name, module in layers.items() if not excluded(name, module)}
    if not layers:
        kinds = ", ".join(t.__name__ for t in types)
        raise ValueError(f"{where}: the model must have a layer to act on ({kinds}), got {known}, exclude={exclude!r}")
    return layers


def replace_modules(model: nn.Module, replacement: dict[nn.Module, nn.Module]) -> None:
    """Replace modules everywhere in `model`."""
    for parent in list(model.modules()):
        for key, child in parent._modules.items():  # named_children skips a module's second use
            if child in replacement:
                parent._modules[key] = replacement[child]


@contextmanager
def undone_on_error(model: nn.Module) -> Iterator[None]:
    """Restore the structure of a model if the block raises; the values of its tensors stay as they are then."""
    trained = {p: p.requires_grad for p in model.parameters()}
    before = []
    for module in model.modules():
        attributes = dict(vars(module))
        contents = {name: dict(value) for name, value in attributes.items() if isinstance(value, dict)}
        before.append((module, type(module), attributes, contents))
    try:
        yield
    except BaseException:
        for module, cls, attributes, contents in before:
            module.__class__ = cls
            vars(module).clear()
            vars(module).update(attributes)
            for name, content in contents.items():  # in place: hook handles refer to these dicts
                attributes[name].clear()
                attributes[name].update(content)
        for p, requires_grad in trained.items():
            p.requires_grad_(requires_grad)
        raise


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode without gradients of its parameters, and record those of its inputs, inside a block.

    Afterwards every submodule's mode and every parameter's requires_grad are what they were.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model must be a torch.nn.Module, got {type(model)}")
    modes = [(module, module.training) for module in model.modules()]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval()
        for parameter, _ in trained:
            parameter.requires_grad_(False)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for module, training in modes:
            if type(module).train is not nn.Module.train:  # its train() does more than set the flag
                module.train(training)
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
