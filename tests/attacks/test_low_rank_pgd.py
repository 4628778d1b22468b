"""LoRa-PGD: gradients of the factors, ranks, budgets, starts, and what it keeps in memory."""

import copy
import gc
import math

import pytest
import torch
from torch import nn

from condlr_ext.attacks import fgsm, low_rank_pgd, perturbation_report, pgd
from condlr_ext.attacks import low_rank as implementation
from condlr_ext.errors import NonFiniteError, RankError, ShapeError

SHAPE = (3, 6, 5)


def network(classes=5, shape=SHAPE, dtype=torch.float64):
    return nn.Sequential(
        nn.Conv2d(shape[0], 6, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(6 * shape[1] * shape[2], classes)
    ).to(dtype)


def batch(n=6, classes=5, shape=SHAPE, dtype=torch.float64):
    """Pixels on the boundary of the box among them."""
    return (1.6 * torch.rand(n, *shape, dtype=dtype) - 0.3).clamp(0, 1), torch.randint(classes, (n,))


def inner(n=6, classes=5, shape=SHAPE, dtype=torch.float64):
    """Pixels so far inside that small perturbations are not clipped."""
    return 0.3 + 0.4 * torch.rand(n, *shape, dtype=dtype), torch.randint(classes, (n,))


@pytest.mark.parametrize("norm", ["l2", "nuc"])
def test_gradients_of_the_factors(norm):
    """<G, D / n(D)> by autograd through a dense D, for l2 and the nuclear norm."""
    U, V = torch.randn(4, *SHAPE[:2], 2, dtype=torch.float64), torch.randn(4, 3, 5, 2, dtype=torch.float64)
    G = torch.randn(4, *SHAPE, dtype=torch.float64)
    U.requires_grad_(), V.requires_grad_()
    D = U @ V.mT
    n = D.flatten(1).norm(dim=1) if norm == "l2" else torch.linalg.svdvals(D).sum((1, 2))
    expected = torch.autograd.grad(((G * D).sum((1, 2, 3)) / n).sum(), (U, V))
    size, *normals = implementation._norm_and_gradient(U.detach(), V.detach(), norm)
    torch.testing.assert_close(size.flatten(), n.detach())
    ours = implementation._factor_gradients(G, U.detach(), V.detach(), size, *normals)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a / size, b)


@pytest.mark.parametrize("norm", ["l2", "nuc"])
@pytest.mark.parametrize("rank", [1, 2, 5])
@pytest.mark.parametrize("init", ["random", "warm"])
def test_rank_and_budget_inside_the_box(norm, rank, init):
    x, y = inner()
    found = low_rank_pgd(network(), x, y, [0.05, 0.25], rank, norm=norm, init=init)
    report = perturbation_report(x, found)
    assert found.shape == (2, *x.shape) and report["rank"].shape == (2, len(x))
    assert (report["rank"] <= rank).all()
    moved = report["l2"] > 0
    assert moved.double().mean() > 0.7
    budget = torch.tensor([[0.05], [0.25]], dtype=torch.float64).expand(2, len(x))
    torch.testing.assert_close(report[norm][moved], budget[moved])  # on the sphere


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("norm", ["l2", "nuc"])
@pytest.mark.parametrize("rank", [1, 2])
def test_exact_holds_rank_box_and_budget_where_clipping_does_not(dtype, norm, rank):
    x, y = batch(n=30, dtype=dtype)
    eps = 1.5
    arguments = network(dtype=dtype), x, y, eps, rank
    clipped, exact = (low_rank_pgd(*arguments, norm=norm, init="warm", exact=e) for e in (False, True))
    assert (perturbation_report(x, clipped)["rank"] > rank).any()
    report = perturbation_report(x, exact)
    assert exact.min() >= 0 and exact.max() <= 1
    assert (report["rank"] <= rank).all() and (report["rank"] == rank).any()
    assert (report[norm] <= eps * (1 + 10 * torch.finfo(dtype).eps)).all()
    assert report[norm].median() > 0.5 * eps  # not merely shrunk away


