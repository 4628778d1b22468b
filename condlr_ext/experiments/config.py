"""What is run: one RunSpec per method, one TrainConfig for all of them."""

import dataclasses
import math
import numbers
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from ..linalg import check_constraint
from ..robustness import KNOWN_ATTACKS
from .extras import require

BUDGET = 0.27

# What each method takes beside the options of all. Ranks are chosen by budget or rank where the first of them is named.
_SIZING = ("budget", "rank", "init")
METHODS = {
    "dense": _SIZING,
    "vanilla": _SIZING,
    "condlr": (*_SIZING, "tau", "band", "optimizer"),
    "released": (*_SIZING, "tau"),
    "cayley": (*_SIZING, "tau", "full"),
    "projected": (*_SIZING, "tau", "full"),
    "dlrt": (*_SIZING, "tolerance"),
    "robust-dlrt": (*_SIZING, "tolerance", "beta", "core_steps"),
    "svd-prune": ("budget", "rank", "finetune"),
    "tscnc": ("tsc", "cnc", "keep"),
}
NEEDED = {"condlr": ("tau",), "released": ("tau",), "dlrt": ("tolerance",), "robust-dlrt": ("tolerance", "beta")}
CAPPED = ("dense", "vanilla", "condlr")
COMMON = ("lr", "momentum", "weight_decay")
_LABELS = {
    "vanilla": "vanilla UVᵀ", "condlr": "CondLR", "released": "released CondLR", "cayley": "Cayley SGD",
    "projected": "projected SGD", "dlrt": "DLRT", "robust-dlrt": "RobustDLRT", "svd-prune": "SVD prune",
    "tscnc": "TSCNC",
}  # fmt: skip


