"""Numbers of a model's low-rank layers: what bounds them, and what a run logs."""

from collections.abc import Callable
from typing import TypeVar

from torch import nn

from .._modules import check_module
from ..nn import LowRankLayer, low_rank_layers

_T = TypeVar("_T")


def condition_numbers(model: nn.Module) -> dict[str, float]:
    """Return the condition number of the weight of every low-rank layer by name; Inf for a singular one.

    Args:
        model: Any module. U and V need not be orthonormal, as after averaging models.

    Raises:
        NonFiniteError: NaN or Inf in a factor, with the layer's name.
    """
    return _of_each("condition_numbers", model, LowRankLayer.condition_number)


def layer_metrics(model: nn.Module) -> dict[str, float]:
    """Return the rank, kappa, sigma_max, sigma_min and orthonormality of every low-rank layer, as loggers take them.

    Args:
        model: Any module; see LowRankLayer.metrics.

    Returns:
        {"LAYER/kappa": ...} and the like for each layer.

    Raises:
        NonFiniteError: NaN or Inf in a factor, with the layer's name.

    Examples:
        >>> report = condlr_ext.factorize(model, rank=3, include="fc")
        >>> condlr_ext.layer_metrics(model)["fc/rank"]
        3.0
    """
    layers = _of_each("layer_metrics", model, LowRankLayer.metrics)
    return {f"{name}/{key}": value for name, metrics in layers.items() for key, value in metrics.items()}


def _of_each(function: str, model: nn.Module, measure: Callable[[LowRankLayer], _T]) -> dict[str, _T]:
    check_module(function, model)
    found = {}
    for name, layer in low_rank_layers(model).items():
        try:
            found[name] = measure(layer)
        except ValueError as error:
            raise type(error)(f"{function}: layer {name}: {error}") from None
    return found
