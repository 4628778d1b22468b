"""CondLR and its baselines, each trained for a few epochs on scikit-learn's digits, then attacked by FGSM: accuracy,
robust accuracy, largest condition number and share of weights of the two hidden layers.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import condlr_ext
from condlr_ext import baselines

EPOCHS, EPS = 8, 0.1
HIDDEN = ("0", "2")

bunch = load_digits()
x, y = torch.tensor(bunch.data / 16, dtype=torch.float32), torch.tensor(bunch.target)
x_train, y_train, x_test, y_test = x[:1200], y[:1200], x[1200:], y[1200:]


def dense() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


def low_rank() -> nn.Module:
    model = dense()
    condlr_ext.factorize(model, budget=0.4, exclude="4")
    return model


def two_factor() -> nn.Module:
    model = low_rank()
    return baselines.vanilla_low_rank(dense(), {name: model.get_submodule(name).rank for name in HIDDEN})


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.2, momentum=0.5)


METHODS = {
    "dense": (dense, sgd),
    "two factors": (two_factor, sgd),
    "CondLR, tau 0.1": (low_rank, lambda m: condlr_ext.optim.CondLRSGD(m, 0.2, 0.5, tau=0.1)),
    "released CondLR, tau 0.1": (low_rank, lambda m: baselines.ReleasedCondLR(m, 0.2, 0.5, tau=0.1)),
    "Cayley SGD, W on Stiefel": (dense, lambda m: baselines.CayleySGD(m, 0.2, 0.5, weights=HIDDEN)),
    "projected SGD, W on Stiefel": (dense, lambda m: baselines.ProjectedSGD(m, 0.2, 0.5, weights=HIDDEN)),
    "projected SGD, U S Vᵀ, tau 0.1": (low_rank, lambda m: baselines.ProjectedSGD(m, 0.2, 0.5, tau=0.1)),
    "DLRT": (low_rank, lambda m: baselines.DLRT(m, 0.2, 0.5, tolerance=0.1)),
    "RobustDLRT": (low_rank, lambda m: baselines.RobustDLRT(m, 0.2, 0.5, beta=0.02, tolerance=0.1)),
}


def train(model, optimizer, epochs=EPOCHS):
    order = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for index in torch.randperm(len(x_train), generator=order).split(32):

            def closure(index=index):  # DLRT calls it three times, the others once
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x_train[index]), y_train[index])
                loss.backward()
                return loss

            optimizer.step(closure)
    if isinstance(optimizer, baselines.RobustDLRT):
        optimizer.truncate()  # training may have ended within a cycle


def kappa(layer) -> float:
    """Return sigma_1 / sigma_r of the layer's weight, r its rank."""
    sigma = torch.linalg.svdvals(layer.weight.detach())
    return (sigma[0] / sigma[sigma > 1e-5 * sigma[0]][-1]).item()


def report(name, model):
    x_adv = condlr_ext.attacks.fgsm(model, x_test, y_test, EPS)
    clean, robust = ((model(t).argmax(1) == y_test).float().mean().item() for t in (x_test, x_adv))
    layers = [model.get_submodule(name) for name in HIDDEN]
    worst = max(map(kappa, layers))
    stored = sum(p.numel() for layer in layers for key, p in layer.named_parameters() if not key.endswith("bias"))
    print(f"{name:<32} {clean:>6.1%} {robust:>7.1%} {worst:>9.1f} {stored / (64 * 128 + 128 * 128):>7.0%}")


print(f"{'method':<32} {'clean':>6} {f'eps {EPS}':>7} {'kappa':>9} {'weights':>7}")
for name, (build, make) in METHODS.items():
    model = build()
    train(model, make(model))
    report(name, model)
    if name == "dense":
        baselines.svd_prune(model, budget=0.4, exclude="4")
        report("  pruned by truncated SVD", model)
        train(model, torch.optim.SGD(model.parameters(), 0.05, momentum=0.5), epochs=2)
        report("  and fine-tuned", model)
