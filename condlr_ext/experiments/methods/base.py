"""Base classes of the training methods: checked options with a text form, and the hooks that training calls."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..._extras import require
from ...factorize import factorize, to_dense
from ..inspect_layers import dense_layers
from ..networks import HEAD

pydantic = require("pydantic")

BUDGET = 0.27
EXCLUDED = f"*{HEAD}"  # the classifier stays dense in every run
ALIGNED = 2048  # samples that principal directions are taken from
RATES = ("lr", "momentum", "weight_decay")
METHODS: dict[str, type["Method"]] = {}

_NEEDED = {
    "int_type": "an integer", "float_type": "a number", "finite_number": "finite", "bool_type": "true or false",
    "string_type": "a text", "path_type": "a path", "tuple_type": "a list", "literal_error": "{expected}",
    "too_short": "a list of at least {min_length}", "greater_than": "> {gt:g}", "greater_than_equal": ">= {ge:g}",
    "less_than": "< {lt:.10g}", "less_than_equal": "<= {le:g}",
}  # fmt: skip


class Settings(pydantic.BaseModel, frozen=True, extra="forbid", strict=True):
    """Values checked by pydantic, with errors of one line: the setting, what was needed and what came.

    Attributes:
        where: Start of the error texts.
        name: What the settings are for.

    Raises:
        ValueError: A missing or unknown setting, or one of the wrong type or out of range.
    """

    where: ClassVar[str]
    name: ClassVar[str]

    def __init__(self, /, **values):
        try:
            super().__init__(**values)
        except pydantic.ValidationError as error:
            raise ValueError(_one_line(type(self), error.errors())) from None

    @classmethod
    def names(cls) -> list[str]:
        """Return the names of the settings."""
        return list(cls.model_fields)


def _one_line(model: type[Settings], errors: list[dict]) -> str:
    first = errors[0]
    if first["type"] == "value_error":  # of our own validators
        return str(first["ctx"]["error"])
    setting = first["loc"][0]
    if first["type"] == "missing":
        return f"{model.where}: {model.name} needs {setting}"
    if first["type"] == "extra_forbidden":
        return f"{model.where}: {model.name} takes {', '.join(model.names())}, got {setting}"
    errors = [e for e in errors if e["loc"][:1] == (setting,)]
    first = max(errors, key=lambda e: len(e["loc"]))  # the bad entry of a list
    alternatives = [e for e in errors if e["input"] is first["input"]]
    needed = dict.fromkeys(_NEEDED.get(e["type"], "valid").format(**e.get("ctx", {})) for e in alternatives)
    place = setting + "".join(f"[{i}]" for i in first["loc"] if isinstance(i, int))
    return f"{model.where}: {place} must be {' or '.join(needed)}, got {first['input']!r}"


def as_tuple(value: Any) -> Any:
    """Return any sequence but a text as a tuple, anything else as it is."""
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


class Method(Settings):
    """One method with its options, as text "dense", "vanilla:rank=8" or "condlr:tau=0.1,budget=0.27,band=mean".

    A subclass that sets `name` is registered in METHODS. This one trains the dense network with plain SGD.

    Attributes:
        name: The method in texts.
        title: The method in tables and legends.
        whole_each_step: Whether the model is meaningful after every step, not only after `settle`.
        bounds_kappa: Whether kappa is at a bound, which tables show to seven digits.
        lr: Instead of the TrainConfig's, like momentum and weight_decay.
    """

    where = "run"
    title: ClassVar[str]
    whole_each_step: ClassVar[bool] = True
    bounds_kappa: ClassVar[bool] = False

    lr: float | None = pydantic.Field(None, gt=0, allow_inf_nan=False)
    momentum: float | None = pydantic.Field(None, ge=0, lt=1)
    weight_decay: float | None = pydantic.Field(None, ge=0, allow_inf_nan=False)

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        if "name" in vars(cls):
            METHODS[cls.name] = cls

    # ------------------------------------------------------------------------------------------------ text

    @staticmethod
    def parse(run) -> "Method":
        """Return the method of a text NAME or NAME:KEY=VALUE,KEY=VALUE, or of a table with "method" and the options.

        Raises:
            ValueError: No method, or options that it does not take.
        """
        if isinstance(run, Method):
            return run
        if isinstance(run, str):
            run = _parsed(run)
        if not isinstance(run, dict):
            raise ValueError(f"run: must be a text or a table, got {run!r}")
        if "method" not in run:
            raise ValueError(f"run: a table needs method, got {run}")
        if run["method"] not in list(METHODS):  # of any type
            raise ValueError(f"run: method must be one of {', '.join(METHODS)}, got {run['method']!r}")
        return METHODS[run["method"]](**{name: value for name, value in run.items() if name != "method"})

    @classmethod
    def names(cls) -> list[str]:
        """Return the options in the order of the text, which is the key of results: tau first, rates last."""
        return sorted(cls.model_fields, key=lambda name: (name in RATES) - (name == "tau"))

    @property
    def given(self) -> dict[str, Any]:
        """Options that were given, in the order of the text."""
        values = {name: getattr(self, name) for name in self.names() if name in self.model_fields_set}
        return {name: value for name, value in values.items() if value is not None}

    def __str__(self) -> str:
        options = ",".join(f"{name}={_text(value)}" for name, value in self.given.items())
        return f"{self.name}:{options}" if options else self.name

    def identity(self) -> dict[str, Any]:
        """Return the entries of a record of results that name the method."""
        return {"run": str(self), "label": self.label, "method": self.name, "tau": self.given.get("tau")}

    @property
    def label(self) -> str:
        """Short text for tables and legends."""
        rates = self.shown(lr="lr {:g}", momentum="μ={:g}", weight_decay="wd {:g}")
        return " ".join([self.title, *self.marks(), *rates])

    def marks(self) -> list[str]:
        """Return the parts of the label between the title and the rates."""
        return []

    def shown(self, **formats: str) -> list[str]:
        """Return the formatted values of those of the named options that were given."""
        given = self.given
        return [text.format(given[name]) for name, text in formats.items() if name in given]

    # -------------------------------------------------------------------------------------------- training

    @property
    def low_rank(self) -> bool:
        """Whether the trained network has low-rank layers."""
        return False

    def check(self, model: nn.Module, epochs: int) -> None:
        """Raise ValueError if the options do not fit the dense network or the number of epochs."""

    def prepare(self, model: nn.Module, x: Tensor) -> None:
        """Change the dense network, in place, before training; x holds the training samples."""

    def optimizer_for(self, model: nn.Module, config: Any) -> Optimizer:
        """Return the optimizer for the model as it is now, with the rates of the config where none were given."""
        rates = {name: getattr(config, name) for name in RATES}
        return self.make_optimizer(model, **rates | {k: v for k, v in self.given.items() if k in RATES})

    def make_optimizer(self, model: nn.Module, lr: float, momentum: float, weight_decay: float) -> Optimizer:
        """Return the optimizer of the method."""
        parameters = [p for p in model.parameters() if p.requires_grad]
        return torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay)

    def penalty(self, model: nn.Module, samples: int) -> Tensor | float:
        """Return what is added to the loss, a mean over the training samples."""
        return 0.0

    def phases(self, epochs: int) -> dict[int, Callable[[nn.Module], object]]:
        """Return {epoch: change of the network before it}; the optimizer starts anew after a change."""
        return {}

    def settle(self, optimizer: Optimizer) -> None:
        """Make the model whole, at the end of an epoch."""

    def skipped(self, optimizer: Optimizer) -> int | None:
        """Return the number of layer updates that the optimizer skipped, None if it skips none."""

    def finish(self, model: nn.Module) -> int:
        """Remove training-only modules and return how many weights are pruned to zero."""
        return 0

    def rebuild(self, model: nn.Module, ranks: dict[str, int], epoch: int | None = None, epochs: int = 0) -> None:
        """Give a dense network, in place, the layers of a trained one, whose values are then loaded.

        Args:
            model: As built.
            ranks: {low-rank layer: rank} at that time.
            epoch: How many epochs of `epochs` are done; None: the network is finished.

        Raises:
            ValueError: The ranks are not those of such a network.
        """


class Sized(Method):
    """A method that replaces the hidden layers by low-rank ones, with ranks chosen by budget or rank.

    Attributes:
        budget: Share of the hidden weights, see factorize; default 0.27 where no rank is given.
        rank: As in factorize. A tuple, as text "rank=40/17", has a rank for each hidden layer in turn.
    """

    budget: float | None = pydantic.Field(None, gt=0, allow_inf_nan=False)
    rank: int | float | tuple[int, ...] | None = None

    _list = pydantic.field_validator("rank", mode="before")(as_tuple)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _default_budget(cls, options: dict) -> dict:
        chosen = any(options.get(name) is not None for name in ("budget", "rank"))
        return options if chosen or not cls._needs_size(options) else options | {"budget": BUDGET}

    @pydantic.model_validator(mode="after")
    def _one_size(self):
        if self.budget is not None and self.rank is not None:
            raise ValueError(f"run: give budget or rank, not both, got budget={self.budget}, rank={_text(self.rank)}")
        return self

    @classmethod
    def _needs_size(cls, options: dict) -> bool:
        return True

    @property
    def low_rank(self) -> bool:
        return self.budget is not None or self.rank is not None

    def marks(self) -> list[str]:
        if self.rank is not None:
            return [f"rank {_text(self.rank) if isinstance(self.rank, tuple) else format(self.rank, 'g')}"]
        return [] if self.budget in (None, BUDGET) else [f"budget {self.budget:g}"]

    def sizing(self, model: nn.Module) -> dict:
        """Return the arguments of factorize that choose the ranks of the dense network's layers."""
        if self.rank is None:
            return {"budget": self.budget}
        if not isinstance(self.rank, tuple):
            return {"rank": self.rank}
        names, ranks = list(dense_layers(model)), self.rank
        if len(names) != len(ranks):
            raise ValueError(
                f"run: a rank for each of {len(names)} hidden layers ({', '.join(names)}), got {len(ranks)}"
            )
        return {"rank": dict(zip(names, ranks, strict=True))}

    def check(self, model: nn.Module, epochs: int) -> None:
        if self.budget is not None or self.rank is not None:
            self.chosen_ranks(model)

    def chosen_ranks(self, model: nn.Module) -> dict[str, int]:
        """Return {layer: rank} for the dense network, which is left alone."""
        report = factorize(copy.deepcopy(model).to("meta"), exclude=EXCLUDED, **self.sizing(model))
        return {layer.name: layer.rank for layer in report.layers}

    def compress(self, model: nn.Module) -> None:
        """Replace the hidden layers, in place, by low-rank ones nearest to them."""
        factorize(model, exclude=EXCLUDED, **self.sizing(model))

    def rebuild(self, model: nn.Module, ranks: dict[str, int], epoch: int | None = None, epochs: int = 0) -> None:
        if ranks:
            self.replace(model, ranks)

    def replace(self, model: nn.Module, ranks: dict[str, int]) -> None:
        """Replace the named layers, in place, by low-rank ones with any values."""
        factorize(model, rank=ranks, exclude=EXCLUDED, init="random")


