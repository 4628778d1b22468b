"""Training on digits stopped and resumed from a checkpoint, bit for bit."""

import copy
import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

import condlr_ext

torch.manual_seed(0)
x, y = map(torch.from_numpy, load_digits(return_X_y=True))
x = (x / 16).float()


def network():
    return nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )


def train(model, optimizer, scheduler, epochs):
    for _ in range(epochs):
        for index in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x[index]), y[index])
            loss.backward()
            optimizer.step()
        scheduler.step()
    return loss.item()


def optimizer_of(model):
    optimizer = condlr_ext.optim.CondLRSGD(model, lr=0.2, momentum=0.5, tau=0.1)
    return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)


path = Path(tempfile.mkdtemp()) / "digits.safetensors"
model = network()
condlr_ext.factorize(model, budget=0.3, exclude="5")
optimizer, scheduler = optimizer_of(model)
train(model, optimizer, scheduler, 3)
state = {"epoch": 3, "scheduler": scheduler.state_dict(), "rng": torch.get_rng_state()}
condlr_ext.save(model, path, optimizer, extra=state)
print(f"after 3 epochs: {path.name}, {path.stat().st_size / 1024:.0f} KiB")
through = train(model, optimizer, scheduler, 3)

resumed = network()  # dense: the file has the ranks
found = condlr_ext.load(resumed, path)
print(f"ranks {found.rank}, tau {found.tau}, written by condlr_ext {found.version}")
optimizer, scheduler = optimizer_of(resumed)
state = condlr_ext.load(resumed, path, optimizer).extra
scheduler.load_state_dict(state["scheduler"])
torch.set_rng_state(state["rng"])
again = train(resumed, optimizer, scheduler, 3)
same = all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), resumed.state_dict().values(), strict=True))
print(f"after 6 epochs: loss {through:.6f} without the stop, {again:.6f} resumed; all parameters equal: {same}")

other = copy.deepcopy(resumed)
for what, attempt in (
    ("another tau", lambda: condlr_ext.load(other, path, condlr_ext.optim.CondLRSGD(other, lr=0.2, tau=0.5))),
    ("another rank", lambda: condlr_ext.load(condlr_ext.factorize(n := network(), rank=7) and n, path)),
):
    try:
        attempt()
    except ValueError as error:
        print(f"{what}: {error}")
