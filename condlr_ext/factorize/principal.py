"""Principal directions of a layer's inputs, as the start of its row space."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import linalg
from ..errors import NonFiniteError
from ..functional import same_padding
from ..nn.truncated import truncated_svd
from ..reference import magnitude
from .example import run_example
from .selection import Target

ENTRIES = 2**24  # entries of inputs or patches held in float64 at a time


def second_moments(model: nn.Module, targets: list[Target], example_input) -> dict[str, Tensor]:
    """Return Σ z zᵀ [n, n], float64, up to a factor, over all inputs z of each target and its twins on the example.

    For a convolution z is a patch in the order of weight.flatten(1), those of all groups together. Layers with zero or
    no inputs are missing, and so are attentions' output projections, whose inputs hooks cannot see.

    Raises:
        ValueError: The model is on the meta device or fails on the example.
        NonFiniteError: NaN or Inf among the inputs.
    """
    moments: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}  # of the first inputs that are not zero: squares of scaled ones stay in range
    owner = {t.name: target.name for target in targets for t in (target, *target.twins)}

    def add(target: Target, z: Tensor) -> None:
        z, name = z.detach().reshape(-1, target.shape[1]), owner[target.name]
        for part in z.split(max(1, ENTRIES // target.shape[1])):
            part = part.double()
            if name not in scales and (part.is_meta or part.any()):
                scales[name] = magnitude(part)
            part = part / scales.get(name, 1)
            moments[name] = moments.get(name, 0) + part.mT @ part

    def on_layer(target: Target, x: Tensor, output: Tensor) -> None:
        conv = target.module
        if not target.cls._takes_features:
            return
        if not hasattr(conv, "kernel_size"):
            return add(target, x)
        spatial = len(conv.kernel_size)
        if conv.transposed:
            return add(target, channels(conv, x))
        entries = math.prod(output.shape[-spatial:]) * conv.groups * target.shape[1]  # of one sample's patches
        x = x.detach() if x.dim() == spatial + 2 else x.detach()[None]
        for part in x.split(max(1, ENTRIES // entries)):
            add(target, patches(conv, part.double()))  # float32 convolutions may round to tf32

    def on_attention(projections: dict[str, Target], attention: nn.MultiheadAttention, inputs) -> None:
        seen = dict(zip(("q_proj", "k_proj", "v_proj"), inputs, strict=True))
        for child, target in projections.items():
            for x in inputs if child == "in_proj" else [seen[child]] if child in seen else []:
                add(target, x)

    with torch.no_grad():
        run_example(model, targets, example_input, on_layer, on_attention)
    for name, moment in moments.items():
        if moment.is_meta:
            raise ValueError(f'factorize: layer {name}: init="pca" needs real weights and inputs, got the meta device')
        if not torch.isfinite(moment).all():
            raise NonFiniteError(f"factorize: layer {name}: its inputs on example_input must be finite, got NaN or Inf")
    return {name: moment for name, moment in moments.items() if moment.trace() > 0}


def channels(conv: nn.Module, x: Tensor) -> Tensor:
    """Return the channels of each pixel, with zeros for those of other groups, [*, C_in]: what V of a transposed
    convolution multiplies.
    """
    z = x.detach().movedim(-len(conv.kernel_size) - 1, -1).unsqueeze(-2)
    group = torch.arange(z.shape[-1], device=z.device) // (z.shape[-1] // conv.groups)
    return z * (group == torch.arange(conv.groups, device=z.device)[:, None])


def patches(conv: nn.Module, x: Tensor) -> Tensor:
    """Return the patches of images x [B, C_in, ...] that a convolution multiplies its flattened weight with, [*, n]."""
    spatial, n, padding = len(conv.kernel_size), conv.weight[0].numel(), conv.padding
    if padding == "valid":
        padding = 0
    elif padding == "same" or conv.padding_mode != "zeros":
        pads = same_padding(conv.kernel_size, conv.dilation) if padding == "same" else None
        pads = pads or [p for p in reversed(padding) for _ in range(2)]
        x, padding = F.pad(x, pads, mode="constant" if conv.padding_mode == "zeros" else conv.padding_mode), 0
    one_hot = torch.eye(n, dtype=x.dtype, device=x.device).view(n, -1, *conv.kernel_size)
    x = x.reshape(-1, one_hot.shape[1], *x.shape[2:])  # treat groups as samples
    convolve = (F.conv1d, F.conv2d, F.conv3d)[spatial - 1]
    return convolve(x, one_hot, None, conv.stride, padding, conv.dilation).flatten(2).mT.reshape(-1, n)


def leading_directions(moment: Tensor, W: Tensor, rank: int) -> Tensor:
    """Return the r leading eigenvectors of the second moment [n, n], whose span holds the largest share of Σ |z|².

    Where the inputs span fewer than r dimensions, leading right singular vectors of W [m, n] on the rest complete them.

    Source:
        PCA of the inputs of trained layers: Ashkboos et al., SliceGPT, ICLR 2024 (arXiv 2401.15024).
    """
    leading, eigenvalues, _ = truncated_svd(moment, rank)
    leading = leading[:, eigenvalues > eigenvalues[0] * len(moment) * torch.finfo(moment.dtype).eps]
    missing = rank - leading.shape[1]
    if missing == 0:
        return leading
    W = W.to(moment)
    others = truncated_svd(W - W @ leading @ leading.mT, missing)[2]
    return linalg.orthonormalize(torch.cat([leading, others], 1))
