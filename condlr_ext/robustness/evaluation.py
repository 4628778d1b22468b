"""Accuracy under attack, worst case per sample, with a guard against masked gradients."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import _table
from .._checks import check_batch, check_choice, check_count, check_eps, check_logits
from .._modules import frozen
from .._types import Budgets
from ..attacks.auto_pgd import apgd
from ..attacks.balls import BALLS
from ..attacks.gradient import clean_gradient, fgsm, pgd
from ..attacks.losses import CLASSES_NEEDED
from . import masking
from .journal import Journal, checksum

ATTACKS = ("fgsm", "pgd-ce", "pgd-dlr")
_FUNCTIONS = {  # name -> attack and loss
    "fgsm": (fgsm, "ce"), "fgsm64": (fgsm, "log-odds"), "pgd-ce": (pgd, "ce"), "pgd64": (pgd, "log-odds"),
    "pgd-rescaled": (pgd, "ce-rescaled"), "pgd-dlr": (pgd, "dlr"), "apgd-ce": (apgd, "ce"), "apgd-dlr": (apgd, "dlr"),
    "apgd-t": (apgd, "dlr-targeted"),
}  # fmt: skip
KNOWN_ATTACKS = tuple(_FUNCTIONS)
_RESERVED = (
    "n", "norm", "others", "eps", "clean", "worst", "transfer", "transfer_only", "at_zero", "flags", "saturated",
    "zero_gradient", "tiny_gradient", "dead_gradient", "stages", "square_only", "distances",
)  # fmt: skip
_SEED_STRIDE = 1_000_003  # between the seeds of two attacks


class Evaluation(dict[str, Any]):
    """The numbers of one evaluation, ready for json.dumps; str() shows them as a table with the guard's verdict."""

    def __str__(self) -> str:
        names = [name for name in (*KNOWN_ATTACKS, *self["others"], "transfer") if name in self]
        columns = {name: self[name] for name in names}
        columns |= {f"after {name}": values for name, values in self.get("stages", {}).items()}
        if "worst" in self:
            columns["worst"] = self["worst"]
        lines = [f"{self['n']} samples, clean accuracy {self['clean']:.2%}; accuracy in % under {self['norm']} attacks"]
        rows = [[f"{e:g}", *(f"{100 * v[i]:.2f}" for v in columns.values())] for i, e in enumerate(self["eps"])]
        lines.append(_table.text(["eps", *columns], rows))
        lines.append(
            f"softmax = 1: {self['saturated']:.2%}; input gradient 0: {self['zero_gradient']:.2%}, "
            f"below {masking.TINY_GRADIENT:g}: {self['tiny_gradient']:.2%}, 0 for any loss: {self['dead_gradient']:.2%}"
        )
        if self.get("flags"):
            lines += ["looks masked:", *(f"- {flag}" for flag in self["flags"])]
        elif "flags" in self:
            lines.append("no sign of masked gradients")
        return "\n".join(lines)


