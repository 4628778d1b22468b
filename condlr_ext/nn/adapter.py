"""LowRankAdapter: a frozen layer plus a low-rank change with a bounded condition number."""

import math
import numbers

import torch
from torch import Tensor, nn

from .. import reference
from .._modules import DENSE, not_plain
from ..errors import NonFiniteError
from .conv import LowRankConv1d, LowRankConv2d, LowRankConv3d
from .formed import formed
from .layer import LowRankLayer
from .linear import LowRankLinear
from .transposed import LowRankTransposedLinear

_CONVS = {nn.Conv1d: LowRankConv1d, nn.Conv2d: LowRankConv2d, nn.Conv3d: LowRankConv3d}


class LowRankAdapter(nn.Module):
    """A frozen layer with a trainable low-rank change of its weight: y = layer(x) + scale (U S Vᵀ) x.

    The change `delta` is a low-rank layer with the frozen layer's geometry and without bias, so the optimizers of this
    package keep its U and V orthonormal and kappa(S) <= 1 + tau.

    A core with a bounded condition number cannot be zero, so the change starts at the size of rounding: S = s I with
    ‖delta W‖_F = eps ‖W‖_F for delta W = scale U S Vᵀ and the eps of W's dtype. Nothing is subtracted from the frozen
    weight: delta W is all that needs to be exported (see save_lora).

    Args:
        layer: nn.Linear, nn.Conv1d/2d/3d, HF's Conv1D, or one of these made low-rank. It becomes part of the adapter,
            and its parameters are frozen.
        rank: Rank of the change: an int in 1..min(m, n) for the weight as a matrix m x n, or a fraction of min(m, n).
        scale: Factor of the change: PEFT's lora_alpha / r (it is not divided by the rank).

    Attributes:
        layer: The frozen layer.
        delta: The LowRankLinear or LowRankConv of the change.
        scale: Factor of the change.

    Raises:
        TypeError: The layer is of another class.
        RankError: The rank does not fit.
        ValueError: scale is zero or not finite, or the weight or a factor is computed (parametrized, pruned,
            normalized), sharded or quantized.

    Source:
        U S Vᵀ adapters with orthonormal U, V: Lion et al., PoLAR, and Li et al., StelLA (both NeurIPS 2025); the bound
        on kappa(S): Savostianova et al. (NeurIPS 2023).
    """

    layer: nn.Module
    delta: LowRankLayer
    scale: float

    def __init__(self, layer: nn.Module, rank: float, *, scale: float = 1.0):
        super().__init__()
        if isinstance(scale, bool) or not isinstance(scale, numbers.Real) or not (math.isfinite(scale) and scale != 0):
            raise ValueError(f"LowRankAdapter: scale must be a finite number other than 0, got {scale!r}")
        self.scale = float(scale)
        delta = _delta(layer, rank)
        _own_weight("LowRankAdapter", layer)
        self.layer, self.delta = layer, delta
        for p in layer.parameters():
            p.requires_grad_(False)
        # The layer's own parameter, which other modules may share, while a merged one is in its place. The tuple keeps
        # nn.Module from registering it as the adapter's.
        self._own: tuple[nn.Parameter] | None = None
        self.register_state_dict_post_hook(_keep_unmerged)
        self.register_load_state_dict_pre_hook(_unmerge_first)
        self.reset_parameters()
        self.train(layer.training)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw orthonormal U, V and set S = s I with ‖delta W‖_F = eps ‖W‖_F: the frozen function to rounding."""
        self.delta.reset_parameters()
        S, W = self.delta.S, self.layer.weight
        norm = reference.norm(W.to(torch.promote_types(W.dtype, torch.float32)))
        norm = torch.where(norm > 0, norm, 1)
        s = torch.finfo(W.dtype).eps * norm / (abs(self.scale) * math.sqrt(self.delta.rank))
        S.copy_(s * torch.eye(self.delta.rank, device=S.device, dtype=s.dtype))

    @property
    def rank(self) -> int:
        return self.delta.rank

    @property
    def merged(self) -> bool:
        """Whether the change is in the frozen layer's weight."""
        return self._own is not None

    @property
    def weight(self) -> Tensor:
        """W + scale U S Vᵀ in torch's shape, differentiable; computed at each access, unless it is merged."""
        if self.merged:
            return self.layer.weight
        return formed(self.layer.weight + self.scale * self.delta.weight, self.training)

    @property
    def bias(self) -> Tensor | None:
        return self.layer.bias

    def condition_number(self) -> float:
        """Return kappa(S) of the change."""
        return self.delta.condition_number()

    def forward(self, input: Tensor) -> Tensor:
        if not self.merged:
            return torch.add(self.layer(input), self.delta(input), alpha=self.scale)
        if self.training and torch.is_grad_enabled() and self.delta.S.requires_grad:
            raise RuntimeError("LowRankAdapter: the change is merged and would not be trained; call unmerge() first")
        return self.layer(input)

    @torch.no_grad()
    def merge(self) -> "LowRankAdapter":
        """Add the change to the frozen layer's weight, so that forward costs no more than the layer.

        The sum is computed in float32 at least and rounded once. The layer's own weight is kept unchanged, also for
        modules that share it: unmerge restores it, and the state_dict always holds it, never the sum. Merging twice
        changes nothing.

        Returns:
            The adapter.

        Raises:
            NonFiniteError: NaN or Inf in the sum; nothing has changed then.
            ValueError: The layer is low-rank, or its weight has been parametrized; nothing has changed then.
        """
        if self.merged:
            return self
        if isinstance(self.layer, LowRankLayer):
            raise ValueError(
                "LowRankAdapter.merge: the layer must have a stored weight, got a low-rank one; merge_adapters makes it"
                " dense"
            )
        W = _own_weight("LowRankAdapter.merge", self.layer)
        dtype = torch.promote_types(W.dtype, torch.float32)
        U, S, V = (p.to(dtype) for p in (self.delta.U, self.delta.S, self.delta.V))
        merged = (W.to(dtype) + self.scale * self.delta._from_matrix(U @ S @ V.mT)).to(W.dtype)
        if not torch.isfinite(merged).all():
            raise NonFiniteError("LowRankAdapter.merge: the merged weight must be finite, got NaN or Inf")
        self._own = (W,)
        self.layer.weight = nn.Parameter(torch.empty_like(W).copy_(merged), requires_grad=False)  # W's memory format
        return self

    @torch.no_grad()
    def unmerge(self) -> "LowRankAdapter":
        """Restore the frozen layer's own weight and return the adapter."""
        if self.merged:
            (self.layer.weight,) = self._own
            self._own = None
        return self

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if self.merged:  # move the layer's own weight too
            (own,) = self._own
            own.data = fn(own.data)
        return self

    @staticmethod
    def serves(module: nn.Module) -> bool:
        """Return whether a module is a layer that an adapter can wrap."""
        return isinstance(module, (*DENSE, LowRankLinear, *_CONVS.values())) or LowRankTransposedLinear.serves(module)

    @staticmethod
    def matrix_shape(layer: nn.Module) -> tuple[int, int]:
        """Return [m, n] of the weight of such a layer as a matrix."""
        if isinstance(layer, LowRankLayer):
            return layer.matrix_shape
        m, n = layer.weight.shape[0], math.prod(layer.weight.shape[1:])
        return (m, n) if isinstance(layer, DENSE) else (n, m)

    def extra_repr(self) -> str:
        return f"scale={self.scale:g}" + (", merged" if self.merged else "")


