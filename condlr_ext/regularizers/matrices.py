"""One matrix per layer with the spectrum of its weight, and sums of penalties over matrices, batched by shape."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from .. import ops
from .._modules import DENSE, select_layers
from ..errors import NonFiniteError, ShapeError
from ..nn import LowRankLayer

Matrices = nn.Module | Tensor | Mapping[str, Tensor] | Iterable[Tensor]


def layer_matrices(model: nn.Module, exclude: str | Iterable[str] = ()) -> dict[str, Tensor]:
    """Return for each layer a matrix with the singular values of its weight, differentiable.

    For a low-rank layer that is its core S [r, r] (U and V are orthonormal under the optimizers here); each direction
    that a RankController holds in reserve has the root mean square of the others. For nn.Linear and nn.Conv it is the
    weight flattened to [m, n], for a convolution [C_out, C_in / groups * kernel].

    Args:
        model: Any module.
        exclude: Layer names or fnmatch patterns to leave out, such as the classifier.

    Returns:
        {layer name: matrix}.

    Raises:
        TypeError: model is no module.
        ValueError: A pattern matches no layer, or no layer is left.
    """
    layers = select_layers("layer_matrices", model, (LowRankLayer, *DENSE), exclude)
    return {
        name: _core(layer) if isinstance(layer, LowRankLayer) else layer.weight.flatten(1)
        for name, layer in layers.items()
    }


def _core(layer: LowRankLayer) -> Tensor:
    """Return S with the rms of its singular values on the diagonal of unused directions (RankController's reserve).

    The rms is at most σ₁ and changes neither value nor gradient of penalties on unequal σ; the shape of S stays.
    """
    S = layer.S
    with torch.no_grad():
        used = layer.U.any(0) | layer.V.any(0) | S.any(0) | S.any(1)
        used = used.flip(0).cumsum(0).flip(0) > 0  # up to the last one, as in nn.layer.active_rank
        peak = S.abs().amax()
    scaled = S.to(torch.promote_types(S.dtype, torch.float32)) / torch.where(peak > 0, peak, 1)
    mean = scaled.square().sum() / used.sum().clamp_min(1)
    rms = torch.where(mean > 0, mean, 1).sqrt() * (mean > 0) * peak
    return torch.where(used[:, None] & used, S, torch.where(used, 0, rms).to(S.dtype).diag())


def sum_penalty(
    caller: str, matrices: Matrices, penalty: Callable[[Tensor], Tensor], *, transposable: bool = True
) -> Tensor:
    """Sum penalty([k, m, n]) -> [k] over all matrices, in one batch per shape.

    The penalty runs in at least float32 and without autocast.

    Args:
        caller: Name of the function, for errors.
        matrices: As in log_volume.
        penalty: The penalty of each matrix.
        transposable: A and Aᵀ have the same penalty, which then only sees m >= n.

    Raises:
        TypeError: A matrix is no real floating-point tensor.
        ShapeError: A matrix is empty or not [*, m, n].
        ValueError: No matrices.
        NonFiniteError: A penalty is not finite; names the matrix on CPUs.
    """
    batches: dict[tuple, list[tuple[str, Tensor]]] = {}
    for name, A in _check_and_name(caller, matrices):
        A = A.mT if transposable and A.shape[-2] < A.shape[-1] else A
        A = A.to(torch.promote_types(A.dtype, torch.float32)).reshape(-1, *A.shape[-2:])
        batches.setdefault((A.shape[1:], A.dtype, A.device), []).append((name, A))
    sums = []
    for (_, _, device), members in batches.items():
        batch = torch.cat([A for _, A in members])
        with ops.no_autocast(device.type):
            try:
                values = penalty(batch)
            except NonFiniteError:
                values = torch.cat([_or_nan(penalty, A) for A in batch.split(1)])
        if ops.can_check(values) and not torch.isfinite(values).all():
            finite = torch.isfinite(values).split([len(A) for _, A in members])
            bad = [name for (name, _), ok in zip(members, finite, strict=True) if not ok.all()]
            raise NonFiniteError(f"{caller}: the penalty of {', '.join(bad)} is not finite")
        sums.append(values.sum())
    return torch.stack([s.to(sums[0]) for s in sums]).sum()


def _or_nan(penalty: Callable[[Tensor], Tensor], A: Tensor) -> Tensor:
    """Return the penalty [1] of a batch of one, NaN where it is refused."""
    try:
        return penalty(A)
    except NonFiniteError:
        return A.new_full((1,), torch.nan)


def _check_and_name(caller: str, matrices: Matrices) -> list[tuple[str, Tensor]]:
    if isinstance(matrices, nn.Module):
        matrices = layer_matrices(matrices)
    elif isinstance(matrices, Tensor):
        matrices = {"the matrix": matrices}
    elif not isinstance(matrices, Mapping):
        matrices = {f"matrix {i}": A for i, A in enumerate(matrices)}
    if not matrices:
        raise ValueError(f"{caller}: matrices must hold at least one matrix, got none")
    for name, A in matrices.items():
        if not isinstance(A, Tensor) or not A.is_floating_point():
            got = A.dtype if isinstance(A, Tensor) else type(A).__name__
            raise TypeError(f"{caller}: {name} must be a real floating-point tensor, got {got}")
        if A.dim() < 2 or A.numel() == 0:
            raise ShapeError(f"{caller}: {name} must be [*, m, n] and not empty, got shape {list(A.shape)}")
    return list(matrices.items())
