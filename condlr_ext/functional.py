"""Functional forms of the low-rank layers: argument checks, autocast, choice of route, then autograd."""

import numbers
from collections.abc import Callable
from functools import partial

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from . import autograd, ops, reference
from ._types import Ints
from .errors import BackendError, RankError, ShapeError

__all__ = ["low_rank_conv1d", "low_rank_conv2d", "low_rank_conv3d", "low_rank_linear"]

for _name in __all__:
    torch.fx.wrap(_name)  # one node of a symbolic trace, where no shapes are known


def low_rank_linear(
    input: Tensor, U: Tensor, S: Tensor, V: Tensor, bias: Tensor | None = None, *, route: str = "auto"
) -> Tensor:
    """Apply the linear layer with weight W = U S Vᵀ: Y = X V Sᵀ Uᵀ + b.

    For B rows the factorized route costs 2 B r (m + n) + min(B, m) 2 r² flops and saves X and P = X V for backward,
    beside the factors, and where torch's products serve it P Sᵀ or U S; the merged route costs 2 B m n + 2 m n r and
    saves X and W.

    Args:
        input: X [*, n], of the same dtype and device as the factors.
        U: [m, r].
        S: [r, r].
        V: [n, r], r <= min(m, n).
        bias: b [m] or None.
        route: "factorized" (thin products, W is never formed), "merged" (W is formed once, then the dense product) or
            "auto", the cheaper for these sizes by the cost model of ops.cost_model_cpu.

    Returns:
        Y [*, m].

    Raises:
        ShapeError: Shapes do not fit together.
        RankError: r > min(m, n).
        TypeError: Mixed dtypes.
        ValueError: Mixed devices or an unknown route.

    Source:
        Savostianova et al., NeurIPS 2023, section 3.
    """
    args = linear_arguments(input, U, S, V, bias)
    return linear_products(route, *args)(*args)


def linear_products(route: str, *args) -> Callable[..., Tensor]:
    """Return the function of these arguments, of linear_arguments, that computes the layer the fastest."""
    check_route("low_rank_linear", route)
    input, U, *_ = args
    kernels = _kernels(ops.layers.low_rank_linear, ops.layers.is_served, args)
    if route == "auto":
        route = ops.cost_model_cpu.choose(ops.cost_model_cpu.linear, *args)
    if route == "merged":
        return reference.merged_linear
    products = reference.folded_linear if reference.folds(input, U) else reference.thin_linear
    if kernels is None:
        return products
    return partial(_by_kernels, autograd.LowRankLinearFunction, ops.layers.low_rank_linear, kernels, products)


def linear_arguments(input, U, S, V, bias) -> tuple:
    """Return the arguments of the ops: tensors checked, and cast where autocast is on."""
    if not _fast_path_ok(input, U, S, V, bias):
        input, U, S, V, bias = _check_and_cast("low_rank_linear", input, U, S, V, bias)
    if input.dim() == 0 or input.shape[-1] != V.shape[0]:
        raise ShapeError(
            f"low_rank_linear: input must be [*, {V.shape[0]}] to fit V {list(V.shape)}, got {list(input.shape)}"
        )
    return input, U, S, V, bias


def low_rank_conv1d(
    input: Tensor,
    U: Tensor,
    S: Tensor,
    V: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints | str = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    kernel_size: Ints,
    route: str = "auto",
) -> Tensor:
    """Convolve over [B, C_in, L] or [C_in, L]; see low_rank_conv2d."""
    return _conv(1, input, U, S, V, bias, stride, padding, dilation, groups, kernel_size, route)


def low_rank_conv2d(
    input: Tensor,
    U: Tensor,
    S: Tensor,
    V: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints | str = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    kernel_size: Ints,
    route: str = "auto",
) -> Tensor:
    """Convolve with the weight that is W = U S Vᵀ when flattened to [C_out, C_in / groups * prod(kernel_size)].

    The factorized route convolves with the r filters in V, then pointwise with U S; the merged route convolves with W.

    Args:
        input: [B, C_in, H, W] or [C_in, H, W].
        U: [C_out, r].
        S: [r, r].
        V: [C_in / groups * prod(kernel_size), r], rows in the order of weight.flatten(1).
        bias: [C_out] or None.
        stride: As in torch.nn.functional.conv2d.
        padding: Likewise; ints, "valid" or "same".
        dilation: Likewise.
        groups: Likewise; the groups share the filters in V.
        kernel_size: An int, or one per space dimension.
        route: "auto", "factorized" or "merged", see low_rank_linear.

    Returns:
        [B, C_out, H', W'], or without B.

    Raises:
        ShapeError: Shapes do not fit together.
        RankError: The rank exceeds a dimension of W.
        TypeError: Mixed dtypes.
        ValueError: Mixed devices, bad geometry or an unknown route.
    """
    return _conv(2, input, U, S, V, bias, stride, padding, dilation, groups, kernel_size, route)