@dataclass(frozen=True)
class RunSpec:
    """One method with its options, as text "dense", "vanilla:rank=8" or "condlr:tau=0.1,budget=0.27,band=mean".

    Attributes:
        method: a key of METHODS. "dense" and "vanilla" (W = A B) train with plain SGD, "condlr" with CondLRSGD,
            "svd-prune" is "dense", truncated, then trained on as a low-rank network without a bound; "tscnc" trains
            with gates and the penalties of TSCNC for half of the epochs, searches masks for a quarter and trains what
            they leave for the rest; the others are those of condlr_ext.baselines.
        budget, rank: how ranks are chosen, at most one of them, see factorize; default budget 0.27. A rank of each
            hidden layer in turn is a tuple, as text "rank=40/17". Adaptive methods (dlrt, robust-dlrt) start with it.
        init: "pca": the hidden weights are projected first onto the leading principal directions of their inputs on
            some training samples, see factorize. As a control also for dense, with budget or rank to say how many.
        tau: kappa <= 1 + tau; needed by condlr and released, inf (no bound) by default for cayley and projected.
        band: condlr: see CondLRSGD. optimizer: condlr: "sgd" (default) or "adamw".
        sigma_max: the largest singular value of the hidden layers: condlr's own; for dense and vanilla as a control.
        cap: dense and vanilla: how sigma_max is kept, "clip" (default: of the spectrum) or "rescale" (of the weight).
        full: cayley, projected: whether the dense weights themselves are orthonormal, as in the published tables.
        tolerance, beta, core_steps: dlrt and robust-dlrt, see there.
        tsc, cnc, keep: tscnc: weights of its penalties, default 1 and 0.01, and the share of the hidden weights that
            its masks keep, default 0.27.
        finetune: svd-prune: the share of the epochs after the truncation, default 0.2.
        lr, momentum, weight_decay: instead of those of the TrainConfig.
    """

    method: str
    tau: float | None = None
    budget: float | None = None
    rank: int | float | tuple[int, ...] | None = None
    init: str | None = None
    sigma_max: float | None = None
    band: str | None = None
    optimizer: str | None = None
    cap: str | None = None
    full: bool | None = None
    tolerance: float | None = None
    beta: float | None = None
    core_steps: int | None = None
    finetune: float | None = None
    tsc: float | None = None
    cnc: float | None = None
    keep: float | None = None
    lr: float | None = None
    momentum: float | None = None
    weight_decay: float | None = None

    def __post_init__(self):
        _check_types("run", self, _RUN_TYPES)
        if self.method not in METHODS:
            raise ValueError(f"run: method must be one of {', '.join(METHODS)}, got {self.method!r}")
        allowed = [*METHODS[self.method], *COMMON]
        if self.method in CAPPED:
            allowed.append("sigma_max")
            if self.method != "condlr" and self.sigma_max is not None:
                allowed.append("cap")
        for name in _OPTIONS:
            if getattr(self, name) is not None and name not in allowed:
                raise ValueError(f"run: {self.method} takes {', '.join(allowed)}, got {name}")
        for name in NEEDED.get(self.method, ()):
            if getattr(self, name) is None:
                raise ValueError(f'run: {self.method} needs {name}, as in "{self.method}:{name}=0.1"')
        if isinstance(self.rank, (list, tuple)):  # a list is of TOML
            object.__setattr__(self, "rank", tuple(self.rank))
            if not all(_is(r, "an integer") for r in self.rank):
                raise ValueError(f"run: a rank of each layer must be an integer, got {list(self.rank)}")
        if self.tau is not None or self.sigma_max is not None:
            check_constraint("run", math.inf if self.tau is None else self.tau, self.band or "rms", self.sigma_max)
        for name, known in (
            ("optimizer", ("sgd", "adamw")),
            ("cap", ("clip", "rescale")),
            ("init", ("pca",)),
        ):
            if getattr(self, name) not in (None, *known):
                raise ValueError(f"run: {name} must be {' or '.join(known)}, got {getattr(self, name)!r}")
        _check_rates("run", self)
        if self.budget is not None and self.rank is not None:
            raise ValueError(f"run: give budget or rank, not both, got budget={self.budget}, rank={self.rank}")
        if self.budget is not None and not 0 < self.budget < math.inf:
            raise ValueError(f"run: budget must be > 0, got {self.budget}")
        if self.full and (self.budget, self.rank, self.init) != (None, None, None):
            raise ValueError(f"run: {self.method} with full has no rank, budget or init")
        for name in ("tsc", "cnc"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"run: {name} must be finite and >= 0, got {value}")
        if self.tolerance is not None and not 0 <= self.tolerance < 1:
            raise ValueError(f"run: tolerance must be in [0, 1), got {self.tolerance}")
        if self.beta is not None and not 0 <= self.beta < math.inf:
            raise ValueError(f"run: beta must be finite and >= 0, got {self.beta}")
        if self.core_steps is not None and self.core_steps < 1:
            raise ValueError(f"run: core_steps must be an integer >= 1, got {self.core_steps}")
        if self.keep is not None and not 0 < self.keep <= 1:
            raise ValueError(f"run: keep must be in (0, 1], got {self.keep}")
        if self.finetune is not None and not 0 < self.finetune < 1:
            raise ValueError(f"run: finetune must be in (0, 1), got {self.finetune}")
        if self.method == "dense" and self.init is None and (self.budget, self.rank) != (None, None):
            raise ValueError('run: dense takes budget and rank with init="pca" only')
        sized = "budget" in METHODS[self.method] and not self.full and (self.method != "dense" or self.init)
        if sized and self.budget is None and self.rank is None:
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
                what = "true or false" if key == "full" else "a number"
                raise ValueError(f"run {text!r}: {key} must be {what}, got {value!r}") from None
        return cls(method, **values)

    @classmethod
    def of(cls, run) -> "RunSpec":
        """From a RunSpec, its text, or a table of TOML with "method" and the options."""
        if isinstance(run, str):
            return cls.parse(run)
        if isinstance(run, dict):
            unknown = set(run) - {"method", *_OPTIONS}
            if unknown or "method" not in run:
                raise ValueError(f"run: a table needs method, and may have {', '.join(_OPTIONS)}, got {run}")
            return cls(**run)
        if not isinstance(run, cls):
            raise ValueError(f"run: must be a text or a table, got {run!r}")
        return run

    def __str__(self) -> str:
        options = ",".join(f"{k}={_text(getattr(self, k))}" for k in _OPTIONS if getattr(self, k) is not None)
        return f"{self.method}:{options}" if options else self.method

    @property
    def label(self) -> str:
        """Short text for tables and legends."""
        parts = [_LABELS.get(self.method, self.method)]
        if self.full:
            parts.append("full")
        if self.optimizer == "adamw":
            parts.append("AdamW")
        for name, text in (("tau", "τ={:g}"), ("sigma_max", "σ≤{:g}"), ("cap", "{}"), ("band", "{}")):
            if getattr(self, name) is not None:
                parts.append(text.format(getattr(self, name)))
        if self.rank is not None:
            parts.append(f"rank {_text(self.rank) if isinstance(self.rank, tuple) else format(self.rank, 'g')}")
        elif self.budget not in (None, BUDGET):
            parts.append(f"budget {self.budget:g}")
        if self.init == "pca":
            parts.append("PCA init")
        for name, text in (
            ("keep", "keep {:g}"),
            ("tolerance", "ϑ={:g}"),
            ("beta", "β={:g}"),
            ("lr", "lr {:g}"),
            ("momentum", "μ={:g}"),
        ):
            if getattr(self, name) is not None:
                parts.append(text.format(getattr(self, name)))
        if self.weight_decay is not None:
            parts.append(f"wd {self.weight_decay:g}")
        return " ".join(parts)

    @property
    def file(self) -> str:
        """The text as part of a file's name."""
        return str(self).translate(str.maketrans(":,/", "---", "="))

    @property
    def sizing(self) -> dict | None:
        """The arguments of factorize that choose the ranks; None: nothing is factorized."""
        if self.rank is not None:
            return {"rank": self.rank}
        return None if self.budget is None else {"budget": self.budget}


