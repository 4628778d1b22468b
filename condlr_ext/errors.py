"""Exceptions of the package; each text names the function, the argument, what was needed and what came."""


class RankError(ValueError):
    """A rank outside 1..min(m, n)."""


class ShapeError(ValueError):
    """Tensors whose shapes do not fit together."""


class NonFiniteError(ValueError):
    """NaN or Inf where a finite matrix is needed."""


class ConvergenceError(ArithmeticError):
    """An iteration that ended without reaching its accuracy."""


class BackendError(NotImplementedError):
    """A named backend that cannot serve this op, dtype, device or shape."""


class CheckpointError(ValueError):
    """A file that cannot be read, or does not fit the model or optimizer it is loaded into."""
