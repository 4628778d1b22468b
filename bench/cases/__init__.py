"""The registry: every benchmarked operation."""

from . import inference, layers, linear_algebra, scaling, steps, training

OPERATIONS = (
    *linear_algebra.OPERATIONS,
    *layers.OPERATIONS,
    *steps.OPERATIONS,
    *training.OPERATIONS,
    *inference.OPERATIONS,
    *scaling.OPERATIONS,
)
