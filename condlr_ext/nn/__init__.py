"""Low-rank layers: torch's linear, convolution and attention modules with weights W = U S Vᵀ."""

from .adapter import LowRankAdapter
from .attention import LowRankMultiheadAttention
from .bilinear import LowRankBilinear
from .conv import LowRankConv1d, LowRankConv2d, LowRankConv3d
from .conv_transposed import LowRankConvTranspose1d, LowRankConvTranspose2d, LowRankConvTranspose3d
from .embedding import LowRankEmbedding
from .layer import LowRankLayer, low_rank_layers
from .linear import LowRankLinear
from .rank import Energy
from .transposed import LowRankTransposedLinear

__all__ = [
    "Energy",
    "LowRankAdapter",
    "LowRankBilinear",
    "LowRankConv1d",
    "LowRankConv2d",
    "LowRankConv3d",
    "LowRankConvTranspose1d",
    "LowRankConvTranspose2d",
    "LowRankConvTranspose3d",
    "LowRankEmbedding",
    "LowRankLayer",
    "LowRankLinear",
    "LowRankMultiheadAttention",
    "LowRankTransposedLinear",
    "low_rank_layers",
]
