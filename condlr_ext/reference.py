"""The mathematics in plain PyTorch, to read and to test every kernel against.

Notation: W = U S Vᵀ, U [m, r] and V [n, r] orthonormal, S [r, r] the core, sigma its singular values (descending),
kappa = sigma_1 / sigma_r <= 1 + tau. The last two dimensions are the matrix, leading ones are batch.
Functions here take finite tensors; the ops above flag NaN and Inf.
"""

import math
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

BANDS = ("rms", "mean", "optimal")
LOW_PRECISION = (torch.float16, torch.bfloat16)  # dtypes of parameters that are computed in float32
# bounds of orthonormality_error
ORTHONORMAL_INPUT = 1e-4  # given factors above it are replaced by their Q, or refused
NOT_ORTHONORMAL = 2**32  # what a layer that is left unchanged because U or V is not orthonormal adds to its count
ORTHONORMAL_STEP = 2e-6  # what a step keeps to in float32; better factors are taken as they are
ORTHONORMAL_STEP64 = 1e-12  # the same in float64
# what storing a clipped core may add to kappa and to sigma_1, relative
KAPPA_ROUNDING, CAP_ROUNDING = 5e-6, 2e-6
MANY = 1024  # what a size that a trace keeps open counts as in decisions

# ----------------------------------------------------------------------------------------------- sizes


def sizes(t: Tensor) -> tuple[int, ...]:
    """Return the shape for decisions: a symbolic size, such as the batch in compiled or exported code, counts as MANY.

    Comparing the symbol itself would specialize that code.
    """
    if not _traced(t):
        return t.shape
    if torch.jit.is_tracing():
        with warnings.catch_warnings():  # about fixed sizes; only decisions depend on them
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            return tuple(map(int, t.shape))
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return tuple(s if has_static_value(s) else MANY for s in t.shape)


def _traced(t: Tensor) -> bool:
    return torch.compiler.is_compiling() or type(t.numel()) is not int


