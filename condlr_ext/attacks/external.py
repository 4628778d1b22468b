"""Attacks of torchattacks, foolbox and AutoAttack, called like the package's own."""

import importlib
import math
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import NonFiniteError, ShapeError
from .balls import BALLS
from .checks import check_batch, check_choice, check_count, check_eps, check_logits, frozen
from .search import untouched


def from_torchattacks(model: nn.Module, x: Tensor, y: Tensor, eps, attack: str, *, seed: int = 0, **options) -> Tensor:
    """An attack of torchattacks by the name of its class, such as "PGD", "PGDL2", "APGD" or "Square".

    Args:
        model: classifier of inputs in [0, 1] returning logits [B, C], normalization inside; attacked in eval mode, its
            state is restored.
        x (Tensor): inputs in [0, 1], [B, ...], floating point. Inputs that are no images [B, C, H, W] are shown to the
            attack as images and to the model as they are.
        y (Tensor): labels [B], integer.
        eps (float or 1-D sequence): budgets >= 0, the attack's `eps`; one run for each.
        attack: name of the class.
        seed: of torch and NumPy during each run; their own random states are left alone.
        options: of the class; a function is called with the budget, as in alpha=lambda eps: eps / 4.

    Returns:
        Tensor: adversarial inputs like x, [E, B, ...] for E budgets.

    Raises:
        ImportError: torchattacks is not installed. ValueError, TypeError: bad argument; ShapeError, NonFiniteError:
        output of the model or the attack.
    """
    library = _require("from_torchattacks", "torchattacks")
    kind = _named("from_torchattacks", library, attack)

    def run(shown, images, labels, budget):
        chosen = {name: option(budget) if callable(option) else option for name, option in options.items()}
        attacker = kind(shown, eps=budget, **chosen)
        attacker.set_device(x.device)
        return attacker(images, labels)

    return _one_by_one("from_torchattacks", model, x, y, eps, seed, run)


def from_foolbox(model: nn.Module, x: Tensor, y: Tensor, eps, attack: str, *, seed: int = 0, **options) -> Tensor:
    """An attack of foolbox.attacks by the name of its class, such as "LinfPGD", "L2PGD" or "L2CarliniWagnerAttack".

    Arguments, returns and errors as for from_torchattacks.
    """
    library = _require("from_foolbox", "foolbox")
    attacker = _named("from_foolbox", library.attacks, attack)(**options)

    def run(shown, images, labels, budget):
        bounded = library.PyTorchModel(shown, bounds=(0, 1), device=x.device)
        return attacker(bounded, images, labels, epsilons=budget)[1]

    return _one_by_one("from_foolbox", model, x, y, eps, seed, run)


def autoattack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps,
    *,
    norm: str = "linf",
    attacks: list[str] | None = None,
    batch_size: int = 250,
    seed: int = 0,
) -> Tensor:
    """AutoAttack: by default its standard version, APGD-CE, targeted APGD-DLR and FAB, and Square.

    Args:
        model, x, y, eps, seed: as for from_torchattacks.
        norm: "linf" or "l2".
        attacks: instead of the standard version, names out of "apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t",
            "square". The targeted ones want more than 9 classes, as AutoAttack says.
        batch_size: samples at a time.

    Returns and raises as from_torchattacks. Samples no attack of the set breaks come back unchanged.

    Source: Croce and Hein (arXiv 2003.01690); packages autoattack (from its repository) or pyautoattack.
    """
    check_choice("autoattack", "norm", norm, BALLS)
    check_count("autoattack", "batch_size", batch_size)
    library = _require("autoattack", "autoattack", "pyautoattack")
    packaged = library.__name__ == "pyautoattack"  # the same code with other names for its arguments

    def run(shown, images, labels, budget):
        options = {} if packaged else {"verbose": False}
        if attacks is not None:
            options |= {"attacks" if packaged else "attacks_to_run": list(attacks), "version": "custom"}
        names = {"linf": "Linf", "l2": "L2"}
        attacker = library.AutoAttack(shown, norm=names[norm], eps=budget, seed=seed, device=x.device, **options)
        size = {"batch_size" if packaged else "bs": batch_size}
        found = attacker.run_standard_evaluation(images, labels, **size)
        return found[0] if packaged else found  # it returns the labels too

    return _one_by_one("autoattack", model, x, y, eps, seed, run)


class _Shown(nn.Module):
    """The model as a classifier of images, whatever the shape and dtype of the inputs it was made for."""

    def __init__(self, model: nn.Module, like: Tensor):
        super().__init__()
        self.model, self.shape, self.kind = model, like.shape[1:], like.dtype
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images.reshape(-1, *self.shape).to(self.kind))


def _as_images(x: Tensor) -> Tensor:
    """x [B, ...] as [B, C, H, W]: matrices as one channel, vectors as a square if they fill one, else as channels."""
    if x.ndim == 4:
        return x
    if x.ndim == 3:
        return x[:, None]
    features = x[0].numel()
    side = math.isqrt(features)
    return x.reshape(len(x), 1, side, side) if side * side == features else x.reshape(len(x), features, 1, 1)


def _one_by_one(function: str, model: nn.Module, x: Tensor, y: Tensor, eps, seed: int, run) -> Tensor:
    """run(model of images, images, labels, budget) for every budget above 0, in order; budget 0 is x."""
    check_batch(function, x, y)
    budgets = check_eps(function, eps, x)
    if x.numel() == 0:
        return untouched(x, budgets)
    with frozen(model):
        x, y = x.detach().clone(), y.long().clone()
        check_logits(function, model(x), y)
        images, shown, found = _as_images(x), _Shown(model, x), []
        for budget in budgets.reshape(-1).tolist():
            if budget == 0:
                found.append(x)
                continue
            with _seeded(seed):  # again for every budget, so that none depends on the others
                attacked = run(shown, images.clone(), y.clone(), budget).detach()
            if attacked.shape != images.shape:
                raise ShapeError(f"{function}: the attack must return {list(images.shape)}, got {list(attacked.shape)}")
            if not torch.isfinite(attacked).all():
                raise NonFiniteError(f"{function}: the attack returns NaN or Inf at eps={budget:g}")
            found.append(attacked.view_as(x).to(x.dtype).clamp(0, 1))
    return torch.stack(found).view(*budgets.shape, *x.shape)


@contextmanager
def _seeded(seed: int):
    """torch's and NumPy's global generators seeded inside and as before afterwards: the libraries draw from them."""
    state = np.random.get_state()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(state)


def _require(function: str, *names: str):
    """The first of the packages that is installed, or an ImportError that says what to install."""
    for name in names:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
    raise ImportError(f"{function} needs {names[-1]}: pip install 'condlr_ext[attacks]'")


def _named(function: str, module, name: str):
    kind = getattr(module, name, None)
    if not isinstance(kind, type):
        raise ValueError(f"{function}: {module.__name__} has no attack {name!r}")
    return kind