def evaluate(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: Budgets,
    attacks: Sequence[str] | None = None,
    *,
    norm: str = "linf",
    steps: int = 30,
    restarts: int = 2,
    seed: int = 0,
    batch_size: int | None = None,
    guard: bool = True,
    surrogate: nn.Module | None = None,
    others: Mapping[str, Callable[..., Tensor]] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    journal: Path | None = None,
) -> Evaluation:
    """Measure clean accuracy and accuracy under attack at each budget: the share of samples with argmax = label.

    The model is attacked in eval mode and its state is restored. The random starts of each attack depend on `seed` and
    its name alone; the global random state is neither read nor changed. A result outside the ball of its budget, or
    outside [0, 1], is an error.

    Args:
        model: Classifier returning logits [B, C].
        x: Inputs in [0, 1], [N, ...], floating point, N >= 1.
        y: Labels [N], integer.
        eps: Budget >= 0 in the units of x, or a 1-D sequence of budgets.
        attacks: Names out of "fgsm", "pgd-ce", "fgsm64" and "pgd64" (the same on the log-odds in float64, which do
            not saturate), "pgd-rescaled" (cross-entropy of rescaled logits), "pgd-dlr" (needs 3 classes), "apgd-ce",
            "apgd-dlr" (3 classes), "apgd-t" (targeted DLR, 4 classes; the strongest, at the cost of nine others).
            Default: those of ATTACKS that the number of classes allows.
        norm: "linf" or "l2" ball; "fgsm" in l2 is one step along the normalized gradient.
        steps: Steps of the PGD and APGD attacks.
        restarts: Restarts of the PGD and APGD attacks.
        seed: Seed of the random starts.
        batch_size: Samples attacked at a time (times the number of budgets); default all.
        guard: Run "fgsm", "fgsm64", "pgd-ce", "pgd64", "pgd-rescaled" and (from 3 classes on) "pgd-dlr" in any case,
            run every attack also at eps = 0 (the package's own with a single step), and flag signs of gradient
            masking (robustness.flags).
        surrogate: Another classifier; PGD examples made on it are tried on the model as attack "transfer".
        others: Further attacks by name, each called as attack(model, x, y, eps) with eps [E] and returning
            [E, B, ...], such as functools.partial(attacks.low_rank_pgd, rank=2).
        progress: Called as progress(attack, samples done, N).
        journal: File that keeps the result of every attack of the package, so that the same call goes on after the last
            one; it is for the caller to remove.

    Returns:
        Evaluation, a dict of plain numbers: "n"; "norm"; "others", their names; "eps"; "clean"; under each attack's
        name one accuracy per budget; "worst": the share of samples that survive all of them; "saturated": the share of
        clean samples whose float32 softmax has an entry equal to 1, where cross-entropy gradients are rounding noise
        and FGSM flatters the model; "zero_gradient" and "tiny_gradient": the share whose largest cross-entropy
        gradient entry is 0, respectively below 1e-10; "dead_gradient": the share whose gradient of the log-odds is 0
        too. With a surrogate "transfer_only": the share that only "transfer" broke. With the guard "at_zero": each
        attack's accuracy at eps = 0; "flags": sentences, none without a sign of masking.

    Raises:
        ValueError: An argument out of range, or an attack's result outside its ball or [0, 1] or not like x.
        TypeError: An argument of the wrong type.
        ShapeError: Shapes of the arguments or of the logits.
        NonFiniteError: NaN or Inf in the logits or the input gradient.
    """
    y = check_batch("evaluate", x, y)
    budgets = check_eps("evaluate", eps, x, norm).reshape(-1)
    if x.numel() == 0:
        raise ValueError(f"evaluate: x must hold at least one sample, got shape {list(x.shape)}")
    requested = None if attacks is None else list(attacks)
    if isinstance(attacks, str) or not set(requested or ()) <= set(KNOWN_ATTACKS):
        raise ValueError(
            f"evaluate: attacks must be a list of names out of {', '.join(KNOWN_ATTACKS)}, got {attacks!r}"
        )
    check_choice("evaluate", "norm", norm, BALLS)
    batch_size = len(x) if batch_size is None else batch_size
    check_count("evaluate", "batch_size", batch_size)
    others = dict(others or {})
    for name in others:
        if name in (*KNOWN_ATTACKS, *_RESERVED):
            raise ValueError(f"evaluate: others must have names of their own, got {name!r}")
    batches = list(zip(x.split(batch_size), y.split(batch_size), strict=True))

    key = {"attacks": [plain_budgets(eps), norm, steps, restarts, seed, batch_size]}
    kept = Journal(journal, key | {"of": journal and checksum(model, x, y)})
    with frozen(model):
        clean, classes = clean_statistics("evaluate", model, batches)
        names = _select_attacks(requested, classes, guard)

        def attacked(eps: Tensor, steps: int, restarts: int, place: str = "") -> dict[str, Tensor]:
            runs = {name: _attack(name, seed, x.device, norm, steps, restarts) for name in names} | others
            if surrogate is not None:
                runs["transfer"] = _transfer(surrogate, seed, x.device, norm, steps, restarts)

            def stands(name: str, run) -> Tensor:
                parts = []
                for i, batch in enumerate(batches):
                    if progress is not None:
                        progress(name + place, i * batch_size, len(x))
                    parts.append(survivors(name, run, model, *batch, eps, norm))
                return torch.cat(parts, dim=1).cpu()

            return {
                name: kept.recall(name + place, partial(stands, name, run)) if name in names else stands(name, run)
                for name, run in runs.items()
            }

        at_eps = attacked(budgets, steps, restarts)
        at_zero = attacked(budgets.new_zeros(1), steps=1, restarts=1, place=" at 0") if guard else {}

    result = Evaluation(n=len(x), norm=norm, others=list(others))
    result["eps"] = plain_budgets(eps)
    result |= {name: share(samples) for name, samples in (clean | at_eps).items()}
    if at_eps:
        result["worst"] = share(torch.stack(list(at_eps.values())).all(0))
    if surrogate is not None:
        transfer = at_eps.pop("transfer")
        survived = torch.stack([clean["clean"].cpu().expand_as(transfer), *at_eps.values()]).all(0)
        result["transfer_only"] = share(survived & ~transfer)
    if guard:
        result["at_zero"] = {name: share(samples[0]) for name, samples in at_zero.items()}
        result["flags"] = masking.flags(result)
    return result


def plain_budgets(eps) -> list[float]:
    """Return the budgets as they were given, not rounded to the dtype of the samples."""
    return torch.as_tensor(eps, dtype=torch.float64, device="cpu").reshape(-1).tolist()


