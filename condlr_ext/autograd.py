"""One torch.autograd.Function per differentiable op, over torch.ops.condlr_ext.*.

The first argument is the backend of forward, kept for backward, which may run in another thread. The backwards of
linear algebra are closed forms for full-rank input.
"""

import torch
from torch import Tensor
from torch.autograd import Function

from . import ops, reference
from .ops import layers, linalg

# The layers' Functions take ctx in forward: with setup_context torch looks up the signature at every call, which costs
# as much as a small layer. torch.func would need it, but functional sends that to plain products.


class LowRankLinearFunction(Function):
    """Y of reference.low_rank_linear."""

    @staticmethod
    def forward(ctx, backend, *args):
        return _factorized(ctx, layers.low_rank_linear, backend, args)

    @staticmethod
    def backward(ctx, grad):
        return _factorized_backward(ctx, layers.low_rank_linear_backward, reference.low_rank_linear_backward, grad)


class LowRankConvFunction(Function):
    """Y of reference.low_rank_conv."""

    @staticmethod
    def forward(ctx, backend, *args):
        return _factorized(ctx, layers.low_rank_conv, backend, args)

    @staticmethod
    def backward(ctx, grad):
        return _factorized_backward(ctx, layers.low_rank_conv_backward, reference.low_rank_conv_backward, grad)


def _factorized(ctx, op, backend, args):
    """Return Y. Save the factors, P for dU and dS, and X for dV and to compute P again in double backward.

    A convolution also needs X for dX, as torch's does: its size does not follow from that of Y.
    """
    Y, P = op.run(backend, *args)
    input, U, S, V, _, *ctx.geometry = args
    _, by_X, by_U, by_S, by_V, *_ = ctx.needs_input_grad
    of_P = by_U or by_S
    ctx.backend = backend
    ctx.save_for_backward(input if by_V or (by_X and (of_P or ctx.geometry)) else None, P if of_P else None, U, S, V)
    return Y


def _factorized_backward(ctx, op, differentiable, grad):
    input, P, U, S, V = ctx.saved_tensors
    if torch.is_grad_enabled() and input is not None:
        P = None  # computed again as a function of X and V
    return _gradients(ctx, op, differentiable, grad, input, P, U, S, V)


def _gradients(ctx, op, differentiable, *tensors):
    """Return the gradients that are needed: by the op of forward's backend, or differentiably for double backward."""
    mask = list(ctx.needs_input_grad[1:6])
    if torch.is_grad_enabled():
        gradients = differentiable(*tensors, mask, *ctx.geometry)
    else:
        gradients = op.run(ctx.backend, *tensors, mask, *ctx.geometry)
    rest = (None,) * len(ctx.geometry)
    return None, *(g if needed else None for g, needed in zip(gradients, mask, strict=True)), *rest


def _full_precision(backward):
    """Wrap a backward so that it ignores autocast."""

    def run(ctx, *grads):
        with ops.no_autocast(ctx.saved_tensors[0].device.type):
            return backward(ctx, *grads)

    return run


class SVDFunction(Function):
    """(U, sigma, V, info); gradients through U or V need distinct singular values."""

    generate_vmap_rule = True

    @staticmethod
    def forward(backend, A):
        return linalg.svd.run(backend, A)

    @staticmethod
    def setup_context(ctx, inputs, output):
        U, sigma, V, info = output
        ctx.mark_non_differentiable(info)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(U, sigma, V)

    @staticmethod
    @_full_precision
    def backward(ctx, dU, dsigma, dV, _):
        U, sigma, V = ctx.saved_tensors
        core, dA = None, 0
        if dsigma is not None:
            core = torch.diag_embed(dsigma)
        if dU is not None or dV is not None:
            _refuse_undefined(sigma, square=U.shape[-2] == V.shape[-2])
            # Gradients through U and V are those of A / scale, divided by scale. U dS V: (J - Jᵀ) sigma_j over
            # sigma_j² - sigma_i², as a product of quotients in which no square can underflow.
            scale = reference.magnitude(sigma, -1).unsqueeze(-1)
            relative = sigma / scale.squeeze(-1)
            row, col = relative.unsqueeze(-1), relative.unsqueeze(-2)
            off = ~torch.eye(sigma.shape[-1], dtype=torch.bool, device=sigma.device)
            total, gap = torch.where(off, row + col, 1), torch.where(off, col - row, 1)
            turn = 0
            if dU is not None:
                J = U.mT @ dU
                turn = turn + torch.where(off, col / total / gap, 0) * (J - J.mT)
                if U.shape[-2] > U.shape[-1]:
                    dA = dA + reference.tangent_projection(U, dU) / col / scale @ V.mT
            if dV is not None:
                K = V.mT @ dV
                turn = turn + torch.where(off, row / total / gap, 0) * (K - K.mT)
                if V.shape[-2] > V.shape[-1]:
                    dA = dA + U @ (reference.tangent_projection(V, dV) / col / scale).mT
            core = turn / scale if core is None else core + turn / scale
        return None, None if core is None else U @ core @ V.mT + dA


