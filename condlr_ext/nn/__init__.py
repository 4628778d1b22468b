"""Low-rank layers: torch's linear and convolution modules with weight W = U S Vᵀ."""

from .conv import LowRankConv1d, LowRankConv2d, LowRankConv3d
from .layer import LowRankLayer
from .linear import LowRankLinear

__all__ = [
    "LowRankConv1d",
    "LowRankConv2d",
    "LowRankConv3d",
    "LowRankLayer",
    "LowRankLinear",
]
