"""What a benchmark is made of: an operation on a shape is a problem, and providers solve it, each judged first."""

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

OURS, SAME, DENSE, CONTEXT = "ours", "same", "dense", "context"  # roles of providers, see Provider


@dataclass(frozen=True)
class Work:
    """Arithmetic and memory traffic that no implementation avoids."""

    flops: float = 0
    bytes: float = 0


@dataclass
class TimedCall:
    """What one provider does in one mode. `run` is timed.

    errors: of what `run` returned, or changed, against float64, by name; NaN counts as infinite.
    prepare: before every run, not timed. rewind: undoes what earlier runs changed, before a run that is judged.
    """

    run: Callable[[], Any]
    errors: Callable[[Any], dict[str, float]]
    prepare: Callable[[], object] | None = None
    rewind: Callable[[], object] | None = None


@dataclass
class Provider:
    """One way of solving a problem.

    calls: by mode. limits: of the errors, by their names; "" for all that have none of their own. A call whose errors
    exceed them gets no time.
    role: "ours"; "same": the same function by others; "dense": the whole weight instead of its factors; "context":
    something related, for orientation: never the best of the others.
    work: by mode, where it differs from the problem's.
    share: of the seconds that a provider may take.
    captured: whether its calls may be captured in a CUDA graph: not of a library with streams of its own.
    """

    calls: dict[str, TimedCall]
    limits: dict[str, float]
    role: str = SAME
    work: dict[str, list[Work]] | None = None
    share: float = 1.0
    captured: bool = True

    def limit(self, error: str) -> float:
        return self.limits[error] if error in self.limits else self.limits[""]


class Problem(Protocol):
    """The inputs of one row, made once for all providers.

    providers: what makes each, by name in the order of the tables; raises where it cannot serve. "ours" is what users
    get; a name with "compiled" in it takes long to make.
    work: by mode, of parts that follow each other.
    """

    providers: Mapping[str, Callable[[], Provider]]
    work: Mapping[str, list[Work]]


@dataclass(frozen=True)
class Operation:
    """One benchmarked op.

    problem: of (shape, name of the arithmetic, device). shapes: of (size, device): "smoke" a few for a test, "default",
    "full"; a shape is a frozen dataclass of plain numbers and strings whose str() names the row.
    modes: what is timed; a mode that a provider's calls lack is left out. dtypes: of a device, what is measured unless
    asked for otherwise; all of `supported` can be. compiled: the shapes for which torch.compile is tried by default.
    extra: further records of a row, of (row, device), after its times.
    """

    name: str
    what: str
    problem: Callable[[Any, str, Any], Problem]
    shapes: Callable[[str, Any], list]
    modes: tuple[str, ...] = ("call",)
    dtypes: Callable[[Any], tuple[str, ...]] = lambda device: ("fp32",)
    supported: tuple[str, ...] = ("fp32", "fp64")
    compiled: Callable[[Any], bool] = lambda shape: False
    extra: Callable[["Row", Any], list[dict]] | None = None


@dataclass(frozen=True)
class Row:
    operation: Operation
    shape: Any
    dtype: str

    def __str__(self) -> str:
        return f"{self.operation.name} {self.shape} {self.dtype}"


@dataclass(frozen=True)
class Selection:
    """Which rows are wanted: operations by name (none: all), size, arithmetic, a pattern in the row's name."""

    operations: tuple[str, ...] = ()
    size: str = "default"
    dtypes: tuple[str, ...] = ()
    only: str = ""

    def rows(self, operations: Iterable[Operation], device) -> list[Row]:
        """In the order of the registry. An unknown operation or arithmetic raises ValueError."""
        known = {operation.name: operation for operation in operations}
        for name in self.operations:
            if name not in known:
                raise ValueError(f"bench: no operation {name!r}; there are {', '.join(known)}")
        chosen = [known[name] for name in known if not self.operations or name in self.operations]
        rows = []
        for operation in chosen:
            dtypes = [d for d in self.dtypes or operation.dtypes(device) if d in operation.supported]
            rows += [Row(operation, shape, d) for shape in operation.shapes(self.size, device) for d in dtypes]
        rows = [row for row in rows if not self.only or fnmatch.fnmatch(str(row), f"*{self.only}*")]
        served = dict.fromkeys(d for operation in chosen for d in operation.supported)
        if self.dtypes and not set(self.dtypes) & set(served):
            raise ValueError(f"bench: these operations have {', '.join(served)}, not {', '.join(self.dtypes)}")
        if not rows:
            raise ValueError(f"bench: no row matches {self.only!r} (--list shows all)")
        return rows
