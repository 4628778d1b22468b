"""Rows of the whole training iteration: zero_grad, forward, backward, step."""

import contextlib
import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F
from baselines import plain_twin
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
)
from timing import Case, sample
from torch import Tensor, nn

LIMIT = 1e-3  # relative error of loss and gradients: float32 shows up to 1e-4 through 16 layers, a wrong term about 1


@dataclass
class Training:
    """A model in training on one fixed batch."""

    net: Network
    model: nn.Module
    optimizer: object
    x: Tensor
    y: Tensor | None

    def gradients(self) -> Tensor:
        self.optimizer.zero_grad()
        self.x.grad = None
        loss = self.net.loss(self.model(self.x), self.y)
        loss.backward()
        return loss

    def iteration(self) -> None:
        self.gradients()
        self.optimizer.step()


class IterationRows(Group):
    """One fixed random batch; the cores and factors of the median layer move by MOVE in a step, all else by 1e-6."""

    def __init__(self, net: Network, compiled: bool = False):
        super().__init__(net)
        self.names = {f"iteration {net.name} {f:.0%}": f for f in FRACTIONS}
        self.compiled = compiled
        self.batch = cache(net.batch)
        self.exact = cache(self._exact)
        self.sgd = cache(lambda: fastest_sgd(self.subject(None)))

    def rows(self, wanted: list[str]) -> dict[str, dict[str, Case]]:
        dense = {"dense": self._case(None, self.sgd())}
        if self.compiled:
            dense["dense compiled"] = self._case(None, self.sgd(), torch.compile)
        rows = {}
        for name in wanted:
            fraction = self.names[name]
            rows[name] = {
                "ours": self._case(fraction, ours),
                **dense,
                "fast PyTorch": self._case(fraction, fast_pytorch, plain_twin, share=0.7),
                "reference path": self._case(fraction, ours, wrap=on_reference, share=0.4),
            }
            if self.compiled:
                rows[name]["ours compiled"] = self._case(fraction, ours, torch.compile)
        return rows

    def _case(
        self,
        fraction: float | None,
        make: Callable,
        transform: Callable = lambda model: model,
        wrap: Callable = lambda call: call,
        share: float = 1.0,
    ) -> Case:
        model = transform(self.subject(fraction))
        plain = getattr(model, "_orig_mod", model)  # of a compiled model
        optimizer = make(plain, self._learning_rates(fraction))
        training = Training(self.net, model, optimizer, *self.batch())

        def error() -> float:
            with smooth(plain):
                loss = wrap(training.gradients)()
            result = relative_error(loss_and_gradients(loss, plain), self.exact(fraction))
            wrap(training.iteration)()  # momentum exists, memory has been asked for once
            return result

        work = self.cost().iteration(self.ranks(fraction)) + self.step_work(fraction)
        return Case(wrap(training.iteration), error, LIMIT, work, share=share)

    def _exact(self, fraction: float | None) -> dict[str, Tensor]:
        """Loss and gradients of the plain layers in float64."""
        model = plain_twin(self.source(fraction)).double()
        x, y = self.batch()
        with smooth(model):
            loss = self.net.loss(model(x.detach().double().contiguous()), y)
            loss.backward()
        return loss_and_gradients(loss, model)

    def _learning_rates(self, fraction: float | None) -> dict[str, float]:
        rates = {"factors": [STILL], "cores": [STILL]}
        if fraction is not None:
            gradients, rates = self.exact(fraction), {"factors": [], "cores": []}
            for name, layer in low_rank_layers(self.source(fraction)):
                U, S, V = (
                    (getattr(layer, role).detach().norm() / gradients[f"{name}.{role}"].norm()).item() for role in "USV"
                )
                rates["factors"] += [MOVE * mean_square(layer) * U, MOVE * mean_square(layer) * V]
                rates["cores"].append(MOVE * S)
        return {role: statistics.median(values) for role, values in rates.items()} | {"other": STILL}


@contextlib.contextmanager
def smooth(model: nn.Module):
    """The model without random masks and kinks, so that float32 and float64 gradients can be compared: one maximum
    or one sign that rounding decides moves VGG16's gradients by half a percent.
    """
    replaced = [m for m in model.modules() if isinstance(m, (nn.Dropout, nn.LeakyReLU, nn.MaxPool2d))]
    for m in replaced:
        pool = isinstance(m, nn.MaxPool2d)
        m.forward = partial(F.avg_pool2d, kernel_size=m.kernel_size) if pool else lambda x: x
    yield
    for m in replaced:
        del m.forward


def loss_and_gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters()}


def fastest_sgd(dense: nn.Module) -> Callable:
    """torch's fused SGD or its default one, whichever steps this model faster here."""
    times = {}
    for make in (dense_sgd(fused=None), dense_sgd(fused=True)):
        model = copy.deepcopy(dense)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        step = make(model, {"other": STILL}).step
        times[make] = min(sample(Case(step, float, 0), 1) for _ in range(5))
    return min(times, key=times.get)
