"""A frozen network fine-tuned on rotated digits with adapters of bounded condition number, exported as LoRA."""

import copy
import json
import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

import condlr_ext

torch.manual_seed(0)
x, y = map(torch.from_numpy, load_digits(return_X_y=True))
x = (x / 16).float()
turned = x.view(-1, 8, 8).rot90(1, (1, 2)).reshape(-1, 64)
train, test = torch.randperm(len(x)).tensor_split([1200])


def fit(model, optimizer, x, epochs):
    for _ in range(epochs):
        for index in train[torch.randperm(len(train))].split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()


def accuracy(model, x):
    with torch.no_grad():
        return f"{(model(x[test]).argmax(1) == y[test]).float().mean():.1%}"


base = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
fit(base, torch.optim.SGD(base.parameters(), lr=0.2, momentum=0.9), x, 10)
print(f"base network: {accuracy(base, x)} upright, {accuracy(base, turned)} turned by 90 degrees")

model = copy.deepcopy(base)
condlr_ext.add_adapters(model, rank=8, scale=1.0)  # delta W = U S Vᵀ on every layer; the rest is frozen
trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
print(
    f"adapters: {trained} of {sum(p.numel() for p in base.parameters())} parameters, same function at the start:",
    end=" ",
)
print(f"{(model(x) - base(x)).abs().max():.0e} apart")
fit(model, condlr_ext.optim.CondLRSGD(model, lr=0.1, momentum=0.5, tau=0.5), turned, 15)
kappa = condlr_ext.condition_numbers(model)
print(f"fine-tuned: {accuracy(model, turned)} turned; kappa {', '.join(f'{k:.3f}' for k in kappa.values())}")

folder = Path(tempfile.mkdtemp())
condlr_ext.save_lora(model, folder)  # B = U S, A = Vᵀ: any reader of PEFT's files can load it
config = json.loads((folder / "adapter_config.json").read_text())
print(f"LoRA files: {[p.name for p in sorted(folder.iterdir())]}, r {config['r']}, lora_alpha {config['lora_alpha']}")
again = copy.deepcopy(base)
condlr_ext.load_lora(again, folder)
print(f"read back: {(again(turned) - model(turned)).abs().max():.0e} apart")

before = model[0].layer.weight.clone()
for adapter in (model[0], model[2], model[4]):
    adapter.merge()
print(f"merged: {accuracy(model.eval(), turned)} turned", end="; ")
for adapter in (model[0], model[2], model[4]):
    adapter.unmerge()
print(f"unmerged, frozen weights as before bit for bit: {torch.equal(before, model[0].layer.weight)}")
condlr_ext.merge_adapters(model)
print(f"an ordinary network again, {type(model[0]).__name__}: {accuracy(model, turned)} turned")