def _zero_to_rounding(sigma: Tensor) -> Tensor:
    """Return which singular values are noise: below what float64 can tell from zero next to sigma_1."""
    return sigma <= 4 * torch.finfo(torch.float64).eps * sigma[..., :1]


def _refuse_undefined(sigma: Tensor, square: bool) -> None:
    """Raise ArithmeticError where the gradient through U or V does not exist; only checks CPU tensors, not in traces.

    Args:
        sigma: Singular values.
        square: Whether the matrix is square, so that a single zero singular value does no harm.
    """
    if not ops.can_check(sigma) or sigma.numel() == 0:
        return
    zero = _zero_to_rounding(sigma)
    equal = (-sigma.diff() <= torch.finfo(sigma.dtype).eps * sigma[..., :-1]) | zero[..., :-1]
    if equal.any() or (not square and zero.any()):
        raise ArithmeticError(
            "linalg.svd: the gradient through U or V is not defined at equal singular values, nor at zero ones of a"
            " matrix that is not square; use sigma alone, or polar or clip_spectrum, whose gradients are at equal ones"
        )


class QRFunction(Function):
    """(Q, R, info); backward needs full column rank (for m < n, of the first m columns)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(backend, A):
        return linalg.qr.run(backend, A)

    @staticmethod
    def setup_context(ctx, inputs, output):
        Q, R, info = output
        ctx.mark_non_differentiable(info)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs[1], Q, R)

    @staticmethod
    @_full_precision
    def backward(ctx, dQ, dR, _):
        if dQ is None and dR is None:
            return None, None
        A, Q, R = ctx.saved_tensors
        k = Q.shape[-1]
        _refuse_dependent(R[..., :k])
        dQ = torch.zeros_like(Q) if dQ is None else dQ
        dR = torch.zeros_like(R) if dR is None else dR
        # m < n: R = Qᵀ A, so the columns of A past the first m act only through Q
        tail = Q @ dR[..., k:]
        # the gradient of A / scale, divided by it
        scale = reference.magnitude(R[..., :k])
        dQ = dQ / scale + (A[..., k:] / scale) @ dR[..., k:].mT
        R, dR = R[..., :k] / scale, dR[..., :k]
        M = (R @ dR.mT - dQ.mT @ Q).tril()
        M = M + M.tril(-1).mT
        head = torch.linalg.solve_triangular(R.mT, dQ + Q @ M, upper=False, left=False)
        return None, torch.cat((head, tail), dim=-1)


def _refuse_dependent(R: Tensor) -> None:
    """Raise ArithmeticError where a column depends on those before it to rounding; R [*, k, k]; see _refuse_undefined.

    R_jj is the distance of column j to their span, and the norm of R's column j is its length.
    """
    if not ops.can_check(R) or R.numel() == 0:
        return
    rounding = 4 * torch.finfo(R.dtype).eps  # random matrices without full rank show up to 2.6 eps, at any size
    if (R.diagonal(dim1=-2, dim2=-1) <= rounding * reference.norm(R, -2)).any():
        dependent = "without full rank, here a column that depends on those before it to rounding"
        large = f"whose R exceeds the range of {R.dtype}; divide A by a power of two"
        raise ArithmeticError(
            f"linalg.qr: the gradient is not defined for a matrix {dependent if R.isfinite().all() else large}"
        )


class PolarFunction(Function):
    """(Q, info) of A = Q H; backward needs full rank."""

    generate_vmap_rule = True

    @staticmethod
    def forward(backend, A):
        return linalg.polar.run(backend, A)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.backend, A = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(A)

    @staticmethod
    @_full_precision
    def backward(ctx, dQ, _):
        if dQ is None:
            return None, None
        (A,) = ctx.saved_tensors
        scale = reference.magnitude(A)
        U, sigma, V, _ = SVDFunction.apply(ctx.backend, A / scale)
        needed = sigma.shape[-1] - (A.shape[-2] == A.shape[-1])  # one zero of a square matrix does no harm
        if ops.can_check(A) and _zero_to_rounding(sigma)[..., :needed].any():
            raise ArithmeticError("linalg.polar: the gradient is not defined for a matrix without full rank")
        return None, _spectral_gradient(dQ, U, sigma, V, torch.ones_like(sigma), torch.zeros_like(sigma)) / scale


class ClipSpectrumFunction(Function):
    """(out, info) of clip_spectrum; the band's edges count as constants, so the gradient along a clipped sigma is 0."""

    generate_vmap_rule = True

    @staticmethod
    def forward(backend, A, tau, band, sigma_max):
        return linalg.clip_spectrum.run(backend, A, tau, band, sigma_max)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.backend, A, *ctx.constraint = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(A)

    @staticmethod
    @_full_precision
    def backward(ctx, grad, _):
        if grad is None:
            return (None,) * 5
        (A,), (tau, band, sigma_max) = ctx.saved_tensors, ctx.constraint
        scale = reference.magnitude(A)  # the gradient is that of A / scale
        U, sigma, V, _ = SVDFunction.apply(ctx.backend, A / scale)
        edges = reference.clip_edges(sigma.detach(), tau, reference.BANDS[band], reference.at_scale(sigma_max, scale))
        lo, hi = (e.unsqueeze(-1) for e in edges)
        # a sigma at an edge, to rounding, is inside; a band narrower than that (tau = 0) has no inside
        slack = 16 * torch.finfo(sigma.dtype).eps * sigma.detach()[..., :1]
        inside = (sigma >= lo - slack) & (sigma <= hi + slack) & (hi - lo > 2 * slack)
        clipped = torch.where(inside, sigma, sigma.clamp(lo, hi))
        return None, _spectral_gradient(grad, U, sigma, V, clipped, inside.to(sigma.dtype)), None, None, None


