"""The worst case of strong attacks by a cascade: cheap attacks first, dear ones for what is in doubt."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from .._checks import check_batch, check_choice, check_count, check_eps
from .._modules import frozen
from .._types import Budgets
from ..attacks.auto_pgd import ascend_from, start_search
from ..attacks.balls import BALLS, unsqueeze_like
from ..attacks.boundary import fab
from ..attacks.gradient import fgsm
from ..attacks.losses import CLASSES_NEEDED
from ..attacks.random_search import search_squares
from ..attacks.search import sample_start
from . import masking
from .evaluation import Evaluation, clean_statistics, plain_budgets, share, survivors
from .journal import Journal, checksum

FAB_STEPS, FAB_TARGETS = 20, 3  # on networks that mask nothing within 15 % of what fifteen times the steps find
DOUBT = 1.3  # a sample is in doubt where FAB's distance is less than this multiple of its budget ...
DOUBT_GROWTH = 3  # ... or one plus this multiple of the largest share by which another attack has come nearer than FAB
DLR_RESTARTS, TARGETS = 5, 9  # both find what the other misses
QUERIES, ALL_QUERIES = 1000, 5000  # of Square: for those that it looks at; for all, once it has found something
CHECKED = 32  # samples that Square looks at beside those without a usable gradient


def worst_case(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: Budgets,
    *,
    norm: str = "linf",
    steps: int = 100,
    restarts: int = 1,
    seed: int = 0,
    batch_size: int = 256,
    progress: Callable[[str, int, int], None] | None = None,
    journal: Path | None = None,
) -> Evaluation:
    """Measure the accuracy that a cascade of attacks leaves, at all budgets in one run.

    First FGSM at all budgets. Then FAB, which searches the nearest misclassified input and so decides most samples at
    most budgets. From then on a sample is attacked at the largest budget that it has withstood, and again at the next
    smaller one if it falls: all of them by APGD on the log-odds; by APGD on the DLR loss (five restarts) and on the
    targeted one (nine targets), only where FAB's distance is less than 1.3 times the budget (more, where APGD has come
    nearer than FAB) or FAB found nothing. What withstands a budget counts as withstanding all smaller ones. Last comes
    Square, which needs no gradient, for samples without a usable one and for 32 others; if it breaks any of them, for
    all. No loss of these attacks saturates.

    Args:
        model: Classifier returning logits [B, C], C >= 2; attacked in eval mode, its state is restored.
        x: Inputs in [0, 1], [N, ...], floating point, N >= 1.
        y: Labels [N], integer.
        eps: Budget >= 0 in the units of x, or a 1-D sequence of budgets.
        norm: "linf" or "l2".
        steps: Steps of each ascent of APGD.
        restarts: Times that all of APGD's ascents are made.
        seed: Seed of the random starts; the global random state is neither read nor changed.
        batch_size: Samples attacked at a time.
        progress: Called as progress(stage, samples done, samples to do in this stage as far as known).
        journal: File that keeps the result of every stage, so that the same call goes on after the last one; it is for
            the caller to remove.

    Returns:
        Evaluation with "n", "norm", "eps", "clean", "fgsm", "fgsm64" and the shares of gradients as evaluate has them.
        "worst": the share that withstands everything, for each budget; "stages": the same after each stage, by name;
        "square_only": the share that only Square broke; "distances": for each sample the size of a perturbation that
        breaks it, None if none is known: the smallest found by FAB, or the budget of another attack if that is smaller,
        and not searched below the smallest budget; "flags" as evaluate has them.

    Raises:
        ValueError: An argument out of range.
        TypeError: An argument of the wrong type.
        ShapeError: Shapes of the arguments or of the logits.
        NonFiniteError: NaN or Inf in the logits or the input gradient.

    Source: AutoAttack (Croce and Hein, arXiv 2003.01690) for the attacks and their order; the rule of doubt is this
        package's.
    """
    y = check_batch("worst_case", x, y)
    check_eps("worst_case", eps, x, norm)
    if x.numel() == 0:
        raise ValueError(f"worst_case: x must hold at least one sample, got shape {list(x.shape)}")
    check_choice("worst_case", "norm", norm, BALLS)
    for name, count in (("steps", steps), ("restarts", restarts), ("batch_size", batch_size)):
        check_count("worst_case", name, count)
    budgets = plain_budgets(eps)
    key = {"cascade": [budgets, norm, steps, restarts, seed, batch_size], "of": journal and checksum(model, x, y)}
    kept = Journal(journal, key)
    with frozen(model):
        cascade = _Cascade(model, x, y, budgets, norm, batch_size, progress or (lambda *_: None))
        result = Evaluation(n=len(x), norm=norm, others=[], eps=budgets)
        result |= cascade.begin() | {"stages": {}}
        for i, (name, stage) in enumerate(cascade.stages(steps, restarts).items()):
            generator = torch.Generator(x.device).manual_seed(seed + i)
            cascade.distance = kept.recall(name, partial(stage, generator))
            if name == "fab":
                cascade.found = cascade.distance
            result["stages"][name] = cascade.accuracy()
    *_, before, result["worst"] = result["stages"].values()
    result["square_only"] = [a - b for a, b in zip(before, result["worst"], strict=True)]
    result["distances"] = [d if d < torch.inf else None for d in cascade.distance.tolist()]
    result["flags"] = masking.flags(result)
    return result


class _Cascade:
    """The samples of one evaluation and how near to each a misclassified input is known.

    Attributes:
        distance: [N] float64 on the CPU; 0 where the clean input is misclassified, Inf where nothing is known.
        found: That after FAB.
    """

    def __init__(self, model, x, y, budgets, norm, batch_size, progress):
        self.model, self.x, self.y, self.norm, self.batch_size = model, x, y, norm, batch_size
        self.budgets = torch.tensor(budgets, dtype=torch.float64, device="cpu")
        self.progress, self.dead = progress, None
        self.distance = self.found = torch.full((len(x),), torch.inf, dtype=torch.float64, device="cpu")

    def accuracy(self) -> list[float]:
        """Return the share of the samples that withstand each budget as far as is known."""
        return share(self.distance > self.budgets[:, None])

    def radius(self) -> Tensor:
        """Return the largest budget that each sample withstands as far as is known, [N]; 0 if none."""
        return torch.where(self.distance[:, None] > self.budgets, self.budgets, 0).amax(1)

    def begin(self) -> dict:
        """Take the clean samples and FGSM at all budgets; return their entries of the result."""
        batches = list(zip(self.x.split(self.batch_size), self.y.split(self.batch_size), strict=True))
        clean, classes = clean_statistics("worst_case", self.model, batches)
        if classes < CLASSES_NEEDED["log-odds"]:
            raise ValueError(f"worst_case: the model must have at least 2 classes, got {classes}")
        self.classes, self.dead = classes, clean["dead_gradient"].cpu()
        fallen = ~clean["clean"].cpu()
        self.distance = torch.where(fallen, 0, self.distance)
        result = {name: share(samples) for name, samples in clean.items()}
        eps = self.budgets.to(self.x)
        for name, loss in (("fgsm", "ce"), ("fgsm64", "log-odds")):
            attack = partial(fgsm, norm=self.norm, loss=loss)
            stands = torch.cat([survivors(name, attack, self.model, *b, eps, self.norm) for b in batches], dim=1).cpu()
            result[name] = share(stands)
            nearest = torch.where(stands, torch.inf, self.budgets[:, None]).amin(0)
            self.distance = torch.minimum(self.distance, nearest)
        return result

    def stages(self, steps: int, restarts: int) -> dict[str, Callable]:
        """Return the stages in order by name, each a function of a generator that returns the distance after it."""
        ascents = {"apgd": ("log-odds", restarts, 0, lambda radius: radius > 0)}
        if self.classes >= CLASSES_NEEDED["dlr"]:
            ascents["apgd-dlr"] = ("dlr", DLR_RESTARTS * restarts, 0, self.in_doubt)
        if self.classes >= CLASSES_NEEDED["dlr-targeted"]:
            ascents["apgd-t"] = ("dlr-targeted", restarts, TARGETS, self.in_doubt)

        def ascent(name, loss, restarts, targets, chosen, generator):
            def fallen(x, y, radius):
                search = start_search("worst_case", self.model, x, y, loss)
                draw = partial(sample_start, BALLS[self.norm], x, x, radius, generator)
                ascend_from(search, self.norm, x, radius, draw, steps, restarts, targets, hasty=True)
                search.check_finite()
                return search.wrong

            return self.descend(name, fallen, chosen)

        rest = {name: partial(ascent, name, *options) for name, options in ascents.items()}
        return {"fab": self.fab} | rest | {"square": self.square}

    def fab(self, generator) -> Tensor:
        """Search misclassified inputs near those that withstand the smallest budget."""
        distance, rows = self.distance.clone(), (self.distance > self.budgets.min()).nonzero()[:, 0]
        for done, batch in enumerate(rows.split(self.batch_size)):
            self.progress("fab", done * self.batch_size, len(rows))
            x, y = self.x[batch], self.y[batch]
            _, found = fab(self.model, x, y, norm=self.norm, steps=FAB_STEPS, targets=FAB_TARGETS)
            distance[batch] = torch.minimum(distance[batch], found.double().cpu())
        return distance

    def in_doubt(self, radius: Tensor) -> Tensor:
        """Return which samples FAB does not put far outside a radius, or knows nothing of."""
        beaten = (self.distance < self.found) & (self.found < torch.inf)
        excess = (self.found / self.distance)[beaten & (self.distance > 0)] - 1
        limit = max(DOUBT, 1 + DOUBT_GROWTH * excess.max().item()) if len(excess) else DOUBT
        return (radius > 0) & ((self.found < limit * radius) | self.without_gradient())

    def without_gradient(self) -> Tensor:
        """Return which samples no gradient leads anywhere: it is 0, or FAB has found nothing."""
        return self.dead | (self.found == torch.inf)

    def square(self, generator) -> Tensor:
        """Search at random from samples without a gradient and some others, then from all if that breaks any."""

        def fallen(queries, x, y, radius):
            search = search_squares("worst_case", self.model, x, y, radius, self.norm, queries, generator)
            search.check_finite()
            return search.wrong

        standing = self.radius() > 0
        some = standing.nonzero()[:, 0]
        some = some[torch.randperm(len(some), device=generator.device, generator=generator).cpu()[:CHECKED]]
        looked_at = standing & self.without_gradient()
        looked_at[some] = True
        before = self.distance.clone()
        self.descend("square", partial(fallen, QUERIES), lambda radius: looked_at & (radius > 0))
        if (self.distance < before).any():
            self.descend("square", partial(fallen, ALL_QUERIES), lambda radius: radius > 0)
        return self.distance

    def descend(self, name: str, attack: Callable, chosen: Callable[[Tensor], Tensor]) -> Tensor:
        """Attack samples at the largest budget that they withstand until it is one that they withstand in this attack.

        Args:
            name: For progress.
            attack: (x, y, radius [B, 1, ...]) -> booleans [B]: is a misclassified input found?
            chosen: (radius [N]) -> booleans [N]: is the sample attacked at that budget?

        Returns:
            The distance after it.
        """
        withstood, done = torch.zeros_like(self.distance), 0
        self.distance = self.distance.clone()
        while True:
            radius = self.radius()
            rows = (chosen(radius) & (withstood != radius)).nonzero()[:, 0]
            if not len(rows):
                return self.distance
            for batch in rows.split(self.batch_size):
                self.progress(name, done, done + len(rows))
                x, r = self.x[batch], radius[batch]
                fell = attack(x, self.y[batch], unsqueeze_like(r.to(x), x)).cpu()
                self.distance[batch[fell]] = r[fell]
                withstood[batch[~fell]] = r[~fell]
            done += len(rows)
