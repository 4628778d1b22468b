"""nn.MultiheadAttention with low-rank projections; its input projections are parameters, not modules."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..errors import ShapeError
from .linear import LowRankLinear

# parameter of nn.MultiheadAttention: name of the low-rank layer that replaces it
_PROJECTIONS = {
    "in_proj_weight": "in_proj",
    "q_proj_weight": "q_proj",
    "k_proj_weight": "k_proj",
    "v_proj_weight": "v_proj",
}


class LowRankOutProjection(LowRankLinear):
    """The low-rank twin of the class of nn.MultiheadAttention's `out_proj`."""

    _dense = NonDynamicallyQuantizableLinear


class LowRankMultiheadAttention(nn.MultiheadAttention):
    """nn.MultiheadAttention with low-rank projections: the same attributes, arguments and results.

    Queries, keys and values share a layer `in_proj` with U [3 embed_dim, r], or have `q_proj`, `k_proj` and `v_proj`
    where kdim or vdim differ from embed_dim; their biases stay in `in_proj_bias`. `in_proj_weight` and the like, which
    the fused kernel of nn.TransformerEncoderLayer reads, are computed at each access and cannot be assigned.

    `factorize` makes it from a dense one, in place, and `to_dense` undoes it; it has no constructor.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        raise TypeError("LowRankMultiheadAttention: build an nn.MultiheadAttention and factorize it")

    in_proj_weight: Tensor | None = property(lambda self: self._weight("in_proj_weight"))
    q_proj_weight: Tensor | None = property(lambda self: self._weight("q_proj_weight"))
    k_proj_weight: Tensor | None = property(lambda self: self._weight("k_proj_weight"))
    v_proj_weight: Tensor | None = property(lambda self: self._weight("v_proj_weight"))

    def _weight(self, name: str) -> Tensor | None:
        layer = self._modules.get(_PROJECTIONS[name])
        return self._parameters[name] if layer is None else layer.weight

    def __setattr__(self, name: str, value: Any) -> None:
        layer = _PROJECTIONS.get(name)
        if layer in self.__dict__.get("_modules", ()):
            raise AttributeError(
                f"LowRankMultiheadAttention.{name} is formed from the factors of {layer} and cannot be assigned"
            )
        super().__setattr__(name, value)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute attention as nn.MultiheadAttention does; each projection runs by its layer's route.

        Raises:
            ShapeError: Inputs or masks do not fit.
            ValueError: is_causal without attn_mask.
        """
        if query.is_nested:  # torch's fused kernel serves these; it reads the weights
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        if is_causal and attn_mask is None:
            raise ValueError("LowRankMultiheadAttention: is_causal is a hint about attn_mask, which is None")
        batched = query.dim() == 3
        self._check(batched, query, key, value)
        q, k, v = self._project(query, key, value)
        if not batched:
            q, k, v = (x.unsqueeze(0) for x in (q, k, v))
        elif not self.batch_first:
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        mask = self._mask(q, k, key_padding_mask, attn_mask, batched)

        extra = 0
        if self.bias_k is not None:
            k, v = (torch.cat([x, b.expand(len(x), 1, -1)], 1) for x, b in ((k, self.bias_k), (v, self.bias_v)))
            extra += 1
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))  # [B, heads, T, d]
        if self.add_zero_attn:
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
            extra += 1
        if mask is not None and extra:
            mask = F.pad(mask, (0, extra))

        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * math.sqrt(1 / q.shape[-1])) @ k.mT
            weights = F.dropout(F.softmax(scores if mask is None else scores + mask, -1), dropout, dropout > 0)
            output = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        elif is_causal and key_padding_mask is None:  # as in torch, the hint replaces the mask, also for added keys
            output = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        else:
            output = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        output = self._linear(output.transpose(1, 2).flatten(2), self.out_proj, self.out_proj.bias)
        if not batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output if self.batch_first else output.transpose(0, 1), weights

    def _check(self, batched: bool, query: Tensor, key: Tensor, value: Tensor) -> None:
        shapes = f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}"
        expected = self.embed_dim, self.kdim, self.vdim
        dims = {x.dim() for x in (query, key, value)}
        if dims not in ({2}, {3}) or tuple(x.shape[-1] for x in (query, key, value)) != expected:
            order = "[B, T" if self.batch_first else "[T, B"
            raise ShapeError(
                f"LowRankMultiheadAttention: query, key, value must be {order}, width] or [T, width] with widths"
                f" {', '.join(map(str, expected))}, got {shapes}"
            )
        batch = 0 if self.batch_first else 1
        if key.shape[:-1] != value.shape[:-1] or (batched and query.shape[batch] != key.shape[batch]):
            raise ShapeError(
                "LowRankMultiheadAttention: key and value must have one length, and all one batch size, got " + shapes
            )

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values; equal inputs share products of the packed layer."""
        b = self.in_proj_bias
        if not self._qkv_same_embed_dim:
            biases = (None,) * 3 if b is None else b.chunk(3)
            return tuple(
                self._linear(x, self._modules.get(child), c, self._parameters[name])
                for x, (name, child), c in zip((query, key, value), list(_PROJECTIONS.items())[1:], biases, strict=True)
            )
        packed, weight, e = self._modules.get("in_proj"), self._parameters["in_proj_weight"], self.embed_dim

        def part(x: Tensor, i: int, j: int) -> Tensor:
            return self._linear(x, packed, None if b is None else b[i * e : j * e], weight, slice(i * e, j * e))

        if query is key and key is value:
            return part(query, 0, 3).chunk(3, -1)
        if key is value:
            return part(query, 0, 1), *part(key, 1, 3).chunk(2, -1)
        return part(query, 0, 1), part(key, 1, 2), part(value, 2, 3)

    @staticmethod
    def _linear(x: Tensor, layer: nn.Module | None, bias, weight=None, rows: slice = slice(None)) -> Tensor:
        """Return x W[rows]ᵀ + bias for the weight of a layer, or for a plain parameter."""
        if isinstance(layer, LowRankLinear):
            return layer.apply_rows(x, rows, bias)
        return F.linear(x, (layer.weight if weight is None else weight)[rows], bias)

    def _mask(self, q: Tensor, k: Tensor, padding: Tensor | None, mask: Tensor | None, batched: bool) -> Tensor | None:
        """Return what is added to the scores, broadcastable to [B, heads, T, S]: -inf where a bool mask is True."""
        (B, T, _), S = q.shape, k.shape[1]
        total = None
        for name, given, shapes in (
            ("attn_mask", mask, [(T, S), (B * self.num_heads, T, S)]),
            ("key_padding_mask", padding, [(B, S) if batched else (S,)]),
        ):
            if given is None:
                continue
            if tuple(given.shape) not in shapes:
                expected = " or ".join(str(list(shape)) for shape in shapes)
                raise ShapeError(f"LowRankMultiheadAttention: {name} must be {expected}, got {list(given.shape)}")
            if given.dtype == torch.bool:
                given = torch.zeros_like(given, dtype=q.dtype).masked_fill_(given, -math.inf)
            elif not given.is_floating_point():
                raise TypeError(f"LowRankMultiheadAttention: {name} must be of bools or floats, got {given.dtype}")
            given = given.to(q.dtype)
            if name == "key_padding_mask":
                given = given.reshape(B, 1, 1, S)
            elif given.dim() == 3:
                given = given.reshape(B, self.num_heads, T, S)
            total = given if total is None else total + given
        return total


def dense_projections(attention: nn.MultiheadAttention) -> dict[str, nn.Linear]:
    """Return a linear layer over each dense input projection, by the name of the low-rank layer to come.

    The layers hold the attention's own parameters.
    """
    layers = {}
    for name, child in _PROJECTIONS.items():
        weight = attention._parameters.get(name)
        if weight is not None:
            layers[child] = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=weight.dtype)
            layers[child].weight = weight
            layers[child].train(attention.training)
    return layers


def factorize_projection(attention: nn.MultiheadAttention, child: str, layer: LowRankLinear) -> None:
    """Replace the projection of this name by a low-rank layer, in place."""
    attention.__class__ = LowRankMultiheadAttention
    for name in _PROJECTIONS:
        if _PROJECTIONS[name] == child:
            attention._parameters[name] = None  # keeps torch's order of parameters for to_dense
    attention._modules[child] = layer


def to_dense_projections(attention: LowRankMultiheadAttention, dense: dict[nn.Module, nn.Module]) -> None:
    """Turn the module back into nn.MultiheadAttention, in place; `dense` maps low-rank layers to their dense twins."""
    for name, child in _PROJECTIONS.items():
        layer = attention._modules.pop(child, None)
        if layer is not None:
            attention._parameters[name] = dense[layer].weight
    attention._modules["out_proj"] = dense.get(attention.out_proj, attention.out_proj)
    attention.__class__ = nn.MultiheadAttention
