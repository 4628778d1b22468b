"""LoRa-PGD: adversarial perturbations of low rank, ascended in their factors, and what a perturbation measures."""

import math

import torch
from torch import Tensor, nn

from .. import linalg
from ..errors import RankError, ShapeError
from .balls import BALLS, per_sample, unit_l2
from .checks import check_batch, check_choice, check_count, check_eps, check_step_size, frozen
from .gradient import clean_gradient, spread
from .losses import LOSSES
from .search import Search, laid_out, untouched, where

NORMS = ("l2", "nuc")
INITS = ("random", "warm", "transfer")
ALTERNATIONS = 100


def low_rank_pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps,
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
    lean: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Ascent in the factors of clip(x + eps D / |D|, 0, 1), D = U Vᵀ of the given rank in every channel, best kept.

    The last two dimensions of x are the matrix, those between them and the batch are channels with factors of their
    own. Each step adds step_size times the normalized gradient to U [B, C, H, rank] and to V [B, C, W, rank]; as both
    grow, later steps turn D less. Of all points visited, the clean input included, each sample keeps a misclassified
    one if there is any, and among those (else among all) the one of highest loss.

    Args:
        model: classifier returning logits [B, C]; attacked in eval mode, its state is restored.
        x (Tensor): inputs in [0, 1], [B, ..., H, W], floating point.
        y (Tensor): labels [B], integer.
        eps (float or 1-D sequence): budgets >= 0, in the units of x.
        rank: of D in every channel, 1..min(H, W).
        norm: of a sample's perturbation before clipping: "l2", over all its channels, or "nuc", the sum of its
            channels' nuclear norms, which clipping may raise above eps unless exact.
        init: "random" (U normal, V = 0: the first step takes V along the gradient), "warm" (both factors from the
            SVD of one l2 step of length eps) or "transfer" (that step taken on the surrogate, on its log-odds, which
            do not saturate). Where that step is 0, as "random".
        surrogate: the other model, with init="transfer" only.
        steps, restarts: counts >= 1; more than one restart needs init="random".
        step_size: > 0; the factors start at norm 1.
        loss: "ce", "log-odds", "ce-rescaled" or "dlr", as in pgd.
        exact: clipping to [0, 1] raises the rank. True: the strongest point is taken back and forth between the
            nearest matrices of the rank and the box until it is in both, to the rounding of x; where 100 rounds do
            not do, the rows or columns that leave the box are zeroed. It keeps the budget and is a weaker attack.
        lean: one budget after the other. From step to step only x, a copy of it (without lean: one per budget), the
            results for earlier budgets and factors are kept in any case, nothing else of the size of x.
        generator: source of the random factors, on the device of x; default torch's global one.

    Returns:
        Tensor: adversarial inputs like x, [E, B, ...] for E budgets; perturbation_report tells their rank and norms.

    Raises:
        RankError, ValueError, TypeError: bad argument; ShapeError: x without matrices; ShapeError, NonFiniteError:
            the model's output or input gradient.

    Notes:
        State per sample and channel rank (H + W) numbers against H W of PGD: it saves memory below rank
        H W / (H + W). The model's backward still forms the whole input gradient, one at a time.

    Source: Savostianova, Zangrando, Tudisco, Low-rank adversarial PGD attack (arXiv 2410.12607).
    """
    check_batch("low_rank_pgd", x, y)
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
        return untouched(x, budgets)

    parts = list(budgets) if lean and budgets.ndim else [budgets]
    with frozen(model):
        random = [_random_factors(x, rank, generator) for _ in range(restarts)]
        if init == "random":
            starts = [random] * len(parts)
        else:
            source, its_loss = (model, loss) if surrogate is None else (surrogate, "log-odds")
            starts = _warm_factors(source, x, y, parts, random[0], its_loss)
        settings = norm, steps, step_size, loss, rank, exact
        found = [_ascend(model, x, y, *each, *settings) for each in zip(parts, starts, strict=True)]
        best = found[0] if len(found) == 1 else torch.stack(found)
    return best.view(*budgets.shape, *x.shape)


def perturbation_report(x: Tensor, x_adv: Tensor) -> dict[str, Tensor]:
    """What the perturbations x_adv - x are: norms and, for matrices, rank.

    Args:
        x (Tensor): inputs [B, ...], floating point.
        x_adv (Tensor): [B, ...] or [E, B, ...], on the same device.

    Returns:
        dict of tensors [B] or [E, B]: "l2", "linf" (float64) and, if samples are [..., H, W]: "nuc" (float64), the sum
        of the channels' nuclear norms; "rank" (int64), the largest of the channels' ranks, counting singular values
        above sqrt(H W) times the rounding unit of x: no larger ones can come from rounding x_adv in [0, 1].

    Raises:
        ShapeError: x_adv is neither like x nor like many of x.
    """
    if x_adv.shape not in (x.shape, (*x_adv.shape[:1], *x.shape)):
        raise ShapeError(
            f"perturbation_report: x_adv must be [B, ...] or [E, B, ...] for x {list(x.shape)}, got {list(x_adv.shape)}"
        )
    leading = x_adv.shape[: x_adv.ndim - x.ndim + 1]
    delta = (x_adv.double() - x.double()).detach().reshape(math.prod(leading), *x.shape[1:])
    report = {name: ball.size(delta) for name, ball in BALLS.items()}
    if x.ndim >= 3:
        rounding = math.sqrt(x.shape[-1] * x.shape[-2]) * torch.finfo(x.dtype).eps
        sigma = linalg.svd(_matrices(delta)).sigma
        report |= {"nuc": sigma.sum((1, 2)), "rank": (sigma > rounding).sum(2).amax(1)}
    return {name: values.view(leading) for name, values in report.items()}


def _ascend(model, x, y, budgets, starts, norm, steps, step_size, loss, rank, exact) -> Tensor:
    """The strongest point of each sample and budget; only factors are kept from step to step."""
    center, labels, radius = laid_out(x, y, budgets)
    starts = [[spread(factor, center) for factor in start] for start in starts]
    scale = radius.view(-1, 1, 1, 1).to(starts[0][0].dtype)
    clean = [torch.zeros_like(factor) for factor in starts[0]]
    search = Search("low_rank_pgd", model, labels, LOSSES[loss], loss, center, *clean)
    for U, V in starts:
        for _ in range(steps):
            size, *normals = _norm(U, V, norm)
            raw = _perturbed(center, U, V, scale, size)
            point = raw.clamp(0, 1)
            inside = point == raw
            del raw
            _, grad = search.visit(point, U, V)
            search.check_finite()  # before the decompositions, which would say less
            grad = _matrices(grad * inside).to(U.dtype)
            dU, dV = _factor_gradients(grad, U, V, size, *normals)
            U, V = U + step_size * unit_l2(dU), V + step_size * unit_l2(dV)
            del point, inside, grad
        size, *_ = _norm(U, V, norm)
        search.score(_perturbed(center, U, V, scale, size).clamp_(0, 1), U, V)
    U, V = search.strongest()
    size, *_ = _norm(U, V, norm)
    best = _perturbed(center, U, V, scale, size)
    return _exact(center, best, radius, rank, norm) if exact else best.clamp_(0, 1)


def _matrices(t: Tensor) -> Tensor:
    """[B, ..., H, W] as [B, C, H, W]."""
    return t.reshape(len(t), math.prod(t.shape[1:-2]), *t.shape[-2:])


def _random_factors(x: Tensor, rank: int, generator) -> tuple[Tensor, Tensor]:
    channels = _matrices(x).shape[1]
    like = {"dtype": torch.promote_types(x.dtype, torch.float32), "device": x.device}
    U = torch.randn(len(x), channels, x.shape[-2], rank, generator=generator, **like)
    return unit_l2(U), torch.zeros(len(x), channels, x.shape[-1], rank, **like)


def _warm_factors(source: nn.Module, x: Tensor, y: Tensor, parts: list[Tensor], random: tuple, loss: str) -> list:
    """For each part of the budgets the one start that the source's clipped l2 step of that length gives."""
    rank = random[0].shape[-1]
    with frozen(source):
        _, grad = clean_gradient("low_rank_pgd", source, x, y, loss)
    starts = []
    for budgets in parts:
        center, _, radius = laid_out(x, y, budgets)
        step = (center + radius * spread(unit_l2(grad), center)).clamp(0, 1) - center
        some = step.flatten(1).any(1)
        factors = zip(_factors(_matrices(step), rank), random, strict=True)
        starts.append([tuple(where(some, warm, spread(start, center)) for warm, start in factors)])
    return starts


