"""What every low-rank layer has: the factors U, S, V, their initialisation, the weight they stand for."""

import math
import numbers

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from .. import functional, linalg, ops, reference
from ..errors import NonFiniteError, RankError


def resolve_rank(rank, m: int, n: int, where: str) -> int:
    """An int rank from an int, or from a fraction f in (0, 1] of min(m, n) as ceil(f min(m, n)).

    Raises:
        RankError: outside 1..min(m, n), or a fraction outside (0, 1]. TypeError: not a number.
    """
    full = min(m, n)
    if isinstance(rank, bool) or not isinstance(rank, numbers.Real):
        raise TypeError(f"{where}: rank must be an int or a fraction of min(m, n), got {rank!r}")
    if isinstance(rank, numbers.Integral):
        if not 1 <= rank <= full:
            raise RankError(f"{where}: rank must be in 1..min(m, n) = {full} for a {m} x {n} weight, got {rank}")
        return int(rank)
    if not 0 < rank <= 1:
        raise RankError(f"{where}: rank as a fraction must be in (0, 1], got {rank}")
    return max(1, math.ceil(rank * full - 1e-9))


# Which parameters are factors, for error texts only: layers are found by their names, which this cannot replace
# (a parameter swapped for another is not here).
_FACTORS = WeakIdKeyDictionary()


def is_factor(p: Tensor) -> bool:
    """Whether p was made as the U, S or V of a layer in this process."""
    return p in _FACTORS


class LowRankLayer(nn.Module):
    """Base of the layers. Subclasses set `weight_shape` (torch's) before they call `_make_factors`.

    Attributes:
        U [m, r], S [r, r], V [n, r]: parameters, m = weight_shape[0], n the product of the rest.
        bias [m] or None.
        route: which products the layer runs, "factorised", "merged" or "auto" (default: at every call what the cost
            model of ops.routes says is cheaper); may be set at any time, is no part of the state_dict.
    """

    weight_shape: tuple[int, ...]
    _route = "auto"

    @property
    def route(self) -> str:
        return self._route

    @route.setter
    def route(self, route: str) -> None:
        self._route = functional.check_route(f"{type(self).__name__}.route", route)

    def plan(self, input: Tensor) -> ops.routes.Plan:
        """Why "auto" takes the route it takes for this input: the estimated costs, which one wins and by how much.

        Args:
            input: as for forward; only its shape, its requires_grad and whether gradients are on matter.
        """
        return self._costs(*self._arguments(input))

    def _route_repr(self) -> str:
        return "" if self._route == "auto" else f", route={self._route}"

    def _make_factors(self, rank, bias: bool, device, dtype) -> None:
        m, n = self.weight_shape[0], math.prod(self.weight_shape[1:])
        self.rank = resolve_rank(rank, m, n, type(self).__name__)
        shapes = {"U": (m, self.rank), "S": (self.rank, self.rank), "V": (n, self.rank)}
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
            _FACTORS[getattr(self, name)] = name
        if bias:
            self.bias = nn.Parameter(torch.empty(m, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Random orthonormal U, V and S = s I with the Frobenius norm that torch's default dense weight has.

        So kappa = 1 at the start, and the outputs have the variance of the dense layer's.
        """
        m, n = self.U.shape[0], self.V.shape[0]
        dtype = torch.promote_types(self.U.dtype, torch.float32)
        for X in (self.U, self.V):
            X.copy_(linalg.orthonormalize(torch.randn(X.shape, device=X.device, dtype=dtype)))
        # E‖W‖² of kaiming_uniform(a=√5), variance 1 / (3 n) per entry, spread over r directions
        self.S.copy_(math.sqrt(m / (3 * self.rank)) * torch.eye(self.rank, device=self.S.device))
        if self.bias is not None:
            nn.init.uniform_(self.bias, -1 / math.sqrt(n), 1 / math.sqrt(n))

    def __setstate__(self, state) -> None:
        super().__setstate__(state)
        for name in ("U", "S", "V"):
            _FACTORS[getattr(self, name)] = name

    @property
    def weight(self) -> Tensor:
        """W = U S Vᵀ in torch's shape, differentiable, formed at each access."""
        return (self.U @ self.S @ self.V.mT).reshape(self.weight_shape)

    def condition_number(self) -> float:
        """kappa(S), the condition number of the weight while U and V are orthonormal; Inf for a singular core."""
        try:
            return linalg.cond(self.S.detach().double()).item()
        except NonFiniteError:
            raise NonFiniteError(f"{type(self).__name__}.condition_number: S must be finite, got NaN or Inf") from None

    @classmethod
    def from_dense(cls, module: nn.Module, rank) -> "LowRankLayer":
        """The layer whose weight is the best rank-r approximation of the dense module's (truncated SVD).

        Args:
            module: the dense twin of this class.
            rank: int, or a fraction of min(m, n).

        Raises:
            TypeError: another module. RankError: the rank does not fit. NonFiniteError: NaN or Inf in the weight.
        """
        if not isinstance(module, cls._dense):
            raise TypeError(
                f"{cls.__name__}.from_dense: module must be {cls._dense.__name__}, got {type(module).__name__}"
            )
        weight = module.weight.detach()
        layer = cls(*cls._dense_arguments(module), device=weight.device, dtype=weight.dtype, rank=rank)
        if weight.is_meta:
            return layer.like(module)
        if not torch.isfinite(weight).all():
            raise NonFiniteError(f"{cls.__name__}.from_dense: module.weight must be finite, got NaN or Inf")
        W = weight.flatten(1)
        U, sigma, V = reference.svd(W if W.dtype == torch.float64 else W.float())
        with torch.no_grad():
            layer.U.copy_(U[:, : layer.rank])
            layer.S.copy_(torch.diag(sigma[: layer.rank]))
            layer.V.copy_(V[:, : layer.rank])
            if layer.bias is not None:
                layer.bias.copy_(module.bias)
        return layer.like(module)

    def like(self, module: nn.Module) -> "LowRankLayer":
        """Takes over from its dense twin which parameters are trained, and the mode; returns the layer."""
        for p in (self.U, self.S, self.V):
            p.requires_grad_(module.weight.requires_grad)
        if self.bias is not None:
            self.bias.requires_grad_(module.bias.requires_grad)
        return self.train(module.training)

    def to_dense(self) -> nn.Module:
        """The dense module with weight U S Vᵀ: the same function to rounding."""
        dense = self._dense(*self._dense_arguments(self), device=self.U.device, dtype=self.U.dtype)
        with torch.no_grad(), ops.no_autocast(self.U.device.type):
            dense.weight.copy_(self.weight)
            if self.bias is not None:
                dense.bias.copy_(self.bias)
        dense.weight.requires_grad_(self.S.requires_grad)
        if self.bias is not None:
            dense.bias.requires_grad_(self.bias.requires_grad)
        return dense.train(self.training)
