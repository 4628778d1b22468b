"""LowRankBilinear: torch.nn.Bilinear with flattened weight U S Vᵀ."""

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.types import Device

from .. import ops
from .layer import LowRankLayer


class LowRankBilinear(LowRankLayer):
    """Bilinear layer whose weight, flattened to [out_features, in1_features * in2_features], is U S Vᵀ.

    It computes r bilinear forms with the matrices in V, then U S. The other arguments are those of torch.nn.Bilinear.

    Args:
        in1_features: Width of the first input.
        in2_features: Width of the second.
        out_features: m.
        bias: Whether to add a bias.
        device: Device of the parameters.
        dtype: Their dtype.
        rank: An int in 1..min(m, in1_features * in2_features), or a fraction in (0, 1] of that minimum.

    Raises:
        RankError: The rank does not fit.
    """

    _dense, _cost_model = nn.Bilinear, staticmethod(ops.cost_model_cpu.bilinear)
    _geometry = "in1_features", "in2_features", "out_features"
    _takes_features = False

    in1_features: int
    in2_features: int
    out_features: int
    weight_shape: tuple[int, ...]

    def __init__(
        self,
        in1_features: int,
        in2_features: int,
        out_features: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        rank: float,
    ):
        super().__init__()
        arguments = nn.Bilinear(in1_features, in2_features, out_features, device="meta")  # checks them
        for name in self._geometry:
            setattr(self, name, getattr(arguments, name))
        self.weight_shape = (out_features, in1_features, in2_features)
        self._make_factors(rank, bias, device, dtype)

    @property
    def _variance(self) -> float:
        return 1 / (3 * self.in1_features)

    @staticmethod
    def _dense_arguments(module: nn.Module) -> tuple:
        return module.in1_features, module.in2_features, module.out_features, module.bias is not None

    def forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        return low_rank_bilinear(
            input1, input2, self.U, self.S, self.V, self.bias, self.weight_shape, self._route
        )  # fmt: skip

    def _arguments(self, input: Tensor) -> tuple:
        return input, self.U, self.S, self.V

    def folded(self) -> nn.Module:
        return self.to_dense()  # no Sequential takes two inputs

    def extra_repr(self) -> str:
        return (
            f"in1_features={self.in1_features}, in2_features={self.in2_features}, out_features={self.out_features},"
            f" rank={self.rank}, bias={self.bias is not None}{self._route_repr()}"
        )


def low_rank_bilinear(
    input1: Tensor, input2: Tensor, U: Tensor, S: Tensor, V: Tensor, bias: Tensor | None, weight_shape, route: str
) -> Tensor:
    """Return the output [*, m]; one node of a symbolic trace."""
    if route == "auto":
        route = ops.cost_model_cpu.choose(ops.cost_model_cpu.bilinear, input1, U, S, V)
    if route == "merged":
        return F.bilinear(input1, input2, (U @ S @ V.mT).reshape(weight_shape), bias)
    return F.linear(F.bilinear(input1, input2, V.mT.reshape(-1, *weight_shape[1:])), U @ S, bias)


torch.fx.wrap("low_rank_bilinear")
