"""Checkpoints of runs: their numbers again, their layers, and files that are unusable."""

import math
import time
from collections import OrderedDict

import pytest
import torch
from helpers.data_files import write_npz
from safetensors.torch import load_file, save_file
from torch import nn

import condlr_ext
from condlr_ext.experiments import TrainConfig, evaluate_checkpoint, inspect_checkpoint, report, train
from condlr_ext.experiments.checkpoint import load_checkpoint
from condlr_ext.io.checkpoint import read

pytestmark = pytest.mark.usefixtures("no_figures")


def test_checkpoints_give_back_their_numbers(trained):
    results, out = trained
    for run in results["runs"]:
        again = evaluate_checkpoint(out / run["checkpoint"])
        assert (again.pop("run"), again.pop("data")) == (run["run"], "digits")
        assert again == run["robustness"]
    fewer = evaluate_checkpoint(out / "dense-seed0.safetensors", eps=[0.3], steps=1)
    assert fewer["eps"] == [0.3] and len(fewer["worst"]) == 1


def test_checkpoints_hold_the_stored_factors(trained):
    results, out = trained
    run = results["runs"][2]
    model, metadata = load_checkpoint(out / run["checkpoint"])
    assert metadata["ranks"] == run["ranks"] and metadata["tau"] == 0.1 and metadata["seed"] == 0
    stored = load_file(out / run["checkpoint"])
    assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())
    kappa = {name: values[-1] for name, values in run["kappa"].items()}
    assert condlr_ext.condition_numbers(model) == pytest.approx(kappa, rel=1e-12)


def test_inspect(trained):
    results, out = trained
    for run in results["runs"]:
        layers = {layer["name"]: layer for layer in inspect_checkpoint(out / run["checkpoint"])["layers"]}
        assert [(x["m"], x["n"]) for x in layers.values()] == [(256, 64), (256, 256), (10, 256)]
        assert {name: layers[name]["rank"] for name in run["ranks"]} == run["ranks"]
        assert layers["head"]["rank"] == 10 and layers["head"]["weights"] == 2560
        for name, values in run["kappa"].items():
            assert layers[name]["kappa"] == pytest.approx(values[-1], rel=1e-9)
        for layer in layers.values():
            assert layer["kappa"] == pytest.approx(layer["sigma_max"] / layer["sigma_min"])
            constrained = run["method"] == "condlr" and layer["name"] in run["ranks"]
            assert (layer["orthonormality"] is not None) == constrained
    assert layers["fc1"]["weights"] == 4 * 320 + 16 and layers["fc1"]["sigma_max"] <= 1.5 * (1 + 1e-5)


def test_unusable_checkpoints(tmp_path, trained):
    _, out = trained
    good = (out / "dense-seed0.safetensors").read_bytes()
    tensors = load_file(out / "dense-seed0.safetensors")

    def fails(path, message):
        for use in (evaluate_checkpoint, inspect_checkpoint):
            with pytest.raises(ValueError, match=message):
                use(path)

    fails(tmp_path / "absent.safetensors", "cannot read .*absent")
    fails(tmp_path, "cannot read")
    for i, content in enumerate((b"", b"text", good[:100], good[:-4], b"\x00" + good[1:])):
        path = tmp_path / f"damaged{i}.safetensors"
        path.write_bytes(content)
        fails(path, f"cannot read .*damaged{i}")

    save_file(tensors, tmp_path / "foreign.safetensors")
    fails(tmp_path / "foreign.safetensors", "was not written by condlr train, it lacks attack, classes")
    stored = read(out / "dense-seed0.safetensors")

    def save(name, model, **changes):
        extra = {key: value for key, value in (stored.extra | changes).items() if value is not ...}
        condlr_ext.save(model, tmp_path / name, extra=extra)
        return tmp_path / name

    model = load_checkpoint(out / "dense-seed0.safetensors")[0]
    fails(
        save("incomplete.safetensors", model, run=..., seed=...), "was not written by condlr train, it lacks run, seed"
    )
    for change in (
        {"run": "condlr:tau=0.1"}, {"run": 3}, {"attack": {"strength": 3}}, {"attack": [1]}, {"network": "../passwd"},
        {"attack": stored.extra["attack"] | {"steps": 10**12}}, {"ranks": {"fc1": 10**9}}, {"ranks": {"fc1": 2.5}},
        {"run": "condlr:tau=" + "9" * 400}, {"seed": -1}, {"test": "no"}, {"mean": [0.5] * 10**5, "std": [1.0] * 10**5},
        {"mean": "x"}, {"mean": [0.5]}, {"mean": [0.5], "std": [0.0]}, {"shape": "8"}, {"shape": [1, 8.0, 8.0]},
        {"shape": [1, 30_000, 30_000]}, {"shape": []}, {"shape": [2**30] * 4},
        {"classes": 10**9}, {"classes": 4 * 10**6}, {"classes": 2**70}, {"classes": "10"}, {"classes": -1},
    ):  # fmt: skip
        start = time.perf_counter()
        fails(save("wrong.safetensors", model, **change), "does not describe a model of this package: .{,500}$")
        assert time.perf_counter() - start < 5  # nothing of the claimed size is built
    fails(save("few.safetensors", nn.Sequential(OrderedDict(fc1=model.fc1))), "does not describe a model")
    model.head.bias.data.fill_(math.nan)
    fails(save("nan.safetensors", model), "holds NaN or Inf")


