"""Every benchmarked operation."""

from . import configurations, inference, layers, linear_algebra, routes, scaling, steps, training

OPERATIONS = (
    *linear_algebra.OPERATIONS,
    *layers.OPERATIONS,
    *steps.OPERATIONS,
    *training.OPERATIONS,
    *inference.OPERATIONS,
    *scaling.OPERATIONS,
    *routes.OPERATIONS,
    *configurations.OPERATIONS,
)
