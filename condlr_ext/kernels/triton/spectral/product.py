"""Batched products of small matrices, in full precision whatever torch's tf32 setting: the kernel and its launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import devices
from ..devices import INTERPRETED
from ..runtime.cooperative import split_program_id
from ..runtime.launching import launch

# modes: leave out alone, out = C, out = the product + C, out = the product
KEEP, REPLACE, CORRECT, REBUILD = map(tl.constexpr, range(4))


@triton.jit
def multiply(
    X_ptr, Y_ptr, C_ptr, weight_ptr, mode_ptr, out_ptr, m, n, k, alpha, beta, gamma,
    x_batch, x_row, x_col, y_batch, y_row, y_col, c_batch, c_row, c_col, o_batch, o_row, o_col,
    ADD: tl.constexpr, WEIGHTED: tl.constexpr, MODE: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Set out [m, n] = alpha X diag(weight) Y + beta C + gamma I, one tile per program; grid: batch * tiles.

    ADD: C is given. WEIGHTED: weight [batch, k] is given. MODE: mode [batch] chooses between KEEP, REPLACE, CORRECT and
    REBUILD; Inf and NaN of C are copied. WIDE: sums are in float64.
    """
    tiles = tl.cdiv(n, BLOCK_N)
    tile, batch = split_program_id(tl.cdiv(m, BLOCK_M) * tiles)
    dtype = tl.float64 if WIDE else X_ptr.dtype.element_ty
    row = (tile // tiles * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    col = (tile % tiles * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    inside = (row < m)[:, None] & (col < n)[None, :]
    X_ptr += batch * x_batch + row[:, None] * x_row
    Y_ptr += batch * y_batch + col[None, :] * y_col
    mode = tl.load(mode_ptr + batch) if MODE else CORRECT
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype)
    if (mode == CORRECT) | (mode == REBUILD):
        for begin in range(0, k, BLOCK_K):
            inner = (begin + tl.arange(0, BLOCK_K)).to(tl.int64)
            x = tl.load(X_ptr + inner[None, :] * x_col, mask=(row < m)[:, None] & (inner < k)[None, :], other=0.0)
            y = tl.load(Y_ptr + inner[:, None] * y_row, mask=(inner < k)[:, None] & (col < n)[None, :], other=0.0)
            if WEIGHTED:
                x *= tl.load(weight_ptr + batch * k + inner, mask=inner < k, other=0.0)[None, :]
            acc = tl.dot(x.to(dtype), y.to(dtype), acc, input_precision="ieee", out_dtype=dtype)
        acc = tl.cast(alpha, dtype) * acc + tl.where(row[:, None] == col[None, :], tl.cast(gamma, dtype), 0.0)
    if ADD and mode != REBUILD:
        c_ptrs = C_ptr + batch * c_batch + row[:, None] * c_row + col[None, :] * c_col
        acc += tl.cast(beta, dtype) * tl.load(c_ptrs, mask=inside, other=0.0).to(dtype)
    out = out_ptr + batch * o_batch + row[:, None] * o_row + col[None, :] * o_col
    if mode != KEEP:
        tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=inside)


def product(
    X: Tensor,
    Y: Tensor,
    out: Tensor,
    *,
    C: Tensor | None = None,
    weight=None,
    mode=None,
    alpha=1.0,
    beta=1.0,
    gamma=0.0,
    wide=False,
) -> Tensor:
    """Compute out = alpha X diag(weight) Y + beta C + gamma I for X [batch, m, k], Y [batch, k, n], of any strides.

    weight [batch, k] contiguous, mode [batch] int32, wide: see `multiply`.
    """
    batch, m, k = X.shape
    n = Y.shape[-1]
    tile = config(devices.architecture(X.device), torch.float64 if wide else X.dtype)
    launch(
        multiply, (batch * triton.cdiv(m, tile["BLOCK_M"]) * triton.cdiv(n, tile["BLOCK_N"]),),
        X, Y, X if C is None else C, X if weight is None else weight, X if mode is None else mode, out, m, n, k,
        alpha, beta, gamma, *X.stride(), *Y.stride(), *(X if C is None else C).stride(), *out.stride(),
        ADD=C is not None, WEIGHTED=weight is not None, MODE=mode is not None, WIDE=wide, **tile,
    )  # fmt: skip
    return out


def config(architecture: str, dtype: torch.dtype) -> dict:
    """Return tiles whose operands fit in the registers of 8 warps, or large ones for the interpreter."""
    if INTERPRETED:
        return dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=128)
    side = 32 if dtype == torch.float64 else 64
    options = dict(BLOCK_M=side, BLOCK_N=side, BLOCK_K=16, num_warps=8, num_stages=2)
    return options if architecture == "gfx942" else options | dict(maxnreg=255)  # ptxas spills before it takes them


def variants(architecture: str):
    """Yield what to compile ahead of time: (kernel, signature types, constexprs, options, is a default)."""
    pointers = ("X_ptr", "Y_ptr", "C_ptr", "weight_ptr", "out_ptr")
    scalars = {name: "i32" for name in multiply.arg_names if name.islower() and name != "mode_ptr"}
    scalars |= {"mode_ptr": "*i32"} | dict.fromkeys(("alpha", "beta", "gamma"), "fp32")
    plain, masked = (False, False, False), (False, False, True)
    added, clipped = (True, False, False), (True, True, True)
    listed = [("fp32", "fp32", flags, False) for flags in (plain, added, masked, (True, False, True), clipped)]
    listed += [("fp64", "fp64", flags, False) for flags in (plain, added)] + [("fp64", "fp32", clipped, False)]
    listed += [("fp64", "fp32", masked, False), ("fp32", "fp32", masked, True), ("fp32", "fp64", plain, True)]
    for operands, result, (add, weighted, mode), wide in listed:
        types = scalars | dict.fromkeys(pointers, f"*{operands}") | {"out_ptr": f"*{result}"}
        if (operands, result, add) == ("fp64", "fp32", True):
            types["C_ptr"] = "*fp32"
        options = config(architecture, torch.float64 if wide or operands == "fp64" else torch.float32)
        tile = {key: options.pop(key) for key in ("BLOCK_M", "BLOCK_N", "BLOCK_K")}
        yield multiply, types, tile | dict(ADD=add, WEIGHTED=weighted, MODE=mode, WIDE=wide), options, True
