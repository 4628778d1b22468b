"""Adapters: what the libraries are handed and what comes back, and agreement with those that are installed."""

import random
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.digits import shuffled_digits
from torch import nn

from condlr_ext.attacks import apgd, autoattack, fgsm, from_foolbox, from_torchattacks, perturbation_report, pgd
from condlr_ext.errors import NonFiniteError, ShapeError
from condlr_ext.robustness import worst_case


class Spy(nn.Module):
    """Logits of a linear classifier; keeps the shapes and modes it saw."""

    def __init__(self, features, classes=3):
        super().__init__()
        self.linear, self.seen = nn.Linear(features, classes), []

    def forward(self, x):
        self.seen.append((tuple(x.shape[1:]), x.dtype, self.training))
        return self.linear(x.flatten(1))


def module(monkeypatch, name, **members):
    fake = ModuleType(name)
    vars(fake).update(members)
    monkeypatch.setitem(sys.modules, name, fake)
    return fake


class Shift:
    """Stands for an attack class of torchattacks: images + alpha u, u uniform and eps the largest possible alpha."""

    def __init__(self, model, eps, alpha=1.0):
        self.model, self.eps, self.alpha = model, eps, alpha

    def set_device(self, device):
        self.device = device

    def __call__(self, images, labels):
        assert not self.model.training and self.device == images.device and torch.is_grad_enabled()
        assert labels.dtype == torch.int64 and self.model(images).shape == (len(images), 3)
        noise = torch.rand_like(images) * np.random.rand()
        return images + self.alpha * self.eps * noise


@pytest.mark.parametrize(
    "shape, shown", [((2, 4, 4), (2, 4, 4)), ((4, 5), (1, 4, 5)), ((16,), (1, 4, 4)), ((15,), (15, 1, 1))], ids=str
)
def test_inputs_of_any_shape_are_shown_as_images(monkeypatch, shape, shown):
    asked = []

    class Seen(Shift):
        def __call__(self, images, labels):
            asked.append(tuple(images.shape[1:]))
            return super().__call__(images, labels)

    module(monkeypatch, "torchattacks", Seen=Seen)
    x, y = 0.5 * torch.rand(4, *shape, dtype=torch.float64), torch.tensor([0, 1, 2, 0], dtype=torch.int32)
    model = Spy(x[0].numel()).double()
    found = from_torchattacks(model, x, y, [0.0, 0.1, 0.2], "Seen", alpha=lambda eps: eps / 0.1)
    assert asked == [shown] * 2  # eps = 0 is the input
    assert set(model.seen) == {(shape, torch.float64, False)} and model.training
    assert found.shape == (3, *x.shape) and torch.equal(found[0], x)
    # the same random numbers for every budget: only alpha eps differs
    torch.testing.assert_close(found[2] - x, 4 * (found[1] - x))
    assert from_torchattacks(model, x, y, 0.1, "Seen").shape == x.shape
    assert from_torchattacks(model, x[:0], y[:0], [0.1, 0.2], "Seen").shape == (2, 0, *shape)


