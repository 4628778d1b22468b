"""LowRankLayer, the base of all low-rank layers: factors, initialization, weight, conversion."""

import math
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional, linalg, ops
from .._modules import not_plain
from .._shards import (
    Rows,
    Team,
    draw_orthonormal,
    draw_uniform,
    is_distributed,
    local,
    qr,
    used_directions,
    written_back,
)
from ..errors import NonFiniteError, ShapeError
from ..reference import ORTHONORMAL_INPUT, ORTHONORMAL_STEP, orthonormality_error
from .formed import formed
from .rank import Rank, resolve_rank
from .truncated import truncated_svd

_KINDS = 1000  # of inputs that a layer remembers
_LOCK = threading.Lock()  # of _LAYERS
_LAYERS = weakref.WeakSet()  # all live layers; not their parameters, which torch replaces


def low_rank_layers(model: nn.Module) -> dict[str, "LowRankLayer"]:
    """Return the low-rank layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LowRankLayer)}


def live_layers() -> list["LowRankLayer"]:
    """Return all low-rank layers that there are, of whatever model."""
    with _LOCK:
        return list(_LAYERS)


def active_rank(U: Tensor, S: Tensor, V: Tensor) -> int:
    """Return the number of leading directions in use; a direction is unused if U, S and V are all zero there.

    Zero columns of U and V tell an unused direction from a singular core; no gradient reaches it. Waits for the device.
    """
    if U.is_meta:
        return S.shape[0]
    with torch.no_grad():
        used = used_directions(U, S, V).nonzero()
    return int(used[-1]) + 1 if len(used) else S.shape[0]


class LowRankLayer(nn.Module):
    """Base class of the layers with weight W = U S Vᵀ.

    Subclasses set `weight_shape` before they call `_make_factors`.

    Attributes:
        U: Parameter [m, r].
        S: Parameter [r, r], the core.
        V: Parameter [n, r].
        bias: Parameter [m] or None.
        rank: r.
        weight_shape: Shape of the weight in torch's twin of the layer; as a matrix it is [m, n].
    """

    U: nn.Parameter
    S: nn.Parameter
    V: nn.Parameter
    bias: nn.Parameter | None
    rank: int
    weight_shape: tuple[int, ...]
    _geometry: tuple[str, ...]  # attributes of the dense twin that a folded layer keeps
    _pair_order = "V", "US"  # of the weights of a folded layer
    _takes_features = True  # one input, of floating-point vectors
    _route = "auto"

    def __new__(cls, *args: Any, **kwargs: Any) -> "LowRankLayer":
        layer = super().__new__(cls)  # copies and unpickled layers pass here too
        with _LOCK:
            _LAYERS.add(layer)
        layer.__dict__["_products"] = {}  # functions that compute the layer, by kind of input
        return layer

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_products"}

    def forward(self, input: Tensor) -> Tensor:
        # what is cheap enough for every call: the checks are those of the first input of a kind
        if type(input) is not Tensor or not ops.is_plain(input):
            return self._checked(input)
        parameters = self._parameters
        try:
            U, S, V, bias = parameters["U"], parameters["S"], parameters["V"], parameters["bias"]
        except KeyError:  # pruned or parametrized
            return self._checked(input)
        of_bias = None if bias is None else (bias.shape, bias.dtype)
        kind = input.shape, input.dtype, input.device, input.requires_grad, torch.is_grad_enabled(), of_bias
        products = self._products.get(kind)
        if products is None:
            output = self._checked(input)
            if kind not in self._products and not functional.needs_products():
                if len(self._products) == _KINDS:
                    self._products.clear()
                self._products[kind] = self._choose_products(input)
            return output
        try:
            return products(input, U, S, V, bias)
        except (RuntimeError, TypeError):
            self._arguments(input)  # raises if it can name what is wrong
            raise

    def _checked(self, input: Tensor) -> Tensor:
        """Return the output after all checks."""
        raise NotImplementedError

    def _choose_products(self, input: Tensor) -> Callable[..., Tensor] | None:
        """Return the function of input, U, S, V and bias that serves all inputs of this kind, if one does."""
        raise NotImplementedError

    def _apply(self, fn, recurse=True):
        self._products.clear()
        return super()._apply(fn, recurse)

    @property
    def route(self) -> str:
        """Products that the layer runs: "factorized", "merged" or "auto" (default: the cheaper by the cost model of
        ops.cost_model_cpu, for each kind of input). Can be set at any time; not part of the state_dict.
        """
        return self._route

    @route.setter
    def route(self, route: str) -> None:
        self._route = functional.check_route(f"{type(self).__name__}.route", route)

    def plan(self, input: Tensor) -> ops.cost_model_cpu.Plan:
        """Return the costs that the cost model estimates for this input, and with them the route "auto" would take.

        Args:
            input: As for forward; only its shape, its requires_grad and whether gradients are enabled matter.
        """
        return self._cost_model(*self._arguments(input))

    def _route_repr(self) -> str:
        return "" if self._route == "auto" else f", route={self._route}"

    def _make_factors(self, rank, bias: bool, device, dtype) -> None:
        m, n = self.matrix_shape
        self.rank = resolve_rank(rank, m, n, type(self).__name__)
        for name, shape in {"U": (m, self.rank), "S": (self.rank, self.rank), "V": (n, self.rank)}.items():
            setattr(self, name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        if bias:
            self.bias = nn.Parameter(torch.empty(self._bias_size, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """[m, n] of the weight as a matrix."""
        return self.weight_shape[0], math.prod(self.weight_shape[1:])

    @property
    def _bias_size(self) -> int:
        return self.matrix_shape[0]

    @property
    def _variance(self) -> float:
        """Variance of an entry of torch's default weight; kaiming_uniform(a=√5) in most layers."""
        return 1 / (3 * self.matrix_shape[1])

    @staticmethod
    def as_matrix(weight: Tensor) -> Tensor:
        """Return the dense twin's weight as a matrix [m, n]."""
        return weight.flatten(1)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw orthonormal U, V and set S = s I with the Frobenius norm of torch's default dense weight.

        So kappa = 1, and the outputs have the variance of the dense layer's. Of distributed parameters (a model that
        was sharded on the meta device, after to_empty) every process draws its rows; all processes must call it.
        """
        if self.U.is_meta:
            return
        m, n = self.matrix_shape
        dtype = torch.promote_types(self.U.dtype, torch.float32)
        for X in (self.U, self.V):
            if is_distributed(X):
                draw_orthonormal(X)
            else:
                X.copy_(linalg.orthonormalize(torch.randn(X.shape, device=X.device, dtype=dtype)))
        # E‖W‖² of the default, spread over r directions
        scale = math.sqrt(m * n * self._variance / self.rank)
        written_back(self.S, scale * torch.eye(self.rank, device=self.S.device, dtype=dtype))
        bound = math.sqrt(3 * self._variance)
        if self.bias is not None and is_distributed(self.bias):
            draw_uniform(self.bias, bound)
        elif self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    @property
    def weight(self) -> Tensor:
        """W = U S Vᵀ in torch's shape, differentiable, computed at each access: what writes into it raises."""
        return formed(self._from_matrix(self.U @ self.S @ self.V.mT), self.training)

    def _from_matrix(self, W: Tensor) -> Tensor:
        return W.reshape(self.weight_shape)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise AttributeError(
                f"{type(self).__name__}.weight is formed from U, S and V and cannot be assigned; change these, or use"
                " from_dense for the layer of a dense weight"
            )
        self._products.clear()  # whatever it is: a factor, the geometry, the mode
        super().__setattr__(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight_orig":  # as torch.nn.utils.prune calls it
            raise ValueError(
                f"{type(self).__name__}.weight is formed from U, S and V and cannot be pruned or parametrized; make the"
                " layer dense first (condlr_ext.to_dense)"
            )
        super().register_parameter(name, param)

    @property
    def active_rank(self) -> int:
        """Number of directions in use, <= rank (less only under a RankController). Waits for the device."""
        return active_rank(self.U, self.S, self.V)

    @torch.no_grad()
    def condition_number(self) -> float:
        """Return the condition number of the weight in the directions in use, in float64.

        It is kappa(S) while U and V are orthonormal; where they are not, as in an average of models, their triangular
        factors count: kappa(R_U S R_Vᵀ). Of distributed factors all processes must ask for it together.

        Returns:
            The largest over the smallest of the singular values, Inf for a singular weight.

        Raises:
            NonFiniteError: NaN or Inf in U, S or V.
            ValueError: U, S or V is quantized.
        """
        return linalg.cond(self._core("condition_number")).item()

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """Return what a run logs of a layer: rank, kappa, sigma_max, sigma_min and orthonormality, in float64.

        rank is the number of directions in use, kappa the condition_number, orthonormality the larger of max |UᵀU - I|
        and max |VᵀV - I|. Raises as condition_number.
        """
        sigma = linalg.svd(self._core("metrics")).sigma
        r = len(sigma)
        return {
            "rank": float(r),
            "kappa": self.condition_number(),
            "sigma_max": sigma[0].item(),
            "sigma_min": sigma[-1].item(),
            "orthonormality": max(_drift(*self._rows(X, r)) for X in (self.U, self.V)),
        }

    def _core(self, method: str) -> Tensor:
        """Return R_U S R_Vᵀ of the directions in use, float64, whose singular values are those of the weight."""
        where = f"{type(self).__name__}.{method}"
        factors = {"U": self.U, "S": self.S, "V": self.V}
        for name, X in factors.items():
            if not is_distributed(X) and (reason := not_plain(X)):
                raise ValueError(f"{where}: {name} {reason}")
            if Team.of(f"{where}: {name}", [X]).any(~torch.isfinite(local(X)).all()):
                raise NonFiniteError(f"{where}: {name} must be finite, got NaN or Inf")
        r = self.active_rank
        (core,) = Team.of("S", [self.S]).wholes([self.S])
        core = core[:r, :r].double()
        for X in (self.U, self.V):
            team, rows = self._rows(X, r)
            if _drift(team, rows) > ORTHONORMAL_STEP:
                R = qr(team, [rows], 1e-13)[0] if team else torch.linalg.qr(rows.values, mode="r").R
                core = R @ core if X is self.U else core @ R.mT
        return core

    @staticmethod
    def _rows(X: Tensor, r: int) -> tuple[Team, Rows]:
        team = Team.of("the factor", [X])
        return team, Rows.of(team, X, local(X)[:, :r])

    @classmethod
    def from_dense(cls, module: nn.Module, rank: Rank, *, row_space: Tensor | None = None) -> "LowRankLayer":
        """Return the layer whose weight is the best rank-r approximation of a dense module's (truncated SVD).

        Where min(m, n) >= 1024 and the rank is at most an eighth of it, the SVD is randomized: the error is at most
        1 % above the best.

        Args:
            module: The dense twin of this class.
            rank: An int, a fraction of min(m, n), or an Energy.
            row_space: Optional [n, r] with orthonormal columns. V then spans it, and the layer has the weight
                W row_space row_spaceᵀ instead.

        Raises:
            TypeError: The module is of another class.
            RankError: The rank does not fit.
            NonFiniteError: NaN or Inf in the weight, or a singular value beyond the range of its dtype.
            ShapeError: row_space is not [n, r].
            ValueError: row_space is not orthonormal to 1e-4.

        Examples:
            >>> layer = condlr_ext.LowRankLinear.from_dense(nn.Linear(64, 256), rank=0.25)
        """
        layer = cls.empty_from_dense(module, rank)
        W = cls.as_matrix(module.weight.detach())
        if row_space is not None:
            _check_row_space(f"{cls.__name__}.from_dense", row_space, W.shape[1], layer.rank)
        if W.is_meta:
            return layer.copy_flags_from(module)
        if not torch.isfinite(W).all():
            raise NonFiniteError(f"{cls.__name__}.from_dense: module.weight must be finite, got NaN or Inf")
        with ops.no_autocast(W.device.type):
            A = W if W.dtype == torch.float64 else W.float()
            if row_space is None:
                U, sigma, V = truncated_svd(A, layer.rank)
            else:
                row_space = row_space.to(A)
                U, sigma, V = truncated_svd(A @ row_space, layer.rank)
                V = row_space @ V
        if not torch.isfinite(sigma.to(W.dtype)).all():
            raise NonFiniteError(
                f"{cls.__name__}.from_dense: singular values of module.weight must be within the range of {W.dtype}"
            )
        for name, X in zip("USV", (U, torch.diag(sigma), V), strict=True):
            setattr(layer, name, nn.Parameter(X.to(W.dtype).contiguous()))
        if layer.bias is not None:
            layer.bias = nn.Parameter(module.bias.detach().clone())
        return layer.copy_flags_from(module)

    @classmethod
    def empty_from_dense(cls, module: nn.Module, rank: Rank) -> "LowRankLayer":
        """Return the layer for a dense module with its parameters on the meta device; raises as from_dense."""
        cls._check(module)
        W = cls.as_matrix(module.weight)
        rank = resolve_rank(rank, *W.shape, f"{cls.__name__}.from_dense", W)
        return cls(*cls._dense_arguments(module), device="meta", dtype=W.dtype, rank=rank)

    def copy_flags_from(self, module: nn.Module) -> "LowRankLayer":
        """Copy requires_grad and the training mode from the dense twin; return the layer."""
        for p in (self.U, self.S, self.V):
            p.requires_grad_(module.weight.requires_grad)
        if self.bias is not None:
            self.bias.requires_grad_(module.bias.requires_grad)
        return self.train(module.training)

    @classmethod
    def _check(cls, module: nn.Module) -> None:
        if not isinstance(module, cls._dense):
            raise TypeError(
                f"{cls.__name__}.from_dense: module must be {cls._dense.__name__}, got {type(module).__name__}"
            )

    def to_dense(self) -> nn.Module:
        """Return the dense module with weight U S Vᵀ: the same function to rounding."""
        dense, trained = self._empty_dense(), any(p.requires_grad for p in (self.U, self.S, self.V))
        with torch.no_grad(), ops.no_autocast(self.U.device.type):
            dense.weight = nn.Parameter(self.weight.contiguous(), requires_grad=trained)
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)
        return dense.train(self.training)

    def folded(self) -> nn.Module:
        """Return plain torch modules of the same function to rounding, for inference.

        They are an nn.Sequential of two layers with weights Vᵀ and U S and with the attributes of this layer's
        geometry, or the dense module where that has no more weights.
        """
        r = self.active_rank
        first, second = self._empty_pair(r)
        if first.weight.numel() + second.weight.numel() >= math.prod(self.weight_shape):
            return self.to_dense()
        U, S, V = self.U, self.S, self.V
        with torch.no_grad(), ops.no_autocast(U.device.type):
            wide = torch.promote_types(U.dtype, torch.float32)
            US = (U[:, :r].to(wide) @ S[:r, :r].to(wide)).to(U.dtype)
            pair = (first, (V,)), (second, (U, S))
            for (module, factors), matrix in zip(pair, self._pair_weights(US, V[:, :r]), strict=True):
                weight = matrix.reshape(module.weight.shape).contiguous()
                module.weight = nn.Parameter(weight, requires_grad=any(p.requires_grad for p in factors))
        if self.bias is not None:
            second.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)
        pair = nn.Sequential(first, second).train(self.training)
        for name in self._geometry:  # models read these
            setattr(pair, name, getattr(self, name))
        return pair

    def _pair_weights(self, US: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights of the folded pair, but for their shape."""
        return V.mT, US

    @staticmethod
    def rows(module: nn.Module, input: Tensor, output: Tensor) -> int:
        """Return the number of vectors that the dense twin's weight multiplies in a call."""
        return output.numel() // module.weight.shape[0]

    @staticmethod
    def flops(module: nn.Module, rows: int, m: int, n: int, rank: int | None = None) -> int:
        """Return the FLOPs of that many rows through the dense twin, or factorized at this rank."""
        if rank is None:
            return 2 * rows * m * n
        return 2 * rows * rank * (n + m) + 2 * min(rows, m) * rank * rank

    def _empty_dense(self) -> nn.Module:
        return self._dense(*self._dense_arguments(self), device="meta", dtype=self.U.dtype)


def _drift(team: Team, rows: Rows) -> float:
    """Return max |XᵀX - I|."""
    (gram,) = team.sum([rows.product(rows.values)])
    return float((gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).abs().max())


def _check_row_space(function: str, X: Tensor, n: int, rank: int) -> None:
    if X.shape != (n, rank):
        raise ShapeError(f"{function}: row_space must be {[n, rank]}, got {list(X.shape)}")
    error = orthonormality_error(X)
    if not error <= ORTHONORMAL_INPUT:  # NaN fails too
        raise ValueError(f"{function}: row_space must have orthonormal columns to 1e-4, got {error:.3g}")
