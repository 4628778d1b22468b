"""Mixed and low precision: autocast over float32 parameters, with a GradScaler for float16, and parameters that are
themselves bfloat16. The step and the bound on kappa are in float32 in all of them.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import condlr_ext
from condlr_ext.nn import LowRankLayer

bunch = load_digits()
x, y = torch.tensor(bunch.data / 16, dtype=torch.float32), torch.tensor(bunch.target)


def train(parameters=torch.float32, autocast=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    condlr_ext.factorize(model, budget=0.3, exclude="4")
    model.to(parameters)
    optimizer = condlr_ext.optim.CondLRSGD(model, lr=0.2, momentum=0.5, tau=0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=autocast == torch.float16)
    for index in torch.cat([torch.randperm(1280) for _ in range(8)]).split(64):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            loss = F.cross_entropy(model(x[index].to(parameters)), y[index])
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    accuracy = (model(x[1280:].to(parameters)).argmax(1) == y[1280:]).float().mean().item()
    # the optimizer steps the factors, or their float32 masters in its state
    cores = [m.S for m in model.modules() if isinstance(m, LowRankLayer)]
    kappa = max(condlr_ext.linalg.cond(optimizer.state[S].get("master", S).double()).item() for S in cores)
    return accuracy, kappa, max(condlr_ext.condition_numbers(model).values())


print(f"{'parameters':<14} {'autocast':<14} {'accuracy':>8} {'kappa':>9} {'as stored':>9}")
for options in (
    {},
    {"autocast": torch.bfloat16},
    {"autocast": torch.float16},
    {"parameters": torch.bfloat16},
    {"parameters": torch.float64},
):
    accuracy, kappa, stored = train(**options)
    names = [str(options.get(key, default)) for key, default in (("parameters", torch.float32), ("autocast", "off"))]
    print(f"{names[0]:<14} {names[1]:<14} {accuracy:>8.1%} {kappa:>9.6f} {stored:>9.6f}")
