"""The FFT spectrum of convolutions against their explicit matrices."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.operators import EXACT, F64, matrix, norm
from torch import nn

from condlr_ext.errors import NonFiniteError, ShapeError
from condlr_ext.robustness import conv_singular_values, lipschitz


def ring_conv(weight, stride, dilation, groups):
    d = weight.dim() - 2
    conv = (F.conv1d, F.conv2d, F.conv3d)[d - 1]

    def run(x):
        for dim, k in enumerate(weight.shape[2:], start=2):
            step = dilation[dim - 2] if isinstance(dilation, tuple) else dilation
            around = torch.arange(x.shape[dim] + step * (k - 1)) % x.shape[dim]
            x = x.index_select(dim, around)
        return conv(x, weight, stride=stride, dilation=dilation, groups=groups)

    return run


@pytest.mark.parametrize(
    "out, inp, kernel, size, stride, dilation, groups",
    [
        (3, 2, (3, 3), (5, 6), 1, 1, 1),
        (2, 5, (1, 1), (4, 4), 1, 1, 1),
        (4, 2, (3, 3), (6, 4), 2, 1, 1),
        (2, 3, (5,), (4,), 1, 1, 1),  # the kernel wraps around
        (4, 4, (3, 2), (6, 9), (2, 3), (2, 1), 2),
        (5, 1, (2, 2, 2), (4, 4, 2), 2, 1, 1),
    ],
)
def test_fft_spectrum_is_the_svd_of_the_explicit_operator(out, inp, kernel, size, stride, dilation, groups):
    weight = torch.randn(out, inp // groups, *kernel, dtype=F64)
    explicit = torch.linalg.svdvals(matrix(ring_conv(weight, stride, dilation, groups), (inp, *size)))
    found = conv_singular_values(weight, size, stride=stride, dilation=dilation, groups=groups)
    torch.testing.assert_close(found, explicit, rtol=1e-12, atol=1e-12 * explicit[0].item())


def test_spectrum_of_an_orthogonal_convolution_repeats_one_value():
    delta = torch.zeros(3, 3, 3, 3)
    delta[:, :, 1, 1] = torch.eye(3)
    torch.testing.assert_close(conv_singular_values(delta, 5), torch.ones(75, dtype=F64))


def test_circular_norm_may_be_below_the_zero_padded_one_but_the_wider_ring_is_not():
    torch.manual_seed(3)
    below = 0
    for _ in range(20):
        conv = nn.Conv2d(1, 1, 3, padding=1, bias=False).double()
        true = norm(conv, (1, 3, 3))
        assert true <= conv_singular_values(conv.weight, (4, 4))[0] * EXACT
        assert true <= lipschitz(conv, torch.zeros(1, 1, 3, 3, dtype=F64)).bound * EXACT
        below += bool(conv_singular_values(conv.weight, (3, 3))[0] < true)
    assert below > 0


@pytest.mark.parametrize(
    "weight, size, options, error, message",
    [
        (torch.ones(2, 2), 4, {}, ShapeError, r"weight must be \[C_out, C_in / groups, \*kernel\]"),
        (torch.ones(3, 2, 3), 4, {"groups": 2}, ValueError, "groups must divide C_out = 3, .* got 2"),
        (torch.ones(3, 2, 3), 5, {"stride": 2}, ValueError, r"size must be a multiple of stride \(2,\), got \(5,\)"),
        (torch.full((3, 2, 3), math.nan), 4, {}, NonFiniteError, "weight must be finite"),
        (torch.ones(3, 2, 3), 0, {}, ValueError, "size must be an int or 1 ints >= 1, got 0"),
    ],
)
def test_bad_arguments_of_conv_singular_values(weight, size, options, error, message):
    with pytest.raises(error, match=message):
        conv_singular_values(weight, size, **options)