def low_rank_conv3d(
    input: Tensor,
    U: Tensor,
    S: Tensor,
    V: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints | str = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    kernel_size: Ints,
    route: str = "auto",
) -> Tensor:
    """Convolve over [B, C_in, D, H, W] or [C_in, D, H, W]; see low_rank_conv2d."""
    return _conv(3, input, U, S, V, bias, stride, padding, dilation, groups, kernel_size, route)


def same_padding(kernel_size, dilation) -> list[int]:
    """Return the amounts of padding="same" in the order of F.pad: pairs, last dimension first."""
    pads = []
    for k, d in zip(reversed(kernel_size), reversed(dilation), strict=True):
        total = d * (k - 1)
        pads += [total // 2, total - total // 2]
    return pads


def conv_arguments(name, d, input, U, S, V, bias, stride, padding, dilation, groups, kernel_size) -> tuple:
    """Return the arguments of the ops: tensors as in linear_arguments, the input batched, lists of d ints."""
    if not _fast_path_ok(input, U, S, V, bias):
        input, U, S, V, bias = _check_and_cast(name, input, U, S, V, bias)
    kernel_size = as_ints(name, "kernel_size", kernel_size, d, 1)
    stride = as_ints(name, "stride", stride, d, 1)
    dilation = as_ints(name, "dilation", dilation, d, 1)
    if not isinstance(groups, int) or groups < 1 or U.shape[0] % groups:
        raise ValueError(f"{name}: groups must be a positive divisor of C_out = {U.shape[0]}, got {groups!r}")
    taps = 1
    for k in kernel_size:
        taps *= k
    channels = V.shape[0] // taps * groups
    if V.shape[0] % taps:
        raise ShapeError(f"{name}: V must have a multiple of prod(kernel_size) = {taps} rows, got V {list(V.shape)}")
    if input.dim() not in (d + 1, d + 2) or input.shape[-d - 1] != channels:
        raise ShapeError(
            f"{name}: input must have {d + 1} or {d + 2} dimensions with {channels} channels to fit V {list(V.shape)},"
            f" kernel_size {tuple(kernel_size)} and groups {groups}, got {list(input.shape)}"
        )
    batched = input if input.dim() == d + 2 else input.unsqueeze(0)
    if isinstance(padding, str):
        batched, padding = _string_padding(name, batched, padding, kernel_size, stride, dilation)
    padding = as_ints(name, "padding", padding, d, 0)
    for size, k, p, dl in zip(batched.shape[2:], kernel_size, padding, dilation, strict=True):
        if size + 2 * p < dl * (k - 1) + 1:
            raise ShapeError(
                f"{name}: input {list(input.shape)} with padding {tuple(padding)} is smaller than the kernel"
                f" {tuple(kernel_size)} with dilation {tuple(dilation)}"
            )
    return batched, U, S, V, bias, kernel_size, stride, padding, dilation, groups


def _conv(d, input, U, S, V, bias, stride, padding, dilation, groups, kernel_size, route) -> Tensor:
    name = f"low_rank_conv{d}d"
    args = conv_arguments(name, d, input, U, S, V, bias, stride, padding, dilation, groups, kernel_size)
    output = conv_products(route, *args)(*args)
    return output if input.dim() == d + 2 else output.squeeze(0)


def conv_products(route: str, *args) -> Callable[..., Tensor]:
    """Return the function of these arguments, of conv_arguments, that computes the layer the fastest."""
    check_route(f"low_rank_conv{len(args[5])}d", route)
    kernels = _kernels(ops.layers.low_rank_conv, None, args)
    if route == "auto":
        route = ops.cost_model_cpu.choose(ops.cost_model_cpu.conv, *args)
    if route == "merged":
        return reference.merged_conv
    if kernels is None:
        return reference.folded_conv
    return partial(_by_kernels, autograd.LowRankConvFunction, ops.layers.low_rank_conv, kernels, reference.folded_conv)


def check_route(name: str, route: str) -> str:
    """Return the route; raise ValueError if it is none of ops.cost_model_cpu.ROUTES."""
    if route not in ops.cost_model_cpu.ROUTES:
        raise ValueError(f"{name}: route must be one of {', '.join(ops.cost_model_cpu.ROUTES)}, got {route!r}")
    return route


def _kernels(op: ops.Op, is_served: Callable[..., bool] | None, args: tuple) -> str | None:
    """Return the backend whose own kernels serve a factorized layer faster than torch's products, None if none does.

    is_served says so of the compiled kernels; None where there are none.
    """
    input, U, *_ = args
    if needs_products():
        return None
    if input.is_cpu and ops.current_backend() in ("auto", "cpu"):
        return "cpu" if is_served and is_served(input, U) else None
    backend = op.choose(*args)
    return None if backend == "reference" else backend


def _by_kernels(function: type[torch.autograd.Function], op: ops.Op, backend: str, products: Callable, *args) -> Tensor:
    """Apply the function, unless only torch's own products will do, as in a later call of a layer."""
    if needs_products():
        return products(*args)
    return function.apply(backend, *args) if torch.is_grad_enabled() else op.run(backend, *args)[0]


def needs_products() -> bool:
    """Return whether only torch's own products will do: under transforms, FLOP counting, tracing and export."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing() or transformed() or _counted()


def _counted() -> bool:
    """Return whether torch's FlopCounterMode is active, which counts only torch's own products."""
    if torch.compiler.is_compiling() or not torch._C._len_torch_dispatch_stack():
        return False
    return any(type(mode).__module__ == "torch.utils.flop_counter" for mode in _get_current_dispatch_mode_stack())


def transformed() -> bool:
    """Return whether torch.func or forward-mode AD is active; only plain products have all their rules.

    Raises:
        BackendError: The backend "triton" was chosen by name.
    """
    active = ops.transforms_active()
    if active and ops.current_backend() == "triton":
        raise BackendError(
            "condlr_ext: backend 'triton' cannot serve a layer under torch.func or forward-mode AD, which take the"
            " reference path; use backend 'auto' there"
        )
    return active


def _string_padding(name, input, padding, kernel_size, stride, dilation):
    if padding == "valid":
        return input, 0
    if padding != "same":
        raise ValueError(f'{name}: padding must be ints, "valid" or "same", got {padding!r}')
    if any(s != 1 for s in stride):
        raise ValueError(f'{name}: padding="same" needs stride 1, got stride {tuple(stride)}')
    pads = same_padding(kernel_size, dilation)
    if pads[::2] == pads[1::2]:
        return input, pads[::2][::-1]
    return F.pad(input, pads), 0


def as_ints(name: str, what: str, value, d: int, least: int) -> list[int]:
    """Return d ints >= least from an int or a sequence; raise ValueError for anything else."""
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    if len(values) == 1:
        values *= d
    if len(values) != d or not all(isinstance(v, numbers.Integral) and v >= least for v in values):
        raise ValueError(f"{name}: {what} must be an int or {d} ints >= {least}, got {value!r}")
    return [int(v) for v in values]


def _fast_path_ok(input, U, S, V, bias) -> bool:
    """Return whether _check_and_cast would change and refuse nothing; cheap enough for every call."""
    try:
        (m, r), (n, columns), dtype, device = U.shape, V.shape, U.dtype, U.device
        return (
            columns == r
            and S.shape == (r, r)
            and 1 <= r <= m
            and r <= n
            and dtype.is_floating_point
            and input.dtype is S.dtype is V.dtype is dtype
            and input.device == S.device == V.device == device
            and (bias is None or (bias.shape == (m,) and bias.dtype is dtype and bias.device == device))
            and not ops.autocast_enabled(device.type)
        )
    except (AttributeError, ValueError):
        return False


def _check_and_cast(name: str, input: Tensor, U: Tensor, S: Tensor, V: Tensor, bias: Tensor | None):
    """Check that the tensors fit together and return them, cast where autocast is on."""
    tensors = {"input": input, "U": U, "S": S, "V": V, "bias": bias}
    tensors = {k: t for k, t in tensors.items() if t is not None or k != "bias"}
    for key, t in tensors.items():
        if not isinstance(t, Tensor) or not t.is_floating_point():
            got = t.dtype if isinstance(t, Tensor) else type(t).__name__
            raise TypeError(f"{name}: {key} must be a real floating-point tensor, got {got}")
    if any(tensors[k].dim() != 2 for k in "USV"):
        raise ShapeError(f"{name}: U, S, V must be matrices, got {_shapes(tensors)}")
    (m, r), n = U.shape, V.shape[0]
    if S.shape != (r, r) or V.shape[1] != r:
        raise ShapeError(f"{name}: U [m, r], S [r, r], V [n, r] must share r, got {_shapes(tensors)}")
    if not 1 <= r <= min(m, n):
        raise RankError(f"{name}: rank must be in 1..min(m, n) = {min(m, n)}, got {r} ({_shapes(tensors)})")
    if bias is not None and bias.shape != (m,):
        raise ShapeError(f"{name}: bias must be [{m}] to fit U, got {list(bias.shape)}")
    tensors = cast_alike(name, tensors)
    return *(tensors[k] for k in ("input", "U", "S", "V")), tensors.get("bias")


def cast_alike(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors, cast where autocast is on; raise unless they have one device and one dtype then."""
    devices = {str(t.device) for t in tensors.values()}
    if len(devices) > 1:
        raise ValueError(f"{name}: all tensors must be on one device, got {', '.join(sorted(devices))}")
    device_type = next(iter(tensors.values())).device.type
    if ops.autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        tensors = {k: t if t.dtype == torch.float64 else t.to(dtype) for k, t in tensors.items()}
    dtypes = {str(t.dtype) for t in tensors.values()}
    if len(dtypes) > 1:
        detail = ", ".join(f"{k} {t.dtype}" for k, t in tensors.items())
        raise TypeError(f"{name}: all tensors must have one dtype, got {detail}")
    return tensors


def _shapes(tensors) -> str:
    return ", ".join(f"{k} {list(t.shape)}" for k, t in tensors.items() if k in "USV")
