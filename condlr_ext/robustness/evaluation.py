"""Accuracy under attack, with the counts that tell robustness from hidden gradients."""

import torch
from torch import Tensor, nn

from ..attacks.checks import check_batch, check_count, check_eps, check_logits, frozen
from ..attacks.gradient import clean_gradient, fgsm, pgd

ATTACKS = ("fgsm", "pgd-ce", "pgd-dlr")


def evaluate(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps,
    attacks=ATTACKS,
    *,
    steps: int = 30,
    restarts: int = 2,
    seed: int = 0,
    batch_size: int | None = None,
) -> dict:
    """Clean accuracy and accuracy under l-infinity attacks at each budget: the share with argmax = label.

    The model is attacked in eval mode and its state is restored. The random starts come from `seed` alone,
    the global random state is neither read nor changed.

    Args:
        model: classifier returning logits [B, C].
        x (Tensor): inputs in [0, 1], [N, ...], floating point, N >= 1.
        y (Tensor): labels [N], integer.
        eps (float or 1-D sequence): budgets >= 0 in the units of x.
        attacks: names out of "fgsm", "pgd-ce", "pgd-dlr" (needs 3 classes).
        steps, restarts: of the PGD attacks.
        seed: of the random starts.
        batch_size: samples attacked at a time (times the number of budgets); default all.

    Returns:
        dict of plain numbers: "n"; "eps"; "clean"; under each attack's name one accuracy per budget; "worst",
        if a PGD attack was asked for: the share of samples that survive every one of them (FGSM is no part of
        it); "saturated": the share of clean samples whose float32 softmax has an entry equal to 1, where
        cross-entropy gradients are rounding noise and FGSM flatters the model; "zero_gradient" and
        "tiny_gradient": the share whose largest cross-entropy gradient entry is 0, respectively below 1e-10.

    Raises:
        ValueError, TypeError: bad argument; ShapeError, NonFiniteError: the model's output or input gradient.
    """
    check_batch("evaluate", x, y)
    budgets = check_eps("evaluate", eps, x).reshape(-1)
    if x.numel() == 0:
        raise ValueError(f"evaluate: x must hold at least one sample, got shape {list(x.shape)}")
    unknown = [name for name in attacks if name not in ATTACKS]
    if isinstance(attacks, str) or unknown:
        raise ValueError(f"evaluate: attacks must be a list of names out of {', '.join(ATTACKS)}, got {attacks!r}")
    if batch_size is None:
        batch_size = len(x)
    check_count("evaluate", "batch_size", batch_size)

    generator = torch.Generator(x.device).manual_seed(seed)
    kept = {name: [] for name in ("clean", "saturated", "zero_gradient", "tiny_gradient", *attacks)}
    with frozen(model):
        for images, labels in zip(x.split(batch_size), y.split(batch_size), strict=True):
            logits, grad = clean_gradient("evaluate", model, images, labels)
            slope = grad.abs().reshape(len(images), -1).amax(1)
            kept["clean"].append(logits.argmax(1) == labels)
            kept["saturated"].append(logits.float().softmax(1).amax(1) == 1)
            kept["zero_gradient"].append(slope == 0)
            kept["tiny_gradient"].append(slope < 1e-10)
            for name in attacks:
                if name == "fgsm":
                    attacked = fgsm(model, images, labels, budgets)
                else:
                    loss = name.removeprefix("pgd-")
                    attacked = pgd(
                        model, images, labels, budgets,
                        steps=steps, restarts=restarts, loss=loss, generator=generator,
                    )  # fmt: skip
                kept[name].append(_survivors(model, attacked, labels))

    share = {name: torch.cat(flags, dim=-1).double().mean(-1).tolist() for name, flags in kept.items()}
    survived = [torch.cat(kept[name], dim=-1) for name in attacks if name != "fgsm"]
    if survived:
        share["worst"] = torch.stack(survived).all(0).double().mean(-1).tolist()
    exact = torch.as_tensor(eps, dtype=torch.float64).reshape(-1).tolist()  # budgets are rounded to the dtype of x
    return {"n": len(x), "eps": exact, **share}


def _survivors(model: nn.Module, attacked: Tensor, labels: Tensor) -> Tensor:
    """[E, B] booleans: still classified as labels [B], for attacked [E, B, ...]."""
    with torch.no_grad():
        logits = model(attacked.flatten(0, 1))
    check_logits("evaluate", logits, labels.repeat(len(attacked)))
    return (logits.argmax(1) == labels.repeat(len(attacked))).view(len(attacked), -1)