def test_random_states_are_left_alone(monkeypatch):
    module(monkeypatch, "torchattacks", Shift=Shift)
    x, y, model = 0.5 * torch.rand(4, 9), torch.tensor([0, 1, 2, 0]), Spy(9)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    a, b, c = (from_torchattacks(model, x, y, 0.1, "Shift", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(torch.get_rng_state(), before[0]) and (np.random.get_state()[1] == before[1]).all()
    assert random.getstate() == before[2]


def test_results_that_are_no_inputs_are_refused(monkeypatch):
    class Short(Shift):
        def __call__(self, images, labels):
            return images[1:]

    class Holed(Shift):
        def __call__(self, images, labels):
            return images * torch.nan

    module(monkeypatch, "torchattacks", Short=Short, Holed=Holed, Shift=Shift, version="1")
    x, y, model = torch.rand(4, 9), torch.tensor([0, 1, 2, 0]), Spy(9)
    with pytest.raises(ShapeError, match=r"the attack must return \[4, 1, 3, 3\], got \[3, 1, 3, 3\]"):
        from_torchattacks(model, x, y, 0.1, "Short")
    with pytest.raises(NonFiniteError, match="the attack returns NaN or Inf at eps=0.1"):
        from_torchattacks(model, x, y, 0.1, "Holed")
    for name in ("Missing", "version"):
        with pytest.raises(ValueError, match=f"torchattacks has no attack '{name}'"):
            from_torchattacks(model, x, y, 0.1, name)
    with pytest.raises(ValueError, match=r"from_torchattacks: x must lie in \[0, 1\]"):
        from_torchattacks(model, 2 + x, y, 0.1, "Shift")
    with pytest.raises(ValueError, match="labels must be in 0..2"):
        from_torchattacks(model, x, y + 2, 0.1, "Shift")
    with pytest.raises(ValueError, match="eps must be finite and >= 0"):
        from_torchattacks(model, x, y, -0.1, "Shift")


def test_missing_packages_say_how_to_install_them(monkeypatch):
    for name in ("torchattacks", "foolbox", "autoattack", "pyautoattack"):
        monkeypatch.setitem(sys.modules, name, None)
    x, y, model = torch.rand(4, 9), torch.tensor([0, 1, 2, 0]), Spy(9)
    for attack, name in ((from_torchattacks, "torchattacks"), (from_foolbox, "foolbox"), (autoattack, "pyautoattack")):
        more = " && pip install --no-deps torchattacks" if name == "torchattacks" else ""
        with pytest.raises(ImportError, match=rf"needs {name}: pip install 'condlr_ext\[attacks\]'{more}$"):
            attack(model, x, y, 0.1, *(["PGD"] if attack is not autoattack else []))


class Original:
    """The arguments of AutoAttack as its repository has them."""

    calls = []

    def __init__(self, model, norm="Linf", eps=0.3, seed=None, verbose=True, attacks_to_run=(), version="standard",
                 is_tf_model=False, device="cuda", log_path=None):  # fmt: skip
        self.calls.append((norm, eps, seed, verbose, tuple(attacks_to_run), version, str(device)))

    def run_standard_evaluation(self, x_orig, y_orig, bs=250, return_labels=False, state_path=None):
        self.calls.append((tuple(x_orig.shape), bs))
        return x_orig + 0


class Packaged:
    """The arguments of AutoAttack as pyautoattack has them."""

    calls = []

    def __init__(self, model, *, attacks=None, device="cpu", eps=0.3, norm="Linf", seed=None, version="standard"):
        self.calls.append((norm, eps, seed, tuple(attacks or ()), version, str(device)))

    def run_standard_evaluation(self, x_orig, y_orig, /, *, batch_size=250, state_path=None):
        self.calls.append((tuple(x_orig.shape), batch_size))
        return x_orig + 0, y_orig


def test_autoattack_from_either_package(monkeypatch):
    x, y, model = torch.rand(4, 9, dtype=torch.float64), torch.tensor([0, 1, 2, 0]), Spy(9, classes=10).double()
    monkeypatch.setitem(sys.modules, "autoattack", None)
    module(monkeypatch, "pyautoattack", AutoAttack=Packaged)
    assert torch.equal(autoattack(model, x, y, 0.25, batch_size=3), x)
    autoattack(model, x, y, 0.25, norm="l2", attacks=["apgd-ce"], seed=5)
    assert Packaged.calls == [
        ("Linf", 0.25, 0, (), "standard", "cpu"), ((4, 1, 3, 3), 3),
        ("L2", 0.25, 5, ("apgd-ce",), "custom", "cpu"), ((4, 1, 3, 3), 250),
    ]  # fmt: skip
    module(monkeypatch, "autoattack", AutoAttack=Original)
    assert autoattack(model, x, y, [0.25, 0.5], batch_size=3, attacks=["square"]).shape == (2, 4, 9)
    assert Original.calls == [
        ("Linf", 0.25, 0, False, ("square",), "custom", "cpu"), ((4, 1, 3, 3), 3),
        ("Linf", 0.5, 0, False, ("square",), "custom", "cpu"), ((4, 1, 3, 3), 3),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="norm must be one of linf, l2, got 'l1'"):
        autoattack(model, x, y, 0.1, norm="l1")
    with pytest.raises(ValueError, match="batch_size must be an integer >= 1, got 0"):
        autoattack(model, x, y, 0.1, batch_size=0)


@pytest.fixture(scope="module")
def digits():
    """An MLP that has learned real digits, and 540 it has not seen."""
    x, y = shuffled_digits()
    x = x.view(-1, 1, 8, 8)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(15):
        for batch in torch.randperm(1257).split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    return SimpleNamespace(model=model, x=x[1257:], y=y[1257:])


def points(digits, attack, seeds=3):
    """Accuracy in points, averaged over the seeds of the random starts."""
    with torch.no_grad():
        hits = [digits.model(attack(seed)).argmax(1) == digits.y for seed in range(seeds)]
    return 100 * torch.stack(hits).double().mean().item()


def generator(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    "norm, name, eps", [("linf", "PGD", 0.05), ("linf", "PGD", 0.1), ("l2", "PGDL2", 0.3), ("l2", "PGDL2", 0.5)]
)
def test_our_pgd_agrees_with_torchattacks(digits, norm, name, eps):
    pytest.importorskip("torchattacks")
    arguments = digits.model, digits.x, digits.y, eps
    ours = points(digits, lambda seed: pgd(*arguments, norm=norm, steps=30, generator=generator(seed)))
    options = {"steps": 30, "alpha": 2.5 * eps / 30}
    theirs = points(digits, lambda seed: from_torchattacks(*arguments, name, seed=seed, **options))
    assert 20 < theirs < 95 and abs(ours - theirs) <= 0.5


def test_our_fgsm_agrees_with_torchattacks(digits):
    pytest.importorskip("torchattacks")
    arguments = digits.model, digits.x, digits.y, [0.05, 0.2]
    torch.testing.assert_close(fgsm(*arguments), from_torchattacks(*arguments, "FGSM"))


@pytest.mark.parametrize("norm, name, eps", [("linf", "Linf", 0.1), ("l2", "L2", 0.5)])
def test_our_pgd_and_fgsm_agree_with_foolbox(digits, norm, name, eps):
    pytest.importorskip("foolbox")
    arguments = digits.model, digits.x, digits.y, eps
    torch.testing.assert_close(fgsm(*arguments, norm=norm), from_foolbox(*arguments, f"{name}FastGradientAttack"))
    start = norm == "linf"  # in l2 foolbox starts uniformly in the ball, that is near its surface, and ends lower
    ours = points(digits, lambda s: pgd(*arguments, norm=norm, steps=30, random_start=start, generator=generator(s)))
    options = {"steps": 30, "rel_stepsize": 2.5 / 30, "random_start": start}
    theirs = points(digits, lambda seed: from_foolbox(*arguments, f"{name}PGD", seed=seed, **options))
    assert 20 < theirs < 95 and abs(ours - theirs) <= 0.5


@pytest.mark.parametrize("norm, eps", [("linf", 0.1), ("l2", 0.5)])
def test_our_apgd_agrees_with_autoattack(digits, norm, eps):
    pytest.importorskip("pyautoattack")
    digits = SimpleNamespace(model=digits.model, x=digits.x[:150], y=digits.y[:150])
    arguments = digits.model, digits.x, digits.y, eps
    for loss in ("ce", "dlr"):
        ours = apgd(*arguments, norm=norm, loss=loss, restarts=5, generator=generator(0))  # as AutoAttack's
        theirs = autoattack(*arguments, norm=norm, attacks=[f"apgd-{loss}"])
        assert (perturbation_report(digits.x, theirs)[norm] <= eps * (1 + 1e-5)).all()
        assert abs(points(digits, lambda _: ours, 1) - points(digits, lambda _: theirs, 1)) < 2  # noqa: B023  # 2 of 150


@pytest.mark.slow
@pytest.mark.parametrize("norm, eps", [("linf", 0.1), ("l2", 0.5)])
def test_the_worst_case_is_that_of_autoattack(digits, norm, eps):
    pytest.importorskip("pyautoattack")
    theirs = points(digits, lambda _: autoattack(digits.model, digits.x, digits.y, eps, norm=norm), 1)
    ours = 100 * worst_case(digits.model, digits.x, digits.y, [eps / 2, eps, 2 * eps], norm=norm)["worst"][1]
    assert 20 < theirs < 95 and ours <= theirs + 0.3


@pytest.mark.parametrize("eps", [1e-4, 0.3])
def test_autoattack_says_how_many_classes_it_needs(monkeypatch, eps):
    module(monkeypatch, "autoattack", AutoAttack=Original)
    x, y = torch.rand(4, 9), torch.tensor([0, 1, 1, 0])
    for classes in (2, 9):
        for attacks, name in ((None, "apgd-t"), (["apgd-ce", "fab-t"], "fab-t"), (["apgd-t"], "apgd-t")):
            with pytest.raises(ValueError, match=f'"{name}" needs at least 10 classes, the model has {classes}; give'):
                autoattack(Spy(9, classes), x, y, eps, attacks=attacks)
    with pytest.raises(ValueError, match='"apgd-dlr" needs at least 3 classes, the model has 2'):
        autoattack(Spy(9, 2), x, y, eps, attacks=["square", "apgd-dlr"])
    assert torch.equal(autoattack(Spy(9, 2), x, y, eps, attacks=["apgd-ce", "fab", "square"]), x)
    for attacks in ("apgd-ce", ["pgd"]):
        with pytest.raises(ValueError, match="attacks must be a list of names out of apgd-ce, apgd-dlr, apgd-t, fab"):
            autoattack(Spy(9), x, y, eps, attacks=attacks)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm, eps", [("linf", 0.3), ("l2", 2.0)])
def test_autoattack_on_models_of_other_dtypes(dtype, norm, eps):
    pytest.importorskip("pyautoattack")
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)).to(dtype)
    x = torch.rand(6, 1, 8, 8).to(dtype)
    y = model(x).argmax(1)
    found = autoattack(model, x, y, eps, norm=norm, attacks=["apgd-ce", "square"])
    assert found.dtype == dtype and (model(found).argmax(1) != y).all()
    rounding = torch.finfo(dtype).eps * 8
    assert (perturbation_report(x, found)[norm] <= eps + rounding).all()


def test_attacks_without_a_budget_are_refused(monkeypatch):
    class Minimal:
        def __init__(self, model, steps=50, overshoot=0.02): ...

    module(monkeypatch, "torchattacks", Minimal=Minimal)
    with pytest.raises(ValueError, match="Minimal has no budget eps, its arguments are model, steps, overshoot"):
        from_torchattacks(Spy(9), torch.rand(4, 9), torch.tensor([0, 1, 2, 0]), 0.1, "Minimal")
