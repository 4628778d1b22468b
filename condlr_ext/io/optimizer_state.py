"""The check of an optimizer's stored state: one that passes can be loaded and stepped with."""

import inspect
import math
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

# what torch's schedulers add to groups
_SCHEDULED = {"initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr"}
_LISTS = ("params", "param_names", "roles")
_ON_DEVICE = {"capturable": False, "differentiable": False, "foreach": None, "fused": None}


def check_state(optimizer: Optimizer, saved) -> None:
    """Raise ValueError unless `saved`, of any content, is a state that the optimizer can go on with.

    The options must have the types of the optimizer's own, and its class must take them. What a class stores for a
    parameter is not written down here: a small optimizer of the same class and options takes steps, and the state must
    have the same entries. Of classes other than torch's and this package's only the options' types are known.
    """
    if not isinstance(saved, dict) or not {"param_groups", "state"} <= saved.keys():
        raise ValueError("the optimizer's state must have param_groups and state")
    groups, state = saved["param_groups"], saved["state"]
    if not isinstance(groups, list) or not all(
        isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups
    ):
        raise ValueError("the optimizer's param_groups must be a list of dicts with a list params")
    mine = optimizer.param_groups
    sizes, saved_sizes = ([len(group["params"]) for group in each] for each in (mine, groups))
    if sizes != saved_sizes:
        raise ValueError(f"it holds parameter groups of {saved_sizes} parameters, the optimizer has {sizes}")
    ids = [i for group in groups for i in group["params"]]
    if not all(type(i) is int for i in ids) or len(set(ids)) < len(ids):
        raise ValueError("the params of the optimizer's groups must be different integers")
    if not isinstance(state, dict) or not state.keys() <= set(ids):
        raise ValueError("the optimizer's state must belong to the params of its groups")
    for g, (group, saved_group) in enumerate(zip(mine, groups, strict=True)):
        _check_names(g, group, saved_group)
        _check_options(g, optimizer, group, saved_group)
        like = _trial_state(g, optimizer, group, saved_group)
        for j, (i, p) in enumerate(zip(saved_group["params"], group["params"], strict=True)):
            name = repr(group["param_names"][j]) if "param_names" in group else f"{j} of group {g}"
            _check_entry(name, p, state.get(i, {}), like)


def _check_names(g: int, group: dict, saved: dict) -> None:
    """Raise ValueError if names or roles of parameters are not the optimizer's."""
    for key in ("param_names", "roles"):
        names = saved.get(key, group.get(key))
        if names is None:
            continue
        if not isinstance(names, list) or len(names) != len(group["params"]) or any(type(n) is not str for n in names):
            raise ValueError(f"{key} of parameter group {g} must be a text for each parameter")
        for name, here in zip(names, group.get(key, names), strict=True):
            if name != here:
                what = "parameter" if key == "param_names" else "a factor"
                raise ValueError(f"it holds the state of {what} {name!r} where the optimizer has {here!r}")


def _check_options(g: int, optimizer: Optimizer, group: dict, saved: dict) -> None:
    """Raise ValueError if an option of a group has another type than the optimizer's, or an important one is missing.

    Missing options keep the optimizer's values, as those that are newer than the file; but not beside an unknown one,
    which may be the missing one under a damaged name.
    """
    missing = sorted((optimizer.defaults.keys() & group.keys()) - saved.keys())
    unknown = sorted(saved.keys() - group.keys() - _SCHEDULED - set(_LISTS))
    if missing and (unknown or "lr" in missing):
        extra = f" and has {', '.join(map(repr, unknown))}" if unknown else ""
        raise ValueError(f"parameter group {g} lacks {', '.join(missing)}{extra}")
    parameters = inspect.signature(type(optimizer)).parameters
    for key, value in saved.items():
        if key in _LISTS or key in unknown:
            continue
        here = group.get(key, 0.0)
        fits = _kind(value) == _kind(here)
        fits |= here is None and _kind(value) in ("a number", "a flag", "a text")
        fits |= value is None and key in parameters and parameters[key].default is None
        if not fits:
            raise ValueError(f"{key} of parameter group {g} must be {_kind(here)}, got {_shown(value)}")
        if _kind(value) == "a number" and (math.isnan(value) or (key == "lr" and math.isinf(value))):
            raise ValueError(f"{key} of parameter group {g} must be a number, got {_shown(value)}")


