"""worst_case: models whose robustness is known, what masks gradients, what is decided by which attack, interruptions."""

import json

import pytest
import torch
from helpers.classifiers import Function, network
from torch import nn

from condlr_ext.errors import NonFiniteError
from condlr_ext.robustness import cascade, evaluate, worst_case

MARGINS = torch.tensor([0.05, 0.15, 0.25, 0.35, -0.1])  # the last one is misclassified to begin with


def threshold(classes=4, gain=1.0):
    """Class 0 where the mean of x is above 1/2, else class 1; a budget eps moves the mean by eps."""

    def logits(x):
        s = gain * (x.mean(1) - 0.5)
        return torch.stack((s, -s, *(0 * s - 10 * gain for _ in range(classes - 2))), dim=1)

    return Function(logits)


def samples():
    y = torch.tensor([0, 1, 0, 1, 1])
    return (0.5 + MARGINS * (1 - 2 * y))[:, None].expand(5, 6).clone(), y


@pytest.mark.parametrize("classes", [2, 3, 4])
@pytest.mark.parametrize("norm, scale", [("linf", 1), ("l2", 6**0.5)])
def test_known_margins(classes, norm, scale):
    x, y = samples()
    eps = [e * scale for e in (0.3, 0.1, 0.0, 0.2)]
    result = worst_case(threshold(classes), x, y, eps, norm=norm, steps=10, batch_size=2)
    assert result["worst"] == [1 / 5, 3 / 5, 4 / 5, 2 / 5] == result["fgsm"] == result["fgsm64"]
    assert (result["n"], result["clean"], result["eps"], result["norm"]) == (5, 4 / 5, eps, norm)
    assert result["flags"] == [] and result["square_only"] == [0, 0, 0, 0]
    assert list(result["stages"]) == ["fab", "apgd", *["apgd-dlr", "apgd-t"][: classes - 2], "square"]
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    distances = torch.tensor(result["distances"]) / scale
    assert distances[4] == 0 and ((distances / MARGINS)[:4] >= 1).all() and ((distances / MARGINS)[1:4] < 1.4).all()
    assert [cell for cell in str(result).splitlines()[2].split()] == [f"{eps[0]:g}", *["20.00"] * len(result["stages"]), "20.00", "20.00", "20.00"]  # fmt: skip


def trained(classes=5):
    x, y = torch.rand(80, 9, dtype=torch.float64), torch.randint(classes, (80,))
    model = network(classes)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, x, y


class Counting(nn.Module):
    """Counts the samples that go through a network."""

    def __init__(self, model):
        super().__init__()
        self.model, self.count = model, 0

    def forward(self, x):
        self.count += len(x)
        return self.model(x)


def test_as_strong_as_all_attacks_on_all_samples_with_less_work():
    model, x, y = trained()
    model, eps = Counting(model), [0.03, 0.06, 0.1, 0.15, 0.2]
    full = evaluate(model, x, y, eps, ["apgd-ce", "apgd-t"], steps=40, restarts=1, guard=False)
    spent, model.count = model.count, 0
    result = worst_case(model, x, y, eps, steps=40)
    assert full["clean"] == result["clean"] > full["worst"][0] > full["worst"][-1]
    assert all(a <= b + 1 / 80 for a, b in zip(result["worst"], full["worst"], strict=True))
    assert model.count < 0.75 * spent  # Square's check of 32 samples included, which for 80 is much
    for after in result["stages"].values():
        assert all(a >= b for a, b in zip(after, result["worst"], strict=True))


def test_a_random_search_finds_what_hides_its_gradients():
    x, y = (t.repeat_interleave(4, 0) for t in samples())
    x = x.repeat(1, 10)
    seen = threshold(classes=3)
    # steps that no gradient sees, and a slope that leads nowhere
    masked = Function(lambda x: seen((x * 50).round() / 50) + 1e-3 * x[:, :1] * torch.tensor([1.0, 0.0, 0.0]))
    seen, result = (worst_case(model, x, y, [0.1, 0.2], steps=10) for model in (seen, masked))
    assert seen["worst"] == result["worst"] == [3 / 5, 2 / 5]
    assert result["stages"]["apgd-dlr"] == [4 / 5, 4 / 5] and result["square_only"] == pytest.approx([1 / 5, 2 / 5])
    assert seen["flags"] == [] and seen["square_only"] == [0, 0]
    assert any("a search without gradients breaks 40.0%" in flag for flag in result["flags"])


def test_saturation_masks_nothing():
    model, x, y = trained()
    x = x.float()
    models = (Function(lambda x, gain=gain: (gain * model(x.double())).float()) for gain in (1, 1e4))
    quiet, loud = (worst_case(m, x, y, [0.1, 0.2], steps=20) for m in models)
    assert loud["saturated"] > 0.9 and loud["fgsm"][0] > loud["fgsm64"][0]
    assert all(abs(a - b) <= 2 / 80 for a, b in zip(quiet["worst"], loud["worst"], strict=True))
    assert any("FGSM was blinded by saturation" in flag for flag in loud["flags"])


