"""Accuracy under attack, worst case per sample, with a guard against masked gradients."""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from .. import _table
from ..attacks.apgd import apgd
from ..attacks.balls import BALLS
from ..attacks.checks import check_batch, check_choice, check_count, check_eps, check_logits, frozen
from ..attacks.gradient import clean_gradient, fgsm, pgd
from ..attacks.losses import CLASSES_NEEDED
from . import masking

ATTACKS = ("fgsm", "pgd-ce", "pgd-dlr")
_RESERVED = (
    "n", "norm", "others", "eps", "clean", "worst", "transfer", "transfer_only", "at_zero", "flags", "saturated",
    "zero_gradient", "tiny_gradient", "dead_gradient",
)  # fmt: skip
_STREAM = 1_000_003  # between the seeds of two attacks
_ASCENTS = {  # name -> attack and loss
    "pgd-ce": (pgd, "ce"), "pgd64": (pgd, "log-odds"), "pgd-rescaled": (pgd, "ce-rescaled"), "pgd-dlr": (pgd, "dlr"),
    "apgd-ce": (apgd, "ce"), "apgd-dlr": (apgd, "dlr"), "apgd-t": (apgd, "dlr-targeted"),
}  # fmt: skip
KNOWN_ATTACKS = ("fgsm", "fgsm64", *_ASCENTS)


