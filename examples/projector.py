"""A Projector keeps the constraint under optimizers that know nothing of it: SGD, AdamW, and Muon with AdamW."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import condlr_ext

x, y = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
x = x.float() / 16
order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
train, test = order[:1400], order[1400:]


def muon(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Return Muon for U, S and V; it takes only matrices."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() != 2]
    return [torch.optim.Muon(matrices, lr=0.003), torch.optim.AdamW(vectors, lr=3e-3)]


def run(name: str, make, tau: float | None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    condlr_ext.factorize(model, budget=0.3, exclude="4")
    optimizers = make(model)
    if tau is not None:
        condlr_ext.optim.Projector(model, tau).attach(optimizers[0])  # the optimizer of U, S and V
    for _ in range(6):
        for batch in train[torch.randperm(len(train))].split(32):
            model.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            for optimizer in optimizers:
                optimizer.step()
    accuracy = (model(x[test]).argmax(1) == y[test]).float().mean()
    weights = (model[i].weight.detach() for i in (0, 2))
    sigma = [condlr_ext.linalg.svd(W).sigma[: model[i].rank] for W, i in zip(weights, (0, 2), strict=True)]
    kappa = max((s[0] / s[-1]).item() for s in sigma)
    print(f"{name:<8} {'free' if tau is None else f'tau {tau}':<8} accuracy {accuracy:.1%}  kappa of W {kappa:10.3f}")


for tau in (None, 0.1):
    run("SGD", lambda model: [torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9)], tau)
    run("AdamW", lambda model: [torch.optim.AdamW(model.parameters(), lr=3e-3)], tau)
    run("Muon", muon, tau)
