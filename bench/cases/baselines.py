"""Baselines: the same layers and step in plain PyTorch, and an exact form of the released step."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condlr_ext.baselines import ReleasedCondLR
from condlr_ext.nn import LowRankConv2d, LowRankLayer, LowRankLinear


def plain_linear(x: Tensor, U: Tensor, S: Tensor, V: Tensor, bias: Tensor | None) -> Tensor:
    """Return Y = (X V) (U S)ᵀ + b by ordinary autograd operations."""
    return F.linear(F.linear(x, V.mT), U @ S, bias)


def plain_conv2d(x: Tensor, U: Tensor, S: Tensor, V: Tensor, bias: Tensor | None, kernel_size, stride, padding):
    """Convolve with the r filters of V, then pointwise with U S."""
    filters = V.mT.reshape(V.shape[1], -1, *kernel_size)
    return F.conv2d(F.conv2d(x, filters, None, stride, padding), (U @ S)[:, :, None, None], bias)


class PlainLinear(nn.Module):
    """Module of plain_linear with a layer's parameters."""

    def __init__(self, layer: LowRankLinear):
        super().__init__()
        self.U, self.S, self.V, self.bias = layer.U, layer.S, layer.V, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return plain_linear(x, self.U, self.S, self.V, self.bias)


class PlainConv2d(nn.Module):
    """Module of plain_conv2d with a layer's parameters."""

    def __init__(self, layer: LowRankConv2d):
        super().__init__()
        self.U, self.S, self.V, self.bias = layer.U, layer.S, layer.V, layer.bias
        self.geometry = layer.kernel_size, layer.stride, layer.padding

    def forward(self, x: Tensor) -> Tensor:
        return plain_conv2d(x, self.U, self.S, self.V, self.bias, *self.geometry)


def plain_twin(model: nn.Module) -> nn.Module:
    """Return a copy of a factorized model with plain layers: the same function, parameters and parameter names."""
    twin = copy.deepcopy(model)
    for name, module in list(twin.named_modules()):
        if isinstance(module, LowRankLayer):
            twin.set_submodule(name, (PlainLinear if isinstance(module, LowRankLinear) else PlainConv2d)(module))
    return twin


STACKED = 1 << 14  # numbers of a layer up to which layers of one shape are stepped as a batch


class FastPyTorch:
    """The package's step in plain PyTorch: B - U(UᵀB), Cholesky-QR, torch.linalg.eigh and a vectorized clamp.

    Small layers of one shape are stepped as a batch: for them the calls cost more than the copies.

    Args:
        model: A factorized model.
        lr: Learning rates of "factors", "cores" and "other" parameters.
        momentum: Momentum.
        tau: Width of the band.
    """

    def __init__(self, model: nn.Module, lr: dict[str, float], momentum: float, tau: float):
        params = dict(model.named_parameters())
        prefixes = [name[:-1] for name in params if name.endswith(".S")]
        self.layers = [[params[prefix + role] for role in "USV"] for prefix in prefixes]
        inside = {id(p) for layer in self.layers for p in layer}
        self.others = [p for p in params.values() if id(p) not in inside]
        self.params = [p for layer in self.layers for p in layer] + self.others
        self.lr, self.momentum, self.tau = lr, momentum, tau
        self.buffers = []
        alike = {}
        for i, layer in enumerate(self.layers):
            small = sum(p.numel() for p in layer) <= STACKED
            alike.setdefault(tuple(p.shape for p in layer) if small else i, []).append(i)
        self.batches = list(alike.values())

    def zero_grad(self) -> None:
        for p in self.params:
            p.grad = None

    @torch.no_grad()
    def step(self) -> None:
        grads = [p.grad for p in self.params]
        if self.buffers:
            torch._foreach_mul_(self.buffers, self.momentum)
            torch._foreach_add_(self.buffers, grads)
        else:
            self.buffers = [g.clone() for g in grads]
        buffers = [self.buffers[3 * i : 3 * i + 3] for i in range(len(self.layers))]
        for batch in self.batches:
            if len(batch) == 1:
                self.layer_step(*self.layers[batch[0]], *buffers[batch[0]])
                continue
            parameters = list(zip(*(self.layers[i] for i in batch), strict=True))
            stacked = [torch.stack(ps) for ps in parameters]
            self.layer_step(*stacked, *map(torch.stack, zip(*(buffers[i] for i in batch), strict=True)))
            for ps, new in zip(parameters, stacked, strict=True):
                torch._foreach_copy_(ps, new.unbind())
        torch._foreach_add_(self.others, self.buffers[3 * len(self.layers) :], alpha=-self.lr["other"])

    def layer_step(self, U, S, V, BU, BS, BV) -> None:
        for X, B, gram in ((U, BU, S @ S.mT), (V, BV, S.mT @ S)):
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
            Y = X - self.lr["factors"] * (B - X @ (X.mT @ B)) @ inverse
            L = torch.linalg.cholesky(Y.mT @ Y)
            X.copy_(torch.linalg.solve_triangular(L.mT, Y, upper=True, left=False))
        S.copy_(clamp_by_eigh(S - self.lr["cores"] * BS, self.tau))


class ReleasedByFormula(ReleasedCondLR):
    """The released step without the n x n matrix, against which ReleasedCondLR is checked in float64."""

    @staticmethod
    def tangent(X: Tensor, direction: Tensor) -> Tensor:
        return direction - X @ (X.mT @ direction)


def svd(A: Tensor):
    """Return torch.linalg.svd, in float64 if LAPACK does not converge in float32, as happens on clamped cores."""
    try:
        return torch.linalg.svd(A)
    except torch.linalg.LinAlgError:
        return tuple(t.to(A.dtype) for t in torch.linalg.svd(A.double()))


def clamp_by_svd(A: Tensor, tau: float) -> Tensor:
    """Clamp the singular values to the band around their root mean square; A may be a batch."""
    P, sigma, Qh = svd(A)
    return (P * clamped(sigma, tau).unsqueeze(-2)) @ Qh


def clamp_by_eigh(A: Tensor, tau: float) -> Tensor:
    """Clamp likewise by the eigenvectors of AᵀA: faster, and as accurate for A far from singular, as after a step."""
    squares, V = torch.linalg.eigh(A.mT @ A)
    sigma = squares.sqrt()
    return A @ (V * (clamped(sigma, tau) / sigma).unsqueeze(-2)) @ V.mT


def clamped(sigma: Tensor, tau: float) -> Tensor:
    lo = 2 / (2 + tau) * torch.linalg.vector_norm(sigma, dim=-1, keepdim=True) / sigma.shape[-1] ** 0.5
    return torch.clamp(sigma, lo, (1 + tau) * lo)
