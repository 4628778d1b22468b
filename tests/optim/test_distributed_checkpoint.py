"""State of the optimizers through torch.distributed.checkpoint, which initializes, flattens and loads it its own way."""

import copy

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers.training import batches, make_model, train
from torch.distributed.checkpoint import state_dict as torch_state

from condlr_ext.optim import CondLRAdamW, CondLRSGD, param_groups

OPTIMIZERS = {
    "sgd": (CondLRSGD, {"momentum": 0.5}),
    "sgd, dampening": (CondLRSGD, {"momentum": 0.5, "dampening": 0.5}),
    "adamw": (CondLRAdamW, {"eps": 1e-4}),
    "amsgrad": (CondLRAdamW, {"eps": 1e-4, "amsgrad": True}),
}


def make(kind: str, dtype: torch.dtype, seed: int = 0):
    model = make_model(seed=seed, dtype=dtype)
    cls, options = OPTIMIZERS[kind]
    return model, cls(param_groups(model, cores={"lr": 0.02}), 0.01, tau=0.1, **options)


def all_values(model, optimizer) -> dict:
    state = {f"{n}/{key}": value for n, p in model.named_parameters() for key, value in optimizer.state[p].items()}
    return model.state_dict() | {key: torch.as_tensor(value) for key, value in state.items()}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_new_optimizer_has_all_of_its_state(kind):
    model, optimizer = make(kind, torch.bfloat16)
    before = {p: state.keys() for p, state in optimizer.state.items()}
    train(model, optimizer, batches(2, torch.bfloat16))
    assert len(before) == len(list(model.parameters()))
    assert {p: state.keys() for p, state in optimizer.state.items()} == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flattened"])
def test_training_resumes_bit_for_bit(kind, dtype, flat, tmp_path):
    options = torch_state.StateDictOptions(flatten_optimizer_state_dict=flat)
    data = list(batches(4, dtype))
    model, optimizer = make(kind, dtype)
    train(model, optimizer, data[:2])
    weights, state = torch_state.get_state_dict(model, optimizer, options=options)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=tmp_path / "saved", no_dist=True)
    train(model, optimizer, data[2:])

    again, resumed = make(kind, dtype, seed=7)
    weights, state = torch_state.get_state_dict(again, resumed, options=options)
    saved = {"model": weights, "optimizer": state}
    dcp.load(saved, checkpoint_id=tmp_path / "saved", no_dist=True)
    torch_state.set_state_dict(
        again, resumed, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"], options=options
    )
    train(again, resumed, data[2:])
    torch.testing.assert_close(all_values(again, resumed), all_values(model, optimizer), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_optimizer_alone_leaves_the_weights(kind, dtype):
    """torch initializes an optimizer without state by a step with lr = 0."""
    model, optimizer = make(kind, dtype)
    train(model, optimizer, batches(2, dtype))
    weights, state = map(copy.deepcopy, torch_state.get_state_dict(model, optimizer))
    again, resumed = make(kind, dtype, seed=7)
    torch_state.set_model_state_dict(again, weights)
    torch_state.set_optimizer_state_dict(again, resumed, state)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
