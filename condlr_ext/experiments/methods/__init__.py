"""The training methods. One file each; to add one, write the class and import it here, which registers its name."""

from .base import METHODS, Method, check_runs
from .cayley import Cayley
from .condlr import CondLR
from .dense import Dense
from .dlrt import DLRT
from .projected import Projected
from .released import Released
from .robust_dlrt import RobustDLRT
from .svd_prune import SVDPrune
from .tscnc import TSCNC
from .vanilla import Vanilla

__all__ = [
    "METHODS",
    "TSCNC",
    "DLRT",
    "Cayley",
    "CondLR",
    "Dense",
    "Method",
    "Projected",
    "Released",
    "RobustDLRT",
    "SVDPrune",
    "Vanilla",
    "check_runs",
]
