"""Effects of the penalties on spectra, and TSCNC's pipeline: TRADES with both penalties, mask search, fine-tuning.

Real digits (scikit-learn), a small MLP, a few epochs: the numbers show the mechanism, not a benchmark.
"""

from functools import partial

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from condlr_ext import condition_numbers, factorize, linalg, pruning, regularizers
from condlr_ext.optim import CondLRSGD
from condlr_ext.robustness import evaluate, kl_pgd, trades_loss, train_epoch

torch.set_num_threads(1)
torch.manual_seed(0)
digits = load_digits()
order = torch.randperm(len(digits.target))
x, y = torch.tensor(digits.data / 16, dtype=torch.float32)[order], torch.tensor(digits.target)[order]
x, y, x_test, y_test = x[:1300], y[:1300], x[1300:1500], y[1300:1500]


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 10))


def batches():
    return [(x[i], y[i]) for i in torch.randperm(len(x)).split(64)]


def plain(model, x, y):
    return cross_entropy(model(x), y)


def hidden(model):
    return regularizers.layer_matrices(model, exclude="4")


def accuracy(model):
    result = evaluate(model, x_test, y_test, [0.1], steps=10, restarts=1)
    return f"clean {result['clean']:.1%}, worst of PGD at 0.1 {result['worst'][0]:.1%}"


print("Low-rank layers of rank 24 without a bound (tau = inf), one penalty each, 6 epochs:")
penalties = {
    "none": None,
    "log_volume 0.005": lambda m: 0.005 * regularizers.log_volume(hidden(m)),
    "robust_dlrt 0.02": lambda m: 0.02 * regularizers.robust_dlrt(hidden(m)),
    "cnc 0.0005": lambda m: 0.0005 * regularizers.cnc(hidden(m)),
    "spectral_norm 0.02": lambda m: 0.02 * regularizers.spectral_norm(hidden(m)),
    "lipschitz 0.2": lambda m: 0.2 * regularizers.lipschitz(hidden(m), bound=1.0),
}
for name, penalty in penalties.items():
    model = mlp()
    factorize(model, rank=24, exclude="4")
    optimizer = CondLRSGD(model, lr=0.1, momentum=0.5, tau=torch.inf)
    for _ in range(6):
        train_epoch(model, batches(), optimizer, plain, penalty)
    kappa = ", ".join(f"{k:.2f}" for k in condition_numbers(model).values())
    sigma = ", ".join(f"{linalg.svd(S.detach()).sigma[0]:.2f}" for S in hidden(model).values())
    print(f"  {name:<20} kappa {kappa:<12} sigma_max {sigma:<12} {accuracy(model)}")

print("TSCNC's pipeline on the dense network:")
model = mlp()
pruning.add_gates(model, exclude=["0", "4"])  # the released code gates neither the first layer nor the classifier
loss = partial(trades_loss, attack=partial(kl_pgd, eps=0.1, steps=5), beta=2.0)


def tscnc(model):
    return regularizers.tsc(model, exclude=["0", "4"]) / len(x) + 0.01 * regularizers.cnc(model[4].weight)


def train(epochs, lr):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr, momentum=0.9)
    for _ in range(epochs):
        train_epoch(model, batches(), optimizer, loss, tscnc)
    kept = ", ".join(f"{share:.0%}" for share in pruning.kept_shares(model).values())
    return f"kept {kept}; classifier's kappa {linalg.cond(model[4].weight.detach()):.2f}; {accuracy(model)}"


print("  adversarial training:", train(8, 0.1))
pruning.add_masks(model, keep=0.2, exclude="4")
print("  masks searched:      ", train(3, 0.1))
pruning.freeze_masks(model)
print("  fine-tuned:          ", train(4, 0.05))
pruning.make_permanent(model)
print("  plain again:", ", ".join(type(layer).__name__ for layer in model))
