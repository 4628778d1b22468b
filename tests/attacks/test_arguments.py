"""Labels of every integer dtype, and budgets in gray levels, for everything that attacks or evaluates."""

import functools
import warnings

import pytest
import torch
from torch import nn

from condlr_ext import attacks, robustness

UNSIGNED = (torch.uint8, torch.uint16, torch.uint32, torch.uint64)


@pytest.fixture
def classifier():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    x = torch.rand(6, 1, 8, 8)
    return model, x, model(x).argmax(1)


def seeded(function, **options):
    return lambda *args: function(*args, generator=torch.Generator().manual_seed(0), **options)


fgsm = functools.partial(attacks.fgsm, eps=0.1)
TAKE_LABELS = {
    "fgsm": fgsm,
    "pgd": seeded(attacks.pgd, eps=0.1, steps=2),
    "apgd": seeded(attacks.apgd, eps=0.1, steps=2, loss="dlr-targeted"),
    "low_rank_pgd": seeded(attacks.low_rank_pgd, eps=0.5, rank=2, steps=2, init="warm"),
    "evaluate": lambda *args: str(robustness.evaluate(*args, 0.1, steps=2, others={"own": attacks.fgsm})),
    "fab": lambda *args: attacks.fab(*args, steps=2)[0],
    "square": seeded(attacks.square, eps=0.1, queries=2),
    "worst_case": lambda *args: str(robustness.worst_case(*args, 0.1, steps=2)),
    "certified_radius": robustness.certified_radius,
    "kl_pgd": seeded(robustness.kl_pgd, eps=0.1, steps=2),
    "adversarial_loss": lambda *args: robustness.adversarial_loss(*args, fgsm),
    "trades_loss": lambda *args: robustness.trades_loss(*args, fgsm),
}


@pytest.mark.parametrize("name", TAKE_LABELS)
def test_labels_of_every_integer_dtype(classifier, name):
    model, x, y = classifier
    call = TAKE_LABELS[name]
    expected = call(model, x, y)
    for dtype in (*UNSIGNED, torch.int8, torch.int32):
        found = call(model, x, y.to(dtype))
        assert found == expected if isinstance(expected, str) else torch.equal(found, expected)
    for wrong in (y.float(), y == 0, y.tolist()):
        with pytest.raises(TypeError, match=f"{name}: y must be an integer tensor of labels, got"):
            call(model, x, wrong)


def test_budgets_in_gray_levels_are_noticed(classifier):
    model, x, y = classifier
    linf = {name: getattr(attacks, name) for name in ("fgsm", "pgd", "apgd", "square")} | {"kl_pgd": robustness.kl_pgd}
    for attack in (*linf.values(), lambda *args: robustness.evaluate(*args, attacks=[], guard=False)):
        with pytest.warns(
            UserWarning, match="got 8 in linf, which reaches every input; 8 of 255 gray levels are 8 / 255"
        ):
            attack(model, x, y, 8)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            attack(model, x, y, 8 / 255)
            attack(model, x, y, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attacks.fgsm(model, x, y, 8, norm="l2")
