"""Rows of the optimiser step alone."""

import copy
import itertools
from collections.abc import Callable
from functools import cache

import torch
from networks import Network
from subjects import (
    FRACTIONS,
    MOVE,
    STILL,
    Group,
    dense_sgd,
    fast_pytorch,
    low_rank_layers,
    mean_square,
    on_reference,
    ours,
    relative_error,
    released,
    released_by_formula,
)
from timing import Case
from torch import Tensor

LIMIT = 1e-5  # relative error of the new parameters: float32 gives about 1e-7, a wrong formula about MOVE


class StepRows(Group):
    """The step of the whole network (batch norms, biases and classifier included) with prescribed gradients.

    "step": learning rates at which every factor and core moves by MOVE; "step still": 1e-6 everywhere.
    """

    def __init__(self, net: Network):
        super().__init__(net)
        self.names = {f"{kind} {net.name} {f:.0%}": (kind, f) for kind in ("step", "step still") for f in FRACTIONS}
        self.gradients = cache(self._gradients)
        self.exact = cache(self._exact)

    def rows(self, wanted: list[str]) -> dict[str, dict[str, Case]]:
        dense = {
            "dense SGD": self._case(None, "step", dense_sgd(fused=None)),
            "dense SGD fused": self._case(None, "step", dense_sgd(fused=True)),
        }
        rows = {}
        for name in wanted:
            kind, fraction = self.names[name]
            rows[name] = {
                "ours": self._case(fraction, kind, ours),
                "fast PyTorch": self._case(fraction, kind, fast_pytorch),
            }
            if kind == "step":
                rows[name]["released"] = self._case(fraction, kind, released, exact=released_by_formula, share=0.4)
                rows[name]["reference path"] = self._case(fraction, kind, ours, on_reference, share=0.4)
                rows[name] |= dense
        return rows

    def _case(
        self,
        fraction: float | None,
        kind: str,
        make: Callable,
        wrap: Callable = lambda call: call,
        exact: Callable | None = None,
        share: float = 1.0,
    ) -> Case:
        model = self.subject(fraction)
        step = wrap(make(model, learning_rates(kind)).step)
        parameters = dict(model.named_parameters())
        sets = itertools.cycle(self.gradients(fraction))

        def prepare():
            for name, gradient in next(sets).items():
                parameters[name].grad = gradient

        def error():
            prepare()
            step()
            return relative_error(parameters, self.exact(fraction, kind, exact or make))

        return Case(step, error, LIMIT, self.step_work(fraction), prepare, share)

    def _gradients(self, fraction: float | None) -> list[dict[str, Tensor]]:
        """Two random sets; those of factors and cores with the norm of the parameter, U's and V's times σ², which
        the step divides by.
        """
        model, norms = self.source(fraction), {}
        for name, layer in low_rank_layers(model):
            for role, scale in (("U", mean_square(layer)), ("S", 1), ("V", mean_square(layer))):
                norms[f"{name}.{role}"] = scale * getattr(layer, role).detach().norm()
        shapes = {name: p.shape for name, p in model.named_parameters()}
        sets = [{name: torch.randn(shape) for name, shape in shapes.items()} for _ in range(2)]
        return [{name: g * (norms.get(name, 1) / g.norm()) for name, g in gradients.items()} for gradients in sets]

    def _exact(self, fraction: float | None, kind: str, make: Callable) -> dict[str, Tensor]:
        """The parameters after one step in float64, on the reference path where the package makes it."""
        model = copy.deepcopy(self.source(fraction)).double()
        optimizer = make(model, learning_rates(kind))
        for name, p in model.named_parameters():
            p.grad = self.gradients(fraction)[0][name].double()
        on_reference(optimizer.step)()
        return {name: p.detach() for name, p in model.named_parameters()}


def learning_rates(kind: str) -> dict[str, float]:
    moving = STILL if kind == "step still" else MOVE
    return {"factors": moving, "cores": moving, "other": STILL}
