"""A path or a state_dict where the model belongs, and a model where the path belongs, as in torch.save's order."""

import pytest
from torch import nn

import condlr_ext
from condlr_ext import baselines, importers, optim, pruning, regularizers, robustness

TAKE_A_MODEL = {
    "factorize": lambda model: condlr_ext.factorize(model, budget=0.5),
    "fold": condlr_ext.fold,
    "to_dense": condlr_ext.to_dense,
    "compact": condlr_ext.compact,
    "condition_numbers": condlr_ext.condition_numbers,
    "layer_metrics": condlr_ext.layer_metrics,
    "add_adapters": lambda model: condlr_ext.add_adapters(model, rank=2),
    "merge_adapters": condlr_ext.merge_adapters,
    "save": lambda model: condlr_ext.save(model, nn.Linear(2, 2)),
    "load": lambda model: condlr_ext.load(model, nn.Linear(2, 2)),
    "save_lora": lambda model: condlr_ext.save_lora(model, nn.Linear(2, 2)),
    "load_lora": lambda model: condlr_ext.load_lora(model, nn.Linear(2, 2)),
    "importers.condlr": lambda model: importers.condlr({}, model),
    "importers.robust_dlrt": lambda model: importers.robust_dlrt({}, model),
    "importers.oialr": lambda model: importers.oialr({}, model),
    "importers.geolora": lambda model: importers.geolora({}, model, rank=2, alpha=1.0),
    "importers.polar": lambda model: importers.polar({}, model, alpha=1.0),
    "Projector": lambda model: optim.Projector(model, tau=0.1),
    "param_groups": optim.param_groups,
    "add_masks": lambda model: pruning.add_masks(model, 0.5),
    "add_gates": pruning.add_gates,
    "freeze_masks": pruning.freeze_masks,
    "make_permanent": pruning.make_permanent,
    "kept_shares": pruning.kept_shares,
    "layer_spectra": robustness.layer_spectra,
    "layer_matrices": regularizers.layer_matrices,
    "svd_prune": lambda model: baselines.svd_prune(model, rank=2),
    "vanilla_low_rank": lambda model: baselines.vanilla_low_rank(model, {}),
}


@pytest.mark.parametrize("model", ["run.safetensors", nn.Linear(2, 2).state_dict()], ids=["path", "state_dict"])
@pytest.mark.parametrize("function", TAKE_A_MODEL)
def test_what_is_no_model_is_named(function, model):
    with pytest.raises(TypeError, match=rf"^{function}: model must be a torch.nn.Module, got {type(model).__name__}$"):
        TAKE_A_MODEL[function](model)


@pytest.mark.parametrize("path", [None, 3, nn.Linear(2, 2)], ids=["None", "int", "Module"])
def test_what_is_no_path_is_named(path):
    model, got = nn.Linear(2, 2), type(path).__name__
    for function, argument in (("save", "path"), ("load", "path"), ("save_lora", "folder"), ("load_lora", "folder")):
        with pytest.raises(TypeError, match=f"^{function}: {argument} must be a str or os.PathLike, got {got}$"):
            getattr(condlr_ext, function)(model, path)
    for name in ("condlr", "robust_dlrt", "oialr"):
        with pytest.raises(TypeError, match=f"^importers.{name}: source, .* must be a str or os.PathLike, got {got}$"):
            getattr(importers, name)(path, model)
