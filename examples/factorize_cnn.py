"""A CNN on scikit-learn's digits: trained dense, made low-rank by a budget of FLOPs and trained further under
kappa(S) <= 1.5, then dense again for code that knows no low-rank layers."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import condlr_ext


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 96, 3, 2, padding=1, bias=False), nn.BatchNorm2d(96), nn.ReLU(),
        nn.Conv2d(96, 96, 3, padding=1, groups=2, bias=False), nn.BatchNorm2d(96), nn.ReLU(),
        nn.Flatten(), nn.Linear(96 * 16, 10),
    )  # fmt: skip


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x, y, epochs: int) -> None:
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()


def accuracy(model: nn.Module, x, y) -> float:
    with torch.no_grad():
        return (model.eval()(x).argmax(1) == y).float().mean().item()


torch.manual_seed(0)
digits = load_digits()
x, y = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(digits.target)
order = torch.randperm(len(x))
x, y, x_test, y_test = x[order[:1300]], y[order[:1300]], x[order[1300:]], y[order[1300:]]

model = cnn()
train(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), x, y, epochs=2)
print(f"dense: accuracy {accuracy(model, x_test, y_test):.3f}\n")

# what factorize would do, with first layer and classifier left dense; without dry_run=True the same call does it
options = dict(budget=0.25, measure="flops", example_input=x[:64], exclude=["0", "10"])
model.train()
print(condlr_ext.factorize(model, **options, dry_run=True), "\n")

condlr_ext.factorize(model, **options)
optimizer = condlr_ext.optim.CondLRSGD(model, lr=0.05, momentum=0.9, tau=0.5)
train(model, optimizer, x, y, epochs=2)
low_rank = accuracy(model, x_test, y_test)
print(f"low-rank: accuracy {low_rank:.3f}, kappa at most {max(condlr_ext.condition_numbers(model).values()):.6f}")

condlr_ext.to_dense(model)
print(f"dense again: accuracy {accuracy(model, x_test, y_test):.3f}, classes {type(model[3]).__name__} and so on")
