"""Random starts in balls."""

import math

import pytest
import torch

from condlr_ext.attacks.balls import BALLS, l2_norm, unit_l2


def test_l2_random_start():
    """A uniform direction at a uniform distance; 5 standard deviations of what 4000 draws leave to chance."""
    noise = BALLS["l2"].sample(torch.zeros(4000, 3, dtype=torch.float64), None)
    radius = noise.norm(dim=1)
    assert radius.max() <= 1
    for t in (0.3, 0.5, 0.8):
        assert abs((radius <= t).double().mean() - t) < 5 * math.sqrt(t * (1 - t) / 4000)
    direction = noise / radius[:, None]
    assert direction.mean(0).abs().max() < 5 * math.sqrt(1 / 3 / 4000)
    cosine = direction[:, 0]  # Archimedes: uniform in [-1, 1]
    assert abs((cosine <= 0.5).double().mean() - 0.75) < 5 * math.sqrt(0.75 * 0.25 / 4000)


@pytest.mark.parametrize("scale", [1e-40, 1e-25, 1e25, 1e37])
def test_l2_norms_directions_and_projections_at_any_scale(scale):
    delta = torch.randn(5, 3, 4)
    norms = delta.flatten(1).norm(dim=1)
    rtol = 1e-3 if scale < 1e-38 else 1e-5
    torch.testing.assert_close(l2_norm(delta * scale) / scale, norms, rtol=rtol, atol=0)
    torch.testing.assert_close(unit_l2(delta * scale), delta / norms.view(5, 1, 1), rtol=rtol, atol=1e-5)
    radius = torch.tensor(scale)
    projected = BALLS["l2"].project(delta * scale, radius) / scale
    expected = delta / norms.clamp_min(1).view(5, 1, 1)
    torch.testing.assert_close(projected, expected, rtol=rtol, atol=1e-3 if scale < 1e-38 else 1e-5)
