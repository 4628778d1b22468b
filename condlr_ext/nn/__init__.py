"""Low-rank layers: torch's linear, convolution and attention modules with weights W = U S Vᵀ."""

from .adapter import LowRankAdapter
from .attention import LowRankMultiheadAttention
from .conv import LowRankConv1d, LowRankConv2d, LowRankConv3d
from .layer import LowRankLayer, low_rank_layers
from .linear import LowRankLinear
from .rank import Energy
from .transposed import LowRankTransposedLinear

__all__ = [
    "Energy",
    "LowRankAdapter",
    "LowRankConv1d",
    "LowRankConv2d",
    "LowRankConv3d",
    "LowRankLayer",
    "LowRankLinear",
    "LowRankMultiheadAttention",
    "LowRankTransposedLinear",
    "low_rank_layers",
]
