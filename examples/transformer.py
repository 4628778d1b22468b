"""nn.TransformerEncoder, its attention included, under kappa(S) <= 1.2: rows of scikit-learn's digits as a sequence."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import condlr_ext
from condlr_ext import Energy

torch.manual_seed(0)
digits = load_digits()
x, y = torch.tensor(digits.images, dtype=torch.float32) / 16, torch.tensor(digits.target)
order = torch.randperm(len(x))
x, y, x_test, y_test = x[order[:1300]], y[order[:1300]], x[order[1300:]], y[order[1300:]]

layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
model = nn.Sequential(nn.Linear(8, 64), nn.TransformerEncoder(layer, 2), nn.Flatten(), nn.Linear(8 * 64, 10))
print("ranks that hold 90 % of the energy of the fresh weights, whose spectra are flat:")
print(condlr_ext.factorize(model, rank=Energy(0.9), exclude=["0", "3"], dry_run=True), "\n")

# random factors at the scale of the dense weights; an attention has in_proj (queries, keys, values) and out_proj
print(condlr_ext.factorize(model, budget=0.3, exclude=["0", "3"], init="random", example_input=x[:64]), "\n")
optimizer = condlr_ext.optim.CondLRSGD(model, lr=0.03, momentum=0.9, tau=0.2)
for _ in range(10):
    for batch in torch.randperm(len(x)).split(64):
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()

kappa = max(condlr_ext.condition_numbers(model).values())
model.eval()
with torch.no_grad():  # the encoder layers take torch's fused kernel, which reads linear1.weight and the like
    fused = model(x_test)
modules = model(x_test).detach()  # with gradients they run module by module, the projections as thin products
accuracy = (fused.argmax(1) == y_test).float().mean()
print(f"accuracy {accuracy:.3f}, kappa at most {kappa:.6f}")
print(f"fused kernel against modules: {(fused - modules).abs().max():.1e}")

condlr_ext.to_dense(model)
attention = model[1].layers[0].self_attn
print(f"dense again: {type(attention).__name__}, difference {(model(x_test) - modules).abs().max():.1e}")
