"""LowRankLinear: torch.nn.Linear with weight U S Vᵀ."""

import numbers
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.types import Device

from .. import functional, ops
from .layer import LowRankLayer


class LowRankLinear(LowRankLayer):
    """Linear layer y = W x + b with W = U S Vᵀ; the other arguments are those of torch.nn.Linear.

    Args:
        in_features: n.
        out_features: m.
        bias: Whether to add b.
        device: Device of the parameters.
        dtype: Their dtype.
        rank: An int in 1..min(m, n), or a fraction in (0, 1] of min(m, n).

    Raises:
        RankError: The rank does not fit.

    Examples:
        >>> layer = condlr_ext.LowRankLinear(784, 256, rank=32)
        >>> layer(torch.randn(8, 784)).shape
        torch.Size([8, 256])

    Source:
        Savostianova et al., NeurIPS 2023, section 3.
    """

    in_features: int
    out_features: int
    weight_shape: tuple[int, ...]
    _dense, _cost_model = nn.Linear, staticmethod(ops.cost_model_cpu.linear)
    _geometry = "in_features", "out_features"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        rank: float,
    ):
        super().__init__()
        for name, value in (("in_features", in_features), ("out_features", out_features)):
            if not isinstance(value, numbers.Integral) or value < 1:
                raise ValueError(f"LowRankLinear: {name} must be an int >= 1, got {value!r}")
        self.in_features, self.out_features = in_features, out_features
        self.weight_shape = (out_features, in_features)
        self._make_factors(rank, bias, device, dtype)

    @staticmethod
    def _dense_arguments(module) -> tuple:
        return module.in_features, module.out_features, module.bias is not None

    def _empty_pair(self, rank: int) -> tuple[nn.Linear, nn.Linear]:
        like = {"device": "meta", "dtype": self.U.dtype}
        first = nn.Linear(self.in_features, rank, bias=False, **like)
        return first, nn.Linear(rank, self.out_features, self.bias is not None, **like)

    def _checked(self, input: Tensor) -> Tensor:
        return functional.low_rank_linear(input, self.U, self.S, self.V, self.bias, route=self._route)

    def apply_rows(self, input: Tensor, rows: slice, bias: Tensor | None) -> Tensor:
        """Return input W[rows]ᵀ + bias: one of the projections that attention packs into one layer."""
        return functional.low_rank_linear(input, self.U[rows], self.S, self.V, bias, route=self._route)

    def _arguments(self, input: Tensor) -> tuple:
        return functional.linear_arguments(input, self.U, self.S, self.V, self.bias)

    def _choose_products(self, input: Tensor) -> Callable[..., Tensor]:
        return functional.linear_products(self._route, *self._arguments(input))

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank},"
            f" bias={self.bias is not None}{self._route_repr()}"
        )
