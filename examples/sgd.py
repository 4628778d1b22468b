"""Two lines in an existing training script: factorize, and CondLRSGD instead of torch.optim.SGD."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import condlr_ext

torch.manual_seed(0)
x, y = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
x = x.float() / 16
order = torch.randperm(len(x))
train, test = order[:1400], order[1400:]

model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
report = condlr_ext.factorize(model, budget=0.3, exclude="4")  # the first line
optimizer = condlr_ext.optim.CondLRSGD(model, lr=0.1, momentum=0.9, tau=0.1)  # the second
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 15)
print(report)

for _ in range(15):
    for batch in train[torch.randperm(len(train))].split(32):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[batch]), y[batch])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
    schedule.step()

accuracy = (model(x[test]).argmax(1) == y[test]).float().mean()
kappa = max(condlr_ext.condition_numbers(model).values())
print(f"test accuracy {accuracy:.1%}, largest condition number {kappa:.4f} (bound 1.1)")
