"""Methods that the constrained training is compared with, in plain PyTorch."""

from .cayley import CayleySGD
from .dlrt import DLRT
from .projected import ProjectedSGD
from .released import ReleasedCondLR
from .robust_dlrt import RobustDLRT
from .truncated_svd import svd_prune
from .vanilla import TwoFactorConv, TwoFactorLinear, vanilla_low_rank

__all__ = [
    "DLRT",
    "CayleySGD",
    "ProjectedSGD",
    "ReleasedCondLR",
    "RobustDLRT",
    "TwoFactorConv",
    "TwoFactorLinear",
    "svd_prune",
    "vanilla_low_rank",
]
