"""Settings of a study: from Python, from TOML, and what is refused."""

import json
import math
from pathlib import Path

import pytest

from condlr_ext.experiments import TrainConfig


@pytest.mark.parametrize(
    "change, message",
    [
        ({"runs": ()}, r"runs must be a list of at least 1, got \(\)"),
        ({"runs": ("vanilla", "vanilla:budget=0.27")}, "runs must be different"),
        ({"epochs": 0}, "epochs must be >= 1, got 0"),
        ({"batch_size": 2.5}, "batch_size must be an integer, got 2.5"),
        ({"attack_steps": 0}, "attack_steps must be"),
        ({"lr": 0.0}, "lr must be > 0, got 0.0"),
        ({"lr": math.nan}, "lr must be finite, got nan"),
        ({"momentum": 1.0}, "momentum must be < 1, got 1.0"),
        ({"seeds": (-1,)}, r"seeds\[0\] must be >= 0, got -1"),
        ({"seeds": (1, 1)}, "seeds must be different"),
        ({"seeds": ()}, "seeds must be a list of at least 1"),
        ({"eps": ()}, "eps must be a list of at least 1"),
        ({"eps": (0.1, -0.1)}, r"eps\[1\] must be >= 0, got -0.1"),
        ({"validation": 1.0}, "validation must be < 1, got 1.0"),
        ({"drop_at": (0.5, 1.5)}, r"drop_at\[1\] must be < 1, got 1.5"),
        ({"attacks": ("worst", "fgsm")}, "attacks must be worst alone or without it, got worst, fgsm"),
        ({"jobs": 0}, "jobs must be >= 1, got 0"),
        ({"adversarial": "fgsm"}, "adversarial must be '', 'pgd' or 'low-rank-pgd', got 'fgsm'"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**change)


def test_the_default_is_the_demo():
    config = TrainConfig()
    assert [str(run) for run in config.runs] == [
        "dense",
        "vanilla:budget=0.27",
        "vanilla:budget=0.27,lr=0.1",
        "condlr:tau=0.0,budget=0.27",
        "condlr:tau=0.1,budget=0.27",
        "condlr:tau=0.5,budget=0.27",
        "condlr:tau=0.1,budget=0.27,init=pca",
        "condlr:tau=0.1,budget=0.27,sigma_max=1.5",
        "condlr:tau=0.1,rank=0.2",
    ]
    assert (config.epochs, config.batch_size, config.lr, config.momentum) == (60, 32, 0.2, 0.3)
    assert config.out == Path("runs/digits") and TrainConfig(data="a/b.npz").out == Path("runs/b.npz")


def test_toml(tmp_path):
    path = tmp_path / "study.toml"
    path.write_text(
        'network = "cnn"\nseeds = [0, 1]\nlr = 0.1\nruns = ["dense", {method = "condlr", tau = 0.1, rank = 0.2}]\n'
    )
    config = TrainConfig.read(path, epochs=3)
    assert config == TrainConfig(
        network="cnn", seeds=(0, 1), lr=0.1, runs=("dense", "condlr:tau=0.1,rank=0.2"), epochs=3
    )
    assert TrainConfig(seeds=range(3)).seeds == (0, 1, 2)
    assert TrainConfig(**config.plain()) == config == TrainConfig(**json.loads(json.dumps(config.plain())))


@pytest.mark.parametrize(
    "text, message",
    [
        ("epochs = ", "is no TOML file"),
        pytest.param("seeds = " + "[" * 100000, "is no TOML file", id="deep"),
        ("epoch = 3", "a study takes data, folder, .*, got epoch"),
        ("epochs = 0", "epochs must be >= 1, got 0"),
        ("runs = [{tau = 0.1}]", "a table needs method"),
        ('runs = [{method = "condlr", tau = 0.1, gamma = 1}]', "condlr takes tau, budget, .*, got gamma"),
        ("test = false", "there must be a validation part"),
        ("epochs = true", "epochs must be an integer, got True"),
        ('lr = "0.1"', "lr must be a number, got '0.1'"),
        ('augment = "no"', "augment must be true or false, got 'no'"),
        ("seeds = 3", "seeds must be a list, got 3"),
        ("seeds = [1.5]", r"seeds\[0\] must be an integer, got 1.5"),
        ("data = 3", "data must be a text, got 3"),
        ("out = 3", "out must be a path, got 3"),
        ("device = 5", "device must be a text, got 5"),
        ('runs = "dense"', "runs must be a list, got 'dense'"),
        ("runs = [3]", "run: must be a text or a table, got 3"),
        ("runs = [{method = [1]}]", r"run: method must be one of .*, got \[1\]"),
        ("lr_drop = 0", "lr_drop must be > 0, got 0"),
        ('runs = [{method = "dense", lr = [1]}]', r"run: lr must be a number, got \[1\]"),
        ('runs = [{method = "condlr", tau = 0.1, rank = [1, "2"]}]', r"rank\[1\] must be an integer, got '2'"),
        ('runs = ["robust-dlrt:tolerance=0.1,beta=0.1,core_steps=0"]', "core_steps must be >= 1, got 0"),
        ('runs = ["dlrt:tolerance=1"]', "tolerance must be < 1, got 1"),
        ('attacks = "fgsm"', "attacks must be a list, got 'fgsm'"),
        ('attacks = ["foo"]', r"attacks\[0\] must be 'worst', 'fgsm', .*, got 'foo'"),
        ("eps = [0.1, 0.1]", "eps must be different"),
    ],
)
def test_bad_toml(tmp_path, text, message):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"config: {path}.*{message}"):
        TrainConfig.read(path)
    with pytest.raises(ValueError, match="cannot read"):
        TrainConfig.read(tmp_path / "absent.toml")


@pytest.mark.parametrize(
    "content, message",
    [
        (b"runs = " + b"[" * 5000 + b"]" * 5000, "is no TOML file: .*recursion"),
        (b"runs = " + b"{a = " * 5000 + b"1" + b"}" * 5000, "is no TOML file: .*recursion"),
        (b"# " + b"x" * 2**20, "it has more than 1048576 bytes"),
        (b"epochs = \xff", "'utf-8' codec"),
        (b"epochs = " + b"9" * 5000, "is no TOML file: .*digits"),
    ],
    ids=["lists", "tables", "size", "encoding", "digits"],
)
def test_hostile_toml(tmp_path, content, message):
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"config: .*{path}.*{message}") as caught:
        TrainConfig.read(path)
    assert "\n" not in str(caught.value)


STUDIES = sorted((Path(__file__).parents[2] / "studies").glob("*.toml"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_studies_can_be_read(path):
    config = TrainConfig.read(path)
    assert config.out == Path("runs") / path.stem
    if "digits" not in path.stem and not path.stem.startswith("tune"):
        milestones = [round(share * config.epochs) for share in config.drop_at]
        assert config.epochs == 120 and milestones == [70, 100] and config.validation == 0.25


def test_there_are_studies():
    assert len(STUDIES) >= 4
