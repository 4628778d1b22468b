"""Reads low-rank factors in the layouts of other packages into one small network, and puts them under the bound."""

import torch
from torch import nn

import condlr_ext
from condlr_ext.io import importers

torch.manual_seed(0)
m, n, r = 32, 48, 6
left, core, right, bias = torch.randn(m, r), torch.randn(r, r), torch.randn(n, r), torch.randn(m)
x = torch.randn(5, n)
expected = x @ right @ core.T @ left.T + bias  # W = left core rightᵀ

# the same layer in the state_dict layouts of five packages; left and right are far from orthonormal
spare = torch.randn(3, r + 3)  # RobustDLRT and GeoLoRA keep spare columns for higher ranks
padded = {"U": torch.cat([right, torch.randn(n, 3)], 1), "V": torch.cat([left, torch.randn(m, 3)], 1)}
padded["S"] = torch.cat([torch.cat([core.T, torch.randn(r, 3)], 1), spare])
frozen = {"original_linear.weight": torch.zeros(m, n), "original_linear.bias": bias, "Sinv": torch.eye(r + 3)}
layouts = {
    "CondLR": (importers.condlr, {"U": left, "S_hat": core, "V": right, "bias": bias}, {}),
    "RobustDLRT": (importers.robust_dlrt, {**padded, "bias": bias, "r": r}, {}),
    "OIALR": (importers.oialr, {"u": right, "s": core.T, "vh": left.T, "bias": bias}, {}),  # m < n: the transpose
    "GeoLoRA": (
        importers.geolora,
        {f"lora_{k}": v for k, v in padded.items()} | frozen,
        {"rank": r, "alpha": float(r)},
    ),
    "PoLAR": (
        importers.polar,
        {"lora_A.weight": right.T, "lora_S.weight": core, "lora_B.weight": left},
        {"alpha": float(r)},
    ),
}
for name, (importer, tensors, options) in layouts.items():
    model = nn.Sequential(nn.Linear(n, m))
    nn.init.zeros_(model[0].weight)  # PoLAR's file has only the change, so the base is zero here
    model[0].bias.data.copy_(bias)
    importer({f"0.{key}": value for key, value in tensors.items()}, model, **options)
    layer = type(model[0]).__name__
    print(f"{name:<10} {layer:<15} rank {model[0].rank}, off by {(model(x) - expected).abs().max():.0e}", end=", ")
    kappa = next(iter(condlr_ext.condition_numbers(model).values()))
    condlr_ext.optim.CondLRSGD(model, lr=0.1, tau=0.5)  # puts the core in its band
    print(f"kappa {kappa:.1f} -> {next(iter(condlr_ext.condition_numbers(model).values())):.3f}")

try:
    importers.condlr(
        {"0.U": left, "0.S_hat": core, "0.V": right, "0.step": torch.ones(1)}, nn.Sequential(nn.Linear(n, m))
    )
except ValueError as error:
    print(error)