def _kind(value) -> str:
    if value is None:
        return "None"
    if isinstance(value, Tensor):
        return "a number" if value.numel() == 1 and not value.is_complex() else "a tensor"
    if isinstance(value, (list, tuple)):
        return f"{len(value)} values"
    if type(value) is int and abs(value) >= 2**63:
        return "an integer of more than 64 bits"
    return {bool: "a flag", int: "a number", float: "a number", str: "a text"}.get(type(value), type(value).__name__)


def _shown(value) -> str:
    text = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) and value.numel() != 1 else repr(value)
    return text if len(text) < 80 else f"{text[:76]} ..."


def _trial_state(g: int, optimizer: Optimizer, group: dict, saved: dict) -> dict[str, Any] | None:
    """Return what an optimizer of the class with the saved options stores for a parameter [2, 3]; None: not known.

    Raises:
        ValueError: The class does not take the options.
    """
    cls = type(optimizer)
    if not cls.__module__.startswith(("torch.optim.", "condlr_ext.optim.")) or cls is torch.optim.SparseAdam:
        return None
    taken = inspect.signature(cls).parameters.keys() - _ON_DEVICE.keys()
    try:
        options = {
            key: value.item() if isinstance(value, Tensor) else value
            for key, value in ({key: group[key] for key in optimizer.defaults if key in group} | saved).items()
            if key in taken and key not in _LISTS
        }
        with warnings.catch_warnings(), torch.inference_mode(False):
            warnings.simplefilter("ignore")  # of our optimizers about models without low-rank layers
            p = torch.zeros(2, 3, device="cpu", dtype=torch.float32, requires_grad=True)
            trial = cls([p], **options)
            for key, value in trial.param_groups[0].items():
                if type(value) is int:  # numbers of iterations, too
                    trial.param_groups[0][key] = min(value, 2)

            def closure() -> Tensor:
                p.grad = torch.ones_like(p)
                return p.detach().sum()

            for _ in range(2):
                trial.step(closure)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, AssertionError) as error:
        raise ValueError(f"the options of parameter group {g} are not those of a {cls.__name__}: {error}") from None
    return trial.state[p]


def _check_entry(name: str, p: Tensor, entry, like: dict[str, Any] | None) -> None:
    """Raise ValueError if the stored state of a parameter is not like that of the trial's."""
    if not isinstance(entry, dict) or not all(type(key) is str for key in entry):
        raise ValueError(f"the optimizer's state of parameter {name} must be a dict")
    if like is None:
        return
    # low-precision layers have a master, others not
    like = like | {"master": torch.zeros(2, 3, dtype=torch.float32, device="cpu")}
    optional = {"master", "started"}  # torch's SGD does not say whether a momentum buffer has started
    there, missing = entry.keys() & like.keys() - optional, sorted(like.keys() - entry.keys() - optional)
    unknown = sorted(entry.keys() - like.keys())
    if missing and (there or unknown):  # without a missing one, an unknown one is left from other options
        extra = f" and has {', '.join(map(repr, unknown))}" if unknown else ""
        raise ValueError(f"the optimizer's state of parameter {name} lacks {', '.join(missing)}{extra}")
    for key in entry.keys() & like.keys():
        value, wanted = entry[key], like[key]
        if _kind(wanted) == "a number":
            number = _kind(value) == "a number" and math.isfinite(value) and (key != "step" or value >= 0)
            need = None if number else "a finite number"
        elif isinstance(wanted, Tensor) and wanted.shape == (2, 3):
            same = isinstance(value, Tensor) and value.shape == p.shape
            same = same and (value.is_floating_point(), value.is_complex()) == (p.is_floating_point(), p.is_complex())
            need = None if same else f"{list(p.shape)} as the parameter is"
        else:
            need = None if isinstance(value, type(wanted)) else f"a {type(wanted).__name__}"
        if need:
            raise ValueError(f"{key} of parameter {name} must be {need}, got {_shown(value)}")
