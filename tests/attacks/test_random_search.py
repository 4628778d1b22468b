"""Square: what it breaks without gradients, balls, shapes, its schedule."""

import pytest
import torch
from helpers.classifiers import Function, batch, network

from condlr_ext.attacks import pgd, square
from condlr_ext.attacks.balls import BALLS
from condlr_ext.attacks.random_search import _share

NORMS = pytest.mark.parametrize("norm", BALLS)


def seeded():
    return torch.Generator().manual_seed(0)


@NORMS
def test_most_of_what_can_be_broken_is(norm):
    w = torch.randn(2, 2, dtype=torch.float64).repeat_interleave(4, 0).repeat_interleave(4, 1)  # windows see the like
    model = Function(lambda x: torch.stack([(x * w).sum((1, 2, 3)), -(x * w).sum((1, 2, 3))], 1))
    x = 0.3 + 0.4 * torch.rand(40, 1, 8, 8, dtype=torch.float64)
    x -= (x * w).sum((1, 2, 3), keepdim=True) * w / w.square().sum() * torch.rand(40, 1, 1, 1)  # nearer to the boundary
    x = x.clamp(0.1, 0.9)
    y = model(x).argmax(1)
    eps = 0.1 if norm == "linf" else 0.5
    reachable = (x * w).sum((1, 2, 3)).abs() < eps * torch.linalg.vector_norm(w, 1 if norm == "linf" else 2)
    broken = model(square(model, x, y, eps, norm=norm, queries=300, generator=seeded())).argmax(1) != y
    assert not (broken & ~reachable).any() and broken.sum() > 0.7 * reachable.sum() > 10


def test_a_network_that_hides_its_gradients_is_no_harder():
    inner, (x, y) = network(), batch(40)
    y = inner(x.round(decimals=2)).argmax(1)
    masked = Function(lambda x: inner(x.round(decimals=2)) + 0 * x.sum(1, keepdim=True))
    stands = [
        (masked(found).argmax(1) == y).sum()
        for found in (
            pgd(masked, x, y, 0.2, steps=20, random_start=False),
            square(masked, x, y, 0.2, queries=300, generator=seeded()),
            pgd(inner, x, y, 0.2, steps=20, random_start=False),
        )
    ]
    assert stands[0] == 40 and stands[1] <= stands[2] + 3 < 30


@NORMS
def test_balls_budgets_and_seed(norm):
    model, (x, y) = network(dtype=torch.float32), batch(30, dtype=torch.float32)
    before = torch.get_rng_state()
    eps = [0.0, 0.05, 0.3]
    found = square(model, x, y, eps, norm=norm, queries=30, generator=seeded())
    assert torch.equal(before, torch.get_rng_state()) and found.shape == (3, 30, 9)
    assert found.min() >= 0 and found.max() <= 1 and torch.equal(found[0], x)
    size = BALLS[norm].norm((found - x).flatten(0, 1)).view(3, -1)
    assert (size.amax(1) <= torch.tensor(eps) + 1e-6).all() and size[2].max() > 0.25
    assert torch.equal(found, square(model, x, y, eps, norm=norm, queries=30, generator=seeded()))


@NORMS
@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 1, 3, 2), (4, 3, 32, 32), (4, 2, 3, 4, 5), (0, 3)], ids=str)
def test_any_input_shape(norm, shape):
    model = Function(lambda x: x.reshape(len(x), -1)[:, :1] * torch.tensor([1.0, -1.0, 0.5, 0.2]) + 0.1)
    x, y = torch.rand(shape), torch.zeros(shape[0], dtype=torch.int32)
    assert square(model, x, y, 0.1, norm=norm, queries=6).shape == shape
    assert square(model, x, y, [0.1, 0.2], norm=norm, queries=3).shape == (2, *shape)


def test_the_published_schedule_scales_with_the_queries():
    shares = [_share(q, 10_000) for q in (0, 10, 11, 50, 51, 8001)]
    assert shares == [0.8, 0.8, 0.4, 0.4, 0.2, 0.8 / 2**9]
    assert _share(6, 5000) == 0.4 and _share(4001, 5000) == 0.8 / 2**9


def test_bad_arguments():
    model, (x, y) = network(), batch()
    with pytest.raises(ValueError, match="square: queries must be an integer >= 1, got 0"):
        square(model, x, y, 0.1, queries=0)
    with pytest.raises(ValueError, match="square: norm must be one of linf, l2, got 'nuc'"):
        square(model, x, y, 0.1, norm="nuc")