def test_where_apgd_comes_nearer_than_fab_more_is_in_doubt(monkeypatch):
    """FAB is made to overestimate the distances threefold."""
    model, x, y = trained()
    exact = cascade.fab

    def far(model, x, y, **options):
        found, distance = exact(model, x, y, **options)
        return found, 3 * distance

    eps = [0.02, 0.04]
    honest = worst_case(model, x, y, eps, steps=40)
    attacked = {}
    monkeypatch.setattr(cascade, "fab", far)
    misled = worst_case(model, x, y, eps, steps=40, progress=lambda name, done, total: attacked.update({name: total}))
    assert honest["worst"] == misled["worst"] < misled["stages"]["fab"]
    monkeypatch.setattr(cascade, "DOUBT_GROWTH", 0)
    few = {}
    worst_case(model, x, y, eps, steps=40, progress=lambda name, done, total: few.update({name: total}))
    assert few.get("apgd-t", 0) < attacked["apgd-t"]


def test_an_interrupted_evaluation_goes_on_after_the_last_attack(tmp_path):
    model, x, y = trained()
    file, seen = tmp_path / "run.attacks", []

    def stop(name, done, total):
        seen.append(name)
        assert 0 <= done < total
        if name == "apgd-t" and not file.with_suffix(".resumed").exists():
            raise KeyboardInterrupt

    options = {"eps": [0.02, 0.05], "steps": 10, "progress": stop}
    with pytest.raises(KeyboardInterrupt):
        worst_case(model, x, y, **options, journal=file)
    assert list(dict.fromkeys(seen)) == ["fab", "apgd", "apgd-dlr", "apgd-t"]
    file.with_suffix(".resumed").touch()
    seen.clear()
    result = worst_case(model, x, y, **options, journal=file)
    assert list(dict.fromkeys(seen)) == ["apgd-t", "square"]
    seen.clear()
    assert worst_case(model, x, y, **options, journal=file) == result and not seen
    assert worst_case(model, x, y, **options) == result
    for change in ({"seed": 1}, {"eps": [0.02]}, {"x": 1 - x}):
        seen.clear()
        worst_case(**{"model": model, "x": x, "y": y} | options | change, journal=file)
        assert "fab" in seen, change
    file.write_text("damaged")
    assert worst_case(model, x, y, **options, journal=file) == result


def test_evaluate_goes_on_after_the_last_attack_too(tmp_path):
    model, x, y = trained()
    file, seen = tmp_path / "run.attacks", []

    def stop(name, done, total):
        seen.append(name)
        if len(seen) == 4:
            raise KeyboardInterrupt

    options = {"eps": [0.02, 0.05], "steps": 3, "others": {"own": lambda m, x, y, eps: x.expand(len(eps), *x.shape)}}
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, x, y, **options, progress=stop, journal=file)
    result = evaluate(model, x, y, **options, progress=lambda name, *_: seen.append(name), journal=file)
    assert seen[:5] == ["fgsm", "fgsm64", "pgd-ce", "pgd64", "pgd64"] and seen.count("own") == 1 and "own at 0" in seen
    assert result == evaluate(model, x, y, **options)


def test_the_seed_decides_and_nothing_leaks():
    model, x, y = trained()
    model.train()
    before = torch.get_rng_state()
    first, again = (worst_case(model, x, y, 0.05, steps=5, seed=3) for _ in range(2))
    assert first == again and torch.equal(before, torch.get_rng_state())
    assert model.training and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"norm": "nuc"}, ValueError, "worst_case: norm must be one of linf, l2, got 'nuc'"),
        ({"batch_size": 0}, ValueError, "worst_case: batch_size must be an integer >= 1, got 0"),
        ({"steps": 0}, ValueError, "worst_case: steps must be an integer >= 1, got 0"),
        ({"x": torch.rand(0, 6), "y": torch.zeros(0, dtype=torch.int64)}, ValueError, "at least one sample"),
        ({"x": 3 * torch.ones(5, 6)}, ValueError, r"worst_case: x must lie in \[0, 1\]"),
        ({"model": threshold(gain=float("nan"))}, NonFiniteError, "worst_case: .*non-finite logits"),
        ({"model": Function(lambda x: x[:, :1]), "y": torch.zeros(5, dtype=torch.int64)}, ValueError, "at least 2 classes, got 1"),
    ],
)  # fmt: skip
def test_bad_arguments(change, error, message):
    x, y = samples()
    with pytest.raises(error, match=message):
        worst_case(**({"model": threshold(), "x": x, "y": y, "eps": 0.1, "steps": 2} | change))