class LowRank(Sized):
    """A method that trains low-rank layers from the start.

    Attributes:
        init: "pca": first project the hidden weights onto the leading principal directions of their inputs on some
            training samples, see factorize.
    """

    init: Literal["pca"] | None = None

    def marks(self) -> list[str]:
        return [*super().marks(), *self.shown(init="PCA init")]

    def prepare(self, model: nn.Module, x: Tensor) -> None:
        self.align(model, x)
        if self.low_rank:
            self.compress(model)

    def align(self, model: nn.Module, x: Tensor) -> None:
        """Project the hidden weights as `init` says; they stay dense."""
        if self.init is not None:
            factorize(model, exclude=EXCLUDED, init="pca", example_input=x[:ALIGNED], **self.sizing(model))
            to_dense(model)

    def rebuild(self, model: nn.Module, ranks: dict[str, int], epoch: int | None = None, epochs: int = 0) -> None:
        if self.low_rank and not ranks:
            raise ValueError(f"{self.name} has low-rank layers, the file names none")
        super().rebuild(model, ranks)


def check_runs(runs: Sequence[Method], model: nn.Module, epochs: int) -> None:
    """Raise ValueError, before any training, for options that do not fit the dense network or the number of epochs.

    The first low-rank run is tried, to see that the backend can serve.
    """
    for run in runs:
        run.check(model, epochs)
    if low_rank := [run for run in runs if run.low_rank]:
        with torch.random.fork_rng(devices=[]):
            low_rank[0].compress(copy.deepcopy(model))


# ------------------------------------------------------------------------------------------------------- text


def _parsed(text: str) -> dict[str, Any]:
    name, _, options = text.partition(":")
    values = {"method": name}
    for item in options.split(",") if options else ():
        key, equals, value = item.partition("=")
        if not key or not equals or key in values:
            raise ValueError(f"run {text!r}: each option must be KEY=VALUE, given once, got {item!r}")
        values[key] = _value(value)
    return values


def _value(text: str) -> Any:
    """Return true or false, an integer, a number, integers with / between them, or else the text."""
    if text in ("true", "false"):
        return text == "true"
    try:
        if "/" in text:
            return tuple(int(part) for part in text.split("/"))
        return int(text) if text.lstrip("+-").isdigit() else float(text)
    except ValueError:
        return text


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return "/".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
