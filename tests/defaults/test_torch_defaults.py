"""set_default_dtype and set_default_device decide what new parameters are, and change nothing else."""

import ast
import copy
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import condlr_ext
from condlr_ext import attacks, baselines, functional, importers, info, linalg, optim, pruning, regularizers, robustness
from condlr_ext.experiments import TrainConfig, evaluate_checkpoint, inspect_checkpoint, train
from condlr_ext.experiments.data import crop_and_flip

DEFAULTS = [torch.float64, torch.bfloat16, "meta"]
PACKAGE = Path(condlr_ext.__file__).parent


@contextmanager
def torch_default(value):
    if isinstance(value, torch.dtype):
        torch.set_default_dtype(value)
    else:
        torch.set_default_device(value)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


def dense():
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(96, 12), nn.ReLU(), nn.Linear(12, 5)
    )


def low_rank():
    model = dense()
    condlr_ext.factorize(model, rank=4, exclude="5")
    return model


class Inputs:
    """What is made before the defaults change: models and data."""

    def __init__(self, folder):
        torch.manual_seed(1)
        self.folder = folder
        self.dense, self.low_rank, self.other = dense(), low_rank(), low_rank()
        self.double = low_rank().double()
        self.x, self.y = torch.rand(8, 1, 4, 4), torch.arange(8) % 5
        self.A = torch.randn(3, 9, 6)
        self.generator = torch.Generator().manual_seed(3)
        self.config = TrainConfig(
            runs=("vanilla", "condlr:tau=0.1"), data="digits", network="cnn", epochs=1, augment=True, eps=(0.1,),
            attack_steps=2, attack_restarts=1, attacks=("fgsm", "pgd-ce"), out=folder / "study", overwrite=True,
        )  # fmt: skip


def loss_of(model, x, y):
    return F.cross_entropy(model(x.to(next(model.parameters()).dtype)), y)


def steps(model, optimizer, given, count=3):
    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, given.x, given.y)
        loss.backward()
        return loss

    for _ in range(count):
        optimizer.step(closure)
    return list(model.state_dict().values())


def stepped(make, double=False):
    def work(given):
        model = given.double if double else given.low_rank
        return steps(model, make(model), given)

    return work


def projected(given):
    other = torch.optim.Adam(given.low_rank.named_parameters(), 0.01, fused=True)
    projector = optim.Projector(given.low_rank, tau=0.1)
    projector.attach(other)
    return steps(given.low_rank, other, given)


def rank_controlled(make):
    def work(given):
        optimizer = make(given.low_rank)
        controller = optim.RankController(given.low_rank, optimizer, max_rank=6)
        for _ in range(2):
            steps(given.low_rank, optimizer, given)
            report = controller.update(lambda i: loss_of(given.low_rank, given.x[i], given.y[i]), given.y.split(4))
        optim.compact(given.low_rank, optimizer)
        return [str(report), *steps(given.low_rank, optimizer, given)]

    return work


def saved(given):
    optimizer = optim.CondLRAdamW(given.low_rank, 0.01, tau=0.1)
    steps(given.low_rank, optimizer, given)
    condlr_ext.save(given.low_rank, given.folder / "model.safetensors", optimizer)
    resumed = optim.CondLRAdamW(given.other, 0.01, tau=0.1)
    condlr_ext.load(given.other, given.folder / "model.safetensors", resumed)
    return steps(given.other, resumed, given)


def adapted(given):
    before = copy.deepcopy(given.dense)
    adapters = condlr_ext.add_adapters(given.dense, rank=2, include=("3", "5"))
    values = [a.delta.S for a in adapters.values()]  # U and V are random
    trained = steps(given.dense, optim.CondLRSGD(given.dense, 0.1, tau=0.1), given)
    condlr_ext.save_lora(given.dense, given.folder / "lora")
    condlr_ext.load_lora(before, given.folder / "lora")
    condlr_ext.merge_adapters(before)
    return [*values, *trained, before(given.x)]


def attacked(given):
    call = given.low_rank, given.x, given.y, [0.0, 0.1]
    return [
        attacks.fgsm(*call),
        attacks.pgd(*call, steps=2, restarts=2, generator=given.generator),
        *attacks.fab(*call[:3], steps=3),
        *(attacks.square(*call, norm=norm, queries=4, generator=given.generator) for norm in ("linf", "l2")),
        *(attacks.apgd(*call, loss=loss, steps=4, generator=given.generator) for loss in ("ce", "dlr-targeted")),
        attacks.low_rank_pgd(*call, rank=2, steps=2, norm="nuc", init="warm", exact=True, generator=given.generator),
        *attacks.perturbation_report(given.x, attacks.fgsm(*call)).values(),
    ]