def product(A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Return A B C, in the cheaper order."""
    (a, b), (c, d) = sizes(A), sizes(C)
    return (A @ B) @ C if a * c * (b + d) <= b * d * (a + c) else A @ (B @ C)


# ---------------------------------------------------------------------------------------------- layers


def folds(input: Tensor, U: Tensor) -> bool:
    """Return whether U S is formed once for X [*, n]: that costs less than a product with S for more than m rows."""
    return math.prod(sizes(input)[:-1]) > U.shape[0]


def thin_linear(input: Tensor, U: Tensor, S: Tensor, V: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return Y = X V Sᵀ Uᵀ + b [*, m] for X [*, n] by three thin products."""
    return F.linear(F.linear(input @ V, S), U, bias)


def folded_linear(input: Tensor, U: Tensor, S: Tensor, V: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return Y of thin_linear with U S folded (see folds)."""
    return F.linear(input @ V, U @ S, bias)


def low_rank_linear(input: Tensor, U: Tensor, S: Tensor, V: Tensor, bias: Tensor | None = None):
    """Return Y of thin_linear and P = X V [*, r]."""
    P = input @ V
    if folds(input, U):
        return F.linear(P, U @ S, bias), P
    return F.linear(F.linear(P, S), U, bias), P


def low_rank_linear_backward(grad: Tensor, input: Tensor, P: Tensor, U: Tensor, S: Tensor, V: Tensor, mask):
    """Return the gradients of low_rank_linear: dX = Q S Vᵀ, dU = Gᵀ P Sᵀ, dS = Qᵀ P, dV = Xᵀ Q S, db = Σ G, Q = G U.

    Args:
        grad: G [*, m].
        input: X [*, n]; may be None if only dX and db are needed.
        P: X V, or None to compute it again.
        U: [m, r].
        S: [r, r].
        V: [n, r].
        mask: Which gradients of (input, U, S, V, bias) are needed; the others are None.
    """
    G = grad.reshape(-1, U.shape[0])
    if mask[1] or mask[2]:
        P = (input @ V if P is None else P).reshape(-1, V.shape[1])
    Q = G @ U if mask[0] or mask[2] or mask[3] else None
    dX = product(Q, S, V.mT).reshape(*grad.shape[:-1], V.shape[0]) if mask[0] else None
    dU = product(G.mT, P, S.mT) if mask[1] else None
    dS = Q.mT @ P if mask[2] else None
    dV = product(input.reshape(-1, V.shape[0]).mT, Q, S) if mask[3] else None
    db = G.sum(0) if mask[4] else None
    return dX, dU, dS, dV, db


def _filters(V: Tensor, kernel_size, groups: int) -> Tensor:
    """Return V [n, r] as filters [groups r, C_in / groups, *kernel_size], the same r for every group.

    For groups = 1 it is a view, so that torch copies it only once, into the memory format of its convolution.
    """
    filters = V.reshape(-1, *kernel_size, V.shape[1]).movedim(-1, 0)
    return filters if groups == 1 else filters.repeat(groups, *[1] * (filters.dim() - 1))


def low_rank_conv(input, U, S, V, bias, kernel_size, stride, padding, dilation, groups):
    """Convolve with the r filters in V, then pointwise with U S, where group k has its own rows of U.

    The input is [B, C_in, *space]; kernel_size, stride, padding and dilation have one int per space dimension.

    Returns:
        Y [B, m, *out] and P [B, groups r, *out], the output of the first convolution.
    """
    one, zero = _unit(kernel_size)
    P = torch.convolution(input, _filters(V, kernel_size, groups), None, stride, padding, dilation, False, zero, groups)
    pointwise = (U @ S).reshape(*U.shape, *one)
    return torch.convolution(P, pointwise, bias, one, zero, one, False, zero, groups), P


def folded_conv(*args) -> Tensor:
    """Return Y of low_rank_conv."""
    return low_rank_conv(*args)[0]


def low_rank_conv_backward(grad, input, P, U, S, V, mask, kernel_size, stride, padding, dilation, groups):
    """Return the gradients of low_rank_conv by the same two convolutions; P and mask as in low_rank_linear_backward.

    `input` may be None if neither dX nor dV is needed and P is given.
    """
    one, zero = _unit(kernel_size)
    geometry = (stride, padding, dilation, False, zero, groups)
    backward = torch.ops.aten.convolution_backward
    core = U @ S
    dX = dU = dS = dV = db = None
    if mask[1] or mask[2]:
        if P is None:
            P = torch.convolution(input, _filters(V, kernel_size, groups), None, *geometry)
        _, dcore, db = backward(
            grad, P, core.reshape(*core.shape, *one), [U.shape[0]], one, zero, one, False, zero, groups,
            [False, True, mask[4]],
        )  # fmt: skip
        dcore = dcore.reshape(core.shape)
        dU = dcore @ S.mT if mask[1] else None
        dS = U.mT @ dcore if mask[2] else None
    elif mask[4]:
        db = _sum_of_channels(grad)
    if mask[0] or mask[3]:
        transposed = core.reshape(groups, -1, core.shape[1]).mT.reshape(-1, U.shape[0] // groups, *one)
        dP = torch.convolution(grad, transposed, None, one, zero, one, False, zero, groups)
        filters = _filters(V, kernel_size, groups)
        dX, dfilters, _ = backward(dP, input, filters, None, *geometry, [mask[0], mask[3], False])
        if mask[3]:
            dfilters = dfilters.reshape(groups, V.shape[1], *dfilters.shape[1:])
            dV = (dfilters.sum(0) if groups > 1 else dfilters[0]).movedim(0, -1).reshape(V.shape)
    return dX if mask[0] else None, dU, dS, dV, db if mask[4] else None


def merged_linear(input: Tensor, U: Tensor, S: Tensor, V: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return Y of low_rank_linear by the dense product with W = U S Vᵀ: cheaper for high ranks and many rows."""
    return F.linear(input, product(U, S, V.mT), bias)


def merged_conv(input, U, S, V, bias, kernel_size, stride, padding, dilation, groups) -> Tensor:
    """Return Y of low_rank_conv by one convolution with W = U S Vᵀ."""
    W = product(U, S, V.mT).reshape(U.shape[0], -1, *kernel_size)
    return torch.convolution(input, W, bias, stride, padding, dilation, False, _unit(kernel_size)[1], groups)


def _sum_of_channels(grad: Tensor) -> Tensor:
    return grad.sum([i for i in range(grad.dim()) if i != 1])


def is_pointwise(kernel_size, stride, padding) -> bool:
    """Return whether a convolution is a product over its channels alone."""
    return all(k == s == 1 for k, s in zip(kernel_size, stride, strict=True)) and not any(padding)


def _unit(kernel_size) -> tuple[list[int], list[int]]:
    """Return ones (a pointwise kernel's size, stride and dilation) and zeros (its padding), one per space dimension."""
    return [1] * len(kernel_size), [0] * len(kernel_size)


# ------------------------------------------------------------------------------------- linear algebra


def magnitude(X: Tensor, dim=(-2, -1)) -> Tensor:
    """Return the power of two p with max |X| / p in [1, 2) over these dimensions, which are kept.

    X / p is exact, and squares and sums of it neither overflow nor lose all of X. p is 1 where X is zero or not finite.
    """
    if X.numel() == 0:
        return X.detach().abs().sum(dim, keepdim=True) + 1
    largest = X.detach().abs().amax(dim, keepdim=True)
    mantissa = torch.frexp(largest.to(torch.promote_types(largest.dtype, torch.float32)))[0].to(largest.dtype)
    return torch.where((largest > 0) & (largest < math.inf), largest / (2 * mantissa), 1)


def at_scale(value: float, scale: Tensor) -> Tensor:
    """Return value / scale [*] for magnitudes [*, 1, 1]; torch's own division of a number takes 1 / scale first."""
    return (torch.full_like(scale, value) / scale)[..., 0, 0]


def norm(X: Tensor, dim=None, keepdim: bool = False) -> Tensor:
    """Return the 2-norm of the entries over these dimensions (None: all) in X's dtype, right wherever it fits in it."""
    dims = tuple(range(X.dim())) if dim is None else dim
    p = magnitude(X, dims)
    size = torch.linalg.vector_norm(X / p, dim=dims, keepdim=True) * p
    return size if keepdim else size.squeeze(dims)


def qr(A: Tensor):
    """Return the reduced Q, R with A = Q R and diag(R) >= 0; for m < n, Q of the first m columns and R = Qᵀ A.

    Q is orthonormal even for rank-deficient A (Householder).
    """
    k, scale = min(A.shape[-2:]), magnitude(A)
    A = A / scale
    Q, R = torch.linalg.qr(A[..., :k])
    sign = torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(A.dtype)  # +1 for 0, so that no column is lost
    Q, R = Q * sign.unsqueeze(-2), R * sign.unsqueeze(-1)
    return Q, torch.cat((R, Q.mT @ A[..., k:]), dim=-1) * scale


def svd(A: Tensor):
    """Return the reduced U [*, m, k], sigma [*, k] descending, V [*, n, k] with A = U diag(sigma) Vᵀ.

    LAPACK's divide and conquer can raise or silently return NaN on clustered spectra, which are the normal case here.
    Then float64 is tried, and if that fails too, one-sided Jacobi, which always converges.
    """
    scale = magnitude(A)
    A = A / scale
    for dtype in dict.fromkeys((A.dtype, torch.float64)):
        try:
            U, sigma, Vh = torch.linalg.svd(A.to(dtype), full_matrices=False)
        except torch.linalg.LinAlgError:
            continue
        V = Vh.mT
        if _is_svd(A.to(dtype), U, sigma, V):
            break
    else:
        U, sigma, V = jacobi_svd(A.double())
    return U.to(A.dtype), sigma.to(A.dtype) * scale.squeeze(-1), V.to(A.dtype)


def _is_svd(A: Tensor, U: Tensor, sigma: Tensor, V: Tensor) -> bool:
    """Return whether residual and orthogonality are those of a backward stable method (NaN fails)."""
    if A.numel() == 0:
        return True
    bound = 10 * max(A.shape[-2:]) * torch.finfo(A.dtype).eps
    eye = torch.eye(sigma.shape[-1], dtype=A.dtype, device=A.device)
    residual = (U * sigma.unsqueeze(-2) @ V.mT - A).abs().amax((-2, -1))
    return bool(
        (residual <= bound * A.abs().amax((-2, -1)) * math.sqrt(A.shape[-1])).all()
        and ((U.mT @ U - eye).abs() <= bound).all()
        and ((V.mT @ V - eye).abs() <= bound).all()
    )


def jacobi_svd(A: Tensor, max_sweeps: int = 60):
    """Return the SVD as svd does, by one-sided Jacobi rotations in round-robin order.

    Plane rotations of column pairs, n / 2 disjoint pairs at a time, make the columns of A V orthogonal.
    """
    if A.shape[-2] < A.shape[-1]:
        V, sigma, U = jacobi_svd(A.mT, max_sweeps)
        return U, sigma, V
    n, scale = A.shape[-1], magnitude(A)
    W = A / scale
    V = torch.eye(n, dtype=A.dtype, device=A.device).expand(*A.shape[:-2], n, n).clone()
    tol = 4 * torch.finfo(A.dtype).eps
    players = list(range(n + n % 2))
    for _ in range(max_sweeps):
        turned = False
        for _ in range(len(players) - 1):
            half = len(players) // 2
            pairs = [p for p in zip(players[:half], reversed(players[half:]), strict=True) if max(p) < n]
            players = [players[0], players[-1], *players[1:-1]]
            i = torch.tensor([p[0] for p in pairs], dtype=torch.long, device=A.device)
            j = torch.tensor([p[1] for p in pairs], dtype=torch.long, device=A.device)
            a, b = W[..., i], W[..., j]
            alpha, beta, gamma = (a * a).sum(-2), (b * b).sum(-2), (a * b).sum(-2)
            active = gamma.abs() > tol * (alpha * beta).sqrt()
            if not active.any():
                continue
            turned = True
            zeta = (beta - alpha) / (2 * torch.where(active, gamma, 1))
            t = torch.where(zeta < 0, -1.0, 1.0).to(zeta.dtype) / (zeta.abs() + (1 + zeta * zeta).sqrt())
            c = torch.where(active, (1 + t * t).rsqrt(), 1).unsqueeze(-2)
            s = torch.where(active, t * (1 + t * t).rsqrt(), 0).unsqueeze(-2)
            W[..., i], W[..., j] = c * a - s * b, s * a + c * b
            a, b = V[..., i], V[..., j]
            V[..., i], V[..., j] = c * a - s * b, s * a + c * b
        if not turned:
            break
    sigma, order = torch.linalg.vector_norm(W, dim=-2).sort(dim=-1, descending=True)
    W = torch.gather(W, -1, order.unsqueeze(-2).expand_as(W))
    V = torch.gather(V, -1, order.unsqueeze(-2).expand_as(V))
    # U from the QR of the orthogonal columns: R is diagonal, and null columns become orthonormal
    U, _ = qr(W / torch.where(sigma > 0, sigma, 1).unsqueeze(-2))
    return U, sigma * scale.squeeze(-1), V


def polar(A: Tensor) -> Tensor:
    """Return the orthonormal polar factor U Vᵀ of A = U diag(sigma) Vᵀ, completed arbitrarily where sigma = 0."""
    U, _, V = svd(A.double())
    return (U @ V.mT).to(A.dtype)


def cond(A: Tensor) -> Tensor:
    """Return kappa = sigma_1 / sigma_k, Inf for a singular (also an all-zero) matrix."""
    return cond_from_sigma(svd(A)[1])


def cond_from_sigma(sigma: Tensor) -> Tensor:
    """Return kappa for descending singular values [*, k]."""
    largest, smallest = sigma[..., 0], sigma[..., -1]
    safe = torch.where(smallest > 0, smallest, 1)
    return torch.where(smallest > 0, largest / safe, torch.where(smallest.isnan(), smallest, math.inf))


# ----------------------------------------------------------------------------------- the constraint set


def band_edges(sigma: Tensor, tau: float, band: str = "rms", sigma_max: float | Tensor = math.inf):
    """Return the edges lo, hi [*] with hi / lo <= 1 + tau of the band for descending singular values sigma [*, k].

    rms (CondLR, NeurIPS 2023): [s - e, s + e] with s = ‖sigma‖ / √k and e = tau s / (2 + tau); mean: s = mean sigma;
    optimal: the Frobenius projection onto {kappa <= 1 + tau}. A band with hi > sigma_max is scaled down to it.
    """
    if math.isinf(tau):
        lo = torch.zeros_like(sigma[..., 0])
        hi = torch.full_like(lo, math.inf)
    elif band == "optimal":
        lo = _optimal_lower_edge(sigma, 1 + tau)
        hi = (1 + tau) * lo
    else:
        s = sigma.mean(-1) if band == "mean" else norm(sigma, -1) / sigma.shape[-1] ** 0.5
        lo = 2 * s / (2 + tau)  # s - e and s + e without the cancellation
        hi = (1 + tau) * lo
    capped = hi > sigma_max
    lo = torch.where(capped, 0.0 if math.isinf(tau) else lo / torch.where(hi > 0, hi, 1) * sigma_max, lo)
    return lo, torch.where(capped, sigma_max, hi)


def _optimal_lower_edge(sigma: Tensor, c: float) -> Tensor:
    """Return the root a of g(a) = Σ_{σ<a} (a - σ) - c Σ_{σ>ca} (σ - c a), which increases piecewise linearly."""
    knots, order = torch.cat((sigma, sigma / c), dim=-1).sort(dim=-1)
    # c a, for a = σ / c without the rounding error by which c a misses σ, and which c may make large
    upper = torch.cat((c * sigma, sigma), dim=-1).gather(-1, order)
    below = (knots.unsqueeze(-1) - sigma.unsqueeze(-2)).clamp_min(0).sum(-1)
    above = (sigma.unsqueeze(-2) - upper.unsqueeze(-1)).clamp_min(0).sum(-1)
    # the last knot with g <= 0 starts the root's piece; its middle tells which sigma are below and above, while at a
    # knot rounding would decide
    start = ((below <= c * above).sum(-1, keepdim=True) - 1).clamp_min(0)
    end = (start + 1).clamp_max(knots.shape[-1] - 1)
    middle = (knots.gather(-1, start) + knots.gather(-1, end)) / 2
    low, high = sigma < middle, sigma > c * middle
    # both sides divided by c, which avoids c²
    weight = low.sum(-1, dtype=sigma.dtype) / c + c * high.sum(-1, dtype=sigma.dtype)
    target = torch.where(low, sigma, 0).sum(-1) / c + torch.where(high, sigma, 0).sum(-1)
    root = target / torch.where(weight > 0, weight, 1)
    # kappa <= c already: any band that holds all of sigma
    return torch.where(sigma[..., 0] <= c * sigma[..., -1], sigma[..., -1], root)


def clip_edges(sigma: Tensor, tau: float, band: str = "rms", sigma_max: float | Tensor = math.inf):
    """Return band_edges; for a single singular value, whose kappa is 1, only the cap acts."""
    if sigma.shape[-1] == 1:
        tau = math.inf
    return band_edges(sigma, tau, band, sigma_max)


def meets_bound(sigma: Tensor, tau: float, sigma_max: float | None) -> Tensor:
    """Return whether singular values [*, k], descending, keep kappa <= 1 + tau and the cap, to the rounding of a clip.

    Returns:
        [*] bool.
    """
    cap = math.inf if sigma_max is None else sigma_max
    bounded = cond_from_sigma(sigma) <= (1 + tau) * (1 + KAPPA_ROUNDING)
    return bounded & (sigma[..., 0] <= cap * (1 + CAP_ROUNDING))


def clip_spectrum(A: Tensor, tau: float, band: str = "rms", sigma_max: float = math.inf) -> Tensor:
    """Return A with its singular values clipped to the band, as the correction A + Σ_{i out} (f_i - σ_i) u_i v_iᵀ.

    Where the band lies so far below σ_1 that the correction cancels, the result is U diag(f) Vᵀ. Directions inside the
    band change by rounding only. A matrix inside its band, or of zeros, is returned unchanged; in others a zero
    singular value is raised along a completed direction.
    """
    if A.numel() == 0:
        return A.clone()
    A64 = A.double()
    scale = magnitude(A64)
    A64 = A64 / scale
    U, sigma, V = svd(A64)
    lo, hi = clip_edges(sigma, tau, band, at_scale(sigma_max, scale))
    # sigma has errors of a few roundings of the largest one: closer than that to an edge counts as inside
    slack = 8 * torch.finfo(torch.float64).eps * sigma[..., 0]
    inside = (sigma[..., 0] <= hi + slack) & (sigma[..., -1] >= lo - slack)
    # Rounding the result moves each singular value by at most `stored`. Where kappa would show that (a lower edge far
    # below the upper one), the lower edge rises by as much.
    clipped = sigma.clamp(lo.unsqueeze(-1), hi.unsqueeze(-1))
    stored = torch.finfo(A.dtype).eps / 2 * torch.linalg.vector_norm(clipped, dim=-1)
    lo = torch.where((lo > 0) & (stored > 2e-6 * lo), torch.minimum(lo + stored, hi), lo)
    clipped = sigma.clamp(lo.unsqueeze(-1), hi.unsqueeze(-1))
    cancels = (hi < 0.75 * sigma[..., 0])[..., None, None]
    weights = torch.where(cancels.squeeze(-1), clipped, clipped - sigma)
    out = ((torch.where(cancels, 0, A64) + (U * weights.unsqueeze(-2)) @ V.mT) * scale).to(A.dtype)
    return torch.where(inside[..., None, None] | (sigma[..., :1, None] == 0), A, out)


def orthonormality_error(X: Tensor) -> Tensor:
    """Return max |XᵀX - I|."""
    gram = X.mT @ X
    return (gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).abs().max()


def orthonormal_enough(dtype: torch.dtype) -> float:
    """Return the orthonormality_error up to which a step that moves nothing leaves a factor as it is."""
    return ORTHONORMAL_STEP if dtype == torch.float32 else ORTHONORMAL_STEP64


def tangent_projection(X: Tensor, Z: Tensor) -> Tensor:
    """Return (I - X Xᵀ) Z without the m x m matrix."""
    return Z - X @ (X.mT @ Z)


# ----------------------------------------------------------------------------------------------- the step

ROLES = ("U", "S", "V", "bias")
HYPER = (
    "lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize", "fresh", "precondition", "tau", "band",
    "sigma_max",
)  # fmt: skip


def step(params, grads, momentum_buffers, hyper: Tensor, skipped: Tensor) -> None:
    """Take one constrained SGD step of L layers, in place.

    Args:
        params: 4 L tensors, U, S, V, bias of each layer in turn; an empty bias means none.
        grads: Of the same shapes; a parameter whose gradient is empty does not change.
        momentum_buffers: Of the same shapes; may be empty where momentum is 0.
        hyper: [L, 4, len(HYPER)] float64, a row per layer and role. fresh = 1 starts the momentum buffer. precondition
            is read in the rows of U and V; tau, band (index in BANDS) and sigma_max in the row of S.
        skipped: [L] int64, counts for each layer the steps that left it unchanged because of a non-finite gradient or
            result, an all-zero new core, or an all-zero core where precondition is 1. A U or V with a gradient that is
            not orthonormal to ORTHONORMAL_INPUT leaves the layer unchanged too, and counts NOT_ORTHONORMAL.
    """
    results = []
    for layer, rows in enumerate(hyper.tolist()):
        at = slice(4 * layer, 4 * layer + 4)
        options = [dict(zip(HYPER, row, strict=True)) for row in rows]
        results.append(layer_step(params[at], grads[at], momentum_buffers[at], options))
    for layer, new in enumerate(results):  # an error above has changed nothing
        if not isinstance(new, list):
            skipped[layer] += new
            continue
        at = slice(4 * layer, 4 * layer + 4)
        for target, value in zip((*params[at], *momentum_buffers[at]), new, strict=True):
            if value is not None:
                target.copy_(value)


def layer_step(params, grads, buffers, hyper):
    """Compute one layer's step: U and V by a tangent step and QR, S by a step and the clip, bias by a plain step.

    Args:
        params: U, S, V, bias.
        grads: Their gradients, empty where there is none.
        buffers: Their momentum buffers.
        hyper: Four dicts of HYPER.

    Returns:
        U, S, V, bias and their four buffers, None where unchanged; what to count if the layer must be left unchanged.
    """
    U, S, V, bias = params
    if not all(torch.isfinite(t).all() for t in (U, V, *grads)):
        return 1
    if any(grads[i].numel() and orthonormality_error(X) > ORTHONORMAL_INPUT for i, X in ((0, U), (2, V))):
        return NOT_ORTHONORMAL
    new, new_buffers, direction = [None] * 4, [None] * 4, [None] * 4
    for i, role in enumerate(ROLES):
        if grads[i].numel():
            decay = 0.0 if role in "UV" else hyper[i]["weight_decay"]
            direction[i], new_buffers[i] = sgd_direction(params[i], grads[i], buffers[i], hyper[i], decay)
    tau, band, sigma_max = hyper[1]["tau"], BANDS[int(hyper[1]["band"])], hyper[1]["sigma_max"]
    for i, X, core in ((0, U, S), (2, V, S.mT)):
        if direction[i] is None:
            continue
        moves = hyper[i]["lr"] and direction[i].any()
        if not moves and orthonormality_error(X) <= orthonormal_enough(X.dtype):
            continue  # a step that moves nothing is the identity
        D = tangent_projection(X, direction[i])
        if hyper[i]["precondition"]:
            inverse, exists = gram_inverse(core, tau, band, sigma_max)
            if not exists:
                return 1
            D = D @ inverse
        new[i] = qr(X - hyper[i]["lr"] * D)[0]
    if direction[1] is not None:
        new[1], fits = core_step(S, direction[1], hyper[1]["lr"], tau, band, sigma_max)
        if not fits:
            return 1
    if direction[3] is not None:
        new[3] = bias - hyper[3]["lr"] * direction[3]
    new += new_buffers
    if not all(torch.isfinite(t).all() for t in new if t is not None):
        return 1
    return new


def sgd_direction(param, grad, buffer, hyper, weight_decay: float):
    """Return the direction torch.optim.SGD would take, and the new momentum buffer (None without momentum)."""
    g = -grad if hyper["maximize"] else grad
    if weight_decay:
        g = g + weight_decay * param
    mu = hyper["momentum"]
    if not mu:
        return g, None
    B = g if hyper["fresh"] else mu * buffer + (1 - hyper["dampening"]) * g
    return (g + mu * B if hyper["nesterov"] else B), B


def core_step(S: Tensor, direction: Tensor, lr, tau: float, band: str, sigma_max: float, clip=None):
    """Return clip_spectrum(S - lr direction) [*, r, r], and whether to take it [*]: not if it is not finite or zero.

    Args:
        S: [*, r, r].
        direction: [*, r, r].
        lr: A number or [*, 1, 1].
        tau: As in band_edges.
        band: As in band_edges.
        sigma_max: As in band_edges.
        clip: A function of finite cores [*, r, r] to use for clip_spectrum.
    """
    clip = clip or (lambda cores: clip_spectrum(cores, tau, band, sigma_max))
    trial = S - lr * direction
    fits = torch.isfinite(trial).flatten(-2).all(-1) & trial.flatten(-2).any(-1)
    trial = torch.where(fits[..., None, None], trial, 0)
    # the bands "rms" and "mean" shrink a core a little, but one that did not move and meets the bound stays
    still = fits & (trial == S).flatten(-2).all(-1)
    if still.any():
        sigma = svd(torch.where(still[..., None, None], S, 0).double())[1]
        still &= meets_bound(sigma, tau, sigma_max)
    new = torch.where(still[..., None, None], S, clip(trial))
    return new, fits & torch.isfinite(new).flatten(-2).all(-1)


def gram_inverse(S: Tensor, tau: float, band: str, sigma_max: float):
    """Return (S Sᵀ)⁻¹ [*, r, r] in S's dtype, and whether there is one [*]: not for an all-zero core.

    For tau = Inf (1e-6 sigma_1)² is added to the diagonal. Otherwise a singular core, which a clipped one never is, is
    clipped first.
    """
    C = S.double()
    gram = C @ C.mT
    if math.isinf(tau):
        damping = (1e-6 * svd(C)[1][..., :1]) ** 2
        inverse, exists = _positive_inverse(gram + torch.diag_embed(damping.expand(C.shape[:-1])))
        return inverse.to(S.dtype), exists
    inverse, exists = _positive_inverse(gram)
    # a singular Gram matrix comes out above 1e15 √r, while its pivots may look healthy
    size = torch.linalg.matrix_norm(gram) * torch.linalg.matrix_norm(inverse)
    singular = ~exists | (size > 1e14 * C.shape[-1] ** 0.5)
    if singular.any():
        clipped = clip_spectrum(torch.where(singular[..., None, None], C, 0), tau, band, sigma_max)
        again, exists_again = _positive_inverse(clipped @ clipped.mT)
        inverse = torch.where(singular[..., None, None], again, inverse)
        exists = torch.where(singular, exists_again, exists)
    return inverse.to(S.dtype), exists


def _positive_inverse(gram: Tensor):
    """Return the inverse of positive definite matrices, and which have one."""
    L, info = torch.linalg.cholesky_ex(gram)
    exists = info == 0
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return torch.cholesky_inverse(torch.where(exists[..., None, None], L, eye)), exists
