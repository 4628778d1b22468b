"""FGSM, PGD and APGD against closed forms, and what an attack must leave alone."""

import copy
import math

import pytest
import torch
from torch import nn

import condlr_ext
from condlr_ext._modules import frozen
from condlr_ext.attacks import apgd, fgsm, low_rank_pgd, pgd
from condlr_ext.attacks.gradient import clean_gradient
from condlr_ext.attacks.losses import cross_entropy, dlr, log_odds, rescaled_cross_entropy, targeted_dlr
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


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def linear_model(d=12, dtype=torch.float64):
    """Two classes, logits (w·x, -w·x): grad_x CE is a negative multiple of w for y = 0."""
    w = torch.randn(d, dtype=dtype)
    return Function(lambda x: torch.stack((x @ w, -(x @ w)), dim=1)), w


def network(classes=5, dtype=torch.float64):
    return nn.Sequential(nn.Linear(9, 20), nn.Tanh(), nn.Linear(20, classes)).to(dtype)


def batch(n=7, d=9, classes=5, dtype=torch.float64):
    return torch.rand(n, d, dtype=dtype), torch.randint(classes, (n,))


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


def test_l2_random_start():
    """A uniform direction at a uniform distance; 5 standard deviations of what 4000 draws leave to chance."""
    from condlr_ext.attacks.balls import BALLS

    noise = BALLS["l2"].sample(torch.zeros(4000, 3, dtype=torch.float64), None)
    radius = noise.norm(dim=1)
    assert radius.max() <= 1
    for t in (0.3, 0.5, 0.8):
        assert abs((radius <= t).double().mean() - t) < 5 * math.sqrt(t * (1 - t) / 4000)
    direction = noise / radius[:, None]
    assert direction.mean(0).abs().max() < 5 * math.sqrt(1 / 3 / 4000)
    cosine = direction[:, 0]  # Archimedes: uniform in [-1, 1]
    assert abs((cosine <= 0.5).double().mean() - 0.75) < 5 * math.sqrt(0.75 * 0.25 / 4000)


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


def test_dlr_by_hand():
    logits = torch.tensor([[3.0, 1.0, 0.0, -1.0]] * 3, dtype=torch.float64)
    expected = torch.tensor([-2 / 3, 2 / 3, 4 / 3], dtype=torch.float64)
    torch.testing.assert_close(dlr(logits, torch.tensor([0, 1, 3])), expected)
    torch.testing.assert_close(dlr(1e3 * logits + 5, torch.tensor([0, 1, 3])), expected)
    assert torch.isfinite(dlr(torch.zeros(1, 3), torch.tensor([0]))).all()
    # z_(1) - (z_(3) + z_(4)) / 2 = 3.5
    aimed = targeted_dlr(logits, torch.tensor([0, 1, 3]), torch.tensor([1, 0, 0]))
    torch.testing.assert_close(aimed, torch.tensor([-2 / 3.5, 2 / 3.5, 4 / 3.5], dtype=torch.float64))
    assert torch.isfinite(targeted_dlr(torch.zeros(1, 4), torch.tensor([0]), torch.tensor([1]))).all()


def test_cross_entropy_is_softplus_of_the_log_odds():
    logits, y = 3 * torch.randn(50, 6, dtype=torch.float64, requires_grad=True), torch.randint(6, (50,))
    torch.testing.assert_close(nn.functional.softplus(log_odds(logits, y)), cross_entropy(logits, y))
    ce, odds = (torch.autograd.grad(f(logits, y).sum(), logits)[0] for f in (cross_entropy, log_odds))
    torch.testing.assert_close(ce / ce.norm(dim=1, keepdim=True), odds / odds.norm(dim=1, keepdim=True))
    # where cross-entropy has no gradient left, in any precision
    far = torch.tensor([[2000.0, 0.0, -1.0]], requires_grad=True)
    assert torch.autograd.grad(cross_entropy(far.double(), torch.tensor([0])).sum(), far)[0].abs().max() == 0
    (slope,) = torch.autograd.grad(log_odds(far, torch.tensor([0])).sum(), far)
    torch.testing.assert_close(slope, torch.tensor([[-1.0, 0.7310586, 0.2689414]]))


def test_rescaled_cross_entropy_ignores_the_scale():
    logits, y = torch.randn(50, 6, dtype=torch.float64), torch.randint(6, (50,))
    unit = logits / (logits.amax(1) - logits.mean(1))[:, None]
    torch.testing.assert_close(rescaled_cross_entropy(1e5 * logits, y), cross_entropy(unit, y))
    unit, free = unit.requires_grad_(), logits.clone().requires_grad_()
    (expected,) = torch.autograd.grad(cross_entropy(unit, y).sum(), unit)
    (slope,) = torch.autograd.grad(rescaled_cross_entropy(free, y).sum(), free)
    torch.testing.assert_close(slope, expected * (unit / logits).detach())  # the scale is a constant
    assert torch.isfinite(rescaled_cross_entropy(torch.zeros(1, 3), torch.tensor([0]))).all()


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


class ConvNet(nn.Module):
    """A residual block with normalization between a stem and a classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        return self.head((x + self.block(x)).relu().mean((2, 3)))


class ViT(nn.Module):
    """Patches of 4 x 4 pixels through a Transformer encoder."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 4, stride=4)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.encoder(self.embed(x).flatten(2).mT).mean(1))


@pytest.mark.parametrize("kind", [ConvNet, ViT])
def test_factorized_networks_are_attacked_like_their_dense_twins(kind):
    model = kind().double()
    condlr_ext.factorize(model, rank=0.5, exclude="head")
    x, y = torch.rand(6, 3, 8, 8, dtype=torch.float64), torch.randint(5, (6,))
    model.train()
    if kind is ConvNet:
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


def test_generator_leaves_the_global_state_alone():
    model, (x, y) = network(), batch()
    before = torch.get_rng_state()
    a, b = (pgd(model, x, y, 0.1, steps=3, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(a, b) and torch.equal(torch.get_rng_state(), before)


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
