"""Studies: every method on every kind of network, several seeds, settings in TOML, interrupted and repeated trainings."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from helpers.data_files import write_npz

import condlr_ext
from condlr_ext import linalg
from condlr_ext.baselines import TwoFactorConv, vanilla_low_rank
from condlr_ext.experiments import (
    RunSpec,
    TrainConfig,
    data,
    evaluate_checkpoint,
    inspect_checkpoint,
    report,
    train,
)
from condlr_ext.experiments import (
    study as training,
)
from condlr_ext.experiments.checkpoint import load_checkpoint
from condlr_ext.experiments.inspect_layers import core, dense_layers, low_rank_layers, matrix_shape
from condlr_ext.experiments.methods import compress, keep_below, phases, starts_dense
from condlr_ext.experiments.networks import build
from condlr_ext.experiments.trainer import Fit

pytestmark = pytest.mark.usefixtures("no_figures")

RUNS = (
    "dense",
    "vanilla:budget=0.4,lr=0.05",
    "condlr:tau=0.1,budget=0.4",
    "condlr:tau=0.1,budget=0.4,optimizer=adamw,lr=0.003",
    "released:tau=0.1,budget=0.4,lr=0.05",
    "cayley:budget=0.4,lr=0.05",
    "projected:tau=0.5,budget=0.4,lr=0.05",
    "cayley:full=true,lr=0.05",
    "dlrt:tolerance=0.1,budget=0.4,lr=0.05,momentum=0.0",
    "robust-dlrt:tolerance=0.1,beta=0.1,core_steps=5,budget=0.4,lr=0.05",
    "svd-prune:budget=0.4,finetune=0.5",
    "tscnc:keep=0.4,lr=0.1",
)


def small_split(n=256, seed=0):
    split = data.load("digits", seed)
    return dataclasses.replace(
        split,
        x_train=split.x_train[:n],
        y_train=split.y_train[:n],
        x_val=split.x_train[n:500],
        y_val=split.y_train[n:500],
    )


def begin(run, network="mlp", epochs=4, split=None, **settings):
    split = split or small_split()
    spec = RunSpec.parse(run)
    config = TrainConfig(runs=(spec,), epochs=epochs, network=network, **settings)
    torch.manual_seed(0)
    model = build(network, split.shape, split.classes)
    compress(model, spec.method, None if starts_dense(spec) else spec.sizing)
    return Fit(model, spec, config, split)


@pytest.mark.parametrize("network", ["mlp", "cnn"])
@pytest.mark.parametrize("run", RUNS)
def test_every_method_trains(run, network):
    fit = begin(run, network)
    for _ in range(4):
        fit.run_epoch()
    record = fit.record()
    # 32 steps do not get every convolution off the ground
    assert record["status"] in (("trained",) if network == "mlp" else ("trained", "collapsed"))
    assert record["loss"][-1] < record["loss"][0] < math.log(10) + 0.3
    assert len(record["validation"]) == 4 and record["best"]["validation"] == max(record["validation"])
    spec = fit.spec
    layers = low_rank_layers(fit.model)
    assert set(record["ranks"]) == set(layers) and bool(layers) == (spec.sizing is not None)
    assert all(len(record["spectra"][name]) == rank for name, rank in record["ranks"].items())
    if spec.method in ("condlr", "projected"):
        assert record["max_kappa"] <= (1 + spec.tau) * (1 + 1e-5)
    if spec.full:
        for layer in dense_layers(fit.model).values():
            W = layer.weight.detach().flatten(1)
            gram = W @ W.mT if len(W) <= W[0].numel() else W.mT @ W
            assert (gram - torch.eye(len(gram))).abs().max() < 1e-5
    if spec.method == "vanilla" and network == "cnn":
        assert any(isinstance(layer, TwoFactorConv) for layer in layers.values())


def test_svd_prune_truncates_a_trained_network():
    fit = begin("svd-prune:rank=0.3,finetune=0.25", epochs=4)
    assert list(phases(fit.spec, 4)) == [3]
    for _ in range(3):
        fit.run_epoch()
    assert not low_rank_layers(fit.model)
    weights = {name: layer.weight.detach().clone() for name, layer in dense_layers(fit.model).items()}
    fit._change(fit._phases[3])
    for name, layer in low_rank_layers(fit.model).items():
        U, sigma, V = linalg.svd(weights[name].double())
        r = layer.rank
        torch.testing.assert_close(layer.weight.double(), (U[:, :r] * sigma[:r]) @ V[:, :r].mT, rtol=0, atol=1e-5)
    assert fit.schedule.last_epoch == 3 and fit.optimizer.param_groups[0]["lr"] == pytest.approx(0.2 * 0.09)


def test_ranks_of_each_layer_in_turn(tmp_path):
    spec = RunSpec.parse("condlr:tau=0.1,rank=40/17")
    assert spec == RunSpec.of({"method": "condlr", "tau": 0.1, "rank": [40, 17]}) == RunSpec.parse(str(spec))
    assert begin(str(spec)).ranks == {"fc1": 40, "fc2": 17} == begin("vanilla:rank=40/17").ranks
    with pytest.raises(ValueError, match=r"a rank for each of 2 hidden layers \(fc1, fc2\), got 3"):
        train(TrainConfig(runs=("condlr:tau=0.1,rank=4/4/4",), out=tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("how", ["clip", "rescale"])
@pytest.mark.parametrize("method", ["dense", "vanilla:budget=0.4,"])
def test_the_cap_as_a_control(method, how):
    text = f"{method}{'' if method[-1] == ',' else ':'}sigma_max=0.7,cap={how},lr=0.1"
    fit = begin(text, "cnn", epochs=2)
    for _ in range(2):
        fit.run_epoch()
        for layer in (low_rank_layers(fit.model) or dense_layers(fit.model)).values():
            assert linalg.svd(core(layer)).sigma[0] <= 0.7 * (1 + 1e-5)


@pytest.mark.parametrize("sigma_max", [0.5, 3.0])
def test_the_cap_is_met_and_no_more(sigma_max):
    """Clipping leaves the singular values below the cap, rescaling their ratios; the factors of A B share the cap."""
    torch.manual_seed(0)
    for how in ("clip", "rescale"):
        model = build("mlp", (6,), 3)
        with torch.no_grad():
            model.fc1.weight.mul_(20)
        vanilla_low_rank(model, {"fc2": 4})
        for part in model.fc2:
            torch.nn.init.orthogonal_(part.weight, 5.0)
        before = linalg.svd(model.fc1.weight.detach().double()).sigma
        keep_below(torch.optim.SGD(model.parameters(), lr=0.1), model, sigma_max, how)
        want = before.clamp(max=sigma_max) if how == "clip" else before * min(1, sigma_max / before[0].item())
        rounding = 32 * torch.finfo(torch.float32).eps * before[0].item()  # of the weight before
        torch.testing.assert_close(linalg.svd(core(model.fc1)).sigma, want, rtol=0, atol=rounding)
        together = torch.full((4,), sigma_max, dtype=torch.float64)
        torch.testing.assert_close(linalg.svd(core(model.fc2)).sigma, together, rtol=1e-5, atol=0)


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
    monkeypatch.setattr(training, "STATE_EVERY", -1)
    images = write_npz(tmp_path / "images.npz", n=400, shape=(1, 8, 8))
    settings = dict(data=str(images), network="cnn", validation=0.2, attack_steps=2, attack_restarts=1)
    settings |= dict(runs=(run,), epochs=5, eps=(0.1,))
    whole = train(TrainConfig(**settings, out=tmp_path / "whole"))["runs"][0]
    steps = len(whole["step_loss"])
    original = Fit._loss

    def interrupted(self, x, y):
        if len(self.history["step_loss"]) == steps // 2:
            raise KeyboardInterrupt
        return original(self, x, y)

    monkeypatch.setattr(Fit, "_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(TrainConfig(**settings, out=tmp_path / "parts"))
    calls = []
    monkeypatch.setattr(Fit, "_loss", lambda self, x, y: calls.append(1) or original(self, x, y))
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


def test_what_is_done_is_not_done_again(tmp_path, monkeypatch):
    settings = dict(runs=("dense", "condlr:tau=0.1"), seeds=(0, 1), epochs=1, attack_steps=1, out=tmp_path)
    first = train(TrainConfig(**settings))
    monkeypatch.setattr(Fit, "run_epoch", pytest.fail)
    again = train(TrainConfig(**settings))
    assert again["runs"] == first["runs"] and len(first["runs"]) == 4
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(
        ValueError, match=r"dense-seed0.json is of other settings \(lr 0.2, now 0.1\); choose another folder"
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
    with pytest.raises(ValueError, match=r"of other settings \(data with the checksum '\w{8}', now '\w{8}'\)"):
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

    monkeypatch.setattr(training, "evaluate", broken)
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


def test_settings_are_chosen_without_the_test_part(tmp_path):
    config = TrainConfig(runs=("dense",), epochs=1, validation=0.25, test=False, attack_steps=1, out=tmp_path)
    (record,) = train(config)["runs"]
    assert record["robustness"]["n"] == 315
    assert evaluate_checkpoint(tmp_path / record["checkpoint"])["clean"] == record["robustness"]["clean"]


@pytest.mark.parametrize("adversarial", ["pgd", "low-rank-pgd"])
def test_adversarial_training(adversarial):
    """The steps it takes are those of attacked batches, and the attack leaves the model's mode and gradients alone."""
    plain, attacked = (
        begin("condlr:tau=0.1,budget=0.4", "cnn", adversarial=name, adversarial_eps=0.3, adversarial_steps=3)
        for name in ("", adversarial)
    )
    for fit in (plain, attacked):
        for _ in range(2):
            fit.run_epoch()
    assert attacked.record()["status"] == "trained"
    assert attacked.history["loss"][-1] > plain.history["loss"][-1]


