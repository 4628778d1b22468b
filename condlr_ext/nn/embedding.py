"""LowRankEmbedding: torch.nn.Embedding with weight U S Vᵀ."""

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.types import Device

from .. import linalg, ops
from .._shards import is_distributed, local, make_orthonormal, row_indices
from .layer import LowRankLayer


class LowRankEmbedding(LowRankLayer):
    """Lookup of rows of W = U S Vᵀ: rows of U, then S Vᵀ. It may share its factors with an output layer.

    The row of padding_idx in U gets no gradient. Where it is zero, it stays zero.

    Args:
        num_embeddings: m.
        embedding_dim: n.
        padding_idx: As in torch.nn.Embedding.
        device: Device of the parameters.
        dtype: Their dtype.
        rank: An int in 1..min(m, n), or a fraction in (0, 1] of min(m, n).

    Raises:
        RankError: The rank does not fit.
    """

    _dense, _cost_model = nn.Embedding, staticmethod(ops.cost_model_cpu.embedding)
    _geometry = "num_embeddings", "embedding_dim", "padding_idx"
    _pair_order, _takes_features = ("US", "V"), False

    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None
    weight_shape: tuple[int, ...]

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        device: Device = None,
        dtype: torch.dtype | None = None,
        rank: float,
    ):
        super().__init__()
        arguments = nn.Embedding(num_embeddings, embedding_dim, padding_idx, device="meta")  # checks them
        for name in self._geometry:
            setattr(self, name, getattr(arguments, name))
        self.weight_shape = (num_embeddings, embedding_dim)
        self._make_factors(rank, False, device, dtype)

    @property
    def _variance(self) -> float:
        return 1.0

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.padding_idx is None or self.U.is_meta:
            return
        if is_distributed(self.U):
            local(self.U)[row_indices(self.U) == self.padding_idx] = 0
            make_orthonormal(self.U)
        else:
            U = self.U.to(torch.promote_types(self.U.dtype, torch.float32), copy=True)
            U[self.padding_idx] = 0
            self.U.copy_(linalg.orthonormalize(U))

    @staticmethod
    def unsupported(module: nn.Module) -> str | None:
        """Return which option of an nn.Embedding has no low-rank form, None if none."""
        for option in ("max_norm", "scale_grad_by_freq", "sparse"):
            if getattr(module, option):
                return f"its {option} acts on rows of a dense weight"
        return None

    @classmethod
    def _check(cls, module: nn.Module) -> None:
        super()._check(module)
        if reason := cls.unsupported(module):
            raise ValueError(f"{cls.__name__}.from_dense: module must be without such options: {reason}")

    @staticmethod
    def _dense_arguments(module: nn.Module) -> tuple:
        return module.num_embeddings, module.embedding_dim, module.padding_idx

    def forward(self, input: Tensor) -> Tensor:
        return low_rank_embedding(input, self.U, self.S, self.V, self.padding_idx, self._route)

    def _arguments(self, input: Tensor) -> tuple:
        return input, self.U, self.S, self.V

    def _empty_pair(self, rank: int) -> tuple[nn.Module, nn.Module]:
        like = {"device": "meta", "dtype": self.U.dtype}
        first = nn.Embedding(self.num_embeddings, rank, self.padding_idx, **like)
        return first, nn.Linear(rank, self.embedding_dim, bias=False, **like)

    def _pair_weights(self, US: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
        return US, V

    @staticmethod
    def rows(module: nn.Module, input: Tensor, output: Tensor) -> int:
        return input.numel()

    @staticmethod
    def flops(module: nn.Module, rows: int, m: int, n: int, rank: int | None = None) -> int:
        return 0 if rank is None else 2 * rows * rank * (rank + n)

    def extra_repr(self) -> str:
        text = f"{self.num_embeddings}, {self.embedding_dim}, rank={self.rank}"
        return text + (f", padding_idx={self.padding_idx}" if self.padding_idx is not None else "") + self._route_repr()


def low_rank_embedding(input: Tensor, U: Tensor, S: Tensor, V: Tensor, padding_idx: int | None, route: str) -> Tensor:
    """Return rows of U S Vᵀ [*, n], as torch's embedding in the weight's dtype also under autocast."""
    if route == "auto":
        route = ops.cost_model_cpu.choose(ops.cost_model_cpu.embedding, input, U, S, V)
    with ops.no_autocast(U.device.type):
        if route == "merged":
            return F.embedding(input, U @ S @ V.mT, padding_idx)
        return F.linear(F.embedding(input, U, padding_idx) @ S, V)


torch.fx.wrap("low_rank_embedding")
