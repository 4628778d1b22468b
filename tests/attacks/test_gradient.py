"""FGSM and PGD on models whose maximum is known, and the options of PGD."""

import pytest
import torch
from helpers.classifiers import Function, batch, linear_model, network
from torch import nn

from condlr_ext.attacks import apgd, fgsm, pgd


def test_fgsm_on_the_log_odds_sees_through_saturation():
    w = torch.randn(3, 8)
    x, y = torch.full((1, 8), 0.5), (w @ torch.full((8,), 0.5)).argmax()[None]
    honest = fgsm(Function(lambda x: x @ w.T), x, y, 0.1)
    loud = Function(lambda x: 1e4 * (x @ w.T))
    assert torch.equal(fgsm(loud, x, y, 0.1), x)
    # the softmax over the two other classes is one-hot here: the sign is that of their larger one
    other = (x @ w.T).scatter(1, y[:, None], -torch.inf).argmax()
    torch.testing.assert_close(fgsm(loud, x, y, 0.1, loss="log-odds"), x + 0.1 * (w[other] - w[y[0]]).sign())
    torch.testing.assert_close(fgsm(Function(lambda x: x @ w.T), x, y, 0.1, loss="log-odds"), honest)


def test_dlr_finds_what_a_saturated_softmax_hides():
    def logits(x):
        s = 1e6 * (x.sum(1) - 6)
        return torch.stack((s, -s, 0 * s - 1e9), dim=1)

    loud = Function(logits)
    x, y = torch.full((1, 12), 0.51), torch.tensor([0])
    assert loud(x).softmax(1).max() == 1
    assert torch.equal(fgsm(loud, x, y, 0.1), x)  # its gradient is exactly 0
    assert loud(pgd(loud, x, y, 0.1, random_start=False, loss="dlr")).argmax(1) != y


def test_the_best_iterate_is_kept_not_the_last():
    # class 1 only within 0.025 of 0.6; steps of 0.08 from 0.5 visit 0.58, then 0.66
    model = Function(lambda x: torch.stack((0 * x, 0.025 - (x - 0.6).abs()), dim=1))
    x, y = torch.tensor([0.5]), torch.tensor([0])
    found = pgd(model, x, y, 0.3, steps=2, step_size=0.08, random_start=False)
    torch.testing.assert_close(found, torch.tensor([0.58]))
    assert model(found).argmax(1) == 1


def test_the_last_point_counts_and_costs_no_gradient():
    # class 1 beyond 0.65 only, where the second of two steps of 0.1 ends
    asked = []

    def logits(x):
        asked.append(x.requires_grad)
        return torch.stack((0 * x, x - 0.65), dim=1)

    found = pgd(
        Function(logits), torch.tensor([0.5]), torch.tensor([0]), 0.3, steps=2, step_size=0.1, random_start=False
    )
    torch.testing.assert_close(found, torch.tensor([0.7]))
    assert asked == [False, True, True, False]


def test_misclassified_beats_higher_loss():
    # ascent goes from (0, 0.1, -3), misclassified, to (0, -0.01, -0.01), correct but of higher cross-entropy
    def logits(x):
        t = ((x - 0.5) / 0.2).clamp(0, 1)
        return torch.stack((0 * t, 0.1 - 0.11 * t, -3 + 2.99 * t), dim=1)

    model, x, y = Function(logits), torch.tensor([0.5 + 1e-6]), torch.tensor([0])
    assert nn.functional.cross_entropy(model(x + 0.2), y) > nn.functional.cross_entropy(model(x), y)
    found = pgd(model, x, y, 0.3, steps=8, random_start=False)
    assert model(found).argmax(1) == 1


def test_tiny_gradients_keep_their_direction():
    w = torch.randn(8)
    model = Function(lambda x: torch.stack((1e-25 * (x @ w), -1e-25 * (x @ w)), dim=1))
    x, y = torch.full((1, 8), 0.5), torch.tensor([0])
    moved = pgd(model, x, y, 0.2, norm="l2", steps=1, random_start=False)
    assert torch.equal(moved, x)  # float32 cross-entropy does not see logits of 1e-25: no better, so x is kept
    from condlr_ext.attacks.balls import unit_l2

    direction = unit_l2(1e-25 * w[None])
    torch.testing.assert_close(direction, (w / w.norm())[None])
    assert torch.equal(unit_l2(torch.zeros(1, 8)), torch.zeros(1, 8))


def test_generator_leaves_the_global_state_alone():
    model, (x, y) = network(), batch()
    before = torch.get_rng_state()
    a, b = (pgd(model, x, y, 0.1, steps=3, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(a, b) and torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"norm": "l1"}, "norm must be one of linf, l2, got 'l1'"),
        ({"loss": "cw"}, "loss must be one of ce, log-odds, ce-rescaled, dlr, got 'cw'"),
        ({"steps": 0}, "steps must be an integer >= 1, got 0"),
        ({"restarts": 1.5}, "restarts must be an integer >= 1, got 1.5"),
        ({"step_size": 0.0}, "step_size must be finite and > 0, got 0.0"),
        ({"restarts": 2, "random_start": False}, "restarts=2 needs random_start=True"),
    ],
)
def test_bad_options_of_pgd(options, message):
    with pytest.raises(ValueError, match=message):
        pgd(network(), *batch(), 0.1, **options)
    for attack in (fgsm, pgd, apgd):
        with pytest.raises(ValueError, match='loss="dlr" needs at least 3 classes, got 2; use loss="ce"'):
            attack(linear_model(d=9)[0], *batch(classes=2), 0.1, loss="dlr")
        with pytest.raises(ValueError, match="norm must be one of linf, l2, got 'l1'"):
            attack(network(), *batch(), 0.1, norm="l1")
        with pytest.raises(ValueError, match="loss must be one of ce, .* got 'cw'"):
            attack(network(), *batch(), 0.1, loss="cw")