def test_augmentation_needs_images():
    fit = begin("dense", "cnn", augment=True)
    fit.run_epoch()
    flat = dataclasses.replace(small_split(), x_train=small_split().x_train.flatten(1))
    with pytest.raises(ValueError, match=r"augment needs images \[C, H, W\], the samples are \[64\]"):
        begin("dense", augment=True, split=flat)


# ------------------------------------------------------------------------------------------------- settings


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
        ("epoch = 3", "unknown key 'epoch'; there are data, folder"),
        ("epochs = 0", "epochs must be an integer >= 1"),
        ("runs = [{tau = 0.1}]", "a table needs method"),
        ('runs = [{method = "condlr", tau = 0.1, gamma = 1}]', "a table needs method, and may have"),
        ("test = false", "there must be a validation part"),
        ("epochs = true", "epochs must be an integer, got True"),
        ('lr = "0.1"', "lr must be a number, got '0.1'"),
        ('augment = "no"', "augment must be true or false, got 'no'"),
        ("seeds = 3", "seeds must be a list of integers, got 3"),
        ("seeds = [1.5]", "seeds must be a list of integers"),
        ("data = 3", "data must be a text, got 3"),
        ("out = 3", "out must be a path, got 3"),
        ("device = 5", "device must be a text, got 5"),
        ('runs = "dense"', "runs must be a list, got 'dense'"),
        ("runs = [3]", "run: must be a text or a table, got 3"),
        ('runs = [{method = "dense", lr = [1]}]', r"run: lr must be a number, got \[1\]"),
        ('runs = [{method = "condlr", tau = 0.1, rank = [1, "2"]}]', "a rank of each layer must be an integer"),
        ('runs = ["robust-dlrt:tolerance=0.1,beta=0.1,core_steps=0"]', "core_steps must be an integer >= 1, got 0"),
        ('runs = ["dlrt:tolerance=1"]', r"tolerance must be in \[0, 1\), got 1"),
        ('attacks = "fgsm"', "attacks must be a list of texts, got 'fgsm'"),
        ('attacks = ["foo"]', r"attacks must be out of fgsm, .*, got \['foo'\]"),
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


