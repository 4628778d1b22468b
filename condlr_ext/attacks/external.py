"""Attacks of torchattacks, foolbox and AutoAttack, with the signature of the package's own."""

import importlib
import inspect
import math
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .._checks import check_batch, check_choice, check_count, check_eps, check_logits
from .._modules import frozen
from .._types import Budgets
from ..errors import NonFiniteError, ShapeError
from .balls import BALLS
from .search import unperturbed

CLASSES_NEEDED = {"apgd-ce": 2, "apgd-dlr": 3, "apgd-t": 10, "fab": 2, "fab-t": 10, "square": 2}  # AutoAttack's
STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")


def from_torchattacks(
    model: nn.Module, x: Tensor, y: Tensor, eps: Budgets, attack: str, *, seed: int = 0, **options: Any
) -> Tensor:
    """Run an attack of torchattacks, given the name of its class, such as "PGD", "PGDL2", "APGD" or "Square".

    Args:
        model: Classifier of inputs in [0, 1] returning logits [B, C], normalization inside; attacked in eval mode, its
            state is restored.
        x: Inputs in [0, 1], [B, ...], floating point. The attack sees inputs of any other shape as images
            [B, C, H, W], the model as they are.
        y: Labels [B], integer.
        eps: Budget >= 0, the attack's `eps`, or a 1-D sequence of E budgets, one run for each.
        attack: Name of the class.
        seed: Seed of torch and NumPy during each run; their global random states are left alone.
        options: Options of the class; a function is called with the budget, as in alpha=lambda eps: eps / 4.

    Returns:
        Adversarial inputs like x; [E, B, ...] for E budgets.

    Raises:
        ImportError: torchattacks is not installed.
        ValueError: An argument out of range, an unknown attack or one without a budget.
        TypeError: An argument of the wrong type.
        ShapeError: Shapes of the arguments, the logits or the attack's result.
        NonFiniteError: NaN or Inf in the logits or the attack's result.
    """
    library = _require("from_torchattacks", "torchattacks")
    attack_class = _attack_class("from_torchattacks", library, attack)
    if "eps" not in (known := inspect.signature(attack_class).parameters):
        raise ValueError(f"from_torchattacks: {attack} has no budget eps, its arguments are {', '.join(known)}")

    def run(classifier, images, labels, budget):
        chosen = {name: option(budget) if callable(option) else option for name, option in options.items()}
        attacker = attack_class(classifier, eps=budget, **chosen)
        attacker.set_device(x.device)
        return attacker(images, labels)

    return _run_per_budget("from_torchattacks", model, x, y, eps, seed, run)


def from_foolbox(
    model: nn.Module, x: Tensor, y: Tensor, eps: Budgets, attack: str, *, seed: int = 0, **options: Any
) -> Tensor:
    """Run an attack of foolbox.attacks, given the name of its class, such as "LinfPGD" or "L2CarliniWagnerAttack".

    Args:
        model: As in from_torchattacks.
        x: As in from_torchattacks.
        y: As in from_torchattacks.
        eps: As in from_torchattacks; foolbox's `epsilons`.
        attack: Name of the class.
        seed: As in from_torchattacks.
        options: Options of the class, the same for every budget.

    Returns:
        As from_torchattacks.

    Raises:
        ImportError: foolbox is not installed.
        ValueError: As from_torchattacks, like the other errors.
    """
    library = _require("from_foolbox", "foolbox")
    attacker = _attack_class("from_foolbox", library.attacks, attack)(**options)

    def run(classifier, images, labels, budget):
        bounded = library.PyTorchModel(classifier, bounds=(0, 1), device=x.device)
        return attacker(bounded, images, labels, epsilons=budget)[1]

    return _run_per_budget("from_foolbox", model, x, y, eps, seed, run)


