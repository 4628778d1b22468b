"""The C++ core on NumPy arrays (float32 or float64, any strides), through _core.so, without torch."""

import ctypes

import numpy as np

from condlr_ext._native import LIBRARY, build_info, check, cpu_features, isa, isa_levels

__all__ = [
    "build_info", "clip_spectrum", "cpu_features", "eigh", "isa", "isa_levels", "polar", "qr", "step_layer", "svd",
]  # fmt: skip

ROLES, MOMENTUM = 4, 1  # of the latter: its column of hyper


def _call(function: str, isa: str | None, dtype, *args) -> int:
    """Call a function of the core; arrays are passed by address, the last argument is the address of an int."""
    c_function, result = getattr(LIBRARY, f"condlr_{function}"), ctypes.c_int()
    c_function.restype = ctypes.c_char_p
    kinds = {int: ctypes.c_int64, float: ctypes.c_double, np.ndarray: lambda a: ctypes.c_void_p(a.ctypes.data)}
    given = [kinds.get(type(a), lambda a: a)(a) for a in args]
    name = None if isa is None else isa.encode()
    check(c_function(name, ctypes.c_int(dtype == np.float64), *given, ctypes.byref(result)))
    return result.value


def _refuse(what: str, got: np.ndarray):
    raise ValueError(f"{what}, got {got.dtype} of shape {got.shape}")


def _matrix(op: str, A: np.ndarray) -> np.ndarray:
    """Return A as the core reads it: in C order and aligned."""
    if A.ndim != 2:
        _refuse(f"{op}: A must be a matrix", A)
    if A.dtype not in (np.float32, np.float64):
        _refuse(f"{op}: A must be float32 or float64", A)
    return np.require(A, requirements=["C", "ALIGNED"])


def svd(A, isa=None):
    """A = U diag(sigma) V^T, reduced: (U, sigma, V, info)."""
    A = _matrix("svd", A)
    m, n = A.shape
    U, sigma, V = (np.empty(shape, A.dtype) for shape in ((m, min(m, n)), min(m, n), (n, min(m, n))))
    return U, sigma, V, _call("svd", isa, A.dtype, A, m, n, U, sigma, V)


def qr(A, isa=None):
    """A = Q R, reduced, diag(R) >= 0: (Q, R, info)."""
    A = _matrix("qr", A)
    m, n = A.shape
    Q, R = np.empty((m, min(m, n)), A.dtype), np.empty((min(m, n), n), A.dtype)
    return Q, R, _call("qr", isa, A.dtype, A, m, n, Q, R)


def polar(A, isa=None):
    """The orthonormal polar factor: (Q, info)."""
    A = _matrix("polar", A)
    Q = np.empty_like(A)
    return Q, _call("polar", isa, A.dtype, A, *A.shape, Q)


def clip_spectrum(A, tau, band=0, sigma_max=np.inf, isa=None):
    """A with its singular values clipped to the band: (out, info)."""
    A = _matrix("clip_spectrum", A)
    out = np.empty_like(A)
    args = float(tau), ctypes.c_int(band), float(sigma_max)
    return out, _call("clip_spectrum", isa, A.dtype, A, *A.shape, *args, out)


def eigh(A, head=None, tail=0, isa=None):
    """The eigenvalues of a symmetric A, descending, and the eigenvectors of the first head (default: all) and the last
    tail of them as rows: (lambda, V, converged). The lower half of A is read."""
    A = _matrix("eigh", A)
    n = A.shape[0]
    head = n if head is None else head
    if A.shape[1] != n:
        _refuse("eigh: A must be square", A)
    if head < 0 or tail < 0 or head + tail > n:
        raise ValueError(f"eigh: head and tail must be >= 0 and at most n = {n} together, got {head} and {tail}")
    values, V = np.empty(n, A.dtype), np.empty((head + tail, n), A.dtype)
    return values, V, bool(_call("eigh", isa, A.dtype, A, n, head, tail, values, V))


def step_layer(params, grads, momentum_buffers, hyper, isa=None):
    """One constrained SGD step of a layer: (params, momentum_buffers, skipped), new arrays.

    Arrays are those of U, S, V and bias; an empty one of any dtype stands for one that is missing.
    """
    dtype = params[0].dtype
    if dtype not in (np.float32, np.float64):
        _refuse("step_layer: U must be float32 or float64", params[0])

    def copies(arrays, name: str) -> list[np.ndarray]:
        if len(arrays) != ROLES:
            raise ValueError(f"step_layer: {name} must be the arrays of U, S, V and bias, got {len(arrays)} arrays")
        for a in arrays:
            if a.size and a.dtype != dtype:
                _refuse(f"step_layer: {name} must have the dtype of U", a)
        return [np.array(a, dtype, order="C") for a in arrays]

    params, grads = copies(params, "params"), copies(grads, "grads")
    buffers, hyper = copies(momentum_buffers, "momentum_buffers"), np.require(hyper, np.float64, ["C", "ALIGNED"])
    U, S, V, bias = params
    m, n, r = len(U), len(V), len(S)
    if U.shape != (m, r) or S.shape != (r, r) or V.shape != (n, r) or r > min(m, n):
        raise ValueError("step_layer: U, S, V must be [m, r], [r, r], [n, r] with r <= m, n")
    used = []  # gradients and buffers that the step reads
    for role, (param, grad, buffer) in enumerate(zip(params, grads, buffers, strict=True)):
        if grad.size and grad.size != param.size:
            _refuse("step_layer: grads must have the shapes of params", grad)
        needs_buffer = grad.size > 0 and hyper[role, MOMENTUM] != 0
        if needs_buffer and buffer.size != param.size:
            _refuse("step_layer: momentum_buffers must have the shapes of params", buffer)
        used.append((grad if grad.size else None, buffer if needs_buffer else None))
    rows = np.array([m, r, n, bias.size])
    pointers = [_addresses(arrays) for arrays in (params, *map(list, zip(*used, strict=True)))]
    skipped = _call("step_layer", isa, dtype, rows, r, *pointers, hyper)
    return params, buffers, bool(skipped)


def _addresses(arrays):
    return (ctypes.c_void_p * ROLES)(*(None if a is None else a.ctypes.data for a in arrays))