def test_exact_zeroes_what_the_alternation_leaves_outside(monkeypatch):
    monkeypatch.setattr(implementation, "ALTERNATIONS", 1)
    x, y = batch(n=30)
    report = perturbation_report(x, low_rank_pgd(network(), x, y, 1.5, 2, init="warm", exact=True))
    assert (report["rank"] <= 2).all() and (report["l2"] > 0).double().mean() > 0.7


def test_zero_outside_zeroes_the_smaller_of_row_and_column():
    low, high = torch.full((3, 3, 3), -1.0), torch.ones(3, 3, 3)
    low[0, 1, 2] = high[1, 2, 0] = 0
    matrices = torch.full((3, 3, 3), 0.5)
    matrices[0, 1] = torch.tensor([0.1, 0.1, -0.1])  # row 1 holds the entry outside and is small
    matrices[1, :, 0] = 0.2  # column 0 does
    matrices[2] = 0.9  # inside
    expected = matrices.clone()
    expected[0, 1] = expected[1, :, 0] = 0
    assert torch.equal(implementation._zero_outside(matrices, low, high, 0.0), expected)


def test_reflections_reach_the_box_and_stay_near(monkeypatch):
    """Random rank-1 matrices: all come out feasible, half of them without zeroed rows."""
    left_over, zero_outside = [], implementation._zero_outside
    monkeypatch.setattr(
        implementation, "_zero_outside", lambda m, *rest: left_over.append(len(m)) or zero_outside(m, *rest)
    )
    low = -torch.rand(20, 6, 6, dtype=torch.float64)
    low[:, 0] = 0
    delta = torch.randn(20, 6, 1, dtype=torch.float64) @ torch.randn(20, 1, 6, dtype=torch.float64)
    result = implementation._low_rank_in_box(delta, low, low + 1, 1, 1e-9)
    assert (result >= low - 1e-9).all() and (result <= low + 1 + 1e-9).all()
    assert torch.linalg.svdvals(result)[:, 1].max() < 1e-12
    assert sum(left_over) <= 10
    inside = 0.2 * low.amax((1, 2), keepdim=True) * torch.ones(6, 6, dtype=torch.float64)
    torch.testing.assert_close(implementation._low_rank_in_box(inside, low, low + 1, 1, 1e-9), inside)


def train(model, x, y, steps=150):
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def accuracy(model, x, y):
    return (model(x.reshape(-1, *SHAPE)).argmax(1).view(-1, len(y)) == y).double().mean(1).squeeze()


def test_strength():
    """Stronger with rank and budget; at full rank and enough steps as strong as PGD; warm beats random at few steps."""
    model, (x, y) = network(), inner(n=80)
    train(model, x, y)
    eps = 0.25
    assert accuracy(model, x, y) == 1
    # 30 steps leave at most two samples of 80 to chance
    by_rank = [accuracy(model, low_rank_pgd(model, x, y, eps, r, steps=30), y) for r in (1, 3, 5)]
    assert by_rank[0] > by_rank[2] and by_rank[0] >= by_rank[1] - 2 / 80 and by_rank[1] >= by_rank[2] - 2 / 80
    assert by_rank[2] <= accuracy(model, pgd(model, x, y, eps, norm="l2"), y) + 2 / 80 < 1
    by_budget = accuracy(model, low_rank_pgd(model, x, y, [0, 0.1, 0.3, 2.0], 1), y)
    assert by_budget[0] == 1 > by_budget[2] >= by_budget[3] and by_budget[1] >= by_budget[2] and by_budget[3] < 0.2
    loss = nn.CrossEntropyLoss()
    random, warm = (low_rank_pgd(model, x, y, eps, 2, steps=1, init=i) for i in ("random", "warm"))
    assert loss(model(warm), y) > loss(model(random), y) > loss(model(x), y)