def autoattack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: Budgets,
    *,
    norm: str = "linf",
    attacks: list[str] | None = None,
    batch_size: int = 250,
    seed: int = 0,
) -> Tensor:
    """Run AutoAttack: by default its standard version, APGD-CE, targeted APGD-DLR and FAB, and Square.

    Args:
        model: As in from_torchattacks.
        x: As in from_torchattacks.
        y: As in from_torchattacks.
        eps: As in from_torchattacks.
        norm: "linf" or "l2".
        attacks: Names out of "apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square" instead of the standard
            version. Those with "-t", which the standard version has, need 10 classes, "apgd-dlr" 3.
        batch_size: Samples per batch, >= 1.
        seed: As in from_torchattacks.

    Returns:
        As from_torchattacks; samples that no attack of the set breaks are unchanged.

    Raises:
        ImportError: Neither autoattack nor pyautoattack is installed.
        ValueError: As from_torchattacks, like the other errors.

    Notes:
        AutoAttack runs in float32; inputs of another dtype are cast for it.

    Source: Croce and Hein (arXiv 2003.01690); packages autoattack (from its repository) or pyautoattack.
    """
    check_choice("autoattack", "norm", norm, BALLS)
    check_count("autoattack", "batch_size", batch_size)
    if attacks is not None and (isinstance(attacks, str) or not set(attacks) <= set(CLASSES_NEEDED)):
        known = ", ".join(CLASSES_NEEDED)
        raise ValueError(f"autoattack: attacks must be a list of names out of {known}, got {attacks!r}")
    library = _require("autoattack", "autoattack", "pyautoattack")
    packaged = library.__name__ == "pyautoattack"  # the same code with other names for its arguments

    def run(classifier, images, labels, budget):
        options = {} if packaged else {"verbose": False}
        if attacks is not None:
            options |= {"attacks" if packaged else "attacks_to_run": list(attacks), "version": "custom"}
        names = {"linf": "Linf", "l2": "L2"}
        attacker = library.AutoAttack(classifier, norm=names[norm], eps=budget, seed=seed, device=x.device, **options)
        size = {"batch_size" if packaged else "bs": batch_size}
        shown = images.float()
        found = attacker.run_standard_evaluation(shown, labels, **size)
        found = found[0] if packaged else found  # it returns the labels too
        if images.dtype != torch.float64:
            return found
        delta = BALLS[norm].project(found.double() - shown, torch.tensor(budget, dtype=torch.float64, device=x.device))
        return images + delta

    needed = {name: CLASSES_NEEDED[name] for name in (STANDARD if attacks is None else attacks)}
    return _run_per_budget("autoattack", model, x, y, eps, seed, run, norm, needed)


def _run_per_budget(
    caller: str, model: nn.Module, x: Tensor, y: Tensor, eps, seed: int, run, norm=None, needed=None
) -> Tensor:
    """Return run(classifier of images, images, labels, budget) for every budget in order, x for a budget of 0.

    Args:
        norm: That of eps, where it is known.
        needed: {attack: number of classes} of those that run will use.
    """
    y = check_batch(caller, x, y)
    budgets = check_eps(caller, eps, x, norm)
    if x.numel() == 0:
        return unperturbed(x, budgets)
    with frozen(model):
        x, y = x.detach().clone(), y.clone()
        logits = model(x)
        check_logits(caller, logits, y)
        for name, classes in (needed or {}).items():
            if logits.shape[1] < classes:
                raise ValueError(
                    f'{caller}: "{name}" needs at least {classes} classes, the model has {logits.shape[1]}; give'
                    ' attacks that need fewer, such as attacks=["apgd-ce", "fab", "square"]'
                )
        images, classifier, results = _as_images(x), _ImageClassifier(model, x), []
        for budget in budgets.reshape(-1).tolist():
            if budget == 0:
                results.append(x)
                continue
            with _seeded(seed):  # again for every budget, so that none depends on the others
                attacked = run(classifier, images.clone(), y.clone(), budget).detach()
            if attacked.shape != images.shape:
                raise ShapeError(f"{caller}: the attack must return {list(images.shape)}, got {list(attacked.shape)}")
            if not torch.isfinite(attacked).all():
                raise NonFiniteError(f"{caller}: the attack returns NaN or Inf at eps={budget:g}")
            results.append(attacked.view_as(x).to(x.dtype).clamp(0, 1))
    return torch.stack(results).view(*budgets.shape, *x.shape)


class _ImageClassifier(nn.Module):
    """The model as a classifier of images, whatever shape and dtype its inputs have."""

    def __init__(self, model: nn.Module, x: Tensor):
        super().__init__()
        self.model, self.input_shape, self.input_dtype = model, x.shape[1:], x.dtype
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images.reshape(-1, *self.input_shape).to(self.input_dtype)).to(images.dtype)


def _as_images(x: Tensor) -> Tensor:
    """View x [B, ...] as [B, C, H, W]: a matrix is one channel, a vector a square if it fills one, else C channels."""
    if x.ndim == 4:
        return x
    if x.ndim == 3:
        return x[:, None]
    features = x[0].numel()
    side = math.isqrt(features)
    return x.reshape(len(x), 1, side, side) if side * side == features else x.reshape(len(x), features, 1, 1)


@contextmanager
def _seeded(seed: int):
    """Seed the global generators of torch and NumPy, which the libraries draw from; restore them afterwards."""
    state = np.random.get_state()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(state)


def _require(caller: str, *names: str):
    """Return the first of the packages that is installed; else raise ImportError with the command that installs it."""
    for name in names:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
    install = "pip install 'condlr_ext[attacks]'"
    if "torchattacks" in names:  # its torchvision, which it does not use, may not fit torch
        install += " && pip install --no-deps torchattacks"
    raise ImportError(f"{caller} needs {names[-1]}: {install}")


def _attack_class(caller: str, module, name: str) -> type:
    found = getattr(module, name, None)
    if not isinstance(found, type):
        raise ValueError(f"{caller}: {module.__name__} has no attack {name!r}")
    return found
