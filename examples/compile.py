"""torch.compile of a low-rank network in training: one graph, compiled once for the first batch size and once for all
others. Inductor, the default backend, needs a C++ compiler.
"""

import time

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import condlr_ext

bunch = load_digits()
x, y = torch.tensor(bunch.data / 16, dtype=torch.float32), torch.tensor(bunch.target)

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
condlr_ext.factorize(model, budget=0.3, exclude="4")
optimizer = condlr_ext.optim.CondLRSGD(model, lr=0.2, momentum=0.5, tau=0.1)
compiled = torch.compile(model, fullgraph=True)  # fullgraph: an error where the graph would break

for epoch in range(4):
    start = time.perf_counter()
    for index in torch.randperm(len(x)).split(128):  # the last batch of an epoch has 5 samples
        optimizer.zero_grad()
        loss = F.cross_entropy(compiled(x[index]), y[index])
        loss.backward()
        optimizer.step()  # not compiled: one call of a compiled kernel for all layers
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    seconds = time.perf_counter() - start
    print(f"epoch {epoch}: loss {loss.item():.3f}, {seconds:.2f} s, {graphs} graphs compiled so far")

print("kappa", {name: round(kappa, 4) for name, kappa in condlr_ext.condition_numbers(model).items()})