def evaluated(given):
    others = {"lora": partial(attacks.low_rank_pgd, rank=2, steps=2, generator=given.generator)}
    options = {"steps": 2, "others": others, "surrogate": given.other}
    call = given.low_rank, given.x, given.y, [0.1]
    return [str(robustness.evaluate(*call, **options)), str(robustness.worst_case(*call, steps=3))]


def certified(given):
    return [
        robustness.certified_radius(given.low_rank, given.x, given.y),
        str(robustness.lipschitz(given.dense, given.x)),
        *robustness.misalignment(given.low_rank, given.x).values(),
        robustness.conv_singular_values(given.dense[0].weight, (4, 4)),
        str(robustness.layer_spectra(given.dense)),
    ]


def adversarially_trained(given):
    optimizer = optim.CondLRSGD(given.low_rank, 0.1, tau=0.1)
    attack = partial(robustness.kl_pgd, eps=0.1, steps=2, generator=given.generator)
    loss = partial(robustness.trades_loss, attack=attack)
    return [robustness.train_epoch(given.low_rank, [(given.x, given.y)], optimizer, loss)]


def factorized(given):
    results = []
    for options in ({"budget": 0.4}, {"budget": 0.4, "measure": "flops"}, {"rank": 3, "init": "pca"}):
        model = copy.deepcopy(given.dense)
        report = condlr_ext.factorize(model, example_input=given.x, **options)
        results += [str(report), *model.state_dict().values(), str(condlr_ext.condition_numbers(model))]
        results += [condlr_ext.fold(model)(given.x), condlr_ext.to_dense(model)(given.x)]
    return results


def decomposed(given):
    results = []
    for name in ("cpu", "reference"):
        with condlr_ext.backend(name):
            for A in (given.A, given.A.double(), given.A.mT):
                A = A.detach().requires_grad_()
                outputs = [*linalg.svd(A), *linalg.qr(A), *linalg.polar(A), linalg.orthonormalize(A), linalg.cond(A)]
                outputs += [linalg.clip_spectrum(A, 0.1, band, 2.0) for band in ("rms", "mean", "optimal")]
                results += outputs
                results += torch.autograd.grad(sum(t.square().sum() for t in outputs[1:2] + outputs[-3:]), A)
    return results


def applied(given):
    layer, x = given.low_rank[3], given.x.flatten(1).repeat(1, 6)
    factors = layer.U, layer.S, layer.V, layer.bias
    outputs = [functional.low_rank_linear(x, *factors, route=route) for route in ("factorized", "merged", "auto")]
    return [*outputs, *torch.autograd.grad(sum(t.square().sum() for t in outputs), factors)]


def regularized(given):
    results = []
    for model in (given.dense, given.low_rank):
        terms = [regularizers.spectral_norm(model), regularizers.lipschitz(model, 0.1), regularizers.log_volume(model)]
        terms += [regularizers.robust_dlrt(model), regularizers.tsc(model), regularizers.cnc(model)]
        terms += [regularizers.cnc({"W": model[5].weight}, form="released"), regularizers.kappa_bound(given.A).sum()]
        results += [*terms, *torch.autograd.grad(sum(terms), list(model.parameters()), allow_unused=True)]
    return results


def pruned(given):
    results = []
    for add in (pruning.add_gates, partial(pruning.add_masks, keep=0.5)):
        model = copy.deepcopy(given.dense)
        add(model)
        results += steps(model.eval(), torch.optim.SGD(model.parameters(), 0.1), given)
        results += [str(pruning.kept_shares(model)), *pruning.make_permanent(model), *model.state_dict().values()]
    return results


def baseline_layers(given):
    pruned, two_factors = copy.deepcopy(given.dense), copy.deepcopy(given.dense)
    baselines.vanilla_low_rank(two_factors, {"0": 3, "3": 4})
    results = steps(two_factors, torch.optim.SGD(two_factors.parameters(), 0.1), given)
    baselines.svd_prune(pruned, tolerance=0.1)
    return results + list(pruned.state_dict().values())


def imported(given):
    layer = given.low_rank[3]
    state = {"0.U": layer.U, "0.S_hat": layer.S, "0.V": layer.V, "0.bias": layer.bias}
    model = nn.Sequential(nn.Linear(96, 12, device="cpu", dtype=torch.float32))
    torch.save({key: value.detach() for key, value in state.items()}, given.folder / "released.pt")
    importers.condlr(given.folder / "released.pt", model)
    return [model(given.x.flatten(1).repeat(1, 6))]


def ranks_by_energy(given):
    return [str(condlr_ext.factorize(given.dense, rank=condlr_ext.Energy(0.9)))]


def augmented(given):
    return [crop_and_flip(given.x, given.generator)]


def studied(given):
    results = train(given.config)
    last = given.config.out / results["runs"][-1]["checkpoint"]
    runs = [{key: run[key] for key in ("robustness", "step_loss") if key in run} for run in results["runs"]]
    return [str(runs), str(evaluate_checkpoint(last)), str(inspect_checkpoint(last)["layers"])]


