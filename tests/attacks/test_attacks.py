"""All gradient attacks: closed forms, balls and budgets, and what an attack must leave alone."""

import copy
import math

import pytest
import torch
from helpers.classifiers import Function, batch, linear_model, network
from helpers.models import ResNet, ViT
from torch import nn

import condlr_ext
from condlr_ext._modules import frozen
from condlr_ext.attacks import apgd, fgsm, low_rank_pgd, pgd
from condlr_ext.attacks.gradient import clean_gradient
from condlr_ext.errors import NonFiniteError, ShapeError

ATTACKS = {
    "fgsm": fgsm,
    "fgsm-l2": lambda *a, **k: fgsm(*a, norm="l2", **k),
    "pgd-linf": pgd,
    "pgd-l2": lambda *a, **k: pgd(*a, norm="l2", **k),
    "pgd-dlr": lambda *a, **k: pgd(*a, loss="dlr", **k),
    "apgd-linf": lambda *a, **k: apgd(*a, steps=25, **k),
    "apgd-l2": lambda *a, **k: apgd(*a, norm="l2", steps=25, **k),
    "apgd-targeted": lambda *a, **k: apgd(*a, loss="dlr-targeted", steps=20, targets=2, **k),
}
every_attack = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)


def test_linear_classifier_has_a_closed_form():
    model, w = linear_model()
    x = 0.3 + 0.4 * torch.rand(6, 12, dtype=torch.float64)
    y = torch.tensor([0, 1, 0, 1, 1, 0])
    down = torch.where(y == 0, -1.0, 1.0)[:, None]
    linf = x + 0.1 * down * w.sign()
    torch.testing.assert_close(fgsm(model, x, y, 0.1), linf)
    # 2.5 eps of travel is enough to cross the ball from any random start
    torch.testing.assert_close(pgd(model, x, y, 0.1, steps=10, restarts=2), linf)
    torch.testing.assert_close(apgd(model, x, y, 0.1, steps=20), linf)
    l2 = x + 0.2 * down * w / w.norm()
    torch.testing.assert_close(fgsm(model, x, y, 0.2, norm="l2"), l2)
    torch.testing.assert_close(pgd(model, x, y, 0.2, norm="l2", steps=10, random_start=False), l2)
    # from a random start the l2 ascent turns towards w step by step, and only nearly gets there
    torch.testing.assert_close(apgd(model, x, y, 0.2, norm="l2", steps=100), l2, rtol=0, atol=1e-3)


@every_attack
@pytest.mark.filterwarnings("ignore:eps is in the units")
def test_result_stays_in_the_ball_and_in_the_box(attack):
    x, y = batch(n=40, dtype=torch.float32)
    x = x.round(decimals=1)  # many pixels on the boundary
    eps = torch.tensor([0.05, 0.3, 2.0])
    adversarial = attack(network(dtype=torch.float32), x, y, eps)
    assert adversarial.shape == (3, *x.shape) and adversarial.dtype == x.dtype
    assert adversarial.min() >= 0 and adversarial.max() <= 1
    delta = (adversarial - x).flatten(2)
    l2 = attack in (ATTACKS["fgsm-l2"], ATTACKS["pgd-l2"], ATTACKS["apgd-l2"])
    size = delta.norm(dim=2) if l2 else delta.abs().amax(2)
    assert (size <= eps[:, None] + 4 * torch.finfo(x.dtype).eps).all()


@every_attack
def test_many_budgets_equal_a_loop(attack):
    model, (x, y), eps = network(), batch(), [0.0, 0.03, 0.2]

    def run(budget):
        torch.manual_seed(3)
        return attack(model, x, y, budget)

    together = run(eps)
    for i, budget in enumerate(eps):
        torch.testing.assert_close(together[i], run(budget), rtol=0, atol=1e-7)  # rounding grows from step to step
    torch.testing.assert_close(together, run(torch.tensor(eps, dtype=torch.float64)), rtol=0, atol=0)


@every_attack
def test_zero_budget_returns_the_input(attack):
    x, y = batch(dtype=torch.float32)
    assert torch.equal(attack(network(dtype=torch.float32), x, y, 0), x)


@every_attack
def test_attacks_lower_accuracy_monotonically_on_a_trained_net(attack):
    x, y = batch(n=60)
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(300):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    adversarial = attack(model, x, y, [0.0, 0.02, 0.5])
    accuracy = (model(adversarial).argmax(-1) == y).double().mean(1)
    assert accuracy[0] > 0.9 and accuracy[0] >= accuracy[1] >= accuracy[2] and accuracy[2] < 0.3


