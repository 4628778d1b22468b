"""Square, a random search that needs no gradients (Andriushchenko et al., arXiv 1912.00049)."""

import math

import torch
from torch import Tensor, nn

from .._checks import check_batch, check_choice, check_count, check_eps
from .._modules import frozen
from .._types import Budgets
from .balls import BALLS
from .losses import LOSSES
from .search import Search, repeat_for_budgets, unperturbed

FIRST_SHARE = 0.8  # of the pixels in the first window
HALVED_AT = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # the share, of 10 000 queries
TILES = 5  # per side, of the start in l2


def square(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: Budgets,
    *,
    norm: str = "linf",
    queries: int = 5000,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Attack by Square: change a random window of the perturbation, keep the change where the loss rises.

    The loss is the log-odds. Gradients are not used, so that networks which hide theirs are no harder. Samples leave
    the search once they are misclassified. All budgets go through the model in one batch, with the same windows.

    Args:
        model: Classifier returning logits [B, C], C >= 2; attacked in eval mode, its state is restored.
        x: Inputs in [0, 1], [B, ...], floating point; the last two dimensions are taken as an image, vectors as one of
            a single row.
        y: Labels [B], integer.
        eps: Radius >= 0 of the ball in the units of x, or a 1-D sequence of E radii.
        norm: "linf" or "l2".
        queries: Calls of the model >= 1 for each sample.
        generator: Source of windows and signs, on the device of x; default torch's global one.

    Returns:
        Adversarial inputs like x; [E, B, ...] for E budgets.

    Raises:
        ValueError: An argument out of range.
        TypeError: An argument of the wrong type.
        ShapeError: Shapes of the arguments or of the logits.
        NonFiniteError: NaN or Inf in the logits.

    Source: Andriushchenko, Croce, Flammarion, Hein (arXiv 1912.00049), algorithms 1 to 3.
    """
    y = check_batch("square", x, y)
    budgets = check_eps("square", eps, x, norm)
    check_choice("square", "norm", norm, BALLS)
    check_count("square", "queries", queries)
    if x.numel() == 0:
        return unperturbed(x, budgets)
    with frozen(model):
        center, labels, radius = repeat_for_budgets(x, y, budgets)
        search = search_squares("square", model, center, labels, radius, norm, queries, generator)
        (best,) = search.strongest()
    return best.view(*budgets.shape, *x.shape)


@torch.no_grad()
def search_squares(caller, model, center: Tensor, labels, radius: Tensor, norm: str, queries: int, generator) -> Search:
    """Return the search over center [N, ...] with radius [N, 1, ...] after that many queries."""
    search = Search(caller, model, labels, LOSSES["log-odds"], "log-odds", center, center)
    start, change = {"linf": (_stripes, _flip), "l2": (_bumps, _move_mass)}[norm]
    images, radii = _images(center), radius.reshape(-1, 1, 1, 1)
    for query in range(queries):
        rows = search.drop_misclassified()
        if not len(rows):
            break
        clean, eps = images[rows], radii[rows]
        if query:
            delta = change(_images(search.state[0][rows]) - clean, eps, _share(query, queries), generator)
        else:
            delta = start(clean, eps, generator)
        point = BALLS[norm].move(clean + delta, clean, eps).view(len(rows), *center.shape[1:])
        search.update(point, point)
    return search


def _images(t: Tensor) -> Tensor:
    """View samples [N, ...] as [N, C, H, W]."""
    *_, height, width = 1, 1, *t.shape[1:]
    return t.reshape(len(t), math.prod(t.shape[1:-2]), height, width)


def _share(query: int, queries: int) -> float:
    """Return the share of the pixels in the window of a query."""
    return FIRST_SHARE / 2 ** sum(query * 10_000 > at * queries for at in HALVED_AT)


def _signs(*shape: int, like: Tensor, generator) -> Tensor:
    return torch.randint(0, 2, shape, device=like.device, generator=generator).to(like.dtype) * 2 - 1


def _below(high: int, like: Tensor, generator) -> int:
    return int(torch.randint(high, (), device=like.device, generator=generator))


def _window(images: Tensor, share: float, generator, least: int = 1) -> tuple[slice, slice]:
    """Return rows and columns of a random window that covers about that share of the image, as square as it can be."""
    height, width = images.shape[-2:]
    side = max(least, round(math.sqrt(share * height * width)))
    h = min(side, height)
    w = min(max(side, round(share * height * width / h)), width)
    top, left = _below(height - h + 1, images, generator), _below(width - w + 1, images, generator)
    return slice(top, top + h), slice(left, left + w)


# --------------------------------------------------------------------------------------------------- l-infinity


def _stripes(clean: Tensor, eps: Tensor, generator) -> Tensor:
    """Return vertical stripes of random signs."""
    n, channels, _, width = clean.shape
    return eps * _signs(n, channels, 1, width, like=clean, generator=generator)


def _flip(delta: Tensor, eps: Tensor, share: float, generator) -> Tensor:
    """Set a window to a random sign in every sample and channel."""
    rows, columns = _window(delta, share, generator)
    delta[..., rows, columns] = eps * _signs(*delta.shape[:2], 1, 1, like=delta, generator=generator)
    return delta


# ----------------------------------------------------------------------------------------------------------- l2


def _bumps(clean: Tensor, eps: Tensor, generator) -> Tensor:
    """Return a grid of bumps of random signs, of norm eps."""
    n, channels, height, width = clean.shape
    delta = torch.zeros_like(clean)
    rows, columns = (torch.arange(size, device="cpu").tensor_split(min(TILES, size)) for size in (height, width))
    for row in rows:
        for column in columns:
            signs = _signs(n, channels, 1, 1, like=clean, generator=generator)
            tile = slice(int(row[0]), int(row[-1]) + 1), slice(int(column[0]), int(column[-1]) + 1)
            delta[(..., *tile)] = signs * _bump(len(row), len(column), clean, generator)
    return eps * BALLS["l2"].direction(delta)


def _bump(height: int, width: int, like: Tensor, generator) -> Tensor:
    """Return two humps of opposite sign side by side, [height, width], of norm 1."""
    if _below(2, like, generator):
        return _bump_pair(width, height, like).mT
    return _bump_pair(height, width, like)


def _bump_pair(height: int, width: int, like: Tensor) -> Tensor:
    left = width // 2
    parts = [_hump(height, left, like), -_hump(height, width - left, like)] if left else [_hump(height, width, like)]
    pair = torch.cat(parts, 1)
    return pair / pair.norm()


def _hump(height: int, width: int, like: Tensor) -> Tensor:
    """Return sum_{k <= n - d} 1 / (n + 1 - k)² at distance d from the middle, largest of rows and columns."""
    n = max(height, width) // 2
    rows, columns = (torch.arange(size, device=like.device) - size // 2 for size in (height, width))
    distance = torch.maximum(rows.abs()[:, None], columns.abs())
    terms = 1 / torch.arange(n + 1, 0, -1, device=like.device, dtype=like.dtype) ** 2  # k = 0..n
    return terms.cumsum(0)[n - distance]


def _move_mass(delta: Tensor, eps: Tensor, share: float, generator) -> Tensor:
    """Empty one window into another, with what is left of the budget, along a bump and what is there."""
    first = _window(delta, share, generator, least=3)
    second = _window(delta, share, generator, least=3)
    channels = delta.shape[1]
    here = delta[(..., *first)].clone()
    outside = delta.clone()
    outside[(..., *first)] = 0
    outside[(..., *second)] = 0
    both = (delta - outside).square().sum((2, 3), keepdim=True)
    unused = (eps.square() - delta.square().sum((1, 2, 3), keepdim=True)).clamp_min(0)
    size = here.square().sum((2, 3), keepdim=True).sqrt()
    signs = _signs(*delta.shape[:2], 1, 1, like=delta, generator=generator)
    bump = signs * _bump(*here.shape[2:], delta, generator) + here / torch.where(size > 0, size, 1)
    bump = bump / bump.square().sum((2, 3), keepdim=True).sqrt().clamp_min(torch.finfo(bump.dtype).tiny)
    outside[(..., *first)] = bump * (both + unused / channels).sqrt()
    return outside
