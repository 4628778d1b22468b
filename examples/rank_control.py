"""Learned ranks: an MLP on digits starts at 14 % rank in every layer, then rank moves between layers under a budget.

Compared with the same start at fixed ranks and with factorize(budget=...), which spends evenly.
"""

import time

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import condlr_ext
from condlr_ext.optim import CondLRSGD, RankController

torch.set_num_threads(1)
digits = load_digits()
x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
train, test = order[:1257], order[1257:]
batches = train[:1024].split(256)  # batches that the controller measures on


def loss(batch):
    return F.cross_entropy(model(x[batch]), y[batch])


def accuracy(inputs):
    return (model(inputs).argmax(1) == y[test]).float().mean().item()


rows = []
for name, options in {
    "rank 0.14, left alone": {"rank": 0.14},
    "rank 0.14, adapted": {"rank": 0.14},
    "budget 0.27, left alone": {"budget": 0.27},
}.items():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    condlr_ext.factorize(model, exclude="4", init="random", **options)
    optimizer = CondLRSGD(model, lr=0.2, momentum=0.3, tau=0.1)  # kappa(S) <= 1.1
    controller = RankController(model, optimizer, max_rank=0.6, budget=0.27) if name.endswith("adapted") else None
    start, changes = time.perf_counter(), []
    for epoch in range(24):
        for batch in train[torch.randperm(len(train))].split(32):
            optimizer.zero_grad()
            loss(batch).backward()
            optimizer.step()
        if controller and epoch < 16:
            report = controller.update(loss, batches)
            changes.append(report.change)
            if epoch % 5 == 0:
                print(f"after epoch {epoch}:\n{report}\n")
    condlr_ext.compact(model, optimizer)  # really smaller now
    robust = accuracy(condlr_ext.attacks.fgsm(model, x[test], y[test], 0.1))
    kappa = max(condlr_ext.condition_numbers(model).values())
    ranks = [layer.rank for layer in model if isinstance(layer, condlr_ext.LowRankLinear)]
    size = sum(p.numel() for p in model.parameters())
    rows.append((name, ranks, size, accuracy(x[test]), robust, kappa, time.perf_counter() - start))
    if changes:
        print(f"change of the loss at the {len(changes)} adaptations: {min(changes):+.3f} to {max(changes):+.3f}\n")

print(f"{'':<24} {'ranks':>10} {'parameters':>10} {'clean':>7} {'FGSM 0.1':>9} {'max kappa':>10} {'seconds':>8}")
for name, ranks, size, clean, robust, kappa, seconds in rows:
    print(f"{name:<24} {ranks!s:>10} {size:>10} {clean:>7.1%} {robust:>9.1%} {kappa:>10.6f} {seconds:>8.1f}")