@every_attack
def test_the_model_is_left_as_it_was(attack):
    model = nn.Sequential(nn.Linear(9, 20), nn.BatchNorm1d(20), nn.Dropout(0.5), nn.Linear(20, 5)).double()
    model.train()
    model[1].eval()
    model[3].weight.requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    modes = [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    x, y = batch()
    seen = []
    model[2].register_forward_hook(lambda m, args, out: seen.append(m.training))
    attack(model, x, y, [0.1, 0.2])
    assert seen and not any(seen)
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert model[0].bias.grad is None and not x.requires_grad and x.grad is None

    model[2].register_forward_hook(lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        attack(model, x, y, 0.1)
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags


class Merging(nn.Linear):
    """Does its work when it changes mode, as LoRA layers that are merged in eval mode."""

    def train(self, mode=True):
        if mode != self.training:
            self.weight.data.mul_(2.0 if self.training else 0.5)
        return super().train(mode)


@every_attack
def test_layers_that_work_when_they_change_mode_come_back(attack):
    model = nn.Sequential(Merging(9, 12), nn.Tanh(), Merging(12, 5)).double()
    model[0].eval()
    x, y = batch()
    before = copy.deepcopy(model.state_dict())
    attack(model, x, y, 0.1)
    assert [m.training for m in model.modules()] == [True, False, True, True]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@every_attack
def test_results_carry_no_gradient(attack):
    x, y = batch()
    x.requires_grad_()
    eps = torch.tensor(0.1, requires_grad=True)
    assert not attack(network(), x, y, eps).requires_grad and x.grad is None


@every_attack
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_attacks_work_where_gradients_are_off(attack, context):
    model, (x, y) = network(), batch()
    torch.manual_seed(1)
    expected = attack(model, x, y, 0.1)
    with context():
        x2, y2 = x * 1, y * 1
        torch.manual_seed(1)
        assert torch.equal(attack(model, x2, y2, 0.1), expected)


@pytest.mark.parametrize("build", [ResNet, ViT])
def test_factorized_networks_are_attacked_like_their_dense_twins(build):
    model = build(8).double()
    condlr_ext.factorize(model, rank=0.5, exclude="fc" if build is ResNet else "head")
    x, y = torch.rand(6, 3, 16, 16, dtype=torch.float64), torch.randint(10, (6,))
    model.train()
    if build is ResNet:
        model(x)  # running statistics of its own
    dense = condlr_ext.to_dense(copy.deepcopy(model))
    with frozen(model), frozen(dense):
        (logits, grad), (dense_logits, dense_grad) = (clean_gradient("test", m, x, y) for m in (model, dense))
    torch.testing.assert_close(logits, dense_logits, rtol=0, atol=1e-12)
    torch.testing.assert_close(grad, dense_grad, rtol=0, atol=1e-12)
    loss = nn.CrossEntropyLoss(reduction="none")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = [pgd(model, x, y, 0.1, steps=5), apgd(model, x, y, 0.1, steps=5), low_rank_pgd(model, x, y, 1.0, 2)]
    assert model.training and all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    model.eval()
    for adversarial in found:
        assert (loss(model(adversarial), y) > loss(model(x), y)).all()


@every_attack
@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 1, 3, 2), (0, 3), (1, 2)], ids=str)
def test_any_input_shape(attack, shape):
    model = Function(lambda x: x.reshape(len(x), -1)[:, :1] * torch.tensor([1.0, -1.0, 0.5, 0.2]))
    x, y = torch.rand(shape), torch.zeros(shape[0], dtype=torch.int32)
    assert attack(model, x, y, 0.1).shape == shape
    assert attack(model, x, y, [0.1, 0.2, 0.3]).shape == (3, *shape)


def x_is(value):
    return {"x": torch.full((7, 9), value, dtype=torch.float64)}


@every_attack
@pytest.mark.parametrize(
    "change, error, message",
    [
        (x_is(1.5), ValueError, r"x must lie in \[0, 1\], got values in \[1.5, 1.5\]"),
        (x_is(-0.1), ValueError, "normalization into the model"),
        (x_is(math.nan), ValueError, r"x must lie in \[0, 1\]"),
        ({"x": torch.ones(7, 9, dtype=torch.int64)}, TypeError, "x must be a floating-point .* torch.int64"),
        ({"y": torch.zeros(7)}, TypeError, "y must be an integer tensor of labels, got torch.float32"),
        ({"y": torch.zeros(6, dtype=torch.int64)}, ShapeError, r"needs y \[B\], got x \[7, 9\] and y \[6\]"),
        ({"y": torch.zeros(7, 1, dtype=torch.int64)}, ShapeError, r"and y \[7, 1\]"),
        ({"y": torch.full((7,), 5)}, ValueError, r"labels must be in 0..4 .*got 5..5"),
        ({"y": torch.full((7,), -1)}, ValueError, r"labels must be in 0..4 .*got -1..-1"),
        ({"eps": -0.1}, ValueError, "eps must be finite and >= 0, got -0.1"),
        ({"eps": [0.1, math.inf]}, ValueError, "eps must be finite"),
        ({"eps": []}, ShapeError, "non-empty 1-D"),
        ({"eps": torch.zeros(2, 2)}, ShapeError, r"got shape \[2, 2\]"),
        ({"eps": "large"}, TypeError, "eps must be a number .* got 'large'"),
        ({"model": lambda x: x}, TypeError, "must be a torch.nn.Module"),
        ({"model": Function(lambda x: x.sum(1))}, ShapeError, r"must return logits \[7, C\], got \[7\]"),
        ({"model": Function(lambda x: x / 0)}, NonFiniteError, "non-finite logits"),
        ({"model": Function(lambda x: x.detach())}, ValueError, "carries no gradient"),
        ({"model": Function(lambda x: (x * 0).sqrt())}, NonFiniteError, "gradient .* is not finite"),
    ],
)  # fmt: skip
def test_bad_arguments(attack, change, error, message):
    x, y = batch()
    arguments = {"model": network(), "x": x, "y": y, "eps": 0.1} | change
    with pytest.raises(error, match=message):
        attack(*arguments.values())
