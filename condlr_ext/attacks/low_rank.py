"""LoRa-PGD: adversarial perturbations of low rank, ascended in their factors, and a report on perturbations."""

import math

import torch
from torch import Tensor, nn

from .. import linalg, reference
from .._checks import check_batch, check_choice, check_count, check_eps, check_step_size
from .._modules import frozen
from .._types import Budgets
from ..errors import RankError, ShapeError
from .balls import BALLS, unit_l2, unsqueeze_like
from .gradient import clean_gradient
from .losses import LOSSES
from .search import Search, repeat_for_budgets, repeat_like, select_samples, unperturbed

NORMS = ("l2", "nuc")
INITS = ("random", "warm", "transfer")
ALTERNATIONS = 100


def low_rank_pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: Budgets,
    rank: int,
    *,
    norm: str = "l2",
    init: str = "random",
    surrogate: nn.Module | None = None,
    steps: int = 10,
    step_size: float = 1.0,
    restarts: int = 1,
    loss: str = "ce",
    exact: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Attack by ascent in the factors of clip(x + eps D / |D|, 0, 1), D = U Vᵀ of the given rank in every channel.

    The last two dimensions of x are the matrix, those between them and the batch are channels with factors of their
    own. Each step adds step_size times the normalized gradient to U [B, C, H, rank] and to V [B, C, W, rank]; as both
    grow, later steps turn D less. Of all points visited, the clean input included, each sample keeps a misclassified
    one if there is any, and among those (else among all) the one of highest loss.

    Args:
        model: Classifier returning logits [B, C]; attacked in eval mode, its state is restored.
        x: Inputs in [0, 1], [B, ..., H, W], floating point.
        y: Labels [B], integer.
        eps: Budget >= 0 in the units of x, or a 1-D sequence of E budgets, which share a batch.
        rank: Rank of D in every channel, 1..min(H, W).
        norm: Norm of a sample's perturbation before clipping: "l2", over all its channels, or "nuc", the sum of its
            channels' nuclear norms, which clipping may raise above eps unless exact.
        init: "random" (U normal, V = 0: the first step takes V along the gradient), "warm" (both factors from the
            SVD of one l2 step of length eps) or "transfer" (that step taken on the surrogate, on its log-odds, which
            do not saturate). Samples for which that step is 0 start as in "random".
        surrogate: The other model, with init="transfer" only.
        steps: Steps >= 1 of each restart.
        step_size: > 0; the factors start at norm 1.
        restarts: >= 1; more than one needs init="random".
        loss: "ce", "log-odds", "ce-rescaled" or "dlr", as in pgd.
        exact: Clipping to [0, 1] raises the rank. True: project the strongest point back and forth between the
            matrices of the rank and the box until it is in both, to the rounding of x; after 100 rounds, zero the
            rows or columns that are still outside the box. It keeps the budget and is a weaker attack.
        generator: Source of the random factors, on the device of x; default torch's global one.

    Returns:
        Adversarial inputs like x; [E, B, ...] for E budgets. perturbation_report gives their rank and norms.

    Raises:
        RankError: rank > min(H, W).
        ValueError: An argument out of range, or a model whose output carries no gradient to its input.
        TypeError: An argument of the wrong type.
        ShapeError: Shapes of the arguments or of the logits.
        NonFiniteError: NaN or Inf in the logits or the input gradient.

    Notes:
        State per sample and channel: rank (H + W) numbers, against H W for PGD, so it saves memory below rank
        H W / (H + W). From step to step each budget keeps factors and a copy of x, nothing else of the size of x; the
        model's backward still forms the input gradient. For the least memory, attack one budget per call.

    Source: Savostianova, Zangrando, Tudisco, Low-rank adversarial PGD attack (arXiv 2410.12607).
    """
    y = check_batch("low_rank_pgd", x, y)
    budgets = check_eps("low_rank_pgd", eps, x)
    if x.ndim < 3:
        raise ShapeError(f"low_rank_pgd: x must be matrices [B, ..., H, W], got {list(x.shape)}")
    for name, value, known in (("norm", norm, NORMS), ("init", init, INITS), ("loss", loss, LOSSES)):
        check_choice("low_rank_pgd", name, value, known)
    for name, count in (("rank", rank), ("steps", steps), ("restarts", restarts)):
        check_count("low_rank_pgd", name, count)
    if x.numel() and rank > min(x.shape[-2:]):
        raise RankError(f"low_rank_pgd: rank must be in 1..{min(x.shape[-2:])} for x {list(x.shape)}, got {rank}")
    check_step_size("low_rank_pgd", step_size)
    if restarts > 1 and init != "random":
        raise ValueError(f'low_rank_pgd: restarts={restarts} needs init="random", got {init!r}: every one is the same')
    if (init == "transfer") != (surrogate is not None):
        raise ValueError(f'low_rank_pgd: init="transfer" and surrogate need each other, got init={init!r}')
    if x.numel() == 0:
        return unperturbed(x, budgets)

    with frozen(model):
        starts = [_random_factors(x, rank, generator) for _ in range(restarts)]
        if init != "random":
            source, source_loss = (model, loss) if surrogate is None else (surrogate, "log-odds")
            starts = [_warm_factors(source, x, y, budgets, starts[0], source_loss)]
        best = _ascend(model, x, y, budgets, starts, norm, steps, step_size, loss, rank, exact)
    return best.view(*budgets.shape, *x.shape)


def _random_factors(x: Tensor, rank: int, generator) -> tuple[Tensor, Tensor]:
    """Return U [B, C, H, rank] of norm 1 and V [B, C, W, rank] = 0."""
    channels = _matrices(x).shape[1]
    like = {"dtype": torch.promote_types(x.dtype, torch.float32), "device": x.device}
    U = torch.randn(len(x), channels, x.shape[-2], rank, generator=generator, **like)
    return unit_l2(U), torch.zeros(len(x), channels, x.shape[-1], rank, **like)


def _warm_factors(source: nn.Module, x: Tensor, y: Tensor, budgets: Tensor, random: tuple, loss: str) -> tuple:
    """Return the factors of the source's clipped l2 step for every budget, the random ones where that step is 0."""
    with frozen(source):
        _, grad = clean_gradient("low_rank_pgd", source, x, y, loss)
    center, _, radius = repeat_for_budgets(x, y, budgets)
    step = (center + radius * repeat_like(unit_l2(grad), center)).clamp(0, 1) - center
    moves = step.flatten(1).any(1)
    warm = _balanced_factors(_matrices(step), rank=random[0].shape[-1])
    return tuple(select_samples(moves, w, repeat_like(r, center)) for w, r in zip(warm, random, strict=True))


