"""The losses of adversarial training by hand, TRADES' attack, and training that raises robustness."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers.classifiers import image_batch, image_network
from helpers.digits import shuffled_batches, shuffled_digits
from torch import nn

import condlr_ext
from condlr_ext import attacks
from condlr_ext.errors import NonFiniteError, ShapeError
from condlr_ext.robustness import adversarial_loss, evaluate, kl_pgd, trades_loss, train_epoch


@pytest.fixture(scope="module")
def digits():
    x, y = shuffled_digits()
    return x[:1200], y[:1200], x[1200:], y[1200:]


def test_losses_by_hand():
    model = image_network().eval()
    model[6].weight.data *= 30  # logits far apart, so that the two directions of KL differ
    x, y = image_batch()
    shifted = (x + 0.1).clamp(0, 1)

    def attack(m, x, y):
        assert m is model
        return (x + 0.1).clamp(0, 1).requires_grad_()

    torch.testing.assert_close(adversarial_loss(model, x, y, attack), F.cross_entropy(model(shifted), y))
    kl = F.kl_div(model(shifted).log_softmax(1), model(x).softmax(1), reduction="batchmean")
    torch.testing.assert_close(trades_loss(model, x, y, attack, beta=2.0), F.cross_entropy(model(x), y) + 2 * kl)


def test_kl_pgd_stays_in_its_ball_raises_the_divergence_and_leaves_the_model_alone():
    model = image_network()
    x, y = image_batch(30)
    x = x.round(decimals=1)
    model.train()
    state = copy.deepcopy(model.state_dict())
    found = kl_pgd(model, x, y, 0.1, generator=torch.Generator().manual_seed(0))
    assert model.training and all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert (found - x).abs().max() <= 0.1 + 1e-6 and 0 <= found.min() and found.max() <= 1
    again = kl_pgd(model, x, y, 0.1, generator=torch.Generator().manual_seed(0))
    assert torch.equal(found, again) and not found.requires_grad
    model.eval()

    def divergence(other):
        return F.kl_div(model(other).log_softmax(1), model(x).softmax(1), reduction="batchmean")

    noise = (x + 0.1 * torch.randn_like(x).sign()).clamp(0, 1)
    assert divergence(found) > 3 * divergence(noise) > 0
    assert torch.equal(kl_pgd(model, x, y, 0), x)
    with torch.inference_mode():
        assert torch.isfinite(kl_pgd(model, x * 1, y, 0.1, steps=2)).all()
    assert torch.isfinite(trades_loss(model, x, y.int(), partial(kl_pgd, eps=0.1, steps=2)))


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda m, x, y: kl_pgd(m, x, y, [0.1, 0.2]), ShapeError, r"kl_pgd: eps must be one number, got shape \[2\]"),
        (lambda m, x, y: kl_pgd(m, x, y, 0.1, steps=0), ValueError, "steps must be an integer >= 1, got 0"),
        (lambda m, x, y: kl_pgd(m, x, y, 0.1, step_size=-1), ValueError, "step_size must be finite and > 0, got -1"),
        (lambda m, x, y: kl_pgd(m, x - 1, y, 0.1), ValueError, r"x must lie in \[0, 1\]"),
        (lambda m, x, y: trades_loss(m, x, y, kl_pgd, beta=-1), ValueError, "beta must be a finite number >= 0, got -1"),
        (lambda m, x, y: adversarial_loss(m, x, y, lambda m, x, y: x[None]), ShapeError, r"attack must return a tensor like x \[12, 1, 4, 4\], got \[1, 12, 1, 4, 4\]"),
        (lambda m, x, y: trades_loss(m, x, y, lambda m, x, y: x / 0), NonFiniteError, "attack must return finite inputs"),
        (lambda m, x, y: kl_pgd(m, x, y, 0.1, step_size="a"), ValueError, "step_size must be finite and > 0, got 'a'"),
        (lambda m, x, y: trades_loss(m, x[:0], y[:0], lambda m, x, y: x), ValueError, r"trades_loss: x must hold at least one sample, got shape \[0, 1, 4, 4\]"),
        (lambda m, x, y: train_epoch(m, [], None, None), ValueError, "batches must hold at least one sample"),
    ],
)  # fmt: skip
def test_bad_arguments_of_adversarial_training(call, error, message):
    with pytest.raises(error, match=message):
        call(image_network(), *image_batch())


def test_train_epoch_refuses_a_step_that_is_not_finite_and_returns_the_mean_per_sample():
    model = nn.Linear(2, 2)
    x, y = torch.rand(5, 2), torch.tensor([0, 1, 0, 1, 1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    loss = train_epoch(
        model.eval(), [(x[:4], y[:4]), (x[4:], y[4:])], optimizer, lambda m, x, y: F.cross_entropy(m(x), y)
    )
    assert loss == pytest.approx(F.cross_entropy(model(x), y).item()) and model.training
    weight = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(NonFiniteError, match="loss . penalty must be finite, got inf"):
        train_epoch(
            model, [(x, y)], optimizer, lambda m, x, y: F.cross_entropy(m(x), y), lambda m: torch.tensor(math.inf)
        )
    assert torch.equal(model.weight, weight)


@pytest.mark.parametrize("name", ["pgd", "low_rank_pgd"])
def test_adversarial_training_of_a_low_rank_network_raises_its_robustness(digits, name):
    """Measured in the norm that it was trained in."""
    norm, eps = {"pgd": ("linf", 0.1), "low_rank_pgd": ("l2", 0.6)}[name]
    x, y, x_test, y_test = digits
    worst = {}
    for adversarial in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
        condlr_ext.factorize(model, rank=24, exclude="2")
        optimizer = condlr_ext.optim.CondLRSGD(model, lr=0.05, momentum=0.9, tau=math.inf)
        attack = partial(attacks.pgd, eps=0.1, steps=3) if name == "pgd" else partial(low_rank_images, eps=0.6)
        loss = partial(adversarial_loss, attack=attack) if adversarial else lambda m, x, y: F.cross_entropy(m(x), y)
        for _ in range(12):
            train_epoch(model, shuffled_batches(x, y), optimizer, loss)
        worst[adversarial] = evaluate(model, x_test, y_test, [eps], norm=norm, steps=10, restarts=1)["worst"][0]
    assert worst[True] > worst[False] + 0.07


def low_rank_images(model, x, y, eps):
    """LoRa-PGD on images for a model that takes them flat."""
    images = nn.Sequential(nn.Flatten(), model)
    return attacks.low_rank_pgd(images, x.view(-1, 1, 8, 8), y, eps, 2, steps=5).flatten(1)