def informed(given):
    return [str(info.collect()["ops"])]


WORK = {
    "CondLRSGD": stepped(lambda m: optim.CondLRSGD(m, 0.1, momentum=0.9, tau=0.1)),
    "CondLRSGD, sigma_max": stepped(
        lambda m: optim.CondLRSGD(m, 0.1, tau=0.1, sigma_max=1.0, band="mean"), double=True
    ),
    "CondLRAdamW": stepped(lambda m: optim.CondLRAdamW(m, 0.01, tau=0.1, amsgrad=True)),
    "CondLRAdamW, float64": stepped(lambda m: optim.CondLRAdamW(m, 0.01, tau=0.1, check_finite=True), double=True),
    "Projector": projected,
    "DLRT": stepped(lambda m: baselines.DLRT(m, 0.1, tolerance=0.1)),
    "RobustDLRT": stepped(lambda m: baselines.RobustDLRT(m, 0.1, beta=0.1, tolerance=0.1)),
    "CayleySGD": stepped(lambda m: baselines.CayleySGD(m, 0.1)),
    "ProjectedSGD": stepped(lambda m: baselines.ProjectedSGD(m, 0.1)),
    "ReleasedCondLR": stepped(lambda m: baselines.ReleasedCondLR(m, 0.1, tau=0.1)),
    "RankController, SGD": rank_controlled(lambda m: optim.CondLRSGD(m, 0.1, momentum=0.5, tau=0.1)),
    "RankController, AdamW": rank_controlled(lambda m: optim.CondLRAdamW(m, 0.01, tau=0.1)),
    "checkpoint": saved,
    "adapters": adapted,
    "attacks": attacked,
    "evaluate": evaluated,
    "certificates": certified,
    "adversarial training": adversarially_trained,
    "factorize": factorized,
    "linalg": decomposed,
    "functional": applied,
    "regularizers": regularized,
    "pruning": pruned,
    "two factors": baseline_layers,
    "importers": imported,
    "Energy": ranks_by_energy,
    "augmentation": augmented,
    "study": studied,
    "info": informed,
}


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("name", WORK)
def test_defaults_change_no_result(name, tmp_path):
    expected = results_of(WORK[name], tmp_path)
    for default in DEFAULTS:
        found = results_of(WORK[name], tmp_path, default)
        assert len(found) == len(expected) > 0
        for got, want in zip(found, expected, strict=True):
            if isinstance(want, torch.Tensor):
                assert (got.dtype, got.device) == (want.dtype, want.device), default
                torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True, msg=f"under {default}")
            else:
                assert got == want, default


def results_of(work, folder, default=torch.float32):
    given = Inputs(folder)
    with torch_default(default):
        torch.manual_seed(2)
        return [r.detach() if isinstance(r, torch.Tensor) else r for r in work(given)]


# what would follow the defaults: factories without a device or, where it does not follow from the values, a dtype
_FLOATING = (
    "zeros",
    "ones",
    "empty",
    "full",
    "eye",
    "rand",
    "randn",
    "linspace",
    "logspace",
    "scalar_tensor",
    "tensor",
)
_FACTORIES = (
    *_FLOATING,
    "arange",
    "as_tensor",
    "asarray",
    "randint",
    "randperm",
    "normal",
    "tril_indices",
    "triu_indices",
)
_NEW_PARAMETERS = {"networks.py"}  # as torch's own layers


_CASTS = ("to", "float", "double")


def _is_number(node):
    """Whether an argument of torch.where is a number for sure."""
    node = node.operand if isinstance(node, ast.UnaryOp) else node
    return isinstance(node, ast.Constant) or ast.unparse(node) in ("math.nan", "math.inf", "torch.nan", "torch.inf")


def test_every_factory_names_its_device_and_dtype():
    found = []
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        cast = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr in _CASTS}
        for call in ast.walk(tree):
            if not isinstance(call, ast.Call) or path.name in _NEW_PARAMETERS:
                continue
            owner, _, name = ast.unparse(call.func).rpartition(".")
            given = {keyword.arg for keyword in call.keywords}
            needed = {"device"} if name in _FACTORIES else set()
            needed |= {"dtype"} if name in _FLOATING else set()
            if name == "Generator" and not call.args:
                needed = {"device"}
            numbers = name == "where" and id(call) not in cast and all(map(_is_number, call.args[1:]))
            if owner == "torch" and (numbers or None not in given and not needed <= given):  # None: **options
                found.append(f"{path.relative_to(PACKAGE)}:{call.lineno}: {ast.unparse(call)}")
    assert not found


def test_a_study_leaves_random_states_alone(tmp_path, monkeypatch, no_figures):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)  # torch.manual_seed seeds every device
    given = Inputs(tmp_path)
    seeded.clear()
    before = torch.get_rng_state()
    studied(given)
    assert torch.equal(torch.get_rng_state(), before) and not seeded
