"""Factorized networks as they are during training, and their optimizers, shared by the rows of whole networks."""

import copy
from collections.abc import Callable
from functools import cache, cached_property, lru_cache, partial
from itertools import cycle

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from condlr_ext import backend, factorize, ops
from condlr_ext.baselines import ReleasedCondLR
from condlr_ext.nn import LowRankLayer, low_rank_layers
from condlr_ext.optim import CondLRSGD, param_groups

from ..inputs import TAU, banded_core
from ..registry import TimedCall, Work
from ..roofline import network_cost
from .baselines import FastPyTorch, ReleasedByFormula
from .networks import NETWORKS, Network

MOMENTUM = 0.45
STILL = 1e-6  # learning rate at which almost nothing moves
SETS = 2  # of gradients, and batches, used in turn


@lru_cache(maxsize=1)
def setup(name: str) -> "NetworkSetup":
    """Return the setup of a network of networks.NETWORKS, made once for consecutive rows."""
    return NetworkSetup(NETWORKS[name])


class NetworkSetup:
    """A network on the CPU, dense (rank None) and factorized at any rank, with all that its providers share."""

    def __init__(self, net: Network):
        self.net = net
        self.source = cache(self._source)
        self.gradients = cache(self._gradients)
        self.exact_step = cache(self._exact_step)
        self.cost = network_cost(net)

    @cached_property
    def batches(self) -> list[tuple[Tensor, Tensor | None]]:
        return [self.net.batch() for _ in range(SETS)]

    def model(self, rank: float | None) -> nn.Module:
        """Return a copy to train, channels_last for convolutions."""
        return copy.deepcopy(self.source(rank)).to(memory_format=torch.channels_last)

    def ranks(self, rank: float | None) -> dict[str, int]:
        return {name: layer.rank for name, layer in low_rank_layers(self.source(rank)).items()}

    def step_work(self, rank: float | None, *numbers: int) -> list[Work]:
        return self.cost.step(self.ranks(rank), (p.numel() for p in self.source(rank).parameters()), *numbers)

    def chosen(self, rank: float, device) -> str:
        """Return the backend of "auto" for a step on this device, which is that for the largest rank."""
        layers = low_rank_layers(self.source(rank)).values()
        layer = max(layers, key=lambda layer: layer.rank)
        U, S, V = (t.detach().to(device.device) for t in (layer.U, layer.S, layer.V))
        counter = torch.zeros(1, dtype=torch.int64, device=U.device)
        return ops.step.step.automatic([U, S, V, S], [], [], torch.empty(0), counter)

    def ours(self, rank: float, device) -> Callable:
        """Return the maker of our optimizer in its best form: without waits for the device where kernels serve."""
        return capturable if self.chosen(rank, device) == "triton" else ours

    def _source(self, rank: float | None) -> nn.Module:
        """Return the model that every provider starts from."""
        return self.net.build() if rank is None else factorized(self.net, self.source(None), rank)

    def _gradients(self, rank: float | None) -> list[dict[str, Tensor]]:
        """Return random sets of gradients that sum to zero, in the layout of the parameters.

        Each has the norm of its parameter; those of U and V times σ², by which the step divides.
        """
        model, scales = self.model(rank), {}
        for name, layer in low_rank_layers(model).items():
            scales |= {f"{name}.{role}": mean_square(layer) for role in "UV"}
        sets = []
        for _ in range(SETS):
            gradients = {name: torch.randn_like(p) for name, p in model.named_parameters()}
            for name, p in model.named_parameters():
                gradients[name] *= scales.get(name, 1) * (p.detach().norm() or 1) / gradients[name].norm()
            sets.append(gradients)
        return sets + [{name: -g for name, g in gradients.items()} for gradients in sets]

    def _exact_step(self, rank: float | None, make: Callable, lr: tuple) -> dict[str, Tensor]:
        """Return the parameters after a step with the first set of gradients, in float64 on the CPU."""
        model = copy.deepcopy(self.source(rank)).double()
        return exact_step(model, self.gradients(rank)[0], make, dict(lr))


@torch.no_grad()
def factorized(net: Network, dense: nn.Module, rank: float) -> nn.Module:
    """Return the network as during training: orthonormal factors, cores in the band, a dense classifier."""
    model = copy.deepcopy(dense)
    factorize(model, rank=rank, exclude=net.head, init="random")
    for layer in low_rank_layers(model).values():
        layer.S.copy_(banded_core(layer.rank, layer.S[0, 0].item()))
    return model


def mean_square(layer: LowRankLayer) -> float:
    """Return the mean of σ² over the core's singular values, by which the preconditioner divides gradients of U, V."""
    return layer.S.detach().square().sum().item() / layer.rank


# Functions that make optimizers of (model, learning rates of "factors", "cores" and "other" parameters).


def constrained(make: type[torch.optim.Optimizer], model: nn.Module, lr: dict[str, float], **options):
    groups = param_groups(model, **{role: {"lr": value} for role, value in lr.items()})
    return make(groups, lr=lr["other"], momentum=MOMENTUM, tau=TAU, **options)


ours = partial(constrained, CondLRSGD)
capturable = partial(ours, capturable=True)
released = partial(constrained, ReleasedCondLR)
released_by_formula = partial(constrained, ReleasedByFormula)
fast_pytorch = partial(FastPyTorch, momentum=MOMENTUM, tau=TAU)


def dense_sgd(model: nn.Module, lr: dict[str, float], **options) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr["other"], momentum=MOMENTUM, **options)


def dense_adamw(model: nn.Module, lr: dict[str, float], **options) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=lr["other"], **options)


fused_sgd = partial(dense_sgd, fused=True)
fused_adamw = partial(dense_adamw, fused=True)


