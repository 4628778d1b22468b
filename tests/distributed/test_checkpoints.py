"""torch.distributed.checkpoint: saved by two processes, loaded by one, two and three; training goes on as it would have."""

import copy

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers.sharding import OPTIMIZERS, distribute, gradients, network, set_gradients
from torch.distributed.checkpoint import state_dict as torch_state

from condlr_ext.optim import CondLRAdamW, CondLRSGD

KINDS = {
    "sgd": OPTIMIZERS["sgd"],
    "dampening": lambda model: CondLRSGD(model, 0.1, 0.9, dampening=0.5, tau=0.1),
    "adamw": OPTIMIZERS["adamw"],
    "amsgrad": lambda model: CondLRAdamW(model, 0.1, eps=1e-3, tau=0.1, amsgrad=True),
}


def step(model, optimizer, numbers):
    for number in numbers:
        set_gradients(model, gradients(model, number))
        optimizer.step()


def values(model, optimizer):
    """Whole parameters and state by name."""
    found = {}
    for name, p in model.named_parameters():
        found[name] = p.detach()
        found |= {f"{name}/{key}": torch.as_tensor(value) for key, value in optimizer.state[p].items()}
    return {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in found.items()}


def check_save(mesh, kind, dtype, flat, path):
    options = torch_state.StateDictOptions(flatten_optimizer_state_dict=flat)
    model = distribute(network(dtype), mesh)
    optimizer = KINDS[kind](model)
    fresh = values(model, optimizer)
    torch_state.get_state_dict(model, optimizer, options=options)
    torch.testing.assert_close(values(model, optimizer), fresh, rtol=0, atol=0)  # no step was taken
    step(model, optimizer, range(2))
    weights, state = torch_state.get_state_dict(model, optimizer, options=options)
    saved = {"model": weights, "optimizer": state}
    dcp.save(saved, checkpoint_id=path, process_group=mesh.get_group())
    at_save = copy.deepcopy(values(model, optimizer))
    step(model, optimizer, range(2, 4))
    return at_save, values(model, optimizer)


def check_load(mesh, kind, dtype, flat, path, at_save, at_end, exact):
    options = torch_state.StateDictOptions(flatten_optimizer_state_dict=flat)
    model = network(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    distribute(model, mesh)
    optimizer = KINDS[kind](model)
    weights, state = torch_state.get_state_dict(model, optimizer, options=options)
    saved = {"model": weights, "optimizer": state}
    dcp.load(saved, checkpoint_id=path, process_group=mesh.get_group())
    torch_state.set_state_dict(
        model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"], options=options
    )
    torch.testing.assert_close(values(model, optimizer), at_save, rtol=0, atol=0)
    step(model, optimizer, range(2, 4))
    rounding = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(values(model, optimizer), at_end, **rounding)


QUICK = [("sgd", True), ("dampening", False), ("adamw", False), ("amsgrad", True)]
CASES = [
    pytest.param(kind, flat, marks=[] if (kind, flat) in QUICK else pytest.mark.slow, id=f"{kind}-{name}")
    for kind in KINDS
    for flat, name in ((False, "nested"), (True, "flattened"))
]


@pytest.mark.parametrize("kind, flat", CASES)
def test_training_resumes_in_other_numbers_of_processes(pool, kind, flat, tmp_path):
    """Bit for bit in as many processes, to the rounding of sums in others."""
    at_save, at_end = pool.run(check_save, 2, kind, torch.float64, flat, tmp_path)[0]
    for world in (2, 1, 3):
        pool.run(check_load, world, kind, torch.float64, flat, tmp_path, at_save, at_end, world == 2)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_masters_resume(pool, kind, tmp_path):
    """float32 masters of bfloat16 parameters."""
    at_save, at_end = pool.run(check_save, 2, kind, torch.bfloat16, True, tmp_path)[0]
    pool.run(check_load, 2, kind, torch.bfloat16, True, tmp_path, at_save, at_end, True)
