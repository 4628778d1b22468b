"""low_rank_linear, low_rank_conv and their backwards by Triton kernels: sizes, strides, memory and launches.

Signatures and results are those of reference.py, but gradients that are not asked for are empty tensors.
"""

import torch
import triton
from torch import Tensor

from ....reference import is_pointwise
from .. import devices
from ..runtime import launching
from ..runtime.launching import on
from . import configs, low_rank, tuning


def low_rank_linear(input: Tensor, U: Tensor, S: Tensor, V: Tensor, bias: Tensor | None = None):
    """Return Y = X V Sᵀ Uᵀ + b and P = X V, by one launch."""
    lead = input.shape[:-1]
    Y, P = _linear(_rows(input), U, S, V, bias)
    return Y.reshape(*lead, U.shape[0]), P.reshape(*lead, U.shape[1])


def _linear(X: Tensor, U: Tensor, S: Tensor, V: Tensor, bias: Tensor | None, conv: bool = False):
    """Return low_rank_linear of a matrix X with contiguous rows."""
    P, Y = X.new_empty(X.shape[0], U.shape[1]), X.new_empty(X.shape[0], U.shape[0])
    _chain(X, V, S, U, bias, P, Y, conv)
    return Y, P


def low_rank_linear_backward(grad, input, P, U: Tensor, S: Tensor, V: Tensor, mask):
    """Return the gradients of low_rank_linear: one launch for dX and Q = G U, two for all others."""
    G = _rows(grad)
    X = None if input is None else _rows(input)
    if P is not None:
        P = _rows(P)
    dX, *others = _linear_backward(G, X, P, U, S, V, mask)
    return dX.reshape(*grad.shape[:-1], V.shape[0]) if mask[0] else dX, *others


def _linear_backward(G: Tensor, X: Tensor | None, P: Tensor | None, U, S, V, mask, conv: bool = False):
    Q, dX = None, G.new_empty(0)
    if mask[0]:
        Q, dX = G.new_empty(G.shape[0], U.shape[1]), G.new_empty(G.shape[0], V.shape[0])
        _chain(G, U, S.mT, V, None, Q, dX, conv)
    elif mask[2] or mask[3]:
        Q = G @ U
    if P is None and (mask[1] or mask[2]):
        P = X @ V
    return dX, *_factor_gradients(G, X, P, Q, U, S, V, mask, conv)


def low_rank_conv(input, U, S, V, bias, kernel_size, stride, padding, dilation, groups):
    """Return Y and P of a convolution: torch convolves with the filters of V, a launch with U S; 1x1 takes one launch.

    The activations must be channels_last, and groups 1.
    """
    rank, filters = U.shape[1], U.shape[0]
    if is_pointwise(kernel_size, stride, padding):
        Y, P = _linear(_pixels(input), U, S, V, bias, conv=True)
        space = input.shape[2:]
    else:
        P = torch.convolution(
            input, V.reshape(-1, *kernel_size, rank).movedim(-1, 0), None, stride, padding, dilation, False,
            [0] * len(kernel_size), groups,
        )  # fmt: skip
        space, P = P.shape[2:], _pixels(P)
        Y = P.new_empty(P.shape[0], filters)
        _chain(None, None, S, U, bias, P, Y, conv=True)
    return _image(Y, input.shape[0], space), _image(P, input.shape[0], space)


def low_rank_conv_backward(grad, input, P, U, S, V, mask, kernel_size, stride, padding, dilation, groups):
    """Return the gradients of low_rank_conv; torch computes those of the first convolution."""
    rank = U.shape[1]
    G, space = _pixels(grad), grad.shape[2:]
    pointwise = is_pointwise(kernel_size, stride, padding)
    geometry = (stride, padding, dilation, False, [0] * len(kernel_size), groups)
    filters = V.reshape(-1, *kernel_size, rank).movedim(-1, 0)
    if P is not None:
        P = _pixels(P)
    elif not pointwise and (mask[1] or mask[2]):
        P = _pixels(torch.convolution(input, filters, None, *geometry))
    if pointwise:
        X = None if input is None else _pixels(input)
        dX, *others = _linear_backward(G, X, P, U, S, V, mask, conv=True)
        return _image(dX, grad.shape[0], space) if mask[0] else dX, *others

    dX, dV, Q = grad.new_empty(0), grad.new_empty(0), None
    if mask[0] or mask[3]:
        Q, dP = G.new_empty(G.shape[0], rank), G.new_empty(G.shape[0], rank)
        _chain(G, U, S.mT, None, None, Q, dP, conv=True)
        dX, dfilters, _ = torch.ops.aten.convolution_backward(
            _image(dP, grad.shape[0], space), input, filters, None, *geometry, [mask[0], mask[3], False]
        )
        if mask[3]:
            dV = dfilters.movedim(0, -1).reshape(V.shape).contiguous()
        dX = dX if mask[0] else grad.new_empty(0)
    elif mask[2]:
        Q = G @ U
    mask = [False, mask[1], mask[2], False, mask[4]]
    dU, dS, _, db = _factor_gradients(G, None, P, Q, U, S, V, mask, conv=True)
    return dX, dU, dS, dV, db


def _rows(t: Tensor) -> Tensor:
    """Return t [*, k] as a matrix with contiguous rows, any number of elements apart."""
    t = t.reshape(-1, t.shape[-1])
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()


def _pixels(image: Tensor) -> Tensor:
    """Return image [B, C, *space] as a matrix with a row per pixel, a view if it is channels_last."""
    return _rows(image.movedim(1, -1))


