"""Training of whole networks: the forward with the loss, the backward, and the iteration of both with the step.

In a step, cores and factors of the median layer move by MOVE, other parameters by 1e-6; of a dense network the median
weight moves by MOVE. A provider is right if loss, gradients and the parameters after the first step have at most twice
the error of plain PyTorch in the same arithmetic, against plain layers in float64. bf16 runs under autocast.
"""

import copy
import statistics
from collections.abc import Callable
from functools import cache, lru_cache, partial

import torch
from torch import Tensor, nn

from condlr_ext.nn import low_rank_layers

from ..inputs import MOVE
from ..machine import DTYPES
from ..memory import memory_records
from ..registry import DENSE, OURS, SAME, Operation, Provider, TimedCall, Work
from .baselines import plain_twin
from .network_setup import (
    STILL,
    NetworkSetup,
    Training,
    dense_sgd,
    exact_step,
    fast_pytorch,
    fused_sgd,
    identity,
    mean_square,
    on,
    ours,
    relative_error,
    setup,
    smooth,
)
from .networks import BLOCKS, CLASSIC, MLP_BLOCKS, SMALL, NetworkRank, at

# least and largest limits of relative errors, whatever the error of plain PyTorch: a wrong term gives 1 through sixteen
# layers, a missing step MOVE
ERRORS = {
    "fp32": {"loss": (1e-5, 1e-4), "gradients": (1e-4, 1e-3), "parameters": (1e-5, MOVE / 3)},
    "tf32": {"loss": (1e-4, 1e-2), "gradients": (1e-2, 5e-2), "parameters": (1e-4, MOVE / 3)},
    "bf16": {"loss": (1e-2, 5e-2), "gradients": (1e-1, 5e-1), "parameters": (1e-3, MOVE / 3)},
}


class TrainProblem:
    def __init__(self, shape: NetworkRank, dtype: str, device):
        self._setup, self._rank, self._dtype, self._device = setup(shape.network), shape.rank, dtype, device
        self._limits, self._sgd = cache(self._make_limits), cache(self._fastest)
        self.work = self._work(shape.rank)
        mine = self._setup.ours(shape.rank, device)
        self.providers = {
            "ours": partial(self._provider, shape.rank, mine, OURS),
            "ours compiled": partial(self._provider, shape.rank, mine, OURS, compile=torch.compile),
            "dense": self._dense,
            "dense compiled": partial(self._dense, compile=torch.compile),
            "fast PyTorch": partial(self._provider, shape.rank, fast_pytorch, SAME, plain_twin, share=0.7),
            "reference": partial(self._provider, shape.rank, ours, SAME, name="reference", share=0.3),
        }

    def _work(self, rank: float | None) -> dict[str, list[Work]]:
        cost, ranks, size = self._setup.cost, self._setup.ranks(rank), DTYPES[self._dtype].itemsize
        work = {"forward": cost.forward(ranks, size), "backward": cost.backward(ranks, size)}
        return work | {"iteration": work["forward"] + work["backward"] + self._setup.step_work(rank)}

    def _dense(self, **options) -> Provider:
        return self._provider(None, self._sgd(), DENSE, **options)

    def _provider(self, rank, make, role, transform=None, compile=None, name=None, share=1.0) -> Provider:
        training = self._training(rank, make, transform, compile)
        calls = training.calls(lambda: self._exact(rank)[0], partial(on, name) if name else identity)
        return Provider(calls, self._limits(rank), role, self._work(rank), share)

    def _training(self, rank, make, transform=None, compile=None) -> Training:
        model = self._setup.model(rank)
        model = (transform(model) if transform else model).to(self._device.device)
        optimizer = make(model, self._exact(rank)[1])
        forward = compile(model) if compile else None
        return Training(self._setup.net, model, optimizer, self._batches(), DTYPES[self._dtype], forward)

    def _batches(self) -> list[tuple[Tensor, Tensor | None]]:
        where = self._device.device
        moved = [(x.detach().to(where), y if y is None else y.to(where)) for x, y in self._setup.batches]
        return [(x.requires_grad_(y is None), y) for x, y in moved]

    def _exact(self, rank: float | None) -> tuple[dict, dict[str, float]]:
        return exact_training(self._setup, rank, self._device.device)

    def _make_limits(self, rank: float | None) -> dict[str, float]:
        """Return twice the errors of plain PyTorch in this arithmetic."""
        make, transform = (fast_pytorch, plain_twin) if rank is not None else (dense_sgd, None)
        training = self._training(rank, make, transform)
        training.rewind()
        training.next()
        found, exact = training.found(training.iteration()), self._exact(rank)[0]
        errors = {name: relative_error(found[name], exact[name]) for name in exact}
        return {name: min(max(2 * errors[name], low), high) for name, (low, high) in ERRORS[self._dtype].items()}

    def _fastest(self) -> Callable:
        """Return torch's fused or default SGD, whichever steps this network faster here."""
        times = {}
        for make in (dense_sgd, fused_sgd):
            model = self._setup.model(None).to(self._device.device)
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            step = TimedCall(make(model, dict.fromkeys(("factors", "cores", "other"), STILL)).step, dict)
            step.run()
            times[make] = min(self._device.seconds(step, 1, cold=False) for _ in range(5))
        return min(times, key=times.get)


