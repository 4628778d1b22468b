"""APGD against the paper's algorithm written out for one sample, and its schedule."""

import math

import pytest
import torch
from torch import nn

from condlr_ext.attacks import apgd, pgd
from condlr_ext.attacks.auto_pgd import checkpoints


def test_published_checkpoints():
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert checkpoints(10) == [3, 5, 6, 7, 8, 9, 10, 10]  # ceil
    assert checkpoints(50)[:3] == [11, 21, 29]


class Recorder(nn.Module):
    """A bumpy network that remembers every input it was asked for a gradient at."""

    def __init__(self, d=6, classes=4):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(d, 16), nn.Tanh(), nn.Linear(16, classes)).double()
        self.body[0].weight.data *= 3
        self.seen = []

    def logits(self, x):
        return self.body(torch.sin(9 * x))

    def forward(self, x):
        if x.requires_grad:
            self.seen.append(x.detach().clone())
        return self.logits(x)


def algorithm_1(model, x, y, eps, norm, start, steps):
    """Croce and Hein, algorithm 1, for one sample; returns every point at which it takes a gradient."""

    def project(z):
        delta = z - x
        if norm == "linf":
            delta = delta.clamp(-eps, eps)
        elif delta.norm() > eps:
            delta = delta * eps / delta.norm()
        return (x + delta).clamp(0, 1)

    def f(z):
        z = z.clone().requires_grad_()
        value = nn.functional.cross_entropy(model.logits(z[None]), y[None])
        (grad,) = torch.autograd.grad(value, z)
        return value.item(), grad.sign() if norm == "linf" else grad / grad.norm()

    p = [0.0, 0.22]
    while p[-1] < 1:
        p.append(p[-1] + max(p[-1] - p[-2] - 0.03, 0.06))
    w = [math.ceil(round(q * steps, 9)) for q in p if q < 1]
    eta, value = 2 * eps, f(start)[0]
    best, best_value = start, value
    current, previous, trail = start, start, [start]
    eta_then, best_then, rises, j = eta, best_value, 0, 1
    for k in range(steps):
        z = project(current + eta * f(current)[1])
        new = z if k == 0 else project(current + 0.75 * (z - current) + 0.25 * (current - previous))
        new_value = f(new)[0]
        trail.append(new)
        rises += new_value > value
        if new_value > best_value:
            best, best_value = new, new_value
        previous, current, value = current, new, new_value
        if j < len(w) and k + 1 == w[j]:
            condition_1 = rises < 0.75 * (w[j] - w[j - 1])
            condition_2 = eta_then == eta and best_then == best_value
            eta_then, best_then, rises = eta, best_value, 0
            if condition_1 or condition_2:
                eta, current, value = eta / 2, best, best_value
            j += 1
    return trail


@pytest.mark.parametrize("norm, eps", [("linf", 0.1), ("l2", 0.4)])
def test_every_point_visited_is_that_of_algorithm_1(norm, eps):
    model = Recorder()
    x, y = torch.rand(12, 6, dtype=torch.float64), torch.randint(4, (12,))
    apgd(model, x, y, eps, norm=norm, steps=50)
    ours = torch.stack(model.seen, dim=1)
    for i in range(len(x)):
        expected = torch.stack(algorithm_1(model, x[i], y[i], eps, norm, ours[i, 0], 50))
        torch.testing.assert_close(ours[i], expected, rtol=0, atol=1e-8)  # rounding grows along the path


