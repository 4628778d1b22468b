"""Random starts in balls."""

import math

import torch


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