def _delta(layer: nn.Module, rank: float) -> LowRankLayer:
    """Return a low-rank layer of this rank with the geometry of a dense one, without bias."""
    if not LowRankAdapter.serves(layer):
        raise TypeError(
            f"LowRankAdapter: layer must be nn.Linear, nn.Conv1d/2d/3d or HF's Conv1D, got {type(layer).__name__}"
        )
    stored = layer.U if isinstance(layer, LowRankLayer) else layer.weight
    options = {"device": stored.device, "dtype": stored.dtype, "rank": rank}
    if isinstance(layer, LowRankTransposedLinear) or LowRankTransposedLinear.serves(layer):
        dense = getattr(layer, "_original", type(layer))
        delta = LowRankTransposedLinear(dense, *reversed(layer.weight.shape), **options)
        delta.bias = None
        return delta
    if isinstance(layer, (nn.Linear, LowRankLinear)):
        return LowRankLinear(layer.in_features, layer.out_features, bias=False, **options)
    low_rank = next(cls for pair in _CONVS.items() for cls in pair[1:] if isinstance(layer, pair))
    delta = low_rank(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.groups,
        bias=False,
        padding_mode=layer.padding_mode,
        **options,
    )
    is_low_rank = isinstance(layer, LowRankLayer)
    delta.channels_last = layer.channels_last if is_low_rank else delta._is_channels_last(layer.weight)
    return delta


def _own_weight(where: str, layer: nn.Module) -> nn.Parameter | None:
    """Return the layer's weight, None for a low-rank one. Raise ValueError if it, or a factor, is computed at each
    access, sharded or quantized.
    """
    for name in "USV" if isinstance(layer, LowRankLayer) else ("weight",):
        parameter = layer._parameters.get(name)
        if parameter is None:
            raise ValueError(
                f"{where}: the layer's {name} must be a parameter, got one that is computed (parametrized, pruned or"
                " normalized by a hook); make it permanent first"
            )
        if reason := not_plain(parameter):
            raise ValueError(f"{where}: the layer's {name} {reason}")
    return layer._parameters.get("weight")


def _keep_unmerged(adapter: LowRankAdapter, state: dict, prefix: str, metadata) -> None:
    if adapter.merged:
        state[prefix + "layer.weight"] = adapter._own[0].detach()


def _unmerge_first(adapter: LowRankAdapter, *_) -> None:
    adapter.unmerge()
