"""evaluate: counts on models whose robustness is known."""

import json

import pytest
import torch
from torch import nn

from condlr_ext.errors import NonFiniteError
from condlr_ext.robustness import KNOWN_ATTACKS, evaluate


class Threshold(nn.Module):
    """Class 0 where the mean of x is above 1/2, else class 1; a budget eps moves the mean by eps."""

    def __init__(self, gain=1.0):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))

    def forward(self, x):
        s = self.gain * (x.mean(1) - 0.5)
        return torch.stack((s, -s, 0 * s - 10), dim=1)


def samples():
    """Margins .05, .15, .25, .35, and one that is misclassified to begin with."""
    shift = torch.tensor([0.05, -0.15, 0.25, -0.35, 0.1])
    return (0.5 + shift)[:, None].expand(5, 6).clone(), torch.tensor([0, 1, 0, 1, 1])


def test_known_margins():
    x, y = samples()
    result = evaluate(Threshold(), x, y, [0.1, 0.2, 0.3], steps=10)
    assert result["n"] == 5 and result["eps"] == [0.1, 0.2, 0.3]
    assert result["clean"] == 4 / 5
    for attack in ("pgd-ce", "pgd-dlr", "worst"):
        assert result[attack] == [3 / 5, 2 / 5, 1 / 5]
    assert result["fgsm"] == [3 / 5, 2 / 5, 1 / 5]
    assert result["saturated"] == result["zero_gradient"] == result["tiny_gradient"] == 0
    assert json.loads(json.dumps(result, allow_nan=False)) == result


@pytest.mark.parametrize("batch_size", [2, 3, 100])
def test_short_last_batch_counts_samples_not_batches(batch_size):
    x, y = samples()
    result = evaluate(Threshold(), x, y, [0.1, 0.2], steps=5, batch_size=batch_size)
    assert (result["n"], result["clean"], result["worst"]) == (5, 4 / 5, [3 / 5, 2 / 5])


def test_saturation_and_vanishing_gradients_are_counted():
    # logit gaps 3, 30 and 300: the last two saturate float32; e^-30 leaves a tiny gradient, e^-300 none
    x = torch.tensor([[0.01], [0.1], [1.0]])
    model = nn.Linear(1, 3, bias=False)
    model.weight.data = torch.tensor([[0.0], [-300.0], [-300.0]])
    assert model(x).softmax(1).amax(1).eq(1).tolist() == [False, True, True]
    result = evaluate(model, x, torch.zeros(3, dtype=torch.int64), 0.0, attacks=["fgsm"])
    assert result["saturated"] == 2 / 3
    assert result["tiny_gradient"] == 2 / 3
    assert result["zero_gradient"] == 1 / 3
    assert result["eps"] == [0.0] and result["fgsm"] == [1.0]
    assert result["dead_gradient"] == 0 and len(result["flags"]) == 3


def only(victim):
    """An attack that breaks one sample, out of those within the budget."""

    def attack(model, x, y, eps):
        attacked = x.expand(len(eps), *x.shape).clone()
        attacked[:, victim] += (0.5 - attacked[:, victim]).sign() * eps[:, None]
        return attacked

    return attack


def test_worst_is_the_intersection_per_sample():
    x, y = samples()
    x, y = x[:4], y[:4]
    options = {"guard": False, "others": {"first": only(0), "second": only(1)}}
    result = evaluate(Threshold(), x, y, [0.1, 0.2], attacks=[], **options)
    assert (result["first"], result["second"], result["worst"]) == ([3 / 4, 3 / 4], [1.0, 3 / 4], [3 / 4, 2 / 4])
    assert "flags" not in result and "at_zero" not in result
    assert "worst" not in evaluate(Threshold(), x, y, 0.1, attacks=[], guard=False)
    assert str(result).split("\n")[1].split() == ["eps", "first", "second", "worst"]


def test_transfer_is_part_of_the_worst_case():
    class Blind(Threshold):
        def forward(self, x):
            return super().forward(x.round(decimals=2))  # its gradient is 0

    x, y = samples()
    alone = evaluate(Blind(), x, y, [0.1, 0.2], steps=5)
    assert alone["worst"] == [4 / 5, 4 / 5] and "transfer" not in alone
    result = evaluate(Blind(), x, y, [0.1, 0.2], steps=5, surrogate=Threshold().train())
    assert result["transfer"] == result["worst"] == [3 / 5, 2 / 5]
    assert result["transfer_only"] == [1 / 5, 2 / 5]
    assert any("examples made on the surrogate break 40.0%" in flag for flag in result["flags"])
    bare = evaluate(Blind(), x, y, [0.1, 0.2], [], steps=5, guard=False, surrogate=Threshold())
    assert bare["worst"] == bare["transfer"] == [3 / 5, 2 / 5] and bare["transfer_only"] == [1 / 5, 2 / 5]


def test_an_attack_does_not_depend_on_the_others():
    x, y = torch.rand(50, 6), torch.randint(4, (50,))
    model = nn.Sequential(nn.Linear(6, 30), nn.Tanh(), nn.Linear(30, 4))
    few = evaluate(model, x, y, [0.02, 0.1], ["pgd-dlr"], steps=2, guard=False)
    many = evaluate(model, x, y, [0.02, 0.1], KNOWN_ATTACKS, steps=2)
    assert few["pgd-dlr"] == many["pgd-dlr"]
    assert [name for name in many if name in KNOWN_ATTACKS] == list(KNOWN_ATTACKS)


