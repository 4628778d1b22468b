"""A Lipschitz bound, certified l2 radii beside what PGD finds, and the misalignment that a bound on kappa ignores:
|z| / |Vᵀz| of a layer's inputs z, which is smaller where V starts on their principal directions (init="pca")."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from condlr_ext import attacks, factorize
from condlr_ext.optim import CondLRSGD
from condlr_ext.robustness import certified_radius, conv_singular_values, lipschitz, misalignment

torch.set_num_threads(1)
digits = load_digits()
order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
x, y = torch.tensor(digits.images / 16, dtype=torch.float32)[order, None], torch.tensor(digits.target)[order]
x, y, x_test, y_test = x[:1300], y[:1300], x[1300:1500], y[1300:1500]


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x):
        return torch.relu(x + self.norm(self.conv(x)))


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 10))


def convnet():
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), Residual(12), nn.Flatten(), nn.Linear(192, 10)
    )


for name, build, init, constraint in (
    ("MLP, tau = inf", mlp, "svd", {"tau": torch.inf}),
    ("MLP, tau = 0.1, sigma_max = 1", mlp, "svd", {"tau": 0.1, "sigma_max": 1.0}),
    ("MLP, tau = 0.1, sigma_max = 1, principal directions", mlp, "pca", {"tau": 0.1, "sigma_max": 1.0}),
    ("residual CNN, tau = 0.1, sigma_max = 1", convnet, "svd", {"tau": 0.1, "sigma_max": 1.0}),
):
    torch.manual_seed(0)
    model = build()
    factorize(model, budget=0.4, exclude=str(len(model) - 1), init=init, example_input=x)
    optimizer = CondLRSGD(model, lr=0.1, momentum=0.5, **constraint)
    for _ in range(12):
        for index in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()
    model.eval()
    report = lipschitz(model, x_test)
    print(f"\n{name}\n{report}")
    print(f"without the Fourier transform: {lipschitz(model, x_test, circulant=False).bound:.4g}")
    radius = certified_radius(model, x_test, y_test, report)
    budgets = [0.0, 0.05, 0.1, 0.2, 0.5, 1.0]
    found = attacks.pgd(model, x_test, y_test, budgets, norm="l2", steps=10)
    for eps, attacked in zip(budgets, found, strict=True):
        survived = (model(attacked).argmax(1) == y_test).double().mean()
        print(f"  l2 budget {eps:<5} certified {(radius > eps).double().mean():6.1%}  survives PGD {survived:6.1%}")
    for layer, ratio in misalignment(model, x_test).items():
        print(f"  |z| / |Vᵀz| at layer {layer:<7} median {ratio.median():.2f}, largest {ratio.max():.2f}")

delta = torch.zeros(3, 3, 3, 3)
delta[:, :, 1, 1] = torch.eye(3)
smooth = torch.full((1, 1, 3, 3), 1 / 9)
print("\nSingular values of convolutions on an 8 x 8 ring:")
for name, weight in (("identity", delta), ("3 x 3 mean", smooth)):
    sigma = conv_singular_values(weight, 8)
    flat = torch.linalg.matrix_norm(weight.flatten(1), 2)
    print(f"  {name:<11} flattened weight {flat:.3f}, operator {sigma[0]:.3f} to {sigma[-1]:.3f}")
