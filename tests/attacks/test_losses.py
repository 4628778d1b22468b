"""The losses of attacks by hand."""

import torch
from torch import nn

from condlr_ext.attacks.losses import cross_entropy, dlr, log_odds, rescaled_cross_entropy, targeted_dlr


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
