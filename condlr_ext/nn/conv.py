"""LowRankConv1d, LowRankConv2d, LowRankConv3d: torch's convolutions with flattened weight U S Vᵀ."""

import numbers
from collections.abc import Callable
from functools import partial

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.types import Device

from .. import functional, ops
from .._types import Ints
from .layer import LowRankLayer

_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


class _LowRankConv(LowRankLayer):
    """Convolution whose weight, flattened to [C_out, C_in / groups * prod(kernel_size)], is U S Vᵀ.

    The bound on the condition number holds for the flattened weight, not for the convolution as an operator. As with
    torch's layers, to(memory_format=torch.channels_last) makes the outputs channels_last, the fast format on CPUs. All
    arguments but the rank are those of the torch.nn convolution.

    Args:
        in_channels: C_in.
        out_channels: C_out.
        kernel_size: An int, or one per space dimension.
        stride: Likewise.
        padding: Likewise, or "same" or "valid".
        dilation: Likewise.
        groups: Groups of channels; they share the filters in V.
        bias: Whether to add a bias.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        device: Device of the parameters.
        dtype: Their dtype.
        rank: An int in 1..min(C_out, C_in / groups * prod(kernel_size)), or a fraction in (0, 1] of that minimum.

    Raises:
        RankError: The rank does not fit.
        ValueError: An argument that torch's convolution refuses.
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str
    channels_last: bool
    weight_shape: tuple[int, ...]
    _cost_model = staticmethod(ops.cost_model_cpu.conv)
    _geometry = (
        "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"
    )  # fmt: skip

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Ints,
        stride: Ints = 1,
        padding: Ints | str = 0,
        dilation: Ints = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        rank: float,
    ):
        super().__init__()
        name = type(self).__name__
        for what, value in (("in_channels", in_channels), ("out_channels", out_channels)):
            if not isinstance(value, numbers.Integral) or value < 1:
                raise ValueError(f"{name}: {what} must be an int >= 1, got {value!r}")
        if not isinstance(groups, int) or groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(
                f"{name}: groups must divide in_channels = {in_channels} and out_channels = {out_channels},"
                f" got {groups!r}"
            )
        if padding_mode not in _PADDING_MODES:
            raise ValueError(f"{name}: padding_mode must be one of {', '.join(_PADDING_MODES)}, got {padding_mode!r}")
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = self._tuple("kernel_size", kernel_size, 1)
        self.stride = self._tuple("stride", stride, 1)
        self.dilation = self._tuple("dilation", dilation, 1)
        if isinstance(padding, str):
            if padding not in ("same", "valid"):
                raise ValueError(f'{name}: padding must be ints, "valid" or "same", got {padding!r}')
            if padding == "same" and any(s != 1 for s in self.stride):
                raise ValueError(f'{name}: padding="same" needs stride 1, got stride {self.stride}')
            self.padding = padding
        else:
            self.padding = self._tuple("padding", padding, 0)
        self.padding_mode = padding_mode
        self.channels_last = False
        self.weight_shape = self._shape_of_weight()
        self._make_factors(rank, bias, device, dtype)

    def _shape_of_weight(self) -> tuple[int, ...]:
        return self.out_channels, self.in_channels // self.groups, *self.kernel_size

    def _tuple(self, what: str, value, least: int) -> tuple[int, ...]:
        return tuple(functional.as_ints(type(self).__name__, what, value, self._d, least))

    @staticmethod
    def _dense_arguments(module) -> tuple:
        return (
            module.in_channels,
            module.out_channels,
            module.kernel_size,
            module.stride,
            module.padding,
            module.dilation,
            module.groups,
            module.bias is not None,
            module.padding_mode,
        )

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if self._last is not None:
            # to(memory_format=...) converts only 4- and 5-dimensional parameters: see what it does to such a tensor
            format = self._last if self.channels_last else torch.contiguous_format
            device = "meta" if self.U.is_meta else "cpu"
            probe = torch.empty((2,) * (self._d + 2), device=device, dtype=torch.float32)
            self.channels_last = self._is_channels_last(fn(probe.to(memory_format=format)))
        return self

    def _is_channels_last(self, t: Tensor) -> bool:
        if self._last is None:
            return False
        plain, last = (
            torch.empty(t.shape, device="meta", dtype=t.dtype).to(memory_format=f).stride()
            for f in (torch.contiguous_format, self._last)
        )
        return t.stride() == last != plain  # with a dimension of 1 only the strides tell the formats apart

    def copy_flags_from(self, module: nn.Module) -> "LowRankLayer":
        self.channels_last = self._is_channels_last(module.weight)
        return super().copy_flags_from(module)

    def to_dense(self) -> nn.Module:
        return self._in_format(super().to_dense())

    def folded(self) -> nn.Module:
        return self._in_format(super().folded())

    def _in_format(self, module: nn.Module) -> nn.Module:
        return module.to(memory_format=self._last) if self.channels_last else module

    def _empty_pair(self, rank: int) -> tuple[nn.Module, nn.Module]:
        like, maps = {"device": "meta", "dtype": self.U.dtype}, self.groups * rank
        geometry = self.stride, self.padding, self.dilation, self.groups
        first = self._dense(
            self.in_channels, maps, self.kernel_size, *geometry, bias=False, padding_mode=self.padding_mode, **like
        )
        return first, self._dense(maps, self.out_channels, 1, groups=self.groups, bias=self.bias is not None, **like)

    def _pair_weights(self, US: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
        return V.mT.repeat(self.groups, 1), US  # the groups share the filters

    @staticmethod
    def flops(module: nn.Module, rows: int, m: int, n: int, rank: int | None = None) -> int:
        flops = LowRankLayer.flops(module, rows, m, n, rank)
        return flops if rank is None else flops + 2 * rows * rank * (module.groups - 1) * n  # filters for each group

    def _checked(self, input: Tensor) -> Tensor:
        low_rank_conv = getattr(functional, self._functional)  # looked up at each call: torch.fx patches it
        return low_rank_conv(*self._padded(input), kernel_size=self.kernel_size, route=self._route)

    def _arguments(self, input: Tensor) -> tuple:
        return functional.conv_arguments(
            type(self).__name__, self._d, *self._padded(input), kernel_size=self.kernel_size
        )

    def _choose_products(self, input: Tensor) -> Callable[..., Tensor] | None:
        if self.padding_mode != "zeros" or isinstance(self.padding, str) or input.dim() != self._d + 2:
            return None
        args = self._arguments(input)
        products = functional.conv_products(self._route, *args)
        return partial(_convolve, products, args[5:], self._last if self.channels_last else None)

    def _padded(self, input: Tensor) -> tuple:
        """Return the positional arguments of the functional form, which pads with zeros only."""
        factors, padding = (self.U, self.S, self.V, self.bias), self.padding
        if isinstance(input, Tensor):  # torch.fx gives none
            if self.channels_last and input.dim() == self._d + 2 and not functional.transformed():
                input = as_channels_last(input, self._last)
        elif not isinstance(input, torch.fx.Proxy):
            return input, *factors, self.stride, 0, self.dilation, self.groups  # for the functional form to refuse
        if self.padding_mode != "zeros" and padding != "valid":
            if padding == "same":
                pads = functional.same_padding(self.kernel_size, self.dilation)
            else:
                pads = [p for p in reversed(padding) for _ in range(2)]
            input, padding = F.pad(input, pads, mode=self.padding_mode), 0
        return input, *factors, self.stride, padding, self.dilation, self.groups

    def extra_repr(self) -> str:
        text = (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride},"
            f" padding={self.padding}, dilation={self.dilation}, rank={self.rank}, bias={self.bias is not None}"
        )
        if self.groups != 1:
            text += f", groups={self.groups}"
        if self.padding_mode != "zeros":
            text += f", padding_mode={self.padding_mode}"
        return text + self._route_repr()


def _convolve(products, geometry: tuple, memory_format: torch.memory_format | None, input: Tensor, *factors) -> Tensor:
    if memory_format is not None and not functional.transformed():
        input = as_channels_last(input, memory_format)
    return products(input, *factors, *geometry)


def as_channels_last(input: Tensor, memory_format: torch.memory_format) -> Tensor:
    """Return the input in this format, with its strides even where a single channel makes all formats the same."""
    if input.shape[1] > 1:
        return input.contiguous(memory_format=memory_format)
    return input.reshape(input.shape[0], *input.shape[2:], 1).movedim(-1, 1)


class LowRankConv1d(_LowRankConv):
    __doc__ = _LowRankConv.__doc__
    _d, _last, _dense, _functional = 1, None, nn.Conv1d, "low_rank_conv1d"


class LowRankConv2d(_LowRankConv):
    __doc__ = _LowRankConv.__doc__
    _d, _last, _dense, _functional = 2, torch.channels_last, nn.Conv2d, "low_rank_conv2d"


class LowRankConv3d(_LowRankConv):
    __doc__ = _LowRankConv.__doc__
    _d, _last, _dense, _functional = 3, torch.channels_last_3d, nn.Conv3d, "low_rank_conv3d"
