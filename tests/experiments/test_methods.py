"""Training methods: their texts and options, and what each does to a network."""

import math
from functools import partial

import pytest
import torch
from helpers.study_runs import begin

import condlr_ext
from condlr_ext import linalg
from condlr_ext.baselines import TwoFactorConv, vanilla_low_rank
from condlr_ext.experiments import RunSpec, TrainConfig, data, train
from condlr_ext.experiments.checkpoint import load_checkpoint
from condlr_ext.experiments.inspect_layers import core, dense_layers, low_rank_layers
from condlr_ext.experiments.methods import METHODS, CondLR, Dense, Vanilla
from condlr_ext.experiments.methods.dense import keep_below
from condlr_ext.experiments.networks import build
from condlr_ext.experiments.trainer import Trainer

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


@pytest.mark.parametrize(
    "text, expected",
    [
        ("dense", Dense()),
        ("vanilla", Vanilla(budget=0.27)),
        ("vanilla:rank=5", Vanilla(rank=5)),
        ("condlr:tau=0", CondLR(tau=0.0, budget=0.27)),
        ("condlr:tau=inf,rank=0.2", CondLR(tau=math.inf, rank=0.2)),
        ("condlr:sigma_max=1.5,tau=0.1,budget=0.3,band=mean", CondLR(tau=0.1, budget=0.3, sigma_max=1.5, band="mean")),
    ],
)
def test_run_texts(text, expected):
    run = RunSpec.parse(text)
    assert run == expected
    assert RunSpec.parse(str(run)) == run


@pytest.mark.parametrize(
    "text, label",
    [
        ("dense", "dense"),
        ("vanilla:budget=0.4,lr=0.05,sigma_max=1.5,cap=clip", "vanilla UVᵀ σ≤1.5 clip budget 0.4 lr 0.05"),
        (
            "condlr:init=pca,rank=40/17,tau=0,band=mean,optimizer=adamw,weight_decay=0.1",
            "CondLR AdamW τ=0 mean rank 40/17 PCA init wd 0.1",
        ),
        ("condlr:tau=0.1,optimizer=sgd", "CondLR τ=0.1"),
        ("released:tau=0.1,rank=0.2", "released CondLR τ=0.1 rank 0.2"),
        ("cayley:full=true", "Cayley SGD full"),
        ("projected:tau=0.5", "projected SGD τ=0.5"),
        ("robust-dlrt:beta=0.1,tolerance=0.2,momentum=0", "RobustDLRT ϑ=0.2 β=0.1 μ=0"),
        ("svd-prune:finetune=0.5,budget=0.3", "SVD prune budget 0.3"),
        ("tscnc:keep=0.4,cnc=0.1", "TSCNC keep 0.4"),
    ],
)
def test_labels(text, label):
    assert RunSpec.parse(text).label == label


def test_the_order_of_options_in_a_text_is_fixed():
    """Texts are the keys of results."""
    text = "condlr:lr=0.1,band=mean,sigma_max=1,init=pca,rank=1,tau=0,momentum=0.1"
    assert str(RunSpec.parse(text)) == "condlr:tau=0.0,rank=1,init=pca,sigma_max=1.0,band=mean,lr=0.1,momentum=0.1"


def test_every_method_is_registered():
    names = {"dense", "vanilla", "condlr", "released", "cayley", "projected", "dlrt", "robust-dlrt", "svd-prune"}
    assert set(METHODS) == names | {"tscnc"} == {text.partition(":")[0] for text in RUNS}


def test_an_integer_rank_is_no_fraction():
    assert RunSpec.parse("vanilla:rank=1").rank == 1 and isinstance(RunSpec.parse("vanilla:rank=1").rank, int)
    assert isinstance(RunSpec.parse("vanilla:rank=1.0").rank, float)


