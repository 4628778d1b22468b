"""What is run: one RunSpec per network, one TrainConfig for all of them."""

import math
from dataclasses import dataclass, fields
from pathlib import Path

from ..linalg import check_constraint

METHODS = ("dense", "vanilla", "condlr")
BUDGET = 0.27


@dataclass(frozen=True)
class RunSpec:
    """One network, as text "dense", "vanilla:rank=8" or "condlr:tau=0.1,budget=0.27,sigma_max=1.5,band=mean".

    Attributes:
        method: "dense" and "vanilla" (W = A B) train with plain SGD, "condlr" with CondLRSGD.
        tau: condlr only and needed there: kappa <= 1 + tau.
        budget, rank: how ranks are chosen, at most one of them, see factorize; default budget 0.27.
        sigma_max, band: condlr only, see CondLRSGD.
        lr: instead of that of the TrainConfig.
    """

    method: str
    tau: float | None = None
    budget: float | None = None
    rank: int | float | None = None
    sigma_max: float | None = None
    band: str | None = None
    lr: float | None = None

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"run: method must be one of {', '.join(METHODS)}, got {self.method!r}")
        allowed = {"dense": ("lr",), "vanilla": ("budget", "rank", "lr")}.get(self.method, _OPTIONS)
        for name in _OPTIONS:
            if getattr(self, name) is not None and name not in allowed:
                raise ValueError(f"run: {self.method} takes {', '.join(allowed)}, got {name}")
        if self.method == "condlr":
            if self.tau is None:
                raise ValueError('run: condlr needs tau, as in "condlr:tau=0.1"')
            check_constraint("run", self.tau, self.band or "rms", self.sigma_max)
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise ValueError(f"run: lr must be finite and > 0, got {self.lr}")
        if self.budget is not None and self.rank is not None:
            raise ValueError(f"run: give budget or rank, not both, got budget={self.budget}, rank={self.rank}")
        if self.budget is not None and not 0 < self.budget < math.inf:
            raise ValueError(f"run: budget must be > 0, got {self.budget}")
        if self.method != "dense" and self.budget is None and self.rank is None:
            object.__setattr__(self, "budget", BUDGET)

    @classmethod
    def parse(cls, text: str) -> "RunSpec":
        """The inverse of str(): METHOD or METHOD:KEY=VALUE,KEY=VALUE."""
        method, _, options = text.partition(":")
        values = {}
        for item in options.split(",") if options else ():
            key, equals, value = item.partition("=")
            if key not in _OPTIONS or not equals or key in values:
                raise ValueError(
                    f"run {text!r}: each option must be KEY=VALUE, given once, KEY one of "
                    f"{', '.join(_OPTIONS)}, got {item!r}"
                )
            try:
                values[key] = _PARSERS.get(key, float)(value)
            except ValueError:
                raise ValueError(f"run {text!r}: {key} must be a number, got {value!r}") from None
        return cls(method, **values)

    def __str__(self) -> str:
        options = ",".join(f"{k}={getattr(self, k)}" for k in _OPTIONS if getattr(self, k) is not None)
        return f"{self.method}:{options}" if options else self.method

    @property
    def label(self) -> str:
        """Short text for tables and legends."""
        parts = [{"dense": "dense", "vanilla": "vanilla UVᵀ", "condlr": "CondLR"}[self.method]]
        if self.tau is not None:
            parts.append(f"τ={self.tau:g}")
        if self.sigma_max is not None:
            parts.append(f"σ≤{self.sigma_max:g}")
        if self.band is not None:
            parts.append(self.band)
        if self.rank is not None:
            parts.append(f"rank {self.rank:g}")
        elif self.budget not in (None, BUDGET):
            parts.append(f"budget {self.budget:g}")
        if self.lr is not None:
            parts.append(f"lr {self.lr:g}")
        return " ".join(parts)

    @property
    def sizing(self) -> dict:
        """The arguments of factorize that choose the ranks."""
        return {"rank": self.rank} if self.rank is not None else {"budget": self.budget}


def _number(text: str) -> int | float:
    """An int stays an int: rank=1 is one direction, rank=1.0 is full rank."""
    return int(text) if text.lstrip("+-").isdigit() else float(text)


_OPTIONS = tuple(f.name for f in fields(RunSpec) if f.name != "method")
_PARSERS = {"rank": _number, "band": str}

DEFAULT_RUNS = (
    RunSpec("dense"),
    RunSpec("vanilla"),
    RunSpec("vanilla", lr=0.1),  # the common rate is at its edge of divergence, where rounding decides
    RunSpec("condlr", tau=0.0),
    RunSpec("condlr", tau=0.1),
    RunSpec("condlr", tau=0.5),
    RunSpec("condlr", tau=0.1, sigma_max=1.5),
    RunSpec("condlr", tau=0.1, rank=0.2),
)


@dataclass(frozen=True)
class TrainConfig:
    """Settings shared by all runs.

    Attributes:
        data: "digits" or the path of a .npz file with arrays x [N, ...] in [0, 1] and integer y [N].
        runs: specifications, as RunSpec or text.
        epochs, batch_size, lr, momentum: SGD; lr is multiplied by 0.3 at 58 % and at 83 % of the epochs.
        seed: of the split, the initial weights, the batch order and the attacks.
        eps: l-infinity budgets of the attacks.
        attack_steps: of PGD.
        out: folder of the results; default runs/<data>.
    """

    data: str = "digits"
    runs: tuple[RunSpec, ...] = DEFAULT_RUNS
    epochs: int = 60
    batch_size: int = 32
    lr: float = 0.2
    momentum: float = 0.3
    seed: int = 0
    eps: tuple[float, ...] = (0.05, 0.1, 0.2)
    attack_steps: int = 30
    out: Path | None = None

    def __post_init__(self):
        runs = tuple(RunSpec.parse(run) if isinstance(run, str) else run for run in self.runs)
        object.__setattr__(self, "runs", runs)
        object.__setattr__(self, "eps", tuple(float(e) for e in self.eps))
        object.__setattr__(self, "out", Path(self.out or Path("runs") / Path(self.data).name))
        names = [str(run) for run in runs]
        if not runs or len(set(names)) < len(names):
            raise ValueError(f"train: runs must be different and at least one, got {', '.join(names) or 'none'}")
        for name in ("epochs", "batch_size", "attack_steps"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"train: {name} must be an integer >= 1, got {value!r}")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"train: lr must be finite and > 0, got {self.lr}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"train: momentum must be in [0, 1), got {self.momentum}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"train: seed must be in 0..2^32 - 1, got {self.seed}")
        if not self.eps or not all(math.isfinite(e) and e >= 0 for e in self.eps):
            raise ValueError(f"train: eps must be finite numbers >= 0, at least one, got {list(self.eps)}")
