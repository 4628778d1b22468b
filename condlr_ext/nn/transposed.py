"""LowRankTransposedLinear: the low-rank twin of HF's Conv1D."""

import torch
from torch import Tensor, nn
from torch.types import Device

from .linear import LowRankLinear


class LowRankTransposedLinear(LowRankLinear):
    """Linear layer y = W x + b with W = U S Vᵀ that stores Wᵀ, as transformers.pytorch_utils.Conv1D does.

    Make it with `from_dense`. Conv1D is recognized by its name and attributes: transformers need not be installed.

    Attributes:
        nf: out_features, by Conv1D's name; U is [nf, r].
        nx: in_features, by Conv1D's name; V is [nx, r].
        weight: Wᵀ [nx, nf], as in Conv1D.
    """

    nf: int
    nx: int
    weight_shape: tuple[int, ...]
    _geometry = "nf", "nx"

    def __init__(
        self,
        dense: type[nn.Module],
        nf: int,
        nx: int,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        rank: float,
    ):
        super().__init__(nx, nf, True, device, dtype, rank=rank)
        self.weight_shape = (nx, nf)
        self.nf, self.nx = nf, nx
        self._original = dense

    @staticmethod
    def serves(module: nn.Module) -> bool:
        """Return whether the module is an HF Conv1D."""
        weight, bias, nf = (getattr(module, name, None) for name in ("weight", "bias", "nf"))
        return (
            type(module).__name__ == "Conv1D"
            and isinstance(weight, Tensor)
            and isinstance(bias, Tensor)
            and weight.dim() == 2
            and weight.shape[1:] == bias.shape == (nf,)
        )

    @property
    def matrix_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @staticmethod
    def as_matrix(weight: Tensor) -> Tensor:
        return weight.mT

    @staticmethod
    def rows(module: nn.Module, input: Tensor, output: Tensor) -> int:
        return output.numel() // module.nf

    def _from_matrix(self, W: Tensor) -> Tensor:
        return W.mT

    @classmethod
    def _check(cls, module: nn.Module) -> None:
        if not cls.serves(module):
            raise TypeError(f"{cls.__name__}.from_dense: module must be HF's Conv1D, got {type(module).__name__}")

    @staticmethod
    def _dense_arguments(module) -> tuple:
        return type(module), module.nf, module.weight.shape[0]

    def _empty_dense(self) -> nn.Module:
        with torch.device("meta"):
            return self._original(self.nf, self.nx)