def test_l2():
    x, y = samples()
    model = Threshold()
    # along the diagonal of 6 pixels a step of length e moves the mean by e / sqrt 6
    result = evaluate(model, x, y, [0.25, 0.5], KNOWN_ATTACKS[:5], norm="l2", steps=10)
    for name in ("fgsm", "fgsm64", "pgd-ce", "pgd64", "worst"):
        assert result[name] == [3 / 5, 2 / 5]
    assert result["norm"] == "l2" and "l2 attacks" in str(result)


def test_an_attack_out_of_the_ball_is_an_error():
    x, y = samples()

    def far(model, x, y, eps):
        return (x + 1.5 * eps.view(-1, 1, 1)).clamp(0, 1)

    def run(attack, **options):
        evaluate(Threshold(), x, y, [0.1, 0.2], attacks=[], others={"mine": attack}, guard=False, **options)

    with pytest.raises(ValueError, match=r"evaluate: mine at eps=0.2 goes 0.3 from the input in linf"):
        run(far)
    with pytest.raises(ValueError, match=r"evaluate: mine at eps=0.2 goes 0.489.* in l2"):  # 0.2 sqrt 6
        run(lambda model, x, y, eps: x + eps.view(-1, 1, 1) * torch.ones(6) * (0.5 - x).sign(), norm="l2")
    with pytest.raises(ValueError, match=r"evaluate: mine must return inputs in \[0, 1\], got values in \[.*, 1.15\]"):
        run(lambda model, x, y, eps: x + 2 * eps.view(-1, 1, 1))
    with pytest.raises(ValueError, match=r"in \[nan, nan\]"):
        run(lambda model, x, y, eps: x.expand(2, *x.shape) * torch.nan)
    with pytest.raises(ValueError, match=r"mine must return torch.float32 \[2, 5, 6\], got torch.float32 \[5, 6\]"):
        run(lambda model, x, y, eps: x)
    with pytest.raises(ValueError, match=r"mine must return torch.float32 .*, got torch.float64 \[2, 5, 6\]"):
        run(lambda model, x, y, eps: x.expand(2, 5, 6).double())
    with pytest.raises(ValueError, match=r"mine must return torch.float32 \[2, 5, 6\], got NoneType"):
        run(lambda model, x, y, eps: None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_of_half_precision_is_no_budget(dtype):
    x, y = torch.rand(8, 3, 16, 16).to(dtype), torch.zeros(8, dtype=torch.int64)
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 3)).to(dtype)

    def run(attack):
        return evaluate(model, x, y, 0.01, attacks=["fgsm"], others={"mine": attack}, guard=False)

    run(lambda model, x, y, eps: (x + eps).clamp(0, 1)[None])
    with pytest.raises(ValueError, match=r"mine at eps=0.01\S* goes 0.1"):
        run(lambda model, x, y, eps: (x + 0.1 * (x < 0.5).to(dtype))[None])


def test_two_classes_have_the_attacks_that_they_can_have():
    result = evaluate(nn.Linear(6, 2), torch.rand(4, 6), torch.zeros(4, dtype=torch.int64), 0.1, steps=2)
    assert "pgd-ce" in result and "pgd-dlr" not in result


def test_logits_that_are_equal_in_half_precision_are_flagged():
    model = nn.Linear(6, 4).half()
    nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)
    result = evaluate(model, torch.rand(4, 6).half(), torch.zeros(4, dtype=torch.int64), 0.1, steps=2)
    assert result["dead_gradient"] == 1 and result["flags"]


def test_seed_decides_everything_and_nothing_leaks():
    class Wavy(nn.Linear):  # so many local maxima that the random start decides
        def forward(self, x):
            return super().forward(torch.sin(300 * x))

    model = Wavy(6, 4)
    x, y = torch.rand(200, 6), torch.randint(4, (200,))
    before = torch.get_rng_state()
    runs = [evaluate(model, x, y, [0.02, 0.04], steps=2, seed=seed, restarts=1) for seed in (7, 7, 8)]
    assert torch.equal(torch.get_rng_state(), before)
    assert runs[0] == runs[1] != runs[2]
    assert all(m.training for m in model.modules()) and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"attacks": ["pgd"]}, ValueError, "attacks must be a list of names out of fgsm, .*, apgd-t, got"),
        ({"attacks": "fgsm"}, ValueError, "attacks must be a list"),
        ({"norm": "nuc"}, ValueError, "norm must be one of linf, l2, got 'nuc'"),
        ({"others": {"worst": only(0)}}, ValueError, "others must have names of their own, got 'worst'"),
        ({"others": {"saturated": only(0)}}, ValueError, "others must have names of their own, got 'saturated'"),
        ({"batch_size": 0}, ValueError, "batch_size must be an integer >= 1, got 0"),
        ({"x": torch.rand(0, 6), "y": torch.zeros(0, dtype=torch.int64)}, ValueError, "at least one sample"),
        ({"x": 3 * torch.ones(5, 6)}, ValueError, r"evaluate: x must lie in \[0, 1\]"),
        ({"model": Threshold(float("nan"))}, NonFiniteError, "non-finite logits"),
        ({"model": nn.Linear(6, 2), "attacks": ["pgd-dlr"]}, ValueError, 'evaluate: attack "pgd-dlr" needs at least 3 classes, there are 2'),
    ],
)  # fmt: skip
def test_bad_arguments(change, error, message):
    x, y = samples()
    with pytest.raises(error, match=message):
        evaluate(**({"model": Threshold(), "x": x, "y": y, "eps": 0.1, "steps": 2} | change))