@pytest.mark.parametrize("run", RUNS)
def test_run_texts_of_every_method(run):
    spec = RunSpec.parse(run)
    assert RunSpec.parse(str(spec)) == spec and spec.label and "/" not in spec.file and "," not in spec.file


@pytest.mark.parametrize(
    "text, message",
    [
        ("dlrt", "dlrt needs tolerance"),
        ("robust-dlrt:tolerance=0.1", "robust-dlrt needs beta"),
        ("dense:cap=clip", "dense takes budget, rank, init, lr, momentum, weight_decay, sigma_max, got cap"),
        ("dense:sigma_max=1,cap=shrink", "cap must be clip or rescale"),
        ("condlr:tau=0.1,optimizer=lion", "optimizer must be sgd or adamw"),
        ("cayley:full=true,rank=3", "full has no rank, budget or init"),
        ("cayley:full=yes", "full must be true or false"),
        ("dense:rank=3", 'dense takes budget and rank with init="pca" only'),
        ("vanilla:init=random", "init must be pca, got 'random'"),
        ("cayley:full=true,init=pca", "full has no rank, budget or init"),
        ("svd-prune:finetune=1", r"finetune must be in \(0, 1\)"),
        ("dense:momentum=1", r"momentum must be in \[0, 1\)"),
    ],
)
def test_bad_runs(text, message):
    with pytest.raises(ValueError, match=message):
        RunSpec.parse(text)


def test_inspect_shows_convolutions(tmp_path):
    config = TrainConfig(runs=("condlr:tau=0.1", "vanilla"), network="cnn", epochs=1, attack_steps=1, out=tmp_path)
    for record in train(config)["runs"]:
        layers = inspect_checkpoint(tmp_path / record["checkpoint"])["layers"]
        assert [(x["m"], x["n"]) for x in layers] == [(20, 9), (50, 180), (200, 200), (10, 200)]
        assert {x["name"]: x["rank"] for x in layers[:3]} == record["ranks"]
        assert all((x["route"] is not None) == (record["method"] == "condlr") for x in layers[:3])