@pytest.mark.parametrize("init", ["random", "warm"])
@pytest.mark.parametrize("norm", ["l2", "nuc"])
def test_every_point_visited_is_that_of_ascent_by_autograd(norm, init):
    """Through clip(x + eps D / |D|, 0, 1), D = U Vᵀ formed; pixels on the boundary, so that clipping stops gradients."""
    model, (x, y), eps, seen = network(), batch(n=3), 1.0, []
    handle = model.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    generator = torch.Generator().manual_seed(1)
    low_rank_pgd(model, x, y, eps, 2, norm=norm, init=init, steps=4, generator=generator)
    handle.remove()
    if init == "random":
        U = torch.randn(3, *SHAPE[:2], 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        U, V = U / U.flatten(1).norm(dim=1)[:, None, None, None], torch.zeros(3, 3, 5, 2, dtype=torch.float64)
    else:
        U, V = implementation._balanced_factors(fgsm(model, x, y, eps, norm="l2") - x, 2)
    points = seen[-5:]
    for point in points:
        U, V = U.detach().requires_grad_(), V.detach().requires_grad_()
        D = U @ V.mT
        size = D.flatten(1).norm(dim=1) if norm == "l2" else torch.linalg.svdvals(D).sum((1, 2))
        if (size > 0).all():
            D = eps * D / size[:, None, None, None]
        reached = (x + D).clamp(0, 1)
        torch.testing.assert_close(point, reached.detach(), rtol=0, atol=1e-9)
        slopes = torch.autograd.grad(nn.functional.cross_entropy(model(reached), y, reduction="sum"), (U, V))
        lengths = [slope.flatten(1).norm(dim=1)[:, None, None, None] for slope in slopes]
        U, V = (F + slope / (n + (n == 0)) for F, slope, n in zip((U, V), slopes, lengths, strict=True))


def test_first_step_of_the_random_start():
    """V = 0: the step takes V along Gᵀ U, and D = U Uᵀ G, on the sphere; nothing is divided by a tiny number."""
    model, (x, y) = network(), inner(n=1)
    generator = torch.Generator().manual_seed(1)
    found = low_rank_pgd(model, x, y, 0.1, 2, steps=1, generator=generator)
    U = torch.randn(1, *SHAPE[:2], 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    point = x.clone().requires_grad_()
    (G,) = torch.autograd.grad(nn.functional.cross_entropy(model(point), y), point)
    D = U @ (U.mT @ G)
    torch.testing.assert_close(found, x + 0.1 * D / D.norm())


def test_warm_start_is_the_truncated_l2_step():
    model, (x, y) = network(), batch(n=8)
    step = fgsm(model, x, y, 0.4, norm="l2") - x
    U, V = implementation._balanced_factors(step, 2)
    left, sigma, right = torch.linalg.svd(step, full_matrices=False)
    nearest = left[..., :2] * sigma[..., None, :2] @ right[..., :2, :]
    scale = nearest.flatten(1).norm(dim=1) / (U @ V.mT).flatten(1).norm(dim=1)
    torch.testing.assert_close(U @ V.mT * scale[:, None, None, None], nearest)
    ones = torch.ones(8, dtype=torch.float64)
    torch.testing.assert_close(U.flatten(1).norm(dim=1), ones)
    torch.testing.assert_close(V.flatten(1).norm(dim=1), ones)


def test_transfer_starts_from_the_surrogate():
    model, other, (x, y), search = network(), network(), inner(), {"steps": 1, "loss": "log-odds"}
    other.train()
    asked = []
    other.register_forward_hook(lambda module, args, out: asked.append(module.training))
    a, b = (low_rank_pgd(model, x, y, 0.1, 2, init="transfer", surrogate=s, **search) for s in (other, model))
    assert asked == [False] and other.training and all(p.requires_grad for p in other.parameters())
    assert torch.equal(b, low_rank_pgd(model, x, y, 0.1, 2, init="warm", **search))
    assert not torch.equal(a, b)


def test_a_surrogate_without_a_gradient_does_not_end_the_attack():
    model, other, (x, y) = network(), network(), inner()
    for p in other.parameters():
        nn.init.zeros_(p)
    y = model(x).argmax(1)
    search = {"steps": 3, "generator": torch.Generator().manual_seed(3)}
    found = low_rank_pgd(model, x, y, 0.3, 2, init="transfer", surrogate=other, **search)
    search["generator"].manual_seed(3)
    assert torch.equal(found, low_rank_pgd(model, x, y, 0.3, 2, **search)) and not torch.equal(found, x)


def test_a_saturated_surrogate_gives_a_start():
    model, (x, y) = network(), inner()
    y = model(x).argmax(1)
    loud = copy.deepcopy(model)
    loud[-1].weight.data *= 1e5
    same = [
        low_rank_pgd(model, x, y, 0.3, 2, init="transfer", surrogate=s, steps=1, loss="log-odds") for s in (loud, model)
    ]
    assert not torch.equal(same[0], x) and (same[0] - x).norm() > 0.5 * (same[1] - x).norm()


def test_models_whose_gradient_is_one_number_many_times():
    class Grey(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(SHAPE[-1], 4).double()

        def forward(self, x):
            return self.head(x.sum((1, 2)))

    x, y = inner(classes=4)
    assert not torch.equal(low_rank_pgd(Grey(), x, y, 0.1, 1), x)


@pytest.mark.parametrize("init", ["random", "warm"])
def test_no_image_is_kept_between_steps(init):
    """Images alive when the model is called: x, and per budget its copy, the point and the mask of the box."""
    gc.collect()
    gc.freeze()  # get_objects then lists only later objects
    x, y = batch(n=4, shape=(1, 40, 40))
    model = network(shape=(1, 40, 40))
    eps, alive = [0.0, 0.5, 1.0], []

    def count(module, args):
        tensors = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.shape[-2:] == (40, 40)]
        alive.append(sum({t.untyped_storage().data_ptr(): t.numel() for t in tensors}.values()) / x.numel())

    def attack(budgets):
        alive.clear()
        options = {"steps": 3, "init": init, "restarts": 2 if init == "random" else 1}
        found = low_rank_pgd(model, x, y, budgets, 2, generator=torch.Generator().manual_seed(2), **options)
        steps = alive[init == "warm" :]  # without the call that makes the start
        assert len(steps) == 1 + options["restarts"] * 4
        return found, max(steps)

    handle = model.register_forward_pre_hook(count)
    together, peak = attack(eps)
    assert peak == 1 + 3 * 3
    for i, budget in enumerate(eps):
        found, peak = attack(budget)
        assert peak == 1 + 3 + 3 + (i > 0)  # together is alive too, and the last found
        torch.testing.assert_close(found, together[i], rtol=0, atol=1e-9)
    handle.remove()
    gc.unfreeze()


def test_report():
    x = torch.rand(4, 2, 6, 6)
    delta = torch.zeros(3, 4, 2, 6, 6)
    delta[1, :, 0, 2, 2] = 0.25
    delta[2, :, 0] = 0.1 * torch.eye(6)
    delta[2, :, 1, 0] = 0.1
    report = perturbation_report(0.5 + 0 * x, 0.5 + delta)
    close = torch.testing.assert_close
    assert report["rank"].tolist() == [[0] * 4, [1] * 4, [6] * 4]
    ones = torch.ones(4, dtype=torch.float64)
    close(report["linf"], torch.stack((0 * ones, 0.25 * ones, 0.1 * ones)), rtol=0, atol=1e-7)
    close(report["l2"], torch.stack((0 * ones, 0.25 * ones, math.sqrt(0.12) * ones)), rtol=0, atol=1e-6)
    close(report["nuc"], torch.stack((0 * ones, 0.25 * ones, (0.6 + math.sqrt(0.06)) * ones)), rtol=0, atol=1e-6)
    assert set(perturbation_report(torch.rand(3, 5), torch.rand(3, 5))) == {"l2", "linf"}
    empty = perturbation_report(torch.rand(0, 2, 6, 6), torch.rand(3, 0, 2, 6, 6))
    assert all(values.shape == (3, 0) for values in empty.values())
    # rounding of x + a rank-1 perturbation does not count as rank
    rounded = torch.rand(9, 1, 64, 64) * 0.5 + 0.25
    ones = torch.full((64, 64), 0.1)
    assert perturbation_report(rounded, rounded + ones)["rank"].tolist() == [1] * 9
    with pytest.raises(
        ShapeError, match=r"x_adv must be \[B, ...\] or \[E, B, ...\] for x \[4, 2, 6, 6\], got \[4, 2\]"
    ):
        perturbation_report(x, x[:, :, 0, 0])


def test_half_precision_and_single_channel():
    x = torch.rand(5, 8, 7).bfloat16()
    model = nn.Sequential(nn.Flatten(), nn.Linear(56, 4)).bfloat16()
    found = low_rank_pgd(model, x, torch.randint(4, (5,)), [0.2, 0.5], 2)
    assert found.shape == (2, 5, 8, 7) and found.dtype == torch.bfloat16 and torch.isfinite(found).all()
    assert not torch.equal(found[1], x)


def test_dead_gradients_leave_the_input():
    class Step(nn.Module):
        def forward(self, x):
            s = x.flatten(1).mean(1)
            return torch.stack(((s > 0.5) + 0 * s, 0 * s, 0 * s - 1), dim=1)

    x = torch.rand(4, 1, 5, 5)
    y = Step()(x).argmax(1)
    for options in ({"init": "random"}, {"init": "warm"}, {"init": "warm", "norm": "nuc", "exact": True}):
        assert torch.equal(low_rank_pgd(Step(), x, y, 0.01, 2, **options), x)


def test_model_and_random_state_are_left_alone():
    model, (x, y) = network(), batch()
    model.train()
    model[0].weight.requires_grad_(False)
    before = torch.get_rng_state()
    low_rank_pgd(model, x, y, 0.1, 1, generator=torch.Generator().manual_seed(0), loss="dlr", restarts=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training and not model[0].weight.requires_grad and model[0].bias.requires_grad
    assert model[0].bias.grad is None
    with torch.inference_mode():
        assert low_rank_pgd(model, x * 1, y * 1, [0.1, 0.2], 1).shape == (2, *x.shape)
    assert low_rank_pgd(model, x[:0], y[:0], [0.1, 0.2], 1).shape == (2, 0, *SHAPE)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"rank": 6}, RankError, r"rank must be in 1..5 for x \[6, 3, 6, 5\], got 6"),
        ({"rank": 0}, ValueError, "rank must be an integer >= 1, got 0"),
        ({"norm": "linf"}, ValueError, "norm must be one of l2, nuc, got 'linf'"),
        ({"init": "fgsm"}, ValueError, "init must be one of random, warm, transfer, got 'fgsm'"),
        ({"init": "transfer"}, ValueError, 'init="transfer" and surrogate need each other'),
        ({"surrogate": nn.Flatten()}, ValueError, "got init='random'"),
        ({"restarts": 2, "init": "warm"}, ValueError, 'restarts=2 needs init="random"'),
        ({"step_size": -1.0}, ValueError, "step_size must be finite and > 0, got -1.0"),
        ({"steps": True}, ValueError, "steps must be an integer >= 1"),
        ({"eps": -0.1}, ValueError, "low_rank_pgd: eps must be finite and >= 0"),
        ({"x": torch.full((6, *SHAPE), 2.0)}, ValueError, r"low_rank_pgd: x must lie in \[0, 1\]"),
        ({"x": torch.full((6, *SHAPE), torch.nan)}, ValueError, r"low_rank_pgd: x must lie in \[0, 1\]"),
        ({"x": torch.rand(6, 30)}, ShapeError, r"x must be matrices \[B, ..., H, W\], got \[6, 30\]"),
        ({"y": torch.full((6,), 9)}, ValueError, "labels must be in 0..4"),
        ({"loss": "cw"}, ValueError, "loss must be one of"),
    ],
)  # fmt: skip
def test_bad_arguments(change, error, message):
    x, y = batch()
    with pytest.raises(error, match=message):
        low_rank_pgd(**({"model": network(), "x": x, "y": y, "eps": 0.1, "rank": 2} | change))


def test_non_finite_models_raise():
    class Root(nn.Module):
        def forward(self, x):
            return (x.flatten(1)[:, :4] * 0).sqrt()

    with pytest.raises(NonFiniteError, match="low_rank_pgd: the loss or its gradient .* is not finite"):
        low_rank_pgd(Root(), torch.rand(3, 1, 4, 4), torch.tensor([0, 1, 2]), 0.1, 1)
