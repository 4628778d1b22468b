"""One forward of a model on an example input, plain or with hooks on the layers to factorize."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .selection import Target


def run_example(
    model: nn.Module,
    targets: list[Target],
    example_input,
    on_layer: Callable[[Target, Tensor, Tensor], None],
    on_attention: Callable[[dict[str, Target], nn.MultiheadAttention, tuple[Tensor, Tensor, Tensor]], None],
) -> None:
    """Run the model as run_in_eval does and report the calls of its layers.

    Args:
        model: The model.
        targets: The layers to report; their twins are too.
        example_input: A tensor, a tuple or list of positional arguments, or a dict of keyword arguments.
        on_layer: Called as on_layer(target, input, output) at each use of a layer.
        on_attention: Called as on_attention({projection: target}, attention, (query, key, value)), for an attention
            does not call its projections as modules.

    Raises:
        ValueError: The model fails on the example.
    """
    everything = [t for target in targets for t in (target, *target.twins)]
    handles = []
    attentions: dict[nn.Module, dict[str, Target]] = {}
    for t in everything:
        if t.attention is not None:
            attentions.setdefault(t.attention, {})[t.name.rpartition(".")[2]] = t
        else:
            hook = _layer_hook(t, on_layer)
            handles.append(t.module.register_forward_hook(hook, prepend=True, with_kwargs=True))
    for attention, projections in attentions.items():
        hook = _attention_hook(projections, on_attention)
        handles.append(attention.register_forward_hook(hook, with_kwargs=True))
    try:
        run_in_eval("factorize", model, example_input)
    finally:
        for handle in handles:
            handle.remove()


def run_in_eval(function: str, model: nn.Module, example_input) -> None:
    """Run the model on the example in eval mode; statistics, modes and random state stay as before.

    Raises:
        ValueError: The model fails on the example; the text begins with `function`.
    """
    args, kwargs = _arguments(example_input)
    modes = {module: module.training for module in model.modules()}
    devices = {p.device for p in model.parameters() if p.is_cuda}
    try:
        model.eval()
        with torch.random.fork_rng(devices):
            model(*args, **kwargs)
    except Exception as error:
        raise ValueError(f"{function}: the model fails on example_input: {error}") from error
    finally:
        for module, mode in modes.items():
            module.training = mode


def _arguments(example_input) -> tuple[tuple, dict]:
    if isinstance(example_input, dict):
        return (), example_input
    return (tuple(example_input) if isinstance(example_input, (tuple, list)) else (example_input,)), {}


def _layer_hook(target: Target, on_layer):
    def hook(module, args, kwargs, output):
        on_layer(target, args[0] if args else next(iter(kwargs.values())), output)

    return hook


def _attention_hook(projections: dict[str, Target], on_attention):
    def hook(module, args, kwargs, output):
        named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        on_attention(projections, module, tuple(named[name] for name in ("query", "key", "value")))

    return hook
