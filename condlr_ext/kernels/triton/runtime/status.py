"""The status codes as constants of kernels."""

import triton.language as tl

from ... import status

OK, NOT_CONVERGED = tl.constexpr(status.OK), tl.constexpr(status.NOT_CONVERGED)
NOT_FINITE, ALL_ZERO = tl.constexpr(status.NOT_FINITE), tl.constexpr(status.ALL_ZERO)
