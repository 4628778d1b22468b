"""What each method of a RunSpec does to a network, and with which optimizer it trains."""

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import baselines, linalg, pruning, regularizers
from ..factorize import factorize, to_dense
from ..optim import CondLRAdamW, CondLRSGD
from .config import RunSpec, TrainConfig
from .inspect_layers import TWO_FACTOR, dense_layers, low_rank_layers
from .networks import HEAD

EXCLUDED = f"*{HEAD}"  # the classifier stays dense in every run
ALIGNED = 2048  # samples that principal directions are taken from


def compress(model: nn.Module, method: str, sizing: dict | None, init: str = "svd") -> dict[str, int]:
    """Give the model its low-rank layers, in place; sizing as for factorize, and a tuple of ranks is of the hidden
    layers in turn. Returns {layer: rank}.
    """
    if sizing is None or method == "dense":
        return {}
    sizing = by_name(model, sizing)
    if method != "vanilla":
        return _ranks(factorize(model, exclude=EXCLUDED, init=init, **sizing))
    ranks = _ranks(factorize(copy.deepcopy(model).to("meta"), exclude=EXCLUDED, **sizing))
    baselines.vanilla_low_rank(model, ranks)
    return ranks


def align(model: nn.Module, sizing: dict, x: Tensor) -> None:
    """Projects each hidden weight, in place, onto the leading principal directions of its inputs for samples x."""
    factorize(model, exclude=EXCLUDED, init="pca", example_input=x[:ALIGNED], **by_name(model, sizing))
    to_dense(model)


def by_name(model: nn.Module, sizing: dict) -> dict:
    """The sizing with a tuple of ranks as a dictionary, which factorize takes."""
    ranks = sizing.get("rank")
    if not isinstance(ranks, tuple):
        return sizing
    names = list(dense_layers(model))
    if len(names) != len(ranks):
        raise ValueError(f"run: a rank for each of {len(names)} hidden layers ({', '.join(names)}), got {len(ranks)}")
    return {"rank": dict(zip(names, ranks, strict=True))}


def _ranks(report) -> dict[str, int]:
    return {layer.name: layer.rank for layer in report.layers}


def phases(spec: RunSpec, epochs: int) -> dict[int, Callable[[nn.Module], object]]:
    """{epoch: what is done to the network when so many are over}; the optimizer starts anew then."""
    if spec.method == "svd-prune":
        at = max(0, epochs - max(1, round((spec.finetune or 0.2) * epochs)))
        return {at: lambda model: compress(model, spec.method, spec.sizing)}
    if spec.method == "tscnc":
        search, rest = epochs // 2, epochs - epochs // 4
        keep = 0.27 if spec.keep is None else spec.keep
        changes = {0: lambda model: pruning.add_gates(model, exclude=_ungated(model))}
        changes[search] = lambda model: pruning.add_masks(model, keep, exclude=EXCLUDED)
        changes[rest] = pruning.freeze_masks
        if len(changes) < 3 or rest == epochs:
            raise ValueError(f"train: tscnc needs at least 4 epochs, got {epochs}")
        return changes
    return {}


def rebuild(model: nn.Module, spec: RunSpec, epochs: int, epoch: int, ranks: dict[str, int]) -> None:
    """Gives a dense network, in place, the layers it has after so many epochs; their values do not matter."""
    changes = phases(spec, epochs)
    with torch.random.fork_rng(devices=[]):
        for at, change in changes.items():
            if at < epoch:
                change(model)
        if not changes:
            compress(model, spec.method, {"rank": ranks} if ranks else None, init="random")


def finish(model: nn.Module, spec: RunSpec) -> None:
    """Takes off what is there for training only."""
    if spec.method == "tscnc":
        pruning.make_permanent(model)