@pytest.mark.parametrize("run", ["dense", "vanilla", "condlr:tau=inf", "released:tau=0.1"])
def test_start_on_principal_directions(run, tmp_path, monkeypatch):
    """All start from one weight, that of factorize, and keep it if they do not train."""
    monkeypatch.setattr(Fit, "run_epoch", lambda fit: setattr(fit, "epoch", fit.epoch + 1))
    text = f"{run}{',' if ':' in run else ':'}init=pca,rank=20/9"
    config = TrainConfig(runs=(text,), epochs=1, eps=(0.1,), attacks=("fgsm",), attack_steps=1, out=tmp_path)
    results = train(config)
    assert RunSpec.parse(str(config.runs[0])) == config.runs[0] and "PCA init" in config.runs[0].label
    split = data.load("digits", 0)
    torch.manual_seed(0)
    expected = build("mlp", split.shape, 10)
    condlr_ext.factorize(expected, rank={"fc1": 20, "fc2": 9}, exclude="head", init="pca", example_input=split.x_train)
    model, _ = load_checkpoint(tmp_path / results["runs"][0]["checkpoint"])
    assert (results["runs"][0]["kept"] == 1) == (run == "dense")  # zeros of the projection are not pruned weights
    for name in ("fc1", "fc2"):
        W = model.get_submodule(name)
        W = W[1].weight @ W[0].weight if run == "vanilla" else W.weight
        torch.testing.assert_close(W, expected.get_submodule(name).weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize("run", ["dense", "vanilla", "condlr:tau=0.1"])
def test_images_are_trained_and_attacked_in_channels_last(run, tmp_path, monkeypatch):
    seen = {"training": [], "attack": []}
    original = {"training": Fit.run_epoch, "attack": training.evaluate}

    def watched(where, model, call):
        conv = next(m for name, m in model.named_modules() if name.endswith("body.3"))
        hook = conv.register_forward_hook(lambda _, inputs, output: seen[where].append((inputs[0], output)))
        try:
            return call()
        finally:
            hook.remove()

    monkeypatch.setattr(Fit, "run_epoch", lambda fit: watched("training", fit.model, lambda: original["training"](fit)))
    monkeypatch.setattr(
        training,
        "evaluate",
        lambda model, *a, **k: watched("attack", model, lambda: original["attack"](model, *a, **k)),
    )
    results = train(TrainConfig(runs=(run,), network="cnn", epochs=1, attack_steps=1, out=tmp_path))
    assert results["runs"][0]["status"] != "diverged"
    for pairs in seen.values():
        assert len(pairs) > 3 and all(t.is_contiguous(memory_format=torch.channels_last) for p in pairs for t in p)


def test_an_epoch_of_robust_dlrt_ends_with_a_whole_model():
    """In the middle of a cycle the model has twice the rank: 256 samples are 8 steps, cycles are of 1 + 5."""
    fit = begin("robust-dlrt:tolerance=0.1,beta=0.1,core_steps=5,budget=0.4,lr=0.05")
    start = fit.ranks
    fit.run_epoch()
    record = fit.record()
    assert all(rank < 2 * start[name] for name, rank in record["ranks"].items())
    assert record["max_kappa"] < 1e6 and all(len(kappa) == 2 for kappa in record["kappa"].values())
    assert fit.optimizer.param_groups[0]["core_steps_left"] == 0


def test_tables_show_the_attacks_of_the_settings(tmp_path):
    attacks = ("fgsm", "pgd-ce", "apgd-t")
    settings = {"runs": ("dense",), "epochs": 1, "eps": (0.1,), "attacks": attacks, "attack_steps": 1}
    results = train(TrainConfig(**settings, attack_restarts=1, out=tmp_path))
    header, (row,) = report.summary(results)
    shown = {title.replace("\n", " "): cell for title, cell in zip(header, row, strict=True)}
    robustness = results["runs"][0]["robustness"]
    for title, name in {"FGSM 0.1": "fgsm", "PGD 0.1": "pgd-ce", "APGD-T 0.1": "apgd-t", "worst 0.1": "worst"}.items():
        assert shown[title] == f"{100 * robustness[name][0]:.1f}"


def test_matrix_shape_of_every_layer():
    for layer in (torch.nn.Conv2d(4, 6, 3), torch.nn.Linear(36, 6)):
        assert matrix_shape(layer) == (6, 36)
    low_rank = condlr_ext.LowRankConv2d(4, 6, 3, rank=2)
    assert matrix_shape(low_rank) == (6, 36) == matrix_shape(TwoFactorConv.from_dense(torch.nn.Conv2d(4, 6, 3), 2))


STUDIES = sorted((Path(__file__).parents[2] / "studies").glob("*.toml"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_studies_can_be_read(path):
    config = TrainConfig.read(path)
    assert config.out == Path("runs") / path.stem
    if "digits" not in path.stem:
        milestones = [round(share * config.epochs) for share in config.drop_at]
        assert config.epochs == 120 and milestones == [70, 100] and config.validation == 0.25


def test_there_are_studies():
    assert len(STUDIES) >= 4