@pytest.mark.parametrize(
    "text, message",
    [
        ("lora", "method must be one of cayley, condlr, dense, .*, got 'lora'"),
        ("condlr", "condlr needs tau"),
        ("condlr:tau=-1", "tau must be >= 0"),
        ("condlr:tau=nan", "tau must be >= 0"),
        ("condlr:tau=x", "tau must be a number, got 'x'"),
        ("condlr:tau=0,tau=1", "given once"),
        ("condlr:tau", "each option must be KEY=VALUE"),
        ("condlr:tau=0,gamma=1", "condlr takes tau, budget, rank, init, sigma_max, band, .*, got gamma"),
        ("condlr:tau=0,band=max", "band must be 'rms', 'mean' or 'optimal', got 'max'"),
        ("condlr:tau=0,sigma_max=0", "sigma_max must be"),
        ("condlr:tau=0,budget=0", "budget must be > 0, got 0"),
        ("vanilla:budget=0.2,rank=3", "budget or rank, not both"),
        ("vanilla:tau=0.1", "vanilla takes budget, rank, init, sigma_max, cap, lr, momentum, weight_decay, got tau"),
        ("dense:tau=1", "dense takes budget, rank, init, sigma_max, cap, lr, momentum, weight_decay, got tau"),
        ("dense:lr=0", "lr must be > 0, got 0"),
        ("dense:lr=inf", "lr must be finite, got inf"),
        ("dense:momentum=true", "momentum must be a number, got True"),
        ("vanilla:rank=4/x", "rank must be an integer or a number or a list, got '4/x'"),
        ("condlr:tau=0.1,method=dense", "given once, got 'method=dense'"),
        ("condlr:tau=0.1,self=1", "condlr takes .*, got self"),
    ],
)
def test_bad_run_texts(text, message):
    with pytest.raises(ValueError, match=message):
        RunSpec.parse(text)


@pytest.mark.parametrize("run", RUNS)
def test_run_texts_of_every_method(run):
    spec = RunSpec.parse(run)
    assert RunSpec.parse(str(spec)) == spec and spec.label


@pytest.mark.parametrize(
    "text, message",
    [
        ("dlrt", "dlrt needs tolerance"),
        ("robust-dlrt:tolerance=0.1", "robust-dlrt needs beta"),
        ("dense:cap=clip", "dense takes cap with sigma_max only"),
        ("dense:sigma_max=1,cap=shrink", "cap must be 'clip' or 'rescale'"),
        ("condlr:tau=0.1,optimizer=lion", "optimizer must be 'sgd' or 'adamw'"),
        ("cayley:full=true,rank=3", "full has no rank, budget or init"),
        ("cayley:full=yes", "full must be true or false"),
        ("dense:rank=3", 'dense takes budget and rank with init="pca" only'),
        ("vanilla:init=random", "init must be 'pca', got 'random'"),
        ("cayley:full=true,init=pca", "full has no rank, budget or init"),
        ("svd-prune:finetune=1", "finetune must be < 1, got 1"),
        ("dense:momentum=1", "momentum must be < 1, got 1"),
    ],
)
def test_bad_runs(text, message):
    with pytest.raises(ValueError, match=message):
        RunSpec.parse(text)