def _image(pixels: Tensor, batch: int, space) -> Tensor:
    """Return [B, C, *space] in the memory format that torch returns: channels_last, contiguous in one dimension."""
    image = pixels.view(batch, *space, pixels.shape[1]).movedim(-1, 1)
    return image if len(space) > 1 else image.contiguous()


def precision(dtype: torch.dtype, conv: bool = False) -> str:
    """Return the input precision of tl.dot by torch's setting for products or convolutions."""
    backend = torch.backends.cudnn.conv if conv else torch.backends.cuda.matmul
    return "tf32" if dtype == torch.float32 and backend.fp32_precision == "tf32" else "ieee"


def _chain(X, V, S, U, bias, P: Tensor, Y: Tensor, conv: bool = False) -> None:
    """Set P = X V, Y = P Sᵀ Uᵀ + b. If X and V are None, P is given; if U is None, Y = P Sᵀ."""
    n_rows, r = P.shape
    if n_rows == 0:
        return
    first, last = X is not None, U is not None
    V, U = (F if F is None else _rows(F) for F in (V, U))
    bias = None if bias is None else bias.contiguous()
    n, m = V.shape[0] if first else 0, Y.shape[1]
    rank = triton.next_power_of_2(max(r, 16))
    rounding = precision(Y.dtype, conv)
    # the kernel does not read these placeholders
    X, V, U, b = (P if t is None else t for t in (X, V, U, bias))

    def launch(config: triton.Config) -> None:
        launching.launch(
            low_rank.chain, (triton.cdiv(n_rows, config.kwargs["BLOCK_B"]),),
            X, V, S, U, b, P, Y,
            n_rows, n, r, m, X.stride(0), V.stride(0), *S.stride(), U.stride(0), P.stride(0), Y.stride(0),
            FIRST=first, LAST=last, BIAS=bias is not None, RANK=rank, PRECISION=rounding, **config.all_kwargs(),
        )  # fmt: skip

    _tuned("chain", (first, last), P, rank, rounding, (n_rows, n + 1, m), launch)


def _tuned(kernel: str, kind, P: Tensor, rank: int, rounding: str, sizes, launch) -> None:
    """Launch on the device of P with the configuration for these sizes."""
    candidates = configs.of(kernel, devices.architecture(P.device), P.dtype, rank, rounding)
    with on(P.device):
        launch(tuning.fastest(P.device, (kernel, kind, P.dtype, rank, rounding), sizes, candidates, launch))


def _factor_gradients(G: Tensor, X, P, Q, U: Tensor, S: Tensor, V: Tensor, mask, conv: bool = False):
    """Return dU = (Gᵀ P) Sᵀ, dS = Qᵀ P, dV = (Xᵀ Q) S, db = Σ G; empty where the mask is false."""
    n_rows, (m, r), n = G.shape[0], U.shape, V.shape[0]
    by_U, by_S, by_V, by_bias = mask[1:]
    dU, dS, dV = (G.new_empty(t.shape if by else 0) for t, by in ((U, by_U), (S, by_S), (V, by_V)))
    db = G.new_empty(m if by_bias and by_U else 0)
    if by_bias and not by_U:
        db = G.sum(0)
    if n_rows == 0:
        return dU.zero_(), dS.zero_(), dV.zero_(), db.zero_()
    if not (by_U or by_S or by_V):
        return dU, dS, dV, db
    rank = triton.next_power_of_2(max(r, 16))
    rounding = precision(G.dtype, conv)
    widths = by_U * m, by_V * n, by_S * r
    wide = torch.float64 if G.dtype == torch.float64 else torch.float32
    X, P, Q = (G if t is None else t for t in (X, P, Q))  # placeholders

    def launch(config: triton.Config) -> None:
        block, step = config.kwargs["BLOCK_I"], config.kwargs["BLOCK_B"]
        u_tiles, v_tiles, s_tiles = (triton.cdiv(w, block) for w in widths)
        tiles = u_tiles + v_tiles + s_tiles
        # about two programs per multiprocessor, each of at least four steps
        splits = max(1, min(2 * devices.multiprocessors(G.device) // tiles, n_rows // (4 * step)))
        per_split = triton.cdiv(triton.cdiv(n_rows, step), splits) * step
        splits = triton.cdiv(n_rows, per_split)
        partial = torch.empty(splits, tiles * block, r, dtype=wide, device=G.device)
        db_partial = torch.empty(splits, m if db.numel() else 0, dtype=wide, device=G.device)
        launching.launch(
            low_rank.sums, (tiles, splits),
            G, X, P, Q, partial, db_partial,
            n_rows, m, n, r, u_tiles, v_tiles, per_split, G.stride(0), X.stride(0), P.stride(0), Q.stride(0),
            BIAS=db.numel() > 0, RANK=rank, PRECISION=rounding, **config.all_kwargs(),
        )  # fmt: skip
        (last,) = configs.of("combine", devices.architecture(G.device), G.dtype, rank, rounding)
        each = block // last.kwargs["BLOCK_I"]
        launching.launch(
            low_rank.combine, (tiles * each,),
            partial, db_partial, S, dU, dV, dS, db, m, n, r, splits, u_tiles * each, v_tiles * each, *S.stride(),
            BIAS=db.numel() > 0, RANK=rank, PRECISION=rounding if G.dtype.itemsize > 2 else "tf32", **last.all_kwargs(),
        )  # fmt: skip

    _tuned("sums", (by_U, by_V, by_S), G, rank, rounding, (n_rows, m, n), launch)
    return dU, dS, dV, db
