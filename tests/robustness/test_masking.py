"""The guard: networks that mask their gradients on purpose are flagged and seen through, honest ones are not."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from helpers.digits import shuffled_digits
from torch import nn

from condlr_ext.robustness import evaluate, flags, plateau

EPS = [0.05, 0.1, 0.2]
BUDGET = {"steps": 20, "restarts": 1}


def mlp(classes=10):
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, classes))


def train(model, x, loss_of, lr=0.1):
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.5)
    for _ in range(12):
        for batch in torch.randperm(len(x)).split(32):
            optimizer.zero_grad()
            loss_of(model(x[batch]), batch).backward()
            optimizer.step()


@pytest.fixture(scope="module")
def digits():
    """Real digits, and an honest network that has learned them."""
    x, y = shuffled_digits()
    honest = mlp()
    train(honest, x[:1257], lambda logits, batch: nn.functional.cross_entropy(logits, y[:1257][batch]))
    test = x[1257:1557], y[1257:1557]
    return SimpleNamespace(
        x=x[:1257], y=y[:1257], test=test, honest=honest, result=evaluate(honest, *test, EPS, **BUDGET)
    )


def mentions(result, *words):
    return [flag for flag in result["flags"] if any(word in flag for word in words)]


def test_an_honest_network_is_not_flagged(digits):
    result = digits.result
    assert result["clean"] > 0.94
    assert result["flags"] == []
    assert str(result).endswith("no sign of masked gradients")
    assert set(result["at_zero"].values()) == {result["clean"]}
    assert set(result["at_zero"]) == {"fgsm", "fgsm64", "pgd-ce", "pgd64", "pgd-rescaled", "pgd-dlr"}
    other = mlp()
    train(other, digits.x, lambda logits, batch: nn.functional.cross_entropy(logits, digits.y[batch]))
    result = evaluate(digits.honest, *digits.test, EPS, surrogate=other, **BUDGET)
    assert result["flags"] == [] and min(result["transfer_only"]) >= 0
    assert json.loads(json.dumps(result, allow_nan=False)) == result


class Scaled(nn.Module):
    def __init__(self, model, scale):
        super().__init__()
        self.model, self.scale = model, scale

    def forward(self, x):
        return self.scale * self.model(x)


def test_loud_logits_are_flagged_and_seen_through(digits):
    result = evaluate(Scaled(digits.honest, 1e4), *digits.test, EPS, **BUDGET)
    assert result["saturated"] > 0.95 and result["tiny_gradient"] > 0.95 and result["dead_gradient"] == 0
    assert mentions(result, "softmax is exactly 1")
    assert mentions(result, "FGSM was blinded") and mentions(result, "attacks on cross-entropy miss")
    assert result["fgsm"][1] > digits.result["fgsm"][1] + 0.2  # the published kind of number
    # the scale changes nothing about the network: neither may the numbers that count
    for name in ("fgsm64", "pgd64", "pgd-rescaled", "pgd-dlr", "worst"):
        torch.testing.assert_close(
            torch.tensor(result[name]), torch.tensor(digits.result[name]), rtol=0, atol=0.03, msg=name
        )
    shown = str(result)
    assert "looks masked:\n- the float32 softmax is exactly 1" in shown and "0.05" in shown


class Quantized(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model((16 * x).round() / 16)


def test_quantized_inputs_are_flagged_and_a_surrogate_breaks_them(digits):
    result = evaluate(Quantized(digits.honest), *digits.test, EPS, surrogate=digits.honest, **BUDGET)
    assert result["zero_gradient"] == result["dead_gradient"] == 1
    assert mentions(result, "the network passes none") and mentions(result, "made on the surrogate break")
    assert result["fgsm"] == [result["clean"]] * 3
    assert result["worst"][2] < 0.3 < result["pgd-ce"][2]


def test_defensive_distillation_is_flagged(digits):
    """Teacher and student trained at temperature 30, the student used at 1: its logits are 30 times too large."""
    temperature = 30

    def cross_entropy(logits, batch):
        return nn.functional.cross_entropy(logits / temperature, digits.y[batch])

    teacher, student = mlp(), mlp()
    train(teacher, digits.x, cross_entropy, lr=2)
    with torch.no_grad():
        soft = (teacher(digits.x) / temperature).softmax(1)
    train(student, digits.x, lambda logits, batch: nn.functional.cross_entropy(logits / temperature, soft[batch]), lr=2)
    result = evaluate(student, *digits.test, EPS, **BUDGET)
    assert result["clean"] > 0.9
    assert mentions(result, "softmax is exactly 1") and mentions(result, "FGSM was blinded")
    assert result["worst"][1] < result["fgsm"][1] - 0.1


def test_a_random_network_is_flagged(digits):
    class Noisy(nn.Module):
        def forward(self, x):
            return digits.honest(x + 0.4 * torch.randn_like(x))

    assert mentions(evaluate(Noisy(), *digits.test, EPS, **BUDGET), "at eps=0")


def numbers(**change):
    healthy = {
        "n": 500, "eps": [0.2, 0.1], "clean": 0.98, "fgsm": [0.3, 0.6], "fgsm64": [0.3, 0.59], "pgd-ce": [0.2, 0.56],
        "pgd-dlr": [0.21, 0.57], "worst": [0.19, 0.55], "saturated": 0.01, "zero_gradient": 0.0, "tiny_gradient": 0.0,
        "dead_gradient": 0.0, "at_zero": {"fgsm": 0.98},
    }  # fmt: skip
    return healthy | change


@pytest.mark.parametrize(
    "change, message",
    [
        ({"saturated": 0.06}, "the float32 softmax is exactly 1, so that .* for 6.0% of the samples"),
        ({"zero_gradient": 0.06}, "input gradient of the cross-entropy is exactly 0 for 6.0%"),
        ({"tiny_gradient": 0.06}, "below 1e-10 for 6.0%"),
        ({"dead_gradient": 0.06}, "0 whatever the loss"),
        ({"fgsm64": [0.3, 0.54]}, "fgsm leaves 6.0 points more than fgsm64 at eps=0.1"),
        ({"fgsm": [0.14, 0.6]}, "iterating is weaker than one step: pgd-ce leaves 6.0 points more than fgsm at eps=0.2"),
        ({"pgd-ce": [0.25, 0.55]}, "pgd-ce leaves 6.0 points more than worst at eps=0.2"),
        ({"transfer_only": [0.0, 0.06]}, "surrogate break 6.0%"),
        ({"at_zero": {"fgsm": 0.976}}, "at eps=0 fgsm finds accuracy 97.6% and not the clean 98.0%"),
        ({"pgd-dlr": [0.6, 0.57]}, "accuracy under pgd-dlr rises by 3.0 points with a larger budget"),
        ({"worst": [0.53, 0.55], "pgd-ce": [0.55, 0.56], "fgsm": [0.56, 0.6], "fgsm64": [0.56, 0.6]}, "stops falling with the budget"),
    ],
)  # fmt: skip
def test_each_flag(change, message):
    assert flags(numbers()) == []
    (flag,) = flags(numbers(**change))
    assert re.search(message, flag)


def test_numbers_that_are_not_there_are_skipped():
    assert flags({"n": 10, "eps": [0.1], "clean": 0.9, "fgsm": [0.5]}) == []
    assert flags(numbers(at_zero={"fgsm": 0.978})) == []  # one sample of 500
    just = {"fgsm64": [0.3, 0.56], "pgd-ce": [0.23, 0.55], "transfer_only": [0.04, 0.0], "saturated": 0.05}
    assert flags(numbers(**just)) == []


def test_plateaus_of_published_curves():
    """l2-PGD accuracies printed for VGG16 on CIFAR-10: two rows stop falling, the others do not."""
    eps = [0.1, 0.13, 0.16, 0.2, 0.23, 0.26, 0.3]
    suspicious = {
        90.93: [67.03, 62.08, 59.15, 56.92, 55.96, 55.28, 54.58],
        89.97: [64.84, 60.25, 57.75, 56.03, 55.21, 54.75, 54.25],
    }
    honest = {
        90.48: [63.01, 54.66, 47.87, 40.77, 36.75, 33.51, 29.93],
        89.62: [67.68, 59.38, 51.09, 40.87, 34.46, 29.21, 23.62],
        88.58: [59.34, 50.06, 41.50, 31.82, 25.67, 20.48, 15.04],
        87.99: [50.64, 39.06, 29.57, 20.16, 15.49, 12.22, 9.57],
    }
    for rows, expected in ((suspicious, True), (honest, False)):
        for clean, row in rows.items():
            assert plateau(eps, [a / 100 for a in row], clean / 100) is expected
    assert not plateau([0.1], [0.5], 0.9) and not plateau([0.0], [0.9], 0.9) and not plateau([], [], 0.9)
    assert not plateau([0.1, 0.2], [0.9, 0.89], 0.91)  # has not fallen yet