def _rank(text: str) -> int | float | tuple[int, ...]:
    """An int stays an int: rank=1 is one direction, rank=1.0 is full rank."""
    if "/" in text:
        return tuple(int(part) for part in text.split("/"))
    return int(text) if text.lstrip("+-").isdigit() else float(text)


def _flag(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError
    return text == "true"


def _text(value) -> str:
    if isinstance(value, tuple):
        return "/".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _check_rates(where: str, options) -> None:
    for name in COMMON:
        value = getattr(options, name)
        upper = 1 if name == "momentum" else math.inf
        if value is not None and not (0 <= value < upper and (value > 0 or name != "lr")):
            rule = {"lr": "finite and > 0", "momentum": "in [0, 1)", "weight_decay": "finite and >= 0"}[name]
            raise ValueError(f"{where}: {name} must be {rule}, got {value}")


_TYPES = {
    "a text": str,
    "a number": numbers.Real,
    "an integer": numbers.Integral,
    "true or false": bool,
    "a path": (str, Path),
    "a list": Sequence,
}
_PARTS = {"integers": "an integer", "numbers": "a number", "texts": "a text"}


def _is(value, kind: str) -> bool:
    if isinstance(value, bool):  # an int to Python
        return kind == "true or false"
    kind, _, of = kind.partition(" of ")
    if not isinstance(value, _TYPES[kind]) or (kind == "a list" and isinstance(value, str)):
        return False
    return not of or all(_is(part, _PARTS[of]) for part in value)


def _check_types(where: str, settings, kinds: dict[str, str]) -> None:
    for field in fields(settings):
        kind, value = kinds.get(field.name), getattr(settings, field.name)
        if kind is None or (value is None and field.default is None):
            continue
        if not _is(value, kind):
            raise ValueError(f"{where}: {field.name} must be {kind}, got {value!r}")


def check_device(where: str, device: str) -> None:
    """Raises ValueError where nothing can be computed on it."""
    try:
        torch.ones(2, device=device).sum().item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{where}: device must be one that is here, got {device!r}: {reason}") from None


_OPTIONS = tuple(f.name for f in fields(RunSpec) if f.name != "method")
_PARSERS = {"rank": _rank, "core_steps": int, "full": _flag}
_PARSERS |= dict.fromkeys(("band", "optimizer", "cap", "init"), str)
_RUN_TYPES = dict.fromkeys(_OPTIONS, "a number") | {"method": "a text", "core_steps": "an integer"}
_RUN_TYPES |= {"full": "true or false"} | dict.fromkeys(("band", "optimizer", "cap", "init"), "a text")
del _RUN_TYPES["rank"]  # an integer, a number or a list
_CONFIG_TYPES = (
    dict.fromkeys(("data", "network", "adversarial", "device"), "a text")
    | dict.fromkeys(("folder", "out"), "a path")
    | dict.fromkeys(("epochs", "batch_size", "adversarial_steps", "attack_steps", "attack_restarts"), "an integer")
    | dict.fromkeys(("lr", "momentum", "weight_decay", "lr_drop", "validation", "adversarial_eps"), "a number")
    | dict.fromkeys(("test", "augment", "tensorboard", "overwrite"), "true or false")
    | {"runs": "a list", "seeds": "a list of integers", "attacks": "a list of texts"}
    | dict.fromkeys(("eps", "drop_at"), "a list of numbers")
)

DEFAULT_RUNS = (
    RunSpec("dense"),
    RunSpec("vanilla"),
    RunSpec("vanilla", lr=0.1),  # the common rate is at its edge of divergence, where rounding decides
    RunSpec("condlr", tau=0.0),
    RunSpec("condlr", tau=0.1),
    RunSpec("condlr", tau=0.5),
    RunSpec("condlr", tau=0.1, init="pca"),
    RunSpec("condlr", tau=0.1, sigma_max=1.5),
    RunSpec("condlr", tau=0.1, rank=0.2),
)


@dataclass(frozen=True)
class TrainConfig:
    """Settings shared by all runs.

    Attributes:
        data: "digits", the path of a .npz file with arrays x [N, ...] in [0, 1] and integer y [N], or a name of
            data.FOLDERS, whose files are in `folder`.
        network: a key of networks.NETWORKS.
        runs: specifications, as RunSpec, text or table; every one is trained for every seed.
        seeds: of the split, the initial weights, the batch order and the attacks.
        epochs, batch_size, lr, momentum, weight_decay: of SGD; lr is multiplied by lr_drop at the shares `drop_at` of
            the epochs.
        validation: share of the training set that is kept for choosing settings and the best epoch; with it the
            checkpoint of the best epoch is attacked too. With `test` false it takes the place of the test set.
        test: whether the networks are tested; without, on the validation set: for choosing settings.
        augment: whether images are cropped and flipped at random; default as published for the data set.
        adversarial: "" (default), "pgd" or "low-rank-pgd": every batch is attacked before it is trained on, within
            l-infinity, respectively l2, distance adversarial_eps, with adversarial_steps steps; the rank of a low-rank
            perturbation is a fifth of the image's smaller side.
        eps: l-infinity budgets of the attacks on trained networks; attacks: their names, see robustness.evaluate
            (default all); attack_steps, attack_restarts: of the iterated ones.
        device: of the training.
        tensorboard: whether the log is written for TensorBoard too, in out/tensorboard.
        out: folder of the results; default runs/<data>.
        overwrite: whether results of other settings in that folder are replaced.
    """

    data: str = "digits"
    folder: Path | None = None
    network: str = "mlp"
    runs: tuple[RunSpec, ...] = DEFAULT_RUNS
    seeds: tuple[int, ...] = (0,)
    epochs: int = 60
    batch_size: int = 32
    lr: float = 0.2
    momentum: float = 0.3
    weight_decay: float = 0.0
    lr_drop: float = 0.3
    drop_at: tuple[float, ...] = (0.58, 0.83)
    validation: float = 0.0
    test: bool = True
    augment: bool | None = None
    adversarial: str = ""
    adversarial_eps: float = 0.1
    adversarial_steps: int = 7
    eps: tuple[float, ...] = (0.05, 0.1, 0.2)
    attacks: tuple[str, ...] | None = None
    attack_steps: int = 30
    attack_restarts: int = 2
    device: str = "cpu"
    tensorboard: bool = False
    out: Path | None = None
    overwrite: bool = False

    def __post_init__(self):
        put = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731
        _check_types("train", self, _CONFIG_TYPES)
        put("runs", tuple(RunSpec.of(run) for run in self.runs))
        for name in ("eps", "drop_at"):
            put(name, tuple(float(e) for e in getattr(self, name)))
        put("seeds", tuple(self.seeds))
        put("attacks", None if self.attacks is None else tuple(self.attacks))
        put("folder", None if self.folder is None else Path(self.folder))
        put("out", Path(self.out or Path("runs") / Path(self.data).name))
        names = [str(run) for run in self.runs]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"train: runs must be different and at least one, got {', '.join(names) or 'none'}")
        for name in ("epochs", "batch_size", "attack_steps", "attack_restarts", "adversarial_steps"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"train: {name} must be an integer >= 1, got {value!r}")
        _check_rates("train", self)
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or not all(0 <= s < 2**32 for s in self.seeds):
            raise ValueError(f"train: seeds must be different, in 0..2^32 - 1, at least one, got {list(self.seeds)}")
        if not self.eps or not all(math.isfinite(e) and e >= 0 for e in self.eps):
            raise ValueError(f"train: eps must be finite numbers >= 0, at least one, got {list(self.eps)}")
        if self.attacks is not None and (not self.attacks or not set(self.attacks) <= set(KNOWN_ATTACKS)):
            known = ", ".join(KNOWN_ATTACKS)
            raise ValueError(f"train: attacks must be out of {known}, at least one, got {list(self.attacks)}")
        for name in ("eps", "attacks"):
            if len(set(getattr(self, name) or ())) < len(getattr(self, name) or ()):
                raise ValueError(f"train: {name} must be different, got {list(getattr(self, name))}")
        if not all(0 < share < 1 for share in self.drop_at) or not 0 < self.lr_drop <= 1:
            raise ValueError(f"train: drop_at and lr_drop must be in (0, 1), got {list(self.drop_at)}, {self.lr_drop}")
        if not self.test and not self.validation:
            raise ValueError("train: without test there must be a validation part, got validation = 0")
        if self.adversarial not in ("", "pgd", "low-rank-pgd"):
            raise ValueError(f'train: adversarial must be "", pgd or low-rank-pgd, got {self.adversarial!r}')
        if not (math.isfinite(self.adversarial_eps) and self.adversarial_eps > 0):
            raise ValueError(f"train: adversarial_eps must be finite and > 0, got {self.adversarial_eps}")

    @classmethod
    def read(cls, path: Path, **changes) -> "TrainConfig":
        """From a TOML file, whose keys are the attributes; each of `runs` is a text or a table.

        Args:
            path: the file; a relative `folder` or .npz in it is looked for from where the program runs.
            changes: attributes that take another value than in the file.

        Raises:
            ValueError: no such file, no TOML, an unknown key, a value out of range; the file is named.
        """
        try:
            content = require("tomllib" if sys.version_info >= (3, 11) else "tomli").loads(
                Path(path).read_text(encoding="utf-8")
            )
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"config: cannot read {path}: {error}") from None
        except ValueError as error:  # of the parser
            raise ValueError(f"config: {path} is no TOML file: {error}") from None
        names = [f.name for f in fields(cls)]
        unknown = [key for key in content if key not in names]
        if unknown:
            raise ValueError(f"config: {path}: unknown key {unknown[0]!r}; there are {', '.join(names)}")
        try:
            return cls(**content | changes)
        except (ValueError, TypeError) as error:
            raise ValueError(f"config: {path}: {error}") from None

    def plain(self) -> dict:
        """As JSON and TOML can say it; TrainConfig(**config.plain()) is the same."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        plain = {
            k: str(v) if isinstance(v, Path) else list(v) if isinstance(v, tuple) else v for k, v in values.items()
        }
        return plain | {"runs": [str(run) for run in self.runs]}

    def only(self, run: RunSpec, seed: int) -> "TrainConfig":
        """Of one run alone."""
        return dataclasses.replace(self, runs=(run,), seeds=(seed,))