def clean_statistics(caller: str, model: nn.Module, batches) -> tuple[dict[str, Tensor], int]:
    """Return booleans [N] of the clean samples, "clean" (classified right) and gradient_statistics, and the classes."""
    parts = []
    for x, y in batches:
        logits, grad = clean_gradient(caller, model, x, y)
        loss = "log-odds" if logits.shape[1] >= CLASSES_NEEDED["log-odds"] else "ce"
        _, unsaturated = clean_gradient(caller, model, x, y, loss)
        parts.append({"clean": logits.argmax(1) == y} | masking.gradient_statistics(logits, grad, unsaturated))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}, logits.shape[1]


def _select_attacks(requested: list[str] | None, classes: int, guard: bool) -> list[str]:
    """Return the attacks to run: those requested, by default ATTACKS that the classes allow, and those of the guard."""
    possible = [name for name in KNOWN_ATTACKS if classes >= classes_needed(name)]
    names = [name for name in ATTACKS if name in possible] if requested is None else requested
    for name in names:
        check_classes("evaluate", name, classes)
    if guard:
        names = [name for name in possible if name in names or name in masking.GUARD_ATTACKS]
    return names


def classes_needed(name: str) -> int:
    """Return the number of classes that an attack of KNOWN_ATTACKS needs."""
    _, loss = _FUNCTIONS[name]
    return CLASSES_NEEDED.get(loss, 1)


def check_classes(caller: str, name: str, classes: int) -> None:
    """Raise ValueError if an attack of KNOWN_ATTACKS needs more classes."""
    if classes < classes_needed(name):
        needed = classes_needed(name)
        raise ValueError(f'{caller}: attack "{name}" needs at least {needed} classes, there are {classes}')


def _attack(name: str, seed: int, device, norm: str, steps: int, restarts: int) -> Callable:
    """Return an attack of KNOWN_ATTACKS as attack(model, x, y, eps), with a random generator of its own."""
    function, loss = _FUNCTIONS[name]
    if function is fgsm:
        return partial(fgsm, norm=norm, loss=loss)
    generator = torch.Generator(device).manual_seed(seed + _SEED_STRIDE * KNOWN_ATTACKS.index(name))
    return partial(function, norm=norm, loss=loss, steps=steps, restarts=restarts, generator=generator)


def _transfer(surrogate: nn.Module, seed: int, device, norm: str, steps: int, restarts: int) -> Callable:
    """Return PGD on the surrogate's log-odds, which its saturation does not mask, as attack(model, x, y, eps)."""
    generator = torch.Generator(device).manual_seed(seed + _SEED_STRIDE * len(KNOWN_ATTACKS))
    options = {"norm": norm, "loss": "log-odds", "steps": steps, "restarts": restarts, "generator": generator}
    return lambda model, x, y, eps: pgd(surrogate, x, y, eps, **options)


def survivors(name: str, attack: Callable, model: nn.Module, x: Tensor, y: Tensor, eps: Tensor, norm: str) -> Tensor:
    """Return booleans [E, B]: still classified as labels y [B] after attack(model, x, y, eps)."""
    attacked = attack(model, x, y, eps)
    _check_result(name, attacked, x, eps, norm)
    with torch.no_grad():
        logits = model(attacked.flatten(0, 1))
    labels = y.repeat(len(eps))
    check_logits("evaluate", logits, labels)
    return (logits.argmax(1) == labels).view(len(eps), -1)


def _check_result(name: str, attacked: Tensor, x: Tensor, eps: Tensor, norm: str) -> None:
    """Raise ValueError unless attacked is [E, B, ...], in [0, 1] and, to rounding, within eps [E] of x."""
    expected, got = f"{x.dtype} {[len(eps), *x.shape]}", type(attacked).__name__
    if isinstance(attacked, Tensor):
        got = f"{attacked.dtype} {list(attacked.shape)}"
    if got != expected:
        raise ValueError(f"evaluate: {name} must return {expected}, got {got}")
    low, high = attacked.aminmax()
    if not (low >= 0 and high <= 1):  # NaN fails too
        raise ValueError(f"evaluate: {name} must return inputs in [0, 1], got values in [{low:.4g}, {high:.4g}]")
    distance = BALLS[norm].norm((attacked.double() - x.double()).flatten(0, 1)).view(len(eps), -1).amax(1)
    rounding = 4 * torch.finfo(x.dtype).eps * (x[0].numel() ** 0.5 if norm == "l2" else 1)
    if not (distance <= eps + rounding).all():
        worst = (distance - eps).argmax()
        raise ValueError(f"evaluate: {name} at eps={eps[worst]:g} goes {distance[worst]:.6g} from the input in {norm}")


def share(samples: Tensor):
    """Return the share of True over the last dimension as plain numbers."""
    return samples.double().mean(-1).tolist()
