"""Studies: result files, interrupted and repeated trainings, several seeds."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers.data_files import write_npz

from condlr_ext.errors import NonFiniteError, RankError
from condlr_ext.experiments import RunSpec, TrainConfig, checkpoint, evaluate_checkpoint, report, study, train
from condlr_ext.experiments.checkpoint import load_checkpoint
from condlr_ext.experiments.progress import Progress
from condlr_ext.experiments.trainer import Trainer

pytestmark = pytest.mark.usefixtures("no_figures")


def test_result_files(trained):
    results, out = trained
    settings, rows = report.read(out / "results.csv")
    assert report.table(rows, settings) == report.summary(results) and settings["eps"] == results["config"]["eps"]
    assert settings["layers"] == ["fc1", "fc2"] and settings["versions"] == results["versions"]
    for row, record in zip(rows, results["runs"], strict=True):
        exact = report.flat(record)
        assert row == {k: pytest.approx(v, rel=1e-6) if isinstance(v, float) else v for k, v in exact.items()}
        assert row["worst@0.2"] == pytest.approx(record["robustness"]["worst"][2]) and row["seed"] == 0
        assert json.loads((out / record["checkpoint"]).with_suffix(".json").read_text()) == record
    assert (out / "results.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    names = {"results.csv", "results.toml", "table.md", "results.png", "spectra.png", "parameters.png"}
    for run in results["runs"]:
        names |= {str(Path(run["checkpoint"]).with_suffix(suffix)) for suffix in (".safetensors", ".json", ".jsonl")}
    assert {path.name for path in out.iterdir()} == names and len(names) == 18
    lines = (out / "table.md").read_text().splitlines()
    assert len(lines) == 2 + 4 and all(line.count("|") == 15 for line in lines)
    for title in ("ranks", "kept %", "clean %", "FGSM 0.1", "worst 0.2", "saturated %", "max κ", "s per epoch"):
        assert f"| {title} " in lines[0]


def test_results_hold_every_number(trained):
    results, _ = trained
    assert results["config"]["eps"] == [0.05, 0.1, 0.2] and results["config"]["seeds"] == [0]
    assert results["data"] == {"train": 1257, "test": 540, "validation": 0, "shape": [1, 8, 8], "classes": 10}
    assert results["versions"]["torch"] == torch.__version__
    dense, vanilla, condlr, capped = results["runs"]
    assert [run["kept"] for run in results["runs"]] == pytest.approx(
        [
            1,
            20480 / 81920,
            (32 * 320 + 32**2 + 20 * 512 + 20**2) / 81920,
            (4 * 320 + 16 + 4 * 512 + 16) / 81920,
        ]
    )
    assert dense["parameters"] == 64 * 256 + 256 + 256 * 256 + 256 + 2570
    assert dense["kappa"] == {} and dense["orthonormality"] is None
    assert [len(v) for v in dense["dense_kappa"].values()] == [2, 2] and dense["max_kappa"] > 100
    assert vanilla["ranks"] == condlr["ranks"] == {"fc1": 32, "fc2": 20} and vanilla["max_kappa"] > 1.1
    assert condlr["max_kappa"] <= 1.1 * (1 + 1e-5) and capped["max_kappa"] <= 1 + 1e-5
    for run in results["runs"]:
        assert run["status"] == "trained" and len(run["step_loss"]) == 80 and run["seconds_per_epoch"] > 0
        attack = run["robustness"]
        assert attack["clean"] >= attack["worst"][0] >= attack["worst"][2]
        assert attack["clean"] > 0.5 or run is capped  # rank 4 learns little in two epochs
        assert all(w <= fgsm for w, fgsm in zip(attack["worst"], attack["fgsm"], strict=True))
        assert (
            list(attack["stages"]) == ["fab", "apgd", "apgd-dlr", "apgd-t", "square"]
            and len(attack["distances"]) == 540
        )


def test_the_seed_decides(tmp_path, trained):
    results, _ = trained
    before = torch.get_rng_state()
    again, other = (
        train(TrainConfig(runs=("condlr:tau=0.1",), epochs=2, attack_steps=3, out=tmp_path, seeds=(seed,)))["runs"][0]
        for seed in (0, 1)
    )
    assert torch.equal(torch.get_rng_state(), before)
    first = results["runs"][2]
    for key in ("step_loss", "kappa", "orthonormality", "robustness"):
        assert again[key] == first[key]
    assert other["step_loss"] != first["step_loss"]


@pytest.mark.figures
def test_a_diverged_run_is_marked_and_the_rest_go_on(tmp_path):
    results = train(TrainConfig(runs=("vanilla", "condlr:tau=0.1"), lr=20.0, epochs=2, attack_steps=1, out=tmp_path))
    vanilla, condlr = results["runs"]
    assert vanilla["status"] == "diverged" and len(vanilla["step_loss"]) < 80
    assert "robustness" not in vanilla and not list(tmp_path.glob("vanilla*.safetensors"))
    assert condlr["max_kappa"] <= 1.1 * (1 + 1e-5) and condlr["orthonormality"] <= 1e-5
    table = (tmp_path / "table.md").read_text()
    assert "| vanilla UVᵀ (diverged) | 32, 20 | 25.0 | - | - |" in table and "CondLR τ=0.1" in table
    _, (row, _) = report.read(tmp_path / "results.csv")
    assert (row["status"], row["clean"]) == ("diverged", None)
    json.loads((tmp_path / "vanilla-budget0.27-seed0.json").read_text(), parse_constant=pytest.fail)  # no NaN
    assert (tmp_path / "results.png").exists()


def test_a_net_too_large_to_attack_is_diverged(tmp_path, monkeypatch):
    def overflow(*arguments, **options):
        raise NonFiniteError("evaluate: the gradient is not finite")

    monkeypatch.setattr(checkpoint, "worst_case", overflow)
    results = train(TrainConfig(runs=("dense",), epochs=1, out=tmp_path))
    assert results["runs"][0]["status"] == "diverged" and not list(tmp_path.glob("*.safetensors"))


def test_bad_rank_fails_before_training(tmp_path):
    path = write_npz(tmp_path / "small.npz")
    with pytest.raises(RankError, match="fc1"):
        train(TrainConfig(data=str(path), runs=("dense", "condlr:tau=0.1,rank=40"), out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_an_unusable_folder_is_found_out_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/self")):
        with pytest.raises(ValueError, match=f"must be one that can be written, got {out}"):
            train(TrainConfig(runs=("dense",), epochs=10**6, out=out))


def test_names_of_files(tmp_path):
    run = study._Run(TrainConfig(out=tmp_path), RunSpec.parse("condlr:tau=0.1,rank=40/17"), 3)
    assert run.file("-best.safetensors") == tmp_path / "condlr-tau0.1-rank40-17-seed3-best.safetensors"


def test_runs_started_together_can_share_a_folder(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: study._make_folder(tmp_path / "out"), range(400)))
    assert not list((tmp_path / "out").iterdir())


def test_own_data_with_two_classes(tmp_path):
    path = write_npz(tmp_path / "two.npz", classes=2, n=200)
    results = train(TrainConfig(data=str(path), runs=("condlr:tau=0.5,rank=3",), epochs=5, out=tmp_path / "out"))
    attack = results["runs"][0]["robustness"]
    assert attack["clean"] == 1 and list(attack["stages"]) == ["fab", "apgd", "square"]


def test_a_run_that_fails_leaves_no_half_written_file(tmp_path, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("no figure")

    monkeypatch.setattr(report, "_png", broken)
    with pytest.raises(RuntimeError, match="no figure"):
        train(TrainConfig(runs=("dense",), epochs=1, attack_steps=1, out=tmp_path))
    assert {p.name for p in tmp_path.iterdir()} == {
        "results.csv",
        "results.toml",
        "table.md",
        *(f"dense-seed0.{end}" for end in ("safetensors", "json", "jsonl")),
    }
    report.read(tmp_path / "results.csv")
    load_checkpoint(tmp_path / "dense-seed0.safetensors")


@pytest.mark.parametrize(
    "run",
    [
        "dense",
        "condlr:tau=0.1,budget=0.4",
        "dlrt:tolerance=0.2,budget=0.4,lr=0.05,momentum=0.0",
        "svd-prune:budget=0.4",
        "tscnc:keep=0.5,lr=0.1",
    ],
)
def test_an_interrupted_training_goes_on_bit_for_bit(tmp_path, monkeypatch, run):
    """It is stopped in the middle of its third epoch; states are written after every epoch here."""
    monkeypatch.setattr(study, "STATE_EVERY", -1)
    images = write_npz(tmp_path / "images.npz", n=400, shape=(1, 8, 8))
    settings = dict(data=str(images), network="cnn", validation=0.2, attack_steps=2, attack_restarts=1)
    settings |= dict(runs=(run,), epochs=5, eps=(0.1,))
    whole = train(TrainConfig(**settings, out=tmp_path / "whole"))["runs"][0]
    steps = len(whole["step_loss"])
    original = Trainer._loss

    def interrupted(self, x, y):
        if len(self.history["step_loss"]) == steps // 2:
            raise KeyboardInterrupt
        return original(self, x, y)

    monkeypatch.setattr(Trainer, "_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(TrainConfig(**settings, out=tmp_path / "parts"))
    calls = []
    monkeypatch.setattr(Trainer, "_loss", lambda self, x, y: calls.append(1) or original(self, x, y))
    again = train(TrainConfig(**settings, out=tmp_path / "parts"))["runs"][0]
    assert steps // 2 <= len(calls) / (3 if "dlrt" in run else 1) < steps  # it has not begun anew
    for key in whole:
        if key != "seconds_per_epoch":
            assert again[key] == whole[key], key
    assert not list((tmp_path / "parts").glob("*.state"))
    logs = [
        [json.loads(line) for line in (tmp_path / place).glob("*.jsonl").__next__().open()]
        for place in ("whole", "parts")
    ]
    assert [line["epoch"] for line in logs[1]] == [1, 2, 3, 4, 5]
    for a, b in zip(*logs, strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == {k: v for k, v in b.items() if k != "seconds"}


def test_an_interrupted_attack_goes_on_after_its_last_stage(tmp_path, monkeypatch):
    settings = dict(runs=("dense",), epochs=2, attack_steps=5, attack_samples=100, eps=(0.1,))
    whole = train(TrainConfig(**settings, out=tmp_path / "whole"))["runs"][0]
    assert (whole["robustness"]["n"], whole["robustness"]["of"]) == (100, 540)
    assert report.flat(whole)["clean"] == whole["robustness"]["clean_of_all"] != whole["robustness"]["clean"]
    show, seen = Progress.attack, []

    def interrupted(bar, stage, *counts):
        seen.append(stage)
        if stage == "apgd-t":
            raise KeyboardInterrupt
        show(bar, stage, *counts)

    monkeypatch.setattr(Progress, "attack", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(TrainConfig(**settings, out=tmp_path / "parts"))
    assert (tmp_path / "parts/dense-seed0.attacks").exists() and {*seen} == {"fab", "apgd", "apgd-dlr", "apgd-t"}
    seen.clear()
    monkeypatch.setattr(Progress, "attack", lambda bar, stage, *counts: seen.append(stage))
    again = train(TrainConfig(**settings, out=tmp_path / "parts"))["runs"][0]
    assert again["robustness"] == whole["robustness"] and {*seen} == {"apgd-t", "square"}
    assert not list((tmp_path / "parts").glob("*.attacks"))


def test_processes_give_the_same_numbers(tmp_path, monkeypatch):
    settings = dict(runs=("dense", "condlr:tau=0.1"), seeds=(0, 1), epochs=1, attack_steps=1, eps=(0.1,))
    alone = train(TrainConfig(**settings, out=tmp_path / "alone"))
    monkeypatch.setattr(Trainer, "run_epoch", pytest.fail)  # in this process
    shared = train(TrainConfig(**settings, out=tmp_path / "shared", jobs=2))
    for a, b in zip(alone["runs"], shared["runs"], strict=True):
        assert {**a, "seconds_per_epoch": 0} == {**b, "seconds_per_epoch": 0}


def test_what_is_done_is_not_done_again(tmp_path, monkeypatch):
    settings = dict(runs=("dense", "condlr:tau=0.1"), seeds=(0, 1), epochs=1, attack_steps=1, out=tmp_path)
    first = train(TrainConfig(**settings))
    monkeypatch.setattr(Trainer, "run_epoch", pytest.fail)
    again = train(TrainConfig(**settings))
    assert again["runs"] == first["runs"] and len(first["runs"]) == 4
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(
        ValueError, match=r"dense-seed0.json has other settings \(lr 0.2, now 0.1\); choose another folder"
    ):
        train(TrainConfig(**settings | {"lr": 0.1}))
    assert files == {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(pytest.fail.Exception):
        train(TrainConfig(**settings | {"lr": 0.1, "overwrite": True}))
    (tmp_path / "dense-seed1.json").write_text("damaged")
    with pytest.raises(pytest.fail.Exception):
        train(TrainConfig(**settings))


def test_other_data_under_the_same_name_is_seen(tmp_path, monkeypatch):
    images = write_npz(tmp_path / "images.npz", n=60)
    settings = dict(data=str(images), runs=("dense",), epochs=1, attack_steps=1, out=tmp_path / "out")
    train(TrainConfig(**settings))
    assert train(TrainConfig(**settings))["runs"][0]["robustness"]["n"] == 18
    write_npz(tmp_path / "images.npz", n=100)
    with pytest.raises(ValueError, match=r"has other settings \(data with the checksum '\w{8}', now '\w{8}'\)"):
        train(TrainConfig(**settings))
    checkpoint = tmp_path / "out" / "dense-seed0.safetensors"
    with pytest.raises(
        ValueError, match=r"was trained on .*images.npz with the checksum \w{8}, which now has \w{8}; to"
    ):
        evaluate_checkpoint(checkpoint)
    assert evaluate_checkpoint(checkpoint, data=str(images))["n"] == 30
    assert train(TrainConfig(**settings, overwrite=True))["runs"][0]["robustness"]["n"] == 30
    assert evaluate_checkpoint(checkpoint)["n"] == 30


def test_a_checkpoint_is_there_when_attacks_fail(tmp_path, monkeypatch):
    def broken(*args, **options):
        raise OSError("no space")

    monkeypatch.setattr(checkpoint, "worst_case", broken)
    with pytest.raises(OSError):
        train(TrainConfig(runs=("dense",), epochs=1, out=tmp_path))
    assert (tmp_path / "dense-seed0.safetensors").is_file()


@pytest.mark.figures
def test_seeds_are_summed_up(tmp_path):
    results = train(TrainConfig(runs=("dense", "vanilla"), seeds=(0, 1, 2), epochs=2, attack_steps=2, out=tmp_path))
    header, rows = report.summary(results)
    shares = [100 * r["robustness"]["clean"] for r in results["runs"] if r["run"] == "dense"]
    mean, deviation = sum(shares) / 3, torch.tensor(shares, dtype=torch.float64).std().item()
    assert rows[0][header.index("clean\n%")] == f"{mean:.1f} ± {deviation:.1f}" and deviation > 0
    assert [r["seed"] for r in results["runs"]] == [0, 0, 1, 1, 2, 2]
    for name in ("results", "spectra", "parameters"):
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert len({r["robustness"]["clean"] for r in results["runs"]}) > 2


def test_settings_are_chosen_without_the_test_part(tmp_path):
    config = TrainConfig(runs=("dense",), epochs=1, validation=0.25, test=False, attack_steps=1, out=tmp_path)
    (record,) = train(config)["runs"]
    assert record["robustness"]["n"] == 315
    assert evaluate_checkpoint(tmp_path / record["checkpoint"])["clean"] == record["robustness"]["clean"]


def test_tables_show_the_attacks_of_the_settings(tmp_path):
    attacks = ("fgsm", "pgd-ce", "apgd-t")
    settings = {"runs": ("dense",), "epochs": 1, "eps": (0.1,), "attacks": attacks, "attack_steps": 1}
    results = train(TrainConfig(**settings, attack_restarts=1, out=tmp_path))
    header, (row,) = report.summary(results)
    shown = {title.replace("\n", " "): cell for title, cell in zip(header, row, strict=True)}
    robustness = results["runs"][0]["robustness"]
    for title, name in {"FGSM 0.1": "fgsm", "PGD 0.1": "pgd-ce", "APGD-T 0.1": "apgd-t", "worst 0.1": "worst"}.items():
        assert shown[title] == f"{100 * robustness[name][0]:.1f}"
