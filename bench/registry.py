"""Operations, the problems they pose for a shape, and the providers that solve these problems."""

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
    """One provider in one mode.

    Attributes:
        run: The timed function.
        errors: Errors against float64, by name, of what `run` returned or changed; NaN counts as infinite.
        prepare: Called before every run, outside of the time.
        rewind: Undoes the changes of earlier runs before a run that is checked.
    """

    run: Callable[[], Any]
    errors: Callable[[Any], dict[str, float]]
    prepare: Callable[[], object] | None = None
    rewind: Callable[[], object] | None = None


@dataclass
class Provider:
    """One way to solve a problem.

    Attributes:
        calls: By mode.
        limits: Largest allowed errors by name; "" for names without an entry. A call beyond them gets no time.
        role: OURS; SAME: the same function by others; DENSE: the whole weight instead of its factors; CONTEXT: related,
            for orientation, and never the best of the others.
        work: By mode, where it differs from the problem's.
        share: Of the seconds that a provider may take.
        captured: Whether a CUDA graph may capture the calls; False for libraries with streams of their own.
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

    Attributes:
        providers: Functions that make a provider or raise where it cannot serve, by name in the order of the tables.
            "ours" is the default of the package; names with "compiled" take long to make.
        work: By mode, parts that follow each other.
    """

    providers: Mapping[str, Callable[[], Provider]]
    work: Mapping[str, list[Work]]


@dataclass(frozen=True)
class Operation:
    """One benchmarked operation.

    Attributes:
        name: As on the command line.
        what: One line for `--list`.
        problem: Makes the Problem of (shape, name of the arithmetic, device).
        shapes: Shapes for (size, device), where size is "smoke" (a few, for a test), "default" or "full". A shape is a
            frozen dataclass of plain numbers and strings; its str() names the row.
        modes: Timed in turn; a mode that a provider lacks is left out.
        dtypes: Arithmetic that is measured by default on a device.
        supported: Arithmetic that can be measured.
        headline: Whether a shape is among the most important: torch.compile is tried for it by default, and a run with
            a time limit begins with it.
        extra: Makes further records of (row, device) after the times.
        share: Of the time of a limited run, relative to the other operations.
        by_default: Whether a run without named operations has it.
    """

    name: str
    what: str
    problem: Callable[[Any, str, Any], Problem]
    shapes: Callable[[str, Any], list]
    modes: tuple[str, ...] = ("call",)
    dtypes: Callable[[Any], tuple[str, ...]] = lambda device: ("fp32",)
    supported: tuple[str, ...] = ("fp32", "fp64")
    headline: Callable[[Any], bool] = lambda shape: False
    extra: Callable[["Row", Any], list[dict]] | None = None
    share: float = 2.0
    by_default: bool = True


@dataclass(frozen=True)
class Row:
    """An operation on one shape in one arithmetic."""

    operation: Operation
    shape: Any
    dtype: str

    def __str__(self) -> str:
        return f"{self.operation.name} {self.shape} {self.dtype}"


@dataclass(frozen=True)
class Selection:
    """Selected rows: operations by name (none: the default ones), size, arithmetic, a pattern in the row's name."""

    operations: tuple[str, ...] = ()
    size: str = "default"
    dtypes: tuple[str, ...] = ()
    only: str = ""

    def rows(self, operations: Iterable[Operation], device) -> list[Row]:
        """Return the selected rows in the order of the registry.

        Raises:
            ValueError: An operation or arithmetic is unknown, or no row is left.
        """
        known = {operation.name: operation for operation in operations}
        for name in self.operations:
            if name not in known:
                raise ValueError(f"no operation {name!r}; there are {', '.join(known)}")
        named = self.operations or [name for name, operation in known.items() if operation.by_default]
        chosen = [known[name] for name in known if name in named]
        rows = []
        for operation in chosen:
            dtypes = [d for d in self.dtypes or operation.dtypes(device) if d in operation.supported]
            rows += [Row(operation, shape, d) for shape in operation.shapes(self.size, device) for d in dtypes]
        rows = [row for row in rows if not self.only or fnmatch.fnmatch(str(row), f"*{self.only}*")]
        supported = dict.fromkeys(d for operation in chosen for d in operation.supported)
        if self.dtypes and not set(self.dtypes) & set(supported):
            raise ValueError(f"these operations have {', '.join(supported)}, not {', '.join(self.dtypes)}")
        if not rows:
            raise ValueError(f"no row matches {self.only!r} (--list shows all)")
        return rows