def test_ranks_of_each_layer_in_turn(tmp_path):
    spec = RunSpec.parse("condlr:tau=0.1,rank=40/17")
    assert spec == RunSpec.parse({"method": "condlr", "tau": 0.1, "rank": [40, 17]}) == RunSpec.parse(str(spec))
    for run in (str(spec), "vanilla:rank=40/17"):
        assert begin(run).monitor.ranks == {"fc1": 40, "fc2": 17}
    with pytest.raises(ValueError, match=r"a rank for each of 2 hidden layers \(fc1, fc2\), got 3"):
        train(TrainConfig(runs=("condlr:tau=0.1,rank=4/4/4",), out=tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", [Vanilla, partial(CondLR, tau=0.1)])
def test_both_methods_get_the_same_ranks_and_leave_the_head(method):
    for size, ranks in (({"budget": 0.27}, {"fc1": 32, "fc2": 20}), ({"rank": 0.2}, {"fc1": 13, "fc2": 52})):
        trainer = begin(method(**size))
        assert trainer.monitor.ranks == ranks and isinstance(trainer.model.head, torch.nn.Linear)


@pytest.mark.parametrize("network", ["mlp", "cnn"])
@pytest.mark.parametrize("run", RUNS)
def test_every_method_trains(run, network):
    trainer = begin(run, network)
    assert len(list(trainer.run())) == 4
    record = trainer.finish()
    # 32 steps do not get every convolution off the ground
    assert record["status"] in (("trained",) if network == "mlp" else ("trained", "collapsed"))
    assert record["loss"][-1] < record["loss"][0] < math.log(10) + 0.3
    assert len(record["validation"]) == 4 and record["best"]["validation"] == max(record["validation"])
    method = trainer.method
    layers = low_rank_layers(trainer.model)
    assert set(record["ranks"]) == set(layers) and bool(layers) == method.low_rank
    assert all(len(record["spectra"][name]) == rank for name, rank in record["ranks"].items())
    if method.name in ("condlr", "projected"):
        assert record["max_kappa"] <= (1 + method.tau) * (1 + 1e-5)
    if "full" in method.given:
        for layer in dense_layers(trainer.model).values():
            W = layer.weight.detach().flatten(1)
            gram = W @ W.mT if len(W) <= W[0].numel() else W.mT @ W
            assert (gram - torch.eye(len(gram))).abs().max() < 1e-5
    if method.name == "vanilla" and network == "cnn":
        assert any(isinstance(layer, TwoFactorConv) for layer in layers.values())


def test_svd_prune_truncates_a_trained_network():
    trainer = begin("svd-prune:rank=0.3,finetune=0.25", epochs=4)
    assert list(trainer.method.phases(4)) == [3]
    for _ in range(3):
        trainer.run_epoch()
    assert not low_rank_layers(trainer.model)
    weights = {name: layer.weight.detach().clone() for name, layer in dense_layers(trainer.model).items()}
    trainer._change(trainer._phases[3])
    for name, layer in low_rank_layers(trainer.model).items():
        U, sigma, V = linalg.svd(weights[name].double())
        r = layer.rank
        torch.testing.assert_close(layer.weight.double(), (U[:, :r] * sigma[:r]) @ V[:, :r].mT, rtol=0, atol=1e-5)
    assert trainer.schedule.last_epoch == 3 and trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.2 * 0.09)


@pytest.mark.parametrize("how", ["clip", "rescale"])
@pytest.mark.parametrize("method", ["dense", "vanilla:budget=0.4,"])
def test_the_cap_as_a_control(method, how):
    text = f"{method}{'' if method[-1] == ',' else ':'}sigma_max=0.7,cap={how},lr=0.1"
    trainer = begin(text, "cnn", epochs=2)
    for _ in range(2):
        trainer.run_epoch()
        for layer in (low_rank_layers(trainer.model) or dense_layers(trainer.model)).values():
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


def test_an_epoch_of_robust_dlrt_ends_with_a_whole_model():
    """In the middle of a cycle the model has twice the rank: 256 samples are 8 steps, cycles are of 1 + 5."""
    trainer = begin("robust-dlrt:tolerance=0.1,beta=0.1,core_steps=5,budget=0.4,lr=0.05")
    start = trainer.monitor.ranks
    trainer.run_epoch()
    record = trainer.finish()
    assert all(rank < 2 * start[name] for name, rank in record["ranks"].items())
    assert record["max_kappa"] < 1e6 and all(len(kappa) == 2 for kappa in record["kappa"].values())
    assert trainer.optimizer.param_groups[0]["core_steps_left"] == 0


@pytest.mark.parametrize("run", ["dense", "vanilla", "condlr:tau=inf", "released:tau=0.1"])
def test_start_on_principal_directions(run, tmp_path, monkeypatch):
    """All start from one weight, that of factorize, and keep it if they do not train."""
    monkeypatch.setattr(Trainer, "run_epoch", lambda trainer: setattr(trainer, "epoch", trainer.epoch + 1))
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
