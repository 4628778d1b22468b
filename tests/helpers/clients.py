"""What every model of a client must do: train under the bound, go back, fold, and be saved."""

import copy

import torch
import torch.nn.functional as F

import condlr_ext

from .training import assert_constraint

TAU = 0.1
_operators = []  # stay defined


def import_torchvision() -> None:
    """Import torchvision, also where its compiled part is for another torch: without two operators of detection."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        _operators.append(torch.library.Library("torchvision", "FRAGMENT"))
        for name in ("nms", "qnms"):
            _operators[0].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def output(result) -> torch.Tensor:
    """The tensor of a model's result: itself, the first of several, or its logits or hidden state."""
    if isinstance(result, torch.Tensor):
        return result
    for name in ("logits", "last_hidden_state", "logits_per_image", "sample"):
        if getattr(result, name, None) is not None:
            return getattr(result, name)
    return output(result[0])


def loss_of(result) -> torch.Tensor:
    """A loss that moves every output."""
    y = output(result).float()
    return F.mse_loss(y, torch.linspace(-1, 1, y.shape[-1]).expand_as(y))


def train(model, inputs: dict, optimizer, steps: int = 3) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model(**inputs))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def check_round_trip(build, inputs: dict, path, **options):
    """Factorize, train under the bound, and come back in every way.

    Args:
        build: Makes the dense model.
        inputs: Its keyword arguments.
        path: Of a file to write.
        options: Of factorize.
    """
    model = build()
    keys = list(model.state_dict())
    condlr_ext.factorize(model, **options)
    optimizer = condlr_ext.optim.CondLRAdamW(model, lr=1e-3, tau=TAU)
    losses = train(model, inputs, optimizer)
    assert losses[-1] < losses[0] and optimizer.skipped == 0
    assert_constraint(model, TAU, atol=5e-6)  # rounding of sums over up to 1536 rows

    model.eval()
    with torch.no_grad():
        expected = output(model(**inputs))
        close = {"rtol": 0, "atol": 2e-4 * expected.abs().max().item()}  # float32 products in another order, per layer
        dense = condlr_ext.to_dense(copy.deepcopy(model))
        assert list(dense.state_dict()) == keys
        torch.testing.assert_close(output(dense(**inputs)), expected, **close)
        folded = condlr_ext.fold(copy.deepcopy(model), example_input=inputs)
        assert not condlr_ext.nn.low_rank_layers(folded)
        torch.testing.assert_close(output(folded(**inputs)), expected, **close)
        condlr_ext.save(model, path)
        again = build()
        condlr_ext.load(again, path)
        assert torch.equal(output(again.eval()(**inputs)), expected)
