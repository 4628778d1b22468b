"""Types of arguments that many public functions share."""

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

Path: TypeAlias = str | os.PathLike[str]
Budgets: TypeAlias = float | Sequence[float] | Tensor  # of an attack: one, or a 1-D sequence
Ints: TypeAlias = int | Sequence[int]  # one, or one per space dimension
Options: TypeAlias = dict[str, Any]
Patterns: TypeAlias = str | Iterable[str]  # names, or fnmatch patterns
LayerPattern: TypeAlias = str | type[nn.Module] | Callable[[str, nn.Module], bool]
Layers: TypeAlias = LayerPattern | Iterable[LayerPattern]
Inputs: TypeAlias = Tensor | tuple[Any, ...] | dict[str, Any]  # of a model: one, positional, or by keyword
ModelOrGroups: TypeAlias = nn.Module | ParamsT
Closure: TypeAlias = Callable[[], Any]  # computes loss and gradients
