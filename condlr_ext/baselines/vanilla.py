"""Plain low-rank layers W = A B, two unconstrained factors for any optimiser."""

import torch
from torch import nn

from ..errors import RankError
from ..linalg import svd


class TwoFactorLinear(nn.Sequential):
    """y = A (B x) + b: a linear layer [rank, in] without bias, then one [out, rank] with the bias.

    from_dense splits the truncated SVD W = U diag(sigma) Vᵀ evenly: A = U sqrt(sigma), B = sqrt(sigma) Vᵀ.
    """

    @classmethod
    def from_dense(cls, linear: nn.Linear, rank: int) -> "TwoFactorLinear":
        m, n = linear.weight.shape
        if not 1 <= rank <= min(m, n):
            raise RankError(f"TwoFactorLinear.from_dense: rank must be in 1..{min(m, n)} for [{m}, {n}], got {rank}")
        like = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        down = nn.utils.skip_init(nn.Linear, n, rank, bias=False, **like)
        up = nn.utils.skip_init(nn.Linear, rank, m, bias=linear.bias is not None, **like)
        with torch.no_grad():
            U, sigma, V = svd(linear.weight)
            half = sigma[:rank].sqrt()
            up.weight.copy_(U[:, :rank] * half)
            down.weight.copy_(half[:, None] * V[:, :rank].mT)
            if linear.bias is not None:
                up.bias.copy_(linear.bias)
        return cls(down, up)


def vanilla_low_rank(model: nn.Module, ranks: dict[str, int]) -> nn.Module:
    """Replace the named nn.Linear layers of model, in place, by TwoFactorLinear layers of the given ranks.

    Args:
        model: any module.
        ranks: {module name: rank}, 1 <= rank <= min(out_features, in_features).

    Returns:
        The model.

    Raises:
        ValueError: a name that is no nn.Linear of the model; RankError: a rank out of range.
    """
    linears = {name: module for name, module in model.named_modules() if name and isinstance(module, nn.Linear)}
    for name in ranks:
        if name not in linears:
            raise ValueError(f"vanilla_low_rank: {name!r} is no nn.Linear of the model; it has {', '.join(linears)}")
    # every new layer exists before the first one is put in, so a bad rank leaves the model whole
    new = {name: TwoFactorLinear.from_dense(linears[name], rank) for name, rank in ranks.items()}
    for name, layer in new.items():
        model.set_submodule(name, layer.train(linears[name].training))
    return model