@lru_cache(maxsize=3)
def exact_training(setup: NetworkSetup, rank: float | None, where: torch.device) -> tuple[dict, dict[str, float]]:
    """Return loss, gradients and stepped parameters of plain layers in float64 on the first batch; learning rates."""
    source = setup.source(rank)
    model = plain_twin(source).to(where, torch.float64)
    x, y = setup.batches[0]
    x = x.detach().to(where, torch.float64).contiguous().requires_grad_(y is None)
    smooth(model, True)
    loss = setup.net.loss(model(x), y if y is None else y.to(where))
    loss.backward()
    gradients = {name: p.grad.cpu() for name, p in model.named_parameters()}
    lr = learning_rates(source, gradients)
    stepped = exact_step(copy.deepcopy(source).double(), gradients, dense_sgd if rank is None else ours, lr)
    if y is None:
        gradients["input"] = x.grad.cpu()
    return {"loss": {"loss": loss.detach().cpu()}, "gradients": gradients, "parameters": stepped}, lr


def learning_rates(model: nn.Module, gradients: dict[str, Tensor]) -> dict[str, float]:
    """Return the rates that move cores and factors of the median layer, or without any the median weight, by MOVE."""
    rates = {"factors": [], "cores": []}
    for name, layer in low_rank_layers(model).items():
        norms = {role: getattr(layer, role).detach().norm() / gradients[f"{name}.{role}"].norm() for role in "USV"}
        U, S, V = (norms[role].item() for role in "USV")
        rates["factors"] += [MOVE * mean_square(layer) * U, MOVE * mean_square(layer) * V]
        rates["cores"].append(MOVE * S)
    if not rates["cores"]:
        moved = [(p, gradients[name].norm().item()) for name, p in model.named_parameters() if p.dim() > 1]
        return {"other": statistics.median(MOVE * p.detach().norm().item() / g for p, g in moved)}
    return {role: statistics.median(values) for role, values in rates.items()} | {"other": STILL}


def shapes(size: str, device) -> list[NetworkRank]:
    if size == "smoke":
        return SMALL
    if size == "full" or device.kind == "cuda":
        return at(("digits MLP", *CLASSIC, *BLOCKS, *MLP_BLOCKS))
    return at(("digits MLP", *CLASSIC)) + at((*BLOCKS, "MLP block 1024"), (0.2,))


def is_headline(shape: NetworkRank) -> bool:
    """Return whether the network is one of the few for which a minute of compiling is spent."""
    return shape in at(("LeNet5", "ViT block"), (0.2,))


OPERATIONS = (
    Operation(
        "train", "networks in training: forward with loss, backward, and the iteration of both and the step",
        TrainProblem, shapes, ("forward", "backward", "iteration"), supported=tuple(ERRORS), headline=is_headline,
        extra=memory_records, share=3.0,
    ),
)  # fmt: skip