def penalty(model: nn.Module, spec: RunSpec, samples: int) -> Tensor | float:
    """What is added to the loss, a mean over samples."""
    if spec.method != "tscnc":
        return 0.0
    weights = {"tsc": 1.0 if spec.tsc is None else spec.tsc, "cnc": 0.01 if spec.cnc is None else spec.cnc}
    tsc = regularizers.tsc(model, exclude=_ungated(model)) / samples
    return weights["tsc"] * tsc + weights["cnc"] * regularizers.cnc(_head(model).weight)


def _ungated(model: nn.Module) -> list[str]:
    """The first layer and the classifier, as in the released code of TSCNC."""
    return [next(iter(dense_layers(model))), EXCLUDED]


def _head(model: nn.Module) -> nn.Linear:
    return next(m for name, m in model.named_modules() if name.split(".")[-1] == HEAD)


def starts_dense(spec: RunSpec) -> bool:
    return spec.method in ("dense", "svd-prune", "tscnc")


def optimizer(model: nn.Module, spec: RunSpec, config: TrainConfig) -> Optimizer:
    """The optimizer of the method for the model as it is now."""
    rates = {name: getattr(spec, name) for name in ("lr", "momentum", "weight_decay")}
    rates = {name: getattr(config, name) if value is None else value for name, value in rates.items()}
    return _OPTIMIZERS.get(spec.method, _sgd)(model, spec, rates)


def _sgd(model: nn.Module, spec: RunSpec, rates: dict) -> Optimizer:
    made = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], **rates)
    if spec.sigma_max is not None:
        keep_below(made, model, spec.sigma_max, spec.cap or "clip")
    return made


def _condlr(model: nn.Module, spec: RunSpec, rates: dict) -> Optimizer:
    bound = {"tau": spec.tau, "sigma_max": spec.sigma_max, "band": spec.band or "rms"}
    if spec.optimizer == "adamw":
        return CondLRAdamW(model, rates["lr"], weight_decay=rates["weight_decay"], **bound)
    return CondLRSGD(model, **rates, **bound)


def _stiefel(method: type) -> Callable:
    def make(model: nn.Module, spec: RunSpec, rates: dict) -> Optimizer:
        weights = tuple(dense_layers(model)) if spec.full else ()
        return method(model, **rates, tau=math.inf if spec.tau is None else spec.tau, weights=weights)

    return make


_OPTIMIZERS = {
    "condlr": _condlr,
    "released": lambda model, spec, rates: baselines.ReleasedCondLR(model, **rates, tau=spec.tau),
    "cayley": _stiefel(baselines.CayleySGD),
    "projected": _stiefel(baselines.ProjectedSGD),
    "dlrt": lambda model, spec, rates: baselines.DLRT(model, **rates, tolerance=spec.tolerance),
    "robust-dlrt": lambda model, spec, rates: baselines.RobustDLRT(
        model, **rates, tolerance=spec.tolerance, beta=spec.beta, core_steps=spec.core_steps or 10
    ),
}


def keep_below(optimizer: Optimizer, model: nn.Module, sigma_max: float, how: str) -> None:
    """The control: after every step no hidden weight has a singular value above sigma_max.

    "clip" cuts the singular values above it (the nearest such matrix), "rescale" shrinks the whole weight. The weight
    A B of a two-factor layer is bounded by bounding each of A and B by √sigma_max.
    """

    @torch.no_grad()
    def after(*_) -> None:
        for layer in {**dense_layers(model), **low_rank_layers(model)}.values():
            parts = list(layer) if isinstance(layer, TWO_FACTOR) else [layer]
            most = sigma_max ** (1 / len(parts))
            for part in parts:
                W = part.weight.flatten(1)
                if how == "clip":
                    bounded = linalg.clip_spectrum(W, math.inf, sigma_max=most)
                else:
                    bounded = W * (most / linalg.svd(W).sigma[0]).clamp_max(1)
                part.weight.copy_(bounded.reshape(part.weight.shape))

    after()
    optimizer.register_step_post_hook(after)
