"""SGD on the Stiefel manifold by projection."""

from ...baselines import ProjectedSGD
from .cayley import Stiefel


class Projected(Stiefel):
    name = "projected"
    title = "projected SGD"
    sgd = ProjectedSGD