def _spectral_gradient(grad: Tensor, U: Tensor, sigma: Tensor, V: Tensor, f: Tensor, slope: Tensor) -> Tensor:
    """Return the gradient through A = U diag(sigma) Vᵀ -> U diag(f(sigma)) Vᵀ by divided differences.

    With G = Uᵀ grad V, the symmetric part is scaled by (f_i - f_j) / (sigma_i - sigma_j), or the slope where these are
    equal, and the skew part by (f_i + f_j) / (sigma_i + sigma_j), so repeated values are harmless. The arbitrary
    direction that completes a zero singular value counts as a constant.
    """
    sigma = torch.where(_zero_to_rounding(sigma), 0, sigma)
    G = U.mT @ grad @ V
    row, col = sigma.unsqueeze(-1), sigma.unsqueeze(-2)
    close = (row - col).abs() <= 8 * torch.finfo(sigma.dtype).eps * row.maximum(col)
    quotient = (f.unsqueeze(-1) - f.unsqueeze(-2)) / torch.where(close, 1, row - col)
    mean_slope = (slope.unsqueeze(-1) + slope.unsqueeze(-2)) / 2
    symmetric = torch.where(close, mean_slope, quotient)
    skew = torch.where(row + col > 0, (f.unsqueeze(-1) + f.unsqueeze(-2)) / torch.where(row + col > 0, row + col, 1), 0)
    dA = U @ (symmetric * (G + G.mT) + skew * (G - G.mT)) @ V.mT / 2
    ratio = torch.where(sigma > 0, f / torch.where(sigma > 0, sigma, 1), 0)
    if U.shape[-2] > U.shape[-1]:
        dA = dA + reference.tangent_projection(U, grad @ V) * ratio.unsqueeze(-2) @ V.mT
    if V.shape[-2] > V.shape[-1]:
        dA = dA + U * ratio.unsqueeze(-2) @ reference.tangent_projection(V, grad.mT @ U).mT
    return dA
