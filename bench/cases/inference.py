"""Inference with whole networks: the factorized model, folded (condlr_ext.fold), and merged.

A provider is right if its outputs have at most twice the error of plain PyTorch in the same arithmetic, against plain
layers in float64. bf16: weights and inputs of that dtype.
"""

import copy
from collections.abc import Callable
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from condlr_ext import fold, to_dense

from ..machine import DTYPES
from ..registry import DENSE, OURS, SAME, Operation, Provider, TimedCall
from .baselines import plain_twin
from .network_setup import identity, relative_error, setup
from .networks import BLOCKS, CLASSIC, MLP_BLOCKS, SMALL, NetworkRank, at
from .training import is_headline

MIN_LIMIT = {"fp32": 1e-5, "tf32": 1e-3, "bf16": 1e-2, "fp64": 1e-13}  # of errors: a few roundings
MAX_LIMIT = {"fp32": 1e-4, "tf32": 1e-2, "bf16": 0.3, "fp64": 1e-11}  # whatever the error of plain PyTorch


class InferenceProblem:
    """Inference with one network; "merged" is the dense network with the weights W = U S Vᵀ."""

    def __init__(self, shape: NetworkRank, dtype: str, device):
        self._setup, self._rank, self._dtype, self._device = setup(shape.network), shape.rank, dtype, device
        ranks = self._setup.ranks(shape.rank)
        inference = partial(self._setup.cost.inference, size=DTYPES[dtype].itemsize)
        self.work, dense = {"call": inference(ranks)}, {"call": inference({})}
        self.providers = {
            "ours": partial(self._provider, identity, OURS),
            "ours compiled": partial(self._provider, torch.compile, OURS),
            "folded": partial(self._provider, fold, SAME),
            "folded compiled": partial(self._provider, lambda model: torch.compile(fold(model)), SAME),
            "merged": partial(self._provider, to_dense, DENSE, dense),
            "merged compiled": partial(self._provider, lambda model: torch.compile(to_dense(model)), DENSE, dense),
        }

    @cached_property
    def _model(self) -> nn.Module:
        """Return the model in eval mode, with batch norm statistics of the batch.

        With the initial statistics the outputs of networks without biases are almost zero.
        """
        model = self._setup.model(self._rank)
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.momentum = 1.0
        with torch.no_grad():
            model(self._setup.batches[0][0])
        return model.eval()

    @cached_property
    def _x(self) -> Tensor:
        return self._setup.batches[0][0].detach().to(self._device.device, DTYPES[self._dtype])

    @cached_property
    def _exact(self) -> Tensor:
        return run(plain_twin(self._model).to(self._device.device, torch.float64), self._x.double())

    @cached_property
    def _limits(self) -> dict[str, float]:
        """Return twice the error of plain PyTorch."""
        plain = plain_twin(self._model).to(self._device.device, DTYPES[self._dtype])
        found = self._errors(run(plain, self._x))["outputs"]
        return {"outputs": min(max(2 * found, MIN_LIMIT[self._dtype]), MAX_LIMIT[self._dtype])}

    def _errors(self, outputs: Tensor) -> dict[str, float]:
        return {"outputs": relative_error({"": outputs}, {"": self._exact})}

    def _provider(self, transform: Callable, role: str, work=None) -> Provider:
        model = copy.deepcopy(self._model)
        for p in model.parameters():
            p.requires_grad_(False)
        model.to(torch.promote_types(DTYPES[self._dtype], torch.float32))  # products of weights are rounded once
        model = transform(model).to(self._device.device, DTYPES[self._dtype], memory_format=torch.channels_last)
        return Provider({"call": TimedCall(partial(run, model, self._x), self._errors)}, self._limits, role, work)


@torch.inference_mode()
def run(model: Callable, x: Tensor) -> Tensor:
    return model(x)


def shapes(size: str, device) -> list[NetworkRank]:
    if size == "smoke":
        return SMALL
    more = MLP_BLOCKS if size == "full" or device.kind == "cuda" else ()
    return at(("digits MLP", *CLASSIC, *BLOCKS, *more))


OPERATIONS = (
    Operation(
        "inference", "networks in eval mode: factorized, U S folded, merged to dense weights", InferenceProblem, shapes,
        supported=tuple(MIN_LIMIT), headline=is_headline,
    ),
)  # fmt: skip
