"""The report of factorize."""

from dataclasses import dataclass, field

from .. import _table
from .budget import stored_parameters

_UNITS = {"parameters": "weights", "flops": "FLOPs", "time": "time"}


@dataclass(frozen=True)
class LayerReport:
    """One factorized layer.

    Attributes:
        name: Name in the model.
        m: Rows of the weight as a matrix.
        n: Its columns.
        rank: The rank it got.
        weight_shape: Shape of the dense weight.
        kappa: Condition number of the core before an optimizer puts it in the band.
        tied_to: The layer whose factors it shares, and which counts the parameters; else None.
        dense_flops: FLOPs of the dense layer in one forward on the example input; None without one.
        flops: FLOPs of the factorized form, also where the merged form is faster and runs; None without an example.
        route: Route of the layer on the example input, "factorized" or "merged"; None without a call on an example.
        gain: The cost model's estimate of the dense layer's time over its own; None without a call on an example.
        dense_seconds: Time of the dense layer and those tied to it, for measure="time"; else None.
        seconds: Time of the low-rank layers, interpolated between the ranks that were timed; else None.
    """

    name: str
    m: int
    n: int
    rank: int
    weight_shape: tuple[int, ...]
    kappa: float
    tied_to: str | None = None
    dense_flops: int | None = None
    flops: int | None = None
    route: str | None = None
    gain: float | None = None
    dense_seconds: float | None = None
    seconds: float | None = None

    @property
    def dense_parameters(self) -> int:
        return 0 if self.tied_to else self.m * self.n

    @property
    def parameters(self) -> int:
        """Stored parameters without the bias."""
        return 0 if self.tied_to else stored_parameters(self.rank, self.m, self.n)


@dataclass(frozen=True)
class FactorizeReport:
    """The layers that factorize replaced or would replace; printing it shows a table.

    Attributes:
        layers: One LayerReport each, in the model's order, tied ones together.
        skipped: The other layers, and matrix parameters of modules that are not supported, with the reason.
        budget: As given to factorize, None where ranks were given.
        measure: As given to factorize.
        dry_run: Whether the model was left as it is.
        dense_model_parameters: Parameters of the whole model before, biases and all that was skipped included.
    """

    layers: list[LayerReport]
    skipped: dict[str, str] = field(default_factory=dict)
    budget: float | None = None
    measure: str = "parameters"
    dry_run: bool = False
    dense_model_parameters: int = 0

    @property
    def model_parameters(self) -> int:
        """Parameters of the whole factorized model."""
        return self.dense_model_parameters - sum(x.dense_parameters - x.parameters for x in self.layers)

    @property
    def kept(self) -> float:
        """Share of the factorized layers' weights that remains."""
        return _share([(x.dense_parameters, x.parameters) for x in self.layers])

    @property
    def spent(self) -> float:
        """Share of the factorized layers' cost in `measure` that remains, to compare with the budget."""
        if self.measure == "parameters":
            return self.kept
        if self.measure == "flops":
            return _share([(x.dense_flops, x.flops) for x in self.layers])
        return _share([(x.dense_seconds, x.seconds) for x in self.layers if x.seconds is not None])

    def __str__(self) -> str:
        on_example = any(x.flops is not None for x in self.layers)
        timed = any(x.seconds is not None for x in self.layers)
        titles = ["layer", "weight", "rank", "κ", "parameters", "kept"]
        titles += ["Mflop", "route", "gain"] * on_example + ["ms"] * timed
        rows = []
        for x in self.layers:
            kept = f"{x.parameters / x.dense_parameters:.1%}" if not x.tied_to else f"as {x.tied_to}"
            row = (x.name, f"{x.m} x {x.n}", str(x.rank), f"{x.kappa:.3g}")
            row += (f"{x.dense_parameters} -> {x.parameters}", kept)
            if on_example:
                route, gain = (x.route, f"{x.gain:.2f}") if x.route else ("-", "-")
                row += (f"{x.dense_flops / 1e6:.3g} -> {x.flops / 1e6:.3g}", route, gain)
            if timed:
                row += ("-" if x.seconds is None else f"{1e3 * x.dense_seconds:.3g} -> {1e3 * x.seconds:.3g}",)
            rows.append(row)
        lines = [_table.text(titles, rows)]
        would = "would keep" if self.dry_run else "kept"
        lines.append(f"{would} {self.kept:.1%} of the factorized layers' weights")
        if self.measure != "parameters":
            lines[-1] += f", {self.spent:.1%} of their {_UNITS[self.measure]}"
        if self.budget is not None and self.spent > self.budget:
            lines.append(f"over the budget of {self.budget:.1%}: no layer can have less than rank 1")
        before, after = self.dense_model_parameters, self.model_parameters
        lines.append(f"parameters of the whole model: {before} -> {after} ({after / before:.1%})")
        lines += [f"left as it is: {line}" for line in reasons(self.skipped)]
        return "\n".join(lines)


def reasons(skipped: dict[str, str]) -> list[str]:
    """Return a line for each reason, with the names that it is given for."""
    names: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        names.setdefault(reason, []).append(name)
    return [f"{', '.join(same)}: {reason}" for reason, same in names.items()]


def _share(amounts: list[tuple[float, float]]) -> float:
    dense, kept = (sum(column) for column in zip(*amounts, strict=True))
    return kept / dense
