"""Attacks on a CondLR network trained on digits, and what the masking guard reports when its logits are multiplied by
1000: FGSM and PGD on the cross-entropy call that network robust, the worst case does not."""

from collections import OrderedDict
from functools import partial

import torch
from sklearn.datasets import load_digits
from torch import nn

import condlr_ext
from condlr_ext import attacks
from condlr_ext.robustness import evaluate


class Loud(nn.Module):
    """Logits times 1000: the same decisions, but softmax saturates and its gradient is rounding noise."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return 1000 * self.model(x)


def accuracy(model, x, y):
    with torch.no_grad():
        return 100 * (model(x).argmax(1) == y).double().mean().item()


torch.manual_seed(0)
torch.set_num_threads(1)
data = load_digits()
order = torch.randperm(len(data.target))
images, labels = (torch.tensor(data.images, dtype=torch.float32)[:, None] / 16)[order], torch.tensor(data.target)[order]
train, test = slice(0, 1257), slice(1257, None)

layers = [
    ("flatten", nn.Flatten()), ("fc1", nn.Linear(64, 256)), ("relu1", nn.ReLU()), ("fc2", nn.Linear(256, 256)),
    ("relu2", nn.ReLU()), ("head", nn.Linear(256, 10)),
]  # fmt: skip
model = nn.Sequential(OrderedDict(layers))
condlr_ext.factorize(model, budget=0.3, exclude="head")
optimizer = condlr_ext.optim.CondLRSGD(model, lr=0.2, momentum=0.3, tau=0.1)
for _ in range(20):
    for batch in torch.randperm(1257).split(32):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[train][batch]), labels[train][batch]).backward()
        optimizer.step()

x, y = images[test], labels[test]
print(f"clean accuracy {accuracy(model, x, y):.1f} %\n")

print("l2 attacks of budget 0.5: accuracy left, and mean size of the perturbations (rank: the largest)")
rows = {"FGSM, one step": attacks.fgsm(model, x, y, 0.5, norm="l2"), "PGD": attacks.pgd(model, x, y, 0.5, norm="l2")}
rows["APGD-CE"] = attacks.apgd(model, x, y, 0.5, norm="l2")
rows["APGD-DLR, targeted"] = attacks.apgd(model, x, y, 0.5, norm="l2", loss="dlr-targeted", steps=30, targets=3)
for rank in (1, 2, 4):
    lora = partial(attacks.low_rank_pgd, model, x, y, 0.5, rank, init="warm")
    rows |= {f"LoRa-PGD, rank {rank}": lora(), f"LoRa-PGD, exactly rank {rank}": lora(exact=True)}
rows["LoRa-PGD, nuclear norm"] = attacks.low_rank_pgd(model, x, y, 0.5, 4, norm="nuc", exact=True)
for name, adversarial in rows.items():
    report = attacks.perturbation_report(x, adversarial)
    sizes = "  ".join(f"{key} {report[key].mean():.3f}" for key in ("l2", "linf", "nuc"))
    print(f"{name:<28}{accuracy(model, adversarial, y):5.1f} %  {sizes}  rank {report['rank'].max()}")

for title, network in (("The network itself", model), ("The same with loud logits", Loud(model))):
    print(f"\n{title}:\n{evaluate(network, x, y, [0.05, 0.1, 0.2], steps=20, restarts=1)}")