def _factors(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Balanced factors of norm 1 of the nearest matrices of that rank, up to one scale per sample."""
    U, sigma, V = linalg.svd(delta.to(torch.promote_types(delta.dtype, torch.float32)))
    root = sigma[..., None, :rank].sqrt()
    return unit_l2(U[..., :rank] * root), unit_l2(V[..., :rank] * root)


def _norm(U: Tensor, V: Tensor, norm: str) -> tuple[Tensor, Tensor, Tensor]:
    """The norm n [B, 1, 1, 1] of D = U Vᵀ over channels and, with N its gradient at D, N V and Nᵀ U."""
    if norm == "l2":
        D = U @ V.mT
        size = torch.linalg.vector_norm(D, dim=(1, 2, 3), keepdim=True)
        N = D / torch.where(size > 0, size, 1)
        return size, N @ V, N.mT @ U
    U_basis, U_core = linalg.qr(U)
    V_basis, V_core = linalg.qr(V)
    left, sigma, right = linalg.svd(U_core @ V_core.mT)
    N = left @ right.mT
    return sigma.sum((1, 2)).view(-1, 1, 1, 1), U_basis @ (N @ V_core), V_basis @ (N.mT @ U_core)


def _perturbed(center: Tensor, U: Tensor, V: Tensor, scale: Tensor, size: Tensor) -> Tensor:
    """center + scale D / n, not yet clipped; D = 0 stays 0."""
    D = U @ (V * (scale / torch.where(size > 0, size, 1))).mT
    return D.view(center.shape).add_(center).to(center.dtype)


def _factor_gradients(grad, U, V, size, NV, NtU) -> tuple[Tensor, Tensor]:
    """Of <G, D / n> with respect to U and V, up to a positive factor: those of G' = G - <G, D> / n N.

    Where D = 0, n has no gradient and G' = G.
    """
    GV, GtU = grad @ V, grad.mT @ U
    along = (GV * U).sum((1, 2, 3), keepdim=True) / torch.where(size > 0, size, 1)
    return GV - along * NV, GtU - along * NtU


def _exact(center: Tensor, best: Tensor, radius: Tensor, rank: int, norm: str) -> Tensor:
    """The adversarial inputs with perturbations brought to the rank, the box and the budget at once."""
    low = -center.double()
    delta = _low_rank_in_box(best.double() + low, low, 1 + low, rank, torch.finfo(center.dtype).eps / 4)
    if norm == "nuc":  # the clipping may have raised it; the l2 norm can only have fallen
        size = per_sample(linalg.svd(_matrices(delta)).sigma.sum((1, 2)), delta)
        delta *= (radius / torch.where(size > 0, size, 1)).clamp_max(1)
    return (center.double() + delta).clamp_(0, 1).to(center.dtype)


def _low_rank_in_box(delta: Tensor, low: Tensor, high: Tensor, rank: int, tolerance: float) -> Tensor:
    """Matrices near delta [*, H, W] of at most the rank and, to the tolerance, between low <= 0 and high >= 0."""
    low, high = low.flatten(0, -3), high.flatten(0, -3)
    result = delta.flatten(0, -3).clamp(low, high)
    moving = torch.arange(len(result), device=delta.device)
    for _ in range(ALTERNATIONS):
        nearest = _truncated(result[moving], rank)
        excess = nearest - nearest.clamp(low[moving], high[moving])
        settled = excess.abs().amax((1, 2)) <= tolerance
        # reflected in the box, not projected onto it: converges several times faster and ends farther out
        result[moving] = torch.where(settled[:, None, None], nearest, nearest - 2 * excess)
        moving = moving[~settled]
        if not len(moving):
            return result.view(delta.shape)
    result[moving] = _trimmed(_truncated(result[moving], rank), low[moving], high[moving], tolerance)
    return result.view(delta.shape)


def _trimmed(matrices: Tensor, low: Tensor, high: Tensor, tolerance: float) -> Tensor:
    """Rows and columns zeroed until every matrix [N, H, W] is in the box: the smaller of the two through its worst
    entry, again and again. Zeroing raises no rank; what the alternation leaves outside lies in tiny rows and columns.
    """
    everyone = torch.arange(len(matrices), device=matrices.device)
    for _ in range(sum(matrices.shape[1:])):
        worst, index = torch.maximum(low - matrices, matrices - high).flatten(1).max(1)
        i, j = index // matrices.shape[2], index % matrices.shape[2]
        row, column = matrices[everyone, i], matrices[everyone, :, j]
        row_goes = row.norm(dim=1) < column.norm(dim=1)
        outside = worst > tolerance
        if not outside.any():
            break
        matrices[everyone, i] = torch.where((outside & row_goes)[:, None], 0, row)
        column = matrices[everyone, :, j]
        matrices[everyone, :, j] = torch.where((outside & ~row_goes)[:, None], 0, column)
    return matrices


def _truncated(matrices: Tensor, rank: int) -> Tensor:
    U, sigma, V = linalg.svd(matrices)
    return (U[..., :rank] * sigma[..., None, :rank]) @ V[..., :rank].mT