def kernels_on(device) -> str:
    """Return the backend with the package's kernels for this device."""
    return {"cpu": "cpu", "cuda": "triton"}[device.kind]


def on(name: str, call: Callable) -> Callable:
    """Return the call on the package's backend of that name."""

    def run():
        with backend(name):
            return call()

    return run


def exact_step(
    model: nn.Module, gradients: dict[str, Tensor], make: Callable, lr: dict[str, float]
) -> dict[str, Tensor]:
    """Return the parameters of a model in float64 after a step with these gradients, on the reference path."""
    optimizer = make(model, lr)
    for name, p in model.named_parameters():
        p.grad = gradients[name].to(p)
    on("reference", optimizer.step)()
    return {name: p.detach() for name, p in model.named_parameters()}


class Start:
    """The initial state of a model and of its optimizer, which has not stepped yet."""

    def __init__(self, model: nn.Module, optimizer):
        self._model, self._optimizer = model, optimizer
        self._weights = copy.deepcopy(model.state_dict())
        self._state = [(t, t.clone()) for t in self._tensors()]

    def _tensors(self) -> list[Tensor]:
        optimizer = self._optimizer
        state = list(optimizer.state.values()) if isinstance(optimizer, torch.optim.Optimizer) else optimizer.buffers
        return [t for t in tree_leaves(state) if isinstance(t, Tensor)]

    @torch.no_grad()
    def restore(self) -> None:
        """Restore in place, as a CUDA graph needs it; buffers made since become zero.

        The weights keep their version counters, since for new ones an optimizer would build its arguments again, which
        a capture does not allow.
        """
        with torch.autograd._unsafe_preserve_version_counter(tuple(self._model.parameters())):
            self._model.load_state_dict(self._weights)
        for t in self._tensors():
            t.zero_()
        for t, value in self._state:
            t.copy_(value)


class Training:
    """A model in training on batches in turn; `forward`: its compiled form, if any."""

    def __init__(self, net, model: nn.Module, optimizer, batches, dtype: torch.dtype, forward: Callable | None = None):
        self.model, self.optimizer = model, optimizer
        self._net, self._batches, self._turn = net, batches, cycle(batches)
        self._forward = model if forward is None else forward  # a compiled module may be false: it has a length
        self._cast = partial(torch.autocast, batches[0][0].device.type, dtype, enabled=dtype.itemsize < 4)
        self._start = Start(model, optimizer)
        self.loss = None

    def next(self) -> None:
        """Go on to the next batch."""
        self.x, self.y = next(self._turn)

    def forward(self) -> Tensor:
        with self._cast():
            return self._net.loss(self._forward(self.x), self.y)

    def ready(self) -> None:
        """Run everything before the backward of the next batch."""
        self.next()
        self.zero_grad()
        self.loss = self.forward()

    def backward(self) -> Tensor:
        loss, self.loss = self.loss, None
        loss.backward()
        return loss.detach()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()
        self.x.grad = None

    def iteration(self) -> Tensor:
        self.zero_grad()
        loss = self.forward()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def calls(self, exact: Callable[[], dict], wrap: Callable) -> dict[str, TimedCall]:
        """Return the calls by mode; `exact` makes loss, gradients and parameters in float64."""

        def call(run: Callable, prepare: Callable, *judged: str) -> TimedCall:
            run, prepare = wrap(run), wrap(prepare)

            def errors(loss: Tensor) -> dict[str, float]:
                found = self.found(loss)
                smooth(self.model, False)
                if self._forward is not self.model:  # compiled with kinks too
                    prepare()
                    run()
                return {name: relative_error(found[name], exact()[name]) for name in judged}

            return TimedCall(run, errors, prepare, self.rewind)

        return {
            "forward": call(self.forward, self.next, "loss"),
            "backward": call(self.backward, self.ready, "loss", "gradients"),
            "iteration": call(self.iteration, self.next, "loss", "gradients", "parameters"),
        }

    def rewind(self) -> None:
        """Return to the start and the first batch, without kinks."""
        self._start.restore()
        self._turn = cycle(self._batches)
        smooth(self.model, True)

    def found(self, loss: Tensor) -> dict[str, dict[str, Tensor]]:
        """Copy the loss, gradients and parameters after an iteration."""
        parameters = dict(self.model.named_parameters())
        gradients = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
        if self.x.requires_grad and self.x.grad is not None:
            gradients["input"] = self.x.grad.clone()
        parameters = {name: p.detach().clone() for name, p in parameters.items()}
        return {"loss": {"loss": loss.detach().clone()}, "gradients": gradients, "parameters": parameters}


def smooth(model: nn.Module, on: bool) -> None:
    """Take random masks and kinks out of the model, or put them back.

    With them float32 and float64 gradients cannot be compared: one maximum or one sign that rounding decides changes
    VGG16's gradients by half a percent.
    """
    for m in model.modules():
        if isinstance(m, (nn.Dropout, nn.ReLU, nn.LeakyReLU, nn.MaxPool2d)):
            m.__dict__.pop("forward", None)
            if on:
                pool = isinstance(m, nn.MaxPool2d)
                m.forward = partial(F.avg_pool2d, kernel_size=m.kernel_size) if pool else identity


def identity(x):
    return x


def relative_error(mine: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Return the largest ‖mine - exact‖ / ‖exact‖ over the named tensors.

    NaN counts as infinite, and a norm below 1e-2 of the largest (a gradient that cancels, as a bias's before a batch
    norm) as 1e-2 of it.
    """
    least = 1e-2 * max(t.norm() for t in exact.values())
    errors = [(mine[name].detach().to(t) - t).norm() / t.norm().clamp_min(least) for name, t in exact.items()]
    return max(e.nan_to_num(torch.inf).item() for e in errors)
