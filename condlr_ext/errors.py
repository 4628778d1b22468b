"""Exceptions of the package; each text names the function, the argument, the requirement and the value."""

__all__ = [
    "BackendError",
    "CheckpointError",
    "ConvergenceError",
    "NonFiniteError",
    "RankError",
    "ShapeError",
]


class RankError(ValueError):
    """A rank outside 1..min(m, n)."""


class ShapeError(ValueError):
    """Tensors whose shapes do not fit together."""


class NonFiniteError(ValueError):
    """NaN or Inf where a finite matrix is needed."""


class ConvergenceError(ArithmeticError):
    """An iteration that stopped before reaching its accuracy."""


class BackendError(NotImplementedError):
    """A backend chosen by name that cannot serve this op, dtype, device or shape."""


class CheckpointError(ValueError):
    """A file that cannot be read, or does not fit the model or optimizer."""
