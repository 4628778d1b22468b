"""Status codes that svd, qr, polar and clip_spectrum return for each matrix in `info`, as in csrc/core/info.h."""

OK, NOT_CONVERGED, NOT_FINITE, ALL_ZERO = range(4)