def test_inspect_takes_no_memory_for_the_batch(trained):
    run = trained[0]["runs"][2]
    assert inspect_checkpoint(trained[1] / run["checkpoint"], batch_size=10**12)["batch_size"] == 10**12
    with pytest.raises(ValueError, match=r"inspect: .* does not run on a batch \[1000000000000000000000"):
        inspect_checkpoint(trained[1] / run["checkpoint"], batch_size=10**21)


def test_results_that_cannot_be_read(tmp_path):
    path = tmp_path / "results.csv"

    def fails(rows, settings, message):
        path.write_bytes(rows)
        path.with_suffix(".toml").write_bytes(settings)
        with pytest.raises(ValueError, match=message) as caught:
            report.read(path)
        assert "\n" not in str(caught.value)

    with pytest.raises(ValueError, match="cannot read .*results.csv"):
        report.read(path)
    fails(b"run,clean\ndense,much\n", b"", "cannot read .*results.csv: could not convert")
    fails(b"run,clean\ndense\n", b"", "cannot read .*results.csv: a row must have as many cells")
    fails(b"run,clean\ndense,1,2\n", b"", "cannot read .*results.csv: a row must have as many cells")
    fails(b"run,clean\n\xff,1\n", b"", "cannot read .*results.csv: 'utf-8' codec")
    fails(b'run,clean\n"' + b"x" * 200_000 + b'",1\n', b"", "cannot read .*results.csv: field larger than")
    fails(b"run,clean\ndense,1\n" * 10**5, b"", "cannot read .*results.csv: it has more than")
    fails(b"run,clean\ndense,1\n", b"x = " + b"[" * 5000 + b"]" * 5000, "cannot read .*results.toml: .*recursion")
    fails(b"run,clean\ndense,1\n", b"x = ", "cannot read .*results.toml: Invalid value")


def test_evaluate_refuses_data_of_another_shape(tmp_path, trained):
    other = write_npz(tmp_path / "other.npz")
    with pytest.raises(ValueError, match=r"needs samples \[1, 8, 8\] and 10 classes, .*other.npz has \[2, 3\] and 3"):
        evaluate_checkpoint(trained[1] / "dense-seed0.safetensors", data=str(other))


def test_best_checkpoint_has_its_own_numbers(tmp_path):
    config = TrainConfig(runs=("condlr:tau=0.1",), epochs=4, lr=0.5, validation=0.25, attack_steps=2, out=tmp_path)
    (record,) = train(config)["runs"]
    best = record["best"]
    assert best["validation"] == max(record["validation"]) == record["validation"][best["epoch"] - 1]
    again = evaluate_checkpoint(tmp_path / best["checkpoint"])
    assert {k: again[k] for k in best["robustness"]} == best["robustness"]
    _, (row,) = report.read(tmp_path / "results.csv")
    assert (row["best_epoch"], row["best_clean"]) == (best["epoch"], pytest.approx(again["clean"]))
    if best["epoch"] < 4:
        assert best["robustness"] != record["robustness"]


def test_inspect_shows_convolutions(tmp_path):
    config = TrainConfig(runs=("condlr:tau=0.1", "vanilla"), network="cnn", epochs=1, attack_steps=1, out=tmp_path)
    for record in train(config)["runs"]:
        layers = inspect_checkpoint(tmp_path / record["checkpoint"])["layers"]
        assert [(x["m"], x["n"]) for x in layers] == [(20, 9), (50, 180), (200, 200), (10, 200)]
        assert {x["name"]: x["rank"] for x in layers[:3]} == record["ranks"]
        assert all((x["route"] is not None) == (record["method"] == "condlr") for x in layers[:3])
