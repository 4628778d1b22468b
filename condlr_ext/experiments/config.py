"""TrainConfig: the settings of a study, checked, read from TOML; the command line makes its arguments of the fields."""

import sys
from pathlib import Path
from typing import Annotated, Literal

from .._extras import require
from .._files import read_text
from ..robustness import KNOWN_ATTACKS
from .data import FOLDERS
from .methods import METHODS, CondLR, Dense, Method, Vanilla
from .methods.base import Settings, as_tuple
from .networks import NETWORKS

pydantic = require("pydantic")

DEFAULT_RUNS = (
    Dense(),
    Vanilla(),
    Vanilla(lr=0.1),  # the common rate is at its edge of divergence, where rounding decides
    CondLR(tau=0.0),
    CondLR(tau=0.1),
    CondLR(tau=0.5),
    CondLR(tau=0.1, init="pca"),
    CondLR(tau=0.1, sigma_max=1.5),
    CondLR(tau=0.1, rank=0.2),
)


class TrainConfig(Settings):
    """Settings shared by all runs of a study; each field's description says what it is."""

    where = "train"
    name = "a study"

    data: str = pydantic.Field(
        "digits",
        description=f'"digits", a .npz file with x [N, ...] in [0, 1] and integer y [N], or {", ".join(FOLDERS)}',
    )
    folder: Path | None = pydantic.Field(
        None,
        strict=False,
        description="folder with the files of such a data set, if not below /usr/share/datasets, data or ~/data; "
        "nothing is downloaded",
    )
    network: str = pydantic.Field("mlp", description=", ".join(NETWORKS))
    runs: tuple[Method, ...] = pydantic.Field(
        DEFAULT_RUNS,
        min_length=1,
        description="a method with its options, as dense, vanilla:rank=8 or condlr:tau=0.1,budget=0.27,sigma_max=1.5, "
        f"out of {', '.join(METHODS)}; each is trained for every seed; default: the runs of the demo",
    )
    seeds: tuple[Annotated[int, pydantic.Field(ge=0, lt=2**32)], ...] = pydantic.Field(
        (0,), min_length=1, description="seeds of split, initial weights, batch order and attacks; one training each"
    )
    epochs: int = pydantic.Field(60, ge=1, description="epochs of each training")
    batch_size: int = pydantic.Field(32, ge=1, description="samples per step")
    lr: float = pydantic.Field(0.2, gt=0, allow_inf_nan=False, description="learning rate at the start")
    momentum: float = pydantic.Field(0.3, ge=0, lt=1, description="momentum of SGD")
    weight_decay: float = pydantic.Field(0.0, ge=0, allow_inf_nan=False, description="weight decay of SGD")
    lr_drop: float = pydantic.Field(0.3, gt=0, le=1, description="factor of the learning rate at each drop")
    drop_at: tuple[Annotated[float, pydantic.Field(gt=0, lt=1)], ...] = pydantic.Field(
        (0.58, 0.83), description="when the learning rate drops, as shares of the epochs"
    )
    validation: float = pydantic.Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the training set kept for choosing settings and the best epoch, whose checkpoint is "
        "attacked too",
    )
    test: bool = pydantic.Field(True, description="attack on the test set; without, on the validation part")
    augment: bool | None = pydantic.Field(
        None, description="crop and flip images at random; default: as published for the data set"
    )
    adversarial: Literal["", "pgd", "low-rank-pgd"] = pydantic.Field(
        "",
        description="train on attacked batches: pgd (l-infinity) or low-rank-pgd (l2, rank a fifth of the image's "
        "smaller side); default: clean ones",
    )
    adversarial_eps: float = pydantic.Field(
        0.1, gt=0, allow_inf_nan=False, description="budget of the attack in training"
    )
    adversarial_steps: int = pydantic.Field(7, ge=1, description="steps of the attack in training")
    eps: tuple[Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)], ...] = pydantic.Field(
        (0.05, 0.1, 0.2),
        min_length=1,
        description="l-infinity budgets of the attacks on trained networks, in the units of x in [0, 1]",
    )
    attacks: tuple[Literal[("worst", *KNOWN_ATTACKS)], ...] = pydantic.Field(
        ("worst",),
        min_length=1,
        description=f"worst, alone: a cascade of strong attacks on what is still standing; or, each in a column of its "
        f"own and on all samples, out of {', '.join(KNOWN_ATTACKS)}",
    )
    attack_steps: int | None = pydantic.Field(
        None, ge=1, description="steps of the iterated attacks; default: 100 with worst, else 30"
    )
    attack_restarts: int | None = pydantic.Field(
        None, ge=1, description="restarts of the iterated attacks; default: 1 with worst, else 2"
    )
    attack_samples: int | None = pydantic.Field(
        None, ge=1, description="samples that are attacked, as many of each class; default: all"
    )
    jobs: int = pydantic.Field(1, ge=1, description="processes, each of which trains and attacks the runs of a seed")
    device: str = pydantic.Field("cpu", description="where training and attacks run")
    tensorboard: bool = pydantic.Field(False, description="log for TensorBoard too, in out/tensorboard")
    out: Path = pydantic.Field(
        default_factory=lambda given: Path("runs") / Path(given["data"]).name,
        strict=False,
        description="folder of the results; default: runs/<data>",
    )
    overwrite: bool = pydantic.Field(False, description="replace results of other settings in that folder")

    _lists = pydantic.field_validator("seeds", "eps", "drop_at", "attacks", mode="before")(as_tuple)

    @pydantic.field_validator("runs", mode="before")
    @classmethod
    def _parsed(cls, runs):
        runs = as_tuple(runs)
        return tuple(map(Method.parse, runs)) if isinstance(runs, tuple) else runs

    @pydantic.model_validator(mode="after")
    def _consistent(self):
        for name in ("runs", "seeds", "eps", "attacks"):
            texts = list(map(str, getattr(self, name)))
            if len(set(texts)) < len(texts):
                raise ValueError(f"train: {name} must be different, got {', '.join(texts)}")
        if "worst" in self.attacks and len(self.attacks) > 1:
            raise ValueError(f"train: attacks must be worst alone or without it, got {', '.join(self.attacks)}")
        if not self.test and not self.validation:
            raise ValueError("train: without test there must be a validation part, got validation = 0")
        return self

    @classmethod
    def read(cls, path: Path, **changes) -> "TrainConfig":
        """Read a TOML file whose keys are the fields; each of `runs` is a text or a table with "method".

        Args:
            path: The file; a relative `folder` or .npz in it is looked for from the working directory.
            changes: Fields that take another value than in the file.

        Raises:
            ValueError: No such file, no TOML, an unknown key or a value out of range; the file is named.
        """
        tomllib = require("tomllib" if sys.version_info >= (3, 11) else "tomli")
        try:
            text = read_text(path)
        except (OSError, ValueError) as error:
            raise ValueError(f"config: cannot read {path}: {error}") from None
        try:
            content = tomllib.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"config: {path} is no TOML file: {error}") from None
        try:
            return cls(**content | changes)
        except ValueError as error:
            raise ValueError(f"config: {path}: {error}") from None

    @pydantic.field_serializer("runs")
    def _texts(self, runs: tuple[Method, ...]) -> list[str]:
        return list(map(str, runs))

    def plain(self) -> dict:
        """Return the fields as JSON and TOML can hold them; TrainConfig(**config.plain()) is the same."""
        return self.model_dump(mode="json")

    def only(self, run: Method, seed: int) -> "TrainConfig":
        """Return the config of one run and seed alone."""
        return self.model_copy(update={"runs": (run,), "seeds": (seed,)})
