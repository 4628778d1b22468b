"""Arguments for every op of the package, and one call of each."""

import math

import torch

import condlr_ext
from condlr_ext import linalg, reference

COMPILED = ("svd", "qr", "polar", "clip_spectrum", "step", "low_rank_linear", "low_rank_linear_backward")


def layer_tensors(dtype=torch.float32, m=6, n=5, r=3):
    U, _ = torch.linalg.qr(torch.randn(m, r, dtype=dtype))
    V, _ = torch.linalg.qr(torch.randn(n, r, dtype=dtype))
    return [U.contiguous(), torch.eye(r, dtype=dtype), V.contiguous(), torch.zeros(m, dtype=dtype)]


def hyper_table(layers, **options):
    """The table of the step op: the same options, of reference.HYPER, for every layer and role."""
    hyper = torch.zeros(layers, 4, len(reference.HYPER), dtype=torch.float64)
    values = dict(lr=0.05, momentum=0.3, precondition=1, tau=0.1, sigma_max=math.inf) | options
    for column, value in values.items():
        hyper[..., reference.HYPER.index(column)] = value
    return hyper


def step_arguments(dtype=torch.float32):
    params = layer_tensors(dtype) + layer_tensors(dtype, 4, 4, 2)
    hyper = hyper_table(2, lr=0.1)
    grads = [torch.randn_like(p) for p in params]
    return params, grads, [torch.zeros_like(p) for p in params], hyper, torch.zeros(2, dtype=torch.int64)


def arguments(name):
    U, S, V, b = layer_tensors()
    X = torch.randn(2, 4, 5)
    mask = [True, False, True, True, True]
    image = torch.randn(2, 2, 6, 6)
    Vc = torch.randn(2 * 9, 3)
    geometry = ([3, 3], [1, 2], [1, 1], [1, 1], 1)
    if name == "low_rank_linear":
        return [(X, U, S, V, b), (X[:0], U, S, V, None)]
    if name == "low_rank_linear_backward":
        return [
            (torch.randn(2, 4, 6), X, X @ V, U, S, V, mask),
            (torch.randn(2, 4, 6), X, X @ V, U, S, V, [False] * 5),
            (torch.randn(2, 4, 6), None, None, U, S, V, [True, False, False, False, True]),
        ]
    if name == "low_rank_conv":
        nhwc = image.to(memory_format=torch.channels_last)
        return [(image, U, S, Vc, b, *geometry), (nhwc, U, S, Vc, None, *geometry)]
    if name == "low_rank_conv_backward":
        Y, P = reference.low_rank_conv(image, U, S, Vc, b, *geometry)
        return [
            (torch.randn_like(Y), image, P, U, S, Vc, mask, *geometry),
            (torch.randn_like(Y), image, None, U, S, Vc, mask, *geometry),
            (torch.randn_like(Y), image, None, U, S, Vc, [False, False, False, True, True], *geometry),
        ]
    if name == "step":
        return [step_arguments(), step_arguments(torch.float64)]
    constraint = (0.1, 0, math.inf) if name == "clip_spectrum" else ()
    return [
        (torch.randn(s, dtype=d), *constraint)
        for s in ((4, 4), (2, 5, 3), (3, 5), (0, 2, 2))
        for d in (torch.float32, torch.float64)
    ]


def one_of_each():
    """Run every op of the package once through the public functions and the optimizer."""
    torch.manual_seed(0)
    A = torch.randn(4, 4)
    linalg.svd(A), linalg.qr(A), linalg.polar(A), linalg.clip_spectrum(A, 0.1)
    model = torch.nn.Sequential(
        condlr_ext.LowRankConv2d(1, 4, 3, rank=3), torch.nn.Flatten(), condlr_ext.LowRankLinear(16, 5, rank=2)
    )
    optimizer = condlr_ext.optim.CondLRSGD(model, 0.1, tau=0.1)
    for route in ("factorized", "merged"):
        model[0].route = model[2].route = route
        model(torch.randn(16, 1, 4, 4)).sum().backward()
    optimizer.step()
    return [p.detach().clone() for p in model.parameters()]
