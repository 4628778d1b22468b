"""CondLRAdamW on a small vision transformer: warm-up, cosine decay, a bound that starts after the warm-up."""

import math

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import condlr_ext

torch.manual_seed(0)
images, y = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
x = F.unfold(images.float().view(-1, 1, 8, 8) / 8 - 1, 2, stride=2).mT  # patches of 2 x 2: [N, 16, 4]
order = torch.randperm(len(x))
train, test = order[:1400], order[1400:]

layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True, norm_first=True)
encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
model = nn.Sequential(nn.Linear(4, 64), encoder, nn.Flatten(), nn.Linear(16 * 64, 10))
condlr_ext.factorize(model, budget=0.5, include="1.layers.*.linear?")
groups = condlr_ext.optim.param_groups(model, cores={"tau": math.inf}, factors={"lr": 3e-3})
optimizer = condlr_ext.optim.CondLRAdamW(groups, lr=3e-3, weight_decay=0.05, tau=0.2)
cores = next(group for group in optimizer.param_groups if "S" in group["roles"])

epochs, warm_up = 10, 2
schedule = torch.optim.lr_scheduler.SequentialLR(
    optimizer,
    [
        torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=warm_up),
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs - warm_up),
    ],
    milestones=[warm_up],
)
for epoch in range(epochs):
    if epoch == warm_up:
        cores["tau"] = 0.2  # a group's option like lr: holds from the next step on
    for batch in train[torch.randperm(len(train))].split(32):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[batch]), y[batch])
        loss.backward()
        optimizer.step()
    schedule.step()
    with torch.no_grad():
        accuracy = (model(x[test]).argmax(1) == y[test]).float().mean()
    kappa = max(condlr_ext.condition_numbers(model).values())
    print(
        f"epoch {epoch:>2}: loss {loss.item():.3f}, test accuracy {accuracy:.1%}, tau {cores['tau']}, kappa {kappa:.3f}"
    )