class Evaluation(dict):
    """The numbers of one evaluation, ready for json.dumps; str() shows them as a table with the guard's verdict."""

    def __str__(self) -> str:
        columns = [name for name in (*KNOWN_ATTACKS, *self["others"], "transfer", "worst") if name in self]
        lines = [f"{self['n']} samples, clean accuracy {self['clean']:.2%}; accuracy in % under {self['norm']} attacks"]
        rows = [[f"{e:g}", *(f"{100 * self[name][i]:.2f}" for name in columns)] for i, e in enumerate(self["eps"])]
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
    eps,
    attacks=None,
    *,
    norm: str = "linf",
    steps: int = 30,
    restarts: int = 2,
    seed: int = 0,
    batch_size: int | None = None,
    guard: bool = True,
    surrogate: nn.Module | None = None,
    others: Mapping[str, Callable] | None = None,
) -> Evaluation:
    """Clean accuracy and accuracy under attack at each budget: the share with argmax = label.

    The model is attacked in eval mode and its state is restored. The random starts of each attack come from `seed` and
    its name alone, the global random state is neither read nor changed. A result that is not in the ball of its
    budget, or not in [0, 1], is an error.

    Args:
        model: classifier returning logits [B, C].
        x (Tensor): inputs in [0, 1], [N, ...], floating point, N >= 1.
        y (Tensor): labels [N], integer.
        eps (float or 1-D sequence): budgets >= 0 in the units of x.
        attacks: names out of "fgsm", "pgd-ce", "fgsm64" and "pgd64" (the same on the log-odds in float64, which do
            not saturate), "pgd-rescaled" (cross-entropy of rescaled logits), "pgd-dlr" (needs 3 classes), "apgd-ce",
            "apgd-dlr" (3 classes), "apgd-t" (targeted DLR, 4 classes; the strongest, and the cost of nine others).
            Default: those of ATTACKS for which there are classes enough.
        norm: "linf" or "l2" ball; "fgsm" in l2 is one step along the normalized gradient.
        steps, restarts: of the PGD and APGD attacks.
        seed: of the random starts.
        batch_size: samples attacked at a time (times the number of budgets); default all.
        guard: run "fgsm", "fgsm64", "pgd-ce", "pgd64", "pgd-rescaled" and (from 3 classes on) "pgd-dlr" in any case,
            every attack also at eps = 0 (a ball of one point: its own ones with a single step), and flag what looks
            masked (robustness.masking.flags).
        surrogate: another classifier; PGD examples made on it are tried on the model as attack "transfer".
        others: further attacks by name, each called as attack(model, x, y, eps) with eps [E] and returning
            [E, B, ...], such as functools.partial(attacks.low_rank_pgd, rank=2).

    Returns:
        Evaluation, a dict of plain numbers: "n"; "norm"; "others", their names; "eps"; "clean"; under each attack's
        name one accuracy per budget; "worst": the share of samples that survive all of them; "saturated": the share of
        clean samples whose float32 softmax has an entry equal to 1, where cross-entropy gradients are rounding noise
        and FGSM flatters the model; "zero_gradient" and "tiny_gradient": the share whose largest cross-entropy
        gradient entry is 0, respectively below 1e-10; "dead_gradient": the share that has none under the log-odds
        either. With a surrogate "transfer_only": the share that only "transfer" broke. With the guard "at_zero": each
        attack's accuracy at eps = 0; "flags": sentences, none if nothing looks masked.

    Raises:
        ValueError, TypeError: bad argument; ShapeError, NonFiniteError: the model's output or input gradient.
    """
    check_batch("evaluate", x, y)
    budgets = check_eps("evaluate", eps, x).reshape(-1)
    if x.numel() == 0:
        raise ValueError(f"evaluate: x must hold at least one sample, got shape {list(x.shape)}")
    names = [] if isinstance(attacks, str) else list(ATTACKS if attacks is None else attacks)
    if isinstance(attacks, str) or not set(names) <= set(KNOWN_ATTACKS):
        raise ValueError(
            f"evaluate: attacks must be a list of names out of {', '.join(KNOWN_ATTACKS)}, got {attacks!r}"
        )
    check_choice("evaluate", "norm", norm, BALLS)
    if batch_size is None:
        batch_size = len(x)
    check_count("evaluate", "batch_size", batch_size)
    taken = [name for name in others or {} if name in (*KNOWN_ATTACKS, *_RESERVED)]
    if taken:
        raise ValueError(f"evaluate: others must have names of their own, got {taken[0]!r}")

    batches = list(zip(x.split(batch_size), y.split(batch_size), strict=True))
    with frozen(model):
        kept, classes = _look(model, batches)
        able = [name for name in KNOWN_ATTACKS if classes >= classes_needed(name)]
        if attacks is None:
            names = [name for name in names if name in able]
        for name in names:
            check_classes("evaluate", name, classes)
        if guard:
            second = [name for name in masking.SECOND_LOOKS if name in able]
            names = [name for name in KNOWN_ATTACKS if name in names or name in second]

        def survived(tried: Tensor, **search) -> dict[str, Tensor]:
            runs = {name: _attack(name, torch.Generator(x.device), seed, **search) for name in names}
            runs |= dict(others or {})
            if surrogate is not None:
                runs["transfer"] = _transfer(surrogate, torch.Generator(x.device), seed, **search)
            return {
                name: torch.cat([_survivors(name, run, model, *batch, tried, norm) for batch in batches], dim=1)
                for name, run in runs.items()
            }

        at_eps = survived(budgets, norm=norm, steps=steps, restarts=restarts)
        at_zero = survived(budgets.new_zeros(1), norm=norm, steps=1, restarts=1) if guard else {}

    result = Evaluation(n=len(x), norm=norm, others=list(others or {}))
    result["eps"] = torch.as_tensor(eps, dtype=torch.float64).reshape(-1).tolist()  # not rounded to the dtype of x
    result |= {name: _share(flag) for name, flag in kept.items()}
    result |= {name: _share(alive) for name, alive in at_eps.items()}
    if at_eps:
        result["worst"] = _share(torch.stack(list(at_eps.values())).all(0))
    if surrogate is not None:
        transfer = at_eps.pop("transfer")
        own = torch.stack([kept["clean"].expand_as(transfer), *at_eps.values()]).all(0)
        result["transfer_only"] = _share(own & ~transfer)
    if guard:
        result["at_zero"] = {name: _share(alive[0]) for name, alive in at_zero.items()}
        result["flags"] = masking.flags(result)
    return result


