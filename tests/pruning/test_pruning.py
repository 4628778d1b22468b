"""Masks and gates, alone, together and in the pipeline of TSCNC on digits."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers.classifiers import image_batch, image_network
from helpers.digits import shuffled_batches, shuffled_digits
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import condlr_ext
from condlr_ext import pruning, regularizers
from condlr_ext.pruning import (
    HardConcreteGate,
    add_gates,
    add_masks,
    freeze_masks,
    kept_shares,
    make_permanent,
    top_k_mask,
)
from condlr_ext.robustness import evaluate, kl_pgd, trades_loss, train_epoch


def test_top_k_mask_keeps_exactly_k_and_passes_the_gradient_through():
    scores = torch.tensor([[3.0, 1.0, 1.0], [0.5, 1.0, 2.0]], requires_grad=True)
    for k in range(7):
        assert top_k_mask(scores, k).sum() == k  # also where scores are equal
    assert torch.equal(top_k_mask(scores, 2), torch.tensor([[1.0, 0, 0], [0, 0, 1]]))
    grad = torch.randn(2, 3)
    top_k_mask(scores, 2).backward(grad)
    assert torch.equal(scores.grad, grad)
    assert torch.equal(top_k_mask(scores.detach().T, 2), top_k_mask(scores.detach(), 2).T)
    with pytest.raises(ValueError, match=r"k must be in 0..6, got 7"):
        top_k_mask(scores, 7)


def test_masks_start_as_magnitude_pruning_and_search_trains_scores_alone():
    model = image_network()
    weights = {name: model.get_submodule(name).weight.detach().clone() for name in ("0", "4")}
    assert add_masks(model, 0.25, exclude="6") == ["0", "4"]
    assert kept_shares(model) == {"0": 0.25, "4": 0.25, "6": 1.0}
    for name, weight in weights.items():
        now, kept = model.get_submodule(name).weight, weight.numel() // 4
        smallest_kept = weight.abs().flatten().sort(descending=True).values[kept - 1]
        assert torch.equal(now, torch.where(weight.abs() >= smallest_kept, weight, 0))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {"0.parametrizations.weight.0.scores", "6.weight", "4.bias"} <= trained
    assert "0.parametrizations.weight.original" not in trained
    x, y = image_batch()
    before = model[4].weight.detach() != 0
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=5.0)
    train_epoch(model, [(x, y)] * 5, optimizer, lambda m, x, y: F.cross_entropy(m(x), y))
    assert ((model[4].weight != 0) != before).any()  # the search moved the mask, whose size stays
    assert kept_shares(model)["4"] == 0.25
    assert torch.equal(model[4].parametrizations.weight.original, weights["4"])

    freeze_masks(model)
    mask = model[4].weight.detach() != 0
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    train_epoch(model, [(x, y)] * 5, optimizer, lambda m, x, y: F.cross_entropy(m(x), y))
    assert torch.equal(model[4].weight != 0, mask)
    assert not torch.equal(model[4].weight, weights["4"] * mask)

    model.eval()
    expected, weight = model(x), model[4].weight.detach().clone()
    assert make_permanent(model) == ["0", "4"]
    assert torch.equal(model(x), expected) and torch.equal(model[4].weight, weight)
    assert type(model[4]) is nn.Linear and model[4].weight.requires_grad
    assert set(model.state_dict()) == set(image_network().state_dict())
    assert kept_shares(model, exclude="6") == {"0": 0.25, "4": 0.25}


def test_score_gradient_is_the_weight_times_the_gradient_of_the_masked_one():
    layer = nn.Linear(4, 3).double()
    add_masks(layer, 0.5)
    x = torch.randn(6, 4, dtype=torch.float64)
    layer(x).square().sum().backward()
    mask, W = layer.parametrizations.weight[0], layer.parametrizations.weight.original
    masked = layer.weight.detach().requires_grad_()
    F.linear(x, masked, layer.bias).square().sum().backward()
    torch.testing.assert_close(mask.scores.grad, masked.grad * W * mask.scores.sign())


def test_gates_follow_the_hard_concrete_distribution():
    torch.manual_seed(1)
    gate = HardConcreteGate(4)
    gate.log_alpha.data = torch.tensor([-3.0, -0.5, 0.847, 3.0])
    assert HardConcreteGate(1).log_alpha.item() == pytest.approx(math.log(0.7 / 0.3))
    draws = torch.stack([gate(torch.ones(4, 1))[:, 0] for _ in range(4000)])
    p = gate.open_probability()
    assert ((draws >= 0) & (draws <= 1)).all()
    # 5 standard deviations of a share of 4000
    assert ((draws > 0).float().mean(0) - p).abs().le(5 * (p * (1 - p) / 4000).sqrt() + 1e-9).all()
    assert 0 < p[0] < p[3] < 1
    gate.eval()
    z = gate(torch.ones(4, 1))[:, 0]
    torch.testing.assert_close(z, (torch.sigmoid(gate.log_alpha) * 1.2 - 0.1).clamp(0, 1))
    assert torch.equal(gate(torch.ones(4, 1))[:, 0], z)


def test_gate_parameters_are_bounded_and_come_back():
    gate = HardConcreteGate(3)
    gate.log_alpha.data = torch.tensor([9.0, -9.0, 0.0])
    limit = 1 / (1 + math.exp(-(math.log(1e2) - 2 / 3 * math.log(0.1 / 1.1))))
    assert gate.open_probability()[0].item() == pytest.approx(limit, rel=1e-6)
    gate.open_probability().sum().backward()  # descent lowers all
    assert gate.log_alpha.grad[0] > 0 and gate.log_alpha.grad[1] == 0 and gate.log_alpha.grad[2] > 0
    gate.log_alpha.grad = None
    (-gate.open_probability()).sum().backward()
    assert gate.log_alpha.grad[0] == 0 and gate.log_alpha.grad[1] < 0


def test_gates_and_masks_together_become_plain_weights():
    model = image_network()
    assert add_gates(model, exclude=["6"]) == ["0", "4"]
    model[4].parametrizations.weight[0].log_alpha.data[:3] = -4.0  # closed in eval mode
    add_masks(model, 0.5, exclude=["0", "6"])
    assert [type(m).__name__ for m in model[4].parametrizations.weight] == ["HardConcreteGate", "TopKMask"]
    x, _ = image_batch()
    model.eval()
    expected = model(x)
    shares = kept_shares(model)
    assert shares["4"] < 0.5 and not model[4].weight[:3].any()
    model.train()
    assert kept_shares(model) == shares and model[4].parametrizations.weight[0].training
    clone = copy.deepcopy(model)
    clone.load_state_dict(model.state_dict())
    make_permanent(model)
    model.eval()
    assert torch.equal(model(x), expected) and not parametrize.is_parametrized(model[0])
    assert torch.equal(clone.eval()(x), expected)


def test_low_rank_layers_are_left_alone():
    model = image_network()
    condlr_ext.factorize(model, rank={"4": 4})
    assert add_masks(model, 0.5) == ["0", "6"]
    assert isinstance(model[4], condlr_ext.LowRankLinear)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: add_masks(m, 0), r"add_masks: keep must be a number in \(0, 1\], got 0"),
        (lambda m: add_masks(m, 0.5, exclude="head"), "exclude 'head' matches nothing"),
        (lambda m: [add_masks(m, 0.5), add_masks(m, 0.5)], "0 has a mask already; make_permanent first"),
        (lambda m: [add_gates(m), add_gates(m)], "add_gates: the weight of 0 must not be parametrized"),
        (lambda m: add_masks(tied(m), 0.5), "add_masks: the weight of 4 must be its own, got one shared by 4.weight, 7.weight"),
        (lambda m: add_gates(tied(m)), "add_gates: the weight of 4 must be its own, got one shared by"),
        (lambda m: [parametrizations.weight_norm(m[4]), add_masks(m, 0.5)], "add_masks: the weight of 4 must be one tensor, got"),
        (freeze_masks, "freeze_masks: the model must have masks"),
        (make_permanent, "make_permanent: the model must have masks or gates, got none"),
        (lambda m: add_gates(m, closed=1), r"closed must be a number in \(0, 1\), got 1"),
        (lambda m: add_gates(nn.ReLU()), "add_gates: the model must have a layer to act on"),
    ],
)  # fmt: skip
def test_bad_arguments_of_pruning(call, message):
    model = image_network()
    with pytest.raises(ValueError, match=message):
        call(model)


def tied(model):
    layer = nn.Linear(64, 8)
    layer.weight = model[4].weight
    return model.append(layer)


def test_a_refused_model_is_unchanged():
    model = image_network()
    parametrizations.weight_norm(model[4])
    with pytest.raises(ValueError, match="add_masks: the weight of 4"):
        add_masks(model, 0.5)
    assert not parametrize.is_parametrized(model[0])


def test_weights_that_did_not_train_do_not_train_afterwards():
    for prune in (lambda m: (add_masks(m, 0.5), freeze_masks(m)), lambda m: add_masks(m, 0.5), add_gates):
        model = image_network()
        model[0].weight.requires_grad_(False)
        prune(model)
        make_permanent(model)
        assert [model[i].weight.requires_grad for i in (0, 4, 6)] == [False, True, True]


@pytest.fixture(scope="module")
def digits():
    x, y = shuffled_digits()
    return x[:1200], y[:1200], x[1200:], y[1200:]


def test_tscnc_pipeline_on_digits(digits):
    """TRADES with both penalties and gates, then a search for masks under TRADES, then fine-tuning."""
    x, y, x_test, y_test = digits
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    loss = partial(trades_loss, attack=partial(kl_pgd, eps=0.1, steps=4), beta=2.0)
    add_gates(model, exclude=["0", "4"])

    def penalty(model):
        return regularizers.tsc(model, exclude=["0", "4"]) / len(x) + 0.01 * regularizers.cnc(model[4].weight)

    def train(epochs, lr):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr, momentum=0.9)
        return [train_epoch(model, shuffled_batches(x, y), optimizer, loss, penalty) for _ in range(epochs)]

    losses = train(8, 0.1)
    assert losses[-1] < losses[0] / 2
    kappa = condlr_ext.linalg.cond(model[4].weight)
    assert kappa < 2
    add_masks(model, 0.3, exclude="4")
    train(3, 0.1)
    freeze_masks(model)
    train(4, 0.05)
    make_permanent(model)
    assert all(share <= 0.3 + 1e-3 for share in kept_shares(model, exclude="4").values())
    result = evaluate(model, x_test, y_test, [0.05], steps=10, restarts=1)
    assert result["clean"] > 0.85 and result["worst"][0] > 0.7


def test_exports():
    assert condlr_ext.pruning is pruning