def _balanced_factors(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return U and V of norm 1 with U Vᵀ the nearest matrices of that rank, up to one scale per sample."""
    U, sigma, V = linalg.svd(delta.to(torch.promote_types(delta.dtype, torch.float32)))
    root = sigma[..., None, :rank].sqrt()
    return unit_l2(U[..., :rank] * root), unit_l2(V[..., :rank] * root)


def _ascend(model, x, y, budgets, starts, norm, steps, step_size, loss, rank, exact) -> Tensor:
    """Return the strongest point of each sample and budget; only factors are kept from step to step."""
    center, labels, radius = repeat_for_budgets(x, y, budgets)
    starts = [[repeat_like(factor, center) for factor in start] for start in starts]
    scale = radius.view(-1, 1, 1, 1).to(starts[0][0].dtype)
    clean = [torch.zeros_like(factor) for factor in starts[0]]
    search = Search("low_rank_pgd", model, labels, LOSSES[loss], loss, center, *clean)
    for U, V in starts:
        for _ in range(steps):
            size, NV, NtU = _norm_and_gradient(U, V, norm)
            unclipped = _perturbed(center, U, V, scale, size)
            point = unclipped.clamp(0, 1)
            inside = point == unclipped
            del unclipped
            _, grad = search.loss_and_gradient(point, U, V)
            search.check_finite()  # before the decompositions, whose error would say less
            grad = _matrices(grad * inside).to(U.dtype)
            dU, dV = _factor_gradients(grad, U, V, size, NV, NtU)
            U, V = U + step_size * unit_l2(dU), V + step_size * unit_l2(dV)
            del point, inside, grad
        size, *_ = _norm_and_gradient(U, V, norm)
        search.update(_perturbed(center, U, V, scale, size).clamp_(0, 1), U, V)
    U, V = search.strongest()
    size, *_ = _norm_and_gradient(U, V, norm)
    best = _perturbed(center, U, V, scale, size)
    return _exact(center, best, radius, rank, norm) if exact else best.clamp_(0, 1)


def _norm_and_gradient(U: Tensor, V: Tensor, norm: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return the norm n [N, 1, 1, 1] of D = U Vᵀ over channels, N V and Nᵀ U, N the gradient of n at D."""
    if norm == "l2":
        D = U @ V.mT
        size = reference.norm(D, (1, 2, 3), keepdim=True)
        N = D / torch.where(size > 0, size, 1)
        return size, N @ V, N.mT @ U
    U_basis, U_core = linalg.qr(U)
    V_basis, V_core = linalg.qr(V)
    left, sigma, right = linalg.svd(U_core @ V_core.mT)
    N = left @ right.mT
    return sigma.sum((1, 2)).view(-1, 1, 1, 1), U_basis @ (N @ V_core), V_basis @ (N.mT @ U_core)


def _perturbed(center: Tensor, U: Tensor, V: Tensor, scale: Tensor, size: Tensor) -> Tensor:
    """Return center + scale D / n, not yet clipped; D = 0 stays 0."""
    D = U @ (V * (scale / torch.where(size > 0, size, 1))).mT
    return D.view(center.shape).add_(center).to(center.dtype)


def _factor_gradients(grad, U, V, size, NV, NtU) -> tuple[Tensor, Tensor]:
    """Return the gradients of <G, D / n> in U and V up to a positive factor: G' V and G'ᵀ U, G' = G - <G, D> / n N.

    Where D = 0, n has no gradient and G' = G.
    """
    GV, GtU = grad @ V, grad.mT @ U
    along = (GV * U).sum((1, 2, 3), keepdim=True) / torch.where(size > 0, size, 1)
    return GV - along * NV, GtU - along * NtU


def _exact(center: Tensor, best: Tensor, radius: Tensor, rank: int, norm: str) -> Tensor:
    """Return adversarial inputs whose perturbations keep the rank, the box and the budget at once."""
    low = -center.double()
    delta = _low_rank_in_box(best.double() + low, low, 1 + low, rank, torch.finfo(center.dtype).eps / 4)
    if norm == "nuc":  # the clipping may have raised it; the l2 norm can only have fallen
        size = unsqueeze_like(linalg.svd(_matrices(delta)).sigma.sum((1, 2)), delta)
        delta *= (radius / torch.where(size > 0, size, 1)).clamp_max(1)
    return (center.double() + delta).clamp_(0, 1).to(center.dtype)


def _low_rank_in_box(delta: Tensor, low: Tensor, high: Tensor, rank: int, tolerance: float) -> Tensor:
    """Return matrices near delta [*, H, W] of at most the rank and, to the tolerance, in [low <= 0, high >= 0]."""
    low, high = low.flatten(0, -3), high.flatten(0, -3)
    result = delta.flatten(0, -3).clamp(low, high)
    active = torch.arange(len(result), device=delta.device)
    for _ in range(ALTERNATIONS):
        nearest = _truncated(result[active], rank)
        excess = nearest - nearest.clamp(low[active], high[active])
        converged = excess.abs().amax((1, 2)) <= tolerance
        # reflected in the box, not projected onto it: converges several times faster and ends farther out
        result[active] = torch.where(converged[:, None, None], nearest, nearest - 2 * excess)
        active = active[~converged]
        if not len(active):
            return result.view(delta.shape)
    result[active] = _zero_outside(_truncated(result[active], rank), low[active], high[active], tolerance)
    return result.view(delta.shape)


def _zero_outside(matrices: Tensor, low: Tensor, high: Tensor, tolerance: float) -> Tensor:
    """Zero rows and columns in place until every matrix [N, H, W] is in the box, which raises no rank.

    Each round zeroes the smaller of the row and the column through the worst entry: after the alternation only tiny
    rows and columns are outside.
    """
    every = torch.arange(len(matrices), device=matrices.device)
    for _ in range(sum(matrices.shape[1:])):
        worst, index = torch.maximum(low - matrices, matrices - high).flatten(1).max(1)
        i, j = index // matrices.shape[2], index % matrices.shape[2]
        row, column = matrices[every, i], matrices[every, :, j]
        row_is_smaller = row.norm(dim=1) < column.norm(dim=1)
        outside = worst > tolerance
        if not outside.any():
            break
        matrices[every, i] = torch.where((outside & row_is_smaller)[:, None], 0, row)
        column = matrices[every, :, j]
        matrices[every, :, j] = torch.where((outside & ~row_is_smaller)[:, None], 0, column)
    return matrices


def _truncated(matrices: Tensor, rank: int) -> Tensor:
    U, sigma, V = linalg.svd(matrices)
    return (U[..., :rank] * sigma[..., None, :rank]) @ V[..., :rank].mT


def perturbation_report(x: Tensor, x_adv: Tensor) -> dict[str, Tensor]:
    """Measure the perturbations x_adv - x: norms and, for matrices, rank.

    Args:
        x: Inputs [B, ...], floating point.
        x_adv: [B, ...] or [E, B, ...], on the same device.

    Returns:
        Tensors [B] or [E, B]: "l2", "linf" (float64) and, if samples are [..., H, W], "nuc" (float64), the sum of the
        channels' nuclear norms, and "rank" (int64), the largest of the channels' ranks. A rank counts singular values
        above sqrt(H W) times the rounding unit of x: no larger ones can come from rounding x_adv in [0, 1].

    Raises:
        ShapeError: x_adv has neither the shape of x nor one leading dimension more.
    """
    if x_adv.shape not in (x.shape, (*x_adv.shape[:1], *x.shape)):
        raise ShapeError(
            f"perturbation_report: x_adv must be [B, ...] or [E, B, ...] for x {list(x.shape)}, got {list(x_adv.shape)}"
        )
    leading = x_adv.shape[: x_adv.ndim - x.ndim + 1]
    delta = (x_adv.double() - x.double()).detach().reshape(math.prod(leading), *x.shape[1:])
    report = {name: ball.norm(delta) for name, ball in BALLS.items()}
    if x.ndim >= 3:
        rounding = math.sqrt(x.shape[-1] * x.shape[-2]) * torch.finfo(x.dtype).eps
        sigma = linalg.svd(_matrices(delta)).sigma
        report |= {"nuc": sigma.sum((1, 2)), "rank": (sigma > rounding).sum(2).amax(1)}
    return {name: values.view(leading) for name, values in report.items()}


def _matrices(t: Tensor) -> Tensor:
    """View [B, ..., H, W] as [B, C, H, W]."""
    return t.reshape(len(t), math.prod(t.shape[1:-2]), *t.shape[-2:])
