"""Shared by DLRT and RobustDLRT: factors whose rank changes, their truncation, plain SGD of everything else."""

import numbers

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import linalg, reference
from .._types import Options
from ..nn import LowRankLayer, low_rank_layers
from .layerwise import check_factor, check_gradients, check_options, heavy_ball


class TrainedLayer:
    """A low-rank layer whose factors an optimizer replaces, with all modules that share these factors."""

    def __init__(self, name: str, module: LowRankLayer):
        self.name, self.modules = name, [module]

    @property
    def factors(self) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
        return self.modules[0].U, self.modules[0].S, self.modules[0].V

    @property
    def full_rank(self) -> int:
        U, _, V = self.factors
        return min(len(U), len(V))


class RankAdaptiveSGD(Optimizer):
    """SGD that replaces the Parameters U, S, V of low-rank layers by ones of other rank, in the modules and in itself.

    Only layers whose U, S and V all require gradients take part. Momentum and weight decay act on cores, which have
    the norm of W = U S Vᵀ, and on parameters that are no factors; a core's buffer is rotated with the bases. A step
    replaces parameters of the model: lists of parameters kept elsewhere, DistributedDataParallel and CUDA graphs do
    not notice; torch.compile compiles again for each new rank.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        *,
        tolerance: float,
        min_rank: int = 2,
    ):
        where = type(self).__name__
        if not isinstance(model, nn.Module):
            raise TypeError(f"{where}: model must be a module, whose factors are replaced, got {type(model).__name__}")
        if not isinstance(tolerance, numbers.Real) or not 0 <= tolerance < 1:
            raise ValueError(f"{where}: tolerance must be a number in [0, 1), got {tolerance!r}")
        if isinstance(min_rank, bool) or not isinstance(min_rank, numbers.Integral) or min_rank < 1:
            raise ValueError(f"{where}: min_rank must be an int >= 1, got {min_rank!r}")
        self._layers = _trained_layers(where, model)
        if not self._layers:
            raise ValueError(f"{where}: model must have low-rank layers that are trained, got none")
        options = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, tolerance=tolerance, min_rank=min_rank)
        check_options(where, options)
        super().__init__(list(model.named_parameters()), options)

    def add_param_group(self, param_group: Options) -> None:
        if self.param_groups:
            raise ValueError(f"{type(self).__name__}.add_param_group: the one group is made at construction")
        super().add_param_group(param_group)

    def __getstate__(self) -> Options:
        return super().__getstate__() | {"_layers": self._layers}

    @property
    def ranks(self) -> dict[str, int]:
        """Current rank of every layer that takes part, by name."""
        return {layer.name: layer.factors[1].shape[0] for layer in self._layers}

    @property
    def _options(self) -> dict:
        return self.param_groups[0]

    def _check_gradients(self) -> None:
        names = dict(zip(self._options["params"], self._options["param_names"], strict=True))
        check_gradients(type(self).__name__, self._options["params"], names)

    def _set_factors(self, layer: TrainedLayer, U, S, V, momentum: Tensor | None = None) -> None:
        """Give the layer these factors, as new Parameters, and the core this momentum buffer."""
        params = self._options["params"]
        position = {id(p): i for i, p in enumerate(params)}
        for role, old, value in zip("USV", layer.factors, (U, S, V), strict=True):
            new = value if isinstance(value, nn.Parameter) else nn.Parameter(value)
            self.state.pop(old, None)
            params[position[id(old)]] = new
            for module in layer.modules:
                setattr(module, role, new)
        for module in layer.modules:
            module.rank = S.shape[0]
        if momentum is not None:
            self.state[layer.factors[1]]["momentum_buffer"] = momentum

    def _momentum_buffer(self, p: Tensor) -> Tensor | None:
        return self.state.get(p, {}).get("momentum_buffer")

    def _sgd_step(self, p: Tensor, grad: Tensor) -> None:
        """Take torch.optim.SGD's step of one parameter, in place."""
        direction = heavy_ball(p, grad, self._momentum_buffer(p), self._options)
        if self._options["momentum"]:
            self.state[p]["momentum_buffer"] = direction.clone()  # it may be the gradient itself
        p.sub_(self._options["lr"] * direction)

    def _step_others(self) -> None:
        """Take SGD's step of all parameters that are not factors of the layers."""
        factors = {id(X) for layer in self._layers for X in layer.factors}
        for p in self._options["params"]:
            if p.grad is not None and id(p) not in factors:
                self._sgd_step(p, p.grad)

    def _augment(self, layer: TrainedLayer, to_U: Tensor, to_V: Tensor) -> None:
        """Extend the bases by the columns of to_U [m, r] and to_V [n, r]; W and the core's momentum stay.

        The new rank is min(2 r, m, n); the first of the new directions are taken.
        """
        U, S, V = layer.factors
        rank = min(2 * S.shape[0], layer.full_rank)
        U1, V1 = (linalg.qr(torch.cat(pair, 1)).Q[:, :rank] for pair in ((U, to_U), (V, to_V)))
        left, right = U1.mT @ U, V1.mT @ V
        momentum = self._momentum_buffer(S)
        self._set_factors(layer, U1, left @ S @ right.mT, V1, None if momentum is None else left @ momentum @ right.mT)

    def _truncate(self, layer: TrainedLayer) -> None:
        """Truncate to the least rank >= min_rank with ‖dropped sigma‖ < tolerance ‖S‖_F; S becomes diag(sigma)."""
        U, S, V = layer.factors
        P, sigma, Q = linalg.svd(S)
        rank = max(kept_rank(sigma, self._options["tolerance"]), min(self._options["min_rank"], len(sigma)))
        P, Q, momentum = P[:, :rank], Q[:, :rank], self._momentum_buffer(S)
        self._set_factors(layer, U @ P, sigma[:rank].diag(), V @ Q, None if momentum is None else P.mT @ momentum @ Q)


def kept_rank(sigma: Tensor, tolerance: float) -> int:
    """Return the least r >= 1 with ‖(sigma_{r+1}, ...)‖ < tolerance ‖sigma‖, or = 0, for descending sigma."""
    sigma = sigma.detach().cpu().double()
    squares = (sigma / reference.magnitude(sigma, -1)).square()
    tails = squares.flip(0).cumsum(0).flip(0)  # tails[r]: squared norm of what rank r drops
    return max(1, int(((tails >= tolerance**2 * squares.sum()) & (tails > 0)).sum()))


def _trained_layers(where: str, model: nn.Module) -> list[TrainedLayer]:
    layers: dict[tuple[int, ...], TrainedLayer] = {}
    seen: dict[int, tuple[int, ...]] = {}
    for name, module in low_rank_layers(model).items():
        factors = {role: getattr(module, role) for role in "USV"}
        trained = [role for role, X in factors.items() if X.requires_grad]
        if not trained:
            continue
        if len(trained) < 3:
            raise ValueError(
                f"{where}: layer {name!r} must have all of U, S, V trained or none, got {', '.join(trained)}"
            )
        for role, X in factors.items():
            check_factor(where, f"{role} of layer {name!r}", X)
        key = tuple(map(id, factors.values()))
        if any(seen.setdefault(i, key) != key for i in key):
            raise ValueError(f"{where}: layer {name!r} shares some of its factors with another layer, but not all")
        if key in layers:
            layers[key].modules.append(module)
        else:
            layers[key] = TrainedLayer(name, module)
    return list(layers.values())
