"""LowRankConvTranspose1d, 2d, 3d: torch's transposed convolutions with flattened weight (U S Vᵀ)ᵀ."""

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.types import Device

from .. import ops
from .._types import Ints
from ..errors import ShapeError
from .conv import _LowRankConv, as_channels_last
from .layer import LowRankLayer

_POINTWISE = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


class _LowRankConvTranspose(_LowRankConv):
    """Transposed convolution whose weight [C_in, C_out / groups, *kernel_size] is V Sᵀ Uᵀ when flattened to C_in rows.

    V maps the channels of a pixel to r numbers, and U [C_out / groups * prod(kernel_size), r] is a bank of r filters
    that they are spread by. With groups, the filters in U are shared, and a group has its own rows of V. As for
    convolutions, the bound on the condition number is that of the matrix. All arguments but the rank are those of the
    torch.nn layer.

    Args:
        in_channels: C_in.
        out_channels: C_out.
        kernel_size: An int, or one per space dimension.
        stride: Likewise.
        padding: Likewise.
        output_padding: Likewise.
        groups: Groups of channels.
        bias: Whether to add a bias.
        dilation: As kernel_size.
        padding_mode: "zeros", the only one that torch has.
        device: Device of the parameters.
        dtype: Their dtype.
        rank: An int in 1..min(C_out / groups * prod(kernel_size), C_in), or a fraction in (0, 1] of that minimum.

    Raises:
        RankError: The rank does not fit.
        ValueError: An argument that torch's layer refuses.
    """

    _geometry = (*_LowRankConv._geometry, "output_padding")

    output_padding: tuple[int, ...]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Ints,
        stride: Ints = 1,
        padding: Ints = 0,
        output_padding: Ints = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Ints = 1,
        padding_mode: str = "zeros",
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        rank: float,
    ):
        name = type(self).__name__
        if padding_mode != "zeros":
            raise ValueError(f'{name}: padding_mode must be "zeros", got {padding_mode!r}')
        if isinstance(padding, str):
            raise ValueError(f"{name}: padding must be ints, got {padding!r}")
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, "zeros", device, dtype,
            rank=rank,
        )  # fmt: skip
        self.output_padding = self._tuple("output_padding", output_padding, 0)

    def _shape_of_weight(self) -> tuple[int, ...]:
        return self.in_channels, self.out_channels // self.groups, *self.kernel_size

    @property
    def matrix_shape(self) -> tuple[int, int]:
        n, m = super().matrix_shape
        return m, n

    @property
    def _bias_size(self) -> int:
        return self.out_channels

    @property
    def _variance(self) -> float:
        return 1 / (3 * self.matrix_shape[0])  # torch takes C_out / groups * prod(kernel_size) for the fan-in

    @staticmethod
    def as_matrix(weight: Tensor) -> Tensor:
        return weight.flatten(1).mT

    def _from_matrix(self, W: Tensor) -> Tensor:
        return W.mT.reshape(self.weight_shape)

    @staticmethod
    def _dense_arguments(module: nn.Module) -> tuple:
        return (
            module.in_channels,
            module.out_channels,
            module.kernel_size,
            module.stride,
            module.padding,
            module.output_padding,
            module.groups,
            module.bias is not None,
            module.dilation,
        )

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        if not isinstance(input, torch.fx.Proxy):
            dims = getattr(input, "dim", int)()
            if dims not in (self._d + 1, self._d + 2) or input.shape[-self._d - 1] != self.in_channels:
                raise ShapeError(
                    f"{type(self).__name__}: input must have {self._d + 1} or {self._d + 2} dimensions with"
                    f" {self.in_channels} channels, got {list(input.shape) if dims else type(input).__name__}"
                )
            if self.channels_last and dims == self._d + 2:
                input = as_channels_last(input, self._last)
        output_padding = self.output_padding
        if output_size is not None:
            output_padding = self._dense._output_padding(
                self, input, output_size, self.stride, self.padding, self.kernel_size, self._d, self.dilation
            )
        geometry = self.stride, self.padding, output_padding, self.groups, self.dilation
        return low_rank_conv_transpose(
            input, self.U, self.S, self.V, self.bias, self.weight_shape, geometry, self._route
        )

    def _arguments(self, input: Tensor) -> tuple:
        return input, self.U, self.S, self.V, self.groups

    _cost_model = staticmethod(ops.cost_model_cpu.conv_transpose)

    def _pair_weights(self, US: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
        return _pair_weights(US, V, self.weight_shape, self.groups)

    def _empty_pair(self, rank: int) -> tuple[nn.Module, nn.Module]:
        like, maps = {"device": "meta", "dtype": self.U.dtype}, self.groups * rank
        first = self._pointwise(self.in_channels, maps, 1, groups=self.groups, bias=False, **like)
        arguments = self._dense_arguments(self)
        return first, self._dense(maps, *arguments[1:], **like)

    @staticmethod
    def rows(module: nn.Module, input: Tensor, output: Tensor) -> int:
        return input.numel() // module.in_channels

    @staticmethod
    def flops(module: nn.Module, rows: int, m: int, n: int, rank: int | None = None) -> int:
        flops = LowRankLayer.flops(module, rows, m, n, rank)
        return flops if rank is None else flops + 2 * rows * rank * (module.groups - 1) * m


def low_rank_conv_transpose(
    input: Tensor, U: Tensor, S: Tensor, V: Tensor, bias: Tensor | None, weight_shape: tuple[int, ...], geometry, route
) -> Tensor:
    """Return the output; one node of a symbolic trace, where no shapes are known.

    Args:
        input: [B, C_in, ...] or [C_in, ...].
        U: [C_out / groups * prod(kernel_size), r].
        S: [r, r].
        V: [C_in, r].
        bias: [C_out] or None.
        weight_shape: [C_in, C_out / groups, *kernel_size].
        geometry: Stride, padding, output_padding, groups and dilation.
        route: "auto", "factorized" or "merged".
    """
    d, groups = len(weight_shape) - 2, geometry[3]
    if route == "auto":
        route = ops.cost_model_cpu.choose(ops.cost_model_cpu.conv_transpose, input, U, S, V, groups)
    if route == "merged":
        W = (V @ S.mT @ U.mT).reshape(weight_shape)
        return _TRANSPOSED[d - 1](input, W, bias, *geometry)
    channels, filters = _pair_weights(U @ S, V, weight_shape, groups)
    P = _POINTWISE[d - 1](input, channels, groups=groups)
    return _TRANSPOSED[d - 1](P, filters, bias, *geometry)


torch.fx.wrap("low_rank_conv_transpose")


def _pair_weights(US: Tensor, V: Tensor, weight_shape: tuple[int, ...], groups: int) -> tuple[Tensor, Tensor]:
    """Return the weights of a pointwise and of a transposed convolution; all groups have the same filters."""
    channels, out, *kernel = weight_shape
    ones = [1] * len(kernel)
    pointwise = V.reshape(groups, -1, V.shape[1]).mT.reshape(-1, channels // groups, *ones)
    return pointwise, US.mT.reshape(-1, out, *kernel).repeat(groups, 1, *ones)


class LowRankConvTranspose1d(_LowRankConvTranspose):
    __doc__ = _LowRankConvTranspose.__doc__
    _d, _last, _dense, _pointwise = 1, None, nn.ConvTranspose1d, nn.Conv1d


class LowRankConvTranspose2d(_LowRankConvTranspose):
    __doc__ = _LowRankConvTranspose.__doc__
    _d, _last, _dense, _pointwise = 2, torch.channels_last, nn.ConvTranspose2d, nn.Conv2d


class LowRankConvTranspose3d(_LowRankConvTranspose):
    __doc__ = _LowRankConvTranspose.__doc__
    _d, _last, _dense, _pointwise = 3, torch.channels_last_3d, nn.ConvTranspose3d, nn.Conv3d