def test_a_step_size_just_halved_is_not_halved_for_want_of_a_new_best():
    """The start is a spike that no later point reaches, on a slope that short steps climb until a checkpoint."""
    noise = torch.rand(1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    start = 0.5 + 0.1 * (2 * noise.item() - 1)
    left = 1 if start < 0.5 else -1

    class Spike(Recorder):
        def logits(self, x):
            s = left * x[:, 0] + 9 * torch.exp(-(((x[:, 0] - start) / 1e-4) ** 2))
            return torch.stack((0 * s, s), dim=1)

    model, x, y = Spike(), torch.full((1, 1), 0.5, dtype=torch.float64), torch.tensor([0])
    apgd(model, x, y, 0.1, steps=50, generator=torch.Generator().manual_seed(1))
    ours = torch.stack(model.seen, dim=1)[0]
    torch.testing.assert_close(ours, torch.stack(algorithm_1(model, x[0], y[0], 0.1, "linf", ours[0], 50)))
    moves = left * ours.diff(dim=0)[:, 0]
    assert (moves[30:35] > 0).all() and moves[35] > 0  # all but the first of the six up to checkpoint 35; no return
    assert moves[40] < 0  # but now, after a second window without a new best


def test_it_needs_no_step_size():
    """On a narrow valley fixed steps of PGD jump to and fro; APGD halves until it climbs."""

    class Valley(nn.Module):
        def forward(self, x):
            s = -((x[:, 0] - 0.5 - 0.013) ** 2) * 400 - ((x[:, 1:] - 0.55) ** 2).sum(1)
            return torch.stack((0 * s, s, -5 + 0 * s), dim=1)

    x, y = torch.full((1, 5), 0.5, dtype=torch.float64), torch.tensor([0])
    model = Valley()
    adaptive, fixed = (model(a(model, x, y, 0.1))[0, 1] for a in (apgd, pgd))
    assert adaptive > -1e-5 and fixed < -1e-3


def test_targets_are_the_likeliest_wrong_classes():
    asked = []

    class Aimed(nn.Module):
        def forward(self, x):
            s = torch.stack([x[:, k] for k in range(6)], dim=1)
            if x.requires_grad:
                s.register_hook(lambda grad: asked.append(grad[0].argmax().item()))
            return s

    x = torch.tensor([[0.9, 0.5, 0.7, 0.6, 0.4, 0.3]], dtype=torch.float64)
    y = torch.tensor([0])
    apgd(Aimed(), x, y, 1e-3, loss="dlr-targeted", steps=3, targets=3)
    assert asked == [2] * 4 + [3] * 4 + [1] * 4
    asked.clear()
    apgd(Aimed(), x, y, 1e-3, loss="dlr-targeted", steps=1)  # all five there are
    assert asked[::2] == [2, 3, 1, 4, 5]


@pytest.mark.parametrize("option", ["steps", "restarts", "targets"])
def test_bad_counts(option):
    x, y = torch.rand(2, 6, dtype=torch.float64), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=f"apgd: {option} must be an integer >= 1, got 0"):
        apgd(Recorder(), x, y, 0.1, **{option: 0})
    with pytest.raises(ValueError, match="needs at least 4 classes, got 3"):
        apgd(Recorder(classes=3), x, y, 0.1, loss="dlr-targeted")


def test_generator_and_restarts():
    model = Recorder()
    x, y = torch.rand(30, 6, dtype=torch.float64), torch.randint(4, (30,))
    before = torch.get_rng_state()
    a, b = (apgd(model, x, y, 0.1, steps=9, restarts=2, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(a, b) and torch.equal(torch.get_rng_state(), before)
    loss = nn.CrossEntropyLoss(reduction="none")
    once = apgd(model, x, y, 0.1, steps=9, generator=torch.Generator().manual_seed(5))
    beaten, more = (model(z).argmax(1) != y for z in (once, a))
    assert (more | ~beaten).all()  # the second restart loses nothing
    still = ~more
    assert (loss(model(a), y)[still] >= loss(model(once), y)[still]).all()


@pytest.mark.parametrize("loss", ["ce", "dlr-targeted"])
def test_misclassified_samples_are_left_out_of_further_ascents(loss):
    model = Recorder()
    x = torch.rand(40, 6, dtype=torch.float64)
    y = model(x).topk(2).indices[torch.arange(40), torch.tensor([0] * 37 + [1] * 3)]  # three are wrong from the start
    eps, ascents, steps = torch.tensor([0.005, 0.03], dtype=torch.float64), 3, 6
    result = apgd(model, x, y, eps, loss=loss, steps=steps, restarts=1 if "t" in loss else 3, targets=3)
    labels, left = y.repeat(2), torch.arange(80)
    for ascent in range(ascents):
        points = torch.stack(model.seen[ascent * (steps + 1) : (ascent + 1) * (steps + 1)])
        assert points.shape[1] == len(left)
        assert ((points - x.repeat(2, 1)[left]).abs().amax((0, 2)) <= eps.repeat_interleave(40)[left] + 1e-12).all()
        visits = model.logits(points.flatten(0, 1)).argmax(1).view(steps + 1, -1)
        found = (visits != labels[left]).any(0) | (model.logits(x.repeat(2, 1)[left]).argmax(1) != labels[left])
        left = left[~found]
        assert 0 < len(left) < 75  # there is something to see
    beaten = torch.ones(80, dtype=torch.bool)
    beaten[left] = False
    assert torch.equal(model.logits(result.flatten(0, 1)).argmax(1) != labels, beaten)


def test_it_ends_when_nothing_is_left():
    model = Recorder()
    x = torch.rand(5, 6, dtype=torch.float64)
    y = (model(x).argmax(1) + 1) % 4
    apgd(model, x, y, 0.01, steps=4, restarts=3)
    assert len(model.seen) == 5 and all(len(points) == 5 for points in model.seen)
