"""Geometries of convolutions, layers with random parameters, and comparison with a dense twin."""

import pytest
import torch

ROUTES = pytest.mark.parametrize("route", ["factorized", "merged"])

CONVS = [
    dict(kernel_size=3),
    dict(kernel_size=3, padding=1, bias=False),
    dict(kernel_size=3, stride=2, padding=2, dilation=2),
    dict(kernel_size=2, padding="same", dilation=3),
    dict(kernel_size=3, padding="valid", groups=2),
    dict(kernel_size=3, padding=2, padding_mode="reflect"),
    dict(kernel_size=3, padding="same", padding_mode="circular", groups=2),
    dict(kernel_size=3, padding=1, padding_mode="replicate", stride=2),
    dict(kernel_size=1),
    dict(kernel_size=3, padding="same", dilation=2, groups=2),
    dict(kernel_size=2, padding="same", padding_mode="reflect", dilation=3, bias=False),
    dict(kernel_size=3, stride=2, padding=3, dilation=2, groups=2, padding_mode="circular"),
]


def randomize(layer):
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn_like(p))
    return layer


def spread(adapter, seed=0):
    """Give an adapter a change as after training: orthonormal U, V, singular values 1 to 1.5."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for X in (adapter.delta.U, adapter.delta.V):
            X.copy_(torch.linalg.qr(torch.randn(X.shape, generator=g, dtype=torch.float64))[0])
        Q = torch.linalg.qr(torch.randn(adapter.rank, adapter.rank, generator=g, dtype=torch.float64))[0]
        adapter.delta.S.copy_(Q * torch.linspace(1.5, 1, adapter.rank))
    return adapter


def gradients(fn, tensors):
    """Gradients of the sum of squares of fn(*tensors)."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    fn(*leaves).pow(2).sum().backward()
    return [leaf.grad for leaf in leaves]


def assert_close_float64(ours, theirs):
    """Through some ten layers in float64, rounding errors stay many orders below 1e-10 of the scale."""
    assert (ours - theirs).abs().max() <= 1e-10 * theirs.abs().max()
