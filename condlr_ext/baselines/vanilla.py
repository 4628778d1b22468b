"""Plain low-rank layers W = A B with two unconstrained factors, for any optimizer."""

import torch
from torch import Tensor, nn

from .._modules import check_module, replace_modules
from ..errors import RankError
from ..linalg import svd
from ..nn.formed import formed


class _TwoFactor(nn.Sequential):
    """Base of the layers: `weight` = A B in the dense layer's shape, computed at each access, and `bias`."""

    @property
    def weight(self) -> Tensor:
        down, up = self
        W = (up.weight.flatten(1) @ down.weight.flatten(1)).reshape(len(up.weight), *down.weight.shape[1:])
        return formed(W, self.training)

    @property
    def bias(self) -> Tensor | None:
        return self[1].bias

    @torch.no_grad()
    def _fill(self, dense: nn.Module) -> "_TwoFactor":
        """Take A = U sqrt(sigma), B = sqrt(sigma) Vᵀ of the truncated SVD, bias, mode and requires_grad from dense."""
        down, up = self
        rank = len(down.weight)
        U, sigma, V = svd(dense.weight.flatten(1))
        half = sigma[:rank].sqrt()
        up.weight.copy_((U[:, :rank] * half).reshape(up.weight.shape))
        down.weight.copy_((half[:, None] * V[:, :rank].mT).reshape(down.weight.shape))
        for p in (down.weight, up.weight):
            p.requires_grad_(dense.weight.requires_grad)
        if dense.bias is not None:
            up.bias.copy_(dense.bias)
            up.bias.requires_grad_(dense.bias.requires_grad)
        return self.train(dense.training)


class TwoFactorLinear(_TwoFactor):
    """y = A (B x) + b: a linear layer [rank, in] without bias, then one [out, rank] with the bias."""

    @classmethod
    def from_dense(cls, linear: nn.Linear, rank: int) -> "TwoFactorLinear":
        """Split the truncated SVD W = U diag(sigma) Vᵀ evenly: A = U sqrt(sigma), B = sqrt(sigma) Vᵀ.

        Args:
            linear: The dense layer, unchanged.
            rank: 1 <= rank <= min(m, n).

        Raises:
            RankError: rank is out of range.
        """
        m, n = _matrix_shape("TwoFactorLinear", linear, rank)
        like = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        down = nn.utils.skip_init(nn.Linear, n, rank, bias=False, **like)
        up = nn.utils.skip_init(nn.Linear, rank, m, bias=linear.bias is not None, **like)
        return cls(down, up)._fill(linear)


class TwoFactorConv(_TwoFactor):
    """A convolution with rank filters [rank, C_in / groups, *kernel_size], then a pointwise one with the bias.

    The weight of the dense layer, flattened to [C_out, C_in / groups * prod(kernel_size)], is A B. With groups the
    filters are shared by the groups, and group k uses its own rows of A.
    """

    @classmethod
    def from_dense(cls, conv: nn.Module, rank: int) -> "TwoFactorConv":
        """Split the truncated SVD of the flattened weight evenly, as TwoFactorLinear.from_dense.

        Args:
            conv: An nn.Conv1d, nn.Conv2d or nn.Conv3d, unchanged.
            rank: 1 <= rank <= min(m, n) of the flattened m x n weight.

        Raises:
            RankError: rank is out of range.
        """
        m, _ = _matrix_shape("TwoFactorConv", conv, rank)
        like = {"device": conv.weight.device, "dtype": conv.weight.dtype}
        down = nn.utils.skip_init(
            type(conv),
            conv.in_channels // conv.groups,
            rank,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            bias=False,
            padding_mode=conv.padding_mode,
            **like,
        )
        pointwise = {"kernel_size": 1, "groups": conv.groups, "bias": conv.bias is not None}
        up = nn.utils.skip_init(type(conv), rank * conv.groups, m, **pointwise, **like)
        return cls(down, up)._fill(conv)

    def forward(self, input: Tensor) -> Tensor:
        down, up = self
        if up.groups == 1:
            return up(down(input))
        first = input.dim() - down.weight.dim() + 2  # the first spatial dimension
        filtered = down(input.reshape(-1, down.in_channels, *input.shape[first:]))  # groups become samples
        return up(filtered.reshape(*input.shape[: first - 1], up.in_channels, *filtered.shape[2:]))


_TWO_FACTOR = {
    nn.Linear: TwoFactorLinear,
    nn.modules.linear.NonDynamicallyQuantizableLinear: TwoFactorLinear,  # the output projection of MultiheadAttention
    nn.Conv1d: TwoFactorConv,
    nn.Conv2d: TwoFactorConv,
    nn.Conv3d: TwoFactorConv,
}


def vanilla_low_rank(model: nn.Module, ranks: dict[str, int]) -> nn.Module:
    """Replace the named linear and convolution layers of model, in place, by two-factor layers of the given ranks.

    Args:
        model: Any module; unchanged after an error.
        ranks: {module name: rank}, 1 <= rank <= min(m, n) of the flattened m x n weight.

    Returns:
        The model.

    Raises:
        ValueError: A name is no nn.Linear or nn.Conv1d/2d/3d of the model, or its weight is tied or parametrized.
        RankError: A rank is out of range.
    """
    check_module("vanilla_low_rank", model)
    layers = {name: module for name, module in model.named_modules() if name and type(module) in _TWO_FACTOR}
    for name in ranks:
        if name not in layers:
            raise ValueError(
                f"vanilla_low_rank: {name!r} is no nn.Linear or nn.Conv1d/2d/3d of the model; it has"
                f" {', '.join(layers) or 'none'}"
            )
        _refuse_shared(model, name, layers[name])
    # all layers are made before the first is replaced, so that a bad rank leaves the model unchanged
    new = {layers[name]: _TWO_FACTOR[type(layers[name])].from_dense(layers[name], rank) for name, rank in ranks.items()}
    replace_modules(model, new)
    return model


def _refuse_shared(model: nn.Module, name: str, layer: nn.Module) -> None:
    if "weight" not in dict(layer.named_parameters(recurse=False)):
        raise ValueError(f"vanilla_low_rank: the weight of {name!r} is not a plain parameter")
    for other, module in model.named_modules():
        if module is not layer and any(p is layer.weight for p in module.parameters(recurse=False)):
            raise ValueError(f"vanilla_low_rank: the weight of {name!r} is tied to that of {other!r}")


def _matrix_shape(name: str, dense: nn.Module, rank: int) -> tuple[int, int]:
    m, n = dense.weight.shape[0], dense.weight[0].numel()
    if not 1 <= rank <= min(m, n):
        raise RankError(f"{name}.from_dense: rank must be in 1..{min(m, n)} for [{m}, {n}], got {rank}")
    return m, n