def classes_needed(name: str) -> int:
    return CLASSES_NEEDED.get(_loss_of(name), 1)


def check_classes(where: str, name: str, classes: int) -> None:
    if classes < classes_needed(name):
        raise ValueError(f'{where}: attack "{name}" needs at least {classes_needed(name)} classes, there are {classes}')


def _look(model: nn.Module, batches) -> tuple[dict[str, Tensor], int]:
    """Of the clean samples: which are classified right and what masking.counts counts, [N] each; the classes."""
    seen = []
    for images, labels in batches:
        logits, grad = clean_gradient("evaluate", model, images, labels)
        loss = "log-odds" if logits.shape[1] >= CLASSES_NEEDED["log-odds"] else "ce"
        _, unsaturated = clean_gradient("evaluate", model, images, labels, loss)
        seen.append({"clean": logits.argmax(1) == labels} | masking.counts(logits, grad, unsaturated))
    return {name: torch.cat([flags[name] for flags in seen]) for name in seen[0]}, logits.shape[1]


def _loss_of(name: str) -> str:
    if name.startswith("fgsm"):
        return "log-odds" if name == "fgsm64" else "ce"
    return _ASCENTS[name][1]


def _attack(name: str, generator: torch.Generator, seed: int, *, norm: str, steps: int, restarts: int) -> Callable:
    """The attack of that name as attack(model, x, y, eps), with a random stream of its own."""
    if name.startswith("fgsm"):
        return partial(fgsm, norm=norm, loss=_loss_of(name))
    generator.manual_seed(seed + _STREAM * KNOWN_ATTACKS.index(name))
    ascent, loss = _ASCENTS[name]
    return partial(ascent, norm=norm, loss=loss, steps=steps, restarts=restarts, generator=generator)


def _transfer(surrogate: nn.Module, generator: torch.Generator, seed: int, **search) -> Callable:
    """PGD on the surrogate, on its log-odds so that its own saturation hides nothing."""
    generator.manual_seed(seed + _STREAM * len(KNOWN_ATTACKS))
    return lambda model, x, y, eps: pgd(surrogate, x, y, eps, loss="log-odds", generator=generator, **search)


def _share(flags: Tensor):
    return flags.double().mean(-1).tolist()


def _survivors(name: str, run: Callable, model: nn.Module, x: Tensor, y: Tensor, eps: Tensor, norm: str) -> Tensor:
    """[E, B] booleans: still classified as labels y [B] after run(model, x, y, eps)."""
    attacked = run(model, x, y, eps)
    labels = y.repeat(len(eps))
    _check_result(name, attacked, x, eps, norm)
    with torch.no_grad():
        logits = model(attacked.flatten(0, 1))
    check_logits("evaluate", logits, labels)
    return (logits.argmax(1) == labels).view(len(eps), -1)


def _check_result(name: str, attacked: Tensor, x: Tensor, eps: Tensor, norm: str) -> None:
    wanted, got = f"{x.dtype} {[len(eps), *x.shape]}", type(attacked).__name__
    if isinstance(attacked, Tensor):
        got = f"{attacked.dtype} {list(attacked.shape)}"
    if got != wanted:
        raise ValueError(f"evaluate: {name} must return {wanted}, got {got}")
    low, high = attacked.aminmax()
    if not (low >= 0 and high <= 1):  # NaN fails too
        raise ValueError(f"evaluate: {name} must return inputs in [0, 1], got values in [{low:.4g}, {high:.4g}]")
    size = BALLS[norm].size((attacked.double() - x.double()).flatten(0, 1)).view(len(eps), -1).amax(1)
    rounding = 4 * torch.finfo(x.dtype).eps * (x[0].numel() ** 0.5 if norm == "l2" else 1)
    if not (size <= eps + rounding).all():
        far = (size - eps).argmax()
        raise ValueError(f"evaluate: {name} at eps={eps[far]:g} goes {size[far]:.6g} from the input in {norm}")
